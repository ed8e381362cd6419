"""The NAO centroid in closed form against the published optimiser in all dimensions.

Ours are 64 centroids of N(0, I) at once; theirs one, by Adam over the centroid and K × 48 path
points, until five changes in a row are below 0.01, or for ``--seconds``: then the ratio is a lower
bound. Beside the published objective of both stands that of Adam's centroid with the best paths
that L-BFGS finds, for a comparison of the centroids alone.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from augment import Rule
from benchmarks.duel import Duel

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from reference.centroids import nao_by_adam, nao_objective_of

OPPONENT = "Adam in D dimensions (Samuel et al., arXiv 2306.08687)"


class Adam:
    """The published optimiser on one centroid, and what it found.

    Args:
        points: (K, D).
        weights: (K,).
        seconds: how long it may take; how many steps that is, is tried out first.
    """

    found: tuple[Tensor, float, int]

    def __init__(self, points: Tensor, weights: Tensor, seconds: float) -> None:
        self.run = partial(nao_by_adam, points, weights)
        self.run(limit=2)
        start = time.perf_counter()
        self.run(limit=8)
        steps = 8 * seconds / (time.perf_counter() - start)
        self.limit = min(max(int(steps), 8), 10_000)

    def __call__(self) -> None:
        """Optimise."""
        self.found = self.run(limit=self.limit)


def quality(rule: Rule, points: Tensor, weights: Tensor, adam: Adam) -> str:
    """The objectives."""
    centroid, loss, steps = adam.found
    objective = partial(nao_objective_of, points.flatten(1), weights)
    mine = objective(rule(points[None], weights[None])[0].flatten())
    stopped = "" if steps < adam.limit else ", not done"
    return (
        f"objective {mine:.2f} against {loss:.2f} ({objective(centroid):.2f} with its paths "
        f"polished) after {steps} steps{stopped}"
    )


def suite(args: argparse.Namespace) -> Iterator[Duel]:
    """Small and large latents, few points and many, equal weights and Dirichlet's."""
    rule, dice = Rule.parse("nao"), torch.Generator().manual_seed(0)
    cases: Any = itertools.product((16, 64), (2, 5, 20, 50), (True, False))
    for side, count, even in ((4, 2, True),) if args.quick else cases:
        points = torch.randn(64, count, 4, side, side, generator=dice)
        weights = torch.rand(64, count, generator=dice).log().neg()
        weights = torch.ones(64, count) if even else weights
        weights = weights / weights.sum(1, keepdim=True)
        flat = points[0].flatten(1)
        adam = Adam(flat, weights[0], 0.5 if args.quick else args.seconds)
        yield Duel(
            name=f"D = {4 * side**2}, K = {count}, weights {'equal' if even else 'Dir(1)'}",
            ours=partial(rule, points, weights),
            theirs=adam,
            opponent=OPPONENT,
            quality=partial(quality, rule, points[0], weights[0], adam),
            count=len(points),
            unit="centroid",
            bar=("speed", 5000.0),
            theirs_count=1,
            once="theirs",
        )
