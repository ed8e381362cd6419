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

For points more than 90° apart both start at the direction of the weighted mean and give the
stationary point they reach from there; towards a point opposite to the iterate, where the way has
no direction, the pull is bounded. Exactly opposite points of equal weights have no mean direction:
the result is zero, as under every rule.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from augment.centroid.angles import Angles
from augment.centroid.residuals import TINY

Cosines = Float[Tensor, "b k k"]
Coefficients = Float[Tensor, "b k"]
SHORT = 1e-6
"""Sines below this are rounding, and are held up to it."""
SAME = 1 - 5e-7
"""Directions of a larger cosine, within 1e-3, count as one: float32 tells no better."""


def normalised(cosines: Cosines, a: Coefficients) -> tuple[Coefficients, Coefficients]:
    """The unit vector along Σ a_n u_n, and its cosines to the points."""
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
    """Iterate a ← step(a, its cosines, weights), normalised, until none moves by more than 1e-10.

    A row that has come to rest stays as it is, and so do those not ``moving`` from the start.
    """
    a, cosine = normalised(cosines, start)
    found, rows = a, torch.arange(len(a), device=a.device)
    still = rows if moving is None else moving.nonzero()[:, 0]
    for _ in range(300):
        if len(still) < len(rows):  # go on with fewer
            rows, cosines, weights, a, cosine = (
                x[still] for x in (rows, cosines, weights, a, cosine)
            )
        if not len(rows):
            break
        before, (a, cosine) = a, normalised(cosines, step(a, cosine, weights))
        found = found.index_copy(0, rows, a)
        still = ((a - before).abs().amax(-1) > 1e-10).nonzero()[:, 0]
    return found


def frechet_mean(cosines: Cosines, weights: Coefficients, start: Coefficients) -> Coefficients:
    """Coefficients on the unit vectors of their weighted Fréchet mean, from a starting direction.

    Args:
        cosines: C, float64.
        weights: on the simplex, float64.
        start: coefficients of a direction.
    """

    def step(a: Coefficients, cosine: Coefficients, weights: Coefficients) -> Coefficients:
        sine = (1 - cosine.square()).sqrt().clamp_min(SHORT)
        pull = weights * torch.where(sine > SHORT, cosine.acos() / sine, 1.0)
        stretch = (pull * cosine).sum(-1, keepdim=True)
        # no step may be longer than the flattest direction allows, nor turn around
        return a + (pull - stretch * a) / stretch.clamp(0.55, 1)

    return settle(cosines, weights, start, step)


def geometric_median(cosines: Cosines, weights: Coefficients, start: Coefficients) -> Coefficients:
    """Coefficients on the unit vectors of their weighted geometric median; see `frechet_mean`.

    Where one point has more weight than the pulls of all others together, the median *is* that
    point: of two points the heavier one, of K at right angles the first as soon as
    w_1² > Σ_{n>1} w_n². The iteration would only creep there, so the likeliest point, the one of
    least cost, is tried first. Near the threshold 300 steps may end 0.1 radian away, at a cost
    within 1e-4 of the least.
    """
    cost = (cosines.acos() @ weights[..., None])[..., 0].masked_fill(weights == 0, torch.inf)
    vertex = torch.nn.functional.one_hot(cost.argmin(-1), weights.shape[-1]).to(weights)
    cosine = (cosines @ vertex[..., None])[..., 0]
    pulls = weights / (1 - cosine.square()).clamp_min(1 - SAME**2).sqrt()
    pulls = torch.where(cosine.abs() > SAME, 0, pulls)
    along = (pulls * cosine).sum(-1)
    force = ((cosines @ pulls[..., None])[..., 0] * pulls).sum(-1) - along.square()
    # what lies opposite pulls whichever way one goes
    force = force.clamp_min(0).sqrt() + (weights * (cosine < -SAME)).sum(-1)
    held = (weights * (cosine > SAME)).sum(-1)
    stuck = force < held * (1 - 1e-9)

    def step(a: Coefficients, cosine: Coefficients, weights: Coefficients) -> Coefficients:
        return weights / (1 - cosine.square()).clamp_min(SHORT**2).sqrt()

    return settle(cosines, weights, torch.where(stuck[:, None], vertex, start), step, ~stuck)


def slerp(residuals: Angles) -> Float[Tensor, "b k"]:
    """Spherical interpolation of K points: the Fréchet mean, of norm Σ w_n ‖e_n‖.

    For two points it is the slerp of Shoemake, *Animating rotation with quaternion curves*,
    SIGGRAPH 1985, at a constant angular speed.
    """
    norms, weights = residuals.norms, residuals.weights.double()
    a = frechet_mean(residuals.cosines, weights, weights * norms)
    return residuals.from_units((weights * norms).sum(-1, keepdim=True) * a)
