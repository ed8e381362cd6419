"""Heads on frozen features, fitted to a handful of labelled images."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from augment.core.errors import lookup
from augment.networks import unit
from augment.training.checks import expect

Head = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Features (n, f), labels (n,), weights (n,), features (m, f) of queries → labels of these (m,).

Labels are 0 to N − 1, each at least once, and weights are not negative.
"""


@dataclass(frozen=True)
class Prototype:
    """The nearest class mean.

    Snell et al., Prototypical Networks, arXiv 1703.05175, eq. 1, with squared Euclidean distance;
    or the cosine of features of length 1 to their mean (SimpleShot, Wang et al., arXiv 1911.04623).

    Args:
        metric: ``cosine`` or ``euclid``.

    Raises:
        UserError: another metric.

    >>> points = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> Prototype()(points, torch.tensor([0, 1]), torch.ones(2), torch.tensor([[3.0, 4.0]]))
    tensor([1])
    """

    metric: str = "cosine"

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(("cosine", "euclid")), self.metric, "metric")

    def __call__(
        self,
        features: Float[Tensor, "n f"],
        labels: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        query: Float[Tensor, "m f"],
    ) -> Int[Tensor, " m"]:
        """Label the queries; see `Head`."""
        cosine = self.metric == "cosine"
        if cosine:
            features, query = unit(features), unit(query)
        member = F.one_hot(labels).to(features) * weights.to(features)[:, None]
        means = (member / member.sum(0)).T @ features
        if cosine:
            return (query @ unit(means).T).argmax(1)
        return torch.cdist(query, means).argmin(1)


@dataclass(frozen=True)
class Logistic:
    r"""Multinomial logistic regression on features of length 1.

    Minimises :math:`C \sum_i w_i\, \mathrm{CE}(W x_i + b, y_i) + ½‖W‖²`, scikit-learn's objective,
    by L-BFGS from zero. Tian et al., Rethinking Few-Shot Image Classification: a Good Embedding Is
    All You Need?, arXiv 2003.11539, sec. 3.2.

    Args:
        c: C, the inverse of the regularisation.

    Raises:
        UserError: it is not positive.
    """

    c: float = 1.0

    def __post_init__(self) -> None:
        expect(0 < self.c < math.inf, "c > 0", self.c)

    def loss(
        self, solution: Tensor, features: Tensor, labels: Tensor, weights: Tensor
    ) -> Float[Tensor, ""]:
        """Return the objective of (classes, f + 1), W and b, and features of length 1."""
        logits = features @ solution[:, :-1].T + solution[:, -1]
        costs = F.cross_entropy(logits, labels, reduction="none")
        return self.c * (weights * costs).sum() + solution[:, :-1].square().sum() / 2

    def fit(
        self,
        features: Float[Tensor, "n f"],
        labels: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
    ) -> Float[Tensor, "k g"]:
        """Return W and b side by side, float64."""
        features, weights = unit(features.double()), weights.double()
        shape = int(labels.max()) + 1, features.shape[1] + 1
        solution = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [solution], max_iter=1000, tolerance_grad=1e-7, tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> float:
            optimizer.zero_grad()
            value = self.loss(solution, features, labels, weights)
            value.backward()
            return value.item()

        optimizer.step(closure)  # which enables gradients
        return solution.detach()

    def __call__(
        self,
        features: Float[Tensor, "n f"],
        labels: Int[Tensor, " n"],
        weights: Float[Tensor, " n"],
        query: Float[Tensor, "m f"],
    ) -> Int[Tensor, " m"]:
        """Label the queries; see `Head`."""
        solution = self.fit(features, labels, weights)
        return (unit(query.double()) @ solution[:, :-1].T + solution[:, -1]).argmax(1)


HEADS: dict[str, Callable[..., Head]] = {"prototype": Prototype, "logistic": Logistic}
"""Heads by name; `augment.core.registry.make` builds them."""
