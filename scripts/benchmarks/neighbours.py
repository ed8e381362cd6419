"""What other programs on the same cores cost, with idle threads that sleep and that spin.

Each side is a process that samples 64 images of ``tiny`` in 8 DDIM steps and times the second of
two runs. Ours sets what ``latent-augment`` sets (`augment.cli.limit_spinning`), or
``OMP_WAIT_POLICY=PASSIVE``; theirs leaves OpenMP's defaults. Busy programs run beside the process.
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
for _ in range(2):
    start = time.perf_counter(), time.process_time()
    images = sample(backbone, latents, [""] * count, "ddim", 8)
    end = time.perf_counter(), time.process_time()
print(json.dumps([b - a for a, b in zip(start, end)]))
"""
SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


class Side:
    """Runs `WORK` in a process and keeps the seconds of each run, which are its own clock."""

    def __init__(self, kind: str, threads: int, count: int) -> None:
        self.command = [sys.executable, "-c", WORK, kind, str(threads), str(count)]
        self.env = {k: v for k, v in os.environ.items() if k not in SPINNING}
        self.env |= {"TQDM_DISABLE": "1"}
        self.env |= {"OMP_WAIT_POLICY": "PASSIVE"} if kind == "passive" else {}
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self) -> None:
        """Run once."""
        done = subprocess.run(self.command, env=self.env, check=True, stdout=subprocess.PIPE)
        wall, cpu = json.loads(done.stdout)
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
    return f"CPU {ours:.2f} s against {theirs:.2f} s"


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare the limit with the defaults beside 0, 1 and 2 busy programs, and passive beside 1."""
    count = 4 if args.quick else 64
    for kind, busy in (("limited", 0), ("limited", 1), ("limited", 2), ("passive", 1)):
        sides = [Side(which, args.threads, count) for which in (kind, "default")]
        with competitors(busy):
            yield Comparison(
                f"{kind}, beside {busy} busy programs", *sides, "OpenMP's defaults",
                partial(cpu, sides), unit="run", clock=partial(wall, sides),
            )  # fmt: skip
