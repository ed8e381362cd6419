r"""What a norm rule may know about the residuals it mixes, each thing computed once and when asked.

Every rule's result is a linear combination :math:`\sum_n c_n e_n` of the residuals
:math:`e_n = z_n - d_n`, and its coefficients depend on them through lengths and angles alone. Since
splits are linear, the residual of a combination is the combination of the points less its split; so
many rules need no residual written down. The others go through them block by block, in the cache.
"""

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vector_norm

from augment.centroid.means import Split, nothing

TINY = 1e-30
"""Guards 0/0."""
BLOCK = 2**19
"""Elements, 2 MiB of float32, that with a few temporaries of their size stay in the cache."""


def mix(points: Float[Tensor, "b k d"], weights: Float[Tensor, "b k"]) -> Float[Tensor, "b d"]:
    """The weighted sum Σ_n w_n x_n."""
    return (weights[:, None] @ points)[:, 0]


def blocks(rows: int, elements: int) -> Iterator[slice]:
    """Slices of so many rows that a block of ``elements`` each stays within `BLOCK`."""
    step = max(1, BLOCK // max(elements, 1))
    for start in range(0, max(rows, 1), step):
        yield slice(start, start + step)


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
        self.dim = math.prod(points.shape[2:])
        self.rounding = 16 * torch.finfo(points.dtype).eps

    def combine(self, coefficients: Float[Tensor, "b k"]) -> tuple[Tensor, Tensor]:
        """(Σ c_n z_n, Σ c_n d_n): the first (B, C, H, W), the second broadcasts to it."""
        total = mix(self.points.flatten(2), coefficients).unflatten(-1, self.points.shape[2:])
        if self.mu is None:
            return total, self.split(total)
        return total, coefficients.sum(1)[:, None, None, None] * self.mu

    @cached_property
    def mixed(self) -> tuple[Tensor, Tensor]:
        """(s, d): the mixtures Σ w_n e_n (B, C, H, W) and Σ w_n d_n."""
        total, mean = self.combine(self.weights)
        # in place, for no gradient asks for the total; and nothing need not be taken away
        return (total if self._whole else total.sub_(mean)), mean

    @property
    def _whole(self) -> bool:
        """Whether residuals are the points themselves."""
        return self.split is nothing and self.mu is None

    @cached_property
    def length(self) -> Float[Tensor, "b 1"]:
        """‖s‖, the norm of the mixture; ∞ if that is only rounding, so that nothing enlarges it."""
        mixture, mean = (x.flatten(1) for x in self.mixed)
        length = vector_norm(mixture, dim=-1, keepdim=True)
        whole = vector_norm(mean, dim=-1, keepdim=True) * (self.dim / mean.shape[1]) ** 0.5
        return length.masked_fill(length <= self.rounding * whole + TINY, torch.inf)

    def each(self) -> Iterator[Float[Tensor, "b k d"]]:
        """The residuals, some rows at a time."""
        for rows in blocks(len(self.points), self.points[:1].numel()):
            points = self.points[rows]
            if not self._whole:
                points = points - (self.split(points) if self.mu is None else self.mu)
            yield points.flatten(2)

    @cached_property
    def norms(self) -> Float[Tensor, "b k"]:
        """‖e_n‖."""
        return torch.cat([vector_norm(part, dim=-1) for part in self.each()])

    @cached_property
    def gram(self) -> Float[Tensor, "b k k"]:
        """The inner products e_n · e_m, added up in the points' type, then float64."""
        return torch.cat([part @ part.mT for part in self.each()]).double()

    @cached_property
    def real(self) -> Bool[Tensor, "b k"]:
        """Whether a residual is more than its own point's rounding: else it has no direction."""
        whole = vector_norm(self.points.flatten(2), dim=-1)
        return self.norms > self.rounding * whole + TINY

    @cached_property
    def cosines(self) -> Float[Tensor, "b k k"]:
        """Of the angles between residuals, float64; without a direction at a right angle to all."""
        square = self.gram.diagonal(dim1=-2, dim2=-1)
        scale = torch.where(self.real, square.clamp_min(TINY).rsqrt(), 0)
        cosines = (self.gram * scale[:, :, None] * scale[:, None]).clamp(-1, 1)
        # rounding must not part a direction from itself
        return cosines.diagonal_scatter(torch.ones_like(square), dim1=-2, dim2=-1)

    def from_units(self, a: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """Coefficients on the residuals, of coefficients ``a`` on their unit vectors."""
        on_residuals = a / self.norms.double().clamp_min(TINY)
        return torch.where(self.real, on_residuals, 0).to(self.weights)
