"""Inversions: from an image to the latent that the sampler turns back into it.

To add one: a file with a frozen dataclass that has ``steps`` and DDIM's ``__call__``, and an entry
in `INVERTERS`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from augment.diffusion.backbone import Backbone, batched, denoiser
from augment.diffusion.solver import check_steps
from augment.errors import UserError, lookup
from augment.images import prepare
from augment.inversion.ddim import DDIM

INVERTERS = {"ddim": DDIM}
"""Inversions by name."""


def invert(
    backbone: Backbone,
    images: Float[Tensor, "n c h w"],
    prompts: str | Sequence[str] | None = None,
    method: str = "ddim",
    steps: int = 50,
    guidance: float = 1.0,
    batch_size: int = 64,
) -> Float[Tensor, "n C H W"]:
    """Latents of images.

    Args:
        backbone: the model.
        images: in [0, 1]; brought to the backbone's size and channels by `augment.images.prepare`.
        prompts: one for all, one an image, or none.
        method: a key of `INVERTERS`.
        steps: network evaluations an image.
        guidance: scale of classifier-free guidance; other than 1 it harms the reconstruction.
        batch_size: images a network call.

    Returns:
        float32 latents at the noisiest level, on the backbone's device.

    Raises:
        UserError: an unknown method, no steps, or pixels outside [0, 1].
    """
    inverter = lookup(INVERTERS, method, "inversion")(steps)
    check_steps(steps)
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"expected pixels in [0, 1], got {images.min():.3g} to {images.max():.3g}; "
            "divide 8-bit images by 255"
        )

    def run(part: Tensor, texts: list[str], tick: Callable[[], Any]) -> Tensor:
        part = prepare(part, backbone.channels, backbone.resolution).to(backbone.device)
        with torch.inference_mode():
            clean = backbone.encode(part)
        return inverter(denoiser(backbone, texts, guidance), backbone.process, clean, tick)

    return batched(run, images, prompts, batch_size, steps, "invert")
