"""Banks against bare safetensors; shards against the encoder, a folder and webdataset.

Files are read from the page cache, by one process. Latents are (4, 64, 64) in float16, 64 a class;
images are JPEGs of 256 pixels with as much detail as photographs.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import webdataset
from safetensors.torch import load_file
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from augment import LatentBank, Mixing, Planner, open_shards
from augment.core.files import write_json
from augment.shards.dataset import UNCHECKED, Sample, encode, shard_path, write_shard
from augment.shards.export import export_folder
from benchmarks.large import bank_of
from benchmarks.paired import Comparison


def photographs(count: int, side: int = 256) -> list[Tensor]:
    """Draw colour images with detail at every scale, whose JPEGs are as large as photographs'."""
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(count, 3, side, side)
    for size in (4, 8, 16, 32, 64, 128, 256):
        noise = torch.randn(count, 3, size, size, generator=generator) * size**-0.8
        total += F.interpolate(noise, (side, side), mode="bicubic")
    return list((total / total.std() / 4 + 0.5).clamp(0, 1))


def banks(root: Path, classes: int) -> Iterator[Comparison]:
    """Compare reading whole classes, and the members of plans."""
    bank_of(root, [64] * classes, shape=(4, 64, 64))
    bank = LatentBank.open(root)
    files = [bank.chunks[name][0].file("latents") for name in bank.classes]

    def bare() -> list[Tensor]:
        return [load_file(file)["latents"].float() for file in files]

    def read(opened: LatentBank) -> list[Tensor]:
        return [opened.latents(name) for name in opened.classes]

    def same(ours: Callable[[], Any], theirs: Callable[[], Any]) -> str:
        pairs = zip(ours(), theirs(), strict=True)
        return "the same" if all(torch.equal(a, b) for a, b in pairs) else "**not the same**"

    plans = [Planner(bank.members, Mixing(members=8))(0, index) for index in range(64)]
    places = []  # a class is one chunk
    for plan in plans:
        ids = list(bank.members[plan.class_name])
        file = bank.chunks[plan.class_name][0].file("latents")
        places.append((file, [ids.index(i) for i in plan.members]))

    def gather() -> Tensor:
        return bank.gather(plans)[0]

    def rows() -> Tensor:
        parts = [load_file(file)["latents"][order].float() for file, order in places]
        return torch.stack(parts)

    floor = "bare safetensors"
    again, fresh = partial(read, bank), lambda: read(LatentBank.open(root))
    a_class: dict[str, Any] = {"count": classes, "unit": "class"}
    yield Comparison(
        "a class of 64 latents", again, bare, floor, partial(same, again, bare),
        bar=("time", 1.3), **a_class,
    )  # fmt: skip
    first = "the same for the first time, digest checked"
    yield Comparison(
        first, fresh, bare, f"{floor}, unchecked", partial(same, fresh, bare), **a_class
    )
    yield Comparison(
        "8 members of each of 64 plans, by gather", gather, rows, floor,
        partial(same, gather, rows), count=64, unit="plan",
    )  # fmt: skip


def shards(root: Path, count: int) -> Iterator[Comparison]:
    """Compare writing and reading shards of JPEGs."""
    images = photographs(count)
    about = {"plan": {"members": [f"n01440764/{k}.JPEG" for k in range(16)], "weights": [0.1] * 16}}

    def encoded() -> list[bytes]:
        return [encode(image) for image in images]

    def written() -> None:
        samples = (Sample(k, encode(x), k % 10, about) for k, x in enumerate(images))
        write_shard(shard_path(root, 0), samples, "jpg")

    settings = {"schema": 1, "classes": [f"c{k}" for k in range(10)], "shards": 1}
    write_json(root / "synthesis.json", settings | {"extension": "jpg"})
    size = sum(map(len, encoded())) / count / 1024
    name = f"write a shard of {count} JPEGs of {size:.0f} KiB, synchronised to disk"

    def whole() -> str:
        return f"{shard_path(root, 0).stat().st_size / count / 1024:.0f} KiB an image in the tar"

    yield Comparison(
        name, written, encoded, "the encoder alone", whole, bar=("time", 1.2), count=count
    )
    yield from reading(root)
    yield checking(root)
    for key, image in enumerate(images):
        images[key] = F.interpolate(image[None], (64, 64), mode="area")[0]
    written()
    yield checking(root)


def checking(root: Path) -> Comparison:
    """Compare reading all images of a shard with and without comparing their digests."""
    shards, unchecked = open_shards(root), open_shards(root)
    unchecked.rows = unchecked.rows.copy()
    unchecked.rows[:, 4] = UNCHECKED
    size = shards.rows[:, 3].mean() / 1024

    return Comparison(
        f"read images of {shards[0][0].shape[-1]} pixels, compared with their digests",
        partial(everything, shards), partial(everything, unchecked), "the same, not compared",
        lambda: f"{size:.1f} KiB an image", count=len(shards), bar=("time", 1.03),
        clock=time.process_time,
    )  # fmt: skip


def everything(dataset: Any) -> list[tuple[Tensor, int]]:
    """Return all items of a map-style dataset."""
    return [dataset[index] for index in range(len(dataset))]


def reading(root: Path) -> Iterator[Comparison]:
    """Compare reading a shard with a folder of the same files and with webdataset's own way."""
    shards, place = open_shards(root), root.with_name("folder")
    export_folder(root, place)
    folder = ImageFolder(str(place), transform=lambda image: pil_to_tensor(image).float() / 255)
    tars = webdataset.WebDataset(str(shard_path(root, 0)), shardshuffle=False)
    streamed = tars.decode("torchrgb").to_tuple("jpg", "cls")
    ours = partial(everything, shards)

    def same(theirs: Callable[[], list[tuple[Tensor, int]]]) -> str:
        sums = [sorted((label, image.sum().item()) for image, label in f()) for f in (ours, theirs)]
        apart = max(abs(a[1] - b[1]) / a[1] for a, b in zip(*sums, strict=True))
        return f"relative difference of the pixels' sums {apart:.1g}"

    for theirs, who in (
        (partial(everything, folder), "torchvision's ImageFolder of the same files"),
        (partial(list, streamed), 'webdataset, decode("torchrgb")'),
    ):
        yield Comparison(
            "read images, by open_shards", ours, theirs, who, partial(same, theirs),
            count=len(shards), bar=("speed", 1.0),
        )  # fmt: skip


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare banks, then shards."""
    with tempfile.TemporaryDirectory() as folder:
        yield from banks(Path(folder) / "bank", 3 if args.quick else 50)
        root = Path(folder) / "shards"
        root.mkdir()
        yield from shards(root, 16 if args.quick else 256)
