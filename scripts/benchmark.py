"""Time the parts: ``python scripts/benchmark.py {centroids,nao,sampling,storage,backbones}``.

Both sides of a ratio run in turn in one process, after a warm-up; medians and interquartile ranges
of the repeats are printed with the machine and the versions. Never part of the tests.
"""

import argparse
import itertools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from augment import Rule, invert, load_backbone, sample
from augment.centroid import MEANS, NORMS
from augment.diffusion import Backbone
from augment.inversion import inverted, inverter
from augment.sources import Folder
from augment.sources.fashion import write_fashion

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from reference.centroids import nao_by_adam, nao_objective_of


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


def machine_says() -> str:
    """The threads and the versions that times depend on."""
    return f"{torch.get_num_threads()} threads, torch {torch.__version__}"


def centroids(args: argparse.Namespace) -> None:
    """Every rule against one weighted sum by torch.matmul and one norm."""
    batch, count, shape = 256, 16, (4, 64, 64)
    points = torch.randn(batch, count, *shape)
    weights = torch.rand(batch, count).softmax(1)
    flat = points.flatten(2)

    def floor() -> torch.Tensor:
        return (weights[:, None] @ flat).norm(dim=-1)

    splits = [mean for mean in MEANS if mean != "mu"]  # zero here, and so the same as 0
    rules = [Rule(norm, mean) for norm in NORMS if norm != "circle" for mean in splits]
    runs = {"matmul + norm": floor} | {str(r): lambda r=r: r(points, weights) for r in rules}
    pairs, halves = points[:, :2].contiguous(), torch.rand(batch, 2).softmax(1)
    runs["circle/0 (K = 2)"] = lambda: Rule("circle", "0")(pairs, halves)
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        torch.set_num_threads(threads)
        times = seconds(runs, args.repeats)
        print(f"\nB = {batch}, K = {count}, D = {points[0, 0].numel()}, {machine_says()}\n")
        print("| rule | ms, median | quartiles | × floor |\n|---|---|---|---|")
        for name, values in times.items():
            print(line(name, values, times["matmul + norm"]))
    print(
        "\n| K | D | matmul + norm | fix/chm | nin/chm | slerp/0 | nao/0 | (µs a centroid)\n"
        + "|---" * 7
        + "|"
    )
    for count, side in ((2, 64), (5, 64), (20, 64), (50, 64), (5, 16), (5, 32), (5, 128)):
        points, weights = torch.randn(32, count, 4, side, side), torch.rand(32, count).softmax(1)
        rules = {name: Rule.parse(name) for name in ("fix/chm", "nin/chm", "slerp/0", "nao/0")}
        mixed = (points, weights)
        runs = {"floor": lambda x=mixed: (x[1][:, None] @ x[0].flatten(2)).norm(dim=-1)}
        runs |= {name: lambda r=rule, x=mixed: r(*x) for name, rule in rules.items()}
        row = [statistics.median(v) / 32 * 1e6 for v in seconds(runs, args.repeats).values()]
        print(f"| {count} | {4 * side**2} | " + " | ".join(f"{v:.0f}" for v in row) + " |")


def nao(args: argparse.Namespace) -> None:
    """The closed form against the published optimiser in all dimensions, objectives beside."""
    print(
        "64 centroids of N(0, I) at once; for Adam one, its seconds those of all its iterations\n"
    )
    print("| D | K | weights | ours, s a centroid | objective | Adam, s | its loss (with its paths "
          "polished) | iterations | ratio |\n" + "|---" * 9 + "|")  # fmt: skip
    dice = torch.Generator().manual_seed(0)
    cases = itertools.product((16, 64), (2, 5, 20, 50), (True, False))
    for side, count, even in cases:
        points = torch.randn(64, count, 4, side, side, generator=dice)
        weights = torch.rand(64, count, generator=dice).log().neg()
        weights = torch.ones(64, count) if even else weights
        weights = weights / weights.sum(1, keepdim=True)
        row = compare(points, weights, args.repeats, args.seconds)
        print(f"| {4 * side**2} | {count} | {'equal' if even else 'Dir(1)'} | {row}", flush=True)


