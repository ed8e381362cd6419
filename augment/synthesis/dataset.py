"""Synthetic images as a torch Dataset, alone or mixed with real ones.

`torch.utils.data.DataLoader` asks for whole batches through ``__getitems__``; so a batch is one run
of the sampler. Keep ``num_workers=0`` when the backbone is on a GPU.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from augment.bank.bank import LatentBank
from augment.centroid.rule import Rule
from augment.core.errors import UserError
from augment.core.rng import rng
from augment.diffusion import load_backbone
from augment.diffusion.backbone import Backbone
from augment.diffusion.sampling import Sampling
from augment.plan.mixing import Mixing
from augment.plan.plan import Plan
from augment.plan.planner import round_robin, warn_of_copies
from augment.synthesis.synthesizer import Synthesizer, planner_of

Sample = tuple[Any, Any]


class SyntheticDataset(Dataset[Sample]):
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
        transform: applied to the image tensor.
        target_transform: applied to the label.

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
        transform: Callable[[Tensor], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        bank = bank if isinstance(bank, LatentBank) else LatentBank.open(bank)
        backbone = backbone or load_backbone(**bank.recipe)
        rule = Rule.parse(mixing.rule)
        self.synthesizer = Synthesizer(
            backbone, bank, rule, sampling, prompts, reference_rule=mixing.reference_rule
        )
        self.planner = planner_of(bank, mixing, classes)
        self.classes = bank.classes
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        self.targets, self.epoch = round_robin(per_class, self.classes), 0
        """The label of every item; of its home class, where several are mixed."""
        if not bank.holds_clean:  # the noise of each image is its own
            warn_of_copies(self.planner, self.targets)
        self.transform, self.target_transform = transform, target_transform
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

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return the items of a batch, synthesised together."""
        if get_worker_info() is not None and self.synthesizer.backbone.device.type == "cuda":
            raise RuntimeError(
                "expected to synthesise in the main process, got a DataLoader worker and a CUDA "
                "backbone; set num_workers=0, draw from a ReplayPool, or write the images first "
                "with latent-augment synthesize"
            )
        transform = self.transform or (lambda image: image)
        target = self.target_transform or (lambda label: label)
        made = self._made(indices) if self.kept is None else self._kept(indices, self.kept)
        return [(transform(image), target(label)) for image, label in made]

    def _made(self, indices: Iterable[int]) -> Iterable[Sample]:
        """Synthesise images together; yield them and their labels."""
        plans = [self.plan(index) for index in indices]
        return zip(self.synthesizer.images(plans), map(self.label, plans), strict=True)

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


class MixedDataset(Dataset[Sample]):
    """Real and synthetic images, drawn with replacement.

    Each draw is synthetic with probability ``p_synthetic`` and uniform within its part; draw i of
    an epoch depends on (seed, epoch, i) alone. The length is yours to choose, so that every run
    takes the same number of steps whatever the number of images.

    Args:
        real, synthetic: map-style datasets of (image, label).
        p_synthetic: in [0, 1].
        length: draws an epoch.
        seed: of the draws.

    Raises:
        UserError: p_synthetic is out of its range.
    """

    def __init__(
        self, real: Any, synthetic: Any, p_synthetic: float, length: int, seed: int = 0
    ) -> None:
        if not 0 <= p_synthetic <= 1:
            raise UserError(f"expected p_synthetic in [0, 1], got {p_synthetic}")
        self.parts, self.p_synthetic = (real, synthetic), p_synthetic
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Draw anew from now on, and let the parts that have epochs do so."""
        self.epoch = epoch
        for part in self.parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def draw(self, index: int) -> tuple[int, int]:
        """Return (0 real | 1 synthetic, index within it) of a draw."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        generator = rng(self.seed, "mix", self.epoch, index % len(self))
        part = int(generator.random() < self.p_synthetic)
        return part, int(generator.integers(len(self.parts[part])))

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Return the items of a batch; each part is asked at most once."""
        draws = [self.draw(index) for index in indices]
        streams = [
            iter(fetch(part, [row for p, row in draws if p == number]))
            for number, part in enumerate(self.parts)
        ]
        return [next(streams[part]) for part, _ in draws]


def fetch(dataset: Any, rows: Sequence[int]) -> list[Sample]:
    """Return the items of some rows, in one call where the dataset offers that."""
    if rows and hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(rows)
    return [dataset[row] for row in rows]
