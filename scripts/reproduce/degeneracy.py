"""Why centroids of many inverted latents degenerate, and which rules do not.

    python scripts/reproduce/degeneracy.py --quick
    python scripts/reproduce/degeneracy.py

Landolsi & Kahl, *Addressing degeneracies in latent interpolation for diffusion models*, arXiv
2505.07481: inverted latents share a small channel bias; averaging N of them and restoring the norm
lengthens it √N-fold, and images degenerate; rules that take the mean out first do not. Centroids of
N images of a class in equal parts, the same ones under every rule, give contact sheets (Fig. 1, 8,
9, 12), the largest channel mean against √N (Fig. 4), and FID and class distance against N (Fig. 7).
FID is worse for centroids that resemble each other, as those of many members do. With N near the
120 inverted images a class the draws overlap, and intervals are too small.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from claims import claim, conclude, once, options
from judge import FeatureJudge, better, mean_and_error, open_judge, pictures, show
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.diffusion import load_backbone
from augment.plan.mixing import Mixing
from augment.plan.planner import Planner
from augment.synthesis.synthesizer import Synthesizer

RULES = (
    *("lin/0", "fix/0", "nin/0", "vp/0", "fade/0", "nao/0"),
    *("fix/m", "nin/m", "vp/mu"),
    *("fix/chm", "nin/chm", "fade/chm", "slerp/chm", "nao/chm", "nin/lp", "fade/lp"),
)
COUNTS = (2, 8, 32, 96)
PER_CLASS = 120
FIRST, LAST = COUNTS[0], COUNTS[-1]
EXHIBITS = (5, 6)  # numbers of classes
COLORS = {"lin": "#888888", "fix": "#d55e00", "nin": "#cc79a7", "vp": "#e69f00", "fade": "#0072b2",
          "slerp": "#56b4e9", "nao": "#009e73"}  # fmt: skip
STYLES = {"0": "o-", "m": "D-.", "mu": "D-.", "chm": "s--", "lp": "^:"}
Cells = dict[tuple[str, int], dict[str, Tensor]]


def make(synthesizer: Synthesizer, members: int, draws: int) -> dict[str, Tensor]:
    """Return centroids of N members and their images, each (draws · classes, …)."""
    classes = synthesizer.bank.members
    planner = Planner(classes, Mixing(seed=members, alpha=math.inf, members=members))
    plans = [planner(0, index) for index in range(draws * len(classes))]
    centroids = torch.stack([synthesizer.centroid(plan) for plan in plans])
    return {"latents": centroids, "images": synthesizer.images(plans).half()}


def largest_mean(latents: Tensor, classes: int) -> float:
    """Return the largest |channel mean| of a class, averaged over classes."""
    means = latents.float().mean((-2, -1)).unflatten(0, (-1, classes)).mean(0)
    return means.abs().amax(1).mean().item()


def measure(cell: dict[str, Tensor], judge: FeatureJudge, classes: int) -> dict[str, Tensor]:
    """Add the judge's measures to a cell."""
    labels = torch.arange(len(cell["images"])) % classes
    assessed = judge.assess(cell["images"].float(), labels)
    bias = torch.tensor(largest_mean(cell["latents"], classes))
    return {**cell, **assessed, "bias": bias, "fid": torch.tensor(judge.fid(assessed["features"]))}


def row(rule: str, members: int, cell: dict[str, Tensor]) -> dict[str, Any]:
    """Return a row of the table."""
    kept, error = mean_and_error(cell["kept"], 100)
    return {
        "rule": rule, "N": members, "class kept, %": kept, "±": error, "FID": cell["fid"].item(),
        "class distance": cell["distance"].mean().item(), "bias": cell["bias"].item(),
        "norm / √D": cell["latents"].float().square().mean((-3, -2, -1)).sqrt().mean().item(),
    }  # fmt: skip


def sheet(cells: Cells, bank: LatentBank, real: Tensor, path: Path) -> None:
    """Draw Fig. 1, 8, 9, 12: centroids of two classes, rules across and members down."""
    figure = Figure(figsize=(14, 10), layout="constrained")
    classes = len(bank.classes)
    for part, number in zip(figure.subfigures(len(EXHIBITS), 1), EXHIBITS, strict=True):
        label = number % classes
        part.suptitle(f"{bank.classes[label]} (framed: nearer to another class's mean)")
        grid = part.subplots(len(COUNTS), len(RULES) + 1)
        for line, count in enumerate(COUNTS):
            show(grid[line, 0], real[label, line], "real" if not line else "")
            grid[line, 0].set_ylabel(f"N = {count}")
            for axes, rule in zip(grid[line, 1:], RULES, strict=True):
                cell = cells[rule, count]
                show(axes, cell["images"][label].float(), rule if not line else "")
                axes.spines[:].set(color="#d55e00", lw=3, visible=not cell["kept"][label])
    figure.savefig(path, dpi=110)


def lines(axes: Any, cells: Cells, value: str, title: str, scale: float = 1.0) -> None:
    """Draw a line a rule: the norm rule is its colour, the mean split its marks and dashes."""
    roots = [math.sqrt(n) for n in COUNTS]
    for rule in RULES:
        norm, split = rule.split("/")
        values = [scale * cells[rule, n][value].double().mean().item() for n in COUNTS]
        axes.plot(roots, values, STYLES[split], ms=4, lw=1.4, color=COLORS[norm], label=rule)
    axes.set_xticks(roots, [str(n) for n in COUNTS])
    axes.set(xlabel="members N, at √N", title=title)
    axes.grid(axis="y", color="#e5e5e5")


