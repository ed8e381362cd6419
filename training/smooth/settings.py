"""The options of a smoothing, apart from the run: their help needs no Lightning."""

from dataclasses import dataclass

from augment.training.adapt.recipe import Recipe
from augment.training.adapt.settings import RunSettings


@dataclass(frozen=True, kw_only=True)
class SmoothSettings(RunSettings):
    """The options of ``latent-augment smooth``.

    Args:
        images: folder with one sub-folder of image files a class, a folder of shards, or
            another source, as for invert.
        out: folder of the run, which gets pytorch_lora_weights.safetensors, for
            --backbone-options '{lora: OUT}'; an interrupted run is resumed.
        backbone: diffusion model, as for invert.
        prompt: template of the prompts, such as 'a photo of a {name}'.
        prompts: prompts by class, as YAML such as '{Coat: top}'; they replace the template's.
        captions: metadata.jsonl with file_name and text of images; captions replace prompts.
        weight: weight of the regulariser.
        rank: rank of the low-rank weights; 0 trains all weights, and leaves a whole backbone.
        targets: endings of the names of layers that get low-rank weights; by default the
            projections of the attention.
        steps: number of optimiser steps.
        batch_size: images a batch, on each device.
        accumulate: batches a step.
        lr: learning rate, which is constant.
        drop: share of the images that are trained without their prompt, in [0, 1].
        seed: seed of all random draws.
        device: device such as cuda or cpu; by default the GPU if there is one.
        devices: number of processes, each on a device of its own.
        precision: precision of the training; bf16-mixed computes in bfloat16 where it can.
        workers: number of processes that load images.
        backbone_options: options of the backbone, as YAML such as '{resolution: 384}'.

    Raises:
        UserError: a number is out of its range.
    """

    weight: float = 1.0
    rank: int = 8
    steps: int = 30000
    batch_size: int = 3
    accumulate: int = 32
    lr: float = 1e-4
    drop: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.recipe  # which refuses wrong numbers

    @property
    def recipe(self) -> Recipe:
        """How long and how fast."""
        return Recipe(
            rank=self.rank, steps=self.steps, batch_size=self.batch_size,
            accumulate=self.accumulate, lr=self.lr, drop=self.drop,
        )  # fmt: skip
