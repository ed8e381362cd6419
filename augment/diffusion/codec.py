"""The autoencoder of diffusers' latent diffusion models: images to latents and back, in slices."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from augment.diffusion.hub import damaged, quiet
from augment.errors import PrecisionWarning, UserError

PIXELS = 2**22
"""The autoencoder sees so many at a time, which bounds its memory; 16 images of 512 pixels."""


class Codec:
    """An autoencoder between images in [0, 1] and latents of unit variance.

    Where half precision overflows, it goes on in float32.

    Args:
        vae: diffusers' ``AutoencoderKL``.
        device, dtype: where and in what precision it runs.
        tiny: an ``AutoencoderTiny`` to decode with instead.
    """

    def __init__(
        self, vae: Any, device: torch.device, dtype: torch.dtype, tiny: Any = None
    ) -> None:
        self.vae, self.decoder = vae, tiny or vae
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        for module in (self.vae, self.decoder):
            nn.Module.to(module, device, dtype)
            nn.Module.to(module, memory_format=torch.channels_last)

    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c H W"]:
        """Posterior means, (x − shift)·scale."""
        config = self.vae.config
        if not len(images):
            height, width = (side // self.factor for side in images.shape[2:])
            return images.new_zeros(0, config.latent_channels, height, width)
        clean = self._run(
            lambda part: self.vae.encode(part.to(self.vae.dtype)).latent_dist.mode(),
            2 * images - 1,
            PIXELS // images[0, 0].numel(),
        )
        return (clean - (config.shift_factor or 0)) * config.scaling_factor

    def decode(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Images, clamped to [0, 1]."""
        config = self.decoder.config
        if not len(clean):
            return clean.new_zeros(0, 3, *(side * self.factor for side in clean.shape[2:]))
        images = self._run(
            lambda part: self.decoder.decode(part.to(self.decoder.dtype), return_dict=False)[0],
            clean / config.scaling_factor + (config.shift_factor or 0),
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


def load_tiny(source: str | Path | None, local_files_only: bool = False) -> Any:
    """An ``AutoencoderTiny``, or None for none."""
    if source is None:
        return None
    from diffusers import AutoencoderTiny

    with quiet(), damaged(source):
        tiny = AutoencoderTiny.from_pretrained(
            str(source), use_safetensors=True, local_files_only=local_files_only
        )
    return tiny.eval().requires_grad_(False)
