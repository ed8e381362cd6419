"""Reproduce on the embedded backbone why centroids of many latents degenerate, and try the cure.

    python scripts/reproduce_degeneracy.py          # took 26 minutes on one core
    python scripts/reproduce_degeneracy.py --quick  # fewer draws and steps

Landolsi & Kahl, *Mean-adjusted interpolation*, arXiv 2505.07481: inverted latents share a small
channel bias; averaging N of them and restoring the norm lengthens it √N-fold, and images
degenerate; rules that take the mean out first do not. Each centroid mixes N images of one class of
the test split in equal parts, the same ones under every rule. The oracle, the embedded network
`fashion`, says whether the class was kept; its features give the FID to other test images.
FID falls with the number of images, so it is only comparable within a run, and it punishes
centroids for resembling each other, as those of many members must. At N = 64 of 96 the draws
overlap: standard errors there are too small. Finished cells stay in --out; go on at any time.
"""

import argparse
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from fashion_mnist import CLASSES, load_split
from matplotlib import pyplot as plt
from torch import Tensor
from tqdm import tqdm

from augment.bank import LatentBank
from augment.centroid.means import channel_mean
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.solver import sample
from augment.files import write_json
from augment.fill import fill_bank
from augment.images import prepare, save_image
from augment.networks.fashion import FashionNet, fashion_net
from augment.plan import Planner
from augment.seeds import normal, rng
from augment.sources import Folder
from augment.synthesis import Synthesizer

RULES = (
    *("lin/0", "fix/0", "nin/0", "vp/0", "fade/0", "vp/mu", "nao/0"),
    *("fix/chm", "nin/chm", "fade/chm", "slerp/chm", "nao/chm", "nin/lp", "fade/lp"),
)
COUNTS = (2, 8, 32, 64)
FIRST, LAST = COUNTS[0], COUNTS[-1]
REFERENCE = 200  # real test images a class that FID compares with, none of them in the bank
EXHIBITS = ("Sandal", "Shirt")
COLORS = {"lin": "#888888", "fix": "#d55e00", "nin": "#cc79a7", "vp": "#e69f00", "fade": "#0072b2",
          "slerp": "#56b4e9", "nao": "#009e73"}  # fmt: skip
STYLES = {"0": "o-", "m": "D-.", "mu": "D-.", "chm": "s--", "lp": "^:"}


