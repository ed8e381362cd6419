r"""Losses for long tails.

A loss gives a table (n, k): the cost of each class being the truth of each image. `cost` then
reads the entry of an integer label, or the mixture :math:`\sum_k y_k \ell_k` of a soft one, so that
mixup, CutMix and label smoothing work with every loss. With logits z, p = softmax z, and n_k
training images of class k:

====================  ========================================================  ==============
name                  cost of class k                                           arXiv
====================  ========================================================  ==============
``cross_entropy``     −log p_k
``balanced_softmax``  cross-entropy of z + log n                                2007.10740
``logit_adjustment``  cross-entropy of z + τ log π, π = n / Σn                  2007.07314
``ldam``              cross-entropy of s·z, with z_k − Δ_k for z_k, Δ ∝ n^(−¼)  1906.07413
``class_balanced``    −w_k log p_k, w ∝ (1 − β) / (1 − β^n)                     1901.05555
``focal``             −(1 − p_k)^γ log p_k                                      1708.02002
====================  ========================================================  ==============

The counts are of the images that are drawn from: real ones, and synthetic ones that join them by
count (``fill_to``, ``per_real``). With the counts of real images alone a filled-up tail would be
corrected for twice. A class without an image counts as one of one: log 0 would forbid it for good.

To add a loss: write the dataclass here (or in a file of its own) and enter it in `LOSSES`; the laws
of ``tests/training/test_losses.py`` then run over it.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor

from augment.training.checks import at_least, expect

Logits = Float[Tensor, "n k"]
Counts = Real[Tensor, "k"]
Costs = Float[Tensor, "n k"]


@runtime_checkable
class Loss(Protocol):
    """A frozen dataclass of options, with one ``__call__``."""

    def __call__(self, logits: Logits, counts: Counts) -> Costs:
        """Return the cost of each class being the truth.

        Args:
            logits: (n, k), k ≥ 2; half precision is computed in single.
            counts: training images of each class.
        """
        ...


def _precise(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Convert to float32 at least: 65 520 images are infinitely many in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _at_least_one(counts: Counts, like: Tensor) -> Float[Tensor, "k"]:
    """Return counts in the precision of logits; zero counts as one."""
    return counts.to(like.device, _precise(like).dtype).clamp(min=1)


def log_others(logits: Logits) -> Float[Tensor, "n k"]:
    r"""Return log Σ_{j ≠ k} exp z_j for each k, without cancellation where p_k is nearly 1.

    It is lse z + log(1 − p_k) where k is not the largest, for there p_k ≤ ½; the largest one's is
    summed anew.
    """
    top = logits.argmax(-1, keepdim=True)
    is_top = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, top, True)
    without_top = logits.masked_fill(is_top, -math.inf).logsumexp(-1, keepdim=True)
    p = logits.softmax(-1).masked_fill(is_top, 0)
    return torch.where(is_top, without_top, logits.logsumexp(-1, keepdim=True) + (-p).log1p())


@dataclass(frozen=True)
class CrossEntropy:
    """−log p_k."""

    def __call__(self, logits: Logits, counts: Counts) -> Costs:  # noqa: D102
        return -F.log_softmax(_precise(logits), -1)


@dataclass(frozen=True)
class LogitAdjustment:
    """Cross-entropy of z + τ log π; Menon et al., arXiv 2007.07314, eq. 10.

    At test time the logits are used bare: they then rank classes as if all were equally frequent.

    Args:
        tau: share of the prior that is taken out, τ ≥ 0; 0 is cross-entropy.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        at_least(0, tau=self.tau)

    def __call__(self, logits: Logits, counts: Counts) -> Costs:  # noqa: D102
        counts = _at_least_one(counts, logits)
        return -F.log_softmax(logits + self.tau * (counts / counts.sum()).log(), -1)


@dataclass(frozen=True)
class BalancedSoftmax:
    """Cross-entropy of z + log n; Ren et al., *Balanced Meta-Softmax*, arXiv 2007.10740.

    The same as `LogitAdjustment` with τ = 1: their logits differ by the constant log Σn.
    """

    def __call__(self, logits: Logits, counts: Counts) -> Costs:  # noqa: D102
        return -F.log_softmax(logits + _at_least_one(counts, logits).log(), -1)


