"""Looking after banks and shards: what is in them, is it whole, and taking banks apart or together.

Nothing here needs a backbone. Damage is found by the digests that every commit record holds, and
what is damaged is taken out by removing its record: then the command that made it makes it again.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from augment.bank import LatentBank, filled
from augment.chunks import Chunk
from augment.errors import AugmentWarning, Damaged, ImageRejected, Missing, UserError
from augment.extend import intact, size_of
from augment.files import check_folder, in_use, locked, read_file, write_bytes
from augment.records import (
    KINDS,
    BankSettings,
    ChunkPlan,
    ChunkRecord,
    ClassPlan,
    Home,
    Manifest,
    Part,
    check_file,
    file_of,
    parts_of,
    read_manifest,
    read_original,
    read_record,
    require_same_making,
    stem_of,
    still,
)
from augment.schema import as_object, build, read, write
from augment.shard_records import (
    CRC,
    INFO,
    SETTINGS,
    UNCHECKED,
    holds_shards,
    info,
    read_settings,
    read_table,
    repair_settings,
    shard_path,
)
from augment.shards import verify_shard
from augment.sources import Source, place_of


class Finding(NamedTuple):
    """Something that is not as it should be.

    Attributes:
        what: in one line.
        record: the commit record to remove so that it is made again; None if that would not help.
    """

    what: str
    record: Path | None = None


def verify(path: str | Path, images: Source | str | Path | Any | None = None) -> list[Finding]:
    """Compare every file of a bank or of shards with what was recorded when it was written.

    Args:
        path: the folder.
        images: of a bank, its images, to be compared too: a folder, a source or a data set.

    Raises:
        UserError: there is neither a bank nor shards.
    """
    path, place = Path(path), place_of(images)
    if isinstance(place, Path) and not place.is_dir():
        raise UserError(f"expected the folder of images at {images}, got none; check the path")
    if holds_shards(path):
        return list(shard_findings(path))
    return list(bank_findings(path, place))


def discard(findings: Sequence[Finding]) -> None:
    """Remove the records of what is damaged, so that the command that made it makes it again.

    Raises:
        UserError: a record cannot be removed.
    """
    for record in {finding.record for finding in findings if finding.record is not None}:
        try:
            record.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"expected to remove {record}, got {error.strerror}; make that possible, and run "
                "the same command again"
            ) from None


def bank_findings(path: Path, images: Path | Source | None) -> Iterator[Finding]:
    """What is wrong with a bank."""
    expected = {path / "manifest.json", path / "rejects.jsonl"}
    parts, old = list(parts_of(path, read_manifest(path))), 0
    for part in tqdm(parts, "verify", unit="chunk", delay=2, leave=False):
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
        old += record.home is None
        for kind, known in record.files.items():
            file = file_of(part.stem, kind)
            expected.add(file)
            try:
                check_file(file, known)
            except (Damaged, Missing) as error:
                yield Finding(str(error), record_path)
            except UserError as error:
                yield Finding(str(error))
        yield from image_findings(images, record)
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


def image_findings(images: Path | Source | None, record: ChunkRecord) -> Iterator[Finding]:
    """Which images of a chunk are no longer what they were."""
    if images is None:
        return
    for image in record.images:
        try:
            read_original(images, image.id, image.sha256)
        except ImageRejected as error:
            yield Finding(f"image {image.id}: {error}")


def repair(path: Path) -> str:
    """Make a lost or damaged manifest, or ``synthesis.json``, again from the records beside it.

    Returns:
        What was done, in a line.

    Raises:
        UserError: it cannot be read now, or the records do not say enough, or are of several banks.
    """
    if holds_shards(path):
        return repair_settings(path)
    try:
        read_manifest(path)
        return f"{path}: its manifest is as it was written"
    except (Missing, Damaged) as error:
        flaw = error
    records = list(homed(path))
    if not records:
        raise UserError(
            f"expected records of schema {ChunkRecord.SCHEMA} in {path} to make its manifest of, "
            "got none; those of older versions do not say what class they are of: copy the "
            "manifest from elsewhere, or make the bank again in a new folder"
        ) from flaw
    settings = [settings_of(record) for _, record in records]
    newest = max(range(len(records)), key=lambda k: records[k][0].unit)
    for other in settings:
        require_same_making(path, other, settings[newest])
    facts = vars(settings[newest])
    manifest = Manifest(**facts, schema=Manifest.SCHEMA, classes=classes_of(path, records))
    write(path / "manifest.json", manifest)
    return (
        f"{path}: the manifest is made again from {len(records)} records of "
        f"{len(manifest.classes)} classes; the command that made the bank makes what is missing"
    )


def homed(path: Path) -> Iterator[tuple[Home, ChunkRecord]]:
    """Give the records of a folder that say where they belong, and are there."""
    for file in sorted(path.glob("[0-9]*/chunk-*.json")):
        with suppress(Damaged, Missing):
            record = read(ChunkRecord, file)
            if record.home and stem_of(path, record.home) == file.with_suffix(""):
                yield record.home, record


def settings_of(record: ChunkRecord) -> BankSettings:
    """Return how the latents of a chunk are made."""
    try:
        return build(BankSettings, record.settings)
    except ValueError as flaw:
        raise UserError(
            f"expected the settings of a bank in its records, got {flaw}; make the bank again"
        ) from None


def classes_of(path: Path, records: list[tuple[Home, ChunkRecord]]) -> list[ClassPlan]:
    """Return the plan that records were made by.

    Labels move when classes are added, so those of older plans are put in order first, and newer
    ones among them.

    Raises:
        UserError: the records are of several banks.
    """
    there = {image.id for _, record in records for image in record.images}
    by_name: dict[str, ClassPlan] = {}
    classes: list[ClassPlan] = []
    for home, record in sorted(records, key=lambda r: (r[0].classes, r[0].label, r[0].number)):
        ids = [image.id for image in record.images]
        for reject in record.rejects:  # in the order of their places
            ids.insert(len(ids) if reject.place is None else reject.place, reject.id)
        later = {reject.id for reject in record.rejects} & there  # they were made good since
        ids = [image_id for image_id in ids if image_id not in later]
        if home.name not in by_name:
            by_name[home.name] = ClassPlan(home.name, home.folder, home.prompt, [])
            classes.insert(home.label, by_name[home.name])
        known = by_name[home.name]
        if (known.folder, known.prompt) != (home.folder, home.prompt):
            raise UserError(
                f"expected records of one bank in {path}, got two folders or prompts for class "
                f"{home.name!r}; remove the records that do not belong to it"
            )
        if ids:
            known.chunks.append(ChunkPlan(home.number, home.unit, ids))
    for known in classes:
        known.chunks.sort(key=lambda chunk: chunk.number)
    return classes


def shard_findings(path: Path) -> Iterator[Finding]:
    """What is wrong with a folder of shards."""
    settings, whole = read_settings(path), True
    expected = {path / SETTINGS, path / INFO}
    for number in tqdm(range(settings.shards), "verify", unit="shard", delay=2, leave=False):
        shard = shard_path(path, number)
        record = shard.with_suffix(".json")
        expected |= {shard, record}
        if not record.exists():
            yield Finding(f"{shard.name}: not made yet")
            whole = False
            continue
        try:
            wrong = verify_shard(shard, len(settings.classes), settings.extension)
        except UserError as error:  # of a file that may be healthy
            yield Finding(f"{shard.name}: {error}")
            whole = False
            continue
        if wrong:
            yield Finding(f"{shard.name}: {wrong}", record)
            whole = False
    if whole:
        with suppress(Missing):  # as in folders of older versions
            if read_file(path / INFO, "a list of shards") != info(count_shards(path).lengths):
                yield Finding(f"{INFO}: other bytes than were written", path / INFO)
    for file in sorted(path.rglob("*")):
        if file not in expected:
            yield Finding(f"{file.relative_to(path)}: not of these shards")


def inspect(path: str | Path) -> str:
    """What a bank or a folder of shards holds, in a few lines.

    Raises:
        UserError: there is neither.
    """
    path = Path(path)
    return inspect_shards(path) if holds_shards(path) else inspect_bank(path)


def inspect_bank(path: Path) -> str:
    """What a bank holds, finished or not."""
    manifest = read_manifest(path)
    made = {known.name: 0 for known in manifest.classes}
    planned, size, rejects = 0, 0, 0
    means: dict[str, list[float]] = {"norm": [], "error": []}
    for part in parts_of(path, manifest):
        planned += len(part.ids)
        record = read_record(part)
        if record is None:
            continue
        count = len(record.images)
        made[part.home.name] += count
        rejects += len(still(record, part.ids))
        size += sum(file.bytes for file in record.files.values())
        for key, values in means.items():
            value = getattr(record.statistics, key)
            values += [] if value is None else [value] * count
    least, most = min(made, key=made.get), max(made, key=made.get)  # type: ignore[arg-type]
    lines = [
        f"bank {path}: {sum(made.values())} of {planned} latents of {len(made)} classes, "
        f"{made[least]} ({least}) to {made[most]} ({most}) each; {rejects} images left out; "
        f"{size:,} bytes"
    ]
    prints = as_object(manifest.fingerprint) | {"made with": manifest.made_with}
    for name, facts in prints.items():
        told = facts if isinstance(facts, str) else ", ".join(f"{k} {v}" for k, v in facts.items())
        lines.append(f"{name}: {told}")
    lines.append(f"images: {manifest.source}")
    if means["norm"]:
        lines.append(f"norm / √D {fmean(means['norm']):.3f} on average")
    if means["error"]:
        lines.append(f"sampled back, images are at {psnr(fmean(means['error'])):.1f} dB (PSNR)")
    return "\n".join(lines)


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio, in dB, of a mean squared error of pixels in [0, 1]."""
    return -10 * math.log10(max(error, 1e-12))


