"""N-way K-shot tasks of a source's classes, drawn once and frozen in a file."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from augment.core.errors import UserError
from augment.core.files import read_json, sha256, write_json
from augment.core.rng import rng
from augment.core.schema import build
from augment.sources import Source
from augment.training.checks import at_least

OTHER = "remove the file to draw them anew, or name another"


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

    @property
    def supports(self) -> dict[str, tuple[str, ...]]:
        """The ids of the labelled images by class."""
        return dict(zip(self.classes, self.support, strict=True))


def _draw(
    ids: Mapping[str, list[str]], shape: tuple[int, int, int], seed: int, task: int
) -> Episode:
    """Draw one task: a pure function of its arguments."""
    generator, names, (n_way, n_shot, n_query) = rng(seed, "episode", task), list(ids), shape
    classes = tuple(names[row] for row in generator.permutation(len(names))[:n_way])
    drawn = [
        tuple(ids[name][row] for row in generator.permutation(len(ids[name]))[: n_shot + n_query])
        for name in classes
    ]
    return Episode(classes, tuple(d[:n_shot] for d in drawn), tuple(d[n_shot:] for d in drawn))


@dataclass(frozen=True)
class Episodes:
    """Tasks of the classes of a source, as a file has them.

    Args:
        n_way, n_shot, n_query: number of classes, and of support and query images of each.
        tasks: the tasks.
    """

    n_way: int
    n_shot: int
    n_query: int
    tasks: tuple[Episode, ...]

    @classmethod
    def draw(
        cls,
        source: Source,
        n_way: int = 5,
        n_shot: int = 1,
        n_query: int = 15,
        n_tasks: int = 600,
        seed: int = 0,
    ) -> "Episodes":
        """Draw tasks; task i depends on (seed, i) alone, whatever the number of tasks.

        Args:
            source: the images of the novel classes.
            n_way: number of classes of a task, at least 2.
            n_shot: number of support images of each class.
            n_query: number of query images of each class.
            n_tasks: number of tasks.
            seed: of the draws.

        Raises:
            UserError: a number is too small, there are fewer classes than ways, or a class has too
                few images.
        """
        at_least(2, n_way=n_way)
        at_least(1, n_shot=n_shot, n_query=n_query, n_tasks=n_tasks)
        at_least(0, seed=seed)
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
        shape = n_way, n_shot, n_query
        return cls(*shape, tuple(_draw(source.ids, shape, seed, task) for task in range(n_tasks)))

    @classmethod
    def read(cls, path: str | Path, source: Source) -> "Episodes":
        """Read tasks that were frozen by `write`.

        Raises:
            UserError: the file is missing, is not of `write`, or names images that the source has
                not.
        """
        path = Path(path)
        record = read_json(path, "frozen episodes")
        try:
            made: Episodes = build(cls, record)
            if not made.tasks:
                raise ValueError("no tasks")
        except ValueError as flaw:
            raise UserError(
                f"expected frozen episodes, got {path} of another form, {flaw}; {OTHER}"
            ) from None
        stored = {name: set(ids) for name, ids in source.ids.items()}
        for number, task in enumerate(made.tasks):
            fault = made._fault(task, stored)
            if fault:
                raise UserError(
                    f"expected episodes of images in {source.root}, got {fault} in task {number} "
                    f"of {path}; give the images they were made for, or {OTHER}"
                )
        return made

    def _fault(self, task: Episode, stored: dict[str, set[str]]) -> str:
        """Return what is wrong with a task; empty if nothing is."""
        rows = (task.support, task.query)
        if not len(set(task.classes)) == len(task.classes) == self.n_way:
            return f"{len(set(task.classes))} classes"
        for part, count in zip(rows, (self.n_shot, self.n_query), strict=True):
            if [len(ids) for ids in part] != [count] * self.n_way or not count:
                return f"other numbers of images than {count} a class"
        for name, *parts in zip(task.classes, *rows, strict=True):
            ids = [i for part in parts for i in part]
            missing = [i for i in ids if i not in stored.get(name, ())]
            if missing:
                return f"{missing[0]!r} of class {name!r}, which is not there,"
            if len(set(ids)) < len(ids):
                return f"an image of class {name!r} twice"
        return ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of classes, and of support and query images of each."""
        return self.n_way, self.n_shot, self.n_query

    @property
    def digest(self) -> str:
        """SHA-256 of all tasks."""
        return sha256(json.dumps(dataclasses.asdict(self)).encode())

    def write(self, path: str | Path) -> None:
        """Freeze the tasks as JSON."""
        write_json(Path(path), dataclasses.asdict(self))

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, task: int) -> Episode:
        return self.tasks[task]
