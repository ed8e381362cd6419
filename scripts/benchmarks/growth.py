"""How costs grow with classes, images and shards.

Each case is tried at several sizes, each of them in a process of its own: seconds (of this process,
not of the clock on the wall, which neighbours change), MiB of resident memory that what it returned
keeps, and MiB at the peak, both beyond what was there before. The exponent is the slope of log
seconds between a size and the one before, so 1 is linear; below `SHORT` seconds there is none, for
there fixed costs speak. Processes are forked, so that what is imported is not counted.
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

from augment import LatentBank, MixedDataset, Planner, SyntheticDataset, open_shards
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.jobs.job import run
from augment.sources import Folder
from benchmarks.large import SHAPE, bank_of, folder_of, job, long_tail, shards_of, synthesis

SHORT = 0.002
IMAGENET_LT = 115_846

Row = dict[str, Any]
Call = Callable[[], object]


class Case(NamedTuple):
    """What is measured: a fixture, its sizes, and what gives the function to be timed."""

    make: Callable[[Path, int], None]
    sizes: tuple[int, ...]
    use: Callable[[Path], Call]


def images(folder: Path, count: int) -> None:
    """A bank of so many images: of ten times fewer classes, at most 1000, with a long tail."""
    bank_of(folder, long_tail(count, min(count // 10, 1000)))


def classes(folder: Path, count: int) -> None:
    """A bank of so many classes, 10 images each."""
    bank_of(folder, [10] * count)


def members(folder: Path, count: int) -> None:
    """A bank of 10 classes of so many images."""
    bank_of(folder, [count] * 10)


def shards(folder: Path, count: int) -> None:
    """So many shards of 1000 images."""
    shards_of(folder, count)


def files(folder: Path, count: int) -> None:
    """So many empty files in class folders."""
    folder_of(folder, count)


def opened(folder: Path) -> Call:
    """Opening a bank."""
    return lambda: LatentBank.open(folder)


def of_bank(use: Callable[[LatentBank], object]) -> Callable[[Path], Call]:
    """Something of a bank that is open."""

    def ready(folder: Path) -> Call:
        bank = LatentBank.open(folder)
        return lambda: (use(bank), bank)

    return ready


def every_class(name: str) -> Callable[[Path], Call]:
    """One of a bank's methods for all classes."""
    return of_bank(lambda bank: {label: getattr(bank, name)(label) for label in bank.classes})


def gathered(bank: LatentBank) -> object:
    """The first batch of a training: 64 plans of up to 8 members, their latents read."""
    planner = Planner(bank.members, members=8)
    return bank.gather([planner(0, index) for index in range(64)])


def planned(**options: Any) -> Callable[[Path], Call]:
    """A planner, and 1000 plans thrown away."""

    def plans(bank: LatentBank) -> Planner:
        planner = Planner(bank.members, **options)
        for index in range(1000):
            planner(0, index)
        return planner

    return of_bank(plans)


def neighbours(bank: LatentBank) -> Planner:
    """Ten plans of the nearest of 8 by vectors of 4096 numbers, one class's."""
    name = bank.classes[0]
    vectors = torch.zeros(len(bank.members[name]), 4096)
    planner = Planner({name: bank.members[name]}, members=8, features={name: vectors})
    for index in range(10):
        planner(0, index)
    return planner


def datasets(folder: Path) -> Call:
    """A `SyntheticDataset` in a `MixedDataset`, and 1000 draws and plans of them."""
    backbone = GaussianBackbone(latent_shape=SHAPE)

    def made() -> MixedDataset:
        counts = {name: 100 for name in LatentBank.open(folder).classes}
        synthetic = SyntheticDataset(folder, backbone, per_class=counts, steps=1, members=8)
        mixed = MixedDataset(range(10**6), synthetic, 0.5, 10**6)
        for index in range(1000):
            mixed.draw(index)
            synthetic.plan(len(synthetic) - 1 - index % len(synthetic))
        return mixed

    return made


