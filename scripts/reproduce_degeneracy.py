"""Reproduce on the embedded backbone why centroids of many latents degenerate, and the cure.

    python scripts/reproduce_degeneracy.py          # 15 minutes on two cores
    python scripts/reproduce_degeneracy.py --quick  # 4 minutes

plus, once, 5 minutes for the oracle. Landolsi & Kahl, *Mean-adjusted interpolation*, arXiv
2505.07481: inverted latents share a small channel bias; averaging N of them and restoring the norm
lengthens that bias √N-fold, and images degenerate; rules that take the mean out first do not. Each
centroid mixes N images of one class of the test split in equal parts, the same ones under every
rule. The oracle, a convnet trained on the training split, says whether the class was kept, and its
features give the FID to other test images. Interrupt it when you like: finished cells stay in --out.
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
import torch.nn.functional as F
from fashion_mnist import CLASSES, load_split
from matplotlib import pyplot as plt
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from augment.bank import LatentBank, fill_bank
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.solver import sample
from augment.files import write_bytes, write_json
from augment.images import prepare, save_image
from augment.plan import Planner
from augment.seeds import rng
from augment.sources import Folder
from augment.synthesis import Synthesizer

RULES = ("lin/0", "fix/0", "nin/0", "vp/0", "fade/0", "fix/chm", "nin/chm", "fade/chm")
COUNTS = (2, 8, 32, 64)
COLORS = {"lin": "#888888", "fix": "#d55e00", "nin": "#cc79a7", "vp": "#e69f00", "fade": "#0072b2"}
EXHIBITS = ("Ankle boot", "Shirt")
REFERENCE = 200
"""Real test images a class, none of them in the bank, that FID compares with."""


class Oracle(nn.Module):
    """Four convolutions, 64 features and a linear head: 0.27 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide, stride in ((1, 32, 2), (32, 64, 1), (64, 128, 2), (128, 128, 2)):
            conv = nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(wide), nn.ReLU()]
        pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3)]
        self.features = nn.Sequential(*layers, *pool, nn.Linear(512, 64), nn.ReLU())
        self.head = nn.Linear(64, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.features(images))

    @torch.inference_mode()
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and predicted labels."""
        device = self.head.weight.device
        features = torch.cat([self.features(part.to(device)) for part in images.split(500)])
        return features.cpu(), self.head(features).argmax(1).cpu()


def jitter(images: Tensor) -> Tensor:
    """Flip each image or not, and shift it by up to 2 pixels."""
    count, device = len(images), images.device
    images = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, images.flip(-1), images)
    top, left = torch.randint(5, (2, count, 1, 1), device=device)
    grid = torch.arange(32, device=device)
    rows, columns = top + grid[:, None], left + grid
    padded = F.pad(images[:, 0], (2, 2, 2, 2))
    return padded[torch.arange(count, device=device)[:, None, None], rows, columns][:, None]


def load_oracle(path: Path, epochs: int, device: torch.device) -> Oracle:
    """The oracle, trained if it is not there."""
    torch.manual_seed(0)
    oracle = Oracle().to(device, memory_format=torch.channels_last)
    if path.exists():
        oracle.load_state_dict(load_file(path))
        return oracle.eval()
    images, labels = load_split("train")
    images, labels = prepare(images, 1, 32).to(device), labels.to(device)
    optimizer = torch.optim.AdamW(oracle.parameters(), weight_decay=0.05)
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(images)).split(128)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, len(batches))
    for rows in tqdm(batches, "oracle", unit="step", delay=2):
        loss = F.cross_entropy(oracle(jitter(images[rows])), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    write_bytes(path, save({k: v.cpu().contiguous() for k, v in oracle.state_dict().items()}))
    return oracle.eval()


def fid(some: Tensor, others: Tensor) -> float:
    """Fréchet distance of two sets of features (n, d), in float64; biased upwards for small n."""
    (mean, cov), (mean2, cov2) = ((x.mean(0), x.T.cov()) for x in (some.double(), others.double()))
    root = torch.linalg.eigvals(cov @ cov2).real.clamp_min(0).sqrt().sum()
    return ((mean - mean2).square().sum() + cov.trace() + cov2.trace() - 2 * root).item()


def standard_error(values: Tensor) -> float:
    """Of the mean of (draws, classes), with the classes taken as given."""
    return ((values.var(0) / len(values)).sum().sqrt() / values.shape[1]).item()


@dataclass(frozen=True)
class Cell:
    """What was measured on the images of one rule and one number of members.

    Args:
        rule, members: the rule and how many latents each centroid mixes.
        hits: (draws, classes), 1 where the oracle sees the class of the members.
        fid: to the reference images.
        means: (classes, channels), channel means of the centroids.
        norm: mean norm of the centroids over √D.
        images: (draws, classes, 1, 32, 32).
    """

    rule: str
    members: int
    hits: Tensor
    fid: float
    means: Tensor
    norm: float
    images: Tensor

    @property
    def kept(self) -> float:
        """Share of images whose class was kept."""
        return self.hits.mean().item()

    @property
    def bias(self) -> float:
        """The largest of a class's channel means in absolute value, averaged over the classes."""
        return self.means.abs().amax(1).mean().item()

    def row(self) -> dict[str, Any]:
        """For CSV and JSON."""
        shares = {"kept": self.kept, "kept_se": standard_error(self.hits), "fid": self.fid}
        channels = {f"mean_{c}": m.item() for c, m in enumerate(self.means.mean(0))}
        return {
            "rule": self.rule, "members": self.members, "images": self.hits.numel(),
            **shares, "bias": self.bias, "norm": self.norm, **channels,
        }  # fmt: skip


