"""How costs grow with classes, images and shards.

Each case runs at several sizes, each in a process of its own. Measured are seconds of CPU, which
other programs change little; MiB of resident memory that the result keeps; and MiB at the peak,
both beyond what was there before. The exponent is the slope of log seconds between a size and the
one before, so 1 is linear; below `SHORT` seconds there is none, because fixed costs dominate.
Processes are forked, so that imports are not counted.
"""

import argparse
import gc
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from augment import (
    LatentBank,
    MixedDataset,
    Mixing,
    Planner,
    Sampling,
    SyntheticDataset,
    open_shards,
)
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.jobs.job import run
from augment.sources import Folder
from benchmarks.large import SHAPE, bank_of, folder_of, job, long_tail, shards_of, synthesis

SHORT = 0.002
IMAGENET_LT = 115_846

Row = dict[str, Any]
Call = Callable[[], object]

FIXTURES: dict[str, Callable[[Path, int], None]] = {
    "images": lambda folder, n: bank_of(folder, long_tail(n, min(n // 10, 1000))),
    "classes": lambda folder, n: bank_of(folder, [10] * n),
    "members": lambda folder, n: bank_of(folder, [n] * 10),
    "shards": shards_of,
    "files": folder_of,
}
"""What is made at each size: banks with a long tail, of n classes of 10 images, of 10 classes of n
images; n shards of 1000 images; n empty files."""


class Case(NamedTuple):
    """A key of `FIXTURES`, its sizes, and what makes the function to be timed of its folder."""

    of: str
    sizes: tuple[int, ...]
    use: Callable[[Path], Call]


def of_bank(use: Callable[[LatentBank], object]) -> Callable[[Path], Call]:
    """Time something of a bank that is open."""

    def ready(folder: Path) -> Call:
        bank = LatentBank.open(folder)
        return lambda: (use(bank), bank)

    return ready


def every_class(name: str) -> Callable[[Path], Call]:
    """Time one of a bank's methods for all classes."""
    return of_bank(lambda bank: {label: getattr(bank, name)(label) for label in bank.classes})


def gathered(bank: LatentBank) -> object:
    """Read the first batch of a training: 64 plans of up to 8 members."""
    planner = Planner(bank.members, Mixing(members=8))
    return bank.gather([planner(0, index) for index in range(64)])


def planned(mixing: Mixing, classes: int = 1) -> Callable[[Path], Call]:
    """Time a planner and 1000 plans."""

    def plans(bank: LatentBank) -> Planner:
        planner = Planner(bank.members, mixing, classes)
        for index in range(1000):
            planner(0, index)
        return planner

    return of_bank(plans)


def neighbours(bank: LatentBank) -> Planner:
    """Draw ten plans of the nearest of 8 in one class, by vectors of 4096 numbers."""
    name = bank.classes[0]
    vectors = torch.zeros(len(bank.members[name]), 4096)
    planner = Planner({name: bank.members[name]}, Mixing(members=8), features={name: vectors})
    for index in range(10):
        planner(0, index)
    return planner


def datasets(folder: Path) -> Call:
    """Time a `SyntheticDataset` in a `MixedDataset`, with 1000 draws and plans."""
    backbone = GaussianBackbone(latent_shape=SHAPE)

    def made() -> MixedDataset:
        counts = {name: 100 for name in LatentBank.open(folder).classes}
        synthetic = SyntheticDataset(
            folder, backbone, Mixing(members=8), Sampling(steps=1), per_class=counts
        )
        mixed = MixedDataset(range(10**6), synthetic, 0.5, 10**6)
        for index in range(1000):
            mixed.draw(index)
            synthetic.plan(len(synthetic) - 1 - index % len(synthetic))
        return mixed

    return made


def looked_up(folder: Path) -> Call:
    """Time the labels of all images of shards, and the places of at most 20 000."""
    found = open_shards(folder)
    step = max(len(found) // 10_000, 1)
    return lambda: (found.targets, [found._place(k) for k in range(0, len(found), step)])


def refilled(folder: Path) -> Call:
    """Time the job that fills a bank that is full."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    counts = [sum(len(c["ids"]) for c in plan["chunks"]) for plan in manifest["classes"]]
    making = job(folder, counts)
    return lambda: (run(making), making)


def remade(folder: Path) -> Call:
    """Time the job that writes shards that are all there."""
    count = len(list(folder.glob("*.json"))) - 1
    making = synthesis(folder.with_name(f"{folder.name}-bank"), folder, count)
    return lambda: (run(making), making)


def decades(first: int, last: int) -> tuple[int, ...]:
    """Return powers of ten."""
    return tuple(10**k for k in range(first, last + 1))


MANY, FEW, MEMBERS = (*decades(2, 5), IMAGENET_LT, 10**6), decades(1, 4), (10, 100, 1280)
CASES = {
    "LatentBank.open": Case("images", MANY, lambda folder: lambda: LatentBank.open(folder)),
    "subset": Case("images", MANY, of_bank(lambda b: b.subset(lambda i: int(i[-6]) % 2 == 0))),
    "digest": Case("images", MANY, of_bank(lambda bank: bank.digest)),
    "digests of all classes": Case("images", MANY, every_class("digests")),
    "gather, 64 plans": Case("images", MANY, of_bank(gathered)),
    "fill what is full": Case("images", MANY, refilled),
    "LatentBank.open of small classes": Case(
        "classes", FEW, lambda folder: lambda: LatentBank.open(folder)
    ),
    "largest_mean of all classes": Case("classes", FEW, every_class("largest_mean")),
    "latents of all classes": Case("classes", FEW, every_class("latents")),
    "1000 plans": Case("classes", FEW, planned(Mixing())),
    "1000 plans of 3 classes": Case("classes", FEW, planned(Mixing(), classes=3)),
    "datasets": Case("classes", FEW, datasets),
    "1000 plans of 8 members": Case("members", MEMBERS, planned(Mixing(members=8))),
    "10 plans of 8 neighbours": Case("members", MEMBERS, of_bank(neighbours)),
    "gather, 64 plans of 8": Case("members", MEMBERS, of_bank(gathered)),
    "open_shards": Case("shards", decades(0, 4), lambda folder: lambda: open_shards(folder)),
    "targets and places": Case("shards", decades(0, 4), looked_up),
    "synthesize what is there": Case("shards", decades(0, 4), remade),
    "Folder": Case("files", decades(2, 5), lambda folder: lambda: Folder(folder)),
}
"""The cases by name, those of a fixture together."""


def memory(key: str) -> float:
    """Return MiB of this process: VmRSS now, or VmHWM, the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure(name: str, small: Path, folder: Path) -> dict[str, float]:
    """Measure a case, after a run of the smallest size has loaded what is loaded once."""
    CASES[name].use(small)()
    call = CASES[name].use(folder)
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.process_time()
    kept = call()
    seconds = time.process_time() - start
    peak = memory("VmHWM") - before
    gc.collect()
    found = {"seconds": seconds, "mib": memory("VmRSS") - before, "peak_mib": max(peak, 0.0)}
    del kept
    return found


def exponent(old: Row | None, new: Row) -> float | None:
    """Return the slope of log seconds over log size, or None if the seconds are too short.

    >>> exponent({"size": 10, "seconds": 1.0}, {"size": 100, "seconds": 100.0})
    2.0
    """
    if old is None or old["seconds"] < SHORT:
        return None
    return math.log(new["seconds"] / old["seconds"]) / math.log(new["size"] / old["size"])


def apart(call: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(call, *args).result()


def make(name: str, folder: Path, size: int) -> None:
    """Make a fixture; a function with a name, which another process can be asked for."""
    FIXTURES[name](folder, size)


def arguments(parser: Any) -> None:
    """Add the options of this suite."""
    parser.add_argument("--only", default="", help="words in the name of a case")


def suite(args: argparse.Namespace) -> Iterator[Row]:
    """Measure every case at every size."""
    names = [name for name in CASES if getattr(args, "only", "") in name]
    for of, group in itertools.groupby(names, lambda name: CASES[name].of):
        with tempfile.TemporaryDirectory() as root:
            for name in group:
                last, sizes = None, CASES[name].sizes[: 2 if args.quick else None]
                for size in sizes:
                    folder, small = (Path(root) / str(n) for n in (size, sizes[0]))
                    if not folder.exists():
                        apart(make, of, folder, size)
                    row = {"name": f"{name}, {size:,} {of}", "what": name, "size": size, "of": of}
                    row |= apart(measure, name, small, folder)
                    yield row | {"exponent": exponent(last, row)}
                    last = row


def table(rows: list[Row]) -> list[str]:
    """Return the lines of the Markdown table."""
    lines = ["| what | s | MiB kept | MiB at the peak | exponent |", "|---|---|---|---|---|"]
    for row in rows:
        slope = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
        lines.append(
            f"| {row['name']} | {row['seconds']:.4f} | {row['mib']:.1f} | {row['peak_mib']:.1f} "
            f"| {slope} |"
        )
    return lines
