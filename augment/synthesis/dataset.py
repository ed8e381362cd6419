"""Synthetic images as a torch Dataset, alone or mixed with real ones.

`torch.utils.data.DataLoader` asks for whole batches through ``__getitems__``; so a batch is one run
of the sampler. Keep ``num_workers=0`` when the backbone is on a GPU.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, get_worker_info

from augment.bank.bank import LatentBank
from augment.centroid.rule import Rule
from augment.core.errors import AugmentWarning, UserError, first_few
from augment.core.rng import rng
from augment.diffusion import load_backbone
from augment.diffusion.backbone import Backbone, without_bars
from augment.diffusion.sampling import Sampling
from augment.plan.mixing import Mixing
from augment.plan.plan import Plan
from augment.plan.planner import round_robin, warn_of_copies
from augment.sources.kinds import Transforms
from augment.sources.prompts import nfc
from augment.synthesis.synthesizer import Synthesizer, planner_of

Sample = tuple[Any, Any]

SINGLES = 64
"""Images asked for one at a time before a warning says how to ask for batches."""


class Epochs:
    """The epoch of a dataset, in memory that its copies in worker processes share.

    So ``set_epoch`` reaches the persistent workers of a DataLoader.
    """

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The number that plans and draws depend on."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __copy__(self) -> Any:
        """Return a copy with an epoch of its own."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._epoch = self._epoch.clone().share_memory_()
        return other


