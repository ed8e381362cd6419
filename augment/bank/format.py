r"""A bank on disk: per class, the latents of its labelled images, and how they are made.

A bank is a folder::

    manifest.json                 what it is to hold, and how that is made: the plan
    0000/chunk-0000.safetensors   some latents of a class: ``latents`` (n, C, H, W) float16, and in
                                  float32 their ``norms`` (n,) and ``errors`` (n,), the mean
                                  squared difference of each image, in [0, 1], to its latent
                                  sampled back
    0000/chunk-0000.clean.safetensors   if asked for, and below the noisiest level: ``clean``
                                  (n, C, H, W) float16, z₀; with the inversion noise these
                                  are the latents
    0000/chunk-0000.nulls.safetensors   what null-text inversion adds: ``nulls`` (g, steps, …)
                                  float16 and ``null_rows`` (n,), which of them is an image's
    0000/chunk-0000.references.safetensors   of a backbone that takes references: ``references``
                                  (n, …) float16, each image's own, which it is inverted with
    0000/chunk-0000.json          the chunk's commit record
    rejects.jsonl                 the rejected images, with the reason

The manifest (schema 3) is a `Manifest`: the latent shape; the **fingerprint**, which must match
before latents may be mixed or sampled; for information the **recipe**, by which `load_backbone`
makes the backbone, the **source** of the images and the versions it was made **with**; and the
classes in label order, each with its folder, prompt and chunks: their number, the ids of their
images, at most `CHUNK`, and the unit of the job that makes them (`augment.bank.fill`).

A commit record is a `ChunkRecord`: bytes and SHA-256 of each of the chunk's files; bytes, SHA-256
and shorter side of each image's file; the rejected images, with the reason; statistics of the
latents; and all that the manifest says of the chunk, so that `augment.bank.verify.repair_bank` can
make the manifest from the records. It is written last, and **a chunk counts if and only if its
record is there**; the manifest changes only where images were added or repaired, or were removed
before they were inverted. So any number of workers may fill a bank, be killed and resume, and
`LatentBank.open` refuses one that is not complete.

Manifest and records end with their own digests (`augment.core.schema`). A bank of schema 2 can be
read: its records have no digest, and do not say which class they are of.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import ClassVar, NamedTuple

from augment.core.errors import BankMismatch, Damaged, ImageRejected, Missing, UserError
from augment.core.files import JsonObject, damaged, read_file, reading, sha256
from augment.core.schema import Record, as_object, build, read
from augment.diffusion import PATHS
from augment.diffusion.backbone import Recipe
from augment.diffusion.usage import Usage
from augment.inversion import INVERTERS
from augment.sources.images import FITTING, SUFFIXES, preprocessing
from augment.sources.source import Source

CHUNK = 256
KINDS = ("latents", "clean", "nulls", "references")
WRITTEN = "a file of a bank as it was written"
ENLARGED = 1.5
"""By how much images may be enlarged without a warning."""

DIGITS = 16
"""Hexadecimal digits of a SHA-256 where it only has to identify an image."""

UNPACKED = 256
"""Chunks whose ids a process keeps unpacked after they were used."""


@dataclass(frozen=True)
class Fingerprint:
    """What must match before latents are mixed or sampled.

    Args:
        backbone: name, weights, codec, process, resolution.
        inversion: method, solver, steps, guidance, and the method's other settings; and the noise
            level u of the latents, if it is not the noisiest.
        preprocessing: how an image becomes the backbone's.
    """

    backbone: dict[str, str]
    inversion: JsonObject
    preprocessing: str

    def __post_init__(self) -> None:
        """Refuse what no version wrote."""
        if not {type(v) for v in self.inversion.values()} <= {str, int, float, bool, NoneType}:
            raise ValueError("settings of an inversion that are not plain values")
        if "name" not in self.backbone:
            raise ValueError("a backbone without a name")
        if self.inversion.get("method") not in INVERTERS:
            raise ValueError("an unknown inversion")
        build(int, self.inversion.get("steps"))
        build(float, self.inversion.get("guidance"))
        if not 0 < build(float, self.inversion.get("level", 1.0)) <= 1:
            raise ValueError("a level outside (0, 1]")


@dataclass(frozen=True)
class BankSettings:
    """How the latents of a bank are made.

    Args:
        latent_shape: channels, height, width.
        fingerprint: what must match before latents are mixed or sampled.
        recipe: arguments of `load_backbone` that make the backbone; empty if unknown.
        source: where the images were, for information.
        keeps: what is stored beside the latents: errors, clean.
        made_with: versions of packages, and the device, for information.
        usage: template of the prompts, and guidance to sample with; None in older banks, and where
            there is no template and the guidance is that of the inversion.
        resolution: side of the model's images in pixels, for information; None in older banks.
    """

    latent_shape: list[int]
    fingerprint: Fingerprint
    recipe: Recipe
    source: str
    keeps: list[str]
    made_with: dict[str, str]
    usage: Usage | None = field(default=None, kw_only=True)
    resolution: int | None = field(default=None, kw_only=True)

    @property
    def guidance(self) -> float:
        """Scale of guidance to sample with; of an older bank that of the inversion."""
        inversion = self.fingerprint.inversion
        return float(inversion["guidance"] if self.usage is None else self.usage.guidance)

    def __post_init__(self) -> None:
        """Refuse what no version wrote."""
        if len(self.latent_shape) != 3:
            raise ValueError("a latent_shape that is not of three")
        if self.recipe and type(self.recipe.get("name_or_path")) is not str:
            raise ValueError("a recipe without a name_or_path")
        if not all(_is_path(self.recipe[key]) for key in PATHS if key in self.recipe):
            raise ValueError("a recipe with a name that no file has")
        if {"device", "dtype"} & self.recipe.keys():
            raise ValueError("a recipe with a device or dtype")


def _is_path(value: object) -> bool:
    """Tell whether a value is None, or text that an operating system takes for a path."""
    text = value or ""
    return isinstance(text, str) and len(text) < 4096 and max(map(len, text.split("/"))) < 256


@dataclass(frozen=True)
class ChunkEntry:
    """A chunk in the manifest: its number in its class, the job's unit, the ids of its images."""

    number: int
    unit: int
    ids: list[str]

    def __post_init__(self) -> None:
        """Refuse a chunk of nothing."""
        if not self.ids:
            raise ValueError("a chunk without images")


