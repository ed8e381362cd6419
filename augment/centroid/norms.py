r"""Norm rules: how long the mixture :math:`s = \sum_n w_n e_n` of residuals shall be.

Averaging shrinks: for N independent latents of norm √D and equal weights ‖s‖ ≈ √(D/N), far from
any norm the backbone was trained on. Each rule is a function ``(residuals, weights) → mixture``
that returns :math:`g\,s` with its own gain g. With q = Σ w_n² (so that 1/q is the effective count):

========  =================================================  ===================================
rule      gain g                                             norm of the result
========  =================================================  ===================================
``lin``   1                                                  that of the average
``fix``   √D / ‖s‖                                           √D, always
``nin``   Σ w_n ‖e_n‖ / ‖s‖                                  the interpolated norm of the inputs
``vp``    1 / √q                                             √D in expectation, if independent
``fade``  (q·Σ w_n ‖e_n‖ + (1 − q)·√D) / ‖s‖                 nin's at a vertex, fix's amid many
========  =================================================  ===================================

``lin``, ``fix`` and ``nin`` are those of Landolsi & Kahl, *Mean-adjusted interpolation*, arXiv
2505.07481, sec. 3; ``vp`` is the variance-preserving gain of Bodin et al., arXiv 2408.08558 with
μ = 0; ``fade`` is ours: it gives back an input exactly where it is alone, and trusts the prior
where many are mixed.

To add a rule: write the function here (or in a file of its own) and enter it in `NORMS`; the laws
of ``tests/test_centroid_laws.py`` then run over it.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.linalg import vector_norm

from augment.prior import nominal_norm

Points = Float[Tensor, "b k d"]
Weights = Float[Tensor, "b k"]
Mixture = Float[Tensor, "b d"]

TINY = 1e-30
"""Guards 0/0 where all residuals are zero: the mixture then stays zero."""


def mix(points: Points, weights: Weights) -> Mixture:
    """The weighted sum Σ_n w_n x_n."""
    return (weights[:, None] @ points)[:, 0]


def rescaled(mixture: Mixture, norm: Float[Tensor, "b 1"] | float) -> Mixture:
    """The mixture, lengthened or shortened to a norm."""
    return mixture * (norm / vector_norm(mixture, dim=-1, keepdim=True).clamp_min(TINY))


def mean_norm(points: Points, weights: Weights) -> Float[Tensor, "b 1"]:
    """Σ_n w_n ‖x_n‖."""
    return (weights * vector_norm(points, dim=-1)).sum(-1, keepdim=True)


def concentration(weights: Weights) -> Float[Tensor, "b 1"]:
    """Q = Σ_n w_n²: 1 at a vertex, 1/N in the middle of N."""
    return weights.square().sum(-1, keepdim=True)


def lin(residuals: Points, weights: Weights) -> Mixture:
    return mix(residuals, weights)


def fix(residuals: Points, weights: Weights) -> Mixture:
    return rescaled(mix(residuals, weights), nominal_norm(residuals.shape[-1]))


def nin(residuals: Points, weights: Weights) -> Mixture:
    return rescaled(mix(residuals, weights), mean_norm(residuals, weights))


def vp(residuals: Points, weights: Weights) -> Mixture:
    return mix(residuals, weights) / concentration(weights).sqrt()


def fade(residuals: Points, weights: Weights) -> Mixture:
    q, nominal = concentration(weights), nominal_norm(residuals.shape[-1])
    return rescaled(mix(residuals, weights), q * mean_norm(residuals, weights) + (1 - q) * nominal)


NORMS: dict[str, Callable[[Points, Weights], Mixture]] = {
    "lin": lin,
    "fix": fix,
    "nin": nin,
    "vp": vp,
    "fade": fade,
}
"""Norm rules by name."""
