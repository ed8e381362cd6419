"""Tiles: pictures with what the page shows of them, side by side in one sprite."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from augment.plan.plan import Plan

MAX_MEMBERS = 12
"""Maximum number of members of a plan that are listed, the heaviest; the others are counted."""

QUALITY = 85  # of WebP


@dataclass
class Tile:
    """A picture, and what is known of it.

    Args:
        kind: ``real``, ``back`` (sampled back), ``rule``, ``kept`` or ``refused``.
        image: the picture, square.
        id: id of the real image, of the first two kinds.
        psnr: PSNR of the image sampled back, in dB.
        plan: plan of a synthetic image.
        rule: name of its rule.
        row: its index in the shards.
        code: Python that makes it again.
        scores: its scores, by filter; None is not a number.
        refined: loss before and after refinement.
        prompt, guidance: what it was sampled with.
    """

    kind: str
    image: Image.Image
    id: str | None = None
    psnr: float | None = None
    plan: Plan | None = None
    rule: str = ""
    row: int | None = None
    code: str = ""
    scores: Mapping[str, float | None] = field(default_factory=dict)
    refined: Sequence[float] = ()
    prompt: str = ""
    guidance: float = 1.0

    def record(self) -> dict[str, object]:
        """Return what the page shows of it, for JSON."""
        if self.plan is None:
            psnr = None if self.psnr is None else round(self.psnr, 1)
            known: dict[str, object] = {"id": self.id, "psnr": psnr}
        else:
            known = {"rule": self.rule, "row": self.row, "code": self.code, **_summary(self.plan)}
            known |= {"prompt": self.prompt} if self.prompt else {}
            known |= {"guidance": self.guidance} if self.guidance != 1 else {}
            known |= {"scores": _rounded(self.scores), "refined": list(self.refined)}
        return {"kind": self.kind} | {k: v for k, v in known.items() if v not in (None, {}, [])}


def _summary(plan: Plan) -> dict[str, object]:
    """Return a plan's random choices, and the heaviest of its members."""
    pairs = zip(plan.members, plan.weights, strict=True)
    order = sorted(pairs, key=lambda pair: -pair[1])
    rest = order[MAX_MEMBERS:]
    return {
        "seed": plan.seed,
        "epoch": plan.epoch,
        "index": plan.index,
        "noise": plan.noise,
        "level": plan.level,
        "context": plan.context or None,
        "mixed": round(plan.effective_count, 1),
        "members": [[image_id, round(weight, 3)] for image_id, weight in order[:MAX_MEMBERS]],
        "rest": [len(rest), round(sum(w for _, w in rest), 3)] if rest else None,
    }


def _rounded(scores: Mapping[str, Any]) -> dict[str, float | None]:
    return {
        name: round(value, 3) if isinstance(value, float) and math.isfinite(value) else None
        for name, value in scores.items()
    }


def square(picture: Image.Image, side: int) -> Image.Image:
    """Return the middle of a picture in RGB, reduced or enlarged to a square.

    Args:
        picture: the picture.
        side: pixels a side of the square.
    """
    least = min(picture.size)
    left, top = (picture.width - least) // 2, (picture.height - least) // 2
    box = (left, top, left + least, top + least)
    return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS, box)


def sprite(tiles: Sequence[Tile]) -> str:
    """Return tiles side by side as a data URI; empty if there are none."""
    if not tiles:
        return ""
    side = tiles[0].image.width
    strip = Image.new("RGB", (side * len(tiles), side))
    for place, tile in enumerate(tiles):
        strip.paste(tile.image, (side * place, 0))
    content = io.BytesIO()
    strip.save(content, "WEBP", quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