class SyntheticDataset(Epochs, Transforms, Dataset[Sample]):
    """Images synthesised from random centroids of a bank's latents, on the fly.

    Classes take turns: item i belongs to class ``i % len(classes)``, where all have as many. Its
    plan depends on (seed, epoch, i) and its class alone.
    ``set_epoch`` gives fresh images; without it every pass shows the same ones. Where several
    classes are mixed, that one is the home class, and the label is soft: the share of every class,
    a float32 tensor (C,); real images to batch with them need labels of that form.

    Args:
        bank: a bank, or the path of one.
        backbone: the model it was inverted with; by default it is loaded as it was then.
        mixing: what is mixed.
        sampling: how a centroid becomes an image.
        per_class: images a class and epoch; or how many of each class, by its name.
        classes: how many classes a centroid mixes.
        prompts: of classes that are to be sampled with another prompt than they were inverted with.
        keep: make each image once, at its first use, and keep it in memory, with 8 bits a pixel;
            ``set_epoch`` then changes nothing. For the few images of few shots.
        transform: applied to the image.
        target_transform: applied to the label.
        as_: kind of image: ``float``, a float32 tensor (C, H, W) in [0, 1]; ``uint8``, a tensor;
            or ``pil``, PIL's RGB, as timm and Hugging Face's image processors take it.

    Raises:
        BankMismatch: the bank is of another backbone.
        UserError: a parameter is out of its range, or the vectors of nearest do not fit the bank.
    """

    def __init__(
        self,
        bank: LatentBank | str | Path,
        backbone: Backbone | None = None,
        mixing: Mixing = Mixing(),
        sampling: Sampling = Sampling(),
        per_class: int | dict[str, int] = 100,
        classes: int = 1,
        prompts: dict[str, str] | None = None,
        keep: bool = False,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        as_: str = "float",
    ) -> None:
        super().__init__()
        self._set(as_, transform, target_transform)
        bank = bank if isinstance(bank, LatentBank) else LatentBank.open(bank)
        backbone = backbone or load_backbone(**bank.recipe)
        rule = Rule.parse(mixing.rule)
        self.synthesizer = Synthesizer(
            backbone, bank, rule, sampling, prompts, reference_rule=mixing.reference_rule
        )
        self.planner = planner_of(bank, mixing, classes)
        self.classes = bank.classes
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.targets, self._singles = round_robin(per_class, self.classes), 0
        """The label of every item; of its home class, where several are mixed."""
        if not bank.holds_clean:  # the noise of each image is its own
            warn_of_copies(self.planner, self.targets)
        self.kept: dict[int, tuple[Tensor, Any]] | None = {} if keep else None

    def subset(self, keep: Callable[[str], bool]) -> "SyntheticDataset":
        """Return the same dataset of fewer real images.

        Args:
            keep: whether an image id stays.

        Raises:
            UserError: a class would be left without an image, or with fewer than alphas.
        """
        other, bank = copy.copy(self), self.synthesizer.bank.subset(keep)
        rows = {n: [keep(i) for i in ids] for n, ids in self.planner.images.items()}
        features = self.planner.features and {
            name: table[torch.tensor(rows[name])] for name, table in self.planner.features.items()
        }
        if other.kept is not None and bank.members != self.planner.images:
            other.kept = {}
        other.synthesizer = dataclasses.replace(self.synthesizer, bank=bank)
        other.planner = dataclasses.replace(
            self.planner, images=bank.members, features=features or None
        )
        return other

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        rule = self.planner.mixing.rule
        return (
            f"SyntheticDataset({len(self)} images of {len(self.classes)} classes, {rule}, "
            f"as_={self.as_!r}, epoch {self.epoch})"
        )

    def set_epoch(self, epoch: int) -> None:
        """Draw other plans from now on."""
        if self.kept is None:
            self.epoch = epoch

    def plan(self, index: int) -> Plan:
        """Return the plan of item ``index`` in this epoch; `Synthesizer.images` makes its image.

        Raises:
            IndexError: the index is out of range.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        index %= len(self)
        return self.planner(self.epoch, index, self.targets[index])

    def label(self, plan: Plan) -> int | Tensor:
        """Return the label of a plan's image: its class, or the share of each of several."""
        if self.planner.mixing.translate:  # the more noise, the more is of the prompt's class
            share = (1.0 if plan.level is None else plan.level) ** self.planner.mixing.translate
            rest = (1 - share) * plan.soft_label(self.classes)
            return rest.index_add(0, torch.tensor([plan.label]), torch.tensor([share]))
        return plan.soft_label(self.classes) if self.planner.soft else plan.label

    def __getitem__(self, index: Any) -> Any:
        """Return an item, (image, label); or, for a slice, a dataset of its items."""
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        item = self.__getitems__([index])[0]
        self._singles += self.kept is None
        if self._singles == SINGLES:
            warnings.warn(
                AugmentWarning(
                    f"expected to synthesise whole batches, got {SINGLES} images asked for one by "
                    "one, which takes several times as long; a DataLoader of a SyntheticDataset or "
                    "MixedDataset asks for batches, one of torch's ConcatDataset does not"
                ),
                stacklevel=2,
            )
        return item

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return the items of a batch, synthesised together."""
        if get_worker_info() is not None and self.synthesizer.backbone.device.type == "cuda":
            raise RuntimeError(
                "expected to synthesise in the main process, got a DataLoader worker and a CUDA "
                "backbone; set num_workers=0, draw from a ReplayPool, or write the images first "
                "with latent-augment synthesize"
            )
        made = self._made(indices) if self.kept is None else self._kept(indices, self.kept)
        return [self._give(image, label) for image, label in made]

    def _made(self, indices: Iterable[int]) -> Iterable[Sample]:
        """Synthesise images together; yield them and their labels."""
        plans = [self.plan(index) for index in indices]
        with without_bars():
            images = self.synthesizer.images(plans)
        return zip(images, map(self.label, plans), strict=True)

    def _kept(self, indices: Sequence[int], kept: dict[int, tuple[Tensor, Any]]) -> list[Sample]:
        """Return the same from memory; items that are not there yet are made in whole blocks.

        So an image's last bits do not depend on who asked first.
        """
        rows, size = (
            [range(len(self))[index] for index in indices],
            self.synthesizer.sampling.batch_size,
        )
        for block in sorted({row // size for row in rows if row not in kept}):
            made = range(block * size, min((block + 1) * size, len(self)))
            for row, (image, label) in zip(made, self._made(made), strict=True):
                kept[row] = (image * 255).round().to("cpu", torch.uint8), label
        return [(pixels.float() / 255, label) for pixels, label in map(kept.__getitem__, rows)]


class MixedDataset(Epochs, Transforms, Dataset[Sample]):
    """Real and synthetic images, drawn with replacement, or all of both.

    Each draw is synthetic with probability ``p_synthetic`` and uniform within its part; draw i of
    an epoch depends on (seed, epoch, i) alone. The length is yours to choose, so that every run
    takes the same number of steps whatever the number of images. Without a probability each image
    is an item, the real ones first, as in torch's ConcatDataset, which asks for images one by one.

    Args:
        real, synthetic: map-style datasets of (image, label).
        p_synthetic: in [0, 1]; by default each image of both is there once.
        length: draws an epoch; by default the number of images of both.
        seed: of the draws.
        transform, target_transform: applied to the images and labels of both.
        as_: kind of image, as for `SyntheticDataset`, that images of both are converted to; by
            default they stay as they come.

    Raises:
        UserError: p_synthetic is out of its range, a length stands without it, or the parts have
            other classes.
    """

    def __init__(
        self,
        real: Any,
        synthetic: Any,
        p_synthetic: float | None = None,
        length: int | None = None,
        seed: int = 0,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        as_: str | None = None,
    ) -> None:
        super().__init__()
        if p_synthetic is not None and not 0 <= p_synthetic <= 1:
            raise UserError(f"expected p_synthetic in [0, 1], got {p_synthetic}")
        if p_synthetic is None and length is not None:
            raise UserError(f"expected p_synthetic with a length, got {length} alone; give both")
        self._set(as_, transform, target_transform)
        self.parts, self.p_synthetic, self.seed = (real, synthetic), p_synthetic, seed
        self.length = len(real) + len(synthetic) if length is None else length
        self._parts_epoch: int | None = 0
        names = [list(part.classes) for part in self.parts if hasattr(part, "classes")]
        if len(names) == 2 and [*map(nfc, names[0])] != [*map(nfc, names[1])]:
            raise UserError(
                f"expected synthetic images of the classes {first_few(names[0])}, got "
                f"{first_few(names[1])}; give both the same classes in the same order"
            )
        if names:
            self.classes: list[str] = names[0]
            self.class_to_idx = {name: label for label, name in enumerate(names[0])}

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        real, synthetic = map(len, self.parts)
        drawn = "" if self.p_synthetic is None else f", {self.p_synthetic:g} of draws synthetic"
        return (
            f"MixedDataset({len(self)} items of {real} real and {synthetic} synthetic images"
            f"{drawn}, as_={self.as_!r}, epoch {self.epoch})"
        )

    @property
    def targets(self) -> list[Any]:
        """The label of every item in this epoch, before ``target_transform``.

        Raises:
            AttributeError: a part has no targets.
        """
        labels = [part.targets for part in self.parts]
        return [labels[part][row] for part, row in map(self.draw, range(len(self)))]

    def set_epoch(self, epoch: int) -> None:
        """Draw anew from now on, and let the parts that have epochs do so."""
        self.epoch, self._parts_epoch = epoch, None
        self._set_parts()

    def _set_parts(self) -> None:
        """Set the epoch of the parts, also of their copies in a worker process."""
        if self._parts_epoch != self.epoch:
            self._parts_epoch = self.epoch
            for part in self.parts:
                if hasattr(part, "set_epoch"):
                    part.set_epoch(self.epoch)

    def draw(self, index: int) -> tuple[int, int]:
        """Return (0 real | 1 synthetic, index within it) of a draw."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        if self.p_synthetic is None:
            row, count = index % len(self), len(self.parts[0])
            return (0, row) if row < count else (1, row - count)
        generator = rng(self.seed, "mix", self.epoch, index % len(self))
        part = int(generator.random() < self.p_synthetic)
        return part, int(generator.integers(len(self.parts[part])))

    def __getitem__(self, index: Any) -> Any:
        """Return an item, (image, label); or, for a slice, a dataset of its items."""
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return the items of a batch; each part is asked at most once."""
        self._set_parts()
        draws = [self.draw(index) for index in indices]
        streams = [
            iter(fetch(part, [row for p, row in draws if p == number]))
            for number, part in enumerate(self.parts)
        ]
        return [self._give(*next(streams[part])) for part, _ in draws]


def fetch(dataset: Any, rows: Sequence[int]) -> list[Sample]:
    """Return the items of some rows, in one call where the dataset offers that."""
    if rows and hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(rows)
    return [dataset[row] for row in rows]
