"""The options of trainings of a backbone, apart from the runs: their help needs no Lightning."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import torch

from augment.core.errors import UserError, first_few, lookup
from augment.core.registry import refuse_reserved
from augment.diffusion import Backbone, load_backbone
from augment.jobs.job import planning_device
from augment.shards.dataset import open_images
from augment.sources import Source, as_source
from augment.sources.captions import BESIDE, captions_of, read_captions
from augment.sources.prompts import by_class
from augment.sources.source import choose_backbone
from augment.training.adapt.prior import Prior
from augment.training.adapt.recipe import PRESETS, Recipe
from augment.training.checks import at_least


def _captions(source: Source, where: str) -> dict[str, str]:
    """Return captions by image id: of files beside the images, or of those that a file names."""
    return captions_of(source, where) if where == BESIDE else read_captions(where, source)


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every training of a backbone asks for; see `AdaptSettings`."""

    images: Source | str
    out: str
    backbone: str = "auto"
    prompt: str = ""
    prompts: dict[str, str] | None = None
    captions: str | None = None
    targets: list[str] | None = None
    seed: int = 0
    device: str | None = None
    devices: int = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    workers: int = 0
    backbone_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        at_least(1, devices=self.devices)
        refuse_reserved(self.backbone_options or {}, "name_or_path", "device", "dtype")

    @cached_property
    def source(self) -> Source:
        """The images, without those that cannot be read."""
        return as_source(open_images(self.images)).readable(name="training")

    @cached_property
    def model(self) -> str:
        """The name of the backbone; see `augment.sources.source.choose_backbone`."""
        return choose_backbone(self.backbone, self.source.examples())

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone's weights."""
        return torch.float32

    def load(self) -> Backbone:
        """Load the backbone."""
        options, device = self.backbone_options or {}, planning_device(self.device)
        return load_backbone(self.model, device, self.dtype, **options)

    def check_classes(self, texts: Mapping[str, str] | None, what: str) -> dict[str, str]:
        """Return texts by class, of the classes that there are."""
        classes = self.source.classes
        own = by_class(texts or {}, classes)
        if unknown := own.keys() - set(classes):
            raise UserError(
                f"expected {what} for classes out of {first_few(classes)}, got one for "
                f"{min(unknown)!r}; choose one of these"
            )
        return own

    def texts(self, prompts: Mapping[str, str]) -> list[str]:
        """Return the caption of each image, or else the prompt of its class."""
        captions = (self.captions and _captions(self.source, self.captions)) or {}
        pairs = zip(self.source.samples, self.class_texts(prompts), strict=True)
        return [captions.get(image_id, text) for (image_id, _), text in pairs]

    def class_texts(self, prompts: Mapping[str, str]) -> list[str]:
        """Return the prompt of each image's class."""
        classes = [prompts.get(name, "") for name in self.source.classes]
        return [classes[label] for _, label in self.source.samples]