def draw(cells: Cells, bias: float, yardstick: dict[str, Tensor], folder: Path) -> None:
    """Draw Fig. 4, the bias, and Fig. 7, the quality."""
    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    axes = figure.subplots()
    lines(axes, cells, "bias", "Largest |channel mean| of the centroids")
    ends = [0, math.sqrt(LAST)]
    axes.plot(ends, [bias * end for end in ends], ":", color="black", label="bias · √N")
    axes.axhline(bias, color="black", lw=0.8, label="bank")
    axes.set(xlim=(0, None), ylim=(0, 1.1 * max(c["bias"].item() for c in cells.values())))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(folder / "channel_mean.png", dpi=120)
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    parts = figure.subplots(1, 3)
    for axes, value, title, scale in zip(
        parts, ("kept", "fid", "distance"), ("Class kept, %", "FID", "Class distance"),
        (100.0, 1.0, 1.0), strict=True,
    ):  # fmt: skip
        lines(axes, cells, value, title, scale)
        level = scale * yardstick[value].double().mean().item()
        axes.axhline(level, color="black", lw=0.8, label="the members themselves, sampled back")
    parts[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(folder / "quality.png", dpi=120)


def exponent(cells: Cells, rule: str) -> float:
    """Fit the exponent of bias ~ N^exponent."""
    x = torch.tensor(COUNTS, dtype=torch.float64).log()
    y = torch.stack([cells[rule, n]["bias"] for n in COUNTS]).double().log()
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / x.square().sum()).item()


def verdicts(cells: Cells, bias: float) -> list[dict[str, str]]:
    """Return the paper's claims, and our own of `fade`."""
    power, pure = exponent(cells, "fix/0"), exponent(cells, "vp/0")
    chm = [cells[rule, n]["bias"].item() for rule in RULES if rule.endswith("/chm") for n in COUNTS]
    drift = max(abs(value / bias - 1) for value in chm)
    found = [
        claim("without a split the bias grows as √N (Fig. 4)",
              f"fix/0: N^{power:.2f}, vp/0: N^{pure:.2f}", abs(pure - 0.5) < 0.1),
        claim("/chm keeps it at the bank's", f"within {100 * drift:.0f} %", drift < 0.1),
    ]  # fmt: skip
    for rule in ("fix", "nin"):
        for count in (FIRST, LAST):
            plain, ours = cells[f"{rule}/0", count], cells[f"{rule}/chm", count]
            here = f"{ours['fid']:.1f} against {plain['fid']:.1f}"
            name = f"{rule}/chm has a better {{}} than {rule}/0 at N = {count} (Fig. 7)"
            found.append(claim(name.format("FID"), here, bool(ours["fid"] < plain["fid"])))
            near = [cell["distance"].mean().item() for cell in (ours, plain)]
            verdict = better(plain["distance"], ours["distance"])
            here = f"{near[0]:.4f} against {near[1]:.4f}"
            found.append(claim(name.format("class distance"), here, verdict))
    for count in (FIRST, LAST):
        best = max(RULES, key=lambda rule: cells[rule, count]["kept"].mean().item())
        ours = cells["fade/chm", count]["kept"]
        verdict = better(ours, cells[best, count]["kept"]) if best != "fade/chm" else True
        share = 100 * cells[best, count]["kept"].mean().item()
        here = f"{100 * ours.mean().item():.0f} %, {best} {share:.0f} %"
        found.append(claim(f"ours: fade/chm keeps the class best at N = {count}", here, verdict))
    return found


def main() -> None:
    """Invert, mix, sample, measure, draw, judge."""
    args: argparse.Namespace = options(
        "Centroids of N latents: arXiv 2505.07481.", "degeneracy"
    ).parse_args()
    draws, steps = (4, 20) if args.quick else (12, 50)
    backbone = load_backbone(args.backbone)
    source, reference = pictures(args, PER_CLASS)
    judge = open_judge(args, backbone, reference)
    tag = f"{backbone.fingerprint['weights'][:8]}-{steps}"
    bank = fill_bank(
        args.out / f"bank-{tag}", backbone, source, None, "ddim", steps=steps, stored=()
    )
    count = len(bank.classes)
    latents = torch.stack([bank.latents(name) for name in bank.classes], 1)
    bias = largest_mean(latents.flatten(0, 1), count)
    single = once(
        args.out / f"cells-{tag}" / f"back-{draws}.safetensors",
        lambda: make(Synthesizer(backbone, bank, Rule.parse("lin/0")), 1, draws),
    )
    cells: Cells = {}
    for rule, members in tqdm([(r, n) for n in COUNTS for r in RULES], "cells", unit="cell"):
        cell = once(
            args.out / f"cells-{tag}" / f"{rule.replace('/', '-')}-{members}-{draws}.safetensors",
            lambda rule=rule, n=members: make(
                Synthesizer(backbone, bank, Rule.parse(rule)), n, draws
            ),
        )
        cells[rule, members] = measure(cell, judge, count)
    yardstick = measure(single, judge, count)
    first = [source.ids[name][: len(COUNTS)] for name in source.classes]
    form = backbone.channels, backbone.resolution
    real = torch.stack([torch.stack([source.load(i, *form) for i in ids]) for ids in first])
    sheet(cells, bank, real, args.out / "centroids.png")
    draw(cells, bias, yardstick, args.out)
    rows = [row("one, sampled back", 1, yardstick)]
    rows += [row(*job, cell) for job, cell in cells.items()]
    conclude(args, rows, verdicts(cells, bias))


if __name__ == "__main__":
    main()
