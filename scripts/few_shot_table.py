"""When do centroids help? Few shots, each way of augmenting them, and what each cost.

    python scripts/few_shot_table.py fashion                     # embedded Fashion-MNIST, `tiny`
    python scripts/few_shot_table.py cifar10 --images CIFAR --backbone tiny-cifar.safetensors
    python scripts/few_shot_table.py fashion --tune              # the grid that settings come from

Every row trains the same small network for the same number of steps; only the images differ. Shots
are drawn from images that the backbone did not see (32 embedded ones a class; CIFAR-10's first
100), and tested on others that it did not see (200 a class; CIFAR-10's last 200). *Twice the shots*
is the yardstick. ``--tune`` chooses settings on images that are neither drawn nor tested:
Fashion-MNIST's training split, CIFAR-10's images 3800 … 3999. Finished runs stay in ``--out``.
"""

import argparse
import json
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from fashion_mnist import CLASSES, load_split
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from train_tiny import VEHICLES

from augment import (
    LatentBank,
    Mixing,
    Planner,
    Sampling,
    SyntheticDataset,
    fill_bank,
    load_backbone,
    sample,
)
from augment.centroid import Rule
from augment.centroid.residuals import mix
from augment.core.errors import BiasWarning
from augment.core.files import write_json
from augment.core.rng import normal, rng
from augment.report.evaluate import markdown
from augment.sources import FewShot, Folder, Slice, Source
from augment.sources.fashion import COARSE, write_fashion
from augment.sources.images import save_image
from augment.synthesis.refine import SeedSelect
from augment.synthesis.synthesizer import Synthesizer
from augment.training.data.draws import SyntheticMix
from augment.training.data.module import ImageData
from augment.training.data.transforms import Augmentation
from augment.training.demo import demo_trainer
from augment.training.models.classifier import Classifier
from augment.training.models.metrics import interval

SHOTS, SEEDS, STEPS = (1, 2, 5, 10, 20), 5, 300
REFINED_STEPS = 4  # of the solver that SeedSelect goes back through


@dataclass(frozen=True)
class Row:
    """One way of augmenting.

    Args:
        name: as printed.
        kind: of the synthetic images: none, centroids, noises, pixels or prompts.
        mixing: how centroids are mixed; the seed is the run's.
        share: share of synthetic draws.
        per_class: synthetic images a class.
        augment: classical augmentation.
        cutmix, mixup: their α.
        times: factor of the number of shots.
        refine: refines centroids or noises by the shots of their class.
    """

    name: str
    kind: str = "none"
    mixing: Mixing = Mixing()  # noqa: RUF009
    share: float = 0.25
    per_class: int = 30
    augment: Augmentation = Augmentation()  # noqa: RUF009
    cutmix: float = 0.0
    mixup: float = 0.0
    times: int = 1
    refine: SeedSelect | None = None


PLAIN = Augmentation(crop=None, flip=False)
BASE, TWICE = "classical", "twice the shots"
RULES = ("fix/0", "fix/chm", "fade/chm", "nao/chm")  # `demo --full` has more
ROWS = (
    Row("real only", augment=PLAIN),
    Row(BASE),
    Row("RandAugment", augment=Augmentation(randaugment=2)),
    Row("CutMix", cutmix=1.0),
    Row("mixup", mixup=1.0),
    Row("pixel mix", "pixels"),
    Row("prompt only", "prompts"),
    *(Row(f"centroids {rule}", "centroids", Mixing(rule=rule)) for rule in RULES),
    Row("RandAugment + fade/chm", "centroids", augment=Augmentation(randaugment=2)),
    Row(TWICE, times=2),
)
TUNED = (
    Row(BASE),
    *(
        Row(f"share {share} alpha {alpha}", "centroids", Mixing(alpha=alpha), share)
        for share in (0.1, 0.25, 0.5)
        for alpha in (0.2, 1.0, 5.0)
    ),
    *(Row(f"members {count}", "centroids", Mixing(members=count)) for count in (1, 2, 3)),
    *(Row(f"noise {noise}", "centroids", Mixing(noise=noise)) for noise in (0.1, 0.3, 0.5)),
    *(Row(f"per class {count}", "centroids", per_class=count) for count in (10, 200)),
    Row(TWICE, times=2),
)


