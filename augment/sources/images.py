"""Images at the border: the one preprocessing that every stage shares, and files out.

An image is a float32 tensor (C, H, W) in [0, 1] with C = 1 or 3. Files are read by
`augment.sources.decoding`. Grey is always the luma of ITU-R 601.
"""

import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from augment.core.errors import UserError
from augment.core.files import replacing
from augment.sources.decoding import open_image

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif",
)  # fmt: skip
STRIP = 2**22
"""Pixels that are converted to float32 at a time."""

_LUMA = (0.299, 0.587, 0.114)

FITTING = "shorter side by antialiased bilinear, centre crop"
"""The preprocessing of a bank that was made before colours were converted to sRGB."""


def to_channels(images: Float[Tensor, "*n c h w"], channels: int) -> Float[Tensor, "*n C h w"]:
    """Make images grey, by the luma of ITU-R 601, or repeat their grey.

    >>> to_channels(torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1), 1)
    tensor([[[0.2990]]])
    """
    if images.shape[-3] == channels:
        return images
    if images.shape[-3] == 3:
        images = (images * images.new_tensor(_LUMA)[:, None, None]).sum(-3, keepdim=True)
    return images.expand(*images.shape[:-3], channels, *images.shape[-2:])


def prepare(
    images: Float[Tensor, "n c h w"], channels: int, resolution: int
) -> Float[Tensor, "n C R R"]:
    """Bring images in [0, 1] to a backbone's format.

    Size is by antialiased bilinear resizing of the shorter side to ``resolution`` and a centre
    crop; for grey see `to_channels`.

    >>> prepare(torch.ones(2, 3, 28, 40), channels=1, resolution=32).shape
    torch.Size([2, 1, 32, 32])
    """
    images = to_channels(images, channels)
    size = resized(images.shape[-2], images.shape[-1], resolution)
    if size != images.shape[-2:]:
        images = F.interpolate(images, size, mode="bilinear", antialias=True).clamp(0, 1)
    return _centre(images, resolution)


def resized(height: int, width: int, resolution: int) -> tuple[int, int]:
    """Return the size of an image whose shorter side is brought to ``resolution``."""
    scale = resolution / min(height, width)
    return round(height * scale), round(width * scale)


def _centre(images: Tensor, side: int) -> Tensor:
    """Cut out the central square."""
    top, left = (images.shape[-2] - side) // 2, (images.shape[-1] - side) // 2
    return images[..., top : top + side, left : left + side]


def fit(pixels: UInt8[Tensor, "c h w"], resolution: int) -> Float[Tensor, "c R R"]:
    """Do what `prepare` does, to the same bits, without a float32 copy of a large image.

    Each row is resized to its width alone, so a strip of rows can be done at a time.
    """
    _, height, width = pixels.shape
    rows, size = max(STRIP // width, 1), resized(height, width, resolution)
    strips = pixels.split(rows, dim=1) if max(size) < max(height, width) else (pixels,)
    if len(strips) == 1:
        return prepare(pixels[None] / 255, len(pixels), resolution)[0]
    narrow = [
        F.interpolate(strip[None] / 255, (strip.shape[1], size[1]), mode="bilinear", antialias=True)
        for strip in strips
    ]
    image = F.interpolate(torch.cat(narrow, -2), size, mode="bilinear", antialias=True)
    return _centre(image.clamp(0, 1), resolution)[0]


def reduce(images: Float[Tensor, "n c h w"], pixels: int) -> Float[Tensor, "n c r r"]:
    """Reduce images to at most this many pixels a side."""
    if images.shape[-1] <= pixels:
        return images
    return F.interpolate(images, (pixels, pixels), mode="bilinear", antialias=True).clamp(0, 1)


def pixels_of(image: Image.Image, channels: int) -> UInt8[Tensor, "C h w"]:
    """Return the pixels of a PIL image, grey (1) or RGB (3)."""
    mode = "L" if channels == 1 else "RGB"
    array = np.array(image if image.mode == mode else image.convert(mode))
    pixels = torch.from_numpy(array)
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def has_colour(image: Image.Image) -> bool:
    """Tell whether more than 1 % of an image's area differs by 16 of 255 or more in its channels.

    >>> has_colour(Image.new("RGB", (9, 9), "red")), has_colour(Image.new("RGB", (9, 9), "grey"))
    (True, False)
    """
    if image.mode != "RGB":
        return False
    small = np.asarray(image.resize((32, 32), Image.Resampling.BOX, reducing_gap=2))
    return bool((np.ptp(small, axis=-1) >= 16).mean() > 0.01)


def decode_image(
    content: bytes, channels: int, resolution: int, background: str = "white"
) -> Float[Tensor, "C R R"]:
    """Decode the bytes of an image file and `prepare` them.

    Raises:
        ImageRejected: see `open_image`.
    """
    return fit(pixels_of(open_image(content, background), channels), resolution)


def preprocessing(background: str) -> str:
    """Describe, for a bank's record, how images are brought to the backbone's format."""
    return f"sRGB on {background}, {FITTING}"


def background_of(text: str) -> str:
    """Parse the background out of a `preprocessing`; white if it is of an older version."""
    match = re.match(r"sRGB on (#[0-9a-f]{6}),", text)
    return match[1] if match else "white"


def parse_colour(text: str) -> str:
    """Return a background colour as ``#rrggbb``; white by its name.

    >>> parse_colour("black"), parse_colour("#fff")
    ('#000000', 'white')

    Raises:
        UserError: it is not a colour.
    """
    try:
        rgb = ImageColor.getrgb(text)[:3]
    except (ValueError, AttributeError):
        raise UserError(
            f"expected a colour such as white or #ff8000 as the background, got {text!r}"
        ) from None
    return "white" if rgb == (255, 255, 255) else "#" + bytes(rgb).hex()


def to_pil(image: Float[Tensor, "c h w"]) -> Image.Image:
    """Convert an image to an 8-bit PIL image, grey or RGB."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def save_image(image: Float[Tensor, "c h w"], path: Path, sync: bool = True) -> None:
    """Write a PNG file; see `augment.core.files.replacing`."""
    with replacing(path, sync) as file:
        to_pil(image).save(file, "PNG")


def sheet(
    rows: dict[str, list[Float[Tensor, "c h w"]]], columns: list[str], zoom: int = 2
) -> Image.Image:
    """Draw a contact sheet: one named row of images each, under the headings of the columns."""
    size = zoom * next(iter(rows.values()))[0].shape[-1]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left, widest = (
        round(max((ruler.textlength(name) for name in names), default=0)) + 12
        for names in (rows, columns)
    )
    gap, top = max(size + 6, widest), 22
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
