"""What synthetic images, and our data, cost a training step.

First a plain loop: a small network on 32×32 images, a quarter of its draws synthetic, one thread,
while the embedded backbone refills a replay pool from another process. Where that process has a
core of its own, a step takes as long as one with real images only; CPU time is measured too, for
machines where it has not. Then Lightning: our data and classifier against a minimal module over
torchvision's ImageFolder, with the same images, augmentation, network and optimiser.
"""

import argparse
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from augment import MixedDataset, Sampling, SyntheticDataset, load_backbone
from augment.bank.fill import fill_bank
from augment.replay.pool import ReplayPool
from augment.sources import Folder
from augment.sources.fashion import few_shots, write_fashion
from augment.training.data.module import ImageData
from augment.training.lightning import silence_lightning
from augment.training.models.classifier import Classifier
from augment.training.models.networks import small_cnn
from benchmarks.paired import Comparison

BATCH, SHARE = 64, 0.25


class Loop:
    """A training that each call continues by ``steps``, with a share of synthetic draws."""

    loss = float("nan")

    def __init__(self, real: list[Any], synthetic: Any, share: float, steps: int) -> None:
        mixed = MixedDataset(real, synthetic, share, length=10**9)
        self.network, self.steps = small_cnn(1, 1 + max(label for _, label in real)), steps
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3)
        self.batches: Iterator[Any] = iter(DataLoader(mixed, BATCH))

    def __call__(self) -> None:
        """Train some steps."""
        for _ in range(self.steps):
            images, labels = next(self.batches)
            loss = F.cross_entropy(self.network(images - 0.5), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.loss = loss.item()


def replay(args: argparse.Namespace, root: Path) -> Iterator[Comparison]:
    """Compare each way to get synthetic images with real images only."""
    steps, capacity = (4, 20) if args.quick else (100, 200)
    source = Folder(write_fashion(root / "images", "shots", few_shots(0, 5)))
    backbone = load_backbone("tiny", device="cpu")
    solver = {"steps": 2} if args.quick else {}
    bank = fill_bank(root / "bank", backbone, source, **solver)
    real = [(source.load(i, 1, 32), label) for i, label in source.samples]
    dataset = SyntheticDataset(
        bank, backbone, sampling=Sampling(steps=2 if args.quick else 20, batch_size=16)
    )
    with ReplayPool(dataset, capacity, warm_up=capacity) as pool:
        pid = pool._stop.peek()[2][1].pid  # type: ignore[index]
        kept = [pool[row] for row in range(capacity)]
        try:
            yield from ways(real, kept, pool, dataset, steps, pid)
        finally:
            os.kill(pid, signal.SIGCONT)


def ways(
    real: list[Any], kept: list[Any], pool: ReplayPool, dataset: Any, steps: int, pid: int
) -> Iterator[Comparison]:
    """Yield a comparison for each way; the generator is paused where it should not run."""

    def paused(loop: Loop, works: bool = False) -> None:
        os.kill(pid, signal.SIGCONT if works else signal.SIGSTOP)
        loop()

    def against_none(
        name: str, images: Any, count: int, works: bool = False, **more: Any
    ) -> Comparison:
        ours, theirs = Loop(real, images, SHARE, count), Loop(real, [], 0.0, steps)

        def quality() -> str:
            drawn = f"; each synthetic image drawn {pool.reuse:.0f} times" if works else ""
            return f"loss {ours.loss:.1g} against {theirs.loss:.1g}{drawn}"

        calls = partial(paused, ours, works), partial(paused, theirs)
        more |= {"count": count, "theirs_count": steps, "unit": "step", "threads": 1}
        return Comparison(name, *calls, "the same with real images only", quality, **more)

    bar = ("time", 1.05)
    yield against_none("synthetic images kept in a list", kept, steps)
    yield against_none("replay pool, generator at rest", pool, steps)
    yield against_none("replay pool, generator at work", pool, steps, True, bar=bar)
    name = "the same, CPU time of the training"
    yield against_none(name, pool, steps, True, bar=bar, clock=time.process_time)
    yield against_none("made by the trainer itself", dataset, 1 if steps < 100 else 3)


class PlainModule(pl.LightningModule):
    """The classifier of Lightning's introduction."""

    def __init__(self, classes: int, steps: int) -> None:
        super().__init__()
        self.network, self.steps = small_cnn(1, classes), steps

    def forward(self, images: Tensor) -> Tensor:
        """Score images in [0, 1]."""
        return self.network((images - 0.5) / 0.25)

    def training_step(self, batch: Any, number: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW on a half cosine."""
        adam = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=1e-2)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        return {"optimizer": adam, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def trainer(steps: int, device: str) -> pl.Trainer:
    """Return the trainer of both sides, which prints and saves nothing."""
    silence_lightning()
    return pl.Trainer(
        max_steps=steps, accelerator="cpu" if device == "cpu" else "gpu", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def lightning(args: argparse.Namespace, root: Path) -> Comparison:
    """Compare whole trainings."""
    steps = 10 if args.quick else 200
    images = write_fashion(root / "shots", "shots")
    test = Folder(write_fashion(root / "test", "test", list(range(5 if args.quick else 50))))
    held_out = torch.stack([test.load(i, 1, 32) for i, _ in test.samples])
    labels = torch.tensor([label for _, label in test.samples])
    models: dict[str, pl.LightningModule] = {}

    def ours() -> None:
        torch.manual_seed(0)
        data = ImageData(str(images), channels=1, batch_size=BATCH)
        models["ours"] = Classifier(data.counts, channels=1)
        trainer(steps, args.device).fit(models["ours"], data)

    grey = [v2.Grayscale(), v2.Resize(32), v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]

    def theirs() -> None:
        torch.manual_seed(0)
        folder = ImageFolder(str(images), transform=v2.Compose([*grey, *to_float]))
        loader = DataLoader(folder, BATCH, shuffle=True, drop_last=True)
        models["theirs"] = PlainModule(len(folder.classes), steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            trainer(steps, args.device).fit(models["theirs"], loader)

    @torch.no_grad()
    def accuracy(who: str) -> float:
        model = models[who].eval()
        answers = model(held_out.to(model.device)).argmax(1).cpu()
        return 100 * (answers == labels).float().mean().item()

    return Comparison(
        f"Lightning, {steps} steps of {BATCH} of 320 images, small_cnn", ours, theirs,
        "a minimal LightningModule over torchvision's ImageFolder",
        lambda: f"accuracy {accuracy('ours'):.1f} % against {accuracy('theirs'):.1f} %",
        count=steps, unit="step",
    )  # fmt: skip


def suite(args: argparse.Namespace) -> Iterator[Comparison]:
    """Compare the replay pool, then our data."""
    with tempfile.TemporaryDirectory() as folder:
        yield from replay(args, Path(folder))
        yield lightning(args, Path(folder))
