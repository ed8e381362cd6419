"""Verify, repair and describe a folder: of shards here, of a bank by `augment.bank.verify`."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from augment.bank.verify import Finding, bank_findings, inspect_bank, repair_bank
from augment.core.errors import Missing, UserError
from augment.core.files import read_file
from augment.core.progress import Progress
from augment.shards.dataset import verify_shard
from augment.shards.format import (
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
from augment.sources import Source, place_of


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


def repair(path: Path) -> str:
    """Make a lost or damaged manifest, or ``synthesis.json``, again from the records beside it.

    Returns:
        What was done, in a line.

    Raises:
        UserError: it cannot be read now, or the records do not say enough, or are of several banks.
    """
    return repair_settings(path) if holds_shards(path) else repair_bank(path)


def inspect(path: str | Path) -> str:
    """Describe what a bank or a folder of shards holds, in a few lines.

    Raises:
        UserError: there is neither.
    """
    path = Path(path)
    return inspect_shards(path) if holds_shards(path) else inspect_bank(path)


def shard_findings(path: Path) -> Iterator[Finding]:
    """Find what is wrong with a folder of shards."""
    settings, whole = read_settings(path), True
    expected = {path / SETTINGS, path / INFO}
    for number in Progress(range(settings.shards), "verify", unit="shard", delay=2, leave=False):
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


def inspect_shards(path: Path) -> str:
    """Describe what a folder of shards holds, finished or not, and what filters rejected."""
    settings = read_settings(path)
    tally = count_shards(path)
    lines = [
        f"shards {path}: {tally.shards} of {settings.shards}, {tally.written} of "
        f"{tally.wanted} images of {len(settings.classes)} classes, {tally.bytes:,} bytes"
    ]
    return "\n".join([*lines, *map(str, tally.refused_lines())])


@dataclass
class Tally:
    """Totals over the records of shards.

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
        """Return a line for each filter, with the classes that it rejected most of."""
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
        digests = np.where(rows[:, 4] == UNCHECKED, rows[:, 0], rows[:, 4] >> 32)
        tally.images.append(rows[:, 1] << 32 | digests & CRC)
        tally.wanted += record.wanted
        tally.bytes += record.bytes
        for name, counts in record.dropped.items():
            tally.refused.setdefault(name, Counter()).update(counts)
    return tally
