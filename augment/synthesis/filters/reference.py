"""What filters compare with: a bank's real images, and the values that these have themselves.

A cosine or a distance says little alone: what is high depends on the network and on the class. So
filters measure real images as they measure synthetic ones, each against the others of its class
and never against itself, and score a synthetic image by where it is among them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError

MIN_OWN = 128  # real images of a class that judge it alone; fewer are judged by all classes
POOL = 512  # about how many real images stand for all classes, and at most for one
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, are spread evenly
FLOOR = 1e-3  # the least difference of two values that means anything

Scores = Callable[[Tensor, Sequence[int]], Tensor]
"""(images (n, C, R, R) in [0, 1], their labels) → scores (n,), float32 on the CPU; n ≥ 1."""


@dataclass(frozen=True)
class Reference:
    """A bank as a filter sees it.

    Args:
        classes: names in label order.
        prompts: of each class, in label order; empty if it has none.
        real: (label, limit=None) → the class's real images, float32 (n, C, R, R) in [0, 1],
            prepared as the backbone's; no more than the limit, spread over the class.
        device: where networks run.
        counts: how many real images each class has, in label order; asked for by `real` if None.
    """

    classes: list[str]
    prompts: list[str]
    real: Callable[..., Tensor]
    device: torch.device
    counts: list[int] | None = None


class Real:
    """The real images' features and own values, a class at a time.

    Args:
        reference: the bank.
        describe: images (n, C, R, R) → features, a row an image.
        own: (features of a class, its label) → a value or a row of values an image, each found
            without the image itself; none where that takes more images than there are.
        limit: how many images of a class are looked at, spread over it; None is all.
    """

    def __init__(
        self,
        reference: Reference,
        describe: Callable[[Tensor], Tensor],
        own: Callable[[Tensor, int], Tensor],
        limit: int | None = POOL,
    ) -> None:
        self.reference, self.describe, self.own, self.limit = reference, describe, own, limit

    def features(self, label: int, limit: int | None) -> Float[Tensor, "n d"]:
        """Return the features of a class, of ``limit`` images at most.

        Raises:
            UserError: it has no images.
        """
        images = self.reference.real(label, limit)
        if not len(images):
            name = self.reference.classes[label]
            raise UserError(f"expected real images of class {name!r}, got none; add one")
        return self.describe(images)

    def __call__(self, label: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m *k"]]:
        """Return a class's features, and the values to judge it by: its own, or of all classes."""
        rows = self.features(label, self.limit)
        return rows, self.own(rows, label) if len(rows) >= MIN_OWN else self.pool

    def values(self, label: int) -> Float[Tensor, "m *k"]:
        """Return the values to judge a class by; a small class's images are not read for them."""
        counts = self.reference.counts
        if counts is not None and counts[label] < MIN_OWN:
            return self.pool
        return self(label)[1]

    @cached_property
    def pool(self) -> Float[Tensor, "m *k"]:
        """Own values of about `POOL` images, of classes from all over the bank."""
        count, parts = len(self.reference.classes), []
        for label in sorted(range(count), key=lambda label: label * GOLDEN % 1):
            parts.append(self.own(self.features(label, max(16, POOL // count)), label))
            if sum(map(len, parts)) >= POOL:
                break
        return torch.cat(parts)


def by_class(
    describe: Callable[[Tensor], Tensor], judge: Callable[[int], Callable[[Tensor], float]]
) -> Scores:
    """Score images one by one, by what their class's real images are like.

    Args:
        describe: images → features, a row an image.
        judge: label → (an image's features → its score); asked once a class, when it first comes.
    """
    judge = cache(judge)
    judge(0)  # what is wrong with the bank shows before there are images

    def scores(images: Tensor, labels: Sequence[int]) -> Tensor:
        rows = zip(describe(images), map(judge, labels), strict=True)
        return torch.tensor([score(row) for row, score in rows], dtype=torch.float32)

    return scores


def check_quantile(quantile: float) -> None:
    """Refuse a share outside (0, 0.5): 0.5 would drop every other real image."""
    if not 0 < quantile < 0.5:
        raise UserError(f"expected a quantile between 0 and 0.5, got {quantile}; 0.05 is usual")


def typical(
    reference: Reference,
    describe: Callable[[Tensor], Tensor],
    quantile: float,
    texts: Float[Tensor, "k d"] | None = None,
) -> Scores:
    r"""Score images by the cosine to the class, on the scale of the real images' own.

    With unit features f of the image and :math:`f_1 \dots f_n` of the class's real images, the
    value is the mean cosine :math:`v = \frac1n \sum_i ⟨f, f_i⟩`: the cosine to their mean but for a
    factor of the class, and unlike it the same in expectation for any n; or, with texts, the cosine
    to the class's text. Of the real images' own values (each against the other n − 1) let m be the
    median and b the quantile. The score is :math:`(v - b) / (m - b)`: 1 for an image as typical as
    the median real one, and negative below all but that share of them.

    Args:
        reference: the bank.
        describe: images → unit features (n, d), float64.
        quantile: the share of real images that fall below a score of 0.
        texts: unit features of the classes' prompts, in label order.

    Raises:
        UserError: without texts, no class has two real images.
    """

    def own(rows: Tensor, label: int) -> Tensor:
        if texts is not None:
            return rows @ texts[label]
        return (rows @ rows.sum(0) - 1) / max(len(rows) - 1, 1) if len(rows) > 1 else rows[:0, 0]

    real = Real(reference, describe, own)

    def judge(label: int) -> Callable[[Tensor], float]:
        if texts is None:
            rows, values = real(label)
            towards = rows.mean(0)
        else:
            values, towards = real.values(label), texts[label]
        if not len(values):
            raise UserError(
                "expected a class with 2 real images or more, to know how alike they are, got one "
                "image a class; take the filter classifier, or clip to the prompt"
            )
        border, middle = values.quantile(values.new_tensor([quantile, 0.5])).tolist()
        spread = max(middle - border, FLOOR)
        return lambda row: ((row @ towards).item() - middle) / spread + 1

    return by_class(describe, judge)