class Images(Dataset[tuple[Tensor, int]]):
    """Images in memory, of the classes in turn."""

    def __init__(self, images: Tensor, classes: int) -> None:
        self.images = images
        self.targets = [index % classes for index in range(len(images))]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image and its label."""
        return self.images[index], self.targets[index]


class FewShotBench:
    """A data set: where shots and tests come from, and the bank of all images to draw from."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out, self.steps = args, args.out / args.data, STEPS
        grey = args.data == "fashion"
        name, lora = "tiny" if grey else args.backbone, {"lora": args.lora} if args.lora else {}
        self.backbone = load_backbone(name, device="cpu", **lora)
        self.channels = self.backbone.channels
        self.pool, self.test = self.fashion() if grey else self.cifar()
        words = COARSE if grey else {}
        self.words = {n: words.get(n, "vehicle" if n in VEHICLES else "animal") for n in self.names}
        begun = time.process_time()
        self.bank = fill_bank(self.out / "bank", self.backbone, self.pool, stored=())
        print(f"bank: {time.process_time() - begun:.0f} s")
        warnings.simplefilter("ignore", BiasWarning)

    @property
    def names(self) -> list[str]:
        """Return the classes."""
        return self.pool.classes

    def fashion(self) -> tuple[Source, Source]:
        """Return the embedded images; with ``--tune``, images of the training split."""
        if not self.args.tune:
            pool = write_fashion(self.out / "pool", "shots")
            return Folder(pool), Folder(write_fashion(self.out / "test", "test"))
        images, labels = load_split("train")
        for label, name in enumerate(CLASSES):
            own = images[labels == label]
            for part, first, count in (("pool", 0, 32), ("test", 1000, 200)):
                for number in range(count):
                    path = self.out / part / name / f"{number:03d}.png"
                    if not path.exists():
                        save_image(own[first + number], path)
        return Folder(self.out / "pool"), Folder(self.out / "test")

    def cifar(self) -> tuple[Source, Source]:
        """Return parts of CIFAR-10 in class folders."""
        root = self.args.images
        last = Slice(root, 3800, 4000) if self.args.tune else Slice(root, -200)
        return Slice(root, 0, 100), last

    def synthetic(self, row: Row, real: Source, seed: int) -> tuple[Any, float]:
        """Make the synthetic images of a row; return them and the CPU seconds they took."""
        if row.kind == "none":
            return None, 0.0
        begun = time.process_time()
        drawn = {image_id for ids in real.ids.values() for image_id in ids}
        bank = self.bank.subset(drawn.__contains__)
        if row.refine:
            images = self.refined(bank, row, row.per_class * len(self.names), seed)
            made: Any = Images(images, len(self.names))
        elif row.kind == "centroids":
            mixing = replace(row.mixing, seed=seed)
            made = SyntheticDataset(
                bank, self.backbone, mixing, Sampling(solver="fast"), row.per_class, keep=True
            )
            made.__getitems__(range(len(made)))
        else:
            count = row.per_class * len(self.names)
            pixels = row.kind == "pixels"
            images = self.pixels(bank, real, count, seed) if pixels else self.prompted(count, seed)
            made = Images(images, len(self.names))
        return made, time.process_time() - begun

    def refined(self, bank: LatentBank, row: Row, count: int, seed: int) -> Tensor:
        """Refine noises or centroids by SeedSelect, and sample them by few steps of DDIM."""
        assert row.refine
        rule, how = Rule.parse(row.mixing.rule), Sampling(solver="ddim", steps=REFINED_STEPS)
        synthesizer = Synthesizer(self.backbone, bank, rule, how, refine=row.refine)
        planner = Planner(bank.members, replace(row.mixing, seed=seed))
        plans = [planner(0, index) for index in range(count)]
        if row.kind == "centroids":
            return synthesizer.images(plans)
        shape = self.backbone.latent_shape
        noises = torch.stack([normal(rng(seed, "noise", 0, i), *shape) for i in range(count)])
        goals = [synthesizer.goal(plan) for plan in plans]
        found = row.refine(self.backbone, noises, goals, None, synthesizer.resolved)
        return synthesizer.sample(found.latents, plans)

    def pixels(self, bank: LatentBank, real: Source, count: int, seed: int) -> Tensor:
        """Mix pixels by the plans that centroids follow."""
        planner, images = Planner(bank.members, Mixing(seed=seed)), []
        for plan in (planner(0, index) for index in range(count)):
            points = torch.stack([real.load(i, self.channels, 32) for i in plan.members])
            weights = torch.tensor(plan.weights).float()
            images.append(mix(points.flatten(1)[None], weights[None]).view_as(points[0]))
        return torch.stack(images)

    def prompted(self, count: int, seed: int) -> Tensor:
        """Sample noise by coarse prompts, with no image of the class.

        The noise has the channel means of the bank; without them the samples are too bright.
        """
        means = torch.cat([self.bank.latents(name) for name in self.names]).mean((0, 2, 3))
        shape = self.backbone.latent_shape
        noise = torch.stack([normal(rng(seed, "noise", 0, i), *shape) for i in range(count)])
        texts = [self.words[self.names[index % len(self.names)]] for index in range(count)]
        noise = noise + means.view(-1, 1, 1)
        return sample(self.backbone, noise, texts, "fireflow", 10, guidance=2.0)

    def run(self, row: Row, shots: int, seed: int) -> dict[str, float]:
        """Return accuracy and CPU seconds of a training, which are read if it is done already."""
        name = "".join(c if c.isalnum() or c == "." else "-" for c in row.name)
        done = self.out / "runs" / f"{name}-{shots}-{seed}.json"
        settings = json.loads(json.dumps({**asdict(row), "steps": self.steps}))
        if done.exists() and (found := json.loads(done.read_text()))["settings"] == settings:
            return found
        real = FewShot(self.pool, min(row.times * shots, *self.pool.counts), seed)
        fake, made = self.synthetic(row, real, seed)
        torch.manual_seed(seed)
        data = ImageData(
            real, test=self.test, synthetic=fake, mix=SyntheticMix(row.share), augment=row.augment,
            channels=self.channels, steps_per_epoch=self.steps, seed=seed,
        )  # fmt: skip
        model = Classifier(
            data.counts, channels=self.channels, cutmix=row.cutmix, mixup=row.mixup, seed=seed
        )
        trainer, begun = demo_trainer(self.steps), time.process_time()
        trainer.fit(model, data)
        spent = time.process_time() - begun
        accuracy = trainer.test(model, data, verbose=False)[0]["test/accuracy"]
        result = {"accuracy": accuracy, "synthesis_s": made, "training_s": spent}
        write_json(done, {**result, "settings": settings})
        return result


