"""The NAO centroid in closed form against the published optimiser in all dimensions.

Ours are 64 centroids of N(0, I) at once; theirs is one, by Adam over the centroid and K × 48 path
points, until five changes in a row are below 0.01, or for ``--seconds``: then the ratio is a lower
bound. The quality is the published objective of both, and that of Adam's centroid with the best
paths that L-BFGS finds, which compares the centroids alone.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from augment import Rule
from benchmarks.paired import Comparison, Keep

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from reference.centroids import nao_by_adam, nao_objective_of

BASELINE = "Adam in D dimensions (Samuel et al., arXiv 2306.08687)"


def steps_in(run: Callable[..., object], seconds: float) -> int:
    """Try an optimiser out; return how many of its steps fit into some seconds."""
    run(limit=2)
    start = time.perf_counter()
    run(limit=8)
    return min(max(int(8 * seconds / (time.perf_counter() - start)), 8), 10_000)


def quality(rule: Rule, points: Tensor, weights: Tensor, adam: Keep, limit: int) -> str:
    """Describe the objectives."""
    centroid, loss, steps = adam.result
    objective = partial(nao_objective_of, points.flatten(1), weights)
    ours = objective(rule(points[None], weights[None])[0].flatten())
    stopped = "" if steps < limit else ", not done"
    return (
        f"objective {ours:.2f} against {loss:.2f} ({objective(centroid):.2f} with its paths "
        f"polished) after {steps} steps{stopped}"
    )


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare small and large latents, few points and many, equal weights and Dirichlet's."""
    rule, generator = Rule.parse("nao"), torch.Generator().manual_seed(0)
    cases: Any = itertools.product((16, 64), (2, 5, 20, 50), (True, False))
    for side, count, even in ((4, 2, True),) if args.quick else cases:
        points = torch.randn(64, count, 4, side, side, generator=generator)
        weights = torch.rand(64, count, generator=generator).log().neg()
        weights = torch.ones(64, count) if even else weights
        weights = weights / weights.sum(1, keepdim=True)
        run = partial(nao_by_adam, points[0].flatten(1), weights[0])
        limit = steps_in(run, 0.5 if args.quick else args.seconds)
        adam = Keep(partial(run, limit=limit))
        yield Comparison(
            f"D = {4 * side**2}, K = {count}, weights {'equal' if even else 'Dir(1)'}",
            partial(rule, points, weights), adam, BASELINE,
            partial(quality, rule, points[0], weights[0], adam, limit),
            count=len(points), unit="centroid", bar=("speed", 5000.0), theirs_count=1,
            once="theirs",
        )  # fmt: skip
