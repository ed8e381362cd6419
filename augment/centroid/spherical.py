r"""Means on the sphere of directions, in the K-dimensional span of the points.

A direction in the span is :math:`m = \sum_n a_n u_n` with the points' unit vectors
:math:`u_n = e_n / \|e_n\|`; the K × K matrix C of their cosines is all that is needed: the cosines
of m to the points are C a, its square is aᵀC a. So the cost does not depend on the latents'
dimension once C is there, and a whole batch is solved at once, in float64.

- **Fréchet mean**: the minimiser of :math:`\tfrac12 \sum_n w_n \theta_n^2` over the angles θ_n to
  the points (Buss & Fillmore, *Spherical averages*, ACM TOG 20, 2001, algorithm A1). The gradient
  step m ← exp_m(t Σ w_n log_m u_n), with the step t = 1 / Σ w_n θ_n cot θ_n that its curvature
  across the points suggests, converges in about ten steps for latents, whose angles are near 90°
  or less.
- **Geometric median**: the minimiser of :math:`\sum_n w_n \theta_n`, by Weiszfeld's iteration on
  the sphere, m ← Σ (w_n / sin θ_n) u_n, normalised; for angles below 90° each step minimises an
  upper bound of the sum (arccos is concave there), so it never rises.

Both are unique where the points with weight lie in an open hemisphere (Buss & Fillmore, theorem
1). For points more than 90° apart the iteration starts at the direction of the weighted mean and
gives the stationary point it reaches from there; towards a point opposite to the iterate, where the
direction of the way is not defined, the pull is bounded. Of exactly opposite points of equal
weights the mean is zero, and so is the result, as under every rule.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from augment.centroid.residuals import TINY, Residuals

Cosines = Float[Tensor, "b k k"]
Coefficients = Float[Tensor, "b k"]
SHORT = 1e-6
"""Sines below this are rounding, and are held up to it."""


def normalised(cosines: Cosines, a: Coefficients) -> tuple[Coefficients, Coefficients]:
    """The unit vector along Σ a_n u_n, and its cosines to the points."""
    product = (cosines @ a[..., None])[..., 0]
    size = (a * product).sum(-1, keepdim=True).clamp_min(TINY).sqrt()
    return a / size, (product / size).clamp(-1, 1)


def settle(
    cosines: Cosines,
    start: Coefficients,
    step: Callable[[Coefficients, Coefficients], Coefficients],
    moving: Bool[Tensor, "b 1"] | None = None,
) -> Coefficients:
    """Iterate a ← step(a, its cosines), normalised, until no coefficient moves by more than 1e-10.

    A row that has come to rest stays as it is, and so do those not ``moving`` from the start.
    """
    a, cosine = normalised(cosines, start)
    moving = torch.ones_like(a[:, :1], dtype=torch.bool) if moving is None else moving
    for _ in range(300):
        if not moving.any():
            break
        (after, turned), before = normalised(cosines, step(a, cosine)), a
        a, cosine = torch.where(moving, after, a), torch.where(moving, turned, cosine)
        moving = (a - before).abs().amax(-1, keepdim=True) > 1e-10
    return a


def frechet_mean(cosines: Cosines, weights: Coefficients, start: Coefficients) -> Coefficients:
    """Coefficients on the unit vectors of their weighted Fréchet mean, from a starting direction.

    Args:
        cosines: C, float64.
        weights: on the simplex, float64.
        start: coefficients of a direction.
    """

    def step(a: Coefficients, cosine: Coefficients) -> Coefficients:
        sine = (1 - cosine.square()).sqrt().clamp_min(SHORT)
        pull = weights * torch.where(sine > SHORT, cosine.acos() / sine, 1.0)
        stretch = (pull * cosine).sum(-1, keepdim=True)
        # no step may be longer than the flattest direction allows, nor turn around
        return a + (pull - stretch * a) / stretch.clamp(0.55, 1)

    return settle(cosines, start, step)


def geometric_median(cosines: Cosines, weights: Coefficients, start: Coefficients) -> Coefficients:
    """Coefficients on the unit vectors of their weighted geometric median; see `frechet_mean`.

    Where one point has more weight than the pulls of all others together, the median *is* that
    point: of two points the heavier one, of K at right angles the first as soon as
    w_1² > Σ_{n>1} w_n². The iteration would only creep there, so the likeliest point, the one of
    least cost, is tried first.
    """
    cost = (cosines.acos() @ weights[..., None])[..., 0].masked_fill(weights == 0, torch.inf)
    vertex = torch.nn.functional.one_hot(cost.argmin(-1), weights.shape[-1]).to(weights)
    cosine = (cosines @ vertex[..., None])[..., 0]
    beside = 1 - cosine.square() > SHORT  # the others; points in the same place add to its weight
    pulls = torch.where(beside, weights * (1 - cosine.square()).clamp_min(SHORT).rsqrt(), 0)
    along = (pulls * cosine).sum(-1)
    force = ((cosines @ pulls[..., None])[..., 0] * pulls).sum(-1) - along.square()
    weight = torch.where(beside, 0, weights).sum(-1)
    stuck = (force.clamp_min(0).sqrt() < weight * (1 - 1e-9))[:, None]

    def step(a: Coefficients, cosine: Coefficients) -> Coefficients:
        return weights / (1 - cosine.square()).clamp_min(SHORT**2).sqrt()

    return settle(cosines, torch.where(stuck, vertex, start), step, ~stuck)


def slerp(residuals: Residuals) -> Float[Tensor, "b k"]:
    """Spherical interpolation of K points: the Fréchet mean, of norm Σ w_n ‖e_n‖.

    For two points it is the slerp of Shoemake, *Animating rotation with quaternion curves*,
    SIGGRAPH 1985, at a constant angular speed.
    """
    norms, weights = residuals.norms.double().clamp_min(TINY), residuals.weights.double()
    a = frechet_mean(residuals.cosines, weights, weights * norms)
    radius = (weights * norms).sum(-1, keepdim=True)
    return (radius * a / norms).to(residuals.weights)
