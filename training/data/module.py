"""Real images, synthetic ones mixed in, and held-out ones, as a LightningDataModule."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from augment.core.errors import AugmentWarning, UserError, shown
from augment.core.files import write_json
from augment.core.rng import rng
from augment.replay.pool import ReplayPool
from augment.shards.dataset import Shards, open_images
from augment.sources import Source, as_source
from augment.sources.images import SUFFIXES, parse_colour
from augment.sources.prompts import nfc
from augment.sources.subsets import Selection
from augment.synthesis.dataset import SyntheticDataset, fetch
from training.data.draws import Draw, Draws, Mix
from training.data.identity import (
    check_apart,
    check_numbers,
    check_same,
    digests_of,
    identity,
    identity_of_synthetic,
    origins,
    read_known,
    tell_of_copies,
    tell_of_looks,
    tell_of_overlap,
    tell_of_strangers,
)
from training.data.transforms import Augmentation, evaluation

Item = tuple[Tensor, Any, bool]
MEMORY = 2**29
"""Bytes of decoded images that are kept rather than decoded again at every draw."""


class Pair(Dataset[Item]):
    """Real images and synthetic ones after them; items are (image, label, whether synthetic).

    It is asked by `Draw`. The dice of an image's transform belong to (seed, epoch, place), so that
    they depend on no worker, no rank and no interruption.

    Args:
        real: the real images.
        synthetic: a map-style dataset of (image, label), or None. Soft labels of its are given with
            one-hot labels of the real images.
        fixed, random: what is done to an image without dice and, after it, to a batch with them;
            see `training.data.transforms.Augmentation`.
        seed: of the dice.
        keep: keep what ``fixed`` gives in memory, of images that stay the same.
    """

    def __init__(
        self, real: Source, synthetic: Any, fixed: Any, random: Any, seed: int, keep: bool = False
    ) -> None:
        self.real, self.synthetic, self.seed = real, synthetic, seed
        self.fixed, self.random = fixed, random
        planner = getattr(synthetic, "planner", None)
        self.soft = planner is not None and planner.classes > 1
        stays = len(self) if isinstance(synthetic, (Shards, Source)) else len(real)
        self.stays = stays if keep else 0
        self.kept: dict[int, tuple[Tensor, Any]] = {}

    def __len__(self) -> int:
        return len(self.real) + (0 if self.synthetic is None else len(self.synthetic))

    def __getitem__(self, draw: Draw) -> Item:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Item]:
        """The items of a batch; the synthetic dataset is asked at most once."""
        count, epoch = len(self.real), draws[0].epoch
        if getattr(self.synthetic, "epoch", epoch) != epoch:
            self.synthetic.set_epoch(epoch)
        found = self._fixed([draw.row for draw in draws])
        dice = [rng(self.seed, "augment", draw.epoch, draw.place) for draw in draws]
        images = self.random([pixels for pixels, _ in found], dice)
        return [
            (image, label, draw.row >= count)
            for image, (_, label), draw in zip(images, found, draws, strict=True)
        ]

    def _fixed(self, rows: list[int]) -> list[tuple[Tensor, Any]]:
        """(pixels, label) of some rows, from memory or from where they are."""
        count, wanted = len(self.real), [row for row in rows if row not in self.kept]
        made = iter(fetch(self.synthetic, [row - count for row in wanted if row >= count]))
        new = []
        for row in wanted:
            image, label = self.real[row] if row < count else next(made)
            new.append((self.fixed(image), self._label(label)))
            if row < self.stays:
                self.kept[row] = new[-1]
        fresh, asked = iter(new), set(wanted)
        return [next(fresh) if row in asked else self.kept[row] for row in rows]

    def _label(self, label: Any) -> Any:
        if not self.soft or isinstance(label, Tensor):
            return label
        return F.one_hot(torch.tensor(label), len(self.real.classes)).float()


class Batches(DataLoader[Any]):
    """A DataLoader that goes on where a checkpoint stopped, for its `Draws` do.

    The position is Lightning's own count of batches. These two methods only tell Lightning so, for
    it saves the state of loaders too, and loses it where ``configure_optimizers`` asks for the
    number of steps (Lightning issue 20550).
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""


