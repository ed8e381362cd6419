"""Which synthetic images help where the backbone knows *other* classes? CIFAR-FS, few shots.

    python scripts/test_bed.py CIFAR100
    python scripts/test_bed.py CIFAR100 --part validation      # where settings are chosen
    python scripts/test_bed.py CIFAR100 --quick

``CIFAR100`` holds CIFAR-100's training images in class folders. The backbone is `tiny-cifar`
(``scripts/train_tiny_cifar.py``) and the trunk a ResNet-12 (``scripts/train_resnet12.py``), both of
``scripts/weights``; they saw the 64 base classes alone. The 20 novel classes are learned at once.
Shots are drawn from the first 100 images of each class; the 200 after them are tested on. Draws of
more shots hold those of fewer.

A row is a way of augmenting; all rows of a learner train for as many steps. Learners: *scratch*, a
narrow ResNet-12 from nothing; *head*, a logistic head on the trunk's features; *lite0*,
EfficientNet-Lite0 fine-tuned, which saw ImageNet and so the novel classes. Gains are over the
strongest plain augmentation, paired by draw. Each row's synthetic images are judged too: the
accuracy of the learner *scratch* on them alone, whether an oracle on the trunk's features (of all
images of the first 100) gives them their class, their coverage of the tested images, their
diversity, and their distance to the nearest shot, all in %. Finished runs stay in ``--out``: the
same command resumes. ``--jobs`` draws are measured at a time, each by a process of one thread.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from cifar_fs import PARTS, classes_of
from pytorch_lightning import Trainer
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import save_image
from tqdm import tqdm
from train_tiny_cifar import FEATURES

from augment import LatentBank, Mixing, Sampling, SyntheticDataset, fill_bank, load_backbone
from augment.core.errors import AugmentWarning
from augment.core.files import read_json, remember, sha256, write_bytes, write_json
from augment.diffusion import Backbone
from augment.diffusion.backbones.resnet12 import features_of, load_trunk
from augment.diffusion.backbones.tiny import EMBEDDED
from augment.measure.features import class_distance, diversity, nearest_distance, precision_recall
from augment.networks import in_batches, unit
from augment.report.evaluate import markdown
from augment.sources import FewShot, Folder, Slice, Source
from augment.training.adapt.run import adapt_backbone
from augment.training.adapt.settings import AdaptSettings
from augment.training.data.draws import SyntheticMix
from augment.training.data.module import ImageData
from augment.training.data.transforms import Augmentation
from augment.training.demo import demo_trainer
from augment.training.models.classifier import Classifier
from augment.training.models.heads import Logistic
from augment.training.models.metrics import interval

WEIGHTS = Path(__file__).parent / "weights"
POOL, TESTED, SHOTS, SEEDS = 100, 200, (1, 5), 8


@dataclass(frozen=True)
class Row:
    """One way of augmenting.

    Args:
        name: as printed.
        mixing: how synthetic images are mixed; None is for none. The seed is the draw's.
        inversion: of the bank that they are mixed from; ``noise`` keeps clean latents.
        references: whether the backbone is conditioned on the shots' features too.
        adapted: whether the backbone is adapted to the shots first.
        guidance: of the sampling.
        kept: share of the images that is kept, those nearest to their class's mean feature.
        share: of synthetic draws.
        real_only: the last sixths of the training that have none.
        per_class: number of synthetic images of a class.
        times: factor of the number of shots.
        real: further real images of a class, in place of synthetic ones.
        plain: whether it has the strongest plain augmentation; otherwise shift and mirror.
    """

    name: str
    mixing: Mixing | None = None
    inversion: str = "noise"
    references: bool = False
    adapted: bool = False
    guidance: float = 1.0
    kept: float = 1.0
    share: float = 0.5
    real_only: int = 0
    per_class: int = 60
    times: int = 1
    real: int = 0
    plain: bool = True

    @property
    def recipe(self) -> str:
        """Return the settings that decide the synthetic images, as JSON."""
        others = dict.fromkeys(("name", "share", "real_only", "plain", "times", "real"))
        return json.dumps(asdict(self) | others, sort_keys=True)

    @property
    def of_shots(self) -> bool:
        """Whether its synthetic images depend on the shots, or on their classes alone."""
        fresh = self.mixing is not None and self.mixing.level == 1.0
        return not fresh or self.references or self.adapted or self.kept < 1


BASE, TWICE, CENTROIDS = "RandAugment + mixup", "twice the shots", "centroids by references"
SAMPLES = "samples by references"
_FRESH, _LONE = Mixing(level=1.0), Mixing(level=0.5, members=1)
_SHOTS = Mixing(), "forward_start"
ROWS = (
    Row("shift + mirror", plain=False),
    Row(BASE),
    Row("samples by superclass", _FRESH, guidance=2.0),
    Row(SAMPLES, _FRESH, references=True, guidance=2.0),
    Row(CENTROIDS, *_SHOTS, references=True, guidance=2.0),
    Row("as many more real images", real=60),
    Row(TWICE, times=2),
)
MORE = (
    Row("centroids", *_SHOTS),
    Row("centroids by superclass", *_SHOTS, guidance=2.0),
    Row("centroids by references, level 0.7", Mixing(rule="fade/chm", level=0.7), references=True),
    Row("single images, level 0.5", _LONE),
    Row("single images by references, level 0.5", _LONE, references=True, guidance=2.0),
    Row("samples by references, guidance 4", _FRESH, references=True, guidance=4.0),
    Row("samples by references, best third", _FRESH, references=True, guidance=2.0, kept=1 / 3),
    Row(
        "samples by references, last third real",
        _FRESH,
        references=True,
        guidance=2.0,
        share=0.8,
        real_only=2,
    ),
    Row("samples by references, 20 a class", _FRESH, references=True, guidance=2.0, per_class=20),
    Row("adapted samples", _FRESH, adapted=True),
    Row("adapted samples, guidance 2", _FRESH, adapted=True, guidance=2.0),
    Row("adapted centroids", *_SHOTS, adapted=True),
)
"""Rows that are measured if ``--rows`` names them."""


@dataclass(frozen=True)
class Learner:
    """A classifier, and how it learns.

    Args:
        name: as printed.
        network, options, pretrained: of `augment.training.models.classifier.Classifier`; no network
            is a head on the trunk's features.
        resolution: pixels.
        steps, batch, lr: of the training.
        augment, mixup: the strongest plain augmentation.
    """

    name: str
    network: str = ""
    options: tuple[tuple[str, int], ...] = ()
    pretrained: bool = False
    resolution: int = 32
    steps: int = 1000
    batch: int = 32
    lr: float = 2e-3
    augment: Augmentation = Augmentation(randaugment=2)  # noqa: RUF009
    mixup: float = 1.0


LEARNERS = (
    Learner("scratch", "resnet12", (("width", 8),)),
    Learner("head"),
    Learner("lite0", "lite0", (), True, 64, 200, 32, 5e-4, mixup=0.2),
)


class Images(Dataset[tuple[Tensor, int]]):
    """Synthetic images in memory, with their labels, or else of the classes in turn."""

    def __init__(
        self, images: Tensor, classes: list[str], targets: list[int] | None = None
    ) -> None:
        self.images, self.classes = images, classes
        self.targets = targets or [index % len(classes) for index in range(len(images))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float() / 255, self.targets[index]


class Bed:
    """The classes of a part, their images, banks and judges.

    Args:
        args: the options.
        pool: images of a class that real ones are drawn from; by default `POOL`.
    """

    def __init__(self, args: argparse.Namespace, pool: int = 0) -> None:
        self.args, self.out = args, args.out / args.part
        root = Folder(args.images)
        root.ids = {name: root.ids[name] for name in classes_of(args.part)}
        pool = pool or POOL
        self.pool, self.test = Slice(root, 0, pool), Slice(root, pool, pool + TESTED)
        self.judged = 5 if 5 in args.shots else args.shots[0]
        self.classes, self.words = list(root.ids), classes_of(args.part)
        self.trunk = load_trunk(args.trunk, FEATURES)
        self.backbones: dict[bool, Backbone] = {}
        files = {key: sha256(getattr(args, key).read_bytes()) for key in ("weights", "trunk")}
        steps = {"solver_steps": args.solver_steps, "adapt_steps": args.adapt_steps}
        remember(self.out / "settings.json", {**files, **steps}, "--out")
        warnings.simplefilter("ignore", AugmentWarning)

    def load(self, references: bool) -> Backbone:
        """Return the backbone, with or without references."""
        if references not in self.backbones:
            more = {"reference": self.args.trunk} if references else {}
            self.backbones[references] = load_backbone(self.args.weights, "cpu", **more)
        return self.backbones[references]

    def embed(self, images: Tensor) -> Tensor:
        """Return the trunk's features of images in [0, 1], of length 1."""
        return in_batches(partial(features_of, self.trunk), images)

    def pixels(self, source: Source) -> Tensor:
        """Load all images of a source, class after class."""
        return torch.stack([source.load(i, 3, 32) for i, _ in source.samples])

    @cached_property
    def tested(self) -> Tensor:
        """The features of the tested images, class after class."""
        return self._stored("tested", self.test)

    @cached_property
    def oracle(self) -> Tensor:
        """A head fitted to all images that shots are drawn from."""
        features = self._stored("pool", self.pool)
        labels = torch.tensor([label for _, label in self.pool.samples])
        return Logistic(10.0).fit(features, labels, torch.ones(len(labels)))

    def _stored(self, name: str, source: Source) -> Tensor:
        path = self.out / f"{name}.safetensors"
        if not path.exists():
            write_bytes(path, save({"features": self.embed(self.pixels(source)).float()}))
        with safe_open(path, "pt") as file:
            return file.get_tensor("features").double()

    def bank(self, row: Row, real: Source, backbone: Backbone, where: Path) -> LatentBank:
        """Return the bank of a draw: of all shots of the part, or of an adapted backbone's own."""
        if row.adapted:
            return fill_bank(where, backbone, real, None, row.inversion, stored=())
        drawn = {image_id for ids in real.ids.values() for image_id in ids}
        return LatentBank.open(self.whole_bank(row)).subset(drawn.__contains__)

    def whole_bank(self, row: Row) -> Path:
        """Return the path of the bank of all images that shots are drawn from."""
        return self.out / "banks" / f"{row.inversion}{'-references' * row.references}"

    def prepare(self, rows: list[Row]) -> None:
        """Make what all draws read: features and banks."""
        _ = self.tested, self.oracle
        for row in rows:
            if row.mixing and not row.adapted:
                backbone, where = self.load(row.references), self.whole_bank(row)
                fill_bank(where, backbone, self.pool, self.words, row.inversion, stored=())

    def synthetic(self, row: Row, shots: int, seed: int) -> Tensor:
        """Return the images of a row (n, 3, 32, 32) in 8 bits, of the classes in turn."""
        settings = row.recipe
        if not row.of_shots:
            shots = self.args.shots[0]
        folder = self.out / "samples" / f"{sha256(settings.encode())[:12]}-{shots}-{seed}"
        path = folder / "images.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                return file.get_tensor("images")
        assert row.mixing
        real, backbone = FewShot(self.pool, shots, seed), self.load(row.references)
        if row.adapted:
            out = self.out / "adapted" / f"{shots}-{seed}"
            own = AdaptSettings(
                images=real, out=str(out), backbone=str(self.args.weights), tokens=True,
                steps=self.args.adapt_steps, batch_size=16, seed=seed, sheets=0, words=self.words,
            )  # fmt: skip
            adapt_backbone(own)
            backbone = load_backbone(self.args.weights, "cpu", adapter=out)
        bank = self.bank(row, real, backbone, folder / "bank")
        count = round(row.per_class / row.kept)
        data = SyntheticDataset(
            bank, backbone, replace(row.mixing, seed=seed),
            Sampling(solver="fast", steps=self.args.solver_steps, guidance=row.guidance), count,
        )  # fmt: skip
        images = torch.stack([x for x, _ in data.__getitems__(range(len(data)))])
        if row.kept < 1:
            images = self.nearest(images, real, row.per_class)
        found = (255 * images).round().to(torch.uint8)
        folder.mkdir(parents=True, exist_ok=True)
        classes = len(self.classes)
        save_image(images[: 8 * classes], folder / "sheet.png", nrow=classes, padding=1)
        write_json(folder / "row.json", json.loads(settings))
        write_bytes(path, save({"images": found}))
        return found

    def nearest(self, images: Tensor, real: Source, per_class: int) -> Tensor:
        """Keep the images of each class that are nearest to the mean feature of its shots."""
        classes = len(self.classes)
        means = unit(self.embed(self.pixels(real)).unflatten(0, (classes, -1)).mean(1))
        scores = (self.embed(images).unflatten(0, (-1, classes)) * means).sum(2)
        best = scores.argsort(0, descending=True)[:per_class]
        rows = best * classes + torch.arange(classes)
        return images[rows.flatten()]

    def judge(self, row: Row, learner: Learner, shots: int, seed: int) -> dict[str, float]:
        """Measure a row's synthetic images; see the module."""
        images = self.synthetic(row, shots, seed)
        labels = torch.arange(len(images)) % len(self.classes)
        features = self.embed(images.float() / 255)
        answer = (features @ self.oracle[:, :-1].T + self.oracle[:, -1]).argmax(1)
        real = FewShot(self.pool, shots, seed)
        truth = torch.tensor([label for _, label in self.test.samples])
        cover = precision_recall(self.tested, features)
        near = nearest_distance(features, self.embed(self.pixels(real)))
        alone = self.learn(replace(row, share=1.0), learner, shots, seed)
        own = [diversity(features[labels == label]) for label in labels.unique().tolist()]
        return {
            "alone": alone,
            "class kept": (answer == labels).double().mean().item(),
            "coverage": cover["coverage"].mean().item(),
            "diversity": statistics.mean(own),
            "class distance": class_distance(features, labels, self.tested, truth).mean().item(),
            "nearest shot": near.mean().item(),
        }

    def learn(self, row: Row, learner: Learner, shots: int, seed: int) -> float:
        """Train a learner on a row's images, and return its accuracy."""
        count = row.times * shots + row.real
        real = FewShot(self.pool, min(count, POOL), seed)
        images = self.synthetic(row, shots, seed) if row.mixing else None
        if not learner.network:
            return self.head(row, real, images)
        fake = None if images is None else Images(images, self.classes)
        mix = SyntheticMix(row.share, real_only=row.real_only)
        if not row.plain:
            learner = replace(learner, augment=Augmentation(), mixup=0.0)
        model, data, trainer = self.train(learner, real, fake, mix, seed)
        return trainer.test(model, data, verbose=False)[0]["test/accuracy"]

    def train(
        self,
        learner: Learner,
        real: Source,
        fake: Images | None,
        mix: SyntheticMix,
        seed: int,
        loss: str = "cross_entropy",
    ) -> tuple[Classifier, ImageData, Trainer]:
        """Train a learner's network."""
        torch.manual_seed(seed)
        data = ImageData(
            real, test=self.test, synthetic=fake, mix=mix, augment=learner.augment, channels=3,
            resolution=learner.resolution, batch_size=learner.batch,
            steps_per_epoch=-(-learner.steps // 6), seed=seed,
        )  # fmt: skip
        model = Classifier(
            data.counts, network=learner.network,
            network_options=dict(learner.options) or None, channels=3, loss=loss,
            resolution=learner.resolution, pretrained=learner.pretrained, mixup=learner.mixup,
            lr=learner.lr, seed=seed,
        )  # fmt: skip
        trainer = demo_trainer(learner.steps)
        trainer.fit(model, data)
        return model, data, trainer

    def head(self, row: Row, real: Source, images: Tensor | None) -> float:
        """Fit a head to features of real images, their mirror images and synthetic ones."""
        pixels = self.pixels(real)
        shots = torch.tensor([label for _, label in real.samples])
        parts, labels = [self.embed(pixels), self.embed(pixels.flip(-1))], [shots, shots]
        weights = [torch.full((len(shots),), 0.5)] * 2
        if images is not None:
            parts.append(self.embed(images.float() / 255))
            labels.append(torch.arange(len(images)) % len(self.classes))
            total = len(shots) * row.share / (1 - row.share)
            weights.append(torch.full((len(images),), total / len(images)))
        truth = torch.tensor([label for _, label in self.test.samples])
        known = torch.cat(parts), torch.cat(labels), torch.cat(weights)
        answer = Logistic()(*known, self.tested)
        return (answer == truth).double().mean().item()

    def run(self, row: Row, learner: Learner, shots: int, seed: int) -> dict[str, float]:
        """Return what a row is worth to a learner, which is read if it was measured before."""
        name = "".join(c if c.isalnum() or c == "." else "-" for c in row.name)
        done = self.out / "runs" / f"{learner.name}-{name}-{shots}-{seed}.json"
        settings = json.loads(json.dumps([asdict(row), asdict(learner)]))
        if done.exists() and (found := read_json(done, "a run"))["settings"] == settings:
            return found["found"]
        begun = time.process_time()
        found = {"accuracy": self.learn(row, learner, shots, seed)}
        if row.mixing and learner.name == LEARNERS[0].name and shots == self.judged:
            found |= self.judge(row, learner, shots, seed)
        found["seconds"] = time.process_time() - begun
        write_json(done, {"found": found, "settings": settings})
        return found


Found = dict[tuple[str, int, int], dict[str, float]]
"""What was measured, by row, shots and seed."""


def runs_of(args: argparse.Namespace, learner: Learner, rows: list[Row], seed: int) -> Found:
    """Measure all rows of a draw."""
    bed, jobs = Bed(args), [(row, n) for n in args.shots for row in rows]
    bar = tqdm(jobs, f"{learner.name}, draw {seed + 1} of {args.seeds}", position=seed % args.jobs)
    return {(row.name, n, seed): bed.run(row, learner, n, seed) for row, n in bar}


@contextmanager
def processes(count: int) -> Iterator[Any]:
    """Yield a ``map`` over processes of one thread, or over this one."""
    if count == 1:
        yield map
        return
    with ProcessPoolExecutor(
        count, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        yield pool.map


class Table:
    """The rows of a learner, by draw."""

    def __init__(self, learner: Learner, rows: list[Row], shots: list[int], found: Found) -> None:
        self.learner, self.rows, self.shots, self.found = learner, rows, shots, found
        self.seeds = sorted({seed for _, _, seed in found})

    def values(self, name: str, shots: int, key: str = "accuracy") -> list[float]:
        """Return a row's measure in %, by draw."""
        return [100 * self.found[name, shots, seed].get(key, float("nan")) for seed in self.seeds]

    def gains(self, name: str, shots: int, part: float = 0.0) -> list[float]:
        """Return a row's gains over the baseline, less a part of what twice the shots gain."""
        base = self.values(BASE, shots)
        twice = self.values(TWICE, shots) if part else base
        rows = zip(self.values(name, shots), base, twice, strict=True)
        return [value - b - part * (t - b) for value, b, t in rows]

    def records(self) -> list[dict[str, str]]:
        """Return accuracy and gain of each row by shots, ± 95 %."""
        records = []
        for row in self.rows:
            cells = {self.learner.name: row.name}
            for n in self.shots:
                gain = "" if row.name == BASE else f" ({ci95(self.gains(row.name, n), True)})"
                cells[shots_of(n)] = ci95(self.values(row.name, n)) + gain
            records.append(cells)
        return records

    def rungs(self) -> list[dict[str, str]]:
        """Return the synthetic row that gains most, and how far above each rung it is."""
        records, made = [], [row.name for row in self.rows if row.mixing]
        for n in self.shots:
            if made and TWICE in (row.name for row in self.rows):
                best = max(made, key=lambda name: statistics.mean(self.gains(name, n)))
                parts = {"0": 0.0, "half of twice the shots": 0.5, "0.9 of it": 0.9}
                margins = {
                    f"above {k}": ci95(self.gains(best, n, v), True) for k, v in parts.items()
                }
                records.append({"shots": f"{n}", "best row": best, **margins})
        return records

    def mixing(self) -> list[dict[str, str]]:
        """Return how far centroids are above samples by the same references, paired by draw."""
        names, records = [row.name for row in self.rows], []
        if SAMPLES in names and CENTROIDS in names:
            record = {f"{CENTROIDS}, above": SAMPLES}
            for n in self.shots:
                pairs = zip(self.values(CENTROIDS, n), self.values(SAMPLES, n), strict=True)
                record[shots_of(n)] = ci95([one - other for one, other in pairs], True)
            records.append(record)
        return records

    def causes(self, shots: int) -> list[dict[str, str]]:
        """Return what the synthetic images of each row are like."""
        keys = ("alone", "class kept", "coverage", "diversity", "class distance", "nearest shot")
        made = [row.name for row in self.rows if row.mixing]
        return [
            {f"{shots} shots": name}
            | {key: f"{statistics.mean(self.values(name, shots, key)):.0f}" for key in keys}
            for name in made
        ]

    @property
    def cost(self) -> str:
        """Say how long all runs took."""
        minutes = sum(found["seconds"] for found in self.found.values()) / 60
        return f"{self.learner.name}: {minutes:.0f} core minutes"

    def draw(self, path: Path) -> None:
        """Plot gains against shots."""
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for index, row in enumerate(self.rows):
            gains = [self.gains(row.name, n) for n in self.shots]
            places = [k + 0.02 * index for k in range(len(self.shots))]
            style = "k--" if row.name == TWICE else "k-" if row.name == BASE else "-"
            means = map(statistics.mean, gains)
            halves = [interval(gain) if len(gain) > 1 else 0.0 for gain in gains]
            axes.errorbar(
                places,
                list(means),
                halves,
                fmt=style,
                label=row.name,
                lw=1,
                capsize=2,
            )
        axes.set_xticks(range(len(self.shots)), [str(n) for n in self.shots])
        axes.set(xlabel="real images a class", ylabel=f"gain over {BASE}, points")
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)


def shots_of(count: int) -> str:
    """Name a number of shots."""
    return f"{count} shot{'s' * (count > 1)}"


def ci95(values: list[float], sign: bool = False) -> str:
    """Format mean and 95 % interval, which a single draw has not."""
    half = f" ± {interval(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if sign else ''}.1f}{half}"


def main() -> None:
    """Measure, print the tables, and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="CIFAR-100's training images in class folders")
    parser.add_argument("--weights", type=Path, default=EMBEDDED["tiny-cifar"])
    parser.add_argument("--trunk", type=Path, default=WEIGHTS / "resnet12.safetensors")
    parser.add_argument("--part", choices=PARTS[1:], default="novel")
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--learners", nargs="+", default=[x.name for x in LEARNERS])
    names = [row.name for row in (*ROWS, *MORE)]
    parser.add_argument("--rows", nargs="+", choices=names, help="the baseline is always there")
    parser.add_argument("--solver-steps", type=int, default=8)
    parser.add_argument("--adapt-steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="draws at a time")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two draws of 5 shots, four rows, fewer images and steps, no lite0",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/test-bed"))
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.shots, args.learners = 2, [5], ["scratch", "head"]
        args.rows = args.rows or [SAMPLES, CENTROIDS, TWICE]
    wanted = (BASE, *args.rows) if args.rows else {row.name for row in ROWS}
    rows = [row for row in (*ROWS, *MORE) if row.name in wanted]
    learners = [learner for learner in LEARNERS if learner.name in args.learners]
    if args.quick:
        rows = [replace(row, per_class=20) for row in rows]
        learners = [replace(learner, steps=learner.steps // 2) for learner in learners]
    bed = Bed(args)
    bed.prepare(rows)
    for learner in learners:
        with processes(args.jobs) as each:
            parts = list(each(partial(runs_of, args, learner, rows), range(args.seeds)))
        found = {job: measured for part in parts for job, measured in part.items()}
        table = Table(learner, rows, args.shots, found)
        tables = [table.records(), table.rungs(), table.mixing()]
        if learner.name == LEARNERS[0].name:
            tables.append(table.causes(bed.judged))
        text = "\n\n".join([*("\n".join(markdown(part)) for part in tables if part), table.cost])
        print(f"\n{text}\n")
        (bed.out / f"{learner.name}.md").write_text(text + "\n")
        table.draw(bed.out / f"{learner.name}.png")


if __name__ == "__main__":
    main()