def looked_up(folder: Path) -> Call:
    """The labels of all images of shards, and the places of at most 20 000."""
    found = open_shards(folder)
    step = max(len(found) // 10_000, 1)
    return lambda: (found.targets, [found._place(k) for k in range(0, len(found), step)])


def refilled(folder: Path) -> Call:
    """The job of filling a bank that is full."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    counts = [sum(len(c["ids"]) for c in known["chunks"]) for known in manifest["classes"]]
    making = job(folder, counts)
    return lambda: (run(making), making)


def remade(folder: Path) -> Call:
    """The job of writing shards that are all there."""
    count = len(list(folder.glob("*.json"))) - 1
    making = synthesis(folder.with_name(f"{folder.name}-bank"), folder, count)
    return lambda: (run(making), making)


def decades(first: int, last: int) -> tuple[int, ...]:
    """Powers of ten."""
    return tuple(10**k for k in range(first, last + 1))


MANY = (*decades(2, 5), IMAGENET_LT, 10**6)
CASES = {
    "LatentBank.open": Case(images, MANY, opened),
    "subset": Case(images, MANY, of_bank(lambda b: b.subset(lambda i: int(i[-6]) % 2 == 0))),
    "digest": Case(images, MANY, of_bank(lambda bank: bank.digest)),
    "digests of all classes": Case(images, MANY, every_class("digests")),
    "gather, 64 plans": Case(images, MANY, of_bank(gathered)),
    "fill what is full": Case(images, MANY, refilled),
    "LatentBank.open of small classes": Case(classes, decades(1, 4), opened),
    "largest_mean of all classes": Case(classes, decades(1, 4), every_class("largest_mean")),
    "latents of all classes": Case(classes, decades(1, 4), every_class("latents")),
    "1000 plans": Case(classes, decades(1, 4), planned()),
    "1000 plans of 3 classes": Case(classes, decades(1, 4), planned(classes=3)),
    "datasets": Case(classes, decades(1, 4), datasets),
    "1000 plans of 8 members": Case(members, (10, 100, 1280), planned(members=8)),
    "10 plans of 8 neighbours": Case(members, (10, 100, 1280), of_bank(neighbours)),
    "gather, 64 plans of 8": Case(members, (10, 100, 1280), of_bank(gathered)),
    "open_shards": Case(shards, decades(0, 4), lambda folder: lambda: open_shards(folder)),
    "targets and places": Case(shards, decades(0, 4), looked_up),
    "synthesize what is there": Case(shards, decades(0, 4), remade),
    "Folder": Case(files, decades(2, 5), lambda folder: lambda: Folder(folder)),
}
"""The cases by name, those of a fixture together."""


def memory(key: str) -> float:
    """MiB of this process, VmRSS or VmHWM, the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def measure(name: str, small: Path, folder: Path) -> dict[str, float]:
    """Seconds and MiB of one case, after a run of the smallest has loaded what is loaded once."""
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
    """The slope of log seconds over log size; None where they are too short to tell.

    >>> exponent({"size": 10, "seconds": 1.0}, {"size": 100, "seconds": 100.0})
    2.0
    """
    if old is None or old["seconds"] < SHORT:
        return None
    return math.log(new["seconds"] / old["seconds"]) / math.log(new["size"] / old["size"])


def apart(call: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a process of its own."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(call, *args).result()


def arguments(parser: Any) -> None:
    """The options of this suite."""
    parser.add_argument("--only", default="", help="words in the name of a case")


def suite(args: argparse.Namespace) -> Iterator[Row]:
    """Every case at every size, as they are measured."""
    names = [name for name in CASES if getattr(args, "only", "") in name]
    for make, group in itertools.groupby(names, lambda name: CASES[name].make):
        with tempfile.TemporaryDirectory() as root:
            for name in group:
                last, sizes = None, CASES[name].sizes[: 2 if args.quick else None]
                for size in sizes:
                    folder, small = (Path(root) / str(n) for n in (size, sizes[0]))
                    if not folder.exists():
                        apart(make, folder, size)
                    told = f"{name}, {size:,} {make.__name__}"
                    row = {"name": told, "what": name, "size": size, "of": make.__name__}
                    row |= apart(measure, name, small, folder)
                    yield row | {"exponent": exponent(last, row)}
                    last = row


def table(rows: list[Row]) -> list[str]:
    """The lines of the Markdown table."""
    lines = ["| what | s | MiB kept | MiB at the peak | exponent |", "|---|---|---|---|---|"]
    for row in rows:
        slope = "" if row["exponent"] is None else f"{row['exponent']:.2f}"
        lines.append(
            f"| {row['name']} | {row['seconds']:.4f} | {row['mib']:.1f} | {row['peak_mib']:.1f} "
            f"| {slope} |"
        )
    return lines
