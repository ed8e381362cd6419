r"""The autoencoder of diffusers' latent diffusion models: images to latents and back, in slices.

A clean latent is :math:`(z - \text{shift}) \cdot \text{scale}`, z the mean of the autoencoder's
posterior, or its latent if it has no posterior. The statistics are one number, one a channel
(SDXL's ``latents_mean``), or one a channel and place in a patch: FLUX.2 normalises patches of 2 by
2, by the batch norm ``bn`` of its autoencoder.
"""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from augment.core.errors import PrecisionWarning, UserError
from augment.diffusion.checkpoints.checkpoint import check_indices
from augment.diffusion.checkpoints.hub import damaged, local_folder, quiet

PIXELS = 2**22
"""Pixels that the autoencoder processes at a time, such as 16 images of 512 by 512."""


class Codec:
    """An autoencoder between images in [0, 1] and latents of unit variance.

    Where half precision overflows, it goes on in float32.

    Args:
        vae: an autoencoder of diffusers, such as ``AutoencoderKL`` or ``AutoencoderKLFlux2``.
        device, dtype: of the autoencoder.
        tiny: an ``AutoencoderTiny`` to decode with instead.

    Attributes:
        factor: side of an image in latent pixels' widths.
        channels: of latents.
    """

    def __init__(
        self, vae: Any, device: torch.device, dtype: torch.dtype, tiny: Any = None
    ) -> None:
        self.vae, self.decoder = vae, tiny or vae
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.channels: int = vae.config.latent_channels
        if self.decoder.config.latent_channels != self.channels:
            raise UserError(
                f"expected a tiny autoencoder of {self.channels} latent channels, as "
                f"the model's, got {self.decoder.config.latent_channels}; take one for this model"
            )
        for module in (self.vae, self.decoder):
            nn.Module.to(module, device, dtype)
            nn.Module.to(module, memory_format=torch.channels_last)
        with damaged("the autoencoder"):
            self.statistics, self.statistics_back = _statistics(vae), _statistics(self.decoder)

    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c H W"]:
        """Encode images to clean latents."""
        if not len(images):
            height, width = (side // self.factor for side in images.shape[2:])
            return images.new_zeros(0, self.channels, height, width)
        latents = self._run(
            lambda part: _latent(self.vae.encode(part.to(self.vae.dtype))),
            2 * images - 1,
            PIXELS // images[0, 0].numel(),
        )
        shift, scale = (_tiled(part, latents) for part in self.statistics)
        return (latents - shift) * scale

    def decode(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Decode latents to images, clamped to [0, 1]."""
        if not len(clean):
            return clean.new_zeros(0, 3, *(side * self.factor for side in clean.shape[2:]))
        shift, scale = (_tiled(part, clean) for part in self.statistics_back)
        images = self._run(
            lambda part: self.decoder.decode(part.to(self.decoder.dtype), return_dict=False)[0],
            clean / scale + shift,
            PIXELS // (clean[0, 0].numel() * self.factor**2),
        )
        return (images / 2 + 0.5).clamp(0, 1)

    def _run(self, call: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
        done = torch.cat([call(part).float() for part in rows.split(max(size, 1))])
        if done.isfinite().all():
            return done
        if not rows.isfinite().all():
            raise UserError(
                "expected finite numbers, got overflow in what goes into the autoencoder; "
                "take dtype float32 or bfloat16"
            )
        if self.vae.dtype == self.decoder.dtype == torch.float32:
            raise UserError(
                "expected finite numbers from the autoencoder, got overflow in float32; "
                "look whether the checkpoint is whole"
            )
        warnings.warn(
            f"the autoencoder overflowed in {self.vae.dtype} and goes on in float32; "
            "an autoencoder made for half precision would be faster",
            PrecisionWarning,
            stacklevel=4,
        )
        for module in (self.vae, self.decoder):
            module.float()
        return self._run(call, rows, size)


def _latent(encoded: Any) -> Tensor:
    """Return the mean of an autoencoder's posterior, or its latent if it has no posterior."""
    posterior = getattr(encoded, "latent_dist", None)
    return encoded.latents if posterior is None else posterior.mode()


def _tiled(part: float | Tensor, latents: Tensor) -> float | Tensor:
    """Repeat statistics of a patch over all patches of latents."""
    if not isinstance(part, Tensor):
        return part
    sides = zip(latents.shape[-2:], part.shape[-2:], strict=True)
    return part.tile(1, *(side // own for side, own in sides))


def _statistics(vae: Any) -> tuple[float | Tensor, float | Tensor]:
    """Return the shift and then the scale of an autoencoder's latents.

    A number each; or (channels, side of a patch, side of a patch).
    """
    config = vae.config
    if "batch_norm_eps" in config:
        variance = vae.bn.running_var.float() + config.batch_norm_eps
        parts = vae.bn.running_mean.float(), variance.rsqrt()
        if not all(bool(part.isfinite().all()) for part in parts):
            raise UserError(
                "expected a finite mean and a variance above 0 of the autoencoder's latents, got "
                "others in its bn; download it again"
            )
        mean, scale = (part.view(-1, *config.patch_size) for part in parts)
        return mean, scale
    shift, scale = config.get("shift_factor") or 0.0, config.scaling_factor
    mean, std = config.get("latents_mean"), config.get("latents_std")
    numbers = [1 / scale if scale else math.inf, shift, *(mean or ()), *(1 / s for s in std or ())]
    if not all(map(math.isfinite, numbers)) or {len(mean or ()), len(std or ())} > {0}:
        raise UserError(
            f"expected finite numbers to scale latents by, got scaling_factor {scale}, "
            f"shift_factor {shift}, latents_mean {mean}, latents_std {std}; download it again"
        )
    if mean and std:
        shift, spread = (
            torch.tensor(part, device=vae.device)[:, None, None] for part in (mean, std)
        )
        scale = scale / spread
    return shift, scale


def load_tiny(source: str | Path | None, local_files_only: bool = False) -> Any:
    """Load an ``AutoencoderTiny`` from a folder or a repository; None for no source."""
    if source is None:
        return None
    from diffusers import AutoencoderTiny

    patterns = ["config.json", "*.safetensors", "*.safetensors.index*.json"]
    folder = local_folder(str(source), patterns, local_files_only)
    check_indices(folder)
    with quiet(), damaged(source):
        tiny = AutoencoderTiny.from_pretrained(folder, use_safetensors=True)
    return tiny.eval().requires_grad_(False)
