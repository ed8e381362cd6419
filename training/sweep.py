"""Several seeds, and several values of a setting, in one command: a table with 95 % intervals."""

import copy
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from augment.cli import main
from augment.config import allowed, find_config, quote_names
from augment.core.errors import UserError
from augment.core.files import JsonObject, locked, read_json, remember, sha256, write_table
from augment.core.progress import Progress
from augment.training.checks import expect
from augment.training.data.identity import IMAGES
from augment.training.data.module import ImageData
from augment.training.lightning import remove_partial
from augment.training.models.metrics import interval


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as for jsonargparse."""


_SCIENTIFIC = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))

_SEEDED = {"FewShot": "seed", "LongTail": "seed", "SyntheticDataset": "mixing.seed"}
"""The argument for the seed of each class that draws random numbers of its own."""

_ACCURACY, _GAIN = "test/accuracy", "test/gain"

Config = JsonObject
"""Settings by name, nested; or by dotted name."""


def sweep(
    recipe: str,
    out: str,
    seeds: int = 5,
    vary: dict[str, list[Any]] | None = None,
    given: Config | None = None,
) -> None:
    """Train and test with several seeds, and print intervals; see `augment.commands.sweep`."""
    expect(seeds >= 2, "at least 2 seeds for an interval", seeds)
    try:
        base = yaml.load(quote_names(Path(find_config(recipe)).read_text()), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"expected a configuration at {recipe}, got {reason}; correct it") from None
    if not isinstance(base, dict):
        raise UserError(f"expected settings by name in {recipe}, got none; see configs/")
    for key, value in (given or {}).items():
        assign(base, key, value)
    vary, root = vary or {}, Path(out)
    for key, values in vary.items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"expected a list of values for {key}, got {values!r}; write [{values}]"
            )
    choices = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    runs, rows = [*itertools.product(choices, range(seeds))], []
    with locked(root) as lock, Progress(runs, "runs", unit="run") as bar:
        remove_partial(lock, root)
        for chosen, seed in bar:
            bar.set_postfix_str(", ".join(f"{k.split('.')[-1]} {v}" for k, v in chosen.items()))
            rows.append({**chosen, "seed": seed, **_train(base, chosen, seed, root)})
            _write(root / "runs.csv", rows)
        summary = list(_summarise(rows, [*vary]))
        _write(root / "summary.csv", summary)
    _print_table(summary, [*vary])


def _train(base: Config, chosen: Config, seed: int, out: Path) -> dict[str, float]:
    """Return the test results of one run, in a process of its own; read back if it is done."""
    parts = [f"{key.split('.')[-1]}-{_named(value)}" for key, value in chosen.items()]
    folder = out / "_".join([*parts, f"seed-{seed}"])
    config = copy.deepcopy(base)
    for key, value in chosen.items():
        assign(config, key, copy.deepcopy(value))
    config = seeded(config, seed)
    for key, value in chosen.items():  # a seed that is varied itself stays as it is
        if key.split(".")[-1] == "seed":
            assign(config, key, value)
    assign(config, "trainer.default_root_dir", str(folder))
    assign(config, "seed_everything", seed)
    assign(config, "trainer.enable_progress_bar", False)
    file, done = folder / "given.json", folder / "test.json"
    remember(file, config, "--out")
    if not done.exists():
        code = _run_child(["train", "fit", "--config", str(file)], folder / "log.txt")
        if code or not done.exists():
            last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            reason = last[0] if code and last else "no test images (data.test)"
            raise UserError(f"expected the run in {folder} to end with a test, got: {reason}")
    else:
        check_finished(config, folder)
    return read_json(done, "the test of a run")


def _named(value: Any) -> str:
    """Return a value for the name of a folder: itself if it is short, or else a digest."""
    text = str(value).replace("/", "-")
    return text if len(text) <= 40 else sha256(json.dumps(value, sort_keys=True).encode())[:8]


def check_finished(config: Config, folder: Path) -> None:
    """Refuse other images than a finished run began with.

    Images that are synthesised on the fly are passed over: they need a backbone.
    """
    if not (folder / IMAGES).exists():
        return  # of an older version
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageData, "data")
    data = {k: v for k, v in config["data"].items() if k != "synthetic" or isinstance(v, str)}
    parser.instantiate(parser.parse_object({"data": data})).data.compare_images(folder / IMAGES)


def _run_child(args: list[str], log: Path) -> int:
    """Run a command in a process that does not outlive this one; return its exit code.

    Neither that process nor those that it starts import modules of the current folder.
    """
    names = [word for name in allowed for word in ("--allow", name)]
    command = [sys.executable, "-m", "augment.training.sweep", *names, *args]
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            start_new_session=True,
        ) as child,
    ):
        return child.wait()


def _die_with_parent() -> None:
    """Kill this process and its own children when the sweep ends and closes our standard input."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def seeded(config: Any, seed: int) -> Any:
    """Return a copy of a configuration in which everything that takes a seed has this one.

    >>> seeded({"class_path": "FewShot", "init_args": {"shots": 5}}, 3)
    {'class_path': 'FewShot', 'init_args': {'shots': 5, 'seed': 3}}
    """
    if isinstance(config, list):
        return [seeded(value, seed) for value in config]
    if not isinstance(config, dict):
        return config
    made: Config = {k: seed if k == "seed" else seeded(v, seed) for k, v in config.items()}
    key = _SEEDED.get(str(made.get("class_path")).split(".")[-1])
    if key:
        made["init_args"] = made.get("init_args") or {}
        assign(made, f"init_args.{key}", seed)
    return made


