"""Pictures at the border: files in, files out, and the one preprocessing every stage shares.

An image is a float32 tensor (C, H, W) in [0, 1] with C = 1 or 3.
"""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

from augment.errors import ImageRejected

SUFFIXES = (".png", ".jpg", ".jpeg")
SLENDER = 32  # of a longer strip nearly all would be cut off, after it was enlarged


def prepare(
    images: Float[Tensor, "n c h w"], channels: int, resolution: int
) -> Float[Tensor, "n C R R"]:
    """Bring images in [0, 1] to a backbone's format.

    Grey is the mean of the channels; size is by antialiased bilinear resizing of the shorter side
    to ``resolution`` and a centre crop.

    >>> prepare(torch.ones(2, 3, 28, 40), channels=1, resolution=32).shape
    torch.Size([2, 1, 32, 32])
    """
    if images.shape[1] != channels:
        images = images.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    height, width = images.shape[-2:]
    scale = resolution / min(height, width)
    if scale != 1:
        size = (round(height * scale), round(width * scale))
        images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
    top, left = (images.shape[-2] - resolution) // 2, (images.shape[-1] - resolution) // 2
    return images[..., top : top + resolution, left : left + resolution]


def open_image(content: bytes) -> Image.Image:
    """Decode the bytes of a PNG or JPEG file, upright: grey (L) if it is so, else RGB.

    Raises:
        ImageRejected: they are empty, truncated, no image, an animation, or one of more pixels
            than ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as file:
                # a photograph with a preview in the same file (MPO) is one picture
                if file.format == "PNG" and getattr(file, "is_animated", False):
                    raise ValueError("an animation; save one picture of it")
                if max(file.size) > SLENDER * min(file.size):
                    raise ValueError(f"{file.width} × {file.height} pixels, a strip; cut it")
                image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I;16"):  # which PIL would clip to its lowest 256 levels
            image = Image.fromarray((np.array(image) / 257).round().astype(np.uint8))
        return image.convert("L" if image.mode in ("1", "L") else "RGB")
    except Exception as error:  # of any type: decoders stumble over hostile bytes as they like
        unknown = isinstance(error, UnidentifiedImageError)  # whose text has an address in it
        told = "not a PNG or JPEG image" if unknown else str(error)
        raise ImageRejected(told if content else "an empty file") from None


def decode_image(content: bytes, channels: int, resolution: int) -> Float[Tensor, "C R R"]:
    """Decode the bytes of a PNG or JPEG file and `prepare` them.

    Raises:
        ImageRejected: see `open_image`.
    """
    image = open_image(content).convert("L" if channels == 1 else "RGB")
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
    return prepare(pixels[None], channels, resolution)[0]


def shorter_side(content: bytes) -> int:
    """The pixels of the shorter side of an image file that can be decoded."""
    with Image.open(io.BytesIO(content)) as file:
        return min(file.size)


def to_pil(image: Float[Tensor, "c h w"]) -> Image.Image:
    """An 8-bit PIL image, grey or RGB."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def save_image(image: Float[Tensor, "c h w"], path: Path) -> None:
    """Write a PNG; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    to_pil(image).save(temporary, format="PNG")
    temporary.replace(path)


def sheet(
    rows: dict[str, list[Float[Tensor, "c h w"]]], columns: list[str], zoom: int = 2
) -> Image.Image:
    """A labelled contact sheet: one named row of images each, under the headings of the columns."""
    size = zoom * next(iter(rows.values()))[0].shape[-1]
    left, gap, top = 90, max(size, 64) + 6, 22
    page = Image.new("RGB", (left + gap * len(columns), top + (size + 6) * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for column, name in enumerate(columns):
        draw.text((left + gap * column, 5), name, fill="black")
    for row, (name, images) in enumerate(rows.items()):
        y = top + row * (size + 6)
        draw.text((5, y + size // 2 - 5), name, fill="black")
        for column, image in enumerate(images):
            tile = to_pil(image).resize((size, size), Image.Resampling.NEAREST)
            page.paste(tile, (left + gap * column, y))
    return page
