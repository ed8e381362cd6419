"""Duplicate filter: is the image a real one come back?

A generator that was trained on the images, or a centroid with nearly all its weight on one of them,
gives an image that the training set has already, and that may be private.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.networks import feature_network, in_batches, unit
from augment.synthesis.filters.reference import FLOOR, POOL, Real, Reference, Scores, by_class


@dataclass(frozen=True)
class Duplicate:
    """Distance to the nearest real image of the class, on the scale of the real images' own.

    The score is that distance over the median distance of a real image to the nearest other of its
    class (over all classes, if the class has fewer than 128 images; to the nearest of any class, if
    all have one): 0 is a copy, 1 as far off as real images are from each other. Distances are root
    mean squares of pixels on a small grid, which noise, blur or the loss of compression hardly
    move; copies that are shifted by more than a pixel, mirrored or repainted pass. Or they are
    those of a network's unit features.

    Features of all real images are kept, 3 kB each for RGB on the grid of 16.

    Args:
        model: a network of timm or of `augment.networks.NETWORKS`; empty compares pixels, or takes
            that of a checkpoint.
        weights: a checkpoint of latent-augment train (``.ckpt``), a ``.safetensors`` file or
            another state dict; empty takes timm's pretrained ones.
        size: of the grid.
        minimum: keep images of this score and above.

    Raises:
        UserError: the size is out of range.
    """

    model: str = ""
    weights: str = ""
    size: int = 16
    minimum: float | None = 0.4

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError(f"expected a size of at least 1, got {self.size}; 16 is usual")

    def prepare(self, reference: Reference) -> Scores:
        """See `augment.synthesis.filters.Filter`.

        Raises:
            UserError: see `augment.networks.feature_network`; or the bank has one image only.
        """
        describe = self.describe(reference)
        real = Real(reference, describe, lambda rows, _: to_the_next(rows), limit=None)

        def judge(label: int) -> Callable[[Tensor], float]:
            rows, values = real(label)
            if not len(values):
                labels = range(min(len(reference.classes), POOL))
                values = to_the_next(torch.cat([real.features(other, None) for other in labels]))
            if not len(values):
                raise UserError("expected 2 real images to know what is near, got one; add more")
            usual = max(values.quantile(0.5).item(), FLOOR)
            return lambda row: distances(row[None], rows).min().item() / usual

        return by_class(describe, judge)

    def describe(self, reference: Reference) -> Callable[[Tensor], Tensor]:
        """Return the function from images to rows whose distance counts, float32 on the CPU."""
        if self.model or self.weights:
            network = feature_network(self.model, self.weights, reference.device)
            return lambda images: unit(network(images)).float()

        def grid(images: Tensor) -> Tensor:
            size = (self.size, self.size)
            small = F.interpolate(images, size, mode="bilinear", antialias=True).flatten(1)
            return small / small.shape[1] ** 0.5

        return lambda images: in_batches(grid, images).float()


def distances(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    """Return Euclidean distances, exactly 0 between equal rows."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def to_the_next(rows: Float[Tensor, "n d"]) -> Float[Tensor, " m"]:
    """Return the distance of each row to the nearest other; none if there is no other."""
    if len(rows) < 2:
        return rows[:0, 0]
    return distances(rows, rows).fill_diagonal_(torch.inf).amin(1)
