"""Shards: synthetic images in tar files of the webdataset format, to train on without a backbone.

A folder of shards::

    synthesis.json      the classes, how many shards there are, and how they were synthesised
    shard-000000.tar    of each image 00000123.jpg, 00000123.cls (its label) and 00000123.json
    shard-000000.json   the shard's record, written last: without it the shard does not count
    shard-000001.tar …
    _info.json          how many images are in each tar, for timm's reader; written at the end

The records are those of `augment.shards.format`. They hold the place and the digests of every
sample. So `open_shards` gives any image at once, in an order that no number of workers changes, and
compares what it reads. webdataset, timm and Hugging Face's datasets read the tars without them.

A tar has one form only: USTAR, three regular members a sample, every field that does not matter
zero, two blocks of zeros at the end. The same samples make the same bytes, so a shard is checked by
making it again from what it holds. No tar parser meets a file that may come from others, and
nothing is ever extracted or unpickled: what is read is images of one format, integers and JSON.
"""

import hashlib
import io
import json
import os
import tarfile
import warnings
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from augment.core.errors import AugmentWarning, Damaged, UserError, lookup
from augment.core.files import JsonObject, replacing
from augment.core.schema import write
from augment.plan.plan import Plan
from augment.shards.format import (
    AGAIN,
    CRC,
    FORMATS,
    MAX_BYTES,
    SCHEMA,
    UNCHECKED,
    ShardRecord,
    check_encoding,
    holds_shards,
    read_settings,
    read_table,
    shard_numbers,
    shard_path,
)
from augment.sources import Source, as_source
from augment.sources.decoding import check_scans
from augment.sources.images import to_pil
from augment.sources.kinds import Transforms

BLOCK = 512  # a tar is made of these
EMPTY = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # of a file without name or content
END = bytes(2 * BLOCK)
FLUSH_BYTES = 2**20  # after which the disk may begin to write
MAX_PIXELS = 2**26  # of an image
OPEN_FILES = 64  # of one `Shards` in one process


class Flaw(Exception):
    """What is wrong with a shard, in a few words."""


@contextmanager
def expecting(what: str) -> Iterator[None]:
    """Turn a flaw into `Damaged`, and a file that cannot be read into a plain `UserError`."""
    try:
        yield
    except Flaw as flaw:
        raise Damaged(f"expected {what}, got {flaw}; {AGAIN}") from flaw
    except OSError as error:
        raise UserError(
            f"expected to read {what}, got {error.strerror or error}; make that possible: nothing "
            "is known to be wrong with the file"
        ) from None


class Sample(NamedTuple):
    """What is stored of one image: its number, its file, its label, and how it was made."""

    key: int
    image: bytes
    label: int
    about: JsonObject


def encode(image: Float[Tensor, "c h w"], extension: str = "jpg", quality: int = 95) -> bytes:
    """Encode an image in [0, 1], grey or RGB. WebP knows no grey: it comes back as RGB.

    JPEG keeps the colour of every pixel (4:4:4). PIL's default makes four share theirs, one more
    trace that gives synthetic images away.

    Args:
        image: (1 | 3, H, W).
        extension: a key of `FORMATS`.
        quality: of JPEG and WebP, from 1 to 100; PNG is exact.

    Raises:
        UserError: no such extension or quality.
    """
    check_encoding(extension, quality)
    more = {"jpg": {"quality": quality, "subsampling": 0}, "webp": {"quality": quality}, "png": {}}
    buffer = io.BytesIO()
    to_pil(image).save(buffer, FORMATS[extension], **more[extension])
    return buffer.getvalue()


