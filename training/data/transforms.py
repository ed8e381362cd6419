"""What is done to an image before the network sees it, real or synthetic."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from augment.core.errors import lookup
from augment.sources.images import fit, pixels_of, to_channels
from augment.training.checks import at_least, expect
from augment.training.data.randaugment import Drawn, draw, randaugment

Generators = Sequence[np.random.Generator]


@dataclass(frozen=True)
class Augmentation:
    """Classical augmentation of training images.

    Args:
        crop: ``shift``, random shifts by up to an eighth (CIFAR's four pixels of padding);
            ``resized``, random crops of 8 to 100 % of the area (ImageNet); None, the middle.
        flip: mirror images.
        rotation: maximum angle, in degrees.
        jitter: of brightness, contrast and saturation (0.4 for ImageNet-LT).
        randaugment: operations of RandAugment (Cubuk et al., arXiv 1909.13719) an image; 2 is
            usual.
        magnitude: of these, out of 30.

    Raises:
        UserError: an unknown crop, or a number out of its range.
    """

    crop: str | None = "shift"
    flip: bool = True
    rotation: float = 0.0
    jitter: float = 0.0
    randaugment: int = 0
    magnitude: int = 9

    def __post_init__(self) -> None:
        if self.crop is not None:
            lookup(dict.fromkeys(("shift", "resized")), self.crop, "crop")
        at_least(0, rotation=self.rotation, jitter=self.jitter, randaugment=self.randaugment)
        expect(0 <= self.magnitude <= 30, "magnitude in [0, 30]", self.magnitude)

    @property
    def whole(self) -> bool:
        """Whether random transforms come after the image was brought to its size."""
        return self.crop != "resized"

    def fixed(self, channels: int, resolution: int) -> Callable[[Image.Image | Tensor], Tensor]:
        """Return PIL image or tensor in [0, 1] → uint8 (channels, H, W): what is not random."""
        steps = [Decoded(channels), *([Fitted(resolution)] if self.whole else [])]
        return v2.Compose(steps)

    def random(self, resolution: int) -> Callable[[Sequence[Tensor], Generators], Tensor]:
        """Return images of `fixed` and their random generators → float32 (n, C, R, R) in [0, 1].

        R is the resolution. Shifting, mirroring and RandAugment are done here for the whole batch:
        image by image in torchvision they cost a small network a fifth to a half of its step.
        """
        shift = resolution // 8 if self.crop == "shift" else 0
        steps: list[torch.nn.Module] = []
        if self.crop == "resized":
            steps.append(v2.RandomResizedCrop(resolution, antialias=True))
            steps += [v2.RandomHorizontalFlip()] if self.flip else []
        if self.rotation:
            steps.append(v2.RandomRotation([-self.rotation, self.rotation]))
        if self.jitter:
            steps.append(v2.ColorJitter(self.jitter, self.jitter, self.jitter))
        one = v2.Compose(steps) if steps else None  # there is one where images differ in size
        count, magnitude = self.randaugment, self.magnitude

        def run(images: Sequence[Tensor], generators: Generators) -> Tensor:
            batch = images
            if self.whole:
                batch = _moved(torch.stack(list(images)), generators, shift, self.flip)
            if one or count:
                made, drawn = _each(one, batch, generators, count)
                batch = randaugment(torch.stack(made), drawn, magnitude)
            assert isinstance(batch, Tensor)  # a step takes images of several sizes to one
            return v2.functional.to_dtype(batch, torch.float32, scale=True)

        return run


def _moved(
    images: UInt8[Tensor, "n c h w"], generators: Generators, shift: int, flip: bool
) -> UInt8[Tensor, "n c h w"]:
    """Move images by up to ``shift`` pixels each way, black following; mirror half if ``flip``."""
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, (shift,) * 4) if shift else images
    draws = [(*g.integers(0, 2 * shift + 1, 2).tolist(), g.random() < 0.5) for g in generators]
    cut = [x[:, t : t + height, s : s + width] for x, (t, s, _) in zip(padded, draws, strict=True)]
    images = torch.stack(cut)
    mirrored = torch.tensor([flip and turned for _, _, turned in draws])
    images[mirrored] = images[mirrored].flip(-1)
    return images


def _each(
    transform: Callable[[Tensor], Tensor] | None,
    images: Iterable[Tensor],
    generators: Generators,
    count: int,
) -> tuple[list[Tensor], list[list[Drawn]]]:
    """Transform images one by one, and draw for each ``count`` operations of RandAugment.

    Torchvision draws from torch's global generator alone.
    """
    made, drawn = [], []
    with torch.random.fork_rng(devices=[]):
        for image, generator in zip(images, generators, strict=True):
            torch.random.default_generator.manual_seed(int(generator.integers(2**63)))
            made.append(transform(image) if transform else image)
            drawn.append(draw(count))
    return made, drawn


def evaluation(
    channels: int, resolution: int, crop: float = 1.0
) -> Callable[[Image.Image | Tensor], Tensor]:
    """Return what takes the middle, ``crop`` of the shorter side (0.875: 224 of 256)."""
    steps = [Decoded(channels), Fitted(round(resolution / crop)), v2.CenterCrop(resolution)]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


class Decoded(torch.nn.Module):
    """Turn a PIL image or a tensor in [0, 1] into uint8 (channels, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, image: Image.Image | Tensor) -> Tensor:
        """Return the pixels."""
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
        """Return the square, uint8."""
        if image.shape[-2:] == (self.resolution, self.resolution):
            return image
        return (fit(image, self.resolution) * 255).round().to(torch.uint8)
