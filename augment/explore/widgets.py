"""The pieces of the page: HTML of a bank's pictures, weights and walks.

Pictures stand in the HTML itself, as ``data:`` addresses, so that the page never asks for a file.
Names come from folders, which may be called anything, and are escaped.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import PurePath

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from augment.explore.session import Choice, Explorer, thumbnail
from augment.plan.plan import Plan
from augment.sources.images import to_pil

CORNERS = ((80.0, 0.0), (0.0, 138.0), (160.0, 138.0))
"""Corners of the triangle of three weights, in the units of its drawing."""
MAX_SHOWN = 120
"""Maximum number of images of a class to choose from; a draw chooses from all."""
COARSE = 64  # pixels up to which they are shown as squares, not blurred


def asset(name: str) -> str:
    """Return the text of a style sheet or script beside this file."""
    return (files("augment.explore") / name).read_text("utf-8")


def shown(name: str) -> str:
    """Return a name as a page can hold it: what is not UTF-8 in it is escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def picture(image: Image.Image, alt: str, more: str = "") -> str:
    """Return an image in HTML, exactly (PNG).

    Args:
        image: grey or RGB.
        alt: what it is, for those who do not see it.
        more: other attributes.
    """
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    content = base64.b64encode(buffer.getvalue()).decode()
    coarse = ' data-coarse=""' if max(image.size) <= COARSE else ""
    return f'<img src="data:image/png;base64,{content}" alt="{escape(shown(alt))}"{coarse} {more}>'


def heading(explorer: Explorer) -> str:
    """Return what is being explored."""
    bank = explorer.bank
    count, classes = sum(map(len, bank.members.values())), len(bank.classes)
    model = bank.fingerprint["backbone"]["name"]
    title = f"{count} latents of {classes} classes by {model}, {bank.inverted_by} · {bank.path}"
    return f'<p><b>Explorer</b> <span class="small">{escape(shown(title))}</span></p>'


def grid(explorer: Explorer, plan: Plan, class_name: str) -> str:
    """Return the images of a class, to choose members of a plan from."""
    ids, cells = explorer.bank.members[class_name], []
    label = explorer.bank.classes.index(class_name)
    members = set(zip(plan.member_classes, plan.members, strict=True))
    for row, image_id in enumerate(ids[:MAX_SHOWN]):
        known = explorer.real(class_name, image_id)
        inner = picture(known, image_id) if known else escape(shown(PurePath(image_id).stem))
        chosen = str((class_name, image_id) in members).lower()
        cells.append(
            f'<button data-label="{label}" data-row="{row}" aria-pressed="{chosen}" '
            f'title="{escape(shown(image_id))}">{inner}</button>'
        )
    return f'<div class="grid">{"".join(cells)}</div>'


def mixer(explorer: Explorer, plan: Plan) -> str:
    """Return a slider for each member's weight; for three, a triangle to drag in as well."""
    names = [escape(shown(image_id)) for image_id in plan.members]
    images = [
        picture(explorer.thumbnail(class_name, image_id), image_id)
        for class_name, image_id in zip(plan.member_classes, plan.members, strict=True)
    ]
    rows = "".join(
        f'<div class="row" title="{name}">{image}<input type="range" min="0" max="1" step="0.001" '
        f'value="{weight:.3f}" aria-label="weight of {name}"><output>{weight:.0%}</output></div>'
        for name, image, weight in zip(names, images, plan.weights, strict=True)
    )
    return (triangle(plan, images) if len(images) == len(CORNERS) else "") + rows


def triangle(plan: Plan, images: Sequence[str]) -> str:
    """Return the simplex of three members, with a dot at the plan's weights."""
    x, y = (
        sum(w * corner[axis] for w, corner in zip(plan.weights, CORNERS, strict=True))
        for axis in (0, 1)
    )
    points = " ".join(f"{a},{b}" for a, b in CORNERS)
    ends = "".join(
        f'<foreignObject x="{a - 17}" y="{b - 17}" width="34" height="34">{image}</foreignObject>'
        for image, (a, b) in zip(images, CORNERS, strict=True)
    )
    return (
        f'<svg viewBox="-18 -18 196 174"><polygon points="{points}"/>{ends}'
        f'<circle cx="{x:.2f}" cy="{y:.2f}" r="6"/></svg>'
    )


def centroid(explorer: Explorer, choice: Choice) -> str:
    """Return the image of a choice, and measurements of its centroid."""
    image, facts = to_pil(explorer.image(choice)), explorer.facts(choice)
    title = f"{choice.plan.class_name}, {choice.rule}"
    count, members = choice.plan.effective_count, len(choice.plan.members)
    prompt, guidance = explorer.prompt(choice), choice.sampling.guidance
    words = f"<br>{escape(shown(prompt))}, guidance {guidance:g}" if prompt else ""
    if choice.plan.classes:
        classes = explorer.bank.classes
        shares = zip(classes, choice.plan.soft_label(classes).tolist(), strict=True)
        parts = (f"{share:.0%} {escape(shown(name))}" for name, share in shares if share)
        words += f"<br>{', '.join(parts)}"
    return (
        f"<figure>{picture(image, title)}<figcaption>norm {facts.norm:.3f} √D · channel bias "
        f"{facts.bias:.3f} (average {facts.average:.3f})<br>mixes {count:.1f} of {members} members"
        f"{words}</figcaption></figure>"
    )


def tray(explorer: Explorer, choices: Sequence[Choice]) -> str:
    """Return the images that were kept."""
    images = "".join(
        picture(thumbnail(explorer.image(choice)), f"{choice.plan.class_name}, {choice.rule}")
        for choice in choices
    )
    return f'<div class="tray">{images}</div>'


def player(images: Float[Tensor, "t c h w"], norms: Sequence[float]) -> str:
    """Return the frames of a walk, to be played or pulled through."""
    last = len(images) - 1
    places = [f"γ {i / last:.2f} · norm {norm:.3f} √D" for i, norm in enumerate(norms)]
    frames = [
        picture(to_pil(image), place, f'data-place="{place}"')
        for image, place in zip(images, places, strict=True)
    ]
    return (
        f'<div class="player">{frames[0].replace("<img", "<img class=frame", 1)}<div class="row">'
        f'<button>Play</button><input type="range" min="0" max="{last}" step="1" value="0" '
        f'aria-label="place on the walk"></div><output class="small">{places[0]}</output>'
        f'<div class="film">{"".join(frames)}</div></div>'
    )
