"""Verify a bank against its records, repair its manifest, describe what it holds.

Nothing here needs a backbone. Damage is found by the digests in every commit record. A damaged
chunk is discarded by removing its record; the command that made it then makes it again.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from augment.bank.format import (
    KINDS,
    BankSettings,
    ChunkEntry,
    ChunkRecord,
    ClassEntry,
    Home,
    Manifest,
    check_file,
    file_of,
    parts_of,
    read_manifest,
    read_original,
    read_record,
    require_same_making,
    stem_of,
)
from augment.core.errors import AugmentWarning, Damaged, ImageRejected, Missing, UserError
from augment.core.progress import Progress
from augment.core.schema import as_object, build, read, write
from augment.measure.health import norm_finding, reconstruction_finding
from augment.measure.reconstruction import psnr
from augment.sources import Source


class Finding(NamedTuple):
    """A fault of a bank or of shards.

    Args:
        what: the fault, in one line.
        record: the commit record to remove so that the work is redone; None if that is no remedy.
    """

    what: str
    record: Path | None = None


def discard(findings: Sequence[Finding]) -> None:
    """Remove the records of what is damaged, so that it is made again."""
    for record in {finding.record for finding in findings if finding.record is not None}:
        try:
            record.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"expected to remove {record}, got {error.strerror}; make that possible, and run "
                "the same command again"
            ) from None


def bank_findings(path: Path, images: Path | Source | None) -> Iterator[Finding]:
    """Compare a bank with its records, and with its images if they are given."""
    expected = {path / "manifest.json", path / "rejects.jsonl"}
    parts, old = list(parts_of(path, read_manifest(path))), 0
    for part in Progress(parts, "verify", unit="chunk", delay=2, leave=False):
        record_path = part.stem.with_suffix(".json")
        expected |= {record_path, part.stem.parent}
        try:
            record = read_record(part)
        except UserError as error:
            yield Finding(str(error), record_path if isinstance(error, Damaged) else None)
            expected |= {file_of(part.stem, kind) for kind in KINDS}
            continue
        if record is None:
            yield Finding(f"{part.stem.relative_to(path)}: not made yet")
            continue
        old += record.home is None  # of schema 2
        for kind, recorded in record.files.items():
            file = file_of(part.stem, kind)
            expected.add(file)
            try:
                check_file(file, recorded)
            except (Damaged, Missing) as error:
                yield Finding(str(error), record_path)
            except UserError as error:
                yield Finding(str(error))
        yield from _image_findings(images, record)
    for file in sorted(path.rglob("*")):
        if file not in expected:
            yield Finding(f"{file.relative_to(path)}: not of this bank")
    if old:
        warnings.warn(
            f"expected records with a digest of their own in {path}, got {old} of an older version "
            "without; what they say cannot be compared: merge the bank into a new one to have them",
            AugmentWarning,
            stacklevel=3,
        )


def _image_findings(images: Path | Source | None, record: ChunkRecord) -> Iterator[Finding]:
    """Compare the images of a chunk with its record."""
    if images is None:
        return
    for image in record.images:
        try:
            read_original(images, image.id, image.sha256)
        except ImageRejected as error:
            yield Finding(f"image {image.id}: {error}")


def repair_bank(path: Path) -> str:
    """Make a lost or damaged manifest from the records of the chunks.

    Returns:
        A line that says what was done.

    Raises:
        UserError: it cannot be read now, or the records do not say enough, or are of several banks.
    """
    try:
        read_manifest(path)
        return f"{path}: its manifest is as it was written"
    except (Missing, Damaged) as error:
        flaw = error
    records = list(_records_at_home(path))
    if not records:
        raise UserError(
            f"expected records of schema {ChunkRecord.SCHEMA} in {path} to make its manifest of, "
            "got none; those of older versions do not say what class they are of: copy the "
            "manifest from elsewhere, or make the bank again in a new folder"
        ) from flaw
    settings = [_settings_of(record) for _, record in records]
    newest = max(range(len(records)), key=lambda k: records[k][0].unit)
    for other in settings:
        require_same_making(path, other, settings[newest])
    facts = vars(settings[newest])
    manifest = Manifest(**facts, schema=Manifest.SCHEMA, classes=_classes_of(path, records))
    write(path / "manifest.json", manifest)
    return (
        f"{path}: the manifest is made again from {len(records)} records of "
        f"{len(manifest.classes)} classes; the command that made the bank makes what is missing"
    )


def _records_at_home(path: Path) -> Iterator[tuple[Home, ChunkRecord]]:
    """Yield the records of a folder that lie where they say that they belong."""
    for file in sorted(path.glob("[0-9]*/chunk-*.json")):
        with suppress(Damaged, Missing):
            record = read(ChunkRecord, file)
            if record.home and stem_of(path, record.home) == file.with_suffix(""):
                yield record.home, record


def _settings_of(record: ChunkRecord) -> BankSettings:
    """Return how the latents of a chunk are made."""
    try:
        return build(BankSettings, record.settings)
    except ValueError as flaw:
        raise UserError(
            f"expected the settings of a bank in its records, got {flaw}; make the bank again"
        ) from None


def _classes_of(path: Path, records: list[tuple[Home, ChunkRecord]]) -> list[ClassEntry]:
    """Return the classes of the manifest that records were made by.

    Labels change when classes are added, so records of older manifests are sorted first, and newer
    ones inserted among them.
    """
    there = {image.id for _, record in records for image in record.images}
    by_name: dict[str, ClassEntry] = {}
    classes: list[ClassEntry] = []
    for home, record in sorted(records, key=lambda r: (r[0].classes, r[0].label, r[0].number)):
        ids = [image.id for image in record.images]
        for reject in record.rejects:  # in the order of their places
            ids.insert(len(ids) if reject.place is None else reject.place, reject.id)
        later = {reject.id for reject in record.rejects} & there  # these were repaired since
        ids = [image_id for image_id in ids if image_id not in later]
        if home.name not in by_name:
            by_name[home.name] = ClassEntry(home.name, home.folder, home.prompt, [])
            classes.insert(home.label, by_name[home.name])
        entry = by_name[home.name]
        if (entry.folder, entry.prompt) != (home.folder, home.prompt):
            raise UserError(
                f"expected records of one bank in {path}, got two folders or prompts for class "
                f"{home.name!r}; remove the records that do not belong to it"
            )
        if ids:
            entry.chunks.append(ChunkEntry(home.number, home.unit, ids))
    for entry in classes:
        entry.chunks.sort(key=lambda chunk: chunk.number)
    return classes


def inspect_bank(path: Path) -> str:
    """Describe what a bank holds, finished or not."""
    manifest = read_manifest(path)
    made = {entry.name: 0 for entry in manifest.classes}
    planned, size, rejects = 0, 0, 0
    means: dict[str, list[float]] = {"norm": [], "error": []}
    for part in parts_of(path, manifest):
        planned += len(part.ids)
        record = read_record(part)
        if record is None:
            continue
        count = len(record.images)
        made[part.home.name] += count
        rejects += len({r.id for r in record.rejects}.intersection(part.ids))
        size += sum(file.bytes for file in record.files.values())
        for key, values in means.items():
            value = getattr(record.statistics, key)
            values += [] if value is None else [value] * count
    fewest, most = min(made, key=made.__getitem__), max(made, key=made.__getitem__)
    lines = [
        f"bank {path}: {sum(made.values())} of {planned} latents of {len(made)} classes, "
        f"{made[fewest]} ({fewest}) to {made[most]} ({most}) each; {rejects} images left out; "
        f"{size:,} bytes"
    ]
    prints = as_object(manifest.fingerprint) | {"made with": manifest.made_with}
    for name, facts in prints.items():
        text = facts if isinstance(facts, str) else ", ".join(f"{k} {v}" for k, v in facts.items())
        lines.append(f"{name}: {text}")
    lines.append(f"images: {manifest.source}")
    method = manifest.fingerprint.inversion
    how = "{method} in {steps} steps".format(**method)
    if (norms := means["norm"]) and method["method"] != "noise" and "level" not in method:
        dim = math.prod(manifest.latent_shape)
        lines.append(str(norm_finding(fmean(norms), len(norms), dim, how)))
    if errors := means["error"]:
        lines.append(str(reconstruction_finding(psnr(fmean(errors)), how)))
    return "\n".join(lines)
