"""Real images, synthetic ones mixed in, and held-out ones, as a LightningDataModule."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from augment.core.errors import AugmentWarning, UserError, first_few, shown
from augment.core.rng import rng
from augment.networks.timm import other_classes
from augment.replay.pool import ReplayPool
from augment.shards.dataset import Shards, open_images
from augment.sources import Source, as_source
from augment.sources.images import SUFFIXES, parse_colour
from augment.sources.prompts import nfc
from augment.sources.source import warn_of_copies
from augment.sources.subsets import Selection
from augment.synthesis.dataset import SyntheticDataset, fetch
from augment.training.checks import at_least, expect
from augment.training.data import identity
from augment.training.data.draws import Draw, MixedBatchSampler, SyntheticMix
from augment.training.data.identity import FileDigests, Images
from augment.training.data.transforms import Augmentation, evaluation
from augment.training.lightning import batches_done

__all__ = ["ImageData"]

Item = tuple[Tensor, Any, bool]
"""An image, its label, and whether it is synthetic."""

_MEMORY = 2**29
"""Maximum bytes of decoded images that are kept rather than decoded again at every draw."""


class TrainingImages(Dataset[Item]):
    """Real images and synthetic ones after them, indexed by `Draw`.

    The random generator of an image's transform belongs to (seed, epoch, place), so that it depends
    on no worker, no rank and no interruption.

    Args:
        real: the real images.
        synthetic: a map-style dataset of (image, label), or None. If its labels are soft, real
            images get one-hot labels.
        augment: what is done to an image, of ``channels`` and ``resolution``.
        channels, resolution: of the items.
        seed: of the transforms.
        memory: bytes for images that stay the same; less than they need keeps none.
    """

    def __init__(
        self,
        real: Source,
        synthetic: Images | None,
        augment: Augmentation,
        channels: int,
        resolution: int,
        seed: int,
        memory: int = 0,
    ) -> None:
        self.real, self.synthetic, self.seed = real, synthetic, seed
        self.fixed, self.random = augment.fixed(channels, resolution), augment.random(resolution)
        pool = isinstance(synthetic, ReplayPool)
        labels = synthetic if pool else getattr(synthetic, "planner", None)
        self.soft = labels is not None and labels.soft
        stays = len(self) if isinstance(synthetic, (Shards, Source)) else len(real)
        keep = augment.whole and len(self) * channels * resolution**2 <= memory
        self.stays = stays if keep else 0
        self.kept: dict[int, tuple[Tensor, Any]] = {}

    def __len__(self) -> int:
        return len(self.real) + (0 if self.synthetic is None else len(self.synthetic))

    def __getitem__(self, draw: Draw) -> Item:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: Sequence[Draw]) -> list[Item]:
        """Return the items of a batch; the synthetic dataset is asked at most once."""
        count, epoch = len(self.real), draws[0].epoch
        dataset: Any = self.synthetic
        if getattr(dataset, "epoch", epoch) != epoch:
            dataset.set_epoch(epoch)
        items = self._fixed([draw.row for draw in draws])
        generators = [rng(self.seed, "augment", draw.epoch, draw.place) for draw in draws]
        images = self.random([pixels for pixels, _ in items], generators)
        return [
            (image, label, draw.row >= count)
            for image, (_, label), draw in zip(images, items, draws, strict=True)
        ]

    def _fixed(self, rows: list[int]) -> list[tuple[Tensor, Any]]:
        """Return (pixels, label) of rows, from memory or from where they are."""
        count, wanted = len(self.real), [row for row in rows if row not in self.kept]
        made = iter(fetch(self.synthetic, [row - count for row in wanted if row >= count]))
        new = []
        for row in wanted:
            image, label = self.real[row] if row < count else next(made)
            if self.soft and not isinstance(label, Tensor):
                label = F.one_hot(torch.tensor(label), len(self.real.classes)).float()
            new.append((self.fixed(image), label))
            if row < self.stays:
                self.kept[row] = new[-1]
        fresh, asked = iter(new), set(wanted)
        return [next(fresh) if row in asked else self.kept[row] for row in rows]


class Batches(DataLoader[Any]):
    """A DataLoader that resumes where a checkpoint stopped, because its sampler does.

    The position is Lightning's own count of batches. These two methods only tell Lightning so: it
    saves the state of loaders too, and loses it where ``configure_optimizers`` asks for the number
    of steps (Lightning issue 20550).
    """

    def state_dict(self) -> dict[str, object]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Ignore it."""


