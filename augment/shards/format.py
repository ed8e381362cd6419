"""The records of a folder of shards: what it is to hold, and what is in each tar.

The options of ``synthesize`` are `ShardSettings`. What they come to for a bank is a
`ShardManifest`, in ``synthesis.json``. ``shard-000000.json`` holds a `ShardRecord`: the name of
the tar, its ``bytes`` and ``sha256``, and ``[key, label, offset, size]`` of each of its
``samples``: the place of its image. ``crc32`` holds sixteen hexadecimal digits a sample: the CRC-32
of its image, begun at the label, and that of its JSON, begun at the key. Both records end with a
digest of their own (`augment.core.schema`). Schema 1, of older versions, had neither kind of
digest.

The records of the first two shards hold the settings too, so that a lost ``synthesis.json`` is
written again (`recover_settings`).
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from augment.core.errors import Damaged, Missing, UserError, lookup
from augment.core.files import read_file, sha256, unreadable, write_bytes
from augment.core.schema import Record, build, damaged, load, read, write
from augment.diffusion.checkpoints.adapter import adapted_to
from augment.diffusion.sampling import ResolvedSampling, Sampling
from augment.diffusion.usage import Usage
from augment.plan.mixing import Mixing
from augment.sources import Source
from augment.synthesis.refine import SeedSelect

SCHEMA = 2
SETTINGS, INFO = "synthesis.json", "_info.json"
FORMATS = {"jpg": "JPEG", "webp": "WEBP", "png": "PNG"}
"""PIL's name of an image format by the extension of its files."""

MAX_BYTES = 64 * 2**20  # of a member
MAX_SHARDS = 10**6  # a number of six digits
UNCHECKED = -1  # in place of the digests of a sample
CRC = 2**32 - 1  # the bits of a CRC-32
AGAIN = "remove that .tar and its .json, and run the same latent-augment synthesize command again"


@dataclass(frozen=True, kw_only=True)
class Output:
    """How images are written.

    Args:
        extension: image format: jpg, webp or png.
        quality: quality of jpg and webp, from 1 to 100.
        pixels: largest side of an image; larger images are reduced to it.
        shard_size: images a shard.
        candidates: number of plans that are tried for an image before it is given up.

    Raises:
        UserError: a value out of its range.
    """

    extension: str = "jpg"
    quality: int = 95
    pixels: int = 256
    shard_size: int = 1000
    candidates: int = 1

    def __post_init__(self) -> None:
        for name in ("shard_size", "candidates", "pixels"):
            if getattr(self, name) < 1:
                raise UserError(f"expected {name} ≥ 1, got {getattr(self, name)}")
        check_encoding(self.extension, self.quality)


def check_encoding(extension: str, quality: int) -> None:
    """Refuse an unknown image format, or a quality out of range."""
    lookup(FORMATS, extension, "image format")
    if not 1 <= quality <= 100:
        raise UserError(f"expected a quality from 1 to 100, got {quality}; 95 is usual")


@dataclass(frozen=True, kw_only=True)
class ShardSettings(Mixing, Sampling, Output):
    """Synthesize images from random centroids of a bank's latents, as webdataset shards.

    Args:
        bank: folder of the bank.
        out: folder for the shards, out/shard-000000.tar and so on; an interrupted job is resumed.
        per_class: images a class.
        fill_to: top every class up to this many images, counting the real ones; replaces per_class.
        tail_only: skip classes that have at least this many real images.
        prompt: template of prompts that replace the bank's, such as 'a sketch of a {name}'; beside
            contexts it may say where they go, as 'a {name}, {context}'.
        backbone: diffusion model; by default the one that made the bank.
        device: device such as cuda or cpu; by default the GPU if there is one.
        dtype: number type of the network, float32, float16 or bfloat16; by default the backbone's.
        backbone_options: options of the backbone, as YAML such as '{compile: true}'.
        refine: number of steps of SeedSelect, such as 5, that bring each centroid nearer to its
            class (a step takes about four times as long as sampling the image); or its settings,
            as --refine.steps 5 --refine.network resnet50, or YAML. See --refine.help.
        filters: filters that images have to pass, such as degenerate,duplicate, out of classifier,
            prototype, clip, duplicate, degenerate; or YAML with their settings, such as
            '{degenerate: {}, duplicate: {minimum: 0.5}}'.
        images: real images that refine and filters compare with, a folder or another source as for
            invert; by default they are looked for where the bank was made.
        executor: where shards are made: local, in this process (under torchrun or in a Slurm array,
            this process makes its share), or ray.
        dry_run: make and keep one shard, and report how long all will take.

    Raises:
        UserError: a value out of its range.
    """

    bank: str
    out: str
    per_class: int = 100
    fill_to: int | None = None
    tail_only: int | None = None
    prompt: str = ""
    backbone: str | None = None
    device: str | None = None
    dtype: str | None = None
    backbone_options: dict[str, Any] | None = None
    refine: SeedSelect | int | None = None
    filters: dict[str, dict[str, Any] | None] | str | None = None
    images: Source | str | None = None
    executor: str = "local"
    dry_run: bool = False

    def __post_init__(self) -> None:
        for part in (Mixing, Sampling, Output):
            part.__post_init__(self)


