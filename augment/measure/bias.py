r"""How a norm rule makes a large bias of a small one.

Inverted latents share a small bias: :math:`z_n = d + e_n`, where d, mostly a mean of each channel,
has mean square δ² and the independent :math:`e_n` variance v an element. An average with weights
w keeps d whole, but of the rest only a fraction √q, :math:`q = \sum_n w_n^2`:

.. math:: \tfrac1D\, \mathbb E \bigl\|\textstyle\sum_n w_n z_n\bigr\|^2 = \delta^2 + v q, \qquad
          \mathbb E\,q = \frac{\alpha + 1}{N\alpha + 1} \text{ for } w \sim \mathrm{Dir}(\alpha).

A rule that restores the norm √D with split ``0`` multiplies all of it, the bias too, by
:math:`1/\sqrt{\delta^2 + v q}`: about 1/√q while d is small (√N for equal weights), and never more
than 1/δ, where d is all there is. Images degenerate on the way. (Landolsi & Kahl, *Mean-adjusted
interpolation*, arXiv 2505.07481.) `augment.measure.latents` finds δ² and v.
"""

import math

from jaxtyping import Float
from torch import Tensor

from augment.centroid.residuals import TINY
from augment.measure.latents import LatentStatistics
from augment.weights import expected_count

MUCH = 0.25
"""A channel mean in standard deviations of the noise; between 0.21 and 0.35 `fix/0` turns dark."""


def amplification(count: int, alpha: float) -> float:
    r"""What a small bias is multiplied by, :math:`\sqrt{(N\alpha+1)/(\alpha+1)} = 1/\sqrt{E q}`.

    Args:
        count: members N of a centroid, at least 1.
        alpha: concentration of their Dirichlet weights, 0 ≤ α ≤ ∞ (equal weights: √N).

    Raises:
        UserError: α is negative or not a number, or count is not positive.

    >>> amplification(64, 0.0), amplification(64, math.inf)
    (1.0, 8.0)
    """
    return math.sqrt(expected_count(alpha, count))


def predicted_bias(statistics: LatentStatistics, count: int, alpha: float) -> float:
    """The largest |channel mean| to expect of centroids under ``fix/0``, |d|/√(δ² + v q).

    With the expectation of q, though it varies with the weights: exact for α = ∞, 2 % too low at
    α = 1, 8 % at worst. White latents have a little of it too: what they happen to share.

    Args:
        statistics: of the class's latents.
        count: members N of a centroid.
        alpha: concentration of their weights; both as in `amplification`.

    Raises:
        UserError: as in `amplification`.
    """
    q, shared = amplification(count, alpha) ** -2, max(statistics.shared, 0.0)
    return statistics.largest[0] / math.sqrt(max(shared + (statistics.energy - shared) * q, TINY))


def bias_warning(
    statistics: LatentStatistics,
    centroids: Float[Tensor, "n c"],
    averages: Float[Tensor, "n c"],
    rule: str,
) -> str | None:
    """What a rule does to a class's bias, in one sentence; None if there is nothing to tell.

    Args:
        statistics: of the class's latents.
        centroids: the channel means of centroids of the class by the rule.
        averages: those of the plain weighted averages of the same members.
        rule: its name.
    """
    times = ((centroids * averages).sum() / averages.square().sum().clamp_min(TINY)).item()
    largest, error = statistics.largest
    if not statistics.biased or times < 1.5 or times * largest < MUCH:
        return None
    norm, split = rule.split("/")
    other = f"{norm}/chm" if split != "chm" else "lin/0"
    return (
        f"{rule} makes the channel means {times:.1f} times those of the latents, up to "
        f"{times * largest:.2f} where they are {largest:.3f} ± {error:.3f}; the images will fade "
        f"or take on a tint, the more the more members are mixed; {other} keeps them"
    )
