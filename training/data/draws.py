"""Which image comes when: the draws of every epoch, drawn at once.

The draws of epoch e are a pure function of (seed, e). So a training that was killed resumes with
the batches it would have had, ranks share a batch without talking, and all of them take the same
number of steps. Rows number the real images first and the synthetic ones after them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from augment.core.errors import UserError, lookup
from augment.core.rng import rng
from augment.plan.planner import budget
from augment.training.checks import at_least, expect

SAMPLERS: dict[str, tuple[float, ...]] = {
    "instance": (1.0,),
    "square_root": (0.5,),
    "class": (0.0,),
    "progressive": (1.0, 0.0),
}
"""The powers of the class counts that a sampler draws classes by; of two, training goes from the
first to the second (Kang et al., arXiv 1910.09217, equations 1 and 2)."""

_UNLIMITED = np.iinfo(np.int64).max


@dataclass(frozen=True)
class SyntheticMix:
    """How synthetic images are mixed with real ones.

    By share: the class of a draw is drawn first, by the sampler; then the draw is synthetic with
    probability ``share``, if the class has synthetic images. So classes keep their frequency
    (DA-Fusion, arXiv 2302.07944). By count, where ``fill_to`` or ``per_real`` is given: this many
    synthetic images join the real ones for good (Fill-Up, arXiv 2306.07200).

    Args:
        share: of synthetic draws, in [0, 1].
        fill_to: top every class up to this many images, counting the real ones.
        per_real: synthetic images for every real one.
        tail_only: skip classes that have at least this many real images; 20 keeps to the few-shot
            ones.
        warm_up: epochs during which the share, or the number, grows from nothing.
        real_only: last epochs, without synthetic images (Fill-Up's second stage).

    Raises:
        UserError: a number is out of its range, or both counts are given.
    """

    share: float = 0.25
    fill_to: int | None = None
    per_real: float | None = None
    tail_only: int | None = None
    warm_up: int = 0
    real_only: int = 0

    def __post_init__(self) -> None:
        expect(0 <= self.share <= 1, "a share of synthetic draws in [0, 1]", self.share)
        if self.fill_to is not None and self.per_real is not None:
            raise UserError("expected fill_to or per_real, got both; give one of them")
        at_least(0, fill_to=self.fill_to, per_real=self.per_real, tail_only=self.tail_only)
        at_least(0, warm_up=self.warm_up, real_only=self.real_only)

    @property
    def by_count(self) -> bool:
        """Whether synthetic images join the real ones, rather than replace draws of them."""
        return self.fill_to is not None or self.per_real is not None

    def budget(self, real: np.ndarray) -> np.ndarray:
        """Return how many synthetic images each class may use, by its number of real ones."""
        return budget(real, _UNLIMITED, self.fill_to, self.per_real, self.tail_only)

    def strength(self, epoch: int, epochs: int) -> float:
        """Return the part of the share, or of the number, that an epoch has."""
        if epoch >= epochs - self.real_only:
            return 0.0
        return min(1.0, (epoch + 1) / (self.warm_up + 1))


class Draw(NamedTuple):
    """One draw: its epoch, its place among the epoch's draws, and the row it takes."""

    epoch: int
    place: int
    row: int


class MixedBatchSampler(Sampler[list[Draw]]):
    """The batches of a rank; a ``batch_sampler`` for a DataLoader.

    Without class weights (``instance``) an epoch goes through all images in a random order, and
    begins again where it is longer than that; the other samplers draw the class, then one of its
    images, with replacement.

    Args:
        real: the label of every real image.
        synthetic: the label of every synthetic image; or how many there are, if an image's class
            is not known before it is drawn (a pool), which share alone can mix.
        num_classes: number of classes.
        mix, sampler: see `SyntheticMix` and `SAMPLERS`.
        batch_size: images of a batch of one rank.
        steps: batches an epoch; by default one pass through all images.
        seed: of all draws.
        epochs: how many there will be, which schedules ask for.
        done: number of batches that the training has had, asked whenever an epoch begins.

    Raises:
        UserError: there is no real image, or an option does not fit the images.
    """

    def __init__(
        self,
        real: Sequence[int],
        synthetic: Sequence[int] | int = (),
        num_classes: int = 0,
        mix: SyntheticMix | None = None,
        sampler: str = "instance",
        batch_size: int = 64,
        steps: int | None = None,
        seed: int = 0,
        epochs: Callable[[], int] = lambda: 1,
        done: Callable[[], int] = lambda: 0,
    ) -> None:
        self.mix, self.sampler = mix or SyntheticMix(), lookup(SAMPLERS, sampler, "sampler")
        expect(len(real) > 0, "real images to draw from", "none")
        at_least(1, batch_size=batch_size, steps_per_epoch=steps)
        self.real = np.asarray(real, dtype=np.int64)
        classes = num_classes or int(self.real.max()) + 1
        self.counts = np.bincount(self.real, minlength=classes)
        self.unlabelled = synthetic if isinstance(synthetic, int) else 0
        labels = np.asarray(() if self.unlabelled else synthetic, dtype=np.int64)
        if self.unlabelled and (self.mix.by_count or self.mix.tail_only is not None):
            raise UserError(
                "expected synthetic images of known classes for fill_to, per_real and tail_only, "
                "got a pool, whose images change; mix it by share, or give shards or a dataset"
            )
        order = np.argsort(labels, kind="stable")
        ends = np.cumsum(np.bincount(labels, minlength=classes))[:-1]
        rows, limits = np.split(order + len(self.real), ends), self.mix.budget(self.counts)
        self.synthetic = [own[:limit] for own, limit in zip(rows, limits, strict=True)]
        """The rows of the synthetic images that each class may use."""
        self.batch_size, self.seed, self.asked = batch_size, seed, steps
        self.epochs, self.done = epochs, done
        self.share(0, 1)

    def share(self, rank: int, world: int) -> None:
        """Take one stripe of each step's images, of ``world``."""
        self.rank, self.world = rank, world
        images = len(self.real)
        if self.mix.by_count:
            images += sum(map(len, self.synthetic))
        self.steps = self.asked or -(-images // (self.batch_size * world))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, first = divmod(self.done(), self.steps)
        rows = self.rows(epoch)
        whole = self.batch_size * self.world
        for step in range(first, self.steps):
            places = range(step * whole + self.rank, (step + 1) * whole, self.world)
            yield [Draw(epoch, place, int(rows[place])) for place in places]

    def rows(self, epoch: int) -> np.ndarray:
        """Return the rows of an epoch's draws, of all ranks, in order."""
        generator = rng(self.seed, "order", epoch)
        rows, labels = np.arange(len(self.real)), self.real
        if not self.mix.by_count:
            drawn = self._draw(generator, rows, labels, epoch)
            share = self.mix.strength(epoch, self.epochs()) * self.mix.share
            return self._exchange(generator, drawn, share)
        joined = self.class_counts(epoch) - self.counts
        synthetic = [own[:count] for own, count in zip(self.synthetic, joined, strict=True)]
        more = [np.full(len(own), label) for label, own in enumerate(synthetic)]
        rows, labels = np.concatenate([rows, *synthetic]), np.concatenate([labels, *more])
        return self._draw(generator, rows, labels, epoch)

    def class_counts(self, epoch: int) -> np.ndarray:
        """Return the number of images of each class in an epoch: real, and synthetic by count."""
        if not self.mix.by_count:
            return self.counts
        strength = self.mix.strength(epoch, self.epochs())
        return self.counts + [round(strength * len(own)) for own in self.synthetic]

    def _draw(
        self, generator: np.random.Generator, rows: np.ndarray, labels: np.ndarray, epoch: int
    ) -> np.ndarray:
        """Draw an epoch's number of the rows, in the sampler's manner."""
        count = self.steps * self.batch_size * self.world
        if self.sampler == (1.0,):
            passes = [generator.permutation(rows) for _ in range(-(-count // len(rows)))]
            return np.concatenate(passes)[:count]
        sizes = np.bincount(labels, minlength=len(self.counts)).astype(float)
        laws = [np.where(sizes > 0, sizes**power, 0) for power in self.sampler]
        laws = [law / law.sum() for law in laws]
        t = min(epoch / max(self.epochs() - 1, 1), 1.0)
        law = laws[0] if len(laws) == 1 else (1 - t) * laws[0] + t * laws[1]
        by_class, starts = rows[np.argsort(labels, kind="stable")], np.cumsum([0, *sizes[:-1]])
        drawn = generator.choice(len(law), count, p=law)
        within = np.floor(generator.random(count) * sizes[drawn])
        return by_class[(starts[drawn] + within).astype(np.int64)]

    def _exchange(
        self, generator: np.random.Generator, rows: np.ndarray, share: float
    ) -> np.ndarray:
        """Replace a share of draws of real images by synthetic ones of the same class."""
        swap, within = generator.random(len(rows)) < share, generator.random(len(rows))
        if self.unlabelled:
            chosen = len(self.real) + np.floor(within * self.unlabelled)
            return np.where(swap, chosen, rows).astype(np.int64)
        flat = np.concatenate([np.empty(0, np.int64), *self.synthetic])
        sizes = np.array([len(own) for own in self.synthetic])
        starts, labels = np.cumsum(sizes) - sizes, self.real[rows]
        swap &= sizes[labels] > 0
        chosen = (starts[labels] + np.floor(within * sizes[labels])).astype(np.int64)
        return np.where(swap, flat[np.minimum(chosen, len(flat) - 1)], rows) if len(flat) else rows