@dataclass(frozen=True, kw_only=True)
class AdaptSettings(RunSettings):
    """The options of ``latent-augment adapt``.

    Args:
        images: folder with one sub-folder of image files a class, a folder of shards, or
            another source, as for invert.
        out: folder of the run, which gets pytorch_lora_weights.safetensors and
            learned_embeds.safetensors, for --backbone-options '{adapter: OUT}'; an interrupted run
            is resumed.
        backbone: diffusion model, as for invert.
        preset: da-fusion, diff-mix or datadream: the recipe of a paper, whose numbers the options
            below replace.
        prompt: template of the prompts; by default 'a photo of a {name}', where a class with a
            token is called by it, or the token alone where there is no text encoder.
        prompts: prompts by class, as YAML such as '{Coat: a coat on a hanger}'; they replace the
            template's.
        captions: metadata.jsonl with file_name and text of images, or txt for a text file beside
            each; captions replace prompts.
        words: word that a class's token begins as, as YAML such as '{Coat: top}'; by default the
            class's name.
        rank: rank of the low-rank weights of the network; 0 leaves it as it is. By default 16.
        image_heads: whether each image gets a B of its own in the network's low-rank weights
            B·A, which synthesis mixes by the weights of a plan (ChimeraLoRA).
        text_rank: rank of those of the text encoders. By default 0, which leaves them as they are.
        tokens: whether each class gets a token; by default only where there is no text encoder.
        targets: endings of the names of layers that get low-rank weights; by default the
            projections of the attention.
        steps: number of optimiser steps, by default 1000.
        per: what the steps are counted for: run, class, or image, which makes them epochs.
        batch_size: images a batch, on each device. By default 4.
        accumulate: batches a step. By default 1.
        lr: learning rate of low-rank weights. By default 1e-4.
        head_lr: learning rate of B with image_heads, where lr is that of A. By default 1e-3.
        token_lr: learning rate of tokens. By default 1e-3.
        drop: share of the images that are trained without their prompt, in [0, 1]. By default 0.1.
        flip: whether half of the images are mirrored.
        prior_prompt: what must not be forgotten, such as 'a photo of a bird': images of it are
            trained beside yours (prior preservation, as in DreamBooth). By default nothing.
        prior_images: number of them, which the unadapted model makes in OUT/prior; or a folder
            of images.
        prior_weight: weight of their loss, beside 1 for that of yours.
        checkpointing: compute activations twice, for less memory.
        sheets: steps between two sheets of samples, samples/STEP.png; 0 makes none.
        seed: seed of all random draws.
        device: device such as cuda or cpu; by default the GPU if there is one.
        devices: number of processes, each on a device of its own.
        precision: 32-true, or bf16-mixed: computes in bfloat16, and keeps weights in it that are
            not trained.
        workers: number of processes that load images.
        backbone_options: options of the backbone, as YAML such as '{resolution: 384}'.

    Raises:
        UserError: a number is out of its range, or there is no such preset.
    """

    preset: str = ""
    words: dict[str, str] | None = None
    rank: int | None = None
    image_heads: bool | None = None
    text_rank: int | None = None
    tokens: bool | None = None
    steps: int | None = None
    per: Literal["run", "class", "image"] | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    lr: float | None = None
    head_lr: float | None = None
    token_lr: float | None = None
    drop: float | None = None
    flip: bool | None = None
    prior_prompt: str = ""
    prior_images: int | str = 100
    prior_weight: float = 1.0
    checkpointing: bool = False
    sheets: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, sheets=self.sheets)
        assert self.recipe  # which refuses wrong numbers
        prior = Prior(self.prior_prompt, self.prior_weight, self.prior_images)
        if prior != Prior("") and not self.prior_prompt:
            raise UserError(
                "expected prior_prompt with prior_images or prior_weight, got none; say what the "
                "images are of, such as 'a photo of a bird'"
            )
        if self.prior_prompt and self.recipe.image_heads:
            raise UserError(
                "expected no prior_prompt with image_heads, whose weights are of your images "
                f"alone, got {self.prior_prompt!r}; leave one out"
            )
        if self.prior_prompt and not (self.recipe.rank or self.recipe.text_rank):
            raise UserError(
                f"expected low-rank weights with prior_prompt {self.prior_prompt!r}, got rank 0: "
                "tokens change no other prompt; leave it out"
            )

    @property
    def prior(self) -> Prior | None:
        """What must not be forgotten, if anything."""
        given = Prior(self.prior_prompt, self.prior_weight, self.prior_images)
        return given if self.prior_prompt else None

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the backbone's weights, which are frozen."""
        return torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32

    @cached_property
    def recipe(self) -> Recipe:
        """The preset's recipe with the numbers that were given."""
        own = {field.name: getattr(self, field.name, None) for field in fields(Recipe)}
        given: Any = {name: value for name, value in own.items() if value is not None}
        return replace(lookup(PRESETS, self.preset, "preset"), **given)