class Stripe(Sampler[int]):
    """Every ``world``-th item from ``rank`` on: each is evaluated once, by one rank."""

    def __init__(self, length: int, rank: int, world: int) -> None:
        self.range = range(rank, length, world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.range)

    def __len__(self) -> int:
        return len(self.range)


class Evaluated(Dataset[tuple[Tensor, int]]):
    """The images of a source, transformed."""

    def __init__(self, source: Source, transform: Any) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return self.transform(image), label


class ImageData(pl.LightningDataModule):
    """Real images to train on, synthetic ones mixed in, images to validate and to test on.

    Args:
        train: an image folder, or any source: `augment.sources.ImageNetLT`, `LongTail`, `FewShot`;
            only a training needs it.
        val: to watch and to choose by; none by default.
        test: to report; none by default.
        predict: to label: a folder of image files, or of folders of them; by default the test or
            else the training images.
        synthetic: shards, as ``latent-augment synthesize`` writes them, or an image folder; or a
            `augment.SyntheticDataset`, an `augment.ReplayPool`, any map-style dataset.
        mix: how synthetic images are mixed in.
        sampler: instance, square_root, class or progressive; see `training.data.draws.SAMPLERS`.
        augment: classical augmentation of all training images.
        crop: of the images to evaluate, the share of the shorter side; 0.875 is ImageNet's usual;
            by default that of a checkpoint, or 1.
        channels, resolution: the format of the images; by default those of the classifier: of its
            checkpoint, or its network's usual ones.
        batch_size: images a step, of each rank.
        steps_per_epoch: steps an epoch; by default one pass through the images.
        workers: processes that load images; 0 where a backbone on a GPU makes them.
        seed: of draws and augmentation.
        max_rejects: the share of the images that may be left out because they cannot be read, as
            for invert; all are looked at before the first step.
        background: the colour that is seen through transparent pixels; by default white.

    Attributes:
        counts: how many *real* training images there are of each class; empty without any.
        classes: their names, in label order.
        draws: see `training.data.draws.Draws`.

    Raises:
        UserError: images that cannot be found, classes that differ, or a validation or test image
            among those that synthetic ones were made from.
    """

    def __init__(
        self,
        train: Source | str | None = None,
        val: Source | str | None = None,
        test: Source | str | None = None,
        predict: Source | str | None = None,
        synthetic: Dataset | str | None = None,
        mix: Mix = Mix(),  # noqa: B008
        sampler: str = "instance",
        augment: Augmentation = Augmentation(),  # noqa: B008
        crop: float | None = None,
        channels: int | None = None,
        resolution: int | None = None,
        batch_size: int = 64,
        steps_per_epoch: int | None = None,
        workers: int = 0,
        seed: int = 0,
        max_rejects: float = 0.05,
        background: str | None = None,
    ) -> None:
        super().__init__()
        form = (
            3 if channels is None else channels,
            32 if resolution is None else resolution,
            1.0 if crop is None else crop,
        )
        if form[0] not in (1, 3) or form[1] < 8 or not 0 < form[2] <= 1 or workers < 0:
            raise UserError(
                "expected 1 or 3 channels, a resolution ≥ 8, a crop in (0, 1] and workers ≥ 0, got "
                f"{channels}, {resolution}, {crop} and {workers}"
            )
        self.looked = False  # at the images; see check_images

        def look(images: Source | str, name: str) -> Source:
            """Open images and leave out those that cannot be read."""
            source = as_source(images)
            if background:
                source.background = parse_colour(background)
            return source.readable(max_rejects, name)

        self.real = None if train is None else look(train, "training")
        self.held_out = {
            name: look(part, name) for name, part in (("val", val), ("test", test)) if part
        }
        self.unlabelled = None if predict is None else look(files_of(predict), "predict")
        parts = [*([self.real] if self.real else []), *self.held_out.values()]
        self.counts = self.real.counts if self.real else []
        self.classes = parts[0].classes if parts else []
        for name, part in self.held_out.items():
            self.held_out[name] = of_classes(part, self.classes, name)
        self.synthetic = made_of(self.real, synthetic) if self.real else None
        if isinstance(self.synthetic, Source):
            self.synthetic = look(self.synthetic, "synthetic")
        self.check_classes()
        self.channels, self.resolution, self.crop = channels, resolution, crop
        self.workers, self.batch_size, self.seed, self.augment = workers, batch_size, seed, augment
        self.prepare_images(*form)
        if self.real:
            self.draws = Draws(
                self.real.targets,
                labels_of(self.synthetic),
                len(self.real.classes),
                mix,
                sampler,
                batch_size,
                steps_per_epoch,
                seed,
                self.epochs,
                self.done,
            )

    def prepare_images(self, channels: int, resolution: int, crop: float) -> None:
        """Bring images to a format from now on."""
        self.form = channels, resolution, crop
        self.evaluation = evaluation(channels, resolution, crop)
        if self.real:
            count = len(self.real) + (len(self.synthetic) if self.synthetic is not None else 0)
            room = MEMORY // max(self.workers, 1)
            keep = self.augment.whole and count * channels * resolution**2 <= room
            steps = self.augment.fixed(channels, resolution), self.augment.random(resolution)
            self.pair = Pair(self.real, self.synthetic, *steps, self.seed, keep)

    def check_classes(self) -> None:
        """Refuse synthetic images that have other classes than the real ones, or another order."""
        classes = getattr(self.synthetic, "classes", self.classes)
        if list(map(nfc, classes)) != list(map(nfc, self.classes)):
            raise UserError(
                f"expected the synthetic images to have the classes {brief(self.classes)}, "
                f"got {brief(classes)}{first_difference(self.classes, classes)}; give both "
                "the same class folders"
            )

    def setup(self, stage: str) -> None:
        """Take this rank's share. No held-out image may be one that synthetic ones come from."""
        if self.trainer is not None:
            settle: Any = getattr(self.trainer.lightning_module, "settle", None)
            if settle:
                form = settle(self.classes or None, self.channels, self.resolution, self.crop)
                self.channels, self.resolution, self.crop = form
                if form != self.form:
                    self.prepare_images(*form)
            if self.real:
                self.draws.share(self.trainer.global_rank, self.trainer.world_size)
            if "val" not in self.held_out:
                self.trainer.limit_val_batches = 0  # Lightning warns of empty loaders
            self.check_trainer(self.trainer)
        if stage == "fit" and self.real is None:
            raise UserError("expected images to train on, got none; give --data.train")
        if stage == "fit" and self.draws.rank == 0:
            if not self.looked:
                self.check_images()
            self.looked = False

    def check_images(self, file: Path | None = None, begun: bool = False) -> None:
        """Compare all images by their content, and keep in a file what they are.

        Warn of files in two classes, of held-out images that are trained on, of synthetic ones that
        come from others than the training images, look different, or are fewer than asked for.

        Args:
            file: of the run's folder, for its digests and what it began with.
            begun: whether the run has trained already.

        Raises:
            UserError: a run that was begun had other images, a held-out image is among those that
                synthetic ones come from, or there are no synthetic images at all.
        """
        self.looked = True
        known = read_known(file)
        sources, digests, parts = self.identify(known["files"])
        if begun and file:
            check_same(known["parts"], parts, file.parent)
        if self.real and self.synthetic is not None:
            self.check_synthetic(self.real, digests)
        for name, found in digests.items():
            tell_of_copies(sources[name], found, name)
            if name != "training" and self.real:
                tell_of_overlap(digests["training"], found, name)
        if file:
            write_json(file, known | {"parts": parts})

    def compare_images(self, file: Path) -> None:
        """Refuse other images than a run began with, as its file says.

        Raises:
            UserError: images are others.
        """
        known = read_known(file)
        check_same(known["parts"], self.identify(known["files"])[2], file.parent)

    def identify(
        self, files: dict[str, list[Any]]
    ) -> tuple[dict[str, Source], dict[str, dict[str, str]], dict[str, str]]:
        """Return sources by part, the digests of their images by id, and the identity of each.

        Args:
            files: what is known of files; see `training.data.identity.digests_of`.
        """
        real = {"training": self.real} if self.real else {}
        sources = {**real, **self.held_out}
        digests = {name: digests_of(source, files) for name, source in sources.items()}
        parts = {name: identity(sources[name], found) for name, found in digests.items()}
        if self.synthetic is not None:
            parts["synthetic"] = identity_of_synthetic(self.synthetic, files)
        return sources, digests, parts

    def check_synthetic(self, real: Source, digests: dict[str, dict[str, str]]) -> None:
        """Compare synthetic images with real ones; see `check_images`."""
        known, mix, labels = origins(self.synthetic), self.draws.mix, labels_of(self.synthetic)
        tell_of_strangers(known, real, digests["training"])
        for name in self.held_out:
            check_apart(known, digests[name], name)
        if mix.by_count or mix.share:
            if isinstance(labels, int):  # a pool makes images of any class
                have = np.full(len(self.classes), labels)
            else:
                have = np.bincount(np.asarray(labels, int), minlength=len(self.classes))
            check_numbers(have, mix.budget(self.draws.counts), mix.by_count, self.classes)
        if labels:
            tell_of_looks(real, self.synthetic, *self.form[:2])

    def check_trainer(self, trainer: Any) -> None:
        """Refuse what draws and schedules would not know of.

        Raises:
            UserError: epochs are to be cut short.
        """
        limit = trainer.limit_train_batches  # 1 is one batch, 1.0 is all
        if (limit != 1.0 or isinstance(limit, int)) and not trainer.fast_dev_run:
            raise UserError(
                "expected data.steps_per_epoch to shorten an epoch, got limit_train_batches "
                f"{limit}; leave that out"
            )

    def epochs(self) -> int:
        """How many epochs the training takes."""
        trainer: Any = self.trainer
        if trainer is None:
            return 1
        ends = [trainer.max_epochs] if (trainer.max_epochs or -1) > 0 else []
        if trainer.max_steps > 0:
            batches = trainer.max_steps * trainer.accumulate_grad_batches
            ends.append(-(-batches // len(self.draws)))
        return min(ends, default=1)

    def done(self) -> int:
        """How many batches the training has had; a checkpoint brings it back."""
        trainer: Any = self.trainer
        return trainer.fit_loop.epoch_loop.batch_progress.total.processed if trainer else 0

    def train_dataloader(self) -> DataLoader[Any]:
        """This rank's part of the draws."""
        return Batches(
            self.pair,
            batch_sampler=self.draws,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )

    def all_of(self, name: str) -> DataLoader[Any]:
        """All held-out images of ``val`` or ``test``, on every rank.

        Raises:
            UserError: there are none.
        """
        return self._held_out(name, 0, 1)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """This rank's part of the validation images."""
        return self._striped("val") if "val" in self.held_out else []

    def test_dataloader(self) -> DataLoader[Any]:
        """This rank's part of the test images."""
        return self._striped("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """All images to label, on every rank."""
        images = Evaluated(self.to_label, self.evaluation)
        size = max(self.batch_size, 128)
        return DataLoader(images, batch_size=size, num_workers=self.workers)

    @property
    def to_label(self) -> Source:
        """The images that ``predict`` labels.

        Raises:
            UserError: there are none.
        """
        images = self.unlabelled or self.held_out.get("test") or self.real
        if images is None:
            raise UserError("expected images to label, got none; give --data.predict")
        return images

    def _striped(self, name: str) -> DataLoader[Any]:
        trainer = self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return self._held_out(name, rank, world)

    def _held_out(self, name: str, rank: int, world: int) -> DataLoader[Any]:
        if name not in self.held_out:
            raise UserError(f"expected images to {name} on, got none; give --data.{name}")
        images = Evaluated(self.held_out[name], self.evaluation)
        sampler = Stripe(len(images), rank, world)
        size, least = max(self.batch_size, 128), len(images) // world
        while len(images) % world and least and least % size == 0:
            size += 1  # or ranks would have unequal numbers of batches, for which DDP waits
        return DataLoader(images, size, sampler=sampler, num_workers=self.workers)


def brief(names: list[str]) -> str:
    """A list of names, shortened."""
    return ", ".join(names[:12]) + (f" … ({len(names)})" if len(names) > 12 else "")


def files_of(images: Source | str) -> Source:
    """Return all image files of a folder and of the folders in it, in the order of their paths.

    Raises:
        UserError: there are none.
    """
    if isinstance(images, Source):
        return images
    root, source = Path(images), Source()
    paths = [p.relative_to(root) for p in root.rglob("*")] if root.is_dir() else []
    taken = [p for p in paths if p.suffix.lower() in SUFFIXES and not f"/{p}".count("/.")]
    source.root, source.ids = root, {"": sorted(map(str, taken))}
    if not taken:
        raise UserError(f"expected image files in the folder {images}, got none; give another")
    return source


def first_difference(classes: list[str], others: list[str]) -> str:
    """Say which class the one list has and the other lacks, so that a difference can be seen."""
    lacking = [name for name in classes if nfc(name) not in map(nfc, others)]
    beside = [name for name in others if nfc(name) not in map(nfc, classes)]
    told = [f"without {shown(lacking[0])}"] if lacking else []
    told += [f"with {shown(beside[0])}"] if beside else []
    return f" ({' and '.join(told) or 'in another order'})"


def of_classes(source: Source, classes: list[str], name: str) -> Source:
    """Return held-out images with the labels of the training's classes, by name.

    Raises:
        UserError: they have a class that the training has not.
    """
    if source.classes == classes:
        return source
    theirs = {nfc(own): members for own, members in source.ids.items()}
    if len(theirs) < len(source.ids) or not theirs.keys() <= set(map(nfc, classes)):
        raise UserError(
            f"expected the {name} images to have the classes {brief(classes)}, got "
            f"{brief(source.classes)}{first_difference(classes, source.classes)}; rename the class "
            "folder or take it out"
        )
    view = Selection(source)
    view.ids = {own: theirs.get(nfc(own), []) for own in classes}
    empty = [own for own, members in view.ids.items() if not members]
    if empty:
        warnings.warn(
            f"expected {name} images of {len(classes)} classes, got none of {len(empty)}: "
            f"{brief(empty)}; {name} results are of the others",
            AugmentWarning,
            stacklevel=2,
        )
    return view


def made_of(real: Source, synthetic: Any) -> Any:
    """Synthetic images to train with.

    Of a path, shards or image files by class. Images that are synthesised on the fly come from the
    training images of the bank alone, so that one bank serves many draws of few shots.

    Raises:
        UserError: there are none, or a class of the bank has no training image.
    """
    if isinstance(synthetic, str):
        found = open_images(synthetic)
        if not len(found):
            raise UserError(f"expected synthetic images in {synthetic}, got none; synthesize some")
        return found
    if isinstance(synthetic, SyntheticDataset):
        bank = synthetic.synthesizer.bank
        stored = {i: d for name in bank.classes for i, d in bank.digests(name).items()}
        trained = {i: real.digest(i) for i, _ in real.samples}
        other = [i for i, digest in trained.items() if stored.get(i, digest) != digest]
        if other:
            raise UserError(
                f"expected the bank to be of the training images, got {len(other)} others of the "
                f"same names, such as {other[0]}, by their content; invert the training images"
            )
        inside = set(trained.values())
        return synthetic.subset(lambda image_id: stored[image_id] in inside)
    return synthetic


def labels_of(synthetic: Any) -> Sequence[int] | int:
    """The labels of synthetic images; of a pool, whose images change, how many there are."""
    if synthetic is None:
        return ()
    targets = getattr(synthetic, "targets", None)
    return len(synthetic) if targets is None else targets


class ReuseLogger(pl.Callback):
    """Logs at the end of each epoch how a replay pool does: ``pool/reuse`` and the like.

    Args:
        pool: the pool that is drawn from; by default that of the `ImageData`, if it has one.
    """

    def __init__(self, pool: ReplayPool | None = None) -> None:
        self.pool = pool

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what `ReplayPool.statistics` says."""
        pool = self.pool or getattr(getattr(trainer, "datamodule", None), "synthetic", None)
        if isinstance(pool, ReplayPool):
            pl_module.log_dict({f"pool/{k}": v for k, v in pool.statistics().items()})
