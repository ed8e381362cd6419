"""Several seeds, and several values of a setting, in one command: a table with 95 % intervals."""

import itertools
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
from tqdm import tqdm

from augment.cli import main
from augment.config import allowed, quote_names
from augment.core.errors import UserError
from augment.core.files import locked, read_json, remember, write_table
from training.cli import remove_partial
from training.data.identity import IMAGES
from training.data.module import ImageData
from training.models.metrics import interval


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as for jsonargparse."""


SCIENTIFIC = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+.0123456789"))

SEEDED = {"FewShot": "seed", "LongTail": "seed", "SyntheticDataset": "mixing.seed"}
"""The argument for the seed of each class that draws random numbers of its own."""

Run = tuple[dict[str, Any], int]
"""What is varied, and the seed."""


def sweep(
    recipe: str,
    out: str,
    seeds: int = 5,
    vary: dict[str, list[Any]] | None = None,
    given: dict[str, Any] | None = None,
) -> None:
    """Train and test with several seeds, and print the mean and its 95 % interval.

    Args:
        recipe: configuration of latent-augment train. All that throws dice in it gets the run's
            seed: so FewShot draws other images.
        out: folder for the runs and the tables runs.csv and summary.csv; runs that are done are
            not done again, and one that was interrupted goes on.
        seeds: how many, 0, 1, and so on.
        vary: values of settings to be tried, each with each, as YAML such as
            '{data.train.init_args.shots: [1, 2, 4]}'.
        given: settings other than the configuration's, as YAML such as '{trainer.max_epochs: 10}'.
    """
    if seeds < 2:
        raise UserError(f"expected at least 2 seeds for an interval, got {seeds}")
    try:
        base = yaml.load(quote_names(Path(recipe).read_text()), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        told = " ".join(str(error).split())[:120]
        raise UserError(f"expected a configuration at {recipe}, got {told}; correct it") from None
    if not isinstance(base, dict):
        raise UserError(f"expected settings by name in {recipe}, got none; see configs/")
    for key, value in (given or {}).items():
        assign(base, key, value)
    rows, names = [], list(vary or {})
    for key, values in (vary or {}).items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"expected a list of values for {key}, got {values!r}; write [{values}]"
            )
    runs: list[Run] = [
        (dict(zip(names, values, strict=True)), seed)
        for values in itertools.product(*(vary or {}).values())
        for seed in range(seeds)
    ]
    with locked(Path(out)) as lock, tqdm(runs, "runs", unit="run") as bar:
        remove_partial(lock, Path(out))
        for chosen, seed in bar:
            bar.set_postfix_str(", ".join(f"{k.split('.')[-1]} {v}" for k, v in chosen.items()))
            rows.append({**chosen, "seed": seed, **train(base, chosen, seed, Path(out))})
            write(Path(out) / "runs.csv", rows)
        summary = list(summarise(rows, names))
        write(Path(out) / "summary.csv", summary)
    tell(summary, names)


def train(base: dict[str, Any], chosen: dict[str, Any], seed: int, out: Path) -> dict[str, float]:
    """The test results of one run, in a process of its own; read back if it is done.

    Raises:
        UserError: it failed.
    """
    parts = [f"{key.split('.')[-1]}-{value}".replace("/", "-") for key, value in chosen.items()]
    folder = out / "_".join([*parts, f"seed-{seed}"])
    config = seeded(base, seed)
    for key, value in {**chosen, "trainer.default_root_dir": str(folder)}.items():
        assign(config, key, value)
    assign(config, "seed_everything", seed)
    assign(config, "trainer.enable_progress_bar", False)
    file, done = folder / "given.json", folder / "test.json"
    remember(file, config, "--out")
    if not done.exists():
        code = run_child(["train", "fit", "--config", str(file)], folder / "log.txt")
        if code or not done.exists():
            last = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
            told = last[0] if code and last else "no test images (data.test)"
            raise UserError(f"expected the run in {folder} to end with a test, got: {told}")
    else:
        check_finished(config, folder)
    return read_json(done, "the test of a run")


def check_finished(config: dict[str, Any], folder: Path) -> None:
    """Compare the images of a finished run with those that it began with.

    Images that are synthesised on the fly are passed over: they need a backbone.

    Raises:
        UserError: they are others.
    """
    if not (folder / IMAGES).exists():
        return  # of an older version
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageData, "data")
    data = {k: v for k, v in config["data"].items() if k != "synthetic" or isinstance(v, str)}
    parser.instantiate(parser.parse_object({"data": data})).data.compare_images(folder / IMAGES)


def run_child(args: list[str], log: Path) -> int:
    """Run a command in a process that does not outlive this one; return its exit code."""
    names = [word for name in allowed for word in ("--allow", name)]
    command = [sys.executable, "-m", "training.sweep", *names, *args]
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, start_new_session=True
        ) as child,
    ):
        return child.wait()


def die_with_parent() -> None:
    """Kill this process and its own children when the sweep ends and closes our standard input."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def seeded(config: Any, seed: int) -> Any:
    """A copy of a configuration in which everything that takes a seed has this one.

    >>> seeded({"class_path": "FewShot", "init_args": {"shots": 5}}, 3)
    {'class_path': 'FewShot', 'init_args': {'shots': 5, 'seed': 3}}
    """
    if isinstance(config, list):
        return [seeded(value, seed) for value in config]
    if not isinstance(config, dict):
        return config
    made: dict[str, Any] = {k: seed if k == "seed" else seeded(v, seed) for k, v in config.items()}
    key = SEEDED.get(str(made.get("class_path")).split(".")[-1])
    if key:
        made["init_args"] = made.get("init_args") or {}
        assign(made, f"init_args.{key}", seed)
    return made


def assign(config: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` in nested dictionaries."""
    *path, last = key.split(".")
    for part in path:
        config = config.setdefault(part, {})
        if not isinstance(config, dict):
            raise UserError(
                f"expected settings below {part} for {key}, got {config!r}; see configs/"
            )
    config[last] = value


def summarise(rows: list[dict[str, Any]], names: list[str]) -> Iterator[dict[str, Any]]:
    """Mean and interval over seeds of every measure, for each combination of values."""
    for _, group in itertools.groupby(rows, key=lambda row: [row[name] for name in names]):
        runs = list(group)
        measures = [key for key in runs[0] if key.startswith("test/")]
        found: dict[str, Any] = {name: runs[0][name] for name in names}
        found["seeds"] = len(runs)
        for key in measures:
            values = [run[key] for run in runs]
            found[key], found[f"{key} ±"] = statistics.mean(values), interval(values)
        yield found


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file of rows that may lack some of the columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_table(path, [columns, *([row.get(key, "") for key in columns] for row in rows)])


def tell(summary: list[dict[str, Any]], names: list[str]) -> None:
    """Print the table."""
    measures = [key for key in summary[0] if key.startswith("test/") and not key.endswith("±")]
    print("| " + " | ".join([*(n.split(".")[-1] for n in names), *measures]) + " |")
    print("|---" * (len(names) + len(measures)) + "|")
    for row in summary:
        cells = [f"{100 * row[key]:.1f} ± {100 * row[f'{key} ±']:.1f}" for key in measures]
        print("| " + " | ".join([*(str(row[name]) for name in names), *cells]) + " |")
    print(f"\n{summary[0]['seeds']} seeds, %, ± 95 % (Student's t)")


if __name__ == "__main__":
    threading.Thread(target=die_with_parent, daemon=True).start()
    main()