def decode(content: bytes, extension: str) -> Float[Tensor, "c h w"]:
    """Decode an image file of one format to [0, 1], grey as (1, H, W), else (3, H, W).

    PIL reads the header; the pixels of a JPEG come from torchvision, the same and twice as fast.

    Raises:
        Flaw: it is none, or has more than `MAX_PIXELS`.
    """
    try:
        with Image.open(io.BytesIO(content), formats=[FORMATS[extension]]) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{file.width} × {file.height} pixels")
            if file.info.get("progressive"):
                check_scans(content, file.width * file.height)
            if file.format == "JPEG" and file.mode in ("L", "RGB"):
                from torchvision.io import decode_jpeg  # here: it takes a second to import

                encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
                pixels: Any = decode_jpeg(encoded)
            else:
                mode = "L" if file.mode in ("1", "L") else "RGB"
                image = np.asarray(file if file.mode == mode else file.convert(mode))
                planes = np.atleast_3d(image).transpose(2, 0, 1)
                pixels = torch.from_numpy(np.array(planes, order="C"))
    except Exception as error:  # of any type: decoders stumble over hostile bytes as they like
        raise Flaw(f"no readable {extension} image ({error})") from None
    return pixels.float().div_(255)


def header(name: str, size: int) -> bytes:
    """Return the block before a member: USTAR, a regular file, mode 0644, no owner, no time."""
    block = bytearray(EMPTY)
    block[: len(name)], block[124:135] = name.encode(), b"%011o" % size
    block[148:154] = b"%06o" % (sum(block) - sum(block[148:156]) + 8 * ord(" "))
    return bytes(block)


def declared(block: bytes, name: str) -> int:
    """Return the size in a header; raise `Flaw` if it is not what `header` writes."""
    with suppress(ValueError):
        size = int(block[124:135], 8)
        if 0 <= size <= MAX_BYTES and block == header(name, size):
            return size
    raise Flaw(f"something else where {name} belongs")


def packed(key: int, contents: dict[str, bytes]) -> bytes:
    """Return the bytes of a sample's members, by their suffixes, in a tar."""
    parts = []
    for suffix, content in contents.items():
        name = f"{key:08d}.{suffix}"
        parts += [header(name, len(content)), content, bytes(-len(content) % BLOCK)]
    return b"".join(parts)


def start_writing(file: int, offset: int, size: int) -> None:
    """Let the disk begin to write what will be synchronised, where the system takes the hint."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, size, os.POSIX_FADV_DONTNEED)


def write_shard(path: Path, samples: Iterable[Sample], extension: str, **more: Any) -> ShardRecord:
    """Write a shard as its samples come, then its record; if they raise, nothing is left.

    Args:
        path: of the tar, by `shard_path`.
        samples: with keys that increase.
        extension: of their images, a key of `FORMATS`.
        more: other fields of the record.

    Returns:
        The record.

    Raises:
        UserError: the disk is full or the like, no such extension, or an image is too large.
    """
    lookup(FORMATS, extension, "image format")
    record, digest, rows, checks = path.with_suffix(".json"), hashlib.sha256(), [], ""
    end = flushed = 0
    with replacing(path) as file:
        for key, image, label, about in samples:
            assert not rows or key > rows[-1][0], "keys have to increase"
            if len(image) > MAX_BYTES:
                raise UserError(
                    f"expected images of at most {MAX_BYTES} bytes, got {len(image)}; choose "
                    "another format, or a lower resolution"
                )
            rows.append([key, label, end + BLOCK, len(image)])
            text = json.dumps(about).encode()  # in ASCII, which can write any file name
            checks += f"{zlib.crc32(image, label):08x}{zlib.crc32(text, key):08x}"
            content = packed(key, {extension: image, "cls": b"%d" % label, "json": text})
            file.write(content)
            digest.update(content)
            end += len(content)
            if end - flushed > FLUSH_BYTES:
                file.flush()
                start_writing(file.fileno(), flushed, end - flushed)
                flushed = end
        file.write(END)
        digest.update(END)
        record.unlink(missing_ok=True)  # of the shard whose place this one takes
    facts = ShardRecord(SCHEMA, path.stem, end + len(END), digest.hexdigest(), rows, checks, **more)
    write(record, facts, indent=None)
    return facts


class Reader(io.FileIO):
    """A file that is closed with its last reference: no thread reads one that another closed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))

    def __del__(self) -> None:
        self.close()


