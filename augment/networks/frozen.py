"""What all networks here need: batches, and images as networks want them."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.sources.images import to_channels

BATCH = 64


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A function of images, of `BATCH` at a time; float64 on the CPU.

    With gradients only where the images ask for them.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
        return torch.cat([function(part).cpu().double() for part in images.split(BATCH)])


def unit(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of length 1."""
    return F.normalize(features, dim=1)


def normalise(
    images: Float[Tensor, "n c h w"],
    channels: int,
    size: tuple[int, int] | None,
    mean: Sequence[float],
    std: Sequence[float],
    mode: str = "bicubic",
) -> Float[Tensor, "n C H W"]:
    """Images in [0, 1] as a network wants them.

    Args:
        images: the images.
        channels: how many; see `augment.sources.images.to_channels`.
        size: height and width to resize to, with antialiasing and without cropping; None keeps it.
        mean: to subtract, of each channel or for all.
        std: to divide by, of each channel or for all.
        mode: of `torch.nn.functional.interpolate`.
    """
    images = to_channels(images, channels)
    if size is not None and tuple(images.shape[-2:]) != tuple(size):
        images = F.interpolate(images, tuple(size), mode=mode, antialias=True).clamp(0, 1)
    shift, scale = (images.new_tensor(list(part))[:, None, None] for part in (mean, std))
    if len(shift) != channels:
        shift, scale = shift.mean(), scale.mean()
    return (images - shift) / scale


def no_weights(name: str, weights: str) -> None:
    """Refuse weights for a network that has its own."""
    if weights:
        raise UserError(f"expected no weights for {name}, which has its own, got {weights}")
