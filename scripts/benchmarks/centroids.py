"""Every rule against one weighted sum by ``torch.matmul`` and one norm, which none can do without.

Then how some of them grow with the number of points K and their size D. Beside each, how far it is
from itself in float64. Promised is 1.5 times the floor for the rules that look at
the mixture alone (``lin fix mode vp``), with the splits ``0 m chm``.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from augment import Rule
from augment.centroid import MEANS, NORMS
from benchmarks.duel import Duel

FLOOR = "torch.matmul and a norm"
PROMISED = ("lin", "fix", "mode", "vp")
GROWING = ("fix/chm", "nin/chm", "slerp/0", "nao/0")
SIZES = ((2, 64), (5, 64), (20, 64), (50, 64), (5, 16), (5, 32), (5, 128))
"""K and the side of a latent of four channels."""


def floor(points: Tensor, weights: Tensor) -> Tensor:
    """The norms of weighted sums."""
    return (weights[:, None] @ points.flatten(2)).norm(dim=-1)


def exactness(rule: Rule, points: Tensor, weights: Tensor) -> str:
    """The largest error of a few centroids, by their norm, against float64."""
    few, share = points[:8], weights[:8]
    exact = rule(few.double(), share.double()).flatten(1)
    error = (rule(few, share).flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)
    return f"relative error {error.max().item():.1g}"


def duel(rule: Rule, points: Tensor, weights: Tensor, threads: int, bar: bool = False) -> Duel:
    """A rule and the floor."""
    batch, count, dim = *weights.shape, points[0, 0].numel()
    return Duel(
        name=f"{rule}, K = {count}, D = {dim}, {batch} at once",
        ours=partial(rule, points, weights),
        theirs=partial(floor, points, weights),
        opponent=FLOOR,
        quality=partial(exactness, rule, points, weights),
        count=batch,
        unit="centroid",
        bar=("time", 1.5) if bar else None,
        threads=threads,
    )


def mixture(batch: int, count: int, side: int, device: str) -> tuple[Tensor, Tensor]:
    """Points of N(0, I) and weights."""
    dice = torch.Generator().manual_seed(0)
    points = torch.randn(batch, count, 4, side, side, generator=dice)
    return points.to(device), torch.rand(batch, count, generator=dice).softmax(1).to(device)


def suite(args: argparse.Namespace) -> Iterator[Duel]:
    """All rules on one core and on all, then the growth of some."""
    batch, count, side = (4, 3, 8) if args.quick else (256, 16, 64)
    points, weights = mixture(batch, count, side, args.device)
    splits = [mean for mean in MEANS if mean != "mu"]  # zero here, and so the same as 0
    rules = [Rule(norm, mean) for norm in NORMS if norm != "circle" for mean in splits]
    pair = points[:, :2].contiguous(), weights[:, :2].softmax(1)
    for threads in dict.fromkeys((1, args.threads)):
        for rule in rules:
            yield duel(rule, points, weights, threads, rule.norm in PROMISED and rule.mean != "lp")
        yield duel(Rule("circle", "0"), *pair, threads)
    for count, side in SIZES[:0] if args.quick else SIZES:
        points, weights = mixture(32, count, side, args.device)
        for name in GROWING:
            yield duel(Rule.parse(name), points, weights, args.threads)
