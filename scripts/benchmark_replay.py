"""Time training with a replay pool: ``python scripts/benchmark_replay.py``.

A small network on 32×32 images, a quarter of its draws synthetic, one thread; the embedded backbone
refills the pool with another. The ways to get at the synthetic images take turns in one process.
"""

import argparse
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from augment import MixedDataset, SyntheticDataset, load_backbone
from augment.fill import fill_bank
from augment.replay import ReplayPool
from augment.sources import Folder
from augment.sources.fashion import few_shots, write_fashion
from training.networks import small_cnn

BATCH, SHARE, CAPACITY = 64, 0.25, 200


Times = list[tuple[float, float]]
"""The seconds of steps: by the clock, and at work."""


def trainer(real: list[Any], synthetic: Any, share: float) -> Callable[[int], Times]:
    """A function that trains on for so many steps."""
    mixed = MixedDataset(real, synthetic, share, length=10**9)
    network = small_cnn(1, 1 + max(label for _, label in real))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    batches: Iterator[Any] = iter(DataLoader(mixed, BATCH))

    def train(steps: int) -> Times:
        times = []
        for _ in range(steps):
            start, busy = time.perf_counter(), time.process_time()
            images, labels = next(batches)
            loss = F.cross_entropy(network(images - 0.5), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            times.append((time.perf_counter() - start, time.process_time() - busy))
        return times

    return train


def replay(args: argparse.Namespace) -> None:
    """Steps a second without synthetic images, with kept ones, with a pool at rest and at work."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Folder(write_fashion(f"{folder}/images", "shots", few_shots(0, 5)))
        backbone = load_backbone("tiny", device="cpu")
        bank = fill_bank(f"{folder}/bank", backbone, source)
        real = [(source.load(i, 1, 32), label) for i, label in source.samples]
        dataset = SyntheticDataset(bank, backbone, steps=args.steps, batch_size=args.batch)
        before = time.perf_counter()
        with ReplayPool(dataset, CAPACITY, warm_up=CAPACITY) as pool:
            warm = time.perf_counter() - before
            compare(real, dataset, pool, args.repeats, warm)


def compare(
    real: list[Any], dataset: SyntheticDataset, pool: ReplayPool, repeats: int, warm: float
) -> None:
    """Let the ways take turns of a hundred steps, or of three where images are made meanwhile."""
    kept = [pool[row] for row in range(CAPACITY)]
    pid = pool._stop.peek()[2][1].pid  # type: ignore[index]
    ways = {
        "no synthetic images": (trainer(real, [], 0.0), False, 100),
        "kept in a list": (trainer(real, kept, SHARE), False, 100),
        "pool, generator at rest": (trainer(real, pool, SHARE), False, 100),
        "pool, generator at work": (trainer(real, pool, SHARE), True, 100),
        "made by the trainer": (trainer(real, dataset, SHARE), False, 3),
    }
    turns: dict[str, list[Times]] = {name: [] for name in ways}
    made, seconds = 0, 0.0
    for repeat in range(-1, repeats):
        for name, (train, works, steps) in ways.items():
            os.kill(pid, signal.SIGCONT if works else signal.SIGSTOP)
            count, start = pool.made, time.perf_counter()
            turn = train(steps)
            if repeat >= 0:
                turns[name].append(turn)
            if works and repeat >= 0:
                made, seconds = made + pool.made - count, seconds + time.perf_counter() - start
    os.kill(pid, signal.SIGCONT)
    print(
        f"batch {BATCH}, {SHARE:.0%} synthetic, {CAPACITY} slots filled in {warm:.1f} s\n\n"
        "| synthetic images | steps/s, median | quartiles | slowest step, ms | CPU ms a step "
        "| × CPU of none |\n" + "|---" * 6 + "|"
    )
    floor = turns["no synthetic images"]
    for name, mine in turns.items():
        low, median, high = statistics.quantiles([1 / mean(turn, 0) for turn in mine], n=4)
        slowest = 1e3 * max(clock for turn in mine for clock, _ in turn)
        busy = 1e3 * statistics.median(mean(turn, 1) for turn in mine)
        ratio = statistics.median(mean(a, 1) / mean(b, 1) for a, b in zip(mine, floor, strict=True))
        print(
            f"| {name} | {median:.1f} | {low:.1f}–{high:.1f} | {slowest:.0f} | {busy:.1f} "
            f"| {ratio:.2f} |"
        )
    steps = statistics.median(1 / mean(turn, 0) for turn in turns["pool, generator at work"])
    eaten, rate = BATCH * SHARE * steps, made / seconds
    print(
        f"\nat work: {rate:.1f} images/s made, {eaten:.0f}/s drawn, so each is drawn "
        f"{eaten / rate:.1f} times"
    )
    start = time.process_time()
    for _ in range(50):
        pool.__getitems__(range(CAPACITY))
    print(f"a draw takes {(time.process_time() - start) / 50 / CAPACITY * 1e6:.1f} µs")


def mean(turn: Times, clock: int) -> float:
    """Seconds a step."""
    return statistics.mean(step[clock] for step in turn)


def main() -> None:
    """Print the machine, then the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="of the solver")
    parser.add_argument("--batch", type=int, default=16, help="images the generator makes at once")
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}")
    replay(parser.parse_args())


if __name__ == "__main__":
    main()
