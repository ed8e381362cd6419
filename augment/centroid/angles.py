"""The angles between residuals, for rules that mix in other shares than the weights."""

from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.linalg import vector_norm

from augment.centroid.residuals import SHARED, TINY, Residuals, blocks, mix


class Angles(Residuals):
    """Residuals of which all inner products are wanted, and so no length by itself."""

    @cached_property
    def products(self) -> tuple[Tensor, Tensor | None]:
        """Of the residuals, or of the points and vectors of d_n; see `Residuals.measured`."""
        return self.measured(lambda x: x @ x.mT)

    @cached_property
    def gram(self) -> Float[Tensor, "b k k"]:
        """The inner products e_n · e_m, added up in the points' type, then float64."""
        gram, means = self.products
        if means is None:
            return gram.double()
        common = means @ means.mT
        square, shared = (x.diagonal(dim1=-2, dim2=-1) for x in (gram, common))
        trusted = (shared <= SHARED * square).all(-1)[:, None, None]
        return (gram - common).where(trusted, torch.nan).double()

    @cached_property
    def norms(self) -> Float[Tensor, "b k"]:
        """‖e_n‖, float64."""
        return self.gram.diagonal(dim1=-2, dim2=-1).clamp_min(TINY**2).sqrt()

    @cached_property
    def real(self) -> Bool[Tensor, "b k"]:
        """Whether a residual is more than its own point's rounding: else it has no direction."""
        known = self.whole or self.projected  # then it is a quarter of ‖z‖² at least, or NaN
        whole = 0 if known else vector_norm(self.points.flatten(2), dim=-1)
        # so written that NaN counts as real, and is passed on
        return ~(self.norms <= self.rounding * whole + TINY)

    @cached_property
    def cosines(self) -> Float[Tensor, "b k k"]:
        """Of the angles between residuals, float64; without a direction at a right angle to all."""
        scale = torch.where(self.real, 1 / self.norms, 0)
        cosines = (self.gram * scale[:, :, None] * scale[:, None]).clamp(-1, 1)
        # rounding must not part a direction from itself
        return cosines.diagonal_scatter(torch.ones_like(scale), dim1=-2, dim2=-1)

    def from_units(self, a: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        """Coefficients on the residuals, of coefficients ``a`` on their unit vectors."""
        return torch.where(self.real, a / self.norms, 0).to(self.weights)

    def combined(self, coefficients: Float[Tensor, "b k"]) -> Float[Tensor, "b c h w"]:
        """Σ c_n e_n + Σ w_n d_n."""
        total, rest = mix(self.points, coefficients), self.weights - coefficients
        if self.whole:
            return total
        means = self.products[1]
        if means is None:
            for rows in blocks(total):
                total[rows] += self.mean(mix(self.points[rows], rest[rows]), rest[rows])
            return total
        scale = (means.shape[2] / self.dim) ** 0.5
        return total.add_(scale * mix(means, rest)[:, :, None, None])