@torch.no_grad()
def judge(oracle: FashionNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, 64) and predicted labels (n,), on the CPU."""
    device = oracle.head.weight.device
    features = torch.cat([oracle.features(part.to(device)) for part in images.split(500)])
    return features.cpu(), oracle.head(features).argmax(1).cpu()


def fid(some: Tensor, others: Tensor) -> float:
    """Fréchet distance of two sets of features (n, d), in float64."""
    (mean, cov), (mean2, cov2) = ((x.mean(0), x.T.cov()) for x in (some.double(), others.double()))
    root = torch.linalg.eigvals(cov @ cov2).real.clamp_min(0).sqrt().sum()
    return ((mean - mean2).square().sum() + cov.trace() + cov2.trace() - 2 * root).item()


def standard_error(values: Tensor) -> float:
    """Of the mean of (draws, classes), with the classes taken as given."""
    return ((values.var(0) / len(values)).sum().sqrt() / values.shape[1]).item()


def largest_mean(latents: Tensor) -> float:
    """The largest |channel mean| of a class, averaged; latents are (draws, classes, C, H, W)."""
    return latents.mean((0, -2, -1)).abs().amax(1).mean().item()


@dataclass(frozen=True)
class Cell:
    """What one rule made of N members: latents, images and hits, each (draws, classes, …)."""

    latents: Tensor
    images: Tensor
    hits: Tensor
    fid: float

    @property
    def kept(self) -> float:
        """Percentage of images whose class was kept."""
        return 100 * self.hits.mean().item()

    @property
    def bias(self) -> float:
        """See `largest_mean`."""
        return largest_mean(self.latents)

    def row(self, rule: str, members: int) -> dict[str, Any]:
        """For CSV and JSON."""
        channels = enumerate(self.latents.mean((0, 1, -2, -1)).tolist())
        return {
            "rule": rule, "members": members, "images": self.hits.numel(), "kept": self.kept,
            "kept_se": 100 * standard_error(self.hits), "fid": self.fid, "bias": self.bias,
            "norm": self.latents.square().mean((-3, -2, -1)).sqrt().mean().item(),
            **{f"mean_{channel}": mean for channel, mean in channels},
        }  # fmt: skip


Cells = dict[tuple[str, int], Cell]


@dataclass(frozen=True)
class Study:
    """What a cell needs; its samples run through the classes of the bank, draw by draw."""

    args: argparse.Namespace
    backbone: Backbone
    oracle: FashionNet
    bank: LatentBank
    reference: Tensor

    def measure(self, latents: Tensor, images: Tensor) -> Cell:
        """The cell of latents and images, (draws · classes, …)."""
        features, predicted = judge(self.oracle, images)
        labels = torch.tensor([CLASSES.index(name) for name in self.bank.classes])
        hits = (predicted.view(-1, len(labels)) == labels).float()
        latents, images = (x.unflatten(0, hits.shape) for x in (latents, images))
        return Cell(latents, images, hits, fid(features, self.reference))

    def once(self, name: str, latents: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """The images of these very latents, made if they are not there."""
        weights = self.backbone.fingerprint["weights"][:8]
        path = self.args.out / f"cells-{weights}-{self.args.steps}" / f"{name}.safetensors"
        if path.exists():
            old = load_file(path)
            same = old["latents"].shape == latents.shape
            if same and old["latents"].allclose(latents, atol=1e-4):
                return old["images"].float()
        images = make().cpu().half()
        write_bytes(path, save({"latents": latents.contiguous(), "images": images}))
        return images.float()

    def cell(self, rule: str, members: int) -> Cell:
        """One rule at one number of members."""
        planner = Planner(self.bank.members, seed=members, alpha=math.inf, members=members)
        plans = [planner(0, i) for i in range(self.args.draws * len(self.bank.classes))]
        synthesizer = Synthesizer(self.backbone, self.bank, rule, steps=self.args.steps)
        centroids = torch.stack([synthesizer.centroid(plan) for plan in plans])
        name = f"{rule.replace('/', '-')}-{members}"
        images = self.once(name, centroids, lambda: synthesizer.images(plans))
        return self.measure(centroids, images)

    def yardsticks(self, latents: Tensor, source: Folder) -> tuple[Cell, Cell, Cell]:
        """Real images, as many as a cell has; their latents sampled back; and fresh noise.

        The noise has the bank's channel means, which noise at the last level has in training too.
        """
        means = latents.mean((0, 1, -2, -1))[:, None, None]
        latents = latents[: self.args.draws].flatten(0, 1)
        noise = means + normal(rng(0, "noise"), *latents.shape)
        rows = list(zip(*self.bank.members.values(), strict=True))[: self.args.draws]
        real = torch.stack([source.load(image_id, 1, 32) for row in rows for image_id in row])
        back = self.once("back", latents, lambda: sample(self.backbone, latents, None, "ddim", 50))
        drawn = self.once("noise", noise, lambda: sample(self.backbone, noise, None, "ddim", 50))
        return self.measure(latents, real), self.measure(latents, back), self.measure(noise, drawn)


def open_source(root: Path, per_class: int) -> tuple[Folder, Tensor]:
    """A folder of ``per_class`` test images a class, and the rows of the reference images."""
    images, labels = load_split("test")
    order = torch.from_numpy(rng(0, "order").permutation(len(labels)))
    rows = [order[labels[order] == label] for label in range(len(CLASSES))]
    for name, members in zip(CLASSES, rows, strict=True):
        for row in members[:per_class].tolist():
            if not (path := root / name / f"{row:05d}.png").exists():
                save_image(images[row], path)
    return Folder(root), torch.cat([members[-REFERENCE:] for members in rows])


def fit(cells: Cells, rule: str) -> tuple[float, float]:
    """Slope of the fit bias = slope · √N, and exponent of bias ~ N^exponent."""
    biases, roots = np.array([cells[rule, n].bias for n in COUNTS]), np.sqrt(COUNTS)
    exponent = np.polyfit(np.log(COUNTS), np.log(biases), 1)[0]
    return float(roots @ biases / (roots @ roots)), float(exponent)


def draw_centroids(cells: Cells, real: Cell, classes: list[str], path: Path) -> None:
    """Fig. 1: centroids of two classes, rules across and members down."""
    figure = plt.figure(figsize=(13.2, 9.8), layout="constrained")
    for part, name in zip(figure.subfigures(len(EXHIBITS), 1), EXHIBITS, strict=True):
        part.suptitle(f"{name} (framed: taken for another class)", fontweight="bold")
        grid = part.subplots(len(COUNTS), len(RULES) + 1)
        for row, count in enumerate(COUNTS):
            grid[row, 0].set_ylabel(f"N = {count}", fontsize=11)
            for axes, rule in zip(grid[row], ("real", *RULES), strict=True):
                cell = cells.get((rule, count), real)
                at = row % len(real.hits) if rule == "real" else 0, classes.index(name)
                axes.imshow(cell.images[at][0], cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[], title=rule if row == 0 else "")
                axes.spines[:].set(color=COLORS["fix"], lw=4, visible=not cell.hits[at])
    figure.savefig(path, dpi=150)


def draw_lines(axes: Any, cells: Cells, value: str, label: str) -> None:
    """One line a rule; its colour is the norm rule, its marks and dashes are the mean split."""
    for place, rule in enumerate(RULES):
        norm, split = rule.split("/")
        rows = [cells[rule, n].row(rule, n) for n in COUNTS]
        apart = 0.05 * (place - (len(RULES) - 1) / 2)  # or equal lines hide each other
        bars = [row["kept_se"] for row in rows] if value == "kept" else None
        axes.errorbar(
            np.sqrt(COUNTS) + apart, [row[value] for row in rows], bars, fmt=STYLES[split],
            ms=5, lw=1.6, color=COLORS[norm], label=rule,
        )  # fmt: skip
    axes.set_xticks(np.sqrt(COUNTS), [str(n) for n in COUNTS])
    axes.set(xlabel="members N, at √N", title=label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5")


def draw_bias(cells: Cells, bank_bias: float, path: Path) -> None:
    """Fig. 4: the largest channel mean of the centroids against √N."""
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    draw_lines(axes, cells, "bias", "Largest |channel mean| of the centroids")
    ends = np.array([0, math.sqrt(LAST)])
    slope = fit(cells, "fix/0")[0]
    axes.plot(ends, slope * ends, ":", color=COLORS["fix"], label=f"fit to fix/0: {slope:.2f} √N")
    axes.axhline(bank_bias, color="black", lw=0.8, zorder=0, label=f"bank: {bank_bias:.2f}")
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def draw_quality(cells: Cells, real: Cell, path: Path) -> None:
    """Fig. 7: class kept and FID against N."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    draw_lines(left, cells, "kept", "Class kept, % ± standard error")
    draw_lines(right, cells, "fid", f"FID of {real.hits.numel()} images")
    for axes, level in ((left, real.kept), (right, real.fid)):
        axes.axhline(level, color="black", lw=0.8, zorder=0, label="real images")
    left.set_ylim(None, 101)
    right.set_ylim(0, None)
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def print_table(cells: Cells, title: str, text: Callable[[Cell], str]) -> None:
    """A Markdown table, rules down and members across."""
    print(f"\n{title}\n\n| rule      |" + "".join(f" N = {n:<8} |" for n in COUNTS))
    print("|-----------|" + "--------------|" * len(COUNTS))
    for rule in RULES:
        print(f"| {rule:9} |" + "".join(f" {text(cells[rule, n]):12} |" for n in COUNTS))


