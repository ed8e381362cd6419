r"""How a norm rule amplifies a small bias of latents.

Inverted latents share a small bias: :math:`z_n = d + e_n`, where d, mostly a mean of each channel,
has mean square δ² and the independent :math:`e_n` variance v an element. An average with weights
w keeps d whole, but of the rest only a fraction √q, :math:`q = \sum_n w_n^2`:

.. math:: \tfrac1D\, \mathbb E \bigl\|\textstyle\sum_n w_n z_n\bigr\|^2 = \delta^2 + v q, \qquad
          \mathbb E\,q = \frac{\alpha + 1}{N\alpha + 1} \text{ for } w \sim \mathrm{Dir}(\alpha).

A rule that restores the norm √D with split ``0`` multiplies all of it, the bias too, by
:math:`1/\sqrt{\delta^2 + v q}`: about 1/√q while d is small (√N for equal weights), and never more
than 1/δ, where only d is left. Images degenerate as the bias grows (Landolsi & Kahl, *Addressing
degeneracies in latent interpolation for diffusion models*, arXiv 2505.07481, sec. 4).
`augment.measure.latents` estimates δ² and v.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from augment.centroid.residuals import TINY
from augment.centroid.rule import Rule
from augment.core.rng import rng
from augment.measure.latents import ChannelMeans, LatentStatistics
from augment.plan.weights import expected_count

BIAS_THRESHOLD = 0.25
"""Channel mean, in standard deviations of the noise, that is warned of.

Images of ``tiny`` under ``fix/0`` turn dark between 0.21 and 0.35.
"""


def amplification(count: int, alpha: float) -> float:
    r"""Return the gain of a small bias, :math:`\sqrt{(N\alpha+1)/(\alpha+1)} = 1/\sqrt{E q}`.

    Args:
        count: number N of members of a centroid, at least 1.
        alpha: concentration of their Dirichlet weights, 0 ≤ α ≤ ∞; ∞ means equal weights, gain √N.

    Raises:
        UserError: α is negative or not a number, or count is not positive.

    >>> amplification(64, 0.0), amplification(64, math.inf)
    (1.0, 8.0)
    """
    return math.sqrt(expected_count(alpha, count))


def predicted_bias(statistics: LatentStatistics, count: int, alpha: float) -> float:
    """Predict the largest absolute channel mean of centroids under ``fix/0``.

    It is ``|d| / √(δ² + v q)``; d, δ², v and q are those of the module's docstring.
    The formula takes the expectation of q, which varies with the weights. It is exact for α = ∞,
    2 % too low at α = 1, and 8 % too low at worst. Even white latents share a little by chance.

    Args:
        statistics: statistics of the class's latents.
        count: number N of members of a centroid, as in `amplification`.
        alpha: concentration of their weights, as in `amplification`.

    Raises:
        UserError: as in `amplification`.
    """
    q, shared = amplification(count, alpha) ** -2, max(statistics.shared, 0.0)
    return statistics.largest[0] / math.sqrt(max(shared + (statistics.energy - shared) * q, TINY))


def measured_bias(
    latents: Float[Tensor, "n c h w"], rule: str, count: int, draws: int = 16
) -> float:
    """Measure what a rule makes of the largest absolute channel mean of a class.

    Args:
        latents: latents of the class.
        rule: name of the rule, such as ``fix/0``.
        count: number of members of a centroid, in equal parts, at most n.
        draws: number of centroids to average; one if all n are members.
    """
    channel, generator = latents.mean((0, 2, 3)).abs().argmax(), rng(0, "order", count)
    draws = draws if count < len(latents) else 1
    rows = [torch.from_numpy(generator.permutation(len(latents))[:count]) for _ in range(draws)]
    weights = torch.full((draws, count), 1 / count)
    centroids = Rule.parse(rule)(latents[torch.stack(rows)], weights)
    return centroids[:, channel].mean().abs().item()


def bias_warning(
    statistics: ChannelMeans,
    centroids: Float[Tensor, "n c"],
    averages: Float[Tensor, "n c"],
    rule: str,
) -> str | None:
    """Describe in one sentence how a rule amplifies a class's bias; None if it does not.

    Args:
        statistics: channel means of the class's latents.
        centroids: channel means of centroids of the class under the rule.
        averages: channel means of the plain weighted averages of the same members.
        rule: name of the rule.
    """
    times = ((centroids * averages).sum() / averages.square().sum().clamp_min(TINY)).item()
    largest, error = statistics.largest
    if not statistics.biased or times < 1.5 or times * largest < BIAS_THRESHOLD:
        return None
    norm, split = rule.split("/")
    other = f"{norm}/chm" if split != "chm" else "lin/0"
    return (
        f"{rule} makes the channel means {times:.1f} times those of the latents, up to "
        f"{times * largest:.2f} where they are {largest:.3f} ± {error:.3f}; the images will fade "
        f"or take on a tint, the more the more members are mixed; {other} keeps them"
    )