def inspect_shards(path: Path) -> str:
    """What a folder of shards holds, finished or not, and what filters refused."""
    settings = read_settings(path)
    tally = count_shards(path)
    lines = [
        f"shards {path}: {tally.shards} of {settings.shards}, {tally.written} of "
        f"{tally.wanted} images of {len(settings.classes)} classes, {tally.bytes:,} bytes"
    ]
    return "\n".join([*lines, *map(str, tally.refused_lines())])


@dataclass
class Tally:
    """What the records of shards say.

    Attributes:
        shards: how many are there.
        lengths: the number of images in each of them.
        wanted: number of images that were to be made.
        bytes: of the tars.
        refused: by filter and class, how many candidates it refused.
        images: for each image its label, times 2^32, plus the digest of its file.
    """

    shards: int = 0
    lengths: list[int] = field(default_factory=list)
    wanted: int = 0
    bytes: int = 0
    refused: dict[str, Counter[str]] = field(default_factory=dict)
    images: list[np.ndarray] = field(default_factory=list)

    @property
    def written(self) -> int:
        """The number of images."""
        return sum(self.lengths)

    def by_class(self, classes: Sequence[str]) -> dict[str, tuple[int, int]]:
        """Return the number of images of each class, and of different ones among them."""
        keys = np.concatenate([np.empty(0, np.int64), *self.images])
        counts = [
            np.bincount(part >> 32, minlength=len(classes)).tolist()
            for part in (keys, np.unique(keys))
        ]
        return dict(zip(classes, zip(*counts, strict=True), strict=True))

    def refused_lines(self) -> list[str]:
        """A line a filter, with the classes it refused most of."""
        return [
            f"filter {name} refused {counts.total()} candidates"
            + "".join(f", {label} {count}" for label, count in counts.most_common(5))
            for name, counts in self.refused.items()
        ]


