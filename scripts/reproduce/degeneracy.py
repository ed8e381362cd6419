"""Why centroids of many inverted latents degenerate, and which rules do not.

    python scripts/reproduce/degeneracy.py --quick
    python scripts/reproduce/degeneracy.py

Landolsi & Kahl, *Addressing degeneracies in latent interpolation for diffusion models*, arXiv
2505.07481: inverted latents share a small channel bias; averaging N of them and restoring the norm
lengthens it √N-fold, and images degenerate; rules that take the mean out first do not. Centroids of
N images of a class in equal parts, the same ones under every rule, give contact sheets (Fig. 1, 8,
9, 12), the signed channel mean of fix/0 by class against √N (Fig. 4), and FID and class distance
against N (Fig. 7). The inversion is the published one. FID is of each class alone, against other
real images of it, averaged; intervals resample the centroids of each class. FID of few images is
too large, alike under all rules, and rises where centroids resemble each other, as those of many
members do.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from claims import once, options, record, sized
from judge import FeatureJudge, error_bars, load_all, mean, open_judge, pictures, show
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm
from works import Interval

from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.core.rng import rng
from augment.diffusion import load_backbone
from augment.measure.features import frechet_distance
from augment.plan.mixing import Mixing
from augment.plan.planner import Planner
from augment.synthesis.synthesizer import Synthesizer

PAPER = ("fix/0", "nin/0", "fix/m", "nin/m", "fix/chm", "nin/chm")
OURS = ("fade/chm", "fade/lp", "nao/chm")
EXHIBITS = (5, 6)  # numbers of classes
COLORS = {"fix": "#d55e00", "nin": "#cc79a7", "fade": "#0072b2", "nao": "#009e73"}
STYLES = {"0": "o-", "m": "D-.", "chm": "s--", "lp": "^:"}
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


def measure(
    cell: dict[str, Tensor], judge: FeatureJudge, classes: int, per_class: bool = True
) -> dict[str, Tensor]:
    """Add the judge's measures to a cell; FID and distance by class (k,)."""
    labels = torch.arange(len(cell["images"])) % classes
    assessed = judge.assess(cell["images"].float(), labels)
    grouped = assessed["features"].unflatten(0, (-1, classes)).unbind(1)
    if per_class:
        fids = [
            frechet_distance(own, judge.real[judge.labels == label])
            for label, own in enumerate(grouped)
        ]
        assessed["fid"] = torch.tensor(fids)
        assessed["far"] = assessed["distance"].unflatten(0, (-1, classes)).mean(0)
    return {**cell, **assessed, "bias": torch.tensor(largest_mean(cell["latents"], classes))}


def row(rule: str, members: int, cell: dict[str, Tensor]) -> dict[str, Any]:
    """Return a row of the table."""
    return {
        "rule": rule, "N": str(members), "class kept, %": 100 * cell["kept"].mean().item(),
        "FID of a class": cell["fid"].mean().item(), "class distance": cell["far"].mean().item(),
        "largest channel mean": cell["bias"].item(),
        "norm / √D": cell["latents"].float().square().mean((-3, -2, -1)).sqrt().mean().item(),
    }  # fmt: skip


def sheet(cells: Cells, rules: tuple[str, ...], bank: LatentBank, real: Tensor, path: Path) -> None:
    """Draw Fig. 1, 8, 9, 12: centroids of two classes, rules across and members down."""
    figure, counts = Figure(figsize=(9, 8), layout="constrained"), counts_of(cells)
    classes = len(bank.classes)
    for part, number in zip(figure.subfigures(len(EXHIBITS), 1), EXHIBITS, strict=True):
        label = number % classes
        part.suptitle(f"{bank.classes[label]} (framed: nearer to another class's mean)")
        grid = part.subplots(len(counts), len(rules) + 1, squeeze=False)
        for line, count in enumerate(counts):
            show(grid[line, 0], real[label, line % real.shape[1]], "real" if not line else "")
            grid[line, 0].set_ylabel(f"N = {count}")
            for axes, rule in zip(grid[line, 1:], rules, strict=True):
                cell = cells[rule, count]
                show(axes, cell["images"][label].float(), rule if not line else "")
                axes.spines[:].set(color="#d55e00", lw=3, visible=not cell["kept"][label])
    figure.savefig(path, dpi=110)


