"""Levels: how far up images are taken before they are mixed and sampled, and what that gains.

    python scripts/reproduce/levels.py --quick
    python scripts/reproduce/levels.py

DA-Fusion (arXiv 2302.07944), Diff-Mix (arXiv 2403.19600) and Diff-II (CVPR 2025) sample from a
level s below the noisiest: less is new, and more of the image stays. Asked here for ``tiny``, with
5 images a class: is the class kept, how near are the images to real ones (FID), how different are
they from each other and from the image they come from, and what do they gain a classifier. Two ways
to a level: latents inverted up to it and mixed by fade/chm (clean part by the weights, noise by the
rule), and noise added to one image's clean latent (SDEdit, ``--inversion noise``), which mixes
nothing. Gains are over the real images with classical augmentation, paired by the drawn images.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from claims import claim, conclude, once, options
from judge import FeatureJudge, better, ci95, load_all, mean_and_error, open_judge, pictures
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.core.files import read_json, write_json
from augment.diffusion import Backbone, load_backbone
from augment.plan.mixing import Mixing
from augment.sources import FewShot, Source
from augment.sources.images import sheet
from augment.synthesis.synthesizer import Synthesizer, planner_of
from augment.training.data.draws import SyntheticMix
from augment.training.data.module import ImageData
from augment.training.demo import demo_trainer
from augment.training.models.classifier import Classifier

LEVELS = (0.3, 0.5, 0.7, 1.0)
WAYS = ("fade/chm", "noise")
SHOTS, SHARE, TRAIN_STEPS = 5, 0.25, 200
Cell = tuple[str, float]


class Images(list[tuple[Tensor, int]]):
    """Images in memory, of the classes in turn."""

    def __init__(self, images: Tensor, classes: int) -> None:
        self.targets = [index % classes for index in range(len(images))]
        super().__init__(zip(images, self.targets, strict=True))


def bank_of(cell: Cell, root: Path, backbone: Backbone, pool: Source, steps: int) -> LatentBank:
    """Invert all images of the pool for a cell; noise takes one bank for all levels."""
    way, level = cell
    if way == "noise":
        return fill_bank(root / "noise", backbone, pool, None, "noise", steps=steps, stored=())
    return fill_bank(root / f"{level}", backbone, pool, steps=steps, stored=(), level=level)


def synthetic(cell: Cell, bank: LatentBank, backbone: Backbone, seed: int, each: int) -> Tensor:
    """Make ``each`` images a class, of the classes in turn."""
    way, level = cell
    noise = way == "noise"
    mixing = Mixing(seed=seed, level=level if noise else None, members=1 if noise else None)
    planner = planner_of(bank, mixing)
    plans = [planner(0, index) for index in range(each * len(bank.classes))]
    return Synthesizer(backbone, bank, Rule.parse("fade/chm")).images(plans)


def accuracy(done: Path, real: Source, test: Source, fake: Any, seed: int) -> float:
    """Train a small network, and return its accuracy; read it if it was measured before."""
    if done.exists():
        return read_json(done, "an accuracy")
    torch.manual_seed(seed)
    channels = 1 if fake is None else fake[0][0].shape[0]
    data = ImageData(
        real, test=test, synthetic=fake, mix=SyntheticMix(SHARE), channels=channels,
        steps_per_epoch=TRAIN_STEPS, seed=seed,
    )  # fmt: skip
    model, trainer = (
        Classifier(data.counts, channels=channels, seed=seed),
        demo_trainer(TRAIN_STEPS),
    )
    trainer.fit(model, data)
    found = trainer.test(model, data, verbose=False)[0]["test/accuracy"]
    write_json(done, found)
    return found


def judged(images: Tensor, real: Tensor, judge: FeatureJudge, classes: int) -> dict[str, Tensor]:
    """Assess images of the classes in turn, of one draw of shots.

    Args:
        images: (n, C, R, R).
        real: (classes, shots, C, R, R), those that they come from.
        judge: a network.
        classes: their number.

    Returns:
        Of each image ``kept``, its ``features`` and the RMS distance in pixels to the ``nearest``
        of the shots of its class; of each class the ``variety``, the mean distance of two images.
    """
    seen = judge.assess(images, torch.arange(len(images)) % classes)
    groups = images.flatten(1).unflatten(0, (-1, classes)).transpose(0, 1)
    root, count = groups.shape[-1] ** 0.5, groups.shape[1]
    variety = torch.cdist(groups, groups).sum((1, 2)) / root / max(count * (count - 1), 1)
    nearest = torch.cdist(groups, real.flatten(2)).amin(2).flatten() / root
    return {**seen, "nearest": nearest, "variety": variety}


def draw(found: dict[Cell, dict[str, Tensor]], gains: dict[Cell, Tensor], path: Path) -> None:
    """Draw what is measured over the level."""
    panels = {"kept": "class kept, %", "fid": "FID", "variety": "variety", "gain": "gain, points"}
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    plots = figure.subplots(1, 4)
    for axes, (key, title) in zip(plots, panels.items(), strict=True):
        for way in WAYS:
            rows = [gains[way, s] if key == "gain" else found[way, s][key] for s in LEVELS]
            scale = 1.0 if key in ("fid", "variety") else 100.0
            mean, error = zip(*(mean_and_error(row.flatten(), scale) for row in rows), strict=True)
            axes.errorbar(LEVELS, mean, error, fmt="o-", ms=3, capsize=2, label=way)
        axes.set(title=title, xlabel="level s")
    plots[-1].axhline(0, color="grey", lw=0.5)
    plots[-1].legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Invert to each level, mix, sample, train, judge."""
    args = options("Levels below the noisiest, on few shots.", "levels").parse_args()
    seeds, each, steps = (2, 6, 10) if args.quick else (5, 10, 20)
    backbone = load_backbone(args.backbone)
    pool, test = pictures(args, 32)
    judge, classes = open_judge(args, backbone, test), len(pool.classes)
    root = args.out / f"{backbone.fingerprint['weights'][:8]}-{steps}-{each}"
    cells: list[Cell] = list(product(WAYS, LEVELS))
    drawn = [FewShot(pool, SHOTS, seed) for seed in range(seeds)]
    alone = [
        accuracy(root / f"real-{seed}.json", real, test, None, seed)
        for seed, real in enumerate(tqdm(drawn, "real images alone"))
    ]
    found: dict[Cell, dict[str, Tensor]] = {}
    gains: dict[Cell, Tensor] = {}
    strips: dict[str, list[Tensor]] = {}
    for cell in tqdm(cells, "cells"):
        bank = bank_of(cell, root, backbone, pool, steps)
        name, parts, own = f"{cell[0].replace('/', '-')}-{cell[1]}", [], []
        for seed, real in enumerate(drawn):
            ids = {image_id for ids in real.ids.values() for image_id in ids}
            some = bank.subset(ids.__contains__)
            images = once(
                root / f"{name}-{seed}.safetensors",
                lambda s=some, n=seed, c=cell: {"images": synthetic(c, s, backbone, n, each)},
            )["images"]
            shots = load_all(real, backbone).unflatten(0, (classes, -1))
            parts.append(judged(images, shots, judge, classes))
            fake, done = Images(images, classes), root / f"{name}-{seed}.json"
            own.append(accuracy(done, real, test, fake, seed) - alone[seed])
            if seed == 0:
                strips[f"{cell[0]}, {cell[1]}"] = list(images[:classes])
        found[cell] = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
        found[cell]["fid"] = torch.tensor([judge.fid(found[cell]["features"].flatten(0, 1))])
        gains[cell] = torch.tensor(own, dtype=torch.float64)
    sheet(strips, [name[:10] for name in pool.classes]).save(args.out / "images.png")
    draw(found, gains, args.out / "levels.png")
    rows = [
        {
            "way": way, "level": level,
            "class kept, %": ci95(cell["kept"].flatten(), 100), "FID": f"{cell['fid'].item():.3g}",
            "variety": ci95(cell["variety"].flatten()),
            "nearest shot": ci95(cell["nearest"].flatten()),
            "gain, points": ci95(gains[way, level], 100),
        }
        for (way, level), cell in found.items()
    ]  # fmt: skip
    print(f"real images alone: {ci95(torch.tensor(alone), 100)} %\n")
    conclude(args, rows, verdicts(found, gains))


