"""Which chunk and unit an image of a bank goes to.

That is decided before it is inverted, and what is committed never moves: images that were added to
the source become further chunks, and so do those that were left out and have been mended since.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from augment.errors import UserError
from augment.files import sha256
from augment.records import read_record, stems
from augment.sources import Source

FULL = 2**30
"""Bytes of images up to which a job that goes on compares digests, and not sizes alone."""


@dataclass
class Settled:
    """What the commit records of a bank say, gathered while their images are gone through.

    So one record is in memory at a time, however large the bank is.

    Attributes:
        ids: the images that have a latent.
        rejects: those that were left out, by chunk; a chunk that is not here is not committed.
    """

    ids: set[str] = field(default_factory=set)
    rejects: dict[Path, list[dict[str, Any]]] = field(default_factory=dict)

    def images(self, chunks: Iterable[tuple[Path, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        """What is recorded of each image that has a latent."""
        for stem, plan in chunks:
            record = intact(stem, plan)
            if record is not None:
                self.rejects[stem] = record["rejects"]
                out = {reject["id"] for reject in record["rejects"]}
                self.ids.update(i for i in plan["ids"] if i not in out)
                yield from record["images"]


def extended(
    path: Path, old: list[dict[str, Any]], source: Source, prompts: dict[str, str], size: int
) -> list[dict[str, Any]]:
    """The classes of a manifest: chunks there are, and units of ``size`` of the images beside.

    Raises:
        UserError: the bank holds an image that the source lacks or has changed, or other prompts.
    """
    chunks_of = {known["name"]: list(stems(path, known)) for known in old}
    ids = {image_id for members in source.ids.values() for image_id in members}
    settled = Settled()
    check_kept(path, settled.images(chain.from_iterable(chunks_of.values())), source, ids)
    rejects = chain.from_iterable(settled.rejects.values())
    refused = {r["id"] for r in rejects if r["id"] in ids and same_file(source, r)}
    classes, by_name = [], {known["name"]: known for known in old}
    free = 1 + max((int(known["folder"]) for known in old), default=-1)
    unit = 1 + max((chunk["unit"] for known in old for chunk in known["chunks"]), default=-1)
    room = size
    for name, members in source.ids.items():
        prompt = prompts.get(name, "")
        known = by_name.get(name)
        if known is None:
            known, free = {"folder": f"{free:04d}", "prompt": prompt, "chunks": []}, free + 1
        if known["prompt"] != prompt:
            raise UserError(
                f"expected the prompts of the bank {path}, {known['prompt']!r} for class {name!r}, "
                f"got {prompt!r}; use that, or a new folder"
            )
        chunks = []
        for stem, chunk in chunks_of.get(name, []):
            if stem in settled.rejects:  # a rejected image that was mended, or is gone, leaves it
                out = {reject["id"] for reject in settled.rejects[stem]} - refused
                chunk = {**chunk, "ids": [i for i in chunk["ids"] if i not in out]}
            elif not set(chunk["ids"]) <= set(members):
                continue  # it was never made, and now lacks an image
            if chunk["ids"]:
                chunks.append(chunk)
        planned = {i for chunk in chunks for i in chunk["ids"]}
        fresh = [i for i in members if i not in settled.ids and i not in planned]
        number = 1 + max((chunk["number"] for chunk in known["chunks"]), default=-1)
        while fresh:
            chunks.append({"number": number, "unit": unit, "ids": fresh[:room]})
            number, fresh, room = number + 1, fresh[room:], room - len(fresh[:room])
            unit, room = (unit, room) if room else (unit + 1, size)
        classes.append({"name": name, **known, "chunks": chunks})
    return classes


def intact(stem: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a chunk; None if it is not committed, or its record is damaged."""
    try:
        return read_record(stem, plan)
    except UserError:
        return None


def still(record: dict[str, Any], plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The rejects of a chunk that were not mended since."""
    return [reject for reject in record["rejects"] if reject["id"] in plan["ids"]]


def same_file(source: Source, known: dict[str, Any], read: bool = True) -> bool:
    """Whether an image's file is what a record says of it; by its size alone, or its digest too."""
    if source.size(known["id"]) != known["bytes"]:
        return False
    try:
        return not read or sha256(source.read(known["id"])) == known["sha256"]
    except OSError:
        return not known["sha256"]  # as it was then


def check_kept(path: Path, kept: Iterator[dict[str, Any]], source: Source, ids: set[str]) -> None:
    """Refuse a source that lacks or has changed an image that a bank holds.

    Args:
        path: of the bank.
        kept: what it says of its images, gone through once.
        source: the images as they are.
        ids: of the source.

    Raises:
        UserError: the first such image is named.
    """
    few, total = [], 0
    for image in kept:
        few.append(image)
        total += image["bytes"]
        if total > FULL:
            break
    for image in chain(few, kept):
        name = image["id"]
        if name not in ids or not same_file(source, image, total <= FULL):
            raise UserError(
                f"expected all images that the bank {path} holds, and perhaps more, got others: "
                f"{name} is {'changed' if name in ids else 'gone'}; use a new folder"
            )
