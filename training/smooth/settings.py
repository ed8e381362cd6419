"""The options of a smoothing, apart from the run: their help needs no Lightning."""

from dataclasses import dataclass
from typing import Any, Literal

from augment.core.errors import UserError, first_few
from augment.core.registry import refuse_reserved
from augment.sources import Source
from augment.sources.captions import read_captions
from augment.sources.prompts import prompts_of
from training.checks import at_least, expect


@dataclass(frozen=True, kw_only=True)
class SmoothSettings:
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

    images: Source | str
    out: str
    backbone: str = "tiny"
    prompt: str = ""
    prompts: dict[str, str] | None = None
    captions: str | None = None
    weight: float = 1.0
    rank: int = 8
    targets: list[str] | None = None
    steps: int = 30000
    batch_size: int = 3
    accumulate: int = 32
    lr: float = 1e-4
    drop: float = 0.1
    seed: int = 0
    device: str | None = None
    devices: int = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    workers: int = 0
    backbone_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size, accumulate=self.accumulate)
        at_least(1, steps=self.steps, devices=self.devices)
        expect(0 <= self.drop <= 1, "drop in [0, 1]", self.drop)
        refuse_reserved(self.backbone_options or {}, "name_or_path", "device", "dtype")

    def texts(self, source: Source) -> list[str]:
        """Return the caption of each image, or else the prompt of its class."""
        captions = {} if self.captions is None else read_captions(self.captions, source)
        prompts = prompts_of(source.classes, self.prompt, self.prompts)
        unknown = prompts.keys() - set(source.classes)
        if unknown:
            raise UserError(
                f"expected prompts for classes out of {first_few(source.classes)}, got one for "
                f"{min(unknown)!r}; choose one of these"
            )
        classes = [prompts.get(name, "") for name in source.classes]
        return [captions.get(image_id, classes[label]) for image_id, label in source.samples]
