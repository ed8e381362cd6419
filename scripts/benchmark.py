"""Time the parts: ``python scripts/benchmark.py {centroids,sampling}``.

Both sides of a ratio run in turn in one process, after a warm-up; medians and interquartile ranges
of the repeats are printed with the machine and the versions. Never part of the tests.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import torch

from augment import Rule, invert, load_backbone, sample
from augment.centroid import MEANS, NORMS


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each run, the runs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-1, repeats):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            if repeat >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def line(name: str, times: list[float], floor: list[float] | None = None) -> str:
    """One Markdown row: median, interquartile range, ratio to the floor pair by pair."""
    low, median, high = statistics.quantiles(times, n=4)
    ratio = statistics.median(a / b for a, b in zip(times, floor, strict=True)) if floor else 1
    return f"| {name} | {1e3 * median:.2f} | {1e3 * low:.2f}–{1e3 * high:.2f} | {ratio:.2f} |"


def centroids(repeats: int) -> None:
    """Every rule against one weighted sum by torch.matmul and one norm."""
    batch, count, shape = 256, 16, (4, 64, 64)
    points = torch.randn(batch, count, *shape)
    weights = torch.rand(batch, count).softmax(1)
    flat = points.flatten(2)

    def floor() -> torch.Tensor:
        return (weights[:, None] @ flat).norm(dim=-1)

    rules = [Rule(norm, mean) for norm in NORMS for mean in MEANS]
    runs = {"matmul + norm": floor} | {str(r): lambda r=r: r(points, weights) for r in rules}
    times = seconds(runs, repeats)
    print(f"B = {batch}, K = {count}, D = {points[0, 0].numel()}\n")
    print("| rule | ms, median | quartiles | × floor |\n|---|---|---|---|")
    for name, values in times.items():
        print(line(name, values, times["matmul + norm"]))


def sampling(repeats: int) -> None:
    """Images a second of the embedded backbone, by batch size."""
    backbone = load_backbone("tiny", device="cpu")
    for batch in (1, 8, 64):
        latents, images = torch.randn(batch, 4, 16, 16), torch.rand(batch, 1, 32, 32)
        runs = {
            f"sample, 20 steps, batch {batch}": lambda z=latents: sample(backbone, z, steps=20),
            f"invert, 50 steps, batch {batch}": lambda x=images: invert(backbone, x, steps=50),
        }
        for name, values in seconds(runs, repeats).items():
            print(f"{name}: {batch / statistics.median(values):.1f} images/s")


def main() -> None:
    """Print the machine, then a benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("centroids", "sampling"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    machine = platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    print(f"{machine}, {torch.get_num_threads()} threads, {versions}")
    {"centroids": centroids, "sampling": sampling}[args.what](args.repeats)


if __name__ == "__main__":
    main()