@dataclass(frozen=True)
class ClassEntry:
    """A class in the manifest: its name, folder, prompt and chunks."""

    name: str
    folder: str
    prompt: str
    chunks: list[ChunkEntry]

    def __post_init__(self) -> None:
        """Refuse a folder outside the bank, and two chunks of one number."""
        if not (self.folder.isascii() and self.folder.isdigit()):
            raise ValueError("a folder that is not a number")
        if len({chunk.number for chunk in self.chunks}) < len(self.chunks):
            raise ValueError("two chunks of one number")


@dataclass(frozen=True)
class Manifest(BankSettings, Record):
    """What a bank is to hold, and how that is made."""

    WHAT: ClassVar = "the manifest of a bank"
    CURE: ClassVar = "latent-augment verify --repair makes it again from the records of the chunks"
    SCHEMA: ClassVar = 3
    OLDEST: ClassVar = 2

    schema: int
    classes: list[ClassEntry]

    def __post_init__(self) -> None:
        """Refuse two classes of one name or folder."""
        BankSettings.__post_init__(self)
        names, folders = {c.name for c in self.classes}, {c.folder for c in self.classes}
        if not len(names) == len(folders) == len(self.classes) > 0:
            raise ValueError("no class, or two of one name or folder")

    @property
    def settings(self) -> JsonObject:
        """How the latents are made, as each commit record holds it."""
        plain = {known.name: getattr(self, known.name) for known in fields(BankSettings)}
        plain["fingerprint"] = as_object(self.fingerprint)
        if self.usage is not None:
            plain["usage"] = as_object(self.usage)
        return {key: value for key, value in plain.items() if value is not None}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a chunk: its size, its SHA-256, and the names of its tensors."""

    bytes: int
    sha256: str
    holds: list[str]


@dataclass(slots=True)  # not frozen, which takes seven times as long for each of a million images
class ImageRecord:
    """An image that has a latent.

    Args:
        id: its id.
        bytes, sha256: of its file.
        side: its shorter side in pixels.
        caption: what it was inverted with in place of its class's prompt, if anything.
        colour: True if it had colour, which a model of grey images lost.
    """

    id: str
    bytes: int
    sha256: str
    side: int
    caption: str | None = None
    colour: bool | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """A rejected image, the reason, and its place among the planned ones."""

    id: str
    bytes: int
    sha256: str
    reason: str
    place: int | None = None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of a chunk's latents: mean norm over √D, channel means, mean error if stored."""

    norm: float | None = None
    channel_means: list[float] | None = None
    error: float | None = None


