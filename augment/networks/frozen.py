"""The shared parts of frozen networks: batches, and the normalisation of images."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from augment.sources.images import to_channels

BATCH = 64


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a function to `BATCH` images at a time; return float64 on the CPU.

    There are gradients only if the images require them.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
        return torch.cat([function(part).cpu().double() for part in images.split(BATCH)])


def unit(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Normalise rows to length 1."""
    return F.normalize(features, dim=1)


def normalise(
    images: Float[Tensor, "n c h w"],
    channels: int,
    size: tuple[int, int] | None,
    mean: Sequence[float],
    std: Sequence[float],
    mode: str = "bicubic",
) -> Float[Tensor, "n C H W"]:
    """Bring images in [0, 1] to a network's channels, size, mean and deviation.

    Args:
        images: the images.
        channels: number of channels; see `augment.sources.images.to_channels`.
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