def counts_of(cells: Cells) -> list[int]:
    """Return the numbers of members, rising."""
    return sorted({count for _, count in cells})


def draw_quality(cells: Cells, rules: tuple[str, ...], folder: Path) -> None:
    """Draw Fig. 7: the rule's norm is a colour, its split a mark."""
    figure, counts = Figure(figsize=(10, 4.2), layout="constrained"), counts_of(cells)
    parts = figure.subplots(1, 2)
    for axes, value, title in zip(
        parts, ("fid", "far"), ("FID of a class", "Class distance"), strict=True
    ):
        for place, rule in enumerate(rules):
            norm, split = rule.split("/")
            found = [mean(cells[rule, n][value]) for n in counts]
            beside = 0.04 * (place - (len(rules) - 1) / 2)  # so that bars do not overlap
            error_bars(axes, [n**0.5 + beside for n in counts], found, STYLES[split], ms=4,
                       color=COLORS[norm], label=rule)  # fmt: skip
        axes.set_xticks([n**0.5 for n in counts], [str(n) for n in counts])
        axes.set(xlabel="members N, at √N", title=f"{title}, ± 95 % over classes")
    parts[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(folder / "quality.png", dpi=120)


def growth(bank: LatentBank, folder: Path) -> tuple[Interval, str]:
    """Fit and draw Fig. 4: the signed mean of each class's most biased channel under fix/0.

    No image is sampled, so there are many centroids. The exponent of N is fitted for each class
    while N is at most a quarter of 1/δ², the share of the squared norm that its latents have in
    common.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes, exponents, limits = figure.subplots(), [], []
    rule = Rule.parse("fix/0")
    for name in bank.classes:
        latents = bank.latents(name).double()
        size = len(latents)
        own = latents.mean((0, 2, 3))
        channel = own.abs().argmax()
        square = latents.square().sum((1, 2, 3)).mean()
        common = (latents.sum(0).square().sum() - size * square) / (size * (size - 1))
        limits.append((square / common).item())
        counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= size]
        means = []
        for count in counts:
            order = torch.rand(64, size, generator=torch.Generator().manual_seed(count))
            points = latents[order.argsort(1)[:, :count]]
            weights = torch.full((64, count), 1 / count, dtype=torch.float64)
            means.append(rule(points, weights)[:, channel].mean().item())
        axes.plot([n**0.5 for n in counts], means, "o-", ms=3, label=name)
        early = [k for k, n in enumerate(counts) if n <= max(limits[-1] / 4, 2)]
        x = torch.tensor(counts, dtype=torch.float64)[early].log()
        y = torch.tensor(means, dtype=torch.float64)[early].abs().log()
        x, y = x - x.mean(), y - y.mean()
        exponents.append(((x * y).sum() / x.square().sum()).item())
    axes.set(xlabel="√N", title="Signed mean of the most biased channel, fix/0")
    axes.legend(frameon=False, fontsize=7)
    figure.savefig(folder / "channel_mean.png", dpi=120)
    return mean(torch.tensor(exponents)), f"1/δ² is {min(limits):.0f} to {max(limits):.0f}"


def decide(cells: Cells, judge: FeatureJudge, resamples: int) -> dict[str, dict[str, Interval]]:
    """Return what decides the claims of Fig. 7, by resampling the centroids of every class.

    All cells are resampled alike, so that rules are compared on the same centroids.
    """
    first, last = counts_of(cells)[0], counts_of(cells)[-1]
    classes = len(judge.means)
    draws = len(next(iter(cells.values()))["images"]) // classes
    features = {job: cell["features"].unflatten(0, (draws, classes)) for job, cell in cells.items()}
    reals = [judge.real[judge.labels == label] for label in range(classes)]

    def measures(rows: Tensor) -> dict[tuple[str, int, str], float]:
        found = {}
        for job, own in features.items():
            fids = [frechet_distance(own[rows, k], real) for k, real in enumerate(reals)]
            found[*job, "FID"] = sum(fids) / classes
            far = cells[job]["distance"].unflatten(0, (draws, classes))[rows]
            found[*job, "class distance"] = far.mean().item()
        return found

    whole = measures(torch.arange(draws))
    others = [
        measures(torch.from_numpy(rng(0, "order", k).integers(draws, size=draws)))
        for k in tqdm(range(resamples), "resamples")
    ]

    def interval(value: Callable[[dict[tuple[str, int, str], float]], float]) -> Interval:
        spread = torch.tensor([value(found) for found in others], dtype=torch.float64)
        half = 1.96 * spread.std().item()
        return Interval(value(whole) - half, value(whole), value(whole) + half)

    def less(one: tuple[str, int], other: tuple[str, int], what: str = "FID") -> Interval:
        return interval(lambda found: found[*one, what] - found[*other, what])

    def ratio(found: dict[tuple[str, int, str], float]) -> float:
        nin, fix, plain = (found[rule, last, "FID"] for rule in ("nin/chm", "fix/chm", "fix/0"))
        return (nin - fix) / (plain - fix)

    def agreement(found: dict[tuple[str, int, str], float]) -> float:
        ranks = [
            torch.tensor([found[*job, what] for job in cells]).argsort().argsort().double()
            for what in ("FID", "class distance")
        ]
        return torch.corrcoef(torch.stack(ranks))[0, 1].item()

    both, norms = ("FID", "class distance"), ("fix", "nin")
    return {
        "fig7-steep": {
            f"{norm}/0, {what}": less((f"{norm}/0", last), (f"{norm}/0", first), what)
            for norm in norms for what in both
        },
        "fig7-m": {norm: less((f"{norm}/0", last), (f"{norm}/m", last)) for norm in norms},
        "fig7-chm": {
            f"{norm}, {what}": less((f"{norm}/0", last), (f"{norm}/chm", last), what)
            for norm in norms for what in both
        },
        "fig7-chm-falls": {
            norm: less((f"{norm}/chm", last), (f"{norm}/chm", first)) for norm in norms
        },
        "fig7-norms": {"": interval(ratio)},
        "fig7-agree": {"": interval(agreement)},
        "fig7-small": {norm: less((f"{norm}/0", first), (f"{norm}/chm", first)) for norm in norms},
    }  # fmt: skip


def main() -> None:
    """Invert, mix, sample, measure, draw, judge."""
    parser = options("Degenerating centroids: arXiv 2505.07481.", "degeneracy")
    parser.add_argument("--inversion", default="published_ddim", help="a DDIM inversion")
    args = parser.parse_args()
    per_class, counts, draws, steps = sized(
        args, (4, (2, 4), 2, 2), (64, (2, 8, 32), 8, 20), (100, (2, 4, 8, 16, 32, 64), 100, 50)
    )
    rules = PAPER if args.quick or args.toy else (*PAPER, *OURS)
    backbone = load_backbone(args.backbone)
    source, reference = pictures(args, per_class)
    judge = open_judge(args, backbone, reference)
    tag = f"{backbone.fingerprint['weights'][:8]}-{per_class}-{steps}-{args.inversion}"
    bank = fill_bank(
        args.out / f"bank-{tag}", backbone, source, None, args.inversion, steps=steps, stored=()
    )
    classes = len(bank.classes)
    exponent, limits = growth(bank, args.out)
    cells: Cells = {}
    for rule, members in tqdm([(r, n) for n in counts for r in rules], "cells", unit="cell"):
        cell = once(
            args.out / f"cells-{tag}" / f"{rule.replace('/', '-')}-{members}-{draws}.safetensors",
            lambda rule=rule, n=members: make(
                Synthesizer(backbone, bank, Rule.parse(rule)), n, draws
            ),
        )
        cells[rule, members] = measure(cell, judge, classes)
    real = load_all(source, backbone).unflatten(0, (classes, -1))
    sheet(cells, rules, bank, real, args.out / "centroids.png")
    draw_quality(cells, rules, args.out)
    rows = [row(*job, cell) for job, cell in cells.items()]
    title = (
        f"centroids of N of {per_class} images a class, {args.inversion} {steps}, {draws} a class "
        f"and cell; {limits}"
    )
    found = {"fig4": {"": exponent}} | decide(cells, judge, 10 if args.toy else 100)
    captions = {
        "centroids": "Centroids of N under each rule",
        "quality": "FID and class distance against N",
        "channel_mean": "Signed channel mean of fix/0 by class, against √N",
    }  # fmt: skip
    record(args, title, rows, found, **captions)


if __name__ == "__main__":
    main()
