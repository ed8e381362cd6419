"""Which chunk and unit an image of a bank goes to.

That is decided before it is inverted, and what is committed never moves: images that were added to
the source become further chunks, and so do those that were left out and have been mended since.
"""

from pathlib import Path
from typing import Any

from augment.errors import UserError
from augment.files import sha256
from augment.records import read_record, stems
from augment.sources import Source

FULL = 2**30
"""Bytes of images up to which a job that goes on compares digests, and not sizes alone."""


def extended(
    path: Path, old: list[dict[str, Any]], source: Source, prompts: dict[str, str], size: int
) -> list[dict[str, Any]]:
    """The classes of a manifest: chunks there are, and units of ``size`` of the images beside.

    Raises:
        UserError: the bank holds an image that the source lacks or has changed, or other prompts.
    """
    chunks_of = {known["name"]: list(stems(path, known)) for known in old}
    records = {stem: intact(stem, c) for chunks in chunks_of.values() for stem, c in chunks}
    done = [record for record in records.values() if record]
    check_kept(path, [image for record in done for image in record["images"]], source)
    settled = {image["id"] for record in done for image in record["images"]}
    ids = {image_id for members in source.ids.values() for image_id in members}
    rejects = [reject for record in done for reject in record["rejects"] if reject["id"] in ids]
    refused = {reject["id"] for reject in rejects if same_file(source, reject)}
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
            if record := records[stem]:  # a rejected image that was mended, or is gone, leaves it
                out = {reject["id"] for reject in record["rejects"]} - refused
                chunk = {**chunk, "ids": [i for i in chunk["ids"] if i not in out]}
            elif not set(chunk["ids"]) <= set(members):
                continue  # it was never made, and now lacks an image
            if chunk["ids"]:
                chunks.append(chunk)
        planned = {i for chunk in chunks for i in chunk["ids"]}
        fresh = [i for i in members if i not in settled and i not in planned]
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


def check_kept(path: Path, kept: list[dict[str, Any]], source: Source) -> None:
    """Refuse a source that lacks or has changed an image that a bank holds.

    Raises:
        UserError: the first such image is named.
    """
    ids = {image_id for members in source.ids.values() for image_id in members}
    read = sum(image["bytes"] for image in kept) <= FULL
    for image in kept:
        name = image["id"]
        if name not in ids or not same_file(source, image, read):
            raise UserError(
                f"expected all images that the bank {path} holds, and perhaps more, got others: "
                f"{name} is {'changed' if name in ids else 'gone'}; use a new folder"
            )