@dataclass(frozen=True)
class LDAM:
    r"""Label-distribution-aware margins; Cao et al., arXiv 1906.07413, sec. 3.2.

    .. math:: \ell_k = -\log \frac{e^{s(z_k - Δ_k)}}{e^{s(z_k - Δ_k)} + \sum_{j≠k} e^{s z_j}}
              = \mathrm{softplus}\bigl(\log \textstyle\sum_{j≠k} e^{s z_j} - s(z_k - Δ_k)\bigr)

    with Δ_k = C / n_k^¼, C such that the largest margin is ``max_margin``. The logits are cosines
    (`augment.training.models.finetune.CosineHead`); confidences are softmax(s·z).

    Args:
        max_margin: margin of the rarest class, at least 0.
        scale: s > 0.
    """

    max_margin: float = 0.5
    scale: float = 30.0

    def __post_init__(self) -> None:
        at_least(0, max_margin=self.max_margin)
        expect(self.scale > 0, "scale > 0", self.scale)

    def margins(self, counts: Counts, like: Tensor) -> Float[Tensor, "k"]:
        """Return Δ_k, in the precision of the logits."""
        counts = _at_least_one(counts, like)
        return self.max_margin * (counts.min() / counts) ** 0.25

    def __call__(self, logits: Logits, counts: Counts) -> Costs:  # noqa: D102
        scaled, margins = self.scale * _precise(logits), self.scale * self.margins(counts, logits)
        return -F.logsigmoid(scaled - margins - log_others(scaled))


def class_weights(counts: Counts, beta: float = 0.9999) -> Float[Tensor, "k"]:
    """Return weights by the effective number of images; Cui et al., arXiv 1901.05555, sec. 3 and 4.

    w_k ∝ (1 − β) / (1 − β^{n_k}), with the sum k. Deferred re-weighting (arXiv 1906.07413)
    multiplies the costs of any loss by them in the last epochs.

    >>> class_weights(torch.tensor([1, 1000]), beta=0.9999).round(decimals=4)
    tensor([1.9979, 0.0021])

    Args:
        counts: training images of each class.
        beta: in [0, 1); 0 weighs all alike, 1 would weigh by 1/n.
    """
    expect(0 <= beta < 1, "0 ≤ beta < 1", beta)
    counts = _at_least_one(counts, torch.empty(0, device=counts.device))
    log_beta = math.log(beta) if beta else -math.inf
    weights = -1 / torch.expm1(counts * log_beta)
    return weights * len(weights) / weights.sum()


@dataclass(frozen=True)
class ClassBalanced:
    """Cross-entropy, weighted by `class_weights`.

    The mean over a batch is the plain one of Cui et al.'s code, not torch's, which divides by the
    batch's own sum of weights.
    """

    beta: float = 0.9999

    def __post_init__(self) -> None:
        expect(0 <= self.beta < 1, "0 ≤ beta < 1", self.beta)

    def __call__(self, logits: Logits, counts: Counts) -> Costs:  # noqa: D102
        weights = class_weights(counts, self.beta).to(logits.device, _precise(logits).dtype)
        return -weights * F.log_softmax(_precise(logits), -1)


@dataclass(frozen=True)
class Focal:
    """−(1 − p_k)^γ log p_k of the softmax; Lin et al., arXiv 1708.02002, eq. 4.

    Args:
        gamma: how far easy images are discounted, γ ≥ 0; 0 is cross-entropy.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        at_least(0, gamma=self.gamma)

    def __call__(self, logits: Logits, counts: Counts) -> Costs:  # noqa: D102
        logits = _precise(logits)
        log_miss = log_others(logits) - logits.logsumexp(-1, keepdim=True)
        return -(self.gamma * log_miss).exp() * F.log_softmax(logits, -1)


LOSSES: dict[str, type[Loss]] = {
    "cross_entropy": CrossEntropy,
    "balanced_softmax": BalancedSoftmax,
    "logit_adjustment": LogitAdjustment,
    "ldam": LDAM,
    "class_balanced": ClassBalanced,
    "focal": Focal,
}
"""Losses by name; `augment.core.registry.make` builds them."""


def cost(costs: Costs, labels: Int[Tensor, "n"] | Float[Tensor, "n k"]) -> Float[Tensor, "n"]:
    """Return the cost of each image: its label's entry, or the mixture of a soft label's.

    Args:
        costs: what a loss gives.
        labels: classes, or their shares y, with the cost Σ_k y_k ℓ_k.
    """
    if labels.is_floating_point():
        return (labels * costs).sum(-1)
    return costs.gather(-1, labels.long()[:, None]).squeeze(-1)


def smooth(
    labels: Int[Tensor, "n"] | Float[Tensor, "n k"], k: int, amount: float = 0.0
) -> Float[Tensor, "n k"]:
    """Return soft labels (1 − a)·y + a/k; Szegedy et al., arXiv 1512.00567, sec. 7.

    >>> smooth(torch.tensor([1]), 4, 0.2)
    tensor([[0.0500, 0.8500, 0.0500, 0.0500]])

    Args:
        labels: classes, or soft labels.
        k: number of classes.
        amount: a in [0, 1]; 0 makes classes one-hot and leaves soft labels alone.
    """
    expect(0 <= amount <= 1, "0 ≤ label smoothing ≤ 1", amount)
    if not labels.is_floating_point():
        labels = F.one_hot(labels.long(), k).to(torch.get_default_dtype())
    return (1 - amount) * labels + amount / k