@dataclass(frozen=True, slots=True)
class Home:
    """Where a chunk belongs: what the manifest says of it, without the ids.

    Args:
        name, folder, prompt: of its class.
        label, classes: of its class, and the number of classes, when it was made.
        number, unit: of the chunk.
    """

    name: str
    folder: str
    prompt: str
    label: int
    classes: int
    number: int
    unit: int

    def same(self, other: "Home") -> bool:
        """Tell whether both are the same place; labels change when classes are added."""
        fixed = ("name", "folder", "prompt", "number", "unit")
        return all(getattr(self, key) == getattr(other, key) for key in fixed)


@dataclass(frozen=True, slots=True)
class ChunkRecord(Record):
    """The commit record of a chunk.

    Args:
        files: by kind.
        images: those that have a latent, row by row.
        rejects: the rejected ones.
        statistics: of the latents.
        home: where it belongs, to repair a manifest; None in a record of schema 2.
        settings: `Manifest.settings`, for the same; None in a record of schema 2.
    """

    WHAT: ClassVar = "the commit record of a chunk"
    CURE: ClassVar = (
        "latent-augment verify --discard removes it, and the command that made the bank makes the "
        "chunk again"
    )
    SCHEMA: ClassVar = 3
    OLDEST: ClassVar = 2

    files: dict[str, FileRecord]
    images: list[ImageRecord]
    rejects: list[Reject]
    statistics: Statistics
    home: Home | None = None
    settings: JsonObject | None = None
    schema: int = 2

    def __post_init__(self) -> None:
        """Refuse files of other kinds, and latents or statistics without images."""
        full = bool(self.images)
        if not self.files.keys() <= set(KINDS) or full != ("latents" in self.files):
            raise ValueError("other files than its images need")
        if full != bool(self.statistics.channel_means):
            raise ValueError("other statistics than its images need")
        if (self.schema > 2) != (self.home is not None) or (self.home is None) != (
            self.settings is None
        ):
            raise ValueError("no home or no settings")


class Committed(NamedTuple):
    """What a job keeps in memory of a commit record.

    Args:
        files: by kind.
        rejects: the rejected images.
        images: number of latents.
        enlarged: number of images that were enlarged more than `ENLARGED`-fold.
        smallest: shorter side in pixels and id of the smallest of these.
    """

    files: dict[str, FileRecord]
    rejects: list[Reject]
    images: int
    enlarged: int
    smallest: tuple[float, str]

    @classmethod
    def of(cls, record: ChunkRecord, side: int) -> "Committed":
        """Return the facts of a record for a backbone of a resolution, ``side`` pixels."""
        enlarged = [(i.side, i.id) for i in record.images if i.side * ENLARGED < side]
        smallest = min(enlarged, key=itemgetter(0), default=(math.inf, ""))
        return cls(record.files, record.rejects, len(record.images), len(enlarged), smallest)


@dataclass(slots=True)
class ChunkPlan:
    """A planned chunk.

    Args:
        stem: path of its files without suffix.
        home: where it belongs.
        ids: its images.
        settings: how its latents are made.
        committed: what its record says, once a job has read it.
    """

    stem: Path
    home: Home
    ids: list[str]
    settings: JsonObject
    committed: Committed | None = None

    @property
    def rejects(self) -> list[Reject]:
        """The rejected images that are still planned here."""
        return [r for r in self.committed.rejects if r.id in self.ids] if self.committed else []