def count_shards(path: Path) -> Tally:
    """Add up the records of the shards that are there.

    Raises:
        UserError: one is damaged.
    """
    settings, tally = read_settings(path), Tally()
    for number in range(settings.shards):
        shard = shard_path(path, number)
        if not shard.with_suffix(".json").exists():
            continue
        record, rows = read_table(shard, len(settings.classes))
        tally.shards += 1
        tally.lengths.append(len(rows))
        known = np.where(rows[:, 4] == UNCHECKED, rows[:, 0], rows[:, 4] >> 32)
        tally.images.append(rows[:, 1] << 32 | known & CRC)
        tally.wanted += record.wanted
        tally.bytes += record.bytes
        for name, counts in record.dropped.items():
            tally.refused.setdefault(name, Counter()).update(counts)
    return tally


def merge(banks: Sequence[str | Path], out: str | Path) -> LatentBank:
    """One bank of the images of several, of the same settings; classes go by their names.

    A merge that was interrupted goes on.

    Raises:
        BankMismatch: their settings differ.
        UserError: an image or a prompt differs, a bank is incomplete or damaged, or ``out`` is in
            use.
    """
    return assemble([(LatentBank.open(bank), None) for bank in banks], Path(out))


def split(bank: str | Path, classes: Sequence[str], out: str | Path) -> LatentBank:
    """A bank of some classes of another, in the order that they are named in.

    A split that was interrupted goes on.

    Raises:
        UserError: no such class, the bank is incomplete or damaged, or ``out`` is in use.
    """
    return assemble([(LatentBank.open(bank), list(classes))], Path(out))


