"""What lies on disk: banks against bare safetensors, shards against encoder, folder and webdataset.

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

from augment import LatentBank, Planner, open_shards
from augment.bank.fill import LoadedImage, commit
from augment.bank.format import ChunkEntry, ClassEntry, Fingerprint, ImageRecord, Manifest, parts_of
from augment.core.files import write_json
from augment.core.schema import write
from augment.shards.dataset import UNCHECKED, Sample, encode, shard_path, write_shard
from augment.shards.export import export_folder
from benchmarks.duel import Duel

SHAPE, COUNT = (4, 64, 64), 64


def make_bank(root: Path, classes: int) -> LatentBank:
    """Noise in the place of latents: 64 a class, 2 MiB."""
    names = [f"{label:04d}" for label in range(classes)]
    ids = {name: [f"{name}/{k}.png" for k in range(COUNT)] for name in names}
    plans = [
        ClassEntry(name, name, "", [ChunkEntry(0, label, ids[name])])
        for label, name in enumerate(names)
    ]
    inversion = {"method": "ddim", "steps": 1, "guidance": 1}
    prints = Fingerprint({"name": "none"}, inversion, "")
    manifest = Manifest(list(SHAPE), prints, {}, "", [], {}, Manifest.SCHEMA, plans)
    for part in parts_of(root, manifest):
        latents = torch.randn(COUNT, *SHAPE).half()
        records = [ImageRecord(i, 1, "", 1) for i in part.ids]
        pictures = [LoadedImage(record, row=row) for row, record in enumerate(records)]
        commit(part, {"latents": latents}, pictures)
    write(root / "manifest.json", manifest)
    return LatentBank.open(root)


def photographs(count: int, side: int = 256) -> list[Tensor]:
    """Colour images with detail at every scale, so that JPEGs are as large as of photographs."""
    dice = torch.Generator().manual_seed(0)
    total = torch.zeros(count, 3, side, side)
    for size in (4, 8, 16, 32, 64, 128, 256):
        noise = torch.randn(count, 3, size, size, generator=dice) * size**-0.8
        total += F.interpolate(noise, (side, side), mode="bicubic")
    return list((total / total.std() / 4 + 0.5).clamp(0, 1))


def banks(root: Path, classes: int) -> Iterator[Duel]:
    """Reading whole classes, and the members of plans."""
    bank = make_bank(root, classes)
    files = [bank.chunks[name][0].file("latents") for name in bank.classes]

    def bare() -> list[Tensor]:
        return [load_file(file)["latents"].float() for file in files]

    def read(opened: LatentBank) -> list[Tensor]:
        return [opened.latents(name) for name in opened.classes]

    def same(ours: Callable[[], Any], theirs: Callable[[], Any]) -> str:
        pairs = zip(ours(), theirs(), strict=True)
        return "the same" if all(torch.equal(a, b) for a, b in pairs) else "**not the same**"

    plans = [Planner(bank.members, members=8)(0, index) for index in range(64)]
    places = [[bank.place(plan.class_name, i) for i in plan.members] for plan in plans]

    def gather() -> Tensor:
        return bank.gather(plans)[0]

    def rows() -> Tensor:
        parts = []
        for spots in places:
            stored = load_file(spots[0][0].file("latents"))["latents"]
            parts.append(stored[[row for _, row in spots]].float())
        return torch.stack(parts)

    floor = "bare safetensors"
    known, fresh = partial(read, bank), lambda: read(LatentBank.open(root))
    told: dict[str, Any] = {"count": classes, "unit": "class"}
    yield Duel(
        "a class of 64 latents", known, bare, floor, partial(same, known, bare),
        bar=("time", 1.3), **told,
    )  # fmt: skip
    first = "the same for the first time, digest checked"
    yield Duel(first, fresh, bare, f"{floor}, unchecked", partial(same, fresh, bare), **told)
    yield Duel(
        "8 members of each of 64 plans, by gather", gather, rows, floor,
        partial(same, gather, rows), count=64, unit="plan",
    )  # fmt: skip


def shards(root: Path, count: int) -> Iterator[Duel]:
    """Writing and reading shards of JPEGs."""
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
    told: dict[str, Any] = {"count": count, "unit": "image"}

    def whole() -> str:
        return f"{shard_path(root, 0).stat().st_size / count / 1024:.0f} KiB an image in the tar"

    yield Duel(name, written, encoded, "the encoder alone", whole, bar=("time", 1.2), **told)
    yield from reading(root, told)
    yield checking(root, told)
    for key, image in enumerate(images):
        images[key] = F.interpolate(image[None], (64, 64), mode="area")[0]
    written()
    yield checking(root, told)


def checking(root: Path, told: dict[str, Any]) -> Duel:
    """All images of a shard, with and without comparing them with their digests."""
    known, unknown = open_shards(root), open_shards(root)
    unknown.rows = unknown.rows.copy()
    unknown.rows[:, 4] = UNCHECKED
    side = known[0][0].shape[-1]

    def checked() -> list[Any]:
        return [known[index] for index in range(len(known))]

    def unchecked() -> list[Any]:
        return [unknown[index] for index in range(len(unknown))]

    def quality() -> str:
        return f"{known.rows[:, 3].mean() / 1024:.1f} KiB an image"

    return Duel(
        f"read images of {side} pixels, compared with their digests", checked, unchecked,
        "the same, not compared", quality, bar=("time", 1.03), clock=time.process_time, **told,
    )  # fmt: skip


def reading(root: Path, told: dict[str, Any]) -> Iterator[Duel]:
    """All images of a shard, against a folder of the same files and webdataset's own way."""
    mine, place = open_shards(root), root.with_name("folder")
    export_folder(root, place)
    folder = ImageFolder(str(place), transform=lambda image: pil_to_tensor(image).float() / 255)
    tars = webdataset.WebDataset(str(shard_path(root, 0)), shardshuffle=False)
    streamed = tars.decode("torchrgb").to_tuple("jpg", "cls")

    def ours() -> list[tuple[Tensor, int]]:
        return [mine[index] for index in range(len(mine))]

    def files() -> list[tuple[Tensor, int]]:
        return [folder[index] for index in range(len(folder))]

    def stream() -> list[tuple[Tensor, int]]:
        return list(streamed)

    def same(theirs: Callable[[], list[tuple[Tensor, int]]]) -> str:
        sums = [sorted((label, image.sum().item()) for image, label in f()) for f in (ours, theirs)]
        apart = max(abs(a[1] - b[1]) / a[1] for a, b in zip(*sums, strict=True))
        return f"relative difference of the pixels' sums {apart:.1g}"

    bar = ("speed", 1.0)
    for theirs, who in ((files, "torchvision's ImageFolder of the same files"),
                        (stream, 'webdataset, decode("torchrgb")')):  # fmt: skip
        name = "read images, by open_shards"
        yield Duel(name, ours, theirs, who, partial(same, theirs), bar=bar, **told)


def suite(args: argparse.Namespace) -> Iterator[Duel]:
    """Banks, then shards."""
    with tempfile.TemporaryDirectory() as folder:
        yield from banks(Path(folder) / "bank", 3 if args.quick else 50)
        root = Path(folder) / "shards"
        root.mkdir()
        yield from shards(root, 16 if args.quick else 256)