class Evaluated(Dataset[tuple[Tensor, int]]):
    """The images of a source, transformed.

    Args:
        source: the images.
        transform: what is done to each; without random numbers.
        memory: bytes for images that are evaluated again; less than all need keeps none.
    """

    def __init__(self, source: Source, transform: Callable[[Any], Tensor], memory: int = 0) -> None:
        self.source, self.transform, self.memory = source, transform, memory
        self.kept: dict[int, tuple[Tensor, int]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.kept:
            return self.kept[index]
        image, label = self.source[index]
        item = self.transform(image), label
        if item[0].nbytes * len(self) <= self.memory:
            self.kept[index] = item
        return item


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
        sampler: instance, square_root, class or progressive; see
            `augment.training.data.draws.SAMPLERS`.
        augment: classical augmentation of all training images.
        crop: of the images to evaluate, the share of the shorter side; 0.875 is ImageNet's usual;
            by default that of a checkpoint, or 1.
        channels: 1 or 3 colours of the images; by default those of the classifier: of its
            checkpoint, or its network's usual ones.
        resolution: pixels of the images; by default likewise.
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
        draws: see `augment.training.data.draws.MixedBatchSampler`.

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
        mix: SyntheticMix = SyntheticMix(),  # noqa: B008
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
        expect(channels in (None, 1, 3), "1 or 3 channels", channels)
        at_least(8, resolution=resolution)
        at_least(0, workers=workers)
        expect(crop is None or 0 < crop <= 1, "a crop in (0, 1]", crop)
        self.looked = False  # at the images; see check_images

        def look(images: Source | str, name: str) -> Source:
            """Open images and leave out those that cannot be read."""
            source = as_source(images)
            if background:
                source.background = parse_colour(background)
            if source.target_transform is not None:
                raise UserError(
                    f"expected the {name} images to have the labels of their classes, got a "
                    "target_transform; leave it out"
                )
            return source.readable(max_rejects, name)

        self.real = None if train is None else look(train, "training")
        self.held_out = {
            name: look(part, name) for name, part in (("val", val), ("test", test)) if part
        }
        self.unlabelled = None if predict is None else look(_files_of(predict), "predict")
        parts = [*([self.real] if self.real else []), *self.held_out.values()]
        self.counts = self.real.counts if self.real else []
        self.classes = parts[0].classes if parts else []
        for name, part in self.held_out.items():
            self.held_out[name] = _of_classes(part, self.classes, name)
        self.synthetic = _open_synthetic(self.real, synthetic) if self.real else None
        if isinstance(self.synthetic, Source):
            self.synthetic = look(self.synthetic, "synthetic")
        classes = getattr(self.synthetic, "classes", self.classes)
        problem = other_classes(_shown(self.classes), _shown(classes))
        if problem:
            raise UserError(
                f"expected the synthetic images to have the classes {first_few(self.classes)}, "
                f"got others ({problem}); give both the same class folders"
            )
        self.asked = channels, resolution, crop  # or None: those of the classifier
        self.workers, self.batch_size, self.seed, self.augment = workers, batch_size, seed, augment
        self._prepare(channels or 3, resolution or 32, crop or 1.0)
        if self.real:
            labels = _labels_of(self.synthetic)
            self.draws = MixedBatchSampler(
                self.real.targets, labels, len(self.classes), mix, sampler, batch_size,
                steps_per_epoch, seed, self._epochs, self._done,
            )  # fmt: skip

    def _prepare(self, channels: int, resolution: int, crop: float) -> None:
        """Bring images to a format from now on."""
        self.form = channels, resolution, crop
        self.evaluation = evaluation(channels, resolution, crop)
        if self.real:
            memory = _MEMORY // max(self.workers, 1)
            form = self.augment, channels, resolution
            self.images = TrainingImages(self.real, self.synthetic, *form, self.seed, memory)

    def setup(self, stage: str) -> None:
        """Shard the data by rank, and compare the images of a training; see `check_images`."""
        trainer = self.trainer
        if trainer is not None:
            settle = getattr(trainer.lightning_module, "settle", None)
            if settle:
                self.asked = settle(self.classes or None, *self.asked)
                if self.asked != self.form:
                    self._prepare(*self.asked)
            if self.real:
                self.draws.share(trainer.global_rank, trainer.world_size)
            if "val" not in self.held_out:
                trainer.limit_val_batches = 0  # Lightning warns of empty loaders
            self.check_trainer(trainer)
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
        run = identity.RunImages(file)
        digests, parts = self._identify(run.files)
        if begun:
            run.check(parts)
        if self.real and self.synthetic is not None:
            self._check_synthetic(self.real, self.synthetic, digests)
        for name, source in self._sources.items():
            classes, own = source.classes, digests[name]
            warn_of_copies(((i, classes[k], own[i]) for i, k in source.samples if own[i]), name)
            if name != "training" and self.real:
                identity.warn_of_overlap(digests["training"], own, name)
        run.write(parts)

    def compare_images(self, file: Path) -> None:
        """Refuse other images than a run began with, as its file says."""
        run = identity.RunImages(file)
        run.check(self._identify(run.files)[1])

    @property
    def _sources(self) -> dict[str, Source]:
        """The real images by part: training, val, test."""
        return {**({"training": self.real} if self.real else {}), **self.held_out}

    def _identify(self, files: FileDigests) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        """Return by part the digests of images by id, and the identity of all of them."""
        digests, parts = {}, {}
        for name, source in self._sources.items():
            digests[name] = identity.digests_of(source, files)
            parts[name] = identity.content_digest(source, digests[name])
        if self.synthetic is not None:
            parts["synthetic"] = identity.synthetic_digest(self.synthetic, files)
        if isinstance(self.synthetic, Source):
            digests["synthetic"] = identity.digests_of(self.synthetic, files)
        return digests, parts

    def _check_synthetic(
        self, real: Source, synthetic: Images, digests: dict[str, dict[str, str]]
    ) -> None:
        """Compare synthetic images with real ones; see `check_images`."""
        made_from, mix = identity.origins(synthetic), self.draws.mix
        labels = _labels_of(synthetic)
        identity.warn_of_strangers(made_from, real, digests["training"])
        for name in self.held_out:
            identity.check_apart(made_from, digests[name], name)
        if own := digests.pop("synthetic", None):
            identity.check_new(own, digests)
        if mix.by_count or mix.share:
            if isinstance(labels, int):  # a pool makes images of any class
                have = np.full(len(self.classes), labels)
            else:
                have = np.bincount(np.asarray(labels, int), minlength=len(self.classes))
            identity.check_numbers(have, mix.budget(self.draws.counts), mix.by_count, self.classes)
        if len(synthetic):
            identity.warn_of_looks(real, synthetic, *self.form[:2])

    def class_counts(self, epoch: int) -> list[int]:
        """Return the number of training images of each class in an epoch, for a loss.

        Synthetic images count where they join the real ones (``fill_to``, ``per_real``); mixed by
        share they leave the frequency of the classes as it is.
        """
        return self.draws.class_counts(epoch).tolist()

    def keep_out(self, place: Path) -> None:
        """Refuse a folder of a run among the images; see `augment.sources.Source.keep_out`."""
        for source in self._sources.values():
            source.keep_out(place)

    def check_trainer(self, trainer: pl.Trainer) -> None:
        """Refuse to cut epochs short, which draws and schedules would not know of."""
        limit = trainer.limit_train_batches  # 1 is one batch, 1.0 is all
        if (limit != 1.0 or isinstance(limit, int)) and not getattr(trainer, "fast_dev_run", 0):
            raise UserError(
                "expected data.steps_per_epoch to shorten an epoch, got limit_train_batches "
                f"{limit}; leave that out"
            )

    def _epochs(self) -> int:
        """Return how many epochs the training takes."""
        trainer = self.trainer
        if trainer is None:
            return 1
        epochs = trainer.max_epochs or -1
        ends = [epochs] if epochs > 0 else []
        if trainer.max_steps > 0:
            # the last batches of an epoch make a step even if they are fewer
            steps = -(-len(self.draws) // trainer.accumulate_grad_batches)
            ends.append(-(-trainer.max_steps // steps))
        return min(ends, default=1)

    def _done(self) -> int:
        return batches_done(self.trainer) if self.trainer else 0

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's part of the draws."""
        return Batches(
            self.images,
            batch_sampler=self.draws,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.workers > 0,
        )

    def all_of(self, name: str) -> DataLoader[Any]:
        """Return all held-out images of ``val`` or ``test``, on every rank."""
        return self._loader(name, 0, 1)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return this rank's part of the validation images."""
        return self._part("val") if "val" in self.held_out else []

    def test_dataloader(self) -> DataLoader[Any]:
        """Return this rank's part of the test images."""
        return self._part("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return all images to label, on every rank."""
        images = Evaluated(self.to_label, self.evaluation)
        return DataLoader(images, batch_size=max(self.batch_size, 128), num_workers=self.workers)

    @property
    def to_label(self) -> Source:
        """The images that ``predict`` labels."""
        images = self.unlabelled or self.held_out.get("test") or self.real
        if images is None:
            raise UserError("expected images to label, got none; give --data.predict")
        return images

    def _part(self, name: str) -> DataLoader[Any]:
        trainer = self.trainer
        return self._loader(
            name, *((trainer.global_rank, trainer.world_size) if trainer else (0, 1))
        )

    def _loader(self, name: str, rank: int, world: int) -> DataLoader[Any]:
        """Return every ``world``-th image from ``rank`` on: each is evaluated once, by one rank."""
        if name not in self.held_out:
            raise UserError(f"expected images to {name} on, got none; give --data.{name}")
        again = name == "val" and not self.workers  # workers end with the epoch
        images = Evaluated(self.held_out[name], self.evaluation, _MEMORY if again else 0)
        size, least = max(self.batch_size, 128), len(images) // world
        while len(images) % world and least and least % size == 0:
            size += 1  # or ranks would have unequal numbers of batches, and DDP would wait
        stripe = range(rank, len(images), world)
        return DataLoader(images, batch_size=size, sampler=stripe, num_workers=self.workers)


def _files_of(images: Source | str) -> Source:
    """Return all image files of a folder and of the folders in it, in the order of their paths."""
    if isinstance(images, Source):
        return images
    root, source = Path(images), Source()
    paths = [p.relative_to(root) for p in root.rglob("*")] if root.is_dir() else []
    taken = [p for p in paths if p.suffix.lower() in SUFFIXES and not f"/{p}".count("/.")]
    source.root, source.ids = root, {"": sorted(map(str, taken))}
    if not taken:
        state = "none" if root.is_dir() else "a file" if root.exists() else "no such folder"
        raise UserError(f"expected image files in the folder {images}, got {state}; give another")
    return source


def _shown(classes: Sequence[str]) -> list[str]:
    """Return names in Unicode's form NFC, with the code points of letters that look alike."""
    return [name if name.isascii() else shown(name) for name in map(nfc, classes)]


def _of_classes(source: Source, classes: list[str], name: str) -> Source:
    """Return held-out images with the labels of the training's classes, by name."""
    if source.classes == classes:
        return source
    by_name = {nfc(own): members for own, members in source.ids.items()}
    if len(by_name) < len(source.ids) or not by_name.keys() <= set(map(nfc, classes)):
        problem = other_classes(_shown(classes), _shown(source.classes))
        raise UserError(
            f"expected the {name} images to have the classes {first_few(classes)}, got others "
            f"({problem}); rename the class folder or take it out"
        )
    view = Selection(source)
    view.ids = {own: by_name.get(nfc(own), []) for own in classes}
    empty = [own for own, members in view.ids.items() if not members]
    if empty:
        warnings.warn(
            f"expected {name} images of {len(classes)} classes, got none of {len(empty)}: "
            f"{first_few(empty)}; {name} results are of the others",
            AugmentWarning,
            stacklevel=2,
        )
    return view


def _open_synthetic(real: Source, synthetic: Any) -> Images | None:
    """Return synthetic images to train with.

    Of a path, shards or image files by class. Images that are synthesised on the fly come from the
    training images of the bank alone, so that one bank serves many draws of few shots.
    """
    if isinstance(synthetic, str):
        opened = open_images(synthetic)
        if not len(opened):
            raise UserError(f"expected synthetic images in {synthetic}, got none; synthesize some")
        return opened
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


def _labels_of(synthetic: Images | None) -> Sequence[int] | int:
    """Return the labels of synthetic images; of a pool, whose images change, their number."""
    if synthetic is None:
        return ()
    targets = getattr(synthetic, "targets", None)
    if targets is None:
        return len(synthetic)
    return targets if isinstance(targets, Sequence) else np.asarray(targets).tolist()


class ReuseLogger(pl.Callback):
    """Log at the end of each epoch how a replay pool does: ``pool/reuse`` and the like.

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
