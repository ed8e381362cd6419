r"""What a norm rule may know about the residuals it mixes, each thing computed once and when asked.

Every rule's result is a linear combination :math:`\sum_n c_n e_n` of the residuals
:math:`e_n = z_n - d_n`, and its coefficients depend on them through lengths and angles alone. Since
splits are linear, most of that needs no residual written down: the residual of a combination is
the combination of the points less its split.
"""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from augment.centroid.means import Split

TINY = 1e-30
"""Guards 0/0 where all residuals are zero: the mixture then stays zero."""


def mix(points: Float[Tensor, "b k d"], weights: Float[Tensor, "b k"]) -> Float[Tensor, "b d"]:
    """The weighted sum Σ_n w_n x_n."""
    return (weights[:, None] @ points)[:, 0]


class Residuals:
    """The residuals of points under a mean split, and the weights they are to be mixed by.

    Args:
        points: latents, (B, K, C, H, W).
        weights: on the simplex, (B, K).
        split: a mean split; see `augment.centroid.means`.
        mu: with it the split is the same for every point, this latent (C, H, W).
    """

    def __init__(
        self,
        points: Float[Tensor, "b k c h w"],
        weights: Float[Tensor, "b k"],
        split: Split,
        mu: Float[Tensor, "c h w"] | None = None,
    ) -> None:
        self.points, self.weights, self.split, self.mu = points, weights, split, mu
        self.dim = points[0, 0].numel()

    def combine(self, coefficients: Float[Tensor, "b k"]) -> tuple[Tensor, Tensor]:
        """(Σ c_n e_n, Σ c_n d_n): the first (B, C, H, W), the second broadcasts to it."""
        total = mix(self.points.flatten(2), coefficients).unflatten(-1, self.points.shape[2:])
        if self.mu is None:
            means = self.split(total)
        else:
            means = coefficients.sum(1)[:, None, None, None] * self.mu
        return total - means, means

    @cached_property
    def mixed(self) -> tuple[Tensor, Tensor]:
        """(s, d): the mixtures Σ w_n e_n (B, C, H, W) and Σ w_n d_n."""
        return self.combine(self.weights)

    @cached_property
    def length(self) -> Float[Tensor, "b 1"]:
        """‖s‖, the norm of the mixture."""
        return vector_norm(self.mixed[0].flatten(1), dim=-1, keepdim=True).clamp_min(TINY)

    @cached_property
    def means(self) -> Float[Tensor, "b k ..."]:
        """The d_n."""
        return self.split(self.points) if self.mu is None else self.mu.expand_as(self.points)

    @property
    def _flat(self) -> bool:
        """Whether d is constant over the pixels, and so a projection: ‖e‖² = ‖z‖² − ‖d‖²."""
        return self.means.shape[-2:] != self.points.shape[-2:]

    @cached_property
    def norms(self) -> Float[Tensor, "b k"]:
        """‖e_n‖."""
        if not self._flat:
            return vector_norm((self.points - self.means).flatten(2), dim=-1)
        means = self.means.flatten(2)
        shared = means.square().sum(-1) * (self.dim / means.shape[-1])
        square = vector_norm(self.points.flatten(2), dim=-1).square()
        return (square - shared).clamp_min(0).sqrt()

    @cached_property
    def gram(self) -> Float[Tensor, "b k k"]:
        """The inner products e_n · e_m, float64."""
        if not self._flat:
            flat = (self.points - self.means).flatten(2)
            return (flat @ flat.mT).double()
        flat, means = self.points.flatten(2), self.means.flatten(2)
        return (flat @ flat.mT).double() - (means @ means.mT).double() * (
            self.dim / means.shape[-1]
        )

    @cached_property
    def cosines(self) -> Float[Tensor, "b k k"]:
        """The cosines of the angles between residuals, float64.

        A residual a thousand times shorter than the longest is rounding: it has no direction, and
        counts as being at a right angle to the others.
        """
        square = self.gram.diagonal(dim1=-2, dim2=-1)
        real = square > 1e-6 * square.amax(-1, keepdim=True)
        scale = torch.where(real, square.clamp_min(TINY).rsqrt(), 0)
        cosines = (self.gram * scale[:, :, None] * scale[:, None]).clamp(-1, 1)
        # rounding must not part a direction from itself
        return cosines.diagonal_scatter(torch.ones_like(square), dim1=-2, dim2=-1)
