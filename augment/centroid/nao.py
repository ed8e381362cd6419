r"""Norm-aware optimisation (NAO): the centroid nearest to all points by likely paths, solved.

Samuel et al., *Norm-guided latent space exploration for text-to-image generation*, arXiv
2306.08687, measure a path γ between latents by how unlikely the norms along it are,

.. math:: \int \rho(\|\gamma\|)\, \|\gamma'\|\, ds, \qquad
          \rho(r) = -\log\chi_D(r) \approx 0.57 + (r - r_0)^2, \quad r_0 = \sqrt{D - 1},

(`augment.centroid.prior.log_chi`), and call *centroid* the c of least
:math:`\sum_n d(p_n, c) + \rho(\|c\|)`; here :math:`\sum_n K w_n\, d(p_n, c)`, for the weights are
ours. They cut each path in 49 pieces and run Adam in D
dimensions for thousands of steps. None of that is needed:

The metric is radially symmetric, so geodesics are plane curves that obey Clairaut's relation
:math:`\rho(r)\, r \sin\psi = h` (ψ the angle to the radius). They leave for the norm r_* where
ρ(r) r is least (r_0 less 0.29/√D), follow that sphere, and leave it as late as they can. With
:math:`h_* = \rho(r_*)\, r_* \approx 0.57\,r_0`,

.. math:: d(a, b, \theta) = h_*\, \theta + A(a) + A(b), \qquad
          A(r) = \Bigl|\int_{r_*}^{r} \sqrt{\rho(s)^2 - h_*^2 / s^2}\; ds\Bigr|,

but for a part that fades as exp(−1.9 r_0 θ): for angles beyond a tenth of a radian it is exact to
every digit that matters. The ways to the sphere A(p_n) do not depend on c, so what is left to
minimise is :math:`\sum_n w_n \theta_n`: **the NAO centroid is the weighted geometric median of the
directions** (`augment.centroid.spherical`) at the norm r_0. Three things follow:

- Equal weights, angles near 90°: it is the direction of the mean, and NAO is `mode`.
- Unequal weights, which the paper does not have: a median sticks to its heavy points. Of two points
  it is the heavier, and jumps when the weights cross; of many at right angles it turns towards the
  heaviest and has arrived as soon as w_1² > Σ_{n>1} w_n². From there on it mixes nothing.
- Stuck to a point, its way to the sphere is paid by that point too: with more than half the weight
  it stays at a norm between that point's own and r_0, whichever is cheapest. (Here the ways are
  taken along the radius, ∫ρ for A: longer by at most 0.42.)

The published polyline objective is the same problem on a coarser grid: its value at this centroid
(with its own best polylines) is below what Adam reaches; ``scripts/benchmark.py nao`` prints both.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from augment.centroid.prior import log_chi, modal_norm
from augment.centroid.residuals import Residuals
from augment.centroid.spherical import SAME_COSINE, geometric_median


def climb(norm: Float[Tensor, "*b"], dim: int) -> Float[Tensor, "*b"]:
    r"""Return the length :math:`|\int\rho|` of the radial path from a norm to the norm r_0."""
    middle = modal_norm(dim)
    # Simpson's rule is exact for the parabola that ρ is near r_0, and ρ is smooth beyond
    places = torch.linspace(0, 1, 17, dtype=norm.dtype, device=norm.device)
    simpson = torch.tensor([1, *[4, 2] * 7, 4, 1], dtype=norm.dtype, device=norm.device) / 48
    radii = middle + (norm[..., None].clamp_min(1e-3) - middle) * places
    return ((-log_chi(radii, dim)) * simpson).sum(-1) * (norm - middle).abs()


def cheapest_norm(
    own: Float[Tensor, "b 1"], held: Float[Tensor, "b 1"], count: Float[Tensor, "b 1"], dim: int
) -> Float[Tensor, "b 1"]:
    """Return the norm of a centroid in the direction of a point, between the point's own and r_0.

    The point, of norm ``own`` and share ``held`` of the weights, reaches the centroid along the
    radius, the others by way of the sphere. The norm r minimises
    count·(held·(climb(own) − climb(r)) + (1 − held)·climb(r)) + ρ(r), on a grid; count is K.
    """
    shares = torch.linspace(0, 1, 65, dtype=own.dtype, device=own.device)
    radii = torch.lerp(own.new_tensor(modal_norm(dim)), own.clamp_min(1e-3), shares)
    costs = count * (1 - 2 * held) * climb(radii, dim) - log_chi(radii, dim)
    return radii.gather(-1, costs.argmin(-1, keepdim=True))


def nao(residuals: Residuals) -> Float[Tensor, "b k"]:
    """Return the coefficients of the NAO centroid (Samuel et al., arXiv 2306.08687, sec. 4.2).

    The paper's centroid has no weights; ours multiplies the distance of point n by w_n / Σ w²,
    which is 1 for equal weights and does not count points without weight.
    """
    weights, cosines, dim = residuals.weights.double(), residuals.cosines, residuals.dim
    norms = residuals.norms.double()
    a = geometric_median(cosines, weights, weights * norms)
    heavy = a.argmax(-1, keepdim=True)
    alone = a.gather(-1, heavy) > 1 - 1e-9
    beside = cosines.gather(1, heavy[..., None].expand(-1, 1, weights.shape[1]))[:, 0] > SAME_COSINE
    held = (weights * beside).sum(-1, keepdim=True)
    count = 1 / weights.square().sum(-1, keepdim=True)
    own = cheapest_norm(norms.gather(-1, heavy), held, count, dim)
    return residuals.from_units(torch.where(alone, own, modal_norm(dim)) * a)
