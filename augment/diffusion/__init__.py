"""Backbones: the latent diffusion models whose latents are mixed.

To add one: a file with a class that has the members of `augment.diffusion.backbone.Backbone`, and
an entry in `BACKBONES`; or, for a pipeline class of diffusers, in `PIPELINES`.
"""

import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from augment.core.errors import UserError, lookup
from augment.diffusion.backbone import Backbone
from augment.diffusion.backbones.dit import DiT
from augment.diffusion.backbones.stable_diffusion import StableDiffusion, StableDiffusionXL
from augment.diffusion.backbones.stable_diffusion3 import StableDiffusion3
from augment.diffusion.backbones.tiny import Tiny
from augment.diffusion.checkpoints.find import find_checkpoint, read_header
from augment.diffusion.checkpoints.hub import HUB, require

PIPELINES: dict[str, Callable[..., Backbone]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "DiTPipeline": DiT,
}
"""Backbones by diffusers' pipeline class."""

PATHS = ("name_or_path", "config", "lora", "tiny_vae")
"""What of a recipe may be a path."""

TAKEN = ("self", "checkpoint", "source", "weights", "device", "dtype", "options")


def known_options(factory: Callable[..., Backbone]) -> dict[str, Any]:
    """A factory's own options with their defaults."""
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in TAKEN}


def check_options(name: str, options: dict[str, Any], known: dict[str, Any]) -> None:
    """Refuse options that a backbone has not."""
    for option in options:
        if option not in known:
            names = ", ".join(known) or "none"
            raise UserError(
                f"expected an option out of {names} for the backbone {name}, got {option!r}; "
                "leave it out"
            )


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
    """The backbone of a diffusers checkpoint.

    Args:
        source: see `find_checkpoint`.
        revision: branch, tag or commit on the hub.
        variant: of the weights' files, ``fp16`` for instance.
        local_files_only: ask the network nothing.
        config: of a single file; see `find_checkpoint`.
        device: where it runs.
        dtype: the networks' precision.
        options: of the class in `PIPELINES` that the checkpoint asks for.

    Raises:
        UserError: see `find_checkpoint`; a checkpoint or an option of another kind.
    """
    require("transformers", "accelerate")
    checkpoint = find_checkpoint(source, revision, variant, local_files_only, config)
    factory = lookup(PIPELINES, checkpoint.kind, "diffusers pipeline")
    known = known_options(pretrained) | known_options(factory)
    check_options(str(source), options, known)
    return factory(checkpoint, device=device, dtype=dtype, **options)


BACKBONES: dict[str, Callable[..., Backbone]] = {
    "tiny": Tiny,
    **{name: partial(pretrained, name) for name in HUB},
}
"""Backbones by name. A factory takes ``device``, ``dtype`` and options of its own."""


def load_backbone(
    name_or_path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Backbone:
    """A backbone, ready to invert and sample.

    Args:
        name_or_path: a key of `BACKBONES`; a diffusers pipeline folder; a repository
            ``owner/name`` of the Hugging Face hub; or a safetensors file, of
            ``scripts/train_tiny.py`` or in the format of the original Stable Diffusion releases.
        device: where the network runs; by default the GPU if there is one.
        dtype: the network's precision; float32 by default, and for diffusers' models on a GPU
            float16 (UNets) or bfloat16 (transformers).
        options: passed on to the backbone: those of `Tiny`; or those of `pretrained` and, by what
            the checkpoint is, of `StableDiffusion`, `StableDiffusionXL`, `StableDiffusion3`, `DiT`.

    Raises:
        UserError: an unknown name, an option that the backbone has not, or no usable weights.
    """
    device = find_device(device)
    name, where = str(name_or_path), {"device": device, "dtype": dtype}
    mine = name == "tiny"
    if Path(name).suffix == ".safetensors":
        mine = "unet" in read_header(Path(name))[0].get("config", "")
    if mine:
        check_options(name, options, known_options(Tiny))
        weights = {} if name == "tiny" else {"weights": Path(name)}
        backbone = Tiny(**weights, device=device, dtype=dtype or torch.float32, **options)
    else:
        backbone = BACKBONES.get(name, partial(pretrained, name))(**where, **options)
    defaults = known_options(pretrained) | known_options(type(backbone))
    changed = {key: value for key, value in options.items() if value != defaults.get(key)}
    backbone.recipe = {
        key: rooted(value) if key in PATHS else value
        for key, value in {"name_or_path": name, **changed}.items()
    }
    return backbone


def local_recipe(recipe: dict[str, Any], named: bool = False) -> dict[str, Any]:
    """Return a recipe that asks no hub, for a bank may come from a stranger.

    What it names has to be embedded, on the disk or in the hub's cache.

    >>> local_recipe({"name_or_path": "sd15"})
    {'name_or_path': 'sd15', 'local_files_only': True}

    Args:
        recipe: the arguments of `load_backbone`.
        named: whether the user named the backbone, which may then be downloaded.
    """
    name = recipe["name_or_path"]
    here = named or name == "tiny" or os.path.isdir(name)  # noqa: PTH112, which takes any name
    others = [str(recipe[key]) for key in PATHS[1:] if recipe.get(key) is not None]
    recipe = {key: value for key, value in recipe.items() if key != "local_files_only"}
    if here and all(map(os.path.exists, others)):
        return recipe
    return {**recipe, "local_files_only": True}


def find_device(device: torch.device | str | None = None) -> torch.device:
    """A device that is there; by default the GPU if there is one.

    Raises:
        UserError: it is not.
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


def rooted(value: str | Path) -> str:
    """A recipe's path as JSON has it; one that is there is absolute, to be found again."""
    if value in BACKBONES:
        return str(value)
    return str(Path(value).resolve()) if Path(value).exists() else str(value)


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
