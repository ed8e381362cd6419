"""Two small plots as SVG text: the norms of latents, and what rules make of a bias.

By hand, for a plotting library's SVG is a hundred times larger and knows no dark mode. Colours are
the classes of ``page.css``.
"""

import math
from collections.abc import Callable, Sequence
from html import escape

import numpy as np
import torch

from augment.bank.bank import LatentBank
from augment.centroid.prior import log_chi, nominal_norm
from augment.measure.bias import BIAS_THRESHOLD, measured_bias, predicted_bias
from augment.measure.health import ClassHealth, from_most_biased
from augment.measure.latents import norm_law

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 44
BINS, CURVES = 40, 50

Scale = Callable[[float], float]


def scale(low: float, high: float, first: float, last: float) -> Scale:
    """The linear map of [low, high] to [first, last]."""
    return lambda value: first + (value - low) / (high - low) * (last - first)


def axes(low: float, high: float, top: float) -> tuple[Scale, Scale]:
    """From values to places: x from low to high, y from 0 to top."""
    return scale(low, high, LEFT, WIDTH - RIGHT), scale(0, top, HEIGHT - BOTTOM, TOP)


def line(
    x: Scale, y: Scale, points: Sequence[tuple[float, float]], kind: str, name: str = ""
) -> str:
    """A line through points."""
    places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    title = f"<title>{escape(name)}</title>" if name else ""
    return f'<polyline class="{kind}" points="{places}">{title}</polyline>'


def text(x: float, y: float, words: str, kind: str = "tick", anchor: str = "middle") -> str:
    """Words at a place."""
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text class="{kind}" {place} text-anchor="{anchor}">{escape(words)}</text>'


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers in a range.

    >>> ticks(0.0, 0.9)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    raw = (high - low) / 5
    base = 10 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def figure(parts: Sequence[str], label: str) -> str:
    """An SVG of parts; the label is what those hear who do not see it."""
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg class="plot" {box} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def frame(x: Scale, marks: dict[float, str], words: str) -> list[str]:
    """The horizontal axis with its marks and what it is of."""
    base = HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>']
    parts += [f'<path class="axis" d="M{x(at):.1f} {base}v4"/>' for at in marks]
    parts += [text(x(at), base + 17, name) for at, name in marks.items()]
    return [*parts, text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, words, "label")]


def norm_plot(classes: Sequence[ClassHealth]) -> str:
    """The norms of all latents beside the chi law, each at a height of 1."""
    norms, dim = np.array([n for c in classes for n in c.norms]), classes[0].statistics.dim
    mean, deviation = norm_law(dim)
    low = min(norms.min(), mean - 4.5 * deviation) - deviation / 2
    high = max(norms.max(), mean + 4.5 * deviation) + deviation / 2
    x, y = axes(low, high, 1.06)
    counts, edges = np.histogram(norms, BINS, (low, high))
    heights = counts / counts.max()
    parts = []
    for a, b, h, n in zip(edges, edges[1:], heights, counts, strict=False):
        box = f'x="{x(a):.1f}" y="{y(h):.1f}" width="{x(b) - x(a) - 1:.1f}"'
        told = f"<title>{n} of {len(norms)} from {a:.3f} to {b:.3f}</title>"
        if n:
            parts.append(f'<rect class="bar" {box} height="{y(0) - y(h):.1f}">{told}</rect>')
    places = torch.linspace(low, high, 800, dtype=torch.float64)
    law = log_chi(places * nominal_norm(dim), dim)
    law = (law - law.max()).exp()
    points = [(a, b) for a, b in zip(places.tolist(), law.tolist(), strict=True) if b > 1e-3]
    parts.append(line(x, y, points, "law"))
    parts += frame(x, {at: f"{at:g}" for at in ticks(low, high)}, "norm of a latent / √D")
    label = (
        f"Histogram of the norms of {len(norms)} latents over the square root of D: mean "
        f"{norms.mean():.3f}, standard deviation {norms.std():.3f}. White noise has "
        f"{mean:.3f} and {deviation:.3f}."
    )
    return figure(parts, label)


def bias_plot(bank: LatentBank, classes: Sequence[ClassHealth]) -> str:
    """The largest channel mean of centroids against √members, predicted and measured."""
    shown = from_most_biased(classes, CURVES)
    worst = shown[0]
    most = max(max(c.statistics.count for c in shown), 2)
    top = 1.12 * max(BIAS_THRESHOLD, *(c.fixed_bias for c in shown))
    x, y = axes(1, math.sqrt(most), top)
    parts = [grid(y, top)]
    for c in reversed(shown):
        kind = "fix worst" if c is worst else "fix"
        parts += [
            line(x, y, curve(c), kind, f"{c.name}: fix/0, predicted"),
            line(x, y, flat(c), kind.replace("fix", "chm"), f"{c.name}: fix/chm, predicted"),
        ]
    latents = bank.latents(worst.name)
    for rule, kind in (("fix/0", "fix"), ("fix/chm", "chm")):
        for n in counts_of_members(len(latents)):
            bias = measured_bias(latents, rule, n)
            words = f"{worst.name}: {rule}, measured with {n} members: {bias:.3f}"
            place = f'cx="{x(math.sqrt(n)):.1f}" cy="{y(bias):.1f}"'
            parts.append(
                f'<circle class="{kind} dot" {place} r="3.5"><title>{escape(words)}</title>'
                "</circle>"
            )
    parts.append(f'<path class="limit" d="M{LEFT} {y(BIAS_THRESHOLD):.1f}H{WIDTH - RIGHT}"/>')
    marks = {
        math.sqrt(n): str(n) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n <= most
    }
    if most > 2048:
        marks = {math.sqrt(n): str(n) for n in (1, most // 16, most // 4, most)}
    parts += frame(x, marks, "members of a centroid, in equal parts (on a scale of √N)")
    label = (
        f"Largest channel mean of centroids against the root of their members. With fix/0 it grows "
        f"to {worst.fixed_bias:.2f} for {worst.statistics.count} members of class {worst.name}; "
        f"with fix/chm it stays at {worst.statistics.largest[0]:.2f}."
    )
    return figure(parts, label)


def grid(y: Scale, top: float) -> str:
    """Faint lines across, and their values."""
    parts = []
    for at in ticks(0, top):
        parts.append(f'<path class="grid" d="M{LEFT} {y(at):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(text(LEFT - 6, y(at) + 4, f"{at:g}", "tick", "end"))
    return "".join(parts)


def curve(c: ClassHealth) -> list[tuple[float, float]]:
    """What ``fix/0`` makes of a class's bias, by √members."""
    roots = np.linspace(1, math.sqrt(c.statistics.count), 24)
    numbers = sorted({round(root**2) for root in roots})
    return [(math.sqrt(n), predicted_bias(c.statistics, n, math.inf)) for n in numbers]


def flat(c: ClassHealth) -> list[tuple[float, float]]:
    """What a rule with the split ``chm`` leaves of it."""
    return [(at, c.statistics.largest[0]) for at in (1, math.sqrt(c.statistics.count))]


def counts_of_members(total: int) -> list[int]:
    """Numbers of members to measure, about √2 apart, up to all or 128 of them."""
    usual, last = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91), min(total, 128)
    return [*(n for n in usual if n < last), last]
