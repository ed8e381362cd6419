"""What other programs on the same cores cost, with idle threads that sleep and that spin.

A side is a process that samples 64 images of ``tiny`` in 8 DDIM steps whenever it is asked to. Ours
sets what ``latent-augment`` sets (`augment.cli.limit_spinning`); others leave OpenMP's defaults,
set ``OMP_WAIT_POLICY=PASSIVE``, or take one thread. Busy programs run beside it. Promised are, with
one busy program, at most twice the time of a quiet machine and 1.2 times the CPU time, and on a
quiet machine at most 5 % more time than OpenMP's defaults.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.paired import Comparison

BUSY = "while True: pass"
WORK = """
import json, sys, time
from augment.cli import limit_spinning
if sys.argv[1] == "limited":
    limit_spinning()
import torch
from augment import load_backbone, sample
torch.set_num_threads(int(sys.argv[2]))
backbone, count = load_backbone("tiny"), int(sys.argv[3])
latents = torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
for _ in sys.stdin:
    start = time.perf_counter(), time.process_time()
    images = sample(backbone, latents, [""] * count, "ddim", 8)
    end = time.perf_counter(), time.process_time()
    print(json.dumps([b - a for a, b in zip(start, end)]), flush=True)
"""
KINDS = {
    "default": "OpenMP's defaults",
    "passive": "OMP_WAIT_POLICY=PASSIVE",
    "one thread": "one thread",
}
"""What is compared with the limit."""
SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


class Worker:
    """A process of `WORK`, which waits for input between its runs."""

    def __init__(self, kind: str, threads: int, count: int) -> None:
        env = {k: v for k, v in os.environ.items() if k not in SPINNING} | {"TQDM_DISABLE": "1"}
        env |= {"OMP_WAIT_POLICY": "PASSIVE"} if kind == "passive" else {}
        number = 1 if kind == "one thread" else threads
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORK, kind, str(number), str(count)],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.run()  # what is done once only

    def run(self) -> tuple[float, float]:
        """Return the wall and CPU seconds of a run."""
        assert self.process.stdin and self.process.stdout
        print(file=self.process.stdin, flush=True)
        wall, cpu = json.loads(self.process.stdout.readline())
        return wall, cpu

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


class Side:
    """Runs a worker beside busy programs, and keeps the seconds of each run."""

    def __init__(self, worker: Worker, busy: int) -> None:
        self.worker, self.busy = worker, busy
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self) -> None:
        """Run once."""
        with competitors(self.busy):
            wall, cpu = self.worker.run()
        self.wall.append(wall)
        self.cpu.append(cpu)


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """Keep some busy programs running."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def wall(sides: list[Side]) -> float:
    """Return the wall seconds that the runs of both sides took so far."""
    return sum(sum(side.wall) for side in sides)


def cpu(sides: list[Side]) -> str:
    """Describe the CPU seconds of a run; the first one warms up."""
    ours, theirs = (statistics.median(side.cpu[1:]) for side in sides)
    return f"CPU {ours:.2f} s against {theirs:.2f} s, {ours / theirs:.2f} ×"


def compared(
    ours: Side, theirs: Side, name: str, baseline: str, bar: float | None = None
) -> Comparison:
    """Return the comparison of two sides; ``bar`` is the highest ratio of their times."""
    sides = [ours, theirs]
    return Comparison(
        name, *sides, baseline, partial(cpu, sides), unit="run", clock=partial(wall, sides),
        bar=None if bar is None else ("time", bar),
    )  # fmt: skip


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare the limit with itself on a quiet machine, and with other settings."""
    count = 4 if args.quick else 64
    workers = {kind: Worker(kind, args.threads, count) for kind in ("limited", *KINDS)}
    mine = workers["limited"]
    try:
        for busy, bar in ((1, 2.0), (2, None)):
            name = f"the limit, beside {busy} busy programs"
            yield compared(Side(mine, busy), Side(mine, 0), name, "the same beside none", bar)
        for kind, label in KINDS.items():
            for busy in (0, 1, 2):
                name = f"the limit, {busy} busy programs"
                bar = 1.05 if kind == "default" and not busy else None
                yield compared(Side(mine, busy), Side(workers[kind], busy), name, label, bar)
    finally:
        for worker in workers.values():
            worker.close()
