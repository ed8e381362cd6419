"""Decoding image files as a viewer shows them: upright, in sRGB, transparency on a background.

A file may come from a stranger: pixels, scans, profiles and texts are bounded, and whatever error a
decoder raises is an `ImageRejected`.
"""

import io
import os
import warnings
import zlib
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms, ImageFile, UnidentifiedImageError

from augment.core.errors import AugmentWarning, ImageRejected, UserError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
_MAX_ASPECT = 32  # nearly all of a longer strip would be cut off, after it was enlarged
_LIMIT = "LATENT_AUGMENT_MAX_PIXELS"

try:
    MAX_PIXELS = int(os.environ.get(_LIMIT) or 89_478_485)
except ValueError:
    wrong = os.environ[_LIMIT]
    raise UserError(f"expected a number of pixels in {_LIMIT}, got {wrong!r}") from None
"""Maximum number of pixels to decode; a larger JPEG file is decoded at reduced size."""

_MAX_SCANS = 16
"""Scans of a progressive JPEG file of `MAX_PIXELS`; a smaller one may have more, at equal cost."""

_MAX_PROFILE = 2**24  # bytes of an ICC profile
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_TOLERANCE = 2
"""Levels out of 255 up to which a colour profile counts as sRGB."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an image upright, by its EXIF orientation."""


def open_image(
    content: bytes, background: str = "white", name: str = "", quick: bool = False
) -> Image.Image:
    """Decode the bytes of an image file as a viewer shows it: grey (L) if it is so, else RGB.

    Of an animated GIF, WebP or AVIF file and of a TIFF file of several pages, this is the first
    picture.

    Args:
        content: bytes of a file of one of `FORMATS`.
        background: colour that is seen through transparent pixels.
        name: of the file, for warnings.
        quick: decode a JPEG file at an eighth of its size, to see whether it can be read.

    Raises:
        ImageRejected: the bytes are empty, truncated, no image, an animated PNG file, or an image
            of more than `MAX_PIXELS` pixels.
    """
    try:
        try:
            return as_shown(_decoded(content, quick), background, name)
        except ValueError:
            if content[:4] != b"\x89PNG":
                raise
            short, profile = _without_text(content)  # Pillow refuses long texts and profiles
            return as_shown(_decoded(short), background, name, profile)
    except Exception as error:  # of any type, since files may be hostile
        unknown = isinstance(error, UnidentifiedImageError)  # whose text has an address in it
        reason = f"not an image of the formats {', '.join(FORMATS)}" if unknown else str(error)
        raise ImageRejected(reason if content else "an empty file") from None


