"""N-way K-shot tasks of a source's classes, thrown once and frozen in a file."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from augment.core.errors import UserError
from augment.core.files import read_json, sha256, write_json
from augment.core.rng import rng
from augment.core.schema import build
from augment.sources import Source

COUNTS = ("n_way", "n_shot", "n_query")


@dataclass(frozen=True)
class TaskRecord:
    """A task as JSON has it; see `Episode`."""

    classes: list[str]
    support: list[list[str]]
    query: list[list[str]]


@dataclass(frozen=True)
class EpisodesRecord:
    """What `Episodes.write` writes."""

    n_way: int
    n_shot: int
    n_query: int
    tasks: list[TaskRecord]


OTHER = "remove the file to throw them anew, or name another"


@dataclass(frozen=True)
class Episode:
    """One task.

    Args:
        classes: their names; the label is the place in this list.
        support: the ids of the labelled images of each.
        query: the ids of the images to be classified, of each.
    """

    classes: tuple[str, ...]
    support: tuple[tuple[str, ...], ...]
    query: tuple[tuple[str, ...], ...]

    @property
    def images(self) -> set[str]:
        """All ids."""
        return {i for rows in (self.support, self.query) for ids in rows for i in ids}


def throw(
    ids: dict[str, list[str]], n_way: int, n_shot: int, n_query: int, seed: int, task: int
) -> Episode:
    """The dice of one task: a pure function of its arguments."""
    dice = rng(seed, "episode", task)
    names = list(ids)
    classes = tuple(names[row] for row in dice.permutation(len(names))[:n_way])
    drawn = [
        tuple(ids[name][row] for row in dice.permutation(len(ids[name]))[: n_shot + n_query])
        for name in classes
    ]
    return Episode(classes, tuple(d[:n_shot] for d in drawn), tuple(d[n_shot:] for d in drawn))


class Episodes:
    """Tasks of a source's classes; task i depends on (seed, i) alone, however many there are.

    Args:
        source: the images of the novel classes.
        n_way, n_shot, n_query: classes, and support and query images of each.
        n_tasks: how many.
        seed: of the dice.

    Raises:
        UserError: a number is too small, there are fewer classes than ways, or a class has too few
            images.
    """

    def __init__(
        self,
        source: Source,
        n_way: int = 5,
        n_shot: int = 1,
        n_query: int = 15,
        n_tasks: int = 600,
        seed: int = 0,
    ) -> None:
        lowest = {"n_way": (n_way, 2), "n_shot": (n_shot, 1), "n_query": (n_query, 1)}
        for name, (value, least) in (lowest | {"n_tasks": (n_tasks, 1), "seed": (seed, 0)}).items():
            if value < least:
                raise UserError(f"expected {name} ≥ {least}, got {value}; choose a larger one")
        if len(source.ids) < n_way:
            raise UserError(
                f"expected at least {n_way} classes for {n_way} ways, got {len(source.ids)} in "
                f"{source.root}; lower n_way or add classes"
            )
        for name, ids in source.ids.items():
            if len(ids) < n_shot + n_query:
                raise UserError(
                    f"expected {n_shot} + {n_query} images of each class to draw from, got "
                    f"{len(ids)} of {name!r}; lower n_shot or n_query, or leave the class out"
                )
        self.n_way, self.n_shot, self.n_query = n_way, n_shot, n_query
        shape = (n_way, n_shot, n_query)
        self.tasks = tuple(throw(source.ids, *shape, seed, task) for task in range(n_tasks))

    @classmethod
    def read(cls, path: str | Path, source: Source) -> "Episodes":
        """Tasks that were frozen by `write`.

        Raises:
            UserError: the file is missing, is not of `write`, or names images that the source has
                not.
        """
        path = Path(path)
        try:
            record = build(EpisodesRecord, read_json(path, "frozen episodes"))
            if not record.tasks:
                raise ValueError("no tasks")
        except UserError:
            raise
        except ValueError as flaw:
            raise UserError(
                f"expected frozen episodes, got {path} of another form, {flaw}; {OTHER}"
            ) from None
        made = cls.__new__(cls)
        made.n_way, made.n_shot, made.n_query = (getattr(record, key) for key in COUNTS)
        known = {name: set(ids) for name, ids in source.ids.items()}
        made.tasks = tuple(
            Episode(
                tuple(task.classes),
                tuple(map(tuple, task.support)),
                tuple(map(tuple, task.query)),
            )
            for task in record.tasks
        )
        for number, task in enumerate(made.tasks):
            fault = made._fault(task, known)
            if fault:
                raise UserError(
                    f"expected episodes of images in {source.root}, got {fault} in task {number} "
                    f"of {path}; give the images they were made for, or {OTHER}"
                )
        return made

    def _fault(self, task: Episode, known: dict[str, set[str]]) -> str:
        """What is wrong with a task; empty if nothing is."""
        rows = (task.support, task.query)
        if not len(set(task.classes)) == len(task.classes) == self.n_way:
            return f"{len(set(task.classes))} classes"
        for part, count in zip(rows, (self.n_shot, self.n_query), strict=True):
            if [len(ids) for ids in part] != [count] * self.n_way or not count:
                return f"other numbers of images than {count} a class"
        for name, *parts in zip(task.classes, *rows, strict=True):
            ids = [i for part in parts for i in part]
            missing = [i for i in ids if i not in known.get(name, ())]
            if missing:
                return f"{missing[0]!r} of class {name!r}, which is not there,"
            if len(set(ids)) < len(ids):
                return f"an image of class {name!r} twice"
        return ""

    @property
    def record(self) -> dict[str, Any]:
        """What `write` writes."""
        tasks = [dataclasses.asdict(task) for task in self.tasks]
        return {key: getattr(self, key) for key in COUNTS} | {"tasks": tasks}

    @property
    def digest(self) -> str:
        """SHA-256 of all tasks."""
        return sha256(json.dumps(self.record).encode())

    def write(self, path: str | Path) -> None:
        """Freeze the tasks as JSON.

        Raises:
            UserError: the file cannot be written.
        """
        write_json(Path(path), self.record)

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, task: int) -> Episode:
        return self.tasks[task]
