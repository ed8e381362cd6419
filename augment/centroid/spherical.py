r"""Means on the sphere of directions, in the K-dimensional span of the points.

A direction in the span is :math:`m = \sum_n a_n u_n` with the points' unit vectors
:math:`u_n = e_n / \|e_n\|`; the K × K matrix C of their cosines is all that is needed: the cosines
of m to the points are C a, its square is aᵀC a. So the cost does not depend on the latents'
dimension once C is there, and a whole batch is solved at once, in float64.

- **Fréchet mean**: the minimiser of :math:`\tfrac12 \sum_n w_n \theta_n^2` over the angles θ_n to
  the points (Buss & Fillmore, *Spherical averages*, ACM TOG 20, 2001, algorithm A1). The gradient
  step m ← m + t Σ w_n log_m u_n, normalised, with the step t = 1 / Σ w_n θ_n cot θ_n that its
  curvature across the points suggests, converges in 5 to 30 steps. Unique where the points lie in
  an open hemisphere (their theorem 1).
- **Geometric median**: the minimiser of :math:`\sum_n w_n \theta_n`, by Weiszfeld's iteration on
  the sphere, m ← Σ (w_n / sin θ_n) u_n, normalised; for angles below 90° each step minimises an
  upper bound of the sum (arccos is concave there), so it never rises. Not always unique: for two
  points of equal weight the whole arc is optimal, and the start decides.

For points more than 90° apart both start at the direction of the weighted mean and return the
stationary point that they reach from there. The pull of a point opposite to the iterate has no
direction and is bounded. Exactly opposite points of equal weights have no mean direction: the
result is zero, as under every rule.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from augment.centroid.residuals import TINY, Residuals

Cosines = Float[Tensor, "b k k"]
Coefficients = Float[Tensor, "b k"]
MIN_SINE = 1e-6  # smaller ones are rounding and are raised to it
SAME_COSINE = 1 - 5e-7
"""Directions of a larger cosine (within 1e-3 radian) count as one; float32 resolves no less."""


def normalised(cosines: Cosines, a: Coefficients) -> tuple[Coefficients, Coefficients]:
    """Return the unit vector along Σ a_n u_n, and its cosines to the points."""
    product = (cosines @ a[..., None])[..., 0]
    square = (a * product).sum(-1, keepdim=True)
    rounding = square <= 1e-14 * a.square().sum(-1, keepdim=True)
    scale = torch.where(rounding, 0, square.clamp_min(TINY).rsqrt())
    return a * scale, (product * scale).clamp(-1, 1)


def settle(
    cosines: Cosines,
    weights: Coefficients,
    start: Coefficients,
    step: Callable[[Coefficients, Coefficients, Coefficients], Coefficients],
    moving: Bool[Tensor, " b"] | None = None,
) -> Coefficients:
    """Iterate a ← step(a, its cosines, weights), normalised, until no row moves by more than 1e-10.

    A row that has converged stays as it is; rows that are not ``moving`` are never iterated.
    """
    a, cosine = normalised(cosines, start)
    result, rows = a, torch.arange(len(a), device=a.device)
    still = rows if moving is None else moving.nonzero()[:, 0]
    for _ in range(300):
        if len(still) < len(rows):  # go on with fewer
            parts = (rows, cosines, weights, a, cosine)
            rows, cosines, weights, a, cosine = (part[still] for part in parts)
        if not len(rows):
            break
        before, (a, cosine) = a, normalised(cosines, step(a, cosine, weights))
        result = result.index_copy(0, rows, a)
        still = ((a - before).abs().amax(-1) > 1e-10).nonzero()[:, 0]
    return result


def frechet_mean(cosines: Cosines, weights: Coefficients, start: Coefficients) -> Coefficients:
    """Find the weighted Fréchet mean of unit vectors, as coefficients on them, from a start's."""

    def step(a: Coefficients, cosine: Coefficients, weights: Coefficients) -> Coefficients:
        sine = (1 - cosine.square()).sqrt().clamp_min(MIN_SINE)
        pull = weights * torch.where(sine > MIN_SINE, cosine.acos() / sine, 1.0)
        stretch = (pull * cosine).sum(-1, keepdim=True)
        # no step may be longer than the flattest direction allows, nor turn around
        return a + (pull - stretch * a) / stretch.clamp(0.55, 1)

    return settle(cosines, weights, start, step)


def geometric_median(cosines: Cosines, weights: Coefficients, start: Coefficients) -> Coefficients:
    """Find the weighted geometric median of unit vectors, as coefficients; see `frechet_mean`.

    Where one point has more weight than the pulls of all others together, the median *is* that
    point: of two points the heavier one, of K at right angles the first as soon as
    w_1² > Σ_{n>1} w_n². The iteration would converge slowly there, so the point of least cost is
    tried first. Near the threshold 300 steps may end 0.1 radian away, at a cost within 1e-4 of
    the least.
    """
    cost = (cosines.acos() @ weights[..., None])[..., 0].masked_fill(weights == 0, torch.inf)
    vertex = torch.nn.functional.one_hot(cost.argmin(-1), weights.shape[-1]).to(weights)
    cosine = (cosines @ vertex[..., None])[..., 0]
    pulls = weights / (1 - cosine.square()).clamp_min(1 - SAME_COSINE**2).sqrt()
    pulls = torch.where(cosine.abs() > SAME_COSINE, 0, pulls)
    along = (pulls * cosine).sum(-1)
    force = ((cosines @ pulls[..., None])[..., 0] * pulls).sum(-1) - along.square()
    # a point opposite to the vertex pulls with its whole weight, in every direction
    force = force.clamp_min(0).sqrt() + (weights * (cosine < -SAME_COSINE)).sum(-1)
    held = (weights * (cosine > SAME_COSINE)).sum(-1)
    stuck = force < held * (1 - 1e-9)

    def step(a: Coefficients, cosine: Coefficients, weights: Coefficients) -> Coefficients:
        return weights / (1 - cosine.square()).clamp_min(MIN_SINE**2).sqrt()

    return settle(cosines, weights, torch.where(stuck[:, None], vertex, start), step, ~stuck)


def slerp(residuals: Residuals) -> Float[Tensor, "b k"]:
    """Return the coefficients of the Fréchet mean of K directions at the norm Σ w_n ‖e_n‖.

    For two points this is the slerp of Shoemake, *Animating rotation with quaternion curves*,
    SIGGRAPH 1985, at a constant angular speed.
    """
    norms, weights = residuals.norms.double(), residuals.weights.double()
    a = frechet_mean(residuals.cosines, weights, weights * norms)
    return residuals.from_units((weights * norms).sum(-1, keepdim=True) * a)


def raw_slerp(residuals: Residuals) -> Float[Tensor, "b k"]:
    """Return the coefficients of the Fréchet mean of K directions, to be applied to the points.

    This is eq. 3 of Landolsi & Kahl (arXiv 2505.07481) for two points: angles are of the normalised
    ones, coefficients multiply the raw ones. At unequal norms and an obtuse angle the result is
    shorter and longer than both; at equal norms it is `slerp`.
    """
    weights = residuals.weights.double()
    a = frechet_mean(residuals.cosines, weights, weights)
    return torch.where(residuals.directed, a, 0).to(residuals.weights)