Cells = dict[tuple[str, int], Cell]


@dataclass
class Study:
    """Everything that a cell needs; images and latents run through the classes, draw by draw."""

    args: argparse.Namespace
    backbone: Backbone
    oracle: Oracle
    source: Folder
    bank: LatentBank
    reference: Tensor

    def measure(self, rule: str, members: int, latents: Tensor, images: Tensor) -> Cell:
        """A cell from its latents and images, (draws · classes, …)."""
        features, predicted = self.oracle.judge(images)
        labels = torch.tensor([CLASSES.index(name) for name in self.bank.classes])
        hits = (predicted.view(-1, len(labels)) == labels).float()
        means = latents.unflatten(0, hits.shape).mean((0, -2, -1))
        norm = latents.flatten(1).square().mean(1).sqrt().mean().item()
        images = images.unflatten(0, hits.shape)
        return Cell(rule, members, hits, fid(features, self.reference), means, norm, images)

    def remembered(self, name: str, latents: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """The images of these very latents, made only once."""
        weights = self.backbone.fingerprint["weights"][:8]
        path = self.args.out / f"cells-{weights}-{self.args.steps}" / f"{name}.safetensors"
        old = load_file(path) if path.exists() else {"latents": torch.empty(0)}
        if old["latents"].shape == latents.shape and torch.allclose(old["latents"], latents):
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
        images = self.remembered(name, centroids, lambda: synthesizer.images(plans))
        return self.measure(rule, members, centroids, images)

    def yardsticks(self) -> tuple[Cell, Cell, Tensor]:
        """Cells of real images and of their latents sampled back, and the PSNR of the latter."""
        ids = list(zip(*self.bank.members.values(), strict=True))[: self.args.draws]
        real = torch.stack([self.source.load(i, 1, 32) for draw in ids for i in draw])
        latents = torch.stack([self.bank.latents(name) for name in self.bank.classes], 1)
        used = latents[: self.args.draws].flatten(0, 1)
        back = self.remembered("back", used, lambda: sample(self.backbone, used, steps=50))
        psnr = -10 * (real - back).square().mean((1, 2, 3)).log10()
        real_cell = self.measure("real", 1, latents.flatten(0, 1)[: len(used)], real)
        return real_cell, self.measure("sampled back", 1, used, back), psnr


def build_bank(args: argparse.Namespace, backbone: Backbone) -> tuple[Folder, LatentBank, Tensor]:
    """Source and bank of --per-class test images a class, and the reference images' rows."""
    images, labels = load_split("test")
    order = torch.from_numpy(rng(0, "order").permutation(len(labels)))
    rows = [order[labels[order] == c] for c in range(len(CLASSES))]
    folder = args.out / f"images-{args.per_class}"
    for name, members in zip(CLASSES, rows, strict=True):
        for row in members[: args.per_class].tolist():
            if not (path := folder / name / f"{row:05d}.png").exists():
                save_image(images[row], path)
    source, weights = Folder(folder), backbone.fingerprint["weights"][:8]
    bank = fill_bank(args.out / f"bank-{args.per_class}-{weights}", backbone, source, steps=50)
    return source, bank, torch.cat([members[-REFERENCE:] for members in rows])


def fit(cells: Cells, rule: str) -> tuple[float, float]:
    """Of the fits bias = slope · √N and bias ~ N^exponent: slope and exponent."""
    biases, roots = np.array([cells[rule, n].bias for n in COUNTS]), np.sqrt(COUNTS)
    exponent = np.polyfit(np.log(COUNTS), np.log(biases), 1)[0]
    return float(roots @ biases / (roots @ roots)), float(exponent)


def draw_centroids(cells: Cells, real: Cell, names: list[str], path: Path) -> None:
    """Fig. 1: one centroid of each of two classes, rules across and members down."""
    figure = plt.figure(figsize=(9.6, 9.6), layout="constrained")
    figure.suptitle("One centroid of N images (framed: the oracle sees another class)")
    for part, name in zip(figure.subfigures(len(EXHIBITS), 1), EXHIBITS, strict=True):
        grid = part.subplots(len(COUNTS), len(RULES) + 1)
        for row, count in enumerate(COUNTS):
            for axes, rule in zip(grid[row], ("real", *RULES), strict=True):
                cell = cells.get((rule, count), real)
                at = row % len(cell.hits) if cell is real else 0, names.index(name)
                axes.imshow(cell.images[at][0], cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[], title=rule if row == 0 else "")
                axes.spines[:].set(color=COLORS["fix"], lw=4, visible=not cell.hits[at])
            grid[row, 0].set_ylabel(f"{name}, N = {count}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_lines(axes: Any, cells: Cells, value: str, x: Any, label: str, by: float = 1) -> None:
    """A line a rule: colours are norm rules, dashes and squares the mean split chm."""
    for rule in RULES:
        norm, split = rule.split("/")
        rows = [cells[rule, n].row() for n in COUNTS]
        bars = [by * row["kept_se"] for row in rows] if value == "kept" else None
        style = {"marker": "o", "ls": "-"} if split == "0" else {"marker": "s", "ls": "--"}
        values = [by * row[value] for row in rows]
        axes.errorbar(x(np.array(COUNTS)), values, bars, color=COLORS[norm], label=rule, **style)
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd")


def draw_bias(cells: Cells, bank_bias: float, path: Path) -> None:
    """Fig. 4: the largest channel mean of the centroids against √N."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    draw_lines(axes, cells, "bias", np.sqrt, "largest |channel mean| of the centroids")
    slope, ends = fit(cells, "fix/0")[0], np.array([0, math.sqrt(COUNTS[-1])])
    axes.plot(ends, slope * ends, ":", color=COLORS["fix"], label=f"fit {slope:.2f} √N")
    axes.axhline(bank_bias, color="black", lw=0.8, label=f"the bank's {bank_bias:.2f}")
    axes.set_xticks(np.sqrt(COUNTS), [f"√{n}" for n in COUNTS])
    axes.set(xlabel="√ members", ylim=(0, None), xlim=(0, None))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_quality(cells: Cells, real: Cell, path: Path) -> None:
    """Fig. 7: class kept and FID against N."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    draw_lines(left, cells, "kept", np.log2, "class kept, % ± standard error", by=100)
    draw_lines(right, cells, "fid", np.log2, f"FID of {real.hits.numel()} images, oracle features")
    left.set_ylim(0, 102)
    right.set_yscale("log")
    for axes, level in ((left, 100 * real.kept), (right, real.fid)):
        axes.axhline(level, color="black", lw=0.8, label="real images")
        axes.set_xticks(np.log2(COUNTS), [str(n) for n in COUNTS])
        axes.set_xlabel("members N")
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_table(cells: Cells, title: str, text: Callable[[Cell], str]) -> None:
    """A Markdown table, rules down and numbers of members across."""
    head = "".join(f" N = {n:<8} |" for n in COUNTS)
    print(f"\n{title}\n\n| rule     |{head}\n|----------|{'--------------|' * len(COUNTS)}")
    for rule in RULES:
        print(f"| {rule:8} |" + "".join(f" {text(cells[rule, n]):12} |" for n in COUNTS))


def judge_claims(cells: Cells, bank_bias: float) -> list[dict[str, str]]:
    """The claims, what was found here, and whether they hold."""
    first, last = COUNTS[0], COUNTS[-1]
    slope, exponent = fit(cells, "fix/0")
    stays = max(abs(cells[r, n].bias / bank_bias - 1) for r in RULES if "chm" in r for n in COUNTS)
    claims = [
        (
            "fix/0: channel mean grows like √N",
            f"like N^{exponent:.2f}; fit {slope:.3f} √N, the bank's own is {bank_bias:.3f}",
            abs(exponent - 0.5) < 0.1,
        ),
        (
            "…/chm: channel mean stays at the bank's",
            f"within {100 * stays:.0f} %",
            stays < 0.25,
        ),
    ]
    for rule, loses in (("fix/0", True), ("fix/chm", False)):
        a, b = cells[rule, first], cells[rule, last]
        sure = 2 * math.hypot(standard_error(a.hits), standard_error(b.hits))
        here = (
            f"class kept {100 * a.kept:.0f} → {100 * b.kept:.0f} %, FID {a.fid:.1f} → {b.fid:.1f}"
        )
        claim = (
            f"{rule} {'loses' if loses else 'keeps'} class and quality from N = {first} to {last}"
        )
        claims.append((claim, here, (a.kept - b.kept > sure) == loses))
    for n in (first, last):
        best, ours = max((cells[r, n] for r in RULES), key=lambda c: c.kept), cells["fade/chm", n]
        sure = 2 * standard_error(best.hits - ours.hits)
        here = ", ".join(f"{r} {100 * cells[r, n].kept:.0f}" for r in RULES)
        claims.append(
            (f"fade/chm keeps the class best at N = {n}", here, best.kept - ours.kept <= sure)
        )
    return [
        {"claimed": c, "here": h, "verdict": "holds" if v else "does not hold"}
        for c, h, v in claims
    ]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 solver steps and 5 draws a class")
    parser.add_argument("--out", type=Path, default=Path("runs/degeneracy"))
    parser.add_argument("--backbone", default="tiny", help="name, or weights of train_tiny.py")
    parser.add_argument("--per-class", type=int, default=96, help="images a class to invert")
    parser.add_argument("--draws", type=int, default=20, help="centroids a class and cell")
    parser.add_argument("--steps", type=int, default=50, help="solver steps of the centroids")
    parser.add_argument("--epochs", type=int, default=10, help="of the oracle's training")
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(draws=5, steps=20)
    args = parser.parse_args()
    if not COUNTS[-1] <= args.per_class <= 1000 - REFERENCE:
        parser.error(f"expected --per-class from {COUNTS[-1]} to {1000 - REFERENCE}")
    if not 2 <= args.draws <= args.per_class:
        parser.error("expected --draws from 2 to --per-class")
    return args


def main() -> None:
    """Measure every cell, then print, draw and write what came out."""
    args = parse()
    matplotlib.use("Agg")
    backbone = load_backbone(args.backbone)
    oracle = load_oracle(args.out / "oracle.safetensors", args.epochs, backbone.device)
    images, labels = load_split("test")
    features, predicted = oracle.judge(prepare(images, 1, 32))
    accuracy = (predicted == labels).float().mean().item()
    print(f"oracle: {100 * accuracy:.2f} % of the {len(labels)} test images")
    source, bank, reference = build_bank(args, backbone)
    study = Study(args, backbone, oracle, source, bank, features[reference])
    real, back, psnr = study.yardsticks()
    latents = torch.stack([bank.latents(name) for name in bank.classes], 1)
    norms = latents.flatten(2).square().mean(2).sqrt()
    jobs = [(rule, n) for n in COUNTS for rule in RULES]
    cells = {job: study.cell(*job) for job in tqdm(jobs, "cells", delay=2)}
    whole = study.measure(
        "bank", 1, latents.flatten(0, 1), torch.zeros(latents.shape[0] * 10, 1, 32, 32)
    )
    print(
        psnr.mean(),
        psnr.std(),
        latents.mean((0, 1, 3, 4)),
        norms.mean(),
        norms.std(),
        whole.bias,
        real.row(),
        back.row(),
    )
    print_table(
        cells, "Class kept, %", lambda c: f"{100 * c.kept:.0f} ± {100 * standard_error(c.hits):.0f}"
    )
    print_table(cells, "FID", lambda c: f"{c.fid:.1f}")
    print_table(cells, "bias", lambda c: f"{c.bias:.3f} {c.norm:.3f}")
    for c in judge_claims(cells, whole.bias):
        print(c)
    draw_centroids(cells, real, bank.classes, args.out / "fig1_centroids.png")
    draw_bias(cells, whole.bias, args.out / "fig4_channel_mean.png")
    draw_quality(cells, real, args.out / "fig7_quality.png")


if __name__ == "__main__":
    main()
