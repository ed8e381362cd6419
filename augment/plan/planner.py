"""The planner draws the plan of every synthetic image from a seed.

``Planner(...)(epoch, index)`` is a pure function of its arguments.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Real
from torch import Tensor

from augment.core.errors import AugmentWarning, UserError, first_few, lookup
from augment.core.rng import rng
from augment.plan.mixing import Mixing
from augment.plan.plan import Plan
from augment.plan.weights import dirichlet, expected_count

Images = Mapping[str, tuple[str, ...]]
"""The image ids of each class, in label order; those of a bank are unpacked on demand."""

CACHED = 2**17
"""Numbers that a CPU holds in its caches."""


def budget(
    real: np.ndarray,
    per_class: int,
    fill_to: int | None = None,
    per_real: float | None = None,
    tail_only: int | None = None,
) -> np.ndarray:
    """Return how many synthetic images each class gets.

    >>> budget(np.array([9, 2]), 100, fill_to=5), budget(np.array([9, 2]), 100, tail_only=5)
    (array([0, 3]), array([  0, 100]))

    Args:
        real: the number of real images of each class.
        per_class: images a class.
        fill_to: top every class up to this many, counting the real ones; replaces per_class.
        per_real: images for every real one; replaces per_class.
        tail_only: skip classes that have at least this many real images.
    """
    counts = np.full(len(real), per_class)
    if fill_to is not None:
        counts = np.maximum(fill_to - real, 0)
    if per_real is not None:
        counts = np.floor(per_real * real + 1e-9).astype(np.int64)
    return counts if tail_only is None else np.where(real < tail_only, counts, 0)


def round_robin(per_class: int | dict[str, int], classes: Sequence[str]) -> list[int]:
    """Return the label of each image of an epoch: class after class, round after round.

    Args:
        per_class: images of every class, or of each by its name; the others have none.
        classes: their names, in label order.

    Raises:
        UserError: a number is negative, all are zero, or a class is not there.

    >>> round_robin({"bee": 3, "ant": 1}, ["ant", "bee"])
    [0, 1, 1, 1]
    """
    given = dict.fromkeys(classes, per_class) if isinstance(per_class, int) else per_class
    for name in given:
        lookup(dict.fromkeys(classes), name, "class")
    counts = np.array([given.get(name, 0) for name in classes], dtype=np.int64)
    if not len(counts) or counts.min() < 0 or not counts.any():
        raise UserError(f"expected at least 1 image a class, or of some, got {per_class}")
    labels = np.repeat(np.arange(len(counts)), counts)
    rounds = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    order = labels[np.argsort(rounds, kind="stable")]
    return np.arange(len(counts)).astype(object)[order].tolist()  # one integer object a class


@dataclass(frozen=True)
class Planner:
    """Draws the plan of every synthetic image.

    Neighbouring indices belong to different classes (index modulo the number of classes), so any
    run of indices is a balanced batch.

    Members are drawn anew each time, and a class that has fewer images than are asked for gives all
    it has (the tail of a long-tailed set). With ``features`` they are neighbours: a randomly drawn
    anchor first, then the images nearest to it by Euclidean distance, ties by their order.

    Args:
        images: the image ids of each class, in label order.
        mixing: what is mixed; the rule is not looked at, nearest means ``features``, and the file
            of contexts ``contexts``.
        classes: how many classes a centroid mixes: the home class, whose members come first, and
            others drawn at random, each with as many members.
        features: (n, f) of each class, a row an image in the order of ``images``; None draws
            members at random.
        contexts: of which each image draws one for its prompt, whatever its class, by a generator
            of its own; see `augment.sources.captions`.

    Raises:
        UserError: too many classes; of several alphas, a class would give more or fewer members;
            or the features do not fit the images.
    """

    images: Images
    mixing: Mixing = Mixing()
    classes: int = 1
    features: dict[str, Tensor] | None = field(default=None, repr=False)
    contexts: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.classes <= max(len(self.images), 1):
            raise UserError(
                f"expected classes from 1 to the {len(self.images)} there are, got {self.classes}"
            )
        if self.mixing.translate and (self.classes > 1 or len(self.images) < 2):
            raise UserError(
                f"expected one class a centroid and another to take images from to translate, got "
                f"classes = {self.classes} of {len(self.images)}; leave translate out"
            )
        if isinstance(self._alpha, tuple):
            self._check_alphas(len(self._alpha))
        if self.features is not None:
            self._check_features(self.features)

    @property
    def soft(self) -> bool:
        """Whether an image may be of several classes, so that labels are shares."""
        return self.classes > 1 or self.mixing.translate is not None

    @cached_property
    def _alpha(self) -> float | tuple[float, ...]:
        return self.mixing.concentration

    def _check_alphas(self, count: int) -> None:
        """Refuse alphas unless every class gives as many members."""
        for name, ids in self.images.items():
            mixed = self.classes * self._count(ids)
            if mixed != count:
                raise UserError(
                    f"expected one alpha for each member mixed, {mixed} with class {name!r}, got "
                    f"{count}; use one number for all, or members that every class has"
                )

    def _count(self, ids: Sequence[str]) -> int:
        """Return how many members a class gives."""
        return min(self.mixing.members or len(ids), len(ids))

    def _check_features(self, features: dict[str, Tensor]) -> None:
        """Refuse features other than a finite row for every image, all of one length."""
        if self.mixing.members is None:
            raise UserError(
                "expected a number of members beside features (nearest), got none; say how many "
                "neighbours to mix"
            )
        width = next(iter(features.values()), torch.empty(0)).shape[-1:]
        for name, ids in self.images.items():
            rows = features.get(name)
            if rows is None:
                flaw = "none"
            elif rows.ndim != 2 or rows.shape != (len(ids), *width):
                flaw = f"shape {tuple(rows.shape)}"
            elif not rows.isfinite().all():
                flaw = "NaN or infinity"
            else:
                continue
            raise UserError(
                f"expected the features of class {name!r} as {len(ids)} finite rows, as long as "
                f"those of any class, got {flaw}; give every image a row"
            )

    def __call__(self, epoch: int, index: int, label: int | None = None) -> Plan:
        """Draw the plan of a sample of an epoch, of class ``index`` modulo their number by default.

        Args:
            epoch: of the run, ≥ 0.
            index: of the sample, ≥ 0.
            label: of its class, if another.
        """
        mixing, names = self.mixing, self._names
        generator = rng(mixing.seed, "plan", epoch, index)
        label = index % len(names) if label is None else label
        home = names[label]
        mixed = [home]
        if self.classes > 1:  # nothing is drawn for one class, whose plans stay as they were
            others = generator.permutation(len(names) - 1)[: self.classes - 1].tolist()
            mixed += [names[other + (other >= label % len(names))] for other in others]
        if mixing.translate:
            other = int(generator.integers(len(names) - 1))
            mixed = [names[other + (other >= label % len(names))]]
        images = {name: self.images[name] for name in mixed}
        choose = self._nearest if self.features else self._drawn
        chosen = choose(generator, images)
        members = tuple(images[name][row] for name, row in chosen)
        weights = tuple(dirichlet(generator, self._alpha, len(members)).tolist())
        classes = tuple(name for name, _ in chosen) if mixed != [home] else ()
        place = mixing.seed, epoch, index
        return Plan(
            label, home, members, weights, mixing.noise, *place, classes,
            level=self._level(*place), context=self._context(*place),
        )  # fmt: skip

    def _level(self, *place: int) -> float | None:
        """Draw the level, if there are several, by a generator of its own."""
        levels = self.mixing.levels or (None,)
        if len(levels) == 1:
            return levels[0]
        return levels[rng(place[0], "level", *place[1:]).integers(len(levels))]

    def _context(self, seed: int, *place: int) -> str:
        """Draw a context, by a generator of its own: other draws stay as they are without."""
        if not self.contexts:
            return ""
        return self.contexts[rng(seed, "context", *place).integers(len(self.contexts))]

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """The classes, in label order."""
        return tuple(self.images)

    def _drawn(self, generator: np.random.Generator, images: Images) -> list[tuple[str, int]]:
        """Return (class, row) of the members drawn from each class, in the class's order."""
        chosen = []
        for name, ids in images.items():
            rows, count = range(len(ids)), self._count(ids)
            if count < len(ids):
                rows = sorted(generator.permutation(len(ids))[:count].tolist())
            chosen += [(name, row) for row in rows]
        return chosen

    def _nearest(self, generator: np.random.Generator, images: Images) -> list[tuple[str, int]]:
        """Return (class, row) of the images of each class nearest to an anchor in the first."""
        assert self.features is not None
        home = next(iter(images))
        anchor = generator.integers(len(images[home]))
        point, chosen = self.features[home][anchor], []
        for name in images:
            away = distances(self.features[name], point)
            if name == home:
                away[anchor] = -1  # before its duplicates
            rows = away.argsort(stable=True)[: self.mixing.members].tolist()
            chosen += [(name, row) for row in rows]
        return chosen


