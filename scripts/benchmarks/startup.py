"""How long processes take from their start to their end.

Promised are 0.3 s beyond the import of torch for all public names, 0.5 s for the overview and the
version, and 100 s for the whole demo in a new folder, which is timed with ``--demo`` only. With
``--before DIR`` the demo of another checkout runs too, and the rows of both are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.paired import Comparison, Keep
from benchmarks.record import ROOT

TORCH = "import torch"
BOTH = f"{TORCH}; from augment import *"
COMMAND = "from augment.cli import main; main()"


def arguments(parser: argparse._ArgumentGroup) -> None:
    """Add the options of this suite."""
    parser.add_argument(
        "--demo", type=int, metavar="SEEDS", nargs="?", const=3, default=0,
        help="time latent-augment demo too, with that many seeds; by default its usual 3",
    )  # fmt: skip
    parser.add_argument("--before", type=Path, help="another checkout, whose demo runs too")


def python(threads: int, code: str, *words: str) -> str:
    """Return what a Python process prints, with that many threads."""
    command = [sys.executable, "-c", code, *words]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def modules(code: str) -> int:
    """Count the modules that some code loads."""
    return int(python(1, f"import sys; {code}; print(len(sys.modules))"))


def demo(threads: int, seeds: int, checkout: Path) -> list[dict[str, Any]]:
    """Run the demo of a checkout in a folder of its own; return the rows of its table."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "demo"
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(checkout)}
        command = [sys.executable, "-c", COMMAND, "demo", "--out", str(out)]
        command += ["--seeds", str(seeds)]
        subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
        return json.loads((out / "results.json").read_text())


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare imports, help, and the demo if it is asked for, with the import of torch."""
    run, who = partial(python, args.threads), f"python -c {TORCH!r}"
    theirs = partial(run, TORCH)
    yield Comparison(
        f"python -c {BOTH!r}", partial(run, BOTH), theirs, who,
        lambda: f"{modules(BOTH)} modules against {modules(TORCH)}",
        unit="process", bar=("extra", 0.3),
    )  # fmt: skip
    for words in ("--help", "--version", "invert --help"):
        usage = Keep(partial(run, COMMAND, *words.split()))
        yield Comparison(
            f"latent-augment {words}", usage, theirs, who,
            lambda usage=usage: f"{len(usage.result.splitlines())} lines",
            unit="process", bar=("seconds", 0.5) if " " not in words else None,
        )  # fmt: skip
    if args.demo:
        run_demo = partial(demo, args.threads, args.demo)
        whole = Keep(partial(run_demo, ROOT))
        other = Keep(partial(run_demo, args.before) if args.before else theirs)

        def same() -> str:
            if not args.before:
                return f"{len(whole.result)} rows"
            return "the same rows" if whole.result == other.result else "other rows"

        yield Comparison(
            f"latent-augment demo, {args.demo} seeds", whole, other,
            f"that of {args.before}" if args.before else who, same, unit="process",
            bar=("seconds", 100.0), once="both",
        )  # fmt: skip
