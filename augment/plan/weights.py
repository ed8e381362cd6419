r"""Mixing weights: points of the simplex, drawn from a Dirichlet distribution.

:math:`w \sim \mathrm{Dir}(\alpha_1, \dots, \alpha_K)` is a normalised vector of Gamma variables,
of mean :math:`\alpha_n / \sum_m \alpha_m`; one number α stands for K equal ones. For small α those
underflow (at α = 1e-3 a third of all draws of a usual sampler hold a zero or come back uniform),
so they are drawn as logarithms: :math:`\log \Gamma_\alpha = \log \Gamma_{\alpha+1} + \log(U) /
\alpha`, and normalised by a softmax (Marsaglia & Tsang, *A simple method for generating gamma
variables*, ACM TOMS 26, 2000, sec. 8).

α = 0 is a vertex (one member alone, each equally often) and α = ∞ the centre (equal weights).
`effective_count` is the number of members that a draw really mixes; `expected_count` predicts it
from α.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError


def dirichlet(
    generator: np.random.Generator, alpha: float | Sequence[float], count: int
) -> Float[Tensor, " k"]:
    """Draw ``count`` weights, float64, ≥ 0, of sum 1.

    Args:
        generator: the random generator.
        alpha: concentration, 0 ≤ α ≤ ∞; or one for each weight, finite and not all 0, where 0 makes
            a weight exactly 0.
        count: number of weights, at least 1.

    Raises:
        UserError: see `concentrations`.

    >>> dirichlet(np.random.default_rng(0), 1.0, 3).sum().item()
    1.0
    >>> dirichlet(np.random.default_rng(0), (2.0, 0.0), 2)
    tensor([1., 0.], dtype=torch.float64)
    """
    alphas = concentrations(alpha, count)
    if alphas.max() < 1e-9:  # where all but one part in 1e9 of the law sits on the vertices
        odds = alphas / alphas.sum() if isinstance(alpha, Sequence) else None
        vertex = generator.integers(count) if odds is None else generator.choice(count, p=odds)
        return torch.eye(count, dtype=torch.float64)[vertex]
    if math.isinf(alphas.max()):
        return torch.full((count,), 1 / count, dtype=torch.float64)
    floored = np.maximum(alphas, 1e-300)  # log(U) / α stays finite
    logs = np.log(generator.standard_gamma(alphas + 1))
    logs += np.log1p(-generator.random(count)) / floored
    logs[alphas == 0] = -math.inf
    return torch.from_numpy(logs).softmax(0)


def concentrations(alpha: float | Sequence[float], count: int) -> np.ndarray:
    """Return the concentration of each of ``count`` weights, float64 (count,).

    Raises:
        UserError: α is negative or not a number; of several, one is infinite, all are 0, or there
            are more or fewer than weights; or count is not positive.
    """
    if count < 1:
        raise UserError(f"expected at least one point to mix, got {count}; add images to the class")
    if not isinstance(alpha, Sequence):
        if not alpha >= 0:
            raise UserError(f"expected alpha ≥ 0, got {alpha}; 1 is uniform on the simplex")
        return np.full(count, alpha, dtype=np.float64)
    if len(alpha) != count:
        raise UserError(
            f"expected one alpha for each of {count} points, got {len(alpha)}; give as many, or "
            "one number for all"
        )
    if not all(0 <= a < math.inf for a in alpha) or not any(alpha):
        raise UserError(
            f"expected finite alphas ≥ 0, not all of them 0, got {', '.join(map(str, alpha))}; "
            "one number for all may be 0 or inf"
        )
    return np.array(alpha, dtype=np.float64)


def expected_count(alpha: float | Sequence[float], count: int) -> float:
    r"""Return the expected `effective_count`, :math:`1 / \mathrm{E} \sum_n w_n^2`.

    The mean of many draws' counts is a little above it (Jensen's inequality).

    With :math:`a = \sum_n \alpha_n` and the means :math:`m_n = \alpha_n / a`,
    :math:`\mathrm{E} \sum_n w_n^2 = (1 + a \sum_n m_n^2) / (a + 1)`; for one α this gives
    :math:`(K \alpha + 1) / (\alpha + 1)`: 1 at α = 0, half of K + 1 at 1, K at ∞.

    Args:
        alpha: concentration, or one for each weight; see `dirichlet`.
        count: number of weights, at least 1.

    Raises:
        UserError: see `concentrations`.

    >>> round(expected_count(1.0, 5), 6)
    3.0
    """
    if not isinstance(alpha, Sequence):
        concentrations(alpha, min(count, 1))  # checks both
        return count - (count - 1) / (alpha + 1)  # the same fraction, for α = ∞ too
    alphas = concentrations(alpha, count)
    alike = alphas.min() == alphas.max()
    means = np.ones(count) if alike else alphas / alphas.max()
    means /= means.sum()
    vertex = 1 / (sum(alphas.tolist()) + 1)
    return float(1 / (vertex + (1 - vertex) * np.square(means).sum()))


def effective_count(weights: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    r"""Return the number of members that a mixture really has, :math:`1 / \sum_n w_n^2`, 1 to K.

    >>> effective_count(torch.full((4,), 0.25))
    tensor(4.)
    """
    return 1 / weights.square().sum(-1)
