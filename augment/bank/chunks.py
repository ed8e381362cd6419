"""What an open bank keeps of the images it holds: of each chunk a few facts, of an image its id.

Ids are kept packed, a string a chunk, and unpacked when a class is asked for. So a bank of a
million images has no object of each of them, which garbage collection would visit and every worker
process copy; what a record says beyond that of each image is read again when it is needed.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

from augment.bank.format import ChunkRecord, FileRecord, Reject, file_of, record_at, still
from augment.core.errors import UserError

UNPACKED = 256
"""Chunks whose ids are kept unpacked after they were used, in a process."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A committed chunk.

    Args:
        stem: the path of its files without suffix.
        packed: the ids of the images that it holds, row by row; see `pack`.
        files: what is recorded of its files, by kind.
        means: of each channel of its latents; empty if all images were left out.
        left_out: the ids of those that are still left out, packed.
    """

    stem: Path
    packed: str
    files: dict[str, FileRecord]
    means: tuple[float, ...]
    left_out: str

    @classmethod
    def of(cls, stem: Path, record: ChunkRecord, ids: Collection[str] | None = None) -> "Chunk":
        """Return the chunk of a commit record.

        Args:
            stem: the path of its files without suffix.
            record: the record.
            ids: its images as they are planned, which repaired ones have left; by default all.
        """
        means = tuple(record.statistics.channel_means or ())
        rejects = record.rejects if ids is None else still(record, ids)
        left_out = pack(reject.id for reject in rejects)
        return cls(stem, packed_ids(record), record.files, means, left_out)

    @property
    def rejected(self) -> int:
        """The number of images that are still left out."""
        return len(json.loads(self.left_out))

    @property
    def rejects(self) -> list[Reject]:
        """What is recorded of the images that are still left out."""
        return still(self.record, json.loads(self.left_out)) if self.rejected else []

    def file(self, kind: str) -> Path:
        """The path of its file of a kind."""
        return file_of(self.stem, kind)

    @property
    def rows(self) -> Mapping[str, int]:
        """The row of each of its images, in the order of rows."""
        return unpack(self.packed)

    @property
    def ids(self) -> list[str]:
        """The images it holds, row by row."""
        return list(self.rows)

    @property
    def record(self) -> ChunkRecord:
        """Its commit record, read again.

        Raises:
            UserError: it is no longer the one that the bank was opened with.
        """
        record = record_at(self.stem)
        if record is None or (record.files, packed_ids(record)) != (self.files, self.packed):
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
    """Ids, which may be any strings, in one: as JSON in ASCII."""
    return json.dumps(list(ids))


def packed_ids(record: ChunkRecord) -> str:
    """The ids of the images of a commit record, packed."""
    return pack(image.id for image in record.images)


@lru_cache(UNPACKED)
def unpack(packed: str) -> Mapping[str, int]:
    """The place of each of some packed ids, in their order; an id that is there twice counts once.

    >>> unpack(pack(["ant/0.png", "ant/1.png"]))
    {'ant/0.png': 0, 'ant/1.png': 1}
    """
    return {image_id: row for row, image_id in enumerate(json.loads(packed))}
