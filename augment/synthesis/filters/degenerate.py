"""Degenerate filter: is the image a picture at all, by the plainest measures of pixels?

Centroids that leave the law of the latents come back overexposed, black, flat, tinted, as a lattice
or as noise (see `augment.measure`). Eight numbers of an image show it, three of them as logarithms
and two as square roots, which makes their scales even:

==========  ======================================================================================
dark        √ of the share of values below 0.02
bright      √ of the share of values above 0.98
detail      log of the root mean square difference of neighbouring pixels, of the grey image
roughness   log of second differences over first: noise and lattices are high, blur is low
mean        of the grey image
contrast    log of its standard deviation
red, blue   mean of the channel less that of the grey image, over the latter + 0.1 (colour only)
==========  ======================================================================================

A model that does not know the real images makes black blobs of them: none of the eight is far out,
since photographs differ much in each. So a ninth number, `blackness`, has a border of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from augment.networks import in_batches
from augment.sources.images import to_channels
from augment.synthesis.filters.reference import Real, Reference, Scores, by_class, check_quantile

TOLERANCES = (0.25, 0.25, 0.3, 0.05, 0.05, 0.3, 0.05, 0.05)
"""By how much a statistic may differ from the median however much alike the real images are."""

TINY, TAIL, FOLDS, MAX_BORDER = 1e-3, 0.05, 16, 2.5
BLACK, BLACK_TOLERANCE, MAX_BLACK = 0.1, 0.15, 1.5
"""Greys that count as black, tolerance of their √ share, and its border in units of the range."""


def statistics(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """Return the numbers of the module's docstring: 8, or 6 of a grey image."""
    grey, channels = to_channels(images, 1)[:, 0], images.mean((2, 3))
    means, deviations = grey.mean((1, 2)), grey.flatten(1).std(1, correction=0)
    shares = [part.float().mean((1, 2, 3)).sqrt() for part in (images < 0.02, images > 0.98)]
    steps, bends = (
        (grey.diff(n, 1).square().mean((1, 2)) + grey.diff(n, 2).square().mean((1, 2))).sqrt()
        + TINY
        for n in (1, 2)
    )
    logs = [steps.log(), (bends / steps).log(), means, (deviations + TINY).log()]
    tints = (channels - means[:, None]) / (means[:, None] + 0.1)
    return torch.stack(
        [*shares, *logs, *(tints[:, ::2].unbind(1) if images.shape[1] > 1 else [])], 1
    )


def blackness(images: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """Return √ of the share of pixels whose grey is below `BLACK`."""
    return (to_channels(images, 1) < BLACK).float().mean((1, 2, 3)).sqrt()


@dataclass(frozen=True)
class Range:
    """Where statistics of real images lie.

    Args:
        middle: their medians (k,).
        below, above: the distances (k,) of their 5 % and 95 % quantiles from it, at least the
            tolerances, which are the wider, the fewer images were measured.
    """

    middle: Float[Tensor, " k"]
    below: Float[Tensor, " k"]
    above: Float[Tensor, " k"]

    @classmethod
    def of(cls, rows: Float[Tensor, "n k"], count: int) -> "Range":
        """Return the range of at least one image's statistics, as measured on ``count`` images."""
        low, middle, high = rows.quantile(rows.new_tensor([TAIL, 0.5, 1 - TAIL]), 0)
        known = (BLACK_TOLERANCE,) if rows.shape[1] == 1 else TOLERANCES
        least = rows.new_tensor(known)[: rows.shape[1]] * (1 + 5 / count)
        return cls(middle, (middle - low).maximum(least), (high - middle).maximum(least))

    def excess(self, rows: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
        """Return how far out the worst statistic of an image is; 1 is at a quantile."""
        off = rows - self.middle
        return torch.where(off < 0, -off / self.below, off / self.above).amax(1)


@dataclass(frozen=True)
class Degenerate:
    """Statistics of the pixels out of the real images' range; needs no network.

    How far the worst of an image's statistics is from the median, in units of the real images'
    range, is its excess e. Real images have excesses of their own, by the range of others (16
    folds): with their median m and border b, the 1 − ``quantile`` quantile, but between 1 and 2.5,
    the score is (b − e) / (b − m): 1 for an image as plain as the median real one, negative beyond
    the border. It is at most 1 − e / 1.5 of the excess e of `blackness` alone. A class of fewer
    than 128 images is judged by the real images of all classes.

    Args:
        quantile: about the share of real images that score below 0.
        minimum: keep images of this score and above.

    Raises:
        UserError: the quantile is out of range.
    """

    quantile: float = 0.01
    minimum: float | None = 0.0

    def __post_init__(self) -> None:
        check_quantile(self.quantile)

    def prepare(self, reference: Reference) -> Scores:
        """See `augment.synthesis.filters.Filter`."""

        def both(images: Tensor) -> Tensor:
            return torch.cat([statistics(images), blackness(images)[:, None]], 1)

        def describe(images: Tensor) -> Tensor:
            return in_batches(both, images)

        real = Real(reference, describe, lambda rows, _: rows)
        return by_class(describe, lambda label: self.judge(real.values(label)))

    def judge(self, rows: Float[Tensor, "n k"]) -> Callable[[Tensor], float]:
        """Return the function from an image's statistics to its score, by those of real images.

        The last one is `blackness`.
        """
        rows, black = rows[:, :-1], Range.of(rows[:, -1:], len(rows))
        folds = torch.arange(len(rows)) % FOLDS
        parts = [
            Range.of(rows[folds != fold], len(rows)).excess(rows[folds == fold])
            for fold in range(min(len(rows), FOLDS))
            if len(rows) > 1
        ]
        own = torch.cat(parts) if parts else rows.new_zeros(1)
        border = own.quantile(1 - self.quantile).clamp(1, MAX_BORDER).item()
        middle, limits = min(own.quantile(0.5).item(), border - 0.25), Range.of(rows, len(rows))

        def score(row: Tensor) -> float:
            plain = (border - limits.excess(row[None, :-1]).item()) / (border - middle)
            return min(plain, 1 - black.excess(row[None, -1:]).item() / MAX_BLACK)

        return score
