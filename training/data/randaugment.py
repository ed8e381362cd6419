"""RandAugment of a whole batch, with the bits of torchvision's of each image.

Cubuk et al., *RandAugment*, arXiv 1909.13719. Each image draws its own operations. Torchvision
applies them image by image, which cost a small network more than its step on images of 32 pixels.
Here a batch takes few calls: an operation that moves pixels (with the nearest neighbour) is a table
of places, one that maps levels is a table of 256 levels, and images with the same operation among
the others share its call.
"""

import math
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as F

BINS = 31
"""Magnitudes; the largest one is 30."""
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
LEVELS = ("Brightness", "Posterize", "Solarize")
OTHERS = ("Color", "Contrast", "Sharpness", "AutoContrast", "Equalize")
OPERATIONS = (
    *("Identity", *MOVES, "Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize"),
)
"""In the order in which torchvision numbers them."""
SIGNED = (*MOVES, "Brightness", "Color", "Contrast", "Sharpness")

Drawn = tuple[str, int]
"""An operation and its sign: 1, -1, or 0 of an operation without."""


def draw(count: int) -> list[Drawn]:
    """Draw the operations of an image from torch's global generator, as torchvision does."""
    drawn = []
    for _ in range(count):
        name = OPERATIONS[int(torch.randint(len(OPERATIONS), ()))]
        sign = 0
        if name in SIGNED:
            sign = -1 if torch.rand(()) <= 0.5 else 1
        drawn.append((name, sign))
    return drawn


def randaugment(
    images: UInt8[Tensor, "n c h w"], drawn: list[list[Drawn]], magnitude: int
) -> UInt8[Tensor, "n c h w"]:
    """Apply to each image what was drawn for it.

    Args:
        images: the batch.
        drawn: by image, its operations in order; equally many of each.
        magnitude: of all operations, in [0, 30].
    """
    images = images.clone()
    for step in zip(*drawn, strict=True):
        groups: dict[Drawn, list[int]] = {}
        for row, operation in enumerate(step):
            groups.setdefault(operation, []).append(row)
        for names, table, change in ((MOVES, places, move), (LEVELS, levels, map_levels)):
            keys = [key for key in groups if key[0] in names]
            rows = [row for key in keys for row in groups[key]]
            if rows:
                form = *images.shape[2:], magnitude
                tables = [table(*key, *form).expand(len(groups[key]), -1) for key in keys]
                images[rows] = change(images[rows], torch.cat(tables))
        for key, rows in groups.items():
            if key[0] in OTHERS:
                images[rows] = apply(images[rows], *key, magnitude)
    return images


def move(images: UInt8[Tensor, "n c h w"], table: Tensor) -> UInt8[Tensor, "n c h w"]:
    """Take each pixel from its place in `places`, black from outside."""
    flat = torch.nn.functional.pad(images.flatten(2), (1, 0))
    return flat.gather(2, table[:, None].expand(-1, images.shape[1], -1)).view_as(images)


def map_levels(images: UInt8[Tensor, "n c h w"], table: Tensor) -> UInt8[Tensor, "n c h w"]:
    """Replace each level by that in `levels`."""
    return table.gather(1, images.flatten(1).long()).view_as(images)


@lru_cache(256)
def places(name: str, sign: int, height: int, width: int, magnitude: int) -> Tensor:
    """Return from where an operation takes each pixel: 1 + its number, or 0 for none."""
    numbers = torch.arange(1, height * width + 1, dtype=torch.float32).view(1, 1, height, width)
    return apply(numbers, name, sign, magnitude).long().view(1, -1)


@lru_cache(64)
def levels(name: str, sign: int, height: int, width: int, magnitude: int) -> Tensor:
    """Return what an operation makes of each of the 256 levels."""
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    return apply(every, name, sign, magnitude).view(1, -1)


def apply(images: Tensor, name: str, sign: int, magnitude: int) -> Tensor:
    """Apply an operation, by torchvision."""
    height, width = images.shape[-2:]

    def amount(largest: float, least: float = 0.0) -> float:
        return float(torch.linspace(least, largest, BINS)[magnitude]) * (sign or 1)

    def affine(**changes: Any) -> Tensor:
        still: dict[str, Any] = {"angle": 0, "translate": [0, 0], "scale": 1, "shear": [0, 0]}
        return F.affine(images, **still | changes)

    match name:
        case "ShearX":
            shear = math.degrees(math.atan(amount(0.3)))
            return affine(shear=[shear, 0.0], center=[0, 0])
        case "ShearY":
            shear = math.degrees(math.atan(amount(0.3)))
            return affine(shear=[0.0, shear], center=[0, 0])
        case "TranslateX":
            return affine(translate=[int(amount(150.0 / 331.0 * width)), 0])
        case "TranslateY":
            return affine(translate=[0, int(amount(150.0 / 331.0 * height))])
        case "Rotate":
            return F.rotate(images, amount(30.0))
        case "Brightness":
            return F.adjust_brightness(images, 1.0 + amount(0.9))
        case "Color":
            return F.adjust_saturation(images, 1.0 + amount(0.9))
        case "Contrast":
            return F.adjust_contrast(images, 1.0 + amount(0.9))
        case "Sharpness":
            return F.adjust_sharpness(images, 1.0 + amount(0.9))
        case "Posterize":
            bits = (8 - torch.arange(BINS) / ((BINS - 1) / 4)).round().int()
            return F.posterize(images, int(bits[magnitude]))
        case "Solarize":
            return F.solarize(images, 255 * amount(0.0, 1.0))
        case "AutoContrast":
            return F.autocontrast(images)
        case "Equalize":
            return F.equalize(images)
    return images
