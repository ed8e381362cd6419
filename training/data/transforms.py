"""What is done to an image before the network sees it, real or synthetic."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms import v2

from augment.core.errors import UserError
from augment.sources.images import fit, pixels_of, to_channels

Dice = np.random.Generator


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

    def random(self, resolution: int) -> Callable[[Sequence[Tensor], Sequence[Dice]], Tensor]:
        """What `fixed` gives of a batch, and each image's dice, to float32 (n, C, R, R) in [0, 1].

        R is the resolution. Shifting and mirroring are done here for the whole batch: image by
        image in torchvision they cost a small network a fifth of its step.
        """
        shift = resolution // 8 if self.crop == "shift" else 0
        steps: list[Any] = []
        if self.crop == "resized":
            steps.append(v2.RandomResizedCrop(resolution, antialias=True))
            steps += [v2.RandomHorizontalFlip()] if self.flip else []
        if self.rotation:
            steps.append(v2.RandomRotation([-self.rotation, self.rotation]))
        if self.jitter:
            steps.append(v2.ColorJitter(self.jitter, self.jitter, self.jitter))
        if self.randaugment:
            steps.append(v2.RandAugment(self.randaugment, self.magnitude))

        one = v2.Compose(steps) if steps else None  # there is one where images differ in size

        def run(images: Sequence[Tensor], dice: Sequence[Dice]) -> Tensor:
            batch: Any = images
            if self.whole:
                batch = moved(torch.stack(list(images)), dice, shift, self.flip)
            if one:
                batch = torch.stack(each(one, batch, dice))
            return v2.functional.to_dtype(batch, torch.float32, scale=True)

        return run


def moved(
    images: UInt8[Tensor, "n c h w"], dice: Sequence[Dice], shift: int, flip: bool
) -> UInt8[Tensor, "n c h w"]:
    """Images moved by up to ``shift`` pixels each way, black following, and half of them mirrored.

    Args:
        images: a batch.
        dice: of each image.
        shift: pixels.
        flip: whether any are mirrored.
    """
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (shift,) * 4) if shift else images
    thrown = [(*d.integers(0, 2 * shift + 1, 2).tolist(), d.random() < 0.5) for d in dice]
    cut = [x[:, t : t + height, s : s + width] for x, (t, s, _) in zip(padded, thrown, strict=True)]
    images = torch.stack(cut)
    mirrored = torch.tensor([flip and turned for _, _, turned in thrown])
    images[mirrored] = images[mirrored].flip(-1)
    return images


def each(
    transform: Callable[[Tensor], Tensor], images: Iterable[Tensor], dice: Sequence[Dice]
) -> list[Tensor]:
    """Images transformed one by one by what takes its dice from torch's global generator."""
    made = []
    with torch.random.fork_rng(devices=[]):
        for image, own in zip(images, dice, strict=True):
            torch.random.default_generator.manual_seed(int(own.integers(2**63)))
            made.append(transform(image))
    return made


def evaluation(channels: int, resolution: int, crop: float = 1.0) -> Callable[[Any], Tensor]:
    """The middle of an image; ``crop`` is its share of the shorter side (0.875: 224 of 256)."""
    whole = round(resolution / crop)
    steps = [Decoded(channels), Fitted(whole), v2.CenterCrop(resolution)]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


class Decoded(torch.nn.Module):
    """Turn a PIL image or a tensor in [0, 1] into uint8 (channels, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, image: Any) -> Tensor:
        """The pixels."""
        if not isinstance(image, Tensor):
            return pixels_of(image, self.channels)
        pixels = v2.functional.to_dtype(image, torch.uint8, scale=True)
        if len(pixels) == self.channels:
            return pixels
        return to_channels(pixels.float(), self.channels).round().to(torch.uint8)


class Fitted(torch.nn.Module):
    """The middle square of an image, as latents see it; see `augment.sources.images.prepare`."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution

    def forward(self, image: Tensor) -> Tensor:
        """The square."""
        if image.shape[-2:] == (self.resolution, self.resolution):
            return image
        square = fit(image, self.resolution)
        return (square * 255).round().to(torch.uint8)