def _decoded(content: bytes, quick: bool = False) -> ImageFile.ImageFile:
    """Decode the pixels of an image file as they are stored; raise anything if that fails."""
    file = _opened(content)
    # a photograph with a preview in the same file (MPO) is one picture
    if file.format == "PNG" and getattr(file, "is_animated", False):
        raise ValueError("an animation; save one picture of it")
    width, height = file.size
    if max(file.size) > _MAX_ASPECT * min(file.size):
        raise ValueError(f"{width} × {height} pixels, a strip; cut it")
    if file.format in ("JPEG", "MPO"):
        if file.info.get("progressive"):  # in others each scan has its price in bytes
            check_scans(content, width * height)
        shrink = 8 if quick else 1
        while shrink < 8 and width * height > MAX_PIXELS * shrink**2:
            shrink *= 2
        if shrink > 1:
            file.draft(None, (-(-width // shrink), -(-height // shrink)))
    if file.width * file.height > MAX_PIXELS:
        raise ValueError(
            f"{width} × {height} pixels, more than {MAX_PIXELS:,}; set {_LIMIT} to more, or "
            "reduce it"
        )
    args = file.tile[0][3] if file.tile else ""
    file.info["stored"] = args if isinstance(args, str) else str((args or [""])[0])
    file.load()
    return file


def _opened(content: bytes) -> ImageFile.ImageFile:
    """Open a file of one of `FORMATS`, by its first bytes.

    `Image.open` has one bound of pixels for the whole process, which holds for JPEG files too.
    """
    Image.preinit()
    for name in FORMATS:
        if name not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory and accept and accept(content[:16]) is True:
            return factory(io.BytesIO(content), "")
    raise UnidentifiedImageError


def check_scans(content: bytes, pixels: int) -> None:
    """Refuse a JPEG file that goes through its pixels far more often than any encoder does.

    Raises:
        ValueError: it does.
    """
    scans = content.count(b"\xff\xda")
    if scans * pixels > _MAX_SCANS * MAX_PIXELS:
        raise ValueError(
            f"a JPEG file of {scans} scans of {pixels:,} pixels; save it again, or set {_LIMIT} to "
            "more"
        )


def _without_text(content: bytes) -> tuple[bytes, bytes | None]:
    """Return a PNG file without its texts and its colour profile, and that profile."""
    kept, profile, place = [content[:8]], None, 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        kind = content[place + 4 : place + 8]
        if kind == b"iCCP":
            packed = content[place + 8 : end - 4].partition(b"\0")[2][1:]
            unpacker = zlib.decompressobj()
            profile = unpacker.decompress(packed, _MAX_PROFILE)
            profile = profile if unpacker.eof else None
        elif kind not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(content[place:end])
        place = end
    return b"".join(kept), profile


def as_shown(
    image: Image.Image, background: str = "white", name: str = "", profile: bytes | None = None
) -> Image.Image:
    """Return an image as a viewer shows it: upright, in sRGB, on a background; grey (L) or RGB.

    What changed its colours is its only ``info``: ``converted``.

    Args:
        image: of 8 or 16 bits a channel.
        background: colour that is seen through transparent pixels.
        name: of the file, for warnings.
        profile: its ICC profile; by default the one it carries.

    Raises:
        ValueError: it has 32 bits a channel.
    """
    info, turn, converted = image.info, _turn_of(image), []
    shown, alpha = _eight_bits(image, name)
    if _is_mask(image):
        warn_once(
            "mask",
            f"expected grey images up to 255, got {name or 'one'} of 0 and 1 alone: a mask, "
            "perhaps, which is read as black; multiply it by 255",
        )
    profile = profile or info.get("icc_profile")
    transform = _to_srgb(profile, shown.mode) if profile else None
    gamma = info.get("gamma")
    if transform:
        coloured = transform.apply(shown)
        shown = coloured.convert("L") if shown.mode == "L" else coloured
        converted.append("a colour profile")
    elif gamma and not profile and "srgb" not in info and abs(2.2 * gamma - 1) > 0.05:
        shown = shown.point(_gamma_table(gamma) * len(shown.getbands()))
        converted.append("a gamma")
    if shown.mode not in ("L", "RGB"):
        shown = shown.convert("RGB")
    if alpha:
        under = Image.new("RGB", shown.size, background)
        under.paste(shown, mask=alpha)
        shown = under
        converted.append("transparency")
    if turn is not None:
        shown = shown.transpose(turn)
    shown = shown.copy() if shown is image else shown  # whose info the caller may need
    shown.info = {"converted": " and ".join(converted)} if converted else {}
    return shown


def _eight_bits(image: Image.Image, name: str) -> tuple[Image.Image, Image.Image | None]:
    """Return the colours of an image in mode L, RGB or CMYK, and its transparency if it has any."""
    alpha, key, stored = None, image.info.get("transparency"), str(image.info.get("stored"))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"32 bits a pixel (mode {image.mode}), whose white is unknown; save it with 8 or 16"
        )
    if image.mode.startswith("I;16"):  # which Pillow would clip to its lowest 256 levels
        levels = np.array(image)
        dark = levels.min() < levels.max() < 2**12  # an even picture says nothing
        shown = Image.fromarray((levels / 257).round().astype(np.uint8))
        if isinstance(key, int):
            alpha = Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))
    else:
        shown = image
        if image.has_transparency_data:
            shown = image if image.mode == "RGBA" else image.convert("RGBA")
            alpha = shown.getchannel("A")
        if shown.mode not in ("L", "RGB", "CMYK"):
            shown = shown.convert("L" if shown.mode == "1" else "RGB")
        # of 16 bits a colour Pillow keeps the upper 8
        ends = np.array(shown.getextrema()) if ";16" in stored else np.zeros(1)
        dark = ends.min() < ends.max() < 2**4
    if dark:
        warn_once(
            "12 bits",
            f"expected 16-bit images up to 65535, got {name or 'one'} whose largest value is below "
            "4096: 12-bit data, perhaps, which are read as nearly black; multiply them by 16",
        )
    if alpha and alpha.getextrema()[0] == 255:
        alpha = None
    return shown, alpha


def _is_mask(image: Image.Image) -> bool:
    """Return whether the values of a grey image are 0 and 1 alone."""
    if image.mode != "L" or max(image.resize((8, 8), Image.Resampling.NEAREST).tobytes()) > 1:
        return False
    return image.getextrema() == (0, 1)


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return what brings an image upright; None if it is so, or its tags cannot be read."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # of any type, since files may be hostile
        return None


@lru_cache(64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from an ICC profile to sRGB.

    None if there is nothing to do: the profile's colours are those of sRGB, or it is damaged or of
    another kind of image, which viewers ignore too.
    """
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.ImageCmsTransform(own, _SRGB, mode, "RGB")
    except Exception:  # of any type, since files may be hostile
        return None
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 17 if mode == "RGB" else 1, dtype=np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * len(mode), indexing="ij"), -1)
    colours = Image.fromarray(grid.reshape(1, -1, 3) if mode == "RGB" else grid.reshape(1, -1))
    off = np.asarray(transform.apply(colours)).astype(int) - np.asarray(colours.convert("RGB"))
    return transform if np.abs(off).max() > _TOLERANCE else None


def _gamma_table(gamma: float) -> list[int]:
    """Return the sRGB level of each of the 256 levels of a PNG file with a gAMA chunk."""
    linear = np.linspace(0, 1, 256) ** (1 / gamma)
    low, high = 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055
    return (255 * np.where(linear <= 0.0031308, low, high)).round().astype(int).tolist()


WARNED: set[str] = set()
"""Kinds of images that this process has warned of."""


def warn_once(kind: str, text: str) -> None:
    """Warn of the first image of a kind."""
    if kind not in WARNED:
        WARNED.add(kind)
        warnings.warn(text, AugmentWarning, stacklevel=3)
