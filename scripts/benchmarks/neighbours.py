"""What other programs on the same cores cost, with and without the command's limit on spinning.

Each side is a process that samples 64 images of ``tiny`` in 8 DDIM steps and times the second of
two runs. Ours sets what ``latent-augment`` sets (`augment.cli.limit_spinning`); theirs leaves
OpenMP's defaults. One row for each number of busy programs beside it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.duel import Duel

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


class Side:
    """Runs `WORK` in a process and keeps the seconds of each run; its own clock."""

    def __init__(self, kind: str, threads: int, count: int) -> None:
        self.command = [sys.executable, "-c", WORK, kind, str(threads), str(count)]
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self) -> None:
        """Run once."""
        spin = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
        env = {k: v for k, v in os.environ.items() if k not in spin} | {"TQDM_DISABLE": "1"}
        done = subprocess.run(self.command, env=env, check=True, stdout=subprocess.PIPE)
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


def suite(args: argparse.Namespace) -> Iterator[Duel]:
    """One row for 0, 1 and 2 busy programs."""
    count = 4 if args.quick else 64
    for busy in (0, 1, 2):
        sides = [Side(kind, args.threads, count) for kind in ("limited", "default")]

        def clock(sides: list[Side] = sides) -> float:
            return sum(sum(side.wall) for side in sides)

        def quality(sides: list[Side] = sides) -> str:
            cpu = [statistics.median(side.cpu[1:]) for side in sides]
            return f"CPU {cpu[0]:.2f} s against {cpu[1]:.2f} s"

        with competitors(busy):
            yield Duel(
                f"beside {busy} busy programs",
                *sides,
                "OpenMP's defaults",
                quality,
                unit="run",
                clock=clock,
            )
