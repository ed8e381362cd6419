"""How long processes take from their start to their end.

Promised are 0.3 s beyond the import of torch for all public names, and three minutes for the whole
demo in a new folder, which is timed with ``--demo`` only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.paired import Comparison, Keep

TORCH = "import torch"
BOTH = f"{TORCH}; from augment import *"
COMMAND = "from augment.cli import main; main()"


def arguments(parser: argparse._ArgumentGroup) -> None:
    """Add the options of this suite."""
    parser.add_argument("--demo", action="store_true", help="time latent-augment demo too")


def python(threads: int, code: str, *words: str) -> str:
    """Return what a Python process prints, with that many threads."""
    command = [sys.executable, "-c", code, *words]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def modules(code: str) -> int:
    """Count the modules that some code loads."""
    return int(python(1, f"import sys; {code}; print(len(sys.modules))"))


def demo(threads: int) -> str:
    """Run the demo in a folder of its own; return what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        return python(threads, COMMAND, "demo", "--out", str(Path(folder) / "demo"))


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare imports, help, and the demo if it is asked for, with the import of torch."""
    run, who = partial(python, args.threads), f"python -c {TORCH!r}"
    theirs = partial(run, TORCH)
    yield Comparison(
        f"python -c {BOTH!r}", partial(run, BOTH), theirs, who,
        lambda: f"{modules(BOTH)} modules against {modules(TORCH)}",
        unit="process", bar=("extra", 0.3),
    )  # fmt: skip
    usage = Keep(partial(run, COMMAND, "--help"))
    yield Comparison(
        "latent-augment --help", usage, theirs, who,
        lambda: f"{len(usage.result.splitlines())} lines", unit="process",
    )  # fmt: skip
    if args.demo:
        whole = Keep(partial(demo, args.threads))
        yield Comparison(
            "latent-augment demo", whole, theirs, who,
            lambda: f"{len(whole.result.splitlines())} lines",
            unit="process", bar=("seconds", 180.0), once="ours",
        )  # fmt: skip
