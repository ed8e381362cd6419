r"""A rule turns points and weights into one centroid: norm ∘ mean split, written ``fade/chm``.

With the points :math:`z_n = d_n + e_n` cut in two by the mean split and weights w on the simplex,

.. math:: \hat z = \sum_n w_n d_n + \mathrm{norm}\bigl(\{e_n\}, w\bigr).

Laws, held by ``tests/test_centroid_laws.py`` for every entry of `NORMS` and `MEANS`: the order of
the points does not matter; a point of weight zero might as well be absent; a batch is its rows one
by one; rotating the points rotates the centroid (split ``0``); and rules that claim to reproduce
their inputs do so at the vertices of the simplex.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from augment.centroid.means import MEANS
from augment.centroid.norms import NORMS, mix
from augment.errors import UserError, lookup


@dataclass(frozen=True)
class Rule:
    """An interpolation rule, named ``norm/split``.

    Args:
        norm: a key of `augment.centroid.norms.NORMS`.
        mean: a key of `augment.centroid.means.MEANS`.

    Raises:
        UserError: one of the names is unknown.

    >>> points, weights = torch.randn(2, 3, 4, 8, 8), torch.full((2, 3), 1 / 3)
    >>> Rule.parse("fix/0")(points, weights).flatten(1).norm(dim=1).round(decimals=3)
    tensor([16., 16.])
    """

    norm: str = "fade"
    mean: str = "chm"

    def __post_init__(self) -> None:
        lookup(NORMS, self.norm, "norm rule")
        lookup(MEANS, self.mean, "mean split")

    @classmethod
    def parse(cls, name: str) -> "Rule":
        """The rule of a name such as ``nin/chm``; ``nin`` alone means ``nin/0``."""
        norm, _, mean = name.partition("/")
        return cls(norm, mean or "0")

    def __str__(self) -> str:
        return f"{self.norm}/{self.mean}"

    def __call__(
        self, points: Float[Tensor, "b k c h w"], weights: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b c h w"]:
        """The centroids, one a row, in float32 (float64 stays float64).

        Args:
            points: latents, finite.
            weights: on the simplex.

        Raises:
            UserError: a point is not finite.
        """
        if points.dtype != torch.float64:
            points = points.float()
        weights = weights.to(points)
        if not points.isfinite().all():
            row, column = (~points.isfinite()).flatten(2).any(-1).nonzero()[0].tolist()
            raise UserError(
                f"expected finite latents, got NaN or infinity in point {column} of row {row}; "
                "invert that image again"
            )
        means = MEANS[self.mean](points)
        residuals = (points - means).flatten(2)
        centroid = NORMS[self.norm](residuals, weights).unflatten(-1, points.shape[2:])
        return centroid + mix(means.flatten(2), weights).unflatten(-1, means.shape[2:])
