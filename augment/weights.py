r"""Mixing weights: points of the simplex, drawn from a symmetric Dirichlet distribution.

:math:`w \sim \mathrm{Dir}(\alpha, \dots, \alpha)` is a normalised vector of Gamma variables. For
small α those underflow (at α = 1e-3 a third of all draws of a usual sampler hold a zero or come
back uniform), so they are drawn as logarithms: :math:`\log \Gamma_\alpha = \log \Gamma_{\alpha+1}
+ \log(U) / \alpha`, and normalised by a softmax (Marsaglia & Tsang, *A simple method for
generating gamma variables*, ACM TOMS 26, 2000, sec. 8).

α = 0 is a vertex (one member alone, each equally often) and α = ∞ the centre (equal weights).
How many members a draw really mixes is its `effective_count`.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from augment.errors import UserError


def dirichlet(dice: np.random.Generator, alpha: float, count: int) -> Float[Tensor, " k"]:
    """One draw of ``count`` weights, float64, ≥ 0, of sum 1.

    Args:
        dice: the generator to use.
        alpha: concentration, 0 ≤ α ≤ ∞.
        count: number of weights, at least 1.

    Raises:
        UserError: α is negative or not a number, or count is not positive.

    >>> dirichlet(np.random.default_rng(0), 1.0, 3).sum().item()
    1.0
    """
    if not alpha >= 0:
        raise UserError(f"expected alpha ≥ 0, got {alpha}; 1 is uniform on the simplex")
    if count < 1:
        raise UserError(f"expected at least one point to mix, got {count}; add images to the class")
    if alpha < 1e-9:  # where all but one part in 1e9 of the law sits on the vertices
        return torch.eye(count, dtype=torch.float64)[dice.integers(count)]
    if math.isinf(alpha):
        return torch.full((count,), 1 / count, dtype=torch.float64)
    logs = np.log(dice.standard_gamma(alpha + 1, count)) + np.log1p(-dice.random(count)) / alpha
    return torch.from_numpy(logs).softmax(0)


def effective_count(weights: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    r"""How many members a mixture really has, :math:`1 / \sum_n w_n^2`, between 1 and K.

    >>> effective_count(torch.full((4,), 0.25))
    tensor(4.)
    """
    return 1 / weights.square().sum(-1)