def assemble(banks: list[tuple[LatentBank, list[str] | None]], out: Path) -> LatentBank:
    """Copy classes of banks to a new one: its manifest, then chunk by chunk what is not there."""
    check_folder(out)
    if not banks or any(wanted == [] for _, wanted in banks):
        raise UserError("expected at least one bank and one class, got none; name them")
    first = banks[0][0].manifest
    classes: dict[str, ClassPlan] = {}
    homes: dict[str, Path] = {}
    origins: dict[tuple[str, int], Chunk] = {}
    for bank, wanted in banks:
        require_same_making(bank.path, bank.manifest, first)
        for name in dict.fromkeys(list(bank.classes) if wanted is None else wanted):
            prompt = bank.prompt(name)
            known = classes.setdefault(name, ClassPlan(name, f"{len(classes):04d}", prompt, []))
            if known.prompt != prompt:
                raise UserError(
                    f"expected one prompt for class {name!r}, got {known.prompt!r} and "
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
                number = len(known.chunks)
                known.chunks.append(ChunkPlan(number, len(origins), chunk.ids))
                origins[name, number] = chunk
    manifest = replace(first, schema=Manifest.SCHEMA, classes=list(classes.values()))
    with locked(out) as lock:
        claim(out, manifest)
        lock.sweep()
        for part in tqdm(list(parts_of(out, manifest)), "copy", unit="chunk", delay=2, leave=False):
            copy(origins[part.home.name, part.home.number], part)
        lock.sweep()
    return LatentBank.open(out)


def claim(out: Path, manifest: Manifest) -> None:
    """Begin a bank in a new folder, or find the same one there, begun or finished.

    Raises:
        UserError: there is something else.
    """
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


def copy(chunk: Chunk, part: Part) -> None:
    """Copy a chunk, unless it is there, and its record last; what was left out stays behind.

    Raises:
        UserError: it is damaged.
    """
    there = intact(part)
    if there is not None and there.files == chunk.files and size_of(part, there):
        return
    record = chunk.record
    for kind, known in record.files.items():
        check_file(chunk.file(kind), known)
        write_bytes(file_of(part.stem, kind), chunk.file(kind).read_bytes())
    facts = {"home": part.home, "settings": part.settings, "schema": ChunkRecord.SCHEMA}
    write(part.stem.with_suffix(".json"), replace(record, rejects=[], **facts))
