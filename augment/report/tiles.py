"""Tiles: a picture, what is told of it, and many side by side in one sprite."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from augment.plan.plan import Plan

MEMBERS = 12
"""Members of a plan that are shown, the heaviest; the others are counted."""

QUALITY = 85  # of WebP


@dataclass
class Tile:
    """A picture and what is told of it.

    Attributes:
        kind: ``real``, ``back``, ``rule``, ``kept`` or ``refused``.
        image: square.
        about: plain, for JSON.
    """

    kind: str
    image: Image.Image
    about: dict[str, Any]


def square(picture: Image.Image, side: int) -> Image.Image:
    """The middle of a picture in RGB, with so many pixels a side."""
    least = min(picture.size)
    left, top = (picture.width - least) // 2, (picture.height - least) // 2
    box = (left, top, left + least, top + least)
    return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS, box)


def told(plan: Plan) -> dict[str, Any]:
    """What is told of a plan: its dice, and the heaviest of its members."""
    pairs = zip(plan.members, plan.weights, strict=True)
    order = sorted(pairs, key=lambda pair: -pair[1])
    rest = order[MEMBERS:]
    return {
        "seed": plan.seed,
        "epoch": plan.epoch,
        "index": plan.index,
        "noise": plan.noise,
        "mixed": round(plan.effective_count, 1),
        "members": [[image_id, round(weight, 3)] for image_id, weight in order[:MEMBERS]],
        **({"rest": [len(rest), round(sum(w for _, w in rest), 3)]} if rest else {}),
    }


def rounded(scores: dict[str, Any]) -> dict[str, float | None]:
    """Scores as they are read; None is no number."""
    return {
        name: round(value, 3) if isinstance(value, float) and math.isfinite(value) else None
        for name, value in scores.items()
    }


def sprite(tiles: Sequence[Tile]) -> str:
    """Tiles side by side as a data URI; empty if there are none."""
    if not tiles:
        return ""
    side = tiles[0].image.width
    strip = Image.new("RGB", (side * len(tiles), side))
    for place, tile in enumerate(tiles):
        strip.paste(tile.image, (side * place, 0))
    content = io.BytesIO()
    strip.save(content, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
