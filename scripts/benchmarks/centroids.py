"""Every rule against its floor: one weighted sum by ``torch.matmul`` and one norm.

Then the growth of some rules with the number of points K and their size D. The quality is the
distance from the same rule in float64. Promised are 1.5 times the floor for the rules that need the
mixture alone (``lin fix mode vp``), with the splits ``0 m chm``.
"""

import argparse
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from augment import Rule
from augment.centroid import MEANS, NORMS
from benchmarks.paired import Comparison

FLOOR = "torch.matmul and a norm"
PROMISED = ("lin", "fix", "mode", "vp")
GROWING = ("fix/chm", "nin/chm", "slerp/0", "nao/0")
SIZES = ((2, 64), (5, 64), (20, 64), (50, 64), (5, 16), (5, 32), (5, 128))
"""K and the side of a latent of four channels."""


def floor(points: Tensor, weights: Tensor) -> Tensor:
    """Return the norms of weighted sums."""
    return (weights[:, None] @ points.flatten(2)).norm(dim=-1)


def exactness(rule: Rule, points: Tensor, weights: Tensor) -> str:
    """Describe the largest error of a few centroids, by their norm, against float64."""
    few, share = points[:8], weights[:8]
    exact = rule(few.double(), share.double()).flatten(1)
    error = (rule(few, share).flatten(1) - exact).norm(dim=1) / exact.norm(dim=1)
    return f"relative error {error.max().item():.1g}"


def against_floor(
    rule: Rule, points: Tensor, weights: Tensor, threads: int, bar: bool = False
) -> Comparison:
    """Compare a rule with the floor."""
    batch, count, dim = *weights.shape, points[0, 0].numel()
    return Comparison(
        f"{rule}, K = {count}, D = {dim}, {batch} at once",
        partial(rule, points, weights), partial(floor, points, weights), FLOOR,
        partial(exactness, rule, points, weights),
        count=batch, unit="centroid", bar=("time", 1.5) if bar else None, threads=threads,
    )  # fmt: skip


def mixture(batch: int, count: int, side: int, device: str) -> tuple[Tensor, Tensor]:
    """Draw points of N(0, I) and weights."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(batch, count, 4, side, side, generator=generator)
    return points.to(device), torch.rand(batch, count, generator=generator).softmax(1).to(device)


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare all rules on one core and on all, then the growth of some."""
    batch, count, side = (4, 3, 8) if args.quick else (256, 16, 64)
    points, weights = mixture(batch, count, side, args.device)
    splits = [mean for mean in MEANS if mean != "mu"]  # zero here, and so the same as 0
    rules = [Rule(norm, mean) for norm in NORMS if norm != "circle" for mean in splits]
    pair = points[:, :2].contiguous(), weights[:, :2].softmax(1)
    for threads in dict.fromkeys((1, args.threads)):
        for rule in rules:
            promised = rule.norm in PROMISED and rule.mean != "lp"
            yield against_floor(rule, points, weights, threads, promised)
        yield against_floor(Rule("circle", "0"), *pair, threads)
    for count, side in SIZES[:0] if args.quick else SIZES:
        points, weights = mixture(32, count, side, args.device)
        for name in GROWING:
            yield against_floor(Rule.parse(name), points, weights, args.threads)
