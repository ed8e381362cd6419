r"""What a norm rule may know about the residuals it mixes, each thing computed once and when asked.

Every rule's result is a linear combination :math:`\sum_n c_n e_n` of the residuals
:math:`e_n = z_n - d_n`, and its coefficients depend on them through lengths and angles alone. Since
splits are linear, the residual of a combination is the combination of the points less its split; so
many rules need no residual written down. Where the split is an orthogonal projection (``m`` and
``chm``), neither do lengths and angles, for

.. math:: e_n \cdot e_m = z_n \cdot z_m - d_n \cdot d_m.

This difference is trusted where ‖d_n‖² is not most of ‖z_n‖². Elsewhere the length is NaN, and the
rule computes that row anew, by residuals written down (``exact``). Reading the points takes most of
the time, so what needs them twice goes through them block by block, in the cache.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from augment.centroid.means import PROJECTIONS, Split, nothing

TINY = 1e-30
"""Guards 0/0."""
SHARED = 0.75
"""The part of ‖z‖² that ‖d‖² may be: the difference then loses two binary digits."""
BLOCK = 2**18
"""Elements, 1 MiB of float32, that stay in the cache of a core with what is made of them."""
LAUNCH = 2**24
"""Elements that take another device longer than it takes to tell it so."""


def mix(
    points: Float[Tensor, "b k *d"],
    weights: Float[Tensor, "b k"],
    out: Float[Tensor, "b *d"] | None = None,
) -> Float[Tensor, "b *d"]:
    """The weighted sum Σ_n w_n x_n."""
    if out is None:
        return (weights[:, None] @ points.flatten(2)).view(points[:, 0].shape)
    torch.bmm(weights[:, None], points.flatten(2), out=out.flatten(1)[:, None])
    return out


def block(rows: Float[Tensor, "b *_"]) -> int:
    """How many rows are a block for every core, or enough at once for another device."""
    size = BLOCK * torch.get_num_threads() if rows.device.type == "cpu" else LAUNCH
    return max(1, size // max(math.prod(rows.shape[1:]), 1))


def blocks(rows: Float[Tensor, "b *_"]) -> Iterator[slice]:
    """Slices of a block each."""
    step = block(rows)
    return (slice(start, start + step) for start in range(0, len(rows), step))


class Residuals:
    """The residuals of points under a mean split, and the weights they are to be mixed by.

    Args:
        points: latents, (B, K, C, H, W).
        weights: on the simplex, (B, K).
        split: a mean split; see `augment.centroid.means`.
        mu: with it the split is the same for every point, this latent (C, H, W).
        exact: write residuals down; else lengths are NaN where that would be needed.
        out: where the mixture is to be written, unless a gradient is asked for.
    """

    def __init__(
        self,
        points: Float[Tensor, "b k c h w"],
        weights: Float[Tensor, "b k"],
        split: Split,
        mu: Float[Tensor, "c h w"] | None = None,
        exact: bool = False,
        out: Float[Tensor, "b c h w"] | None = None,
    ) -> None:
        self.points, self.weights, self.split, self.mu = points, weights, split, mu
        self.dim, self.out = math.prod(points.shape[2:]), out
        self.whole = split is nothing and mu is None  # the residuals are the points themselves
        self.projected = split in PROJECTIONS and not exact
        self.rounding = 16 * torch.finfo(points.dtype).eps

    @cached_property
    def total(self) -> Float[Tensor, "b c h w"]:
        """Σ w_n z_n."""
        return mix(self.points, self.weights, self.out)

    def mean(self, total: Float[Tensor, "b c h w"], coefficients: Float[Tensor, "b k"]) -> Tensor:
        """Σ c_n d_n, which broadcasts to the total Σ c_n z_n that it is of."""
        if self.mu is None:
            return self.split(total)
        return coefficients.sum(1)[:, None, None, None] * self.mu

    @cached_property
    def mixed(self) -> tuple[Tensor, Tensor]:
        """(s, d): the mixtures Σ w_n e_n (B, C, H, W) and Σ w_n d_n."""
        mean = self.mean(self.total, self.weights)
        # in place, for no gradient asks for the total; and nothing need not be taken away
        return (self.total if self.whole else self.total.sub_(mean)), mean

    @cached_property
    def length(self) -> Float[Tensor, "b 1"]:
        """‖s‖, the norm of the mixture; ∞ if that is only rounding, so that nothing enlarges it."""
        mixture, mean = (x.flatten(1) for x in self.mixed)
        length = vector_norm(mixture, dim=-1, keepdim=True)
        whole = vector_norm(mean, dim=-1, keepdim=True) * (self.dim / mean.shape[1]) ** 0.5
        return length.masked_fill(length <= self.rounding * whole + TINY, torch.inf)

    @cached_property
    def norms(self) -> Float[Tensor, "b k"]:
        """‖e_n‖."""
        norms, means = self.measured(lambda x: vector_norm(x, dim=-1))
        if means is None:
            return norms
        square, common = norms.square(), vector_norm(means, dim=-1).square()
        return (square - common).where(common <= SHARED * square, torch.nan).sqrt()

    def measured(self, measure: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None]:
        """What a function says of the residuals (B, K, D), some rows at a time, and None.

        Or, where they are not written down, of the points, and vectors (B, K, ·) like the d_n.
        """
        found, means = [], []
        for points in self.passing():
            if not (self.whole or self.projected):
                points = points - (self.split(points) if self.mu is None else self.mu)
            found.append(measure(points.flatten(2)))
            if self.projected:
                means.append(self.split(points).flatten(2))
        if not means:
            return torch.cat(found), None
        means = torch.cat(means)
        return torch.cat(found), means * (self.dim / means.shape[2]) ** 0.5

    def passing(self) -> Iterator[Float[Tensor, "b k c h w"]]:
        """The points block by block, each mixed while at hand if they are not mixed yet."""
        step = block(self.points)
        parts = self.points.split(step)
        if self.out is None or "total" in vars(self):
            yield from parts
            return
        self.total, into = self.out, self.out.flatten(1)[:, None].split(step)
        for part, weights, out in zip(parts, self.weights[:, None].split(step), into, strict=True):
            torch.bmm(weights, part.flatten(2), out=out)
            yield part
