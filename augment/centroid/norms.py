r"""Norm rules: how the residuals that a mean split leaves are mixed.

Averaging shrinks: for N independent latents of norm √D and equal weights the mixture
:math:`s = \sum_n w_n e_n` has the norm √(D/N), far from any the backbone was trained on. A rule is
a function of `Residuals` that returns a gain g (B, 1), for g·s, or one coefficient a residual
(B, K), for :math:`\sum_n c_n e_n`. With q = Σ w_n² (so that 1/q is the effective count):

=============  ================================================  ==================================
rule           gain g, or what the result is                      norm of the result
=============  ================================================  ==================================
``lin``        1                                                 that of the average
``fix``        √D / ‖s‖                                          √D, always
``mode``       √(D − 1) / ‖s‖                                    the likeliest of a latent, always
``nin``        Σ w_n ‖e_n‖ / ‖s‖                                 the interpolated norm of the inputs
``vp``         1 / √q                                            √D in expectation, if independent
``fade``       (q·Σ w_n ‖e_n‖ + (1 − q)·√D) / ‖s‖                nin's at a vertex, fix's amid many
``slerp``      the Fréchet mean of the directions                the interpolated norm of the inputs
``raw_slerp``  its coefficients, applied to the raw residuals    near those of the inputs, or beyond
``nao``        the geometric median of the directions            √(D − 1), or the heavy input's own
``circle``     a place on the great circle of two                that of the two, where it is one
=============  ================================================  ==================================

``lin``, ``fix`` and ``nin`` are those of Landolsi & Kahl, *Addressing degeneracies in latent
interpolation for diffusion models*, arXiv 2505.07481, sec. 3. ``mode`` is the standardised centroid
of the chi law (see `augment.centroid.prior`). ``vp`` is the variance-preserving gain of Bodin et
al., *Linear combinations of latents in generative models*, arXiv 2408.08558; with the split ``mu``,
it is their LOL, :math:`z = (1 - a/\sqrt b)\mu + \sum_n w_n x_n / \sqrt b`, a = Σ w_n, b = Σ w_n²,
also named ``lol``. ``fade`` is ours: it gives back an input exactly where it is alone, and
trusts the prior where many are mixed. The others have files of their own.

Where all residuals are zero up to rounding, so is the result, under every rule.

To add a rule: write the function here (or in a file of its own) and enter it in `GAINS` or
`COEFFICIENTS`; the laws of ``tests/centroid/test_centroid_laws.py`` then run over it. NaN in must
give NaN out.
"""

from collections import ChainMap
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from augment.centroid.circle import circle
from augment.centroid.nao import nao
from augment.centroid.prior import modal_norm, nominal_norm
from augment.centroid.residuals import Residuals
from augment.centroid.spherical import raw_slerp, slerp

Gain = Float[Tensor, "b 1"]


def _mean_norm(residuals: Residuals) -> Gain:
    """Return Σ_n w_n ‖e_n‖."""
    return (residuals.weights * residuals.norms).sum(-1, keepdim=True)


def _concentration(weights: Float[Tensor, "b k"]) -> Gain:
    """Return q = Σ_n w_n²: 1 at a vertex, 1/N for N equal weights."""
    return weights.square().sum(-1, keepdim=True)


def lin(residuals: Residuals) -> Gain:
    return residuals.weights.new_ones(len(residuals.weights), 1)


def fix(residuals: Residuals) -> Gain:
    return nominal_norm(residuals.dim) / residuals.length


def mode(residuals: Residuals) -> Gain:
    return modal_norm(residuals.dim) / residuals.length


def nin(residuals: Residuals) -> Gain:
    return _mean_norm(residuals) / residuals.length


def vp(residuals: Residuals) -> Gain:
    return _concentration(residuals.weights).rsqrt()


def fade(residuals: Residuals) -> Gain:
    q, nominal = _concentration(residuals.weights), nominal_norm(residuals.dim)
    return (q * _mean_norm(residuals) + (1 - q) * nominal) / residuals.length


GAINS: dict[str, Callable[[Residuals], Gain]] = {
    rule.__name__: rule for rule in (lin, fix, mode, nin, vp, fade)
}
"""Norm rules that multiply the mixture by a gain, by name."""

COEFFICIENTS: dict[str, Callable[[Residuals], Float[Tensor, "b k"]]] = {
    rule.__name__: rule for rule in (slerp, raw_slerp, nao, circle)
}
"""Norm rules that mix by coefficients other than the weights, by name."""

NORMS = ChainMap[str, Callable[..., Tensor]](COEFFICIENTS, GAINS)
"""All norm rules by name, as a view of both tables."""
