r"""A rule turns points and weights into one centroid: norm ∘ mean split, written ``fade/chm``.

With the points :math:`z_n = d_n + e_n` cut in two by the mean split and weights w on the simplex,

.. math:: \hat z = \sum_n w_n d_n + \mathrm{norm}\bigl(\{e_n\}, w\bigr).

Laws, held by ``tests/centroid/test_centroid_laws.py`` for every entry of `NORMS` and `MEANS`: the
order of the points does not matter; a point of weight zero might as well be absent; a batch is its
rows one by one; rotating the points rotates the centroid (split ``0``); and rules that claim to
reproduce their inputs do so at the vertices of the simplex.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from augment.centroid.means import split_named
from augment.centroid.norms import COEFFICIENTS, GAINS, NORMS
from augment.centroid.residuals import Residuals
from augment.core.errors import UserError, lookup

ALIASES = {"lol": "vp/mu"}  # names in the literature


@dataclass(frozen=True)
class Rule:
    """An interpolation rule, named ``norm/split``.

    Args:
        norm: a key of `augment.centroid.norms.NORMS`.
        mean: a key of `augment.centroid.means.MEANS`, or ``lp2.5`` for another blur.

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
        split_named(self.mean)

    @classmethod
    def parse(cls, name: str) -> "Rule":
        """Parse a name such as ``nin/chm``; ``nin`` alone means ``nin/0``."""
        norm, _, mean = ALIASES.get(name, name).partition("/")
        return cls(norm, mean or "0")

    def __str__(self) -> str:
        return f"{self.norm}/{self.mean}"

    def __call__(
        self,
        points: Float[Tensor, "b k c h w"],
        weights: Float[Tensor, "b k"],
        mu: Float[Tensor, "c h w"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Mix points to one centroid a row, in float32 (float64 stays float64).

        Args:
            points: latents, finite.
            weights: on the simplex.
            mu: the fixed latent of the split ``mu``; zero by default, and unused by other splits.

        Raises:
            UserError: a point or weight is not finite, or the rule is for another number of
                points.
        """
        if points.dtype != torch.float64:
            points = points.float()
        weights, split = weights.to(points), split_named(self.mean)
        mu = None if mu is None or self.mean != "mu" else mu.to(points)
        residuals = Residuals(points, weights, split, mu)
        if self.norm in COEFFICIENTS:
            centroid = residuals.combine(COEFFICIENTS[self.norm](residuals))
        else:
            gain = GAINS[self.norm](residuals)[:, :, None, None]
            centroid = residuals.mixture * gain + residuals.mean
        if not centroid.sum().isfinite():
            _refuse(points)
        return centroid


def _refuse(points: Float[Tensor, "b k c h w"]) -> None:
    """Raise an error that says why a centroid is not finite and names the first bad point."""
    bad = (~points.isfinite()).flatten(2).any(-1).nonzero().tolist()
    if bad:
        raise UserError(
            f"expected finite latents, got NaN or infinity in point {bad[0][1]} of row "
            f"{bad[0][0]}; invert that image again"
        )
    raise UserError(
        "expected weights on the simplex and latents of moderate size, got a centroid that is not "
        f"finite; the largest element is {points.abs().max().item():.3g}, check weights and mu"
    )