COPY_THRESHOLD = 1.1
"""Effective count of points below which a mixture is nearly a copy of one of them."""
LONE_NOISE = 0.3
"""Share of noise below which images of a class of one image are nearly copies."""


def warn_of_copies(planner: Planner, labels: Iterable[int]) -> None:
    """Warn of classes whose synthetic images will nearly be copies of single real ones.

    That is so for a class of one image, and for all classes if alpha is tiny.

    Args:
        planner: makes the plans.
        labels: of the images that are asked for.
    """
    names, mixing, copies, lone = list(planner.images), planner.mixing, [], 0
    for label in sorted(set(labels)):
        ids = planner.images[names[label]]
        count = min(mixing.members or len(ids), len(ids)) * planner.classes
        share = (1 - mixing.noise) ** 2 / expected_count(mixing.concentration, count)
        lonely = len(ids) == 1 and mixing.noise < LONE_NOISE
        if lonely or (mixing.noise <= 0.5 and 1 / (share + mixing.noise**2) < COPY_THRESHOLD):
            copies.append(f"{names[label]!r} ({len(ids)} real)")
            lone += len(ids) == 1
    if copies:
        cures = [f"add fresh noise, such as noise {LONE_NOISE}"]
        if lone:
            cures += ["add real images to a class of one, which gives the same latent each time"]
            cures += ["invert with --inversion noise, where each image has noise of its own"]
        if lone < len(copies):
            cures += ["mix more images by larger alpha or members"]
        warnings.warn(
            "expected to mix several images, got classes whose synthetic images will be nearly "
            f"copies of single real ones: {first_few(copies)}; "
            f"{', '.join(cures[:-1])}, or {cures[-1]}",
            AugmentWarning,
            stacklevel=3,
        )


def distances(rows: Real[Tensor, "n f"], point: Real[Tensor, " f"]) -> Float[Tensor, " n"]:
    """Return Euclidean distances of rows to a point, float64, a cache's worth of rows at a time.

    >>> distances(torch.eye(2), torch.zeros(2))
    tensor([1., 1.], dtype=torch.float64)
    """
    parts = rows.split(max(CACHED // max(rows.shape[1], 1), 1))
    return torch.cat([(part - point).double().norm(dim=1) for part in parts])