@dataclass(frozen=True)
class ShardManifest(Record):
    """What a folder of shards is to hold, and how that is made; only the first are always there.

    Args:
        classes: names in label order.
        shards: number of shards.
        per_class: images a class, or of each.
        shard_size, extension, quality, pixels, candidates: see `Output`.
        solver, steps, guidance, batch_size, interval: see `ResolvedSampling`.
        rule, seed, members, noise, alpha, level: see `Mixing`; an infinite alpha is ``inf``, and a
            level is there for a bank that has no latents at the noisiest.
        prompts: of classes that have others than the bank's.
        refine, filters: settings; a file or folder of a model is its SHA-256.
        reference_rule: see `Mixing`; for a bank with references.
        nearest: digest of the features, if neighbours are mixed.
        contexts: digest of the contexts, if any are drawn.
        images: real images of each class: the beginning of the SHA-256 of each by its id; in older
            folders the ids alone.
        bank: digest of the bank.
        fingerprint: of the bank.
        dtype: of the network.
        usage: template of the bank's prompts and its guidance, if the bank records them.
        by: ``explore``, if the images were chosen by hand.
        licence: of the backbone's weights, if known; no image depends on it.
    """

    WHAT: ClassVar = "shards of synthetic images"
    CURE: ClassVar = "run latent-augment verify --repair on the folder, or copy the file anew"
    SCHEMA: ClassVar = SCHEMA
    OLDEST: ClassVar = 1

    schema: int
    classes: list[str]
    shards: int
    extension: str
    per_class: Any = None
    shard_size: int | None = None
    quality: int | None = None
    pixels: int | None = None
    candidates: int | None = None
    rule: str | None = None
    solver: str | None = None
    steps: int | None = None
    guidance: float | None = None
    batch_size: int | None = None
    interval: list[float] | None = None
    prompts: dict[str, str] | None = None
    seed: int | None = None
    members: int | None = None
    noise: float | None = None
    alpha: Any = None
    nearest: str | None = None
    level: Any = None
    contexts: str | None = None
    reference_rule: str | None = None
    refine: dict[str, Any] | None = None
    filters: dict[str, dict[str, Any]] = field(default_factory=dict)
    by: str | None = None
    images: dict[str, Any] = field(default_factory=dict)
    bank: str | None = None
    fingerprint: dict[str, Any] | None = None
    dtype: str | None = None
    usage: Usage | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        """Refuse what was never written."""
        if self.shards > MAX_SHARDS:
            raise ValueError(f"more than {MAX_SHARDS:,} shards")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class twice")
        if self.extension not in FORMATS:
            raise ValueError(f"extension {self.extension[:20]!r}")
        for ids in self.images.values():
            build(dict[str, str] if isinstance(ids, dict) else list[str], ids)
        if not self.job:
            return
        several = isinstance(self.per_class, dict)
        build(dict[str, int] if several else int, self.per_class)
        if self.alpha != "inf":
            build(list[float] if isinstance(self.alpha, list) else float, self.alpha)
        if self.level is not None:
            build(list[float], self.level)
        counts: dict[str, Any] = dict.fromkeys(self.classes, self.per_class)
        if several:
            counts = self.per_class
        if not counts.keys() <= set(self.classes) or self.images.keys() != set(self.classes):
            raise ValueError("numbers of images, or names of images, of other classes")
        total = sum(counts.values())
        if not self.shard_size or not self.shards or -(-total // self.shard_size) != self.shards:
            raise ValueError(f"{total} images in {self.shards} shards of {self.shard_size}")

    @property
    def job(self) -> bool:
        """Whether the shards are those of a job; images that were chosen by hand have no rule."""
        needed = ("rule", "solver", "steps", "guidance", "interval", "seed", "noise", "alpha")
        needed += ("per_class", "shard_size", "candidates", "batch_size", "prompts")
        return all(getattr(self, name) is not None for name in needed)

    @property
    def sampling(self) -> ResolvedSampling:
        """How the images of a job were sampled."""
        how: Any = {field.name: getattr(self, field.name) for field in fields(ResolvedSampling)}
        return ResolvedSampling(**how | {"interval": tuple(self.interval or ())})

    @property
    def mixing(self) -> Mixing:
        """What the images of a job were mixed of; nearest and contexts are left out."""
        names = ("rule", "members", "noise", "seed", "reference_rule")
        how: Any = {name: getattr(self, name) for name in names}
        how["level"] = None if self.level is None else tuple(self.level)
        return Mixing(
            **how, alpha=tuple(self.alpha) if isinstance(self.alpha, list) else self.alpha
        )

    @cached_property
    def origins(self) -> dict[str, str]:
        """The real images that the shards come from: ids by the first digits of their SHA-256."""
        classes = [ids for ids in self.images.values() if isinstance(ids, dict)]
        adapted = adapted_to((self.fingerprint or {}).get("backbone", {}))
        return adapted | {digest: image_id for ids in classes for image_id, digest in ids.items()}


@dataclass(frozen=True)
class ShardRecord(Record):
    """What is in a shard.

    Args:
        shard: its name, ``shard-000000``.
        bytes, sha256: of the tar.
        samples: key, label, offset and size of each image.
        crc32: digests of the samples; see the module.
        settings: digest of the settings of its job (`settings_digest`).
        wanted: number of images that were to be in it.
        dropped: by filter and class, the number of candidates that were refused.
        synthesis: the settings, in the first shards.
    """

    WHAT: ClassVar = "the record of a shard"
    CURE: ClassVar = AGAIN
    SCHEMA: ClassVar = SCHEMA
    OLDEST: ClassVar = 1

    schema: int
    shard: str
    bytes: int
    sha256: str
    samples: list[list[int]]
    crc32: str | None = None
    settings: str | None = None
    wanted: int = 0
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    synthesis: ShardManifest | None = None

    def __post_init__(self) -> None:
        """Refuse samples without digests, which only schema 1 had."""
        if self.crc32 is None and self.schema > 1:
            raise ValueError("no crc32")


def shard_path(folder: str | Path, number: int) -> Path:
    """Return the path of a shard's tar; its record has the suffix ``.json``."""
    return Path(folder) / f"shard-{number:06d}.tar"


def shard_numbers(folder: Path) -> list[int]:
    """Return the numbers of the shards that have a record, in order.

    Raises:
        UserError: the folder cannot be read.
    """
    try:
        names = [re.fullmatch(r"shard-([0-9]{6})\.json", p.name) for p in folder.iterdir()]
    except OSError as error:
        raise unreadable(folder, "a folder of shards", error) from None
    return sorted(int(name[1]) for name in names if name)


def holds_shards(path: str | Path) -> bool:
    """Tell whether a folder holds shards, even if their ``synthesis.json`` is lost.

    Raises:
        UserError: the folder cannot be read now.
    """
    try:
        names = {place.name for place in Path(path).iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(Path(path), "a folder", error) from None
    return SETTINGS in names or any(name.startswith("shard-") for name in names)


def read_settings(folder: str | Path) -> ShardManifest:
    """Read what a folder of shards is to hold.

    Raises:
        UserError: see `augment.core.schema.read`.
    """
    try:
        return read(ShardManifest, Path(folder) / SETTINGS)
    except Missing:
        if holds_shards(folder):
            raise Missing(
                f"expected {SETTINGS} beside the shards in {folder}, got none; {ShardManifest.CURE}"
            ) from None
        raise


def settings_digest(folder: Path) -> str:
    """Return the SHA-256 of a folder's settings, by which its shards know their job."""
    kind = ShardManifest
    facts = load(folder / SETTINGS, kind.WHAT, kind.SCHEMA, kind.CURE)
    return sha256(json.dumps(facts, sort_keys=True).encode())


def recover_settings(folder: Path) -> ShardManifest | None:
    """Write a lost or damaged ``synthesis.json`` again, as the records of the shards have it.

    Returns:
        The settings; None if no record has them.
    """
    best = None
    for number in shard_numbers(folder):
        with suppress(Damaged, Missing):
            record = read(ShardRecord, shard_path(folder, number).with_suffix(".json"))
            copy = record.synthesis
            if copy is not None and (best is None or copy.shards > best.shards):
                best = copy
    if best is not None:
        write(folder / SETTINGS, best)
    return best


def repair_settings(folder: Path) -> str:
    """Make a ``synthesis.json`` again, if it is lost or damaged, from the records of the shards.

    Returns:
        What was done, in a line.

    Raises:
        UserError: it cannot be read now, or no record holds the settings.
    """
    try:
        read_settings(folder)
        return f"{folder}: its {SETTINGS} is as it was written"
    except (Missing, Damaged) as flaw:
        if recover_settings(folder) is None:
            raise UserError(
                f"expected the record of shard 0 or 1 in {folder} to make {SETTINGS} of, got none "
                "that holds the settings; copy the file from elsewhere, or synthesize anew"
            ) from flaw
    return f"{folder}: {SETTINGS} is made again from the records of the shards"


def read_table(path: Path, classes: int) -> tuple[ShardRecord, np.ndarray]:
    """Read the record of a shard, and the `table` of its samples.

    Args:
        path: of the tar, whose size is compared; its content is not, which `verify_shard` does.
        classes: number of classes, to check the labels by.

    Raises:
        Damaged: the record is of another form, or the tar is missing or of another size.
        UserError: one of them cannot be read.
    """
    where = path.with_suffix(".json")
    record = read(ShardRecord, where)
    try:
        if record.shard != path.stem:
            raise ValueError("the record of another shard")
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise UserError(f"expected to read {path}, got {error.strerror or error}") from None
        if size is None:
            raise ValueError("no tar")
        if size != record.bytes:
            raise ValueError(f"a tar of {size} bytes, which its record does not say")
        return record, table(record, classes)
    except UserError:
        raise
    except ValueError as flaw:
        raise damaged(path, "a tar as its record says", str(flaw), AGAIN) from flaw


def table(record: ShardRecord, classes: int) -> np.ndarray:
    """Return the samples of a record as an int64 array (n, 5): key, label, offset, size, check.

    The check is both CRC-32 of a sample; `UNCHECKED` in a record of an older version, without any.

    Raises:
        ValueError: keys do not increase, a label is of no class, images overlap or pass the end, or
            the digests are of another form.
    """
    samples, checks = record.samples, record.crc32
    try:
        if not set(map(len, samples)) <= {4}:
            raise ValueError
        rows = np.fromiter(chain.from_iterable(samples), np.int64).reshape(-1, 4)
        if checks is None:
            column = np.full(len(rows), UNCHECKED)
        elif len(checks) == 16 * len(rows):
            column = np.frombuffer(bytes.fromhex(checks), ">i8")
        else:
            raise ValueError
        rows = np.column_stack([rows, column])
    except ValueError:
        raise ValueError("a record with samples of another form") from None
    keys, labels, offsets, sizes, _ = rows.T
    if (keys[1:] <= keys[:-1]).any() or (labels >= classes).any():
        raise ValueError("a record with keys that do not increase, or labels of no class")
    if (offsets > record.bytes).any() or (sizes > MAX_BYTES).any():
        raise ValueError("a record with images that are not in the tar")
    if (np.append(0, offsets + sizes) > np.append(offsets, record.bytes)).any():
        raise ValueError("a record with images that overlap or pass the end of the tar")
    return rows


def info(lengths: Sequence[int]) -> bytes:
    """Return what timm's ``wds/`` reader wants to know of a folder of shards, its ``_info.json``.

    Args:
        lengths: number of images in each shard.
    """
    names = [shard_path("", number).name for number in range(len(lengths))]
    split = {"name": "train", "num_samples": sum(lengths)}
    split |= {"filenames": names, "shard_lengths": list(lengths)}
    return (json.dumps({"splits": {"train": split}}, indent=1) + "\n").encode()


def write_info(folder: Path, lengths: Sequence[int]) -> None:
    """Write the ``_info.json`` of a folder of shards, unless it is there: it may be read-only."""
    content = info(lengths)
    with suppress(UserError):
        if read_file(folder / INFO, "a list of shards") == content:
            return
    write_bytes(folder / INFO, content)
