"""Backbones: the latent diffusion models whose latents are mixed.

To add one: a file with a class that has the members of `augment.diffusion.backbone.Backbone`, and
an entry in `BACKBONES`; or, for a pipeline class of diffusers, in `PIPELINES`.
"""

import os
from collections.abc import Callable
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Any

import torch

from augment.core.errors import UserError, lookup
from augment.core.registry import check_settings, parameters
from augment.diffusion.backbone import Backbone, Recipe
from augment.diffusion.backbones.dit import DiT
from augment.diffusion.backbones.flux import Flux
from augment.diffusion.backbones.flux2 import Flux2Klein
from augment.diffusion.backbones.lightningdit import LightningDiT
from augment.diffusion.backbones.sit import SiT
from augment.diffusion.backbones.stable_diffusion import StableDiffusion, StableDiffusionXL
from augment.diffusion.backbones.stable_diffusion3 import StableDiffusion3
from augment.diffusion.backbones.tiny import EMBEDDED, Tiny
from augment.diffusion.backbones.z_image import ZImage
from augment.diffusion.checkpoints.find import find_checkpoint, read_header
from augment.diffusion.checkpoints.hub import HUB, require

PIPELINES: dict[str, Callable[..., Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "DiTPipeline": DiT,
    "SiTPipeline": SiT,
    "LightningDiTPipeline": LightningDiT,
    "ZImagePipeline": ZImage,
    "Flux2KleinPipeline": Flux2Klein,
    "FluxPipeline": Flux,
}
"""Backbones by the pipeline class that a checkpoint's index names."""

PATHS = (
    "name_or_path",
    "config",
    "lora",
    "adapter",
    "tiny_vae",
    "ip_adapter",
    "image_encoder",
    "reference",
)
"""Keys of a recipe whose values may be paths."""


def known_options(factory: Callable[..., Backbone]) -> dict[str, Parameter]:
    """Return the options of a backbone's class or factory, beside device and precision."""
    kinds = getattr(factory, "__mro__", (factory, object))[-2::-1]  # base classes first
    other = {"checkpoint", "source", "weights", "device", "dtype", *getattr(factory, "fixed", ())}
    return {name: known for name, known in parameters(*kinds).items() if name not in other}


def pretrained(
    source: str,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    config: str | Path | None = None,
    **options: Any,
) -> Backbone:
    """Load the backbone of a diffusers checkpoint.

    For the named parameters see `load_backbone` and `find_checkpoint`. The options are those of
    `augment.diffusion.backbones.latent_diffusion.LatentDiffusion`, or of the class in `PIPELINES`
    for the checkpoint.

    Raises:
        UserError: see `find_checkpoint`; a checkpoint or an option of another kind.
    """
    require("transformers", "accelerate")
    checkpoint = find_checkpoint(source, revision, variant, local_files_only, config)
    factory = lookup(PIPELINES, checkpoint.kind, "diffusers pipeline")
    check_settings(str(source), options, known_options(pretrained) | known_options(factory))
    return factory(checkpoint, device=device, dtype=dtype, **options)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    **{name: partial(Tiny, weights) for name, weights in EMBEDDED.items()},
    **{name: partial(pretrained, name) for name in HUB},
}
"""Backbones by name. A factory takes ``device``, ``dtype`` and options of its own."""


def load_backbone(
    name_or_path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Backbone:
    """Load a backbone, ready to invert and sample.

    Args:
        name_or_path: a key of `BACKBONES`; a diffusers pipeline folder; a repository
            ``owner/name`` of the Hugging Face hub; or a safetensors file, of
            ``scripts/train_tiny.py`` or in the format of the original Stable Diffusion releases.
        device: of the network; by default the GPU if there is one.
        dtype: precision of the network; float32 by default, and for diffusers' models on a GPU
            float16 (UNets) or bfloat16 (transformers).
        options: of `Tiny`; or of `pretrained`.

    Raises:
        UserError: an unknown name, an option that the backbone does not have, or no usable weights.
    """
    device, name = find_device(device), str(name_or_path)
    tiny = name in EMBEDDED
    if Path(name).suffix == ".safetensors":
        tiny = "unet" in read_header(Path(name))[0].get("config", "")
    if tiny:
        check_settings("tiny", options, known_options(Tiny))
        weights = EMBEDDED.get(name, Path(name))
        backbone = Tiny(weights, device, dtype or torch.float32, **options)
    else:
        factory = BACKBONES.get(name, partial(pretrained, name))
        backbone = factory(device=device, dtype=dtype, **options)
    known = known_options(pretrained) | known_options(type(backbone))
    usual = {key: parameter.default for key, parameter in known.items()}
    changed = {key: value for key, value in options.items() if value != usual.get(key)}
    backbone.recipe = {
        key: _as_text(value) if key in PATHS else value
        for key, value in {"name_or_path": name, **changed}.items()
    }
    return backbone


def local_recipe(recipe: Recipe, named: bool = False) -> Recipe:
    """Return a recipe that downloads nothing, since a bank may come from a stranger.

    The files that it names have to be embedded, on the disk or in the hub's cache.

    >>> local_recipe({"name_or_path": "sd15"})
    {'name_or_path': 'sd15', 'local_files_only': True}

    Args:
        recipe: arguments of `load_backbone`.
        named: whether the user named the backbone, which may then be downloaded.
    """
    name = recipe["name_or_path"]
    here = named or name in EMBEDDED or os.path.isdir(name)  # noqa: PTH112, which takes any name
    others = [str(recipe[key]) for key in PATHS[1:] if recipe.get(key) is not None]
    recipe = {key: value for key, value in recipe.items() if key != "local_files_only"}
    if here and all(map(os.path.exists, others)):
        return recipe
    return {**recipe, "local_files_only": True}


def find_device(device: torch.device | str | None = None) -> torch.device:
    """Return a device that is there; by default the GPU if there is one.

    Raises:
        UserError: it is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"expected a device that is there, got {device!r}: {reason}") from None


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name such as ``float16``; None stays None.

    Raises:
        UserError: an unknown name.
    """
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    by_name = {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}
    return None if name is None else lookup(by_name, name, "dtype")


def _as_text(value: str | Path) -> str:
    """Write a recipe's path as text; make it absolute if it is there."""
    here = value not in BACKBONES and Path(value).exists()
    return str(Path(value).resolve() if here else value)


__all__ = [
    "BACKBONES",
    "PIPELINES",
    "Backbone",
    "find_device",
    "load_backbone",
    "local_recipe",
    "parse_dtype",
    "pretrained",
]
