"""Time what lies on disk: ``python scripts/benchmark.py storage``.

Banks against bare safetensors, reading shards against an image folder of the same files, and
writing them against the encoder alone. Files are read from the page cache, by one thread, both
sides in turn.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark import seconds
from safetensors.torch import load_file
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from augment import LatentBank, Planner, open_shards
from augment.export import export_folder
from augment.files import write_json
from augment.fill import Picture, commit
from augment.records import SCHEMA
from augment.shards import Sample, encode, shard_path, write_shard

SHAPE, COUNT = (4, 64, 64), 64
CLASSES = 50


def make_bank(root: Path) -> LatentBank:
    """Noise in the place of latents: 50 classes of 64, 2 MiB a class."""
    classes = []
    for label in range(CLASSES):
        name, made = f"{label:04d}", {"latents": torch.randn(COUNT, *SHAPE).half()}
        ids = [f"{name}/{k}.png" for k in range(COUNT)]
        pictures = [
            Picture({"id": i, "bytes": 1, "sha256": "", "side": 1}, row=row)
            for row, i in enumerate(ids)
        ]
        commit(root / name / "chunk-0000", made, pictures)
        chunk = {"number": 0, "unit": label, "ids": ids}
        classes.append({"name": name, "folder": name, "prompt": "", "chunks": [chunk]})
    inversion = {"method": "ddim", "steps": 1, "guidance": 1}
    backbone = {"name": "none"}
    prints = {"backbone": backbone, "inversion": inversion, "preprocessing": ""}
    manifest = {"schema": SCHEMA, "latent_shape": list(SHAPE), "fingerprint": prints, "recipe": {}}
    manifest |= {"source": "", "keeps": [], "made_with": {}, "classes": classes}
    write_json(root / "manifest.json", manifest)
    return LatentBank.open(root)


def photographs(count: int, side: int = 256) -> list[torch.Tensor]:
    """Colour images with detail at every scale, so that JPEGs are as large as of photographs."""
    dice = torch.Generator().manual_seed(0)
    total = torch.zeros(count, 3, side, side)
    for size in (4, 8, 16, 32, 64, 128, 256):
        noise = torch.randn(count, 3, size, size, generator=dice) * size**-0.8
        total += F.interpolate(noise, (side, side), mode="bicubic")
    return list((total / total.std() / 4 + 0.5).clamp(0, 1))


def row(
    name: str, unit: str, count: int, runs: dict[str, Callable[[], object]], repeats: int
) -> None:
    """Print how many a second each of two runs does, the second the yardstick, and the ratio."""
    times = seconds(runs, repeats)
    (ours, mine), (bare, theirs) = times.items()
    ratio = statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
    rates = [count / statistics.median(values) for values in (mine, theirs)]
    print(f"| {name} | {ours}: {rates[0]:,.0f} {unit}/s | {bare}: {rates[1]:,.0f} {unit}/s "
          f"| {ratio:.2f} |", flush=True)  # fmt: skip


def banks(root: Path, repeats: int) -> None:
    """Reading whole classes, and the members of plans."""
    bank = make_bank(root)
    files = [bank.chunks[name][0].file("latents") for name in bank.classes]

    def bare() -> None:
        for file in files:
            load_file(file)["latents"].float()

    def ours() -> None:
        for name in bank.classes:
            bank.latents(name)

    def first() -> None:
        fresh = LatentBank.open(root)
        for name in fresh.classes:
            fresh.latents(name)

    plans = [Planner(bank.members, members=8)(0, index) for index in range(64)]
    places = [[bank.place(p.class_name, i) for i in p.members] for p in plans]

    def rows() -> None:
        parts = []
        for spots in places:
            stored = load_file(spots[0][0].file("latents"))["latents"]
            parts.append(stored[[row for _, row in spots]].float())
        torch.stack(parts)

    row("a class of 64 latents", "classes", CLASSES, {"ours": ours, "bare": bare}, repeats)
    row("the same for the first time", "classes", CLASSES, {"ours": first, "bare": bare}, repeats)
    gather = {"gather": lambda: bank.gather(plans), "bare": rows}
    row("8 members of each of 64 plans", "plans", 64, gather, repeats)


def shards(root: Path, repeats: int, count: int = 256) -> None:
    """Writing and reading shards of 256-pixel JPEGs."""
    images = photographs(count)
    about = {"plan": {"members": [f"n01440764/{k}.JPEG" for k in range(16)], "weights": [0.1] * 16}}

    def encoded() -> list[bytes]:
        return [encode(image) for image in images]

    def written() -> None:
        samples = (Sample(k, encode(x), k % 10, about) for k, x in enumerate(images))
        write_shard(shard_path(root, 0), samples, "jpg")

    settings = {"schema": 1, "classes": [f"c{k}" for k in range(10)], "shards": 1}
    root.mkdir()
    write_json(root / "synthesis.json", settings | {"extension": "jpg"})
    runs = {"ours": written, "encoder alone": encoded}
    row("writing a shard of 256 JPEGs", "images", count, runs, repeats)
    size = statistics.fmean(map(len, encoded()))
    export_folder(root, root.with_name("folder"))
    folder = ImageFolder(
        str(root.with_name("folder")), transform=lambda image: pil_to_tensor(image).float() / 255
    )
    mine = open_shards(root)

    def read(dataset: object) -> Callable[[], None]:
        def all_of_it() -> None:
            for index in range(count):
                dataset[index]  # type: ignore[index]

        return all_of_it

    runs = {"open_shards": read(mine), "ImageFolder": read(folder)}
    row(f"reading JPEGs of {size / 1024:.0f} KiB", "images", count, runs, repeats)


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py storage", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=11)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print("\n| what | ours | yardstick | time, × yardstick |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        banks(Path(folder) / "bank", args.repeats)
        shards(Path(folder) / "shards", args.repeats)
