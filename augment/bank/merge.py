"""Merge banks of the same settings, and split a bank by classes.

Both may be interrupted and resumed; neither needs a backbone.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from augment.bank.bank import LatentBank, filled
from augment.bank.chunking import intact, size_of
from augment.bank.format import (
    Chunk,
    ChunkEntry,
    ChunkPlan,
    ChunkRecord,
    ClassEntry,
    Manifest,
    check_file,
    file_of,
    parts_of,
    read_manifest,
    require_same_guidance,
    require_same_making,
)
from augment.core.errors import Missing, UserError
from augment.core.files import check_folder, in_use, locked, write_bytes
from augment.core.progress import Progress
from augment.core.schema import write


def merge(banks: Sequence[str | Path], out: str | Path) -> LatentBank:
    """Merge banks of the same settings into a new one, or resume that; classes go by their names.

    Raises:
        BankMismatch: their settings differ.
        UserError: an image or a prompt differs, a bank is incomplete or damaged, or ``out`` is in
            use.
    """
    return _assemble([(LatentBank.open(bank), None) for bank in banks], Path(out))


def split(bank: str | Path, classes: Sequence[str], out: str | Path) -> LatentBank:
    """Copy some classes of a bank, in the order given, to a new one, or resume that.

    Raises:
        UserError: no such class, the bank is incomplete or damaged, or ``out`` is in use.
    """
    return _assemble([(LatentBank.open(bank), list(classes))], Path(out))


def _assemble(banks: list[tuple[LatentBank, list[str] | None]], out: Path) -> LatentBank:
    """Copy classes of banks to a new one: its manifest, then chunk by chunk what is not there."""
    check_folder(out)
    if not banks or any(wanted == [] for _, wanted in banks):
        raise UserError("expected at least one bank and one class, got none; name them")
    first = banks[0][0].manifest
    classes: dict[str, ClassEntry] = {}
    homes: dict[str, Path] = {}
    origins: dict[tuple[str, int], Chunk] = {}
    for bank, wanted in banks:
        require_same_making(bank.path, bank.manifest, first)
        require_same_guidance(bank.path, bank.manifest, first)
        for name in dict.fromkeys(list(bank.classes) if wanted is None else wanted):
            prompt = bank.prompt(name)
            entry = classes.setdefault(name, ClassEntry(name, f"{len(classes):04d}", prompt, []))
            if entry.prompt != prompt:
                raise UserError(
                    f"expected one prompt for class {name!r}, got {entry.prompt!r} and "
                    f"{prompt!r}; invert one of the banks again"
                )
            for chunk in filled(bank.chunks[name]):
                twice = next((i for i in chunk.ids if i in homes), None)
                if twice is not None:
                    raise UserError(
                        f"expected different images in {homes[twice]} and {bank.path}, got "
                        f"{twice} in both; invert one of them without it"
                    )
                homes |= dict.fromkeys(chunk.ids, bank.path)
                number = len(entry.chunks)
                entry.chunks.append(ChunkEntry(number, len(origins), chunk.ids))
                origins[name, number] = chunk
    manifest = replace(first, schema=Manifest.SCHEMA, classes=list(classes.values()))
    with locked(out) as lock:
        _claim(out, manifest)
        lock.sweep()
        for part in Progress(
            list(parts_of(out, manifest)), "copy", unit="chunk", delay=2, leave=False
        ):
            _copy(origins[part.home.name, part.home.number], part)
        lock.sweep()
    return LatentBank.open(out)


def _claim(out: Path, manifest: Manifest) -> None:
    """Write the manifest of a bank into a new folder, unless it is there."""
    try:
        same = read_manifest(out) == manifest
    except Missing:
        same = not in_use(out)
        if same:
            write(out / "manifest.json", manifest)
    if not same:
        raise UserError(
            f"expected {out} to be new or empty, or the same bank, got a folder in use; use a new "
            "one"
        )


def _copy(chunk: Chunk, part: ChunkPlan) -> None:
    """Copy a chunk, unless it is there, and its record last, without the rejected images."""
    there = intact(part)
    if there is not None and there.files == chunk.files and size_of(part.stem, there.files):
        return
    record = chunk.record
    for kind, expected in record.files.items():
        check_file(chunk.file(kind), expected)
        write_bytes(file_of(part.stem, kind), chunk.file(kind).read_bytes())
    facts = {"home": part.home, "settings": part.settings, "schema": ChunkRecord.SCHEMA}
    write(part.stem.with_suffix(".json"), replace(record, rejects=[], **facts))
