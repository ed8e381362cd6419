"""Draw the three landscapes of `latent-augment check`: mountains, a sea, a meadow.

    python scripts/draw_pictures.py

They have what photographs have: smooth skies, edges, texture at every scale, shade and haze. All of
it is computed from random numbers, so that nobody has rights in them.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FOLDER = Path(__file__).parents[1] / "augment" / "sources" / "pictures" / "landscape"
SIDE, QUALITY = 704, 40
Array = NDArray[np.float64]


def noise(rng: np.random.Generator, height: int, width: int, coarse: int, fall: float) -> Array:
    """Return fractal noise of mean 0 and deviation 1: octaves, each of 2 × the frequency.

    Args:
        rng: random generator.
        height: of the picture, in pixels.
        width: of the picture, in pixels.
        coarse: cells of the first octave a row.
        fall: amplitude of each octave over that of the one before.
    """
    total, cells, amplitude = np.zeros((height, width)), coarse, 1.0
    while cells < width:
        grid = Image.fromarray(rng.standard_normal((cells * height // width + 2, cells + 2)))
        total += amplitude * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
        cells, amplitude = 2 * cells, amplitude * fall
    return (total - total.mean()) / total.std()


def ramp(top: tuple[int, ...], bottom: tuple[int, ...], places: Array) -> Array:
    """Blend two colours of 0 to 255 by places from 0 to 1."""
    share = np.clip(places, 0, 1)[..., None]
    return (1 - share) * np.array(top) + share * np.array(bottom)


def over(under: Array, upper: Array, share: Array) -> Array:
    """Lay a picture over another by a share for each pixel."""
    return under + np.clip(share, 0, 1)[..., None] * (upper - under)


def ridge(rng: np.random.Generator, middle: float, height: float) -> Array:
    """Return the height of a skyline for each column, from the top, as a share of the side."""
    return middle + height * noise(rng, 1, SIDE, 3, 0.5)[0]


def mountains(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Draw ranges behind each other in the haze of an evening."""
    picture = ramp((70, 110, 170), (250, 205, 160), y / 0.6)
    picture = over(picture, np.array((255, 240, 215.0)), 0.7 * noise(rng, SIDE, SIDE, 3, 0.5) - 0.5)
    for depth in range(5):
        line = ridge(rng, 0.36 + 0.13 * depth, 0.035 + 0.008 * depth)
        colour = np.array((150 - 27 * depth, 150 - 24 * depth, 170 - 30 * depth))
        shade = 1 + (0.05 + 0.04 * depth) * noise(rng, SIDE, SIDE, 12, 0.75)
        haze = np.clip(1.25 - 1.4 * (y - line), 0.75, 1.25)[..., None]
        picture = over(picture, colour * shade[..., None] * haze, (y - line) * SIDE)
    return picture


def sea(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Draw clouds, the sun and its glitter on waves."""
    picture = ramp((60, 120, 195), (225, 225, 215), y / 0.5)
    clouds = noise(rng, SIDE, SIDE, 4, 0.55)
    picture = over(picture, ramp((255, 252, 245), (165, 170, 185), clouds / 2), 0.8 * clouds)
    sun = np.exp(-((x - 0.68) ** 2 + (y - 0.2) ** 2) / 0.004)
    picture = over(picture, np.array((255, 250, 220.0)), 1.4 * sun)
    waves = noise(rng, SIDE, SIDE, 40, 0.7)
    rows = np.clip(y, 0.52, 1)
    stretched = waves[
        (np.sqrt((rows - 0.52) / 0.48) * (SIDE - 1)).astype(int), (x * (SIDE - 1)).astype(int)
    ]
    water = ramp((120, 150, 165), (20, 60, 85), (y - 0.5) / 0.45) * (
        1 + 0.16 * stretched[..., None]
    )
    glitter = (stretched > 1.1) * np.exp(-((x - 0.68) ** 2) / (0.004 + 0.05 * (y - 0.5) ** 2))
    water = over(water, np.array((255, 245, 215.0)), 0.8 * glitter)
    return over(picture, water, (y - 0.52) * SIDE)


def meadow(rng: np.random.Generator, x: Array, y: Array) -> Array:
    """Draw hills of grass, trees with shade, and a path."""
    picture = ramp((85, 145, 215), (215, 230, 240), y / 0.45)
    clouds = noise(rng, SIDE, SIDE, 3, 0.5)
    picture = over(picture, np.array((250, 250, 250.0)), 0.9 * clouds - 0.2)
    for depth, (middle, colour) in enumerate([(0.44, (95, 125, 95)), (0.56, (105, 140, 60))]):
        line = ridge(rng, middle, 0.025)
        grass = 1 + (0.08 + 0.06 * depth) * noise(rng, SIDE, SIDE, 30, 0.8)
        light = 1 + 0.25 * noise(rng, SIDE, SIDE, 3, 0.4)
        hill = np.array(colour) * (grass * np.clip(light, 0.6, 1.4))[..., None]
        picture = over(picture, hill, (y - line) * SIDE)
    path = np.exp(-(((x - 0.45 - 0.25 * (1 - y) ** 2) / (0.02 + 0.25 * (y - 0.55) ** 2)) ** 2))
    picture = over(picture, np.array((190, 165, 125.0)), path * (y > 0.62) * 0.9)
    for place, foot, size in ((0.2, 0.68, 0.14), (0.78, 0.62, 0.1), (0.9, 0.75, 0.19)):
        leaves = noise(rng, SIDE, SIDE, 20, 0.75)
        away = np.hypot(x - place, (y - foot + 1.3 * size) / 1.1) / size + 0.13 * leaves
        shade = np.exp(-(((x - place) / size) ** 2 + ((y - foot - 0.02) / (0.2 * size)) ** 2))
        picture *= 1 - 0.55 * shade[..., None]
        trunk = (np.abs(x - place) < 0.07 * size) & (y < foot + 0.02) & (y > foot - size)
        picture = over(picture, np.array((75, 55, 40.0)), trunk * 1.0)
        side = 0.8 - 1.1 * (x - place) / size - 0.8 * (y - foot + 1.3 * size) / size
        crown = ramp((25, 50, 22), (110, 140, 55), 0.35 * side + 0.2 * leaves)
        picture = over(picture, crown, (1 - away) * 12)
    return picture


def main() -> None:
    """Write the pictures."""
    places = (np.arange(SIDE) + 0.5) / SIDE
    x, y = np.meshgrid(places, places)
    for seed, draw in enumerate((mountains, sea, meadow)):
        pixels = draw(np.random.default_rng(seed), x, y).clip(0, 255).round().astype(np.uint8)
        path = FOLDER / f"{draw.__name__}.webp"
        Image.fromarray(pixels).save(path, quality=QUALITY, method=6)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