def verdicts(
    found: dict[Cell, dict[str, Tensor]], gains: dict[Cell, Tensor]
) -> list[dict[str, str]]:
    """Return the claims."""
    claims = []

    def ends(way: str, key: str) -> Sequence[Tensor]:
        return [found[way, level][key].flatten() for level in (LEVELS[0], LEVELS[-1])]

    for way in WAYS:
        low, high = ends(way, "variety")
        claims.append(claim(f"{way}: the higher the level, the more images of a class differ",
                            f"{ci95(low)} → {ci95(high)}", better(high, low)))  # fmt: skip
        low, high = ends(way, "kept")
        claims.append(claim(f"{way}: and the less the class is kept",
                            f"{ci95(low, 100)} → {ci95(high, 100)} %",
                            better(low, high)))  # fmt: skip
        best = max(LEVELS, key=lambda level, w=way: gains[w, level].mean().item())
        top = gains[way, LEVELS[-1]]
        verdict = better(gains[way, best], top) if best != LEVELS[-1] else False
        claims.append(claim(f"{way}: a level below the noisiest gains a classifier more",
                            f"{ci95(gains[way, best], 100)} at {best} against {ci95(top, 100)}",
                            verdict))  # fmt: skip
    kept = [found[way, 1.0]["kept"].flatten() for way in WAYS]
    claims.append(claim("at the noisiest level only inverted latents keep the class",
                        f"{ci95(kept[0], 100)} % against {ci95(kept[1], 100)} %",
                        better(*kept)))  # fmt: skip
    return claims


if __name__ == "__main__":
    main()
