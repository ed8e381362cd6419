"""How a backbone is adapted, as a value; and the recipes of papers."""

import math
from dataclasses import dataclass
from typing import Literal

from augment.training.checks import at_least, expect


@dataclass(frozen=True)
class Recipe:
    """What is trained, how long and how fast.

    Attributes:
        rank: of the low-rank weights of the network; 0 leaves it as it is.
        image_heads: whether each image has a B of its own in the network's low-rank weights B·A.
        text_rank: of those of the text encoders; 0 leaves them as they are.
        tokens: whether each class gets a token; by default only where there is no text encoder.
        start: word that every token begins as; by default the class's name.
        keep_norm: whether tokens keep the vocabulary's mean length.
        steps: number of optimiser steps; see ``per``.
        per: what ``steps`` are counted for: the run, each class, or each image (then they are
            epochs: an image is seen ``steps`` times on average, as it is drawn at random).
        batch_size: images a batch, on each device.
        accumulate: batches a step.
        lr: learning rate of the low-rank weights.
        head_lr: that of B where each image has one.
        token_lr: learning rate of the tokens.
        schedule: constant, or cosine, which ends at 0.
        warm_up: steps in which the rate rises to its own.
        weight_decay: of AdamW.
        drop: share of the images that are trained without their prompt.
        flip: whether half of the images are mirrored.

    Raises:
        UserError: a number is out of its range, or nothing is trained.
    """

    rank: int = 16
    image_heads: bool = False
    text_rank: int = 0
    tokens: bool | None = None
    start: str = ""
    keep_norm: bool = True
    steps: int = 1000
    per: Literal["run", "class", "image"] = "run"
    batch_size: int = 4
    accumulate: int = 1
    lr: float = 1e-4
    head_lr: float = 1e-3
    token_lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warm_up: int = 0
    weight_decay: float = 1e-2
    drop: float = 0.1
    flip: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that are out of their ranges."""
        at_least(1, steps=self.steps, batch_size=self.batch_size, accumulate=self.accumulate)
        at_least(0, rank=self.rank, text_rank=self.text_rank, warm_up=self.warm_up)
        at_least(0, weight_decay=self.weight_decay)
        expect(self.lr > 0, "lr > 0", self.lr)
        expect(self.head_lr > 0, "head_lr > 0", self.head_lr)
        expect(self.token_lr > 0, "token_lr > 0", self.token_lr)
        rank = "rank ≥ 1 for image_heads"
        expect(self.rank > 0 or not self.image_heads, rank, self.rank)
        expect(0 <= self.drop <= 1, "drop in [0, 1]", self.drop)

    def total(self, classes: int, images: int, devices: int) -> int:
        """Return the number of optimiser steps of a run."""
        if self.per == "image":
            return math.ceil(self.steps * images / (self.batch_size * self.accumulate * devices))
        return self.steps * (classes if self.per == "class" else 1)

    def rate(self, step: int, total: int) -> float:
        """Return the factor of the learning rates at a step."""
        if step < self.warm_up:
            return step / self.warm_up
        if self.schedule == "constant":
            return 1.0
        done = (step - self.warm_up) / max(total - self.warm_up, 1)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


PRESETS: dict[str, Recipe] = {
    "": Recipe(),
    "da-fusion": Recipe(
        rank=0, tokens=True, start="the", keep_norm=False, steps=1000, per="class", batch_size=4,
        token_lr=4 * 5e-4, drop=0.0,
    ),
    "diff-mix": Recipe(
        rank=10, tokens=True, keep_norm=False, steps=35_000, batch_size=2, lr=5e-5, token_lr=5e-5,
        drop=0.0, flip=True,
    ),
    "datadream": Recipe(
        rank=16, text_rank=16, tokens=False, steps=200, per="image", batch_size=8, lr=1e-4,
        schedule="cosine", warm_up=100, drop=0.0,
    ),
}  # fmt: skip
"""Recipes by name.

- ``da-fusion``: Trabucco et al., arXiv 2302.07944; ``fine_tune.py`` in its README. There each class
  has a run of its own; the rate is scaled by the batch (``--scale_lr``). SD 1.4 at 512 pixels.
- ``diff-mix``: Wang et al., arXiv 2403.19600; ``scripts/finetune.sh``, strategy ``ti_db``. SD 1.5.
- ``datadream``: Kim et al., arXiv 2407.10910; ``DataDream/bash_run.sh``. There each class has a
  LoRA of its own (or one has all, as here). SD 2.1 at 512 pixels.

What they do not say are the defaults of diffusers' scripts, which they are made of: AdamW with a
weight decay of 0.01, and no prompts dropped.
"""