def ci95(values: list[float]) -> str:
    """Format mean and 95 % interval in %."""
    return f"{100 * statistics.mean(values):.1f} ± {100 * interval(values):.1f}"


def report(
    bench: FewShotBench, rows: tuple[Row, ...], shots: list[int], found: dict[Any, Any]
) -> None:
    """Print the tables and draw the plot."""
    print("\naccuracy, %, and gain over classical, paired by seed; ± 95 % (Student's t)\n")
    middle, table = 5 if 5 in shots else shots[0], []
    drawn: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        cells = {"row": row.name}
        for n in shots:
            runs = [found[row.name, n, seed]["accuracy"] for seed in range(SEEDS)]
            base = [found[BASE, n, seed]["accuracy"] for seed in range(SEEDS)]
            gains = [a - b for a, b in zip(runs, base, strict=True)]
            gain = "" if row.name == BASE else f" ({ci95(gains)})"
            points = 100 * statistics.mean(gains), 100 * interval(gains)
            drawn.setdefault(row.name, []).append(points)
            cells[f"{n} shots"] = ci95(runs) + gain
        cost = [found[row.name, middle, seed] for seed in range(SEEDS)]
        made, spent = (statistics.mean(c[k] for c in cost) for k in ("synthesis_s", "training_s"))
        table.append(cells | {f"CPU seconds, {middle} shots": f"{made:.1f} + {spent:.1f}"})
    print("\n".join(markdown(table)))
    draw(drawn, shots, bench.out / "table.png")


def draw(gains: dict[str, list[tuple[float, float]]], shots: list[int], path: Path) -> None:
    """Draw gains over classical augmentation and their 95 % intervals, in points.

    Args:
        gains: of each row, mean and half width at each number of shots.
        shots: numbers of shots.
        path: the PNG file to write.
    """
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for number, (name, pairs) in enumerate(gains.items()):
        means, errors = zip(*pairs, strict=True)
        style = "k--" if name == TWICE else "k-" if name == BASE else "-"
        places = [at + 0.05 * (number - (len(gains) - 1) / 2) for at in range(len(shots))]
        axes.errorbar(places, means, errors, fmt=style, label=name, marker=".", elinewidth=0.8)
    axes.set_xticks(range(len(shots)), [str(n) for n in shots])
    axes.set(xlabel="real images a class", ylabel="gain over classical augmentation, points")
    figure.legend(fontsize=8, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", choices=("fashion", "cifar10"))
    parser.add_argument("--images", type=Path, help="CIFAR-10's training images in class folders")
    parser.add_argument("--backbone", default="tiny-cifar")
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--lora", type=Path, help="LoRA of the backbone; use another --out")
    parser.add_argument("--rows", nargs="+", help="names of rows; classical is always there")
    parser.add_argument("--out", type=Path, default=Path("runs/few-shot"))
    args = parser.parse_args()
    if args.tune:
        args.out = args.out / "tune"
    bench, rows = FewShotBench(args), TUNED if args.tune else ROWS
    rows = tuple(r for r in rows if not args.rows or r.name in (BASE, *args.rows))
    jobs = [(row, n, seed) for seed in range(SEEDS) for n in args.shots for row in rows]
    found = {}
    for row, n, seed in tqdm(jobs, "runs", unit="run", mininterval=5):
        found[row.name, n, seed] = bench.run(row, n, seed)
    report(bench, rows, args.shots, found)


if __name__ == "__main__":
    main()