def judge_claims(cells: Cells, bank_bias: float) -> list[dict[str, str]]:
    """Each claim, what was found here, and the verdict; noise is two standard errors."""
    (slope, exponent), vp_slope = fit(cells, "fix/0"), fit(cells, "vp/0")[0]
    chm = [cells[rule, n].bias for rule in RULES if rule.endswith("/chm") for n in COUNTS]
    drift = max(abs(bias / bank_bias - 1) for bias in chm)
    growth = f"N^{exponent:.2f}, {slope:.3f} √N (vp/0: {vp_slope:.3f} √N; bank: {bank_bias:.3f})"
    found: list[tuple[str, str, bool | None]] = [
        ("fix/0: channel mean grows as √N", growth, abs(exponent - 0.5) < 0.1),
        ("chm rules: it stays at the bank's", f"within {100 * drift:.0f} %", drift < 0.2),
    ]
    for rule, loses in (("fix/0", True), ("fix/chm", False)):
        few, many = cells[rule, FIRST], cells[rule, LAST]
        noise = 200 * math.hypot(standard_error(few.hits), standard_error(many.hits))
        claim = f"{rule} {'loses' if loses else 'keeps'} the class from N = {FIRST} to {LAST}"
        here = f"{few.kept:.0f} → {many.kept:.0f} %"
        found.append((claim, here, (few.kept - many.kept > noise) == loses))
    fixed, adjusted = cells["fix/0", LAST].fid, cells["fix/chm", LAST].fid
    here = f"{adjusted:.1f} against {fixed:.1f}"
    found.append((f"fix/chm has a better FID than fix/0 at N = {LAST}", here, adjusted < fixed))
    for n in (FIRST, LAST):
        ours, best = cells["fade/chm", n], max(RULES, key=lambda rule: cells[rule, n].kept)
        behind = cells[best, n].kept - ours.kept
        close = 0 < behind <= 200 * standard_error(cells[best, n].hits - ours.hits)
        here = f"{ours.kept:.0f} %, {best} {cells[best, n].kept:.0f} %"
        found.append(
            (f"fade/chm keeps the class best at N = {n}", here, None if close else not behind)
        )
    words = {True: "holds", False: "does not hold", None: "within noise"}
    return [{"claimed": claim, "here": here, "verdict": words[v]} for claim, here, v in found]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Reproduce arXiv 2505.07481 on the tiny backbone.")
    parser.add_argument("--quick", action="store_true", help="5 draws and 20 steps")
    parser.add_argument("--out", type=Path, default=Path("runs/degeneracy"))
    parser.add_argument("--backbone", default="tiny", help="tiny, or weights of train_tiny.py")
    parser.add_argument("--per-class", type=int, default=96, help="images a class to invert")
    parser.add_argument("--draws", type=int, default=20, help="centroids a class and cell")
    parser.add_argument("--steps", type=int, default=50, help="solver steps of the centroids")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(draws=5, steps=20)
    args = parser.parse_args()
    if not max(LAST, args.draws) <= args.per_class <= 1000 - REFERENCE or args.draws < 2:
        parser.error(f"expected 2 ≤ draws ≤ per-class and {LAST} ≤ per-class ≤ {1000 - REFERENCE}")
    return args


