"""Time the parts against what a user would run instead: ``python scripts/benchmark.py SUITE``.

Every row is one paired comparison (see `benchmarks.paired`): warmed up, in turn, in one process,
with the quality of both results beside the speed, and a verdict where something was promised. The
figures, the machine and the versions are printed and kept as JSON and Markdown in
``runs/benchmarks``. ``all`` runs every suite but ``backbones``, each in a process of its own. Tests
run suites with ``--quick`` only, which shows that they run and measures nothing.
"""

import argparse
import importlib
import subprocess
import sys
import time
from pathlib import Path

import torch
from benchmarks import SUITES
from benchmarks.paired import Comparison, timed
from benchmarks.record import comparisons, cores, environment, heading

from augment.core.files import write_bytes, write_json


def run(args: argparse.Namespace) -> None:
    """Run a suite; write its record after every row, and print it at the end."""
    module = importlib.import_module(f"benchmarks.{args.suite}")
    where, rows = environment(args), []
    show, begun = getattr(module, "table", comparisons), time.perf_counter()
    for entry in module.suite(args):
        rows.append(timed(entry, args) if isinstance(entry, Comparison) else entry)
        say(f"{args.suite}: {rows[-1]['name']}, at {time.perf_counter() - begun:.0f} s")
        record = {"suite": args.suite, "environment": where, "rows": rows}
        write_json(args.out / f"{args.suite}.json", record)
        text = "\n".join([*heading(args.suite, where), *show(rows)]) + "\n"
        write_bytes(args.out / f"{args.suite}.md", text.encode())
    print(text, flush=True)


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def run_all(options: list[str]) -> int:
    """Run the suites one after another; return 1 if one failed."""
    failed = []
    for suite in (suite for suite in SUITES if suite != "backbones"):
        command = [sys.executable, str(Path(__file__)), suite, *options]
        if subprocess.run(command, check=False).returncode:
            failed.append(suite)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return bool(failed)


def parsed(argv: list[str]) -> argparse.Namespace:
    """Parse the options, with those of the suite."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="; ".join(f"{name}: {what}" for name, what in SUITES.items()),
    )
    parser.add_argument("suite", choices=(*SUITES, "all"))
    parser.add_argument("--repeats", type=int, help="maximum rounds; default 11, or 3 with --quick")
    parser.add_argument(
        "--seconds", type=float, default=60, help="a row begins no round after these"
    )
    parser.add_argument("--threads", type=int, default=cores(), help="of torch; default all cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    if argv and argv[0] in SUITES:
        more = getattr(importlib.import_module(f"benchmarks.{argv[0]}"), "arguments", None)
        if more:
            more(parser.add_argument_group(argv[0]))
    args = parser.parse_args(argv)
    args.argv, args.repeats = argv, args.repeats or (3 if args.quick else 11)
    return args


def main(argv: list[str]) -> int:
    """Run a suite, or all."""
    args = parsed(argv)
    if args.suite == "all":
        return run_all(argv[1:])
    torch.set_num_threads(args.threads)
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
