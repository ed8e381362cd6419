"""How long it takes until something happens: processes from their start to their end, in turn.

Promised are 0.3 s beyond the import of torch for all public names, and three minutes for the whole
demo in a new folder, which is timed with ``--demo`` only.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.duel import Duel

TORCH = "import torch"
COMMAND = "from augment.cli import main; main()"


def arguments(parser: argparse._ArgumentGroup) -> None:
    """Options of this suite."""
    parser.add_argument("--demo", action="store_true", help="time latent-augment demo too")


def python(threads: int, code: str, *words: str) -> str:
    """What a Python process says, with so many threads."""
    command = [sys.executable, "-c", code, *words]
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def modules(code: str) -> int:
    """How many modules some code loads."""
    return int(python(1, f"import sys; {code}; print(len(sys.modules))"))


def demo(threads: int, found: list[str]) -> None:
    """The demo, in a folder of its own; what it prints is kept."""
    with tempfile.TemporaryDirectory() as folder:
        found[:] = [python(threads, COMMAND, "demo", "--out", str(Path(folder) / "demo"))]


def suite(args: argparse.Namespace) -> Iterator[Duel]:
    """Imports, help, and the demo if it is wanted."""
    run = partial(python, args.threads)

    def duel(
        name: str, ours: Callable[[], object], quality: Callable[[], str], **more: Any
    ) -> Duel:
        who = f"python -c {TORCH!r}"
        return Duel(name, ours, partial(run, TORCH), who, quality, unit="process", **more)

    both = f"{TORCH}; from augment import *"
    yield duel(
        f"python -c {both!r}",
        partial(run, both),
        lambda: f"{modules(both)} modules against {modules(TORCH)}",
        bar=("extra", 0.3),
    )
    yield duel(
        "latent-augment --help",
        partial(run, COMMAND, "--help"),
        lambda: f"{len(run(COMMAND, '--help').splitlines())} lines",
    )
    if args.demo:
        found: list[str] = []
        yield duel(
            "latent-augment demo",
            partial(demo, args.threads, found),
            lambda: f"{len(found[0].splitlines())} lines",
            bar=("seconds", 180.0),
            once="ours",
        )