def compare(points: torch.Tensor, weights: torch.Tensor, repeats: int, seconds_each: float) -> str:
    """The end of a row: a batch of ours, and one of theirs until it stops or its time is up."""
    rule = Rule.parse("nao")
    ours = statistics.median(seconds({"ours": lambda: rule(points, weights)}, repeats)["ours"])
    flat, share = points[0].flatten(1), weights[0]
    nao_by_adam(flat, share, limit=2)
    start = time.perf_counter()
    nao_by_adam(flat, share, limit=8)
    limit = min(max(int(seconds_each / (time.perf_counter() - start) * 8), 8), 10_000)
    start = time.perf_counter()
    centroid, loss, steps = nao_by_adam(flat, share, limit=limit)
    theirs = time.perf_counter() - start
    mine = nao_objective_of(flat, share, rule(points[:1], weights[:1])[0].flatten())
    polished = nao_objective_of(flat, share, centroid)
    each = ours / len(points)
    stopped = "" if steps < limit else " (not done)"
    return (
        f"{each:.6f} | {mine:.2f} | {theirs:.1f} | {loss:.2f} ({polished:.2f}) | {steps}{stopped} "
        f"| {theirs / each:.0f} |"
    )


TOPS = ("T-shirt", "Pullover", "Coat", "Shirt")


def tops() -> torch.Tensor:
    """Eight embedded pictures that go by the prompt ``top``."""
    with tempfile.TemporaryDirectory() as folder:
        source = Folder(write_fashion(folder, "shots", [0, 1]))
        names = [f"{name}/{number:03d}.png" for name in TOPS for number in (0, 1)]
        return torch.stack([source.load(name, 1, 32) for name in names])


def null_text(backbone: Backbone, repeats: int) -> None:
    """Null-text inversion of a batch, and of its images one by one, in turn."""
    images, run = tops(), inverter("null_text", steps=10)

    def inverted_by(size: int) -> None:
        inverted(run, backbone, images, "top", 5.0, batch_size=size)

    runs = {"a batch of 8": lambda: inverted_by(8), "one by one": lambda: inverted_by(1)}
    times = seconds(runs, repeats)
    batch, alone = (statistics.median(values) / len(images) for values in times.values())
    pairs = zip(times["one by one"], times["a batch of 8"], strict=True)
    ratio = statistics.median(one / eight for one, eight in pairs)
    print(
        "null_text, 10 steps: a batch of 8 against one by one: "
        f"{batch:.3f} and {alone:.3f} s an image, ratio {ratio:.2f}"
    )


def sampling(args: argparse.Namespace) -> None:
    """Images a second of the embedded backbone, by batch size."""
    backbone = load_backbone("tiny", device="cpu")
    for batch in (1, 8, 64):
        latents, images = torch.randn(batch, 4, 16, 16), torch.rand(batch, 1, 32, 32)
        runs = {
            f"sample, 20 steps, batch {batch}": lambda z=latents: sample(backbone, z, steps=20),
            f"invert, 50 steps, batch {batch}": lambda x=images: invert(backbone, x, steps=50),
        }
        for name, values in seconds(runs, args.repeats).items():
            print(f"{name}: {batch / statistics.median(values):.1f} images/s")
    null_text(backbone, args.repeats)


def main() -> None:
    """Print the machine, then a benchmark."""
    if sys.argv[1:2] == ["backbones"]:
        from benchmark_backbones import main as backbones  # here: it builds on the tests' pipelines

        backbones(sys.argv[2:])
        return
    if sys.argv[1:2] == ["storage"]:
        from benchmark_storage import main as storage

        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
        storage(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what",
        choices=("centroids", "nao", "sampling", "storage", "backbones"),
        help="storage and backbones have options of their own: backbones --help",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=60, help="nao: how long a published run may take"
    )
    args = parser.parse_args()
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {machine_says()}, diffusers {diffusers.__version__}")
    runs = {"centroids": centroids, "nao": nao, "sampling": sampling}
    runs[args.what](args)


if __name__ == "__main__":
    main()
