"""Assign the images of a source to chunks and units of a bank, before they are inverted.

What is committed never moves: images that were added to the source become further chunks, and so do
rejected ones that were repaired.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from augment.bank.format import (
    ChunkEntry,
    ChunkPlan,
    ChunkRecord,
    ClassEntry,
    Committed,
    FileRecord,
    ImageRecord,
    Manifest,
    Reject,
    file_of,
    parts_of,
    read_record,
)
from augment.core.errors import Damaged, UserError
from augment.core.files import sha256, unreadable
from augment.sources import Source
from augment.sources.prompts import nfc

MAX_DIGESTED = 2**30
"""Maximum bytes of images of which a resumed job compares digests, and not sizes alone."""


def assign_chunks(
    path: Path,
    old: Manifest | None,
    source: Source,
    prompts: dict[str, str],
    size: int,
    side: int = 0,
    captions: Mapping[str, str] | None = None,
) -> tuple[list[ClassEntry], dict[Path, Committed]]:
    """Assign the images of a source to chunks and units; what is committed stays where it is.

    Each commit record is read once, and one at a time is in memory.

    Args:
        path: folder of the bank.
        old: its manifest; None for a new bank.
        source: the images.
        prompts: of classes that have one.
        size: images of a unit.
        side: resolution of the backbone in pixels; see `Committed`.
        captions: of the images, by id; the bank's have to be the same.

    Returns:
        The classes of the new manifest, and what is committed, by the stem of its files.

    Raises:
        UserError: the bank holds an image that the source lacks or has changed, or other prompts.
    """
    old_classes = old.classes if old else []
    parts = list(parts_of(path, old)) if old else []
    stems = {(part.home.name, part.home.number): part.stem for part in parts}
    ids = {image_id for members in source.ids.values() for image_id in members}
    committed: dict[Path, Committed] = {}
    inverted: set[str] = set()

    def stored_images() -> Iterator[ImageRecord]:
        for part in parts:
            record = intact(part)
            if record is not None:
                chunk = committed[part.stem] = Committed.of(record, side)
                rejected = {reject.id for reject in chunk.rejects}
                inverted.update(i for i in part.ids if i not in rejected)
                for image in record.images if captions else ():
                    _check_caption(path, image, captions or {})
                yield from record.images

    _check_source(path, stored_images(), source, ids)
    rejects = [reject for chunk in committed.values() for reject in chunk.rejects]
    refused = {r.id for r in rejects if r.id in ids and _same_file(source, r)}
    classes, by_name = [], {nfc(entry.name): entry for entry in old_classes}
    free = 1 + max((int(entry.folder) for entry in old_classes), default=-1)
    unit = 1 + max((chunk.unit for entry in old_classes for chunk in entry.chunks), default=-1)
    room = size
    for name, members in source.ids.items():
        prompt = prompts.get(name, "")
        entry = by_name.get(nfc(name))
        if entry is None:
            entry, free = ClassEntry(name, f"{free:04d}", prompt, []), free + 1
        if entry.prompt != prompt:
            raise UserError(
                f"expected the prompts of the bank {path}, {entry.prompt!r} for class {name!r}, "
                f"got {prompt!r}; use that, or a new folder"
            )
        chunks = []
        for chunk in entry.chunks:
            left = chunk.ids
            stem = stems[entry.name, chunk.number]
            if stem in committed:  # a rejected image that was repaired, or is gone, leaves it
                out = {reject.id for reject in committed[stem].rejects} - refused
                left = [i for i in left if i not in out]
            elif not set(left) <= set(members):
                continue  # it was never made, and now lacks an image
            if left:
                chunks.append(replace(chunk, ids=left))
        planned = {i for chunk in chunks for i in chunk.ids}
        fresh = [i for i in members if i not in inverted and i not in planned]
        number = 1 + max((chunk.number for chunk in entry.chunks), default=-1)
        while fresh:
            chunks.append(ChunkEntry(number, unit, fresh[:room]))
            number, fresh, room = number + 1, fresh[room:], room - len(fresh[:room])
            unit, room = (unit, room) if room else (unit + 1, size)
        classes.append(replace(entry, chunks=chunks))
    return classes, committed


def _check_caption(path: Path, image: ImageRecord, captions: Mapping[str, str]) -> None:
    """Refuse another caption than an image was inverted with."""
    if image.id in captions and image.caption != captions[image.id]:
        raise UserError(
            f"expected the captions that the bank {path} was inverted with, {image.caption!r} of "
            f"{image.id}, got {captions[image.id]!r}; use that, or a new folder"
        )


def intact(part: ChunkPlan) -> ChunkRecord | None:
    """Read the record of a chunk; None if it is not committed, or its record is damaged."""
    try:
        return read_record(part)
    except Damaged:
        return None


def size_of(stem: Path, files: dict[str, FileRecord]) -> int:
    """Return the bytes of a chunk's files, its record among them; 0 if it is not whole."""
    try:
        if any(file_of(stem, kind).stat().st_size != file.bytes for kind, file in files.items()):
            return 0
        record = stem.with_suffix(".json").stat()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise unreadable(stem, "the files of a chunk", error) from None
    return sum(file.bytes for file in files.values()) + record.st_size


def _same_file(source: Source, record: ImageRecord | Reject, read: bool = True) -> bool:
    """Tell whether an image's file has the size of a record, and the digest if it is ``read``."""
    if source.size(record.id) != record.bytes:
        return False
    try:
        return not read or sha256(source.read(record.id)) == record.sha256
    except OSError:
        return not record.sha256  # as it was then


def _check_source(path: Path, stored: Iterator[ImageRecord], source: Source, ids: set[str]) -> None:
    """Refuse a source that lacks or has changed an image of a bank.

    Args:
        path: folder of the bank.
        stored: records of its images, which are read once.
        source: the images as they are.
        ids: of the source.
    """
    few, total = [], 0
    for image in stored:
        few.append(image)
        total += image.bytes
        if total > MAX_DIGESTED:
            break
    for image in chain(few, stored):
        name = image.id
        if name not in ids or not _same_file(source, image, total <= MAX_DIGESTED):
            try:
                source.read(name) if name in ids else None
            except OSError as error:  # its content is unknown
                raise unreadable(source.root / name, "an image", error) from None
            raise UserError(
                f"expected all images that the bank {path} holds, and perhaps more, got others: "
                f"{name} is {'changed' if name in ids else 'gone'}; use a new folder"
            )
