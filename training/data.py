"""Image folders, real and synthetic, as a LightningDataModule."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from augment.dataset import MixedDataset
from augment.errors import UserError
from augment.images import prepare
from augment.replay import ReplayPool
from augment.shards import Shards, open_shards
from augment.sources import Folder


class FolderDataset(Dataset[tuple[Tensor, int]]):
    """The images of ``root/class/*.png|jpg``, decoded once and kept in memory.

    Args:
        root: the folder.
        channels, resolution: the format to bring images to.
        transform: applied at every draw.

    Raises:
        UserError: the folder is not an image folder.
    """

    def __init__(
        self,
        root: str | Path,
        channels: int = 1,
        resolution: int = 32,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self.source = Folder(root)
        self.classes = self.source.classes
        self.samples = [(i, k) for k, ids in enumerate(self.source.ids.values()) for i in ids]
        self.targets = [label for _, label in self.samples]
        self.format, self.transform = (channels, resolution), transform
        self._decoded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image_id, label = self.samples[index]
        if index not in self._decoded:
            self._decoded[index] = self.source.load(image_id, *self.format)
        image = self._decoded[index]
        return (self.transform(image) if self.transform else image), label


def folder_or_shards(
    root: str | Path, channels: int, resolution: int, transform: Callable[[Tensor], Any] | None
) -> FolderDataset | Shards:
    """An image folder, or a folder of shards, whose images are decoded at every draw.

    Raises:
        UserError: it is neither, or not complete.
    """
    if not (Path(root) / "synthesis.json").exists():
        return FolderDataset(root, channels, resolution, transform)

    def form(image: Tensor) -> Any:
        prepared = prepare(image[None], channels, resolution)[0]
        return transform(prepared) if transform else prepared

    return open_shards(root, form)


def classical(resolution: int, flip: bool = True) -> Callable[[Tensor], Tensor]:
    """Classical augmentation: random shifts by up to an eighth, and mirror images."""
    shift = v2.RandomCrop(resolution, padding=resolution // 8)
    return v2.Compose([shift, v2.RandomHorizontalFlip()]) if flip else shift


class Draws(Sampler[int]):
    """The draws of a `MixedDataset`, in order; Lightning tells a sampler each epoch."""

    def __init__(self, dataset: MixedDataset) -> None:
        self.dataset = dataset

    def set_epoch(self, epoch: int) -> None:
        """Draw anew."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.dataset)))

    def __len__(self) -> int:
        return len(self.dataset)


class ReuseLogger(pl.Callback):
    """Logs at the end of each epoch how a replay pool does: ``pool/reuse`` and the like.

    Args:
        pool: the pool that is drawn from.
    """

    def __init__(self, pool: ReplayPool) -> None:
        self.pool = pool

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what `ReplayPool.statistics` says."""
        pl_module.log_dict({f"pool/{k}": v for k, v in self.pool.statistics().items()})


class FewShotData(pl.LightningDataModule):
    """Real images, synthetic ones mixed in by a probability, and a test folder.

    Args:
        real: image folder to train on.
        test: image folder to validate and test on.
        synthetic: shards of synthetic images, as ``latent-augment synthesize`` writes them, or a
            folder of them.
        p_synthetic: the share of synthetic draws.
        augment: classical augmentation (shifts and mirror images) of every training image.
        channels, resolution: the image format.
        batch_size: images a step.
        steps_per_epoch: optimiser steps an epoch, whatever the number of images.
        seed: of the draws.

    Raises:
        UserError: a folder is not an image folder, or the folders' classes differ.
    """

    def __init__(
        self,
        real: str,
        test: str,
        synthetic: str | None = None,
        p_synthetic: float = 0.25,
        augment: bool = True,
        channels: int = 1,
        resolution: int = 32,
        batch_size: int = 64,
        steps_per_epoch: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        transform = classical(resolution) if augment else None
        form = (channels, resolution)
        self.real = FolderDataset(real, *form, transform)
        self.test = FolderDataset(test, *form)
        fake = folder_or_shards(synthetic, *form, transform) if synthetic else self.real
        for name, part in (("test", self.test), ("synthetic", fake)):
            if part.classes != self.real.classes:
                raise UserError(
                    f"expected the {name} folder to have the classes {self.real.classes}, got "
                    f"{part.classes}; give both the same class folders"
                )
        self.num_classes, self.channels = len(self.real.classes), channels
        share = p_synthetic if synthetic else 0.0
        length = batch_size * steps_per_epoch
        self.train = MixedDataset(self.real, fake, share, length, seed)
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """The draws, others in each epoch."""
        return DataLoader(self.train, self.batch_size, sampler=Draws(self.train))

    def val_dataloader(self) -> DataLoader[Any]:
        """The test folder, in order."""
        return DataLoader(self.test, 256)

    test_dataloader = val_dataloader
