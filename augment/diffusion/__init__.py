"""Backbones: the latent diffusion models whose latents are mixed.

To add one: a file with a class that has the members of `augment.diffusion.backbone.Backbone`, and
an entry in `BACKBONES`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from augment.diffusion.backbone import Backbone
from augment.diffusion.tiny import Tiny
from augment.errors import UserError, lookup

BACKBONES: dict[str, Callable[..., Backbone]] = {"tiny": Tiny}
"""Backbones by name. A factory takes ``device``, ``dtype`` and options of its own."""


def load_backbone(
    name_or_path: str | Path,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Backbone:
    """A backbone, ready to invert and sample.

    Args:
        name_or_path: a key of `BACKBONES`, or a safetensors file of ``scripts/train_tiny.py``.
        device: where the network runs; by default the GPU if there is one.
        dtype: the network's precision; float32 by default.
        options: passed on to the backbone.

    Raises:
        UserError: an unknown name, or no usable weights.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"expected a device that is there, got {device!r}: {reason}") from None
    options |= {"device": device, "dtype": dtype or torch.float32}
    path = Path(name_or_path)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"expected a weights file, got {path}, which is not there")
        return Tiny(weights=path, **options)
    return lookup(BACKBONES, str(name_or_path), "backbone")(**options)


__all__ = ["BACKBONES", "Backbone", "load_backbone"]