def parts_of(root: Path, manifest: Manifest) -> Iterator[ChunkPlan]:
    """Yield the planned chunks of a bank, class by class."""
    settings, count = manifest.settings, len(manifest.classes)
    for label, entry in enumerate(manifest.classes):
        for chunk in entry.chunks:
            place = (entry.name, entry.folder, entry.prompt, label, count)
            home = Home(*place, chunk.number, chunk.unit)
            yield ChunkPlan(stem_of(root, home), home, chunk.ids, settings)


def stem_of(root: Path, home: Home) -> Path:
    """Return the path of a chunk's files without suffix."""
    return root / f"{home.folder}/chunk-{home.number:04d}"


def file_of(stem: Path, kind: str) -> Path:
    """Return the path of a chunk's file of a kind."""
    part = "" if kind == "latents" else f".{kind}"
    return stem.with_name(f"{stem.name}{part}.safetensors")


def check_file(path: Path, expected: FileRecord) -> None:
    """Compare a file with its record."""
    with reading(path, WRITTEN, ChunkRecord.CURE) as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected.bytes:
            raise changed(path, f"{size} bytes instead of {expected.bytes}")
        if hashlib.file_digest(file, "sha256").hexdigest() != expected.sha256:
            raise changed(path, "other bytes")


def changed(path: Path, flaw: str) -> Damaged:
    """Build the error for a chunk's file that is not what its record says."""
    return damaged(path, WRITTEN, flaw, ChunkRecord.CURE)


def require_same_making(path: Path, have: BankSettings, want: BankSettings) -> None:
    """Raise `BankMismatch` for the first setting of two banks that their latents depend on."""
    old, new = have.fingerprint, want.fingerprint
    require_same(path, old.backbone, new.backbone)
    require_same(path, old.inversion, new.inversion)
    require_same(path, {"kept": have.keeps}, {"kept": want.keeps})
    # a bank of an older version may grow: only images with transparency or a colour profile differ
    now = {FITTING: preprocessing("white")}
    ways = [now.get(way, way) for way in (old.preprocessing, new.preprocessing)]
    require_same(path, *({"preprocessing": way} for way in ways))


def require_same_guidance(path: Path, have: BankSettings, want: BankSettings) -> None:
    """Raise `BankMismatch` for two banks that are sampled with different guidance."""
    require_same(path, *({"guidance to sample with": one.guidance} for one in (have, want)))