def describe_bank(latents: Tensor, real: Cell, back: Cell) -> dict[str, Any]:
    """Statistics of the inverted latents (images, classes, C, H, W), and of their way back."""
    psnr = -10 * (real.images - back.images).square().mean((-3, -2, -1)).log10()
    norms = latents.square().mean((-3, -2, -1)).sqrt()
    return {
        "images": norms.numel(),
        "psnr": [psnr.mean().item(), psnr.std().item()],
        "norm": [norms.mean().item(), norms.std().item()],
        "channel_means": latents.mean((0, 1, -2, -1)).tolist(),
        "bias": largest_mean(latents),
    }


def leak(backbone: Backbone, latents: Tensor, images: Tensor) -> float:
    """How much of a class's mean clean latent its mean inverted latent has: a regression.

    Exact inversion would leave α of the noisiest level.
    """
    clean = backbone.encode(images.flatten(0, 1)).cpu().view_as(latents).mean(0)
    return ((latents.mean(0) * clean).sum() / clean.square().sum()).item()


def print_report(report: dict[str, Any], cells: Cells, real: Cell, back: Cell, drawn: Cell) -> None:
    """Everything that was measured, for reading."""
    bank, means = report["bank"], report["bank"]["channel_means"]
    alone = ", ".join(f"{100 * share:.0f}" for share in bank["alone"])
    print(f"""
oracle  {100 * report["oracle_accuracy"]:.2f} % of the test split; takes a black image for a \
{report["black_is"]}
bank    {bank["images"]} latents; channel means {", ".join(f"{m:+.3f}" for m in means)}, \
the largest of a class {bank["bias"]:.3f}; norm / √D {bank["norm"][0]:.3f} ± {bank["norm"][1]:.3f};
        {bank["leak"]:.3f} of the clean latent is left in it (exact: {bank["alpha"]:.3f})
back    PSNR {bank["psnr"][0]:.1f} ± {bank["psnr"][1]:.1f} dB; class kept {back.kept:.0f} %, \
FID {back.fid:.1f} (real images: {real.kept:.0f} %, {real.fid:.1f})
noise   with the bank's channel means: FID {drawn.fid:.1f}
nao     of weights from Dir(1) is one latent alone in {alone} % of all centroids
        of N = {", ".join(map(str, COUNTS))}""")
    kept, count = "Class kept, % ± standard error", real.hits.numel()
    print_table(cells, kept, lambda c: f"{c.kept:.1f} ± {100 * standard_error(c.hits):.1f}")
    print_table(cells, f"FID of {count} images, oracle features", lambda c: f"{c.fid:.1f}")
    print_table(cells, "Largest |channel mean|", lambda c: f"{c.bias:.3f}")
    print("\n| claimed | here | |\n|---|---|---|")
    for claim in report["claims"]:
        print("| " + " | ".join(claim.values()) + " |")


