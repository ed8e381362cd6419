"""Banks, shards and folders of any size, of images that are not there.

Manifests and records are as jobs write them; latents are noise, by default of 4 numbers each, and
tars are holes. So reading them costs what real ones cost, but for the bytes of latents and images.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from augment import LatentBank, Planner, Sampling
from augment.bank.chunking import assign_chunks
from augment.bank.fill import InversionJob
from augment.bank.format import (
    ChunkRecord,
    FileRecord,
    ImageRecord,
    Manifest,
    Statistics,
    file_of,
    parts_of,
)
from augment.core.files import sha256
from augment.core.schema import sealed, write
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.inversion import inverter
from augment.shards.dataset import BLOCK
from augment.shards.format import SCHEMA, Output, ShardRecord, shard_path
from augment.shards.write import ShardJob
from augment.sources.source import Source
from augment.synthesis.synthesizer import Synthesizer

SHAPE = (1, 2, 2)
PER_SHARD = 1000
SIZE = 2**31  # bytes of an image that is not there: so large that digests are not compared


class Nowhere(Source):
    """Images that have only a name and a size; ``counts`` of each class."""

    def __init__(self, counts: list[int]) -> None:
        self.root = Path("/nowhere")
        names = [f"n{label:08d}" for label in range(len(counts))]
        self.ids = {
            name: [f"{name}/{name}_{k:05d}.JPEG" for k in range(count)]
            for name, count in zip(names, counts, strict=True)
        }

    def size(self, image_id: str) -> int:
        """Return the same for all."""
        return SIZE


def long_tail(images: int, classes: int) -> list[int]:
    """Count the images of each class of a tail like ImageNet-LT's, which has 5 to 1280 a class."""
    mean = images / classes
    least, most = max(round(mean * 5 / 115.846), 1), mean * 1280 / 115.846
    power = (most - least) / max(mean - least, 1e-9) - 1  # of a curve with that mean
    curve = np.cumsum([(1 - k / classes) ** power for k in range(classes)])
    ends = np.round(curve / curve[-1] * (images - least * classes)).astype(int)
    return (least + np.diff(ends, prepend=0)).tolist()


def job(folder: Path, counts: list[int], shape: tuple[int, int, int] = SHAPE) -> InversionJob:
    """Return the job that fills a bank of images that are not there."""
    backbone = GaussianBackbone(latent_shape=shape)
    return InversionJob(folder, Nowhere(counts), backbone, inverter("ddim", steps=1), stored=())


def bank_of(folder: Path, counts: list[int], shape: tuple[int, int, int] = SHAPE) -> None:
    """Write a complete bank of noise, without waiting for the disk."""
    making = job(folder, counts, shape)
    assert making.backbone is not None
    classes, _ = assign_chunks(folder, None, making.source, {}, 256)
    made = making.described(making.backbone)
    manifest = Manifest(**vars(made), schema=Manifest.SCHEMA, classes=classes)
    generator = torch.Generator().manual_seed(0)
    for part in parts_of(folder, manifest):
        part.stem.parent.mkdir(parents=True, exist_ok=True)
        latents = torch.randn(len(part.ids), *shape, generator=generator)
        content = save({"latents": latents.half(), "norms": latents.flatten(1).norm(dim=1)})
        file = FileRecord(len(content), sha256(content), ["latents", "norms"])
        images = [ImageRecord(i, SIZE, sha256(i.encode()), 500) for i in part.ids]
        statistics = Statistics(1.0, latents.mean((0, 2, 3)).tolist())
        facts = {"latents": file}, images, [], statistics, part.home, part.settings
        file_of(part.stem, "latents").write_bytes(content)
        record = ChunkRecord(*facts, schema=ChunkRecord.SCHEMA)
        part.stem.with_suffix(".json").write_bytes(sealed(record))
    write(folder / "manifest.json", manifest)


def synthesis(bank: Path, out: Path, per_class: int = 10) -> ShardJob:
    """Return the job that makes shards of a bank."""
    opened = LatentBank.open(bank)
    made = Synthesizer(GaussianBackbone(latent_shape=SHAPE), opened, sampling=Sampling(steps=1))
    return ShardJob(out, made, Planner(opened.members), per_class, Output(shard_size=PER_SHARD))


def shards_of(folder: Path, count: int) -> None:
    """Write shards of 1000 images of 1000 classes; their tars are holes."""
    bank_of(folder.with_name(f"{folder.name}-bank"), [2] * 1000)
    making = synthesis(folder.with_name(f"{folder.name}-bank"), folder, count)
    folder.mkdir()
    making.plan()
    for number in range(count):
        step = 40 * BLOCK
        rows = [
            [key, key % 1000, k * step + BLOCK, 35 * BLOCK - key % BLOCK]
            for k, key in enumerate(making.indices(number))
        ]
        size = PER_SHARD * step + 2 * BLOCK
        path = shard_path(folder, number)
        facts = path.stem, size, "0" * 64, rows, "0" * 16 * PER_SHARD, making.digest, PER_SHARD
        with path.open("wb") as file:
            file.truncate(size)
        path.with_suffix(".json").write_bytes(sealed(ShardRecord(SCHEMA, *facts), indent=None))


def folder_of(folder: Path, count: int) -> None:
    """Write empty files in up to 1000 class folders."""
    classes = min(count, 1000)
    for label in range(classes):
        (folder / f"{label:04d}").mkdir(parents=True)
    for number in range(count):
        (folder / f"{number % classes:04d}" / f"{number:06d}.jpg").touch()