def assign(config: Config, key: str, value: object) -> None:
    """Set ``a.b.c`` in nested dictionaries."""
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
        if not isinstance(config, dict):
            raise UserError(
                f"expected settings below {part} for {key}, got {config!r}; see configs/"
            )
    config[last] = value


def _summarise(rows: list[Config], names: list[str]) -> Iterator[Config]:
    """Yield mean and interval over seeds of every measure, for each combination of values.

    From the second combination on, also of the gain in accuracy over the first one, by seed.
    """
    first: list[Config] = []
    for _, group in itertools.groupby(rows, key=lambda row: [row[name] for name in names]):
        runs = list(group)
        summary: Config = {**{name: runs[0][name] for name in names}, "seeds": len(runs)}
        measures = {key: [run[key] for run in runs] for key in runs[0] if key.startswith("test/")}
        if first:
            pairs = zip(runs, first, strict=True)
            measures[_GAIN] = [run[_ACCURACY] - other[_ACCURACY] for run, other in pairs]
        for key, values in measures.items():
            summary[key], summary[f"{key} ±"] = statistics.mean(values), interval(values)
        first = first or runs
        yield summary


def _write(path: Path, rows: list[Config]) -> None:
    """Write a CSV file of rows that may lack some of the columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_table(path, [columns, *([row.get(key, "") for key in columns] for row in rows)])


def _print_table(summary: list[Config], names: list[str]) -> None:
    measures = [key for key in summary[-1] if key.startswith("test/") and not key.endswith("±")]
    print("| " + " | ".join([*(n.split(".")[-1] for n in names), *measures]) + " |")
    print("|---" * (len(names) + len(measures)) + "|")
    for row in summary:
        cells = [
            f"{100 * row[key]:{'+' * (key == _GAIN)}.1f} ± {100 * row[f'{key} ±']:.1f}"
            if key in row
            else ""
            for key in measures
        ]
        print("| " + " | ".join([*(str(row[name]) for name in names), *cells]) + " |")
    paired = "; gains are over the first row, paired by seed" if len(summary) > 1 else ""
    print(f"\n{summary[0]['seeds']} seeds, %, ± 95 % (Student's t){paired}")


if __name__ == "__main__":
    threading.Thread(target=_die_with_parent, daemon=True).start()
    main()