def alone(study: Study, draws: int = 20) -> list[float]:
    """How often NAO of members with random weights, Dir(1), has the direction of one member."""
    synthesizer, found = Synthesizer(study.backbone, study.bank, "nao/chm"), []
    for count in COUNTS:
        planner = Planner(study.bank.members, seed=count, alpha=1.0, members=count)
        hits = []
        for plan in (planner(0, i) for i in range(draws * len(study.bank.classes))):
            latents = synthesizer.points(plan)[0], synthesizer.centroid(plan)[None]
            points, centroid = ((x - channel_mean(x)).flatten(1) for x in latents)
            hits.append(torch.cosine_similarity(points, centroid).max().item() > 0.9999)
        found.append(float(np.mean(hits)))
    return found


def main() -> None:
    """Measure every cell, then print, draw and write what came out."""
    args = parse()
    matplotlib.use("Agg")
    backbone = load_backbone(args.backbone)
    oracle = fashion_net(backbone.device)
    images, labels = load_split("test")
    features, predicted = judge(oracle, prepare(images, 1, 32))
    source, rows = open_source(args.out / f"images-{args.per_class}", args.per_class)
    weights = backbone.fingerprint["weights"][:8]
    bank = fill_bank(
        args.out / f"bank-{args.per_class}-{weights}", backbone, source, None, "ddim", 50
    )
    study = Study(args, backbone, oracle, bank, features[rows])
    latents = torch.stack([bank.latents(name) for name in bank.classes], 1)
    real, back, drawn = study.yardsticks(latents, source)
    jobs = [(rule, n) for n in COUNTS for rule in RULES]
    cells = {job: study.cell(*job) for job in tqdm(jobs, "cells", unit="cell", delay=2)}
    bank_record = describe_bank(latents, real, back) | {
        "leak": leak(backbone, latents[: len(real.images)], real.images),
        "alpha": backbone.process.alpha_sigma(1)[0],
        "alone": alone(study),
    }
    report = {
        "settings": {key: str(value) for key, value in vars(args).items()} | backbone.fingerprint,
        "oracle_accuracy": (predicted == labels).float().mean().item(),
        "black_is": CLASSES[judge(oracle, torch.zeros(1, 1, 32, 32))[1]],
        "bank": bank_record,
        "yardsticks": [
            cell.row(name, 1)
            for name, cell in (("real", real), ("sampled back", back), ("fresh noise", drawn))
        ],
        "cells": [cell.row(*job) for job, cell in cells.items()],
        "claims": judge_claims(cells, bank_record["bias"]),
    }
    write_json(args.out / "degeneracy.json", report)
    with (args.out / "degeneracy.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(report["cells"][0]))
        table.writeheader()
        table.writerows(report["cells"])
    draw_centroids(cells, real, bank.classes, args.out / "fig1_centroids.png")
    draw_bias(cells, bank_record["bias"], args.out / "fig4_channel_mean.png")
    draw_quality(cells, real, args.out / "fig7_quality.png")
    print_report(report, cells, real, back, drawn)


if __name__ == "__main__":
    main()
