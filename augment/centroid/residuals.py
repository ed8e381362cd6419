r"""What a norm rule may know about the residuals that it mixes, computed when it is asked for.

Every rule returns a linear combination :math:`\sum_n c_n e_n` of the residuals
:math:`e_n = z_n - d_n`. Its coefficients depend on the residuals through lengths and angles alone.
Splits are linear, so the mixture needs no single residual: it is the mixture of the points, less
its own split.
"""

import math
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vector_norm

from augment.centroid.means import Split

TINY = 1e-30  # guards 0/0


def mix(points: Float[Tensor, "b k *d"], weights: Float[Tensor, "b k"]) -> Float[Tensor, "b *d"]:
    """Return the weighted sum Σ_n w_n x_n."""
    return (weights[:, None] @ points.flatten(2)).view(points[:, 0].shape)


class Residuals:
    """The residuals of points under a mean split, and the weights that mix them.

    Args:
        points: latents z_n, (B, K, C, H, W).
        weights: on the simplex, (B, K).
        split: a mean split; see `augment.centroid.means`.
        mu: a latent (C, H, W) that is the split of every point; replaces ``split``.

    Attributes:
        dim: number of elements D of a latent.
        mean: Σ w_n d_n, of a shape that broadcasts to (B, C, H, W).
        mixture: s = Σ w_n e_n, (B, C, H, W).
    """

    def __init__(
        self,
        points: Float[Tensor, "b k c h w"],
        weights: Float[Tensor, "b k"],
        split: Split,
        mu: Float[Tensor, "c h w"] | None = None,
    ) -> None:
        self.points, self.weights, self.split, self.mu = points, weights, split, mu
        self.dim = math.prod(points.shape[2:])
        self.rounding = 16 * torch.finfo(points.dtype).eps
        total = mix(points, weights)
        self.mean = split(total) if mu is None else weights.sum(1)[:, None, None, None] * mu
        self.mixture = total - self.mean

    @cached_property
    def residuals(self) -> Float[Tensor, "b k d"]:
        """The residuals e_n, flattened."""
        means = self.split(self.points) if self.mu is None else self.mu
        return (self.points - means).flatten(2)

    @cached_property
    def length(self) -> Float[Tensor, "b 1"]:
        """The norm ‖s‖ of the mixture; ∞ if s is only rounding, so that no rule enlarges it."""
        mixture, mean = self.mixture.flatten(1), self.mean.flatten(1)
        length = vector_norm(mixture, dim=-1, keepdim=True)
        whole = vector_norm(mean, dim=-1, keepdim=True) * (self.dim / mean.shape[1]) ** 0.5
        return length.masked_fill(length <= self.rounding * whole + TINY, torch.inf)

    @cached_property
    def norms(self) -> Float[Tensor, "b k"]:
        """The norms ‖e_n‖."""
        return vector_norm(self.residuals, dim=-1)

    @cached_property
    def directed(self) -> Bool[Tensor, "b k"]:
        """Whether a residual is more than its point's rounding; otherwise it has no direction."""
        whole = vector_norm(self.points.flatten(2), dim=-1)
        # so written that NaN counts as directed and reaches the centroid, which is then refused
        return ~(self.norms <= self.rounding * whole + TINY)

    @cached_property
    def cosines(self) -> Float[Tensor, "b k k"]:
        """Cosines of the angles between residuals, float64; 0 beside one without a direction."""
        scale = torch.where(self.directed, 1 / self.norms, 0).double()
        gram = (self.residuals @ self.residuals.mT).double()
        cosines = (gram * scale[:, :, None] * scale[:, None]).clamp(-1, 1)
        # rounding must not part a direction from itself
        return cosines.diagonal_scatter(torch.ones_like(scale), dim1=-2, dim2=-1)

    def from_units(self, a: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """Convert coefficients on the unit vectors e_n / ‖e_n‖ to coefficients on the e_n."""
        return torch.where(self.directed, a / self.norms, 0).to(self.weights)

    def combine(self, coefficients: Float[Tensor, "b k"]) -> Float[Tensor, "b c h w"]:
        """Return Σ c_n e_n + Σ w_n d_n."""
        return mix(self.residuals, coefficients).view(self.mixture.shape) + self.mean