class Shards(Transforms, Dataset[tuple[Any, Any]]):
    """The images of a folder of shards, in the order of shards and keys; see `open_shards`.

    It may be pickled, forked, and shared by threads. It keeps the place of each image (40 bytes)
    and a few open files, nothing else; so a run is resumed by going on at an index.
    """

    def __init__(
        self,
        paths: list[Path],
        tables: Iterable[np.ndarray],
        classes: list[str],
        extension: str,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
        as_: str = "float",
    ) -> None:
        self._set(as_, transform, target_transform)
        self.paths, self.classes, self.extension = paths, classes, extension
        self.class_to_idx = {name: label for label, name in enumerate(classes)}
        rows, self.starts = bytearray(), [0]
        for part in tables:  # one at a time: ten million rows are not there twice
            rows += part.tobytes()
            self.starts.append(self.starts[-1] + len(part))
        self.rows = np.frombuffer(rows, np.int64).reshape(-1, 5)
        self._open = lru_cache(OPEN_FILES)(Reader)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_open": lru_cache(OPEN_FILES)(Reader)}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> list[int]:
        """The label of every image."""
        labels = np.arange(len(self.classes)).astype(object)
        return labels[self.rows[:, 1]].tolist()  # one integer object a class

    def __repr__(self) -> str:
        many = f"{len(self)} images of {len(self.classes)} classes"
        return f"Shards({many}, {len(self.paths)} shards, as_={self.as_!r})"

    def __getitem__(self, index: Any) -> Any:
        """Return an item, (image, label); or, for a slice, a dataset of its items."""
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        return self.item((index, self.read(index)))

    def item(self, source: tuple[int, bytes]) -> tuple[Any, Any]:
        """Return (image, label), transformed, of (index, what `read` gave for it)."""
        path, (key, label, *_) = self._place(source[0])
        with expecting(f"image {key} in {path}"):
            image = decode(source[1], self.extension)
        return self._give(image, label)

    def read(self, index: int) -> bytes:
        """Return the file of an image, as it was encoded.

        Raises:
            IndexError: the index is out of range.
            UserError: the shard is damaged, or was changed since it was opened.
        """
        path, (key, label, offset, size, check) = self._place(index)
        with expecting(f"image {key} in {path}"):
            content = self._bytes(path, offset, size)
            if check != UNCHECKED and zlib.crc32(content, label) != check >> 32 & CRC:
                raise Flaw("other bytes, or another label, than were written")
            return content

    def about(self, index: int) -> JsonObject:
        """Return how an image was made: the JSON of its sample.

        Raises:
            IndexError: the index is out of range.
            UserError: there is something else in its place.
        """
        text = self.text(index)
        with suppress(ValueError, RecursionError):
            if isinstance(about := json.loads(text), dict):
                return about
        with expecting(f"a JSON object about image {index}"):
            raise Flaw(f"{text[:60]!r}")

    def text(self, index: int) -> bytes:
        """Return that JSON as bytes."""
        path, (key, _, offset, size, check) = self._place(index)
        start = offset + size + -size % BLOCK + 2 * BLOCK  # behind the image and the label
        with expecting(f"the JSON of image {key} in {path}"):
            length = declared(self._bytes(path, start, BLOCK), f"{key:08d}.json")
            content = self._bytes(path, start + BLOCK, length)
            if check != UNCHECKED and zlib.crc32(content, key) != check & CRC:
                raise Flaw("other bytes, or another key, than were written")
            return content

    def plan(self, index: int) -> Plan:
        """Return the plan of an image; `Synthesizer.images` makes it again.

        Raises:
            IndexError: the index is out of range.
            UserError: there is none in its place.
        """
        return Plan.from_json(json.dumps(self.about(index).get("plan")))

    def stream(self, numbers: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """Yield index and file of every image of some shards, each read from front to back."""
        for number in numbers:
            for index in range(*self.starts[number : number + 2]):
                yield index, self.read(index)

    def metadata(self, index: int) -> JsonObject:
        """Return a file name for an image, in a folder of its class, its label, plan and prompt."""
        _, (key, label, *_) = self._place(index)
        name = f"{self.classes[label]}/{key:08d}.{self.extension}"
        facts = {"file_name": name, "label": label, "class_name": self.classes[label]}
        about = self.about(index)
        facts |= {key: about[key] for key in ("prompt", "guidance") if key in about}
        plan = about.get("plan")
        return {**facts, **(plan if isinstance(plan, dict) else {}), **facts}

    def _place(self, index: int) -> tuple[Path, list[int]]:
        """Return the tar of an image, and its row in the table."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        row = index % len(self)
        return self.paths[bisect_right(self.starts, row) - 1], self.rows[row].tolist()

    def _bytes(self, path: Path, offset: int, size: int) -> bytes:
        """Read a part of a tar, without the file position that forks and threads share."""
        try:
            file = self._open(path)  # a name of its own keeps it open until it is read
            content = os.pread(file.fileno(), size, offset)
        except FileNotFoundError as error:
            raise Flaw(error.strerror) from None
        if len(content) < size:
            raise Flaw("an early end of the file")
        return content


def open_shards(
    folder: str | Path,
    transform: Callable[[Any], Any] | None = None,
    target_transform: Callable[[int], Any] | None = None,
    complete: bool = True,
    as_: str = "float",
) -> Shards:
    """Open a folder of shards as a map-style dataset of (image, label).

    Args:
        folder: what ``latent-augment synthesize`` wrote to.
        transform: applied to the image.
        target_transform: applied to the label.
        complete: refuse a folder that is not finished; else open the shards that are.
        as_: kind of image: ``float``, a float32 tensor (1 | 3, H, W) in [0, 1]; ``uint8``, a
            tensor; or ``pil``, PIL's RGB.

    Raises:
        UserError: it is none, or not complete, or a shard is not as its record says.
        Damaged: a record is not what was written, or a shard is not as its record says.

    Every image is compared with its digest when it is read; shards of older versions have none,
    which a warning says.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    paths = [shard_path(folder, n) for n in shard_numbers(folder) if n < settings.shards]
    if complete and len(paths) < settings.shards:
        raise UserError(
            f"expected {settings.shards} shards in {folder}, got {len(paths)}, "
            f"{settings.shards - len(paths)} are missing; run the same latent-augment "
            "synthesize command again to finish it, or open it with complete=False"
        )
    classes = settings.classes
    tables = (read_table(path, len(classes))[1] for path in paths)
    form = settings.extension, transform, target_transform, as_
    shards = Shards(paths, tables, classes, *form)
    if (shards.rows[:, 4] == UNCHECKED).any():
        warnings.warn(
            f"expected the digest of every image in {folder}, got shards that an older version "
            "wrote without; they are read unchecked, so run latent-augment verify on them",
            AugmentWarning,
            stacklevel=2,
        )
    return shards


def open_images(images: object) -> Source | Shards:
    """Open the shards of a folder; any other images as `augment.sources.as_source` does.

    Raises:
        UserError: there are none.
    """
    if isinstance(images, str | Path) and holds_shards(images):
        return open_shards(images)
    return as_source(images)


def verify_shard(path: Path, classes: int, extension: str) -> str | None:
    """Decode all that is in a shard, make the shard of that again, and compare.

    Args:
        path: of the tar.
        classes: how many there are.
        extension: of the images.

    Returns:
        The first thing that is wrong, in a few words; None if all is well.

    Raises:
        UserError: a file cannot be read now.
    """
    digest, end = hashlib.sha256(), len(END)
    try:
        record, rows = read_table(path, classes)
        shard = Shards([path], [rows], [""] * classes, extension)
        for index, (key, label, *_) in enumerate(record.samples):
            image, text = shard.read(index), shard.text(index)
            shard.item((index, image))
            shard.about(index)
            content = packed(key, {extension: image, "cls": b"%d" % label, "json": text})
            digest.update(content)
            end += len(content)
        digest.update(END)
        if end != record.bytes or digest.hexdigest() != record.sha256:
            return "its record is not of its samples"
        with expecting(str(path)), Reader(path) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                return "other bytes than were written"
    except Damaged as error:
        return str(error.__cause__ or error)
    return None