def require_same(path: Path, have: JsonObject, want: JsonObject) -> None:
    """Raise `BankMismatch` for the first field in which two fingerprints differ."""
    for key in {**want, **have}:
        if have.get(key) != want.get(key):
            raise BankMismatch(
                f"expected bank {path} to be made with {key} = {want.get(key)}, got one that is "
                f"made with {have.get(key)}; ask for that, or make another bank with "
                "latent-augment invert"
            )


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a bank.

    Raises:
        UserError: there is none, or it cannot be read, or it is of another schema.
        Damaged: it is not what was written.
    """
    try:
        return read(Manifest, path / "manifest.json")
    except Missing:
        if any(file.suffix.lower() in SUFFIXES for file in path.glob("*/*")):
            raise Missing(
                f"expected a bank at {path}, got a folder of images; make a bank of them with "
                f"latent-augment invert {path} --bank BANK"
            ) from None
        raise Missing(
            f"expected a bank at {path}, got no manifest.json there; check the path, or make a "
            "lost one again with latent-augment verify --repair"
        ) from None


def read_record(part: ChunkPlan) -> ChunkRecord | None:
    """Read the commit record of a planned chunk; None if it is not committed."""
    record = _record_at(part.stem)
    if record is not None and not _is_of(record, part):
        path = part.stem.with_suffix(".json")
        raise damaged(path, ChunkRecord.WHAT, "that of another chunk", ChunkRecord.CURE)
    return record


def _record_at(stem: Path) -> ChunkRecord | None:
    """Read the commit record of some chunk; None if there is none."""
    try:
        return read(ChunkRecord, stem.with_suffix(".json"))
    except Missing:
        return None


def _is_of(record: ChunkRecord, part: ChunkPlan) -> bool:
    """Tell whether a record is of a planned chunk: its place, settings and images.

    Rejected images may be planned elsewhere by now. A record of schema 2 says neither place nor
    settings.
    """
    if record.home is not None and record.settings is not None:
        keys = ("latent_shape", "fingerprint", "keeps")
        if not record.home.same(part.home):
            return False
        if any(record.settings.get(key) != part.settings[key] for key in keys):
            return False
    ids = part.ids
    if rejects := {reject.id for reject in record.rejects}:
        ids = [i for i in ids if i not in rejects]
    return ids == [image.id for image in record.images]


def read_original(root: Path | Source, image_id: str, digest: str) -> bytes:
    """Read the file of a bank's real image, and compare its digest.

    Args:
        root: folder of the images, or their source.
        image_id: path below it.
        digest: the SHA-256 that the bank has recorded.

    Raises:
        ImageRejected: there is none, or another one, or it cannot be read.
    """
    if "\0" in image_id or image_id[:1] == "/" or ".." in image_id.split("/"):
        raise ImageRejected("a path out of the folder")
    try:
        content = (
            root.read(image_id)
            if isinstance(root, Source)
            else read_file(root / image_id, "an image")
        )
    except (Missing, FileNotFoundError):
        raise ImageRejected("no such file") from None
    except (OSError, UserError) as error:
        raise ImageRejected(getattr(error, "strerror", None) or str(error)) from None
    if sha256(content) != digest:
        raise ImageRejected("another image")
    return content


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk of an open bank.

    Ids are packed, one string a chunk, so that a bank of a million images has no object for each:
    garbage collection would visit it, and each worker process copy it.

    Args:
        stem: path of its files without suffix.
        packed: ids of the images that have a latent, row by row; see `pack`.
        files: by kind.
        means: of each channel of its latents; empty if all images were rejected.
        rejects: the images that are still rejected.
    """

    stem: Path
    packed: str
    files: dict[str, FileRecord]
    means: tuple[float, ...]
    rejects: tuple[Reject, ...]

    @classmethod
    def of(cls, stem: Path, record: ChunkRecord, planned: Sequence[str] = ()) -> "Chunk":
        """Return the chunk of a commit record, whose repaired rejects are not ``planned`` here."""
        means = tuple(record.statistics.channel_means or ())
        rejects = tuple(reject for reject in record.rejects if reject.id in planned)
        return cls(stem, _packed_ids(record), record.files, means, rejects)

    def file(self, kind: str) -> Path:
        """Return the path of its file of a kind."""
        return file_of(self.stem, kind)

    @property
    def rows(self) -> Mapping[str, int]:
        """The row of each of its images, in order."""
        return unpack(self.packed)

    @property
    def ids(self) -> list[str]:
        """The images that have a latent, row by row."""
        return list(self.rows)

    @property
    def record(self) -> ChunkRecord:
        """Its commit record, read from disk."""
        record = _record_at(self.stem)
        if record is None or (record.files, _packed_ids(record)) != (self.files, self.packed):
            raise UserError(
                f"expected the commit record at {self.stem.with_suffix('.json')} as it was when "
                "the bank was opened, got another; open the bank again, or see latent-augment "
                "verify"
            )
        return record


class Members(Mapping[str, tuple[str, ...]]):
    """The ids of each class, in label order, unpacked when a class is asked for.

    Args:
        packed: the packed ids of each class, in one part or several.
    """

    def __init__(self, packed: dict[str, tuple[str, ...]]) -> None:
        self.packed = packed

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return tuple(chain.from_iterable(map(unpack, self.packed[name])))

    def __contains__(self, name: object) -> bool:
        return name in self.packed

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed)

    def __len__(self) -> int:
        return len(self.packed)

    def __repr__(self) -> str:
        return f"Members of {len(self)} classes"


def pack(ids: Iterable[str]) -> str:
    """Write ids as one string: JSON in ASCII."""
    return json.dumps(list(ids))


def _packed_ids(record: ChunkRecord) -> str:
    return pack(image.id for image in record.images)


@lru_cache(UNPACKED)
def unpack(packed: str) -> Mapping[str, int]:
    """Return the place of each packed id; an id that is there twice counts once.

    >>> unpack(pack(["ant/0.png", "ant/1.png"]))
    {'ant/0.png': 0, 'ant/1.png': 1}
    """
    return {image_id: row for row, image_id in enumerate(json.loads(packed))}
