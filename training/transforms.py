"""What is done to an image before the network sees it, real or synthetic."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from augment.errors import UserError
from augment.images import prepare


@dataclass(frozen=True)
class Augmentation:
    """Classical augmentation of training images.

    Args:
        crop: ``shift``, random shifts by up to an eighth (CIFAR's four pixels of padding);
            ``resized``, random crops of 8 to 100 % of the area (ImageNet); None, the middle.
        flip: mirror images.
        rotation: up to so many degrees.
        jitter: of brightness, contrast and saturation (0.4 for ImageNet-LT).
        randaugment: operations of RandAugment (Cubuk et al., arXiv 1909.13719) an image; 2 is
            usual.
        magnitude: of these, out of 30.

    Raises:
        UserError: an unknown crop.
    """

    crop: str | None = "shift"
    flip: bool = True
    rotation: float = 0.0
    jitter: float = 0.0
    randaugment: int = 0
    magnitude: int = 9

    def __post_init__(self) -> None:
        if self.crop not in (None, "shift", "resized"):
            raise UserError(
                f"expected a crop out of shift, resized or null, got {self.crop!r}; choose one"
            )

    @property
    def whole(self) -> bool:
        """Whether dice are thrown after the image was brought to its size."""
        return self.crop != "resized"

    def fixed(self, channels: int, resolution: int) -> Callable[[Any], Tensor]:
        """PIL image or tensor in [0, 1] to uint8 (channels, H, W): what no dice decide."""
        steps = [Decoded(channels), *([Fitted(resolution)] if self.whole else [])]
        return v2.Compose(steps)

    def random(self, resolution: int) -> Callable[[Tensor], Tensor]:
        """What `fixed` gives to float32 (channels, resolution, resolution) in [0, 1]."""
        steps: list[Any] = []
        if self.crop == "resized":
            steps.append(v2.RandomResizedCrop(resolution, antialias=True))
        if self.crop == "shift":
            steps.append(v2.RandomCrop(resolution, padding=resolution // 8))
        if self.flip:
            steps.append(v2.RandomHorizontalFlip())
        if self.rotation:
            steps.append(v2.RandomRotation([-self.rotation, self.rotation]))
        if self.jitter:
            steps.append(v2.ColorJitter(self.jitter, self.jitter, self.jitter))
        if self.randaugment:
            steps.append(v2.RandAugment(self.randaugment, self.magnitude))
        return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


def evaluation(channels: int, resolution: int, crop: float = 1.0) -> Callable[[Any], Tensor]:
    """The middle of an image; ``crop`` is its share of the shorter side (0.875: 224 of 256)."""
    whole = round(resolution / crop)
    steps = [Decoded(channels), Fitted(whole), v2.CenterCrop(resolution)]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


class Decoded(torch.nn.Module):
    """PIL image or tensor in [0, 1] to uint8 (channels, H, W); grey is the mean of the colours."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, image: Any) -> Tensor:
        """The pixels."""
        pixels = image if isinstance(image, Tensor) else v2.functional.pil_to_tensor(image)
        pixels = v2.functional.to_dtype(pixels, torch.uint8, scale=True)
        if len(pixels) == self.channels:
            return pixels
        grey = pixels.float().mean(0, keepdim=True).round().to(torch.uint8)
        return grey.expand(self.channels, -1, -1)


class Fitted(torch.nn.Module):
    """The middle square of an image, as latents see it; see `augment.images.prepare`."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution

    def forward(self, image: Tensor) -> Tensor:
        """The square."""
        if image.shape[-2:] == (self.resolution, self.resolution):
            return image
        square = prepare(image[None].float() / 255, len(image), self.resolution)[0]
        return (square * 255).round().to(torch.uint8)
