"""What a backbone is adapted with: images with captions or class prompts, noised.

The random generator of a training image belongs to the seed and its number in the run alone, so
that neither batch, accumulation, ranks nor an interruption change what is drawn.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NotRequired, TypedDict

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from augment.core.rng import normal, rng
from augment.diffusion.backbone import Trainable
from augment.sources import Source
from augment.training.data.module import Batches
from augment.training.lightning import batches_done

_LEVELS = 1000  # of a process that names no number of trained ones


class Batch(TypedDict):
    """A batch of `NoisedImages`: rows of the source, pixels, prompts, levels (n,), noises ε.

    There are directions Δ if a loss needs them.

    With prior preservation, ``prior`` is a batch of its images.
    """

    row: Tensor
    image: Tensor
    prompt: list[str]
    level: Tensor
    noise: Tensor
    direction: Tensor
    prior: NotRequired["Batch"]


class NoisedImages(Dataset[dict[str, object]]):
    """Images with a prompt, a level, a noise and a direction, drawn by number.

    Args:
        source: the images, all drawn alike.
        prompts: one an image, in the source's order.
        backbone: whose format and levels they are.
        drop: share of the images that lose their prompt, so that there is an unconditional model.
        seed: of all draws.
        directions: whether to draw them.
        flip: whether half of the images are mirrored.
        purpose: of the random draws, a key of `augment.core.rng.PURPOSES`.

    Attributes:
        prior: images of which one goes with each of these; by default none.
    """

    def __init__(
        self,
        source: Source,
        prompts: Sequence[str],
        backbone: Trainable,
        drop: float,
        seed: int,
        directions: bool = True,
        flip: bool = False,
        purpose: str = "step",
    ) -> None:
        self.prior: NoisedImages | None = None
        self.purpose = purpose
        self.directions, self.flip = directions, flip
        self.source, self.prompts, self.drop, self.seed = source, prompts, drop, seed
        self.form, self.shape = (backbone.channels, backbone.resolution), backbone.latent_shape
        self.levels: int = getattr(backbone.process, "train_steps", _LEVELS)

    def __getitem__(self, number: int) -> dict[str, object]:
        generator = rng(self.seed, self.purpose, number)
        row = int(generator.integers(len(self.prompts)))
        dropped = generator.random() < self.drop
        level = float(generator.integers(1, self.levels, endpoint=True)) / self.levels
        noise = normal(generator, *self.shape)
        item: dict[str, object] = {
            "row": row,
            "prompt": "" if dropped else self.prompts[row],
            "level": level,
            "noise": noise,
        }
        if self.directions:
            direction = normal(generator, *self.shape)
            item["direction"] = direction / direction.norm()
        image = self.source.load(self.source.samples[row][0], *self.form)
        mirror = self.flip and generator.random() < 0.5
        item["image"] = image.flip(-1) if mirror else image
        return item | ({"prior": self.prior[number]} if self.prior else {})


class NumberSampler(Sampler[list[int]]):
    """Numbers of training images, batch by batch, from where the training stands.

    Args:
        size: images a batch.
        count: batches in all.
        done: how many the training has had.
        rank, world: batches are laid out rank by rank.
    """

    def __init__(
        self, size: int, count: int, done: Callable[[], int], rank: int = 0, world: int = 1
    ) -> None:
        self.size, self.count, self.done, self.rank, self.world = size, count, done, rank, world

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[int]]:
        for batch in range(self.done(), self.count):
            first = (batch * self.world + self.rank) * self.size
            yield list(range(first, first + self.size))


class NoisedData(pl.LightningDataModule):
    """`NoisedImages`, sharded by rank."""

    def __init__(self, images: NoisedImages, size: int, workers: int) -> None:
        super().__init__()
        self.images, self.size, self.workers = images, size, workers

    def train_dataloader(self) -> Batches:
        """Return this rank's batches."""
        trainer = self.trainer
        assert trainer is not None  # which asks for them
        count = trainer.max_steps * trainer.accumulate_grad_batches
        ranks = trainer.global_rank, trainer.world_size
        sampler = NumberSampler(self.size, count, partial(batches_done, trainer), *ranks)
        return Batches(self.images, batch_sampler=sampler, num_workers=self.workers)
