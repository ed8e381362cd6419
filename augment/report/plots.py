"""Two small plots as SVG text: the norms of latents, and what rules make of a bias.

They are written by hand because a plotting library's SVG is a hundred times larger and knows no
dark mode. Colours are the classes of ``page.css``.
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
LEFT, RIGHT, TOP, BASE = 46, WIDTH - 14, 14, HEIGHT - 44  # edges of the plotted area
BINS, MAX_CURVES = 40, 50

Scale = Callable[[float], float]


def norm_plot(classes: Sequence[ClassHealth]) -> str:
    """Plot the norms of all latents and the chi law, both scaled to height 1."""
    norms, dim = np.array([n for c in classes for n in c.norms]), classes[0].statistics.dim
    mean, deviation = norm_law(dim)
    low = min(norms.min(), mean - 4.5 * deviation) - deviation / 2
    high = max(norms.max(), mean + 4.5 * deviation) + deviation / 2
    x, y = _axes(low, high, 1.06)
    counts, edges = np.histogram(norms, BINS, (low, high))
    parts = []
    for a, b, n in zip(edges, edges[1:], counts, strict=False):
        if n:
            height = y(0) - y(n / counts.max())
            box = f'x="{x(a):.1f}" y="{y(0) - height:.1f}" width="{x(b) - x(a) - 1:.1f}"'
            title = f"<title>{n} of {len(norms)} from {a:.3f} to {b:.3f}</title>"
            parts.append(f'<rect class="bar" {box} height="{height:.1f}">{title}</rect>')
    places = torch.linspace(low, high, 800, dtype=torch.float64)
    law = log_chi(places * nominal_norm(dim), dim)
    law = (law - law.max()).exp()
    points = [(a, b) for a, b in zip(places.tolist(), law.tolist(), strict=True) if b > 1e-3]
    parts.append(_line(x, y, points, "law"))
    parts += _frame(x, {at: f"{at:g}" for at in _ticks(low, high)}, "norm of a latent / √D")
    label = (
        f"Histogram of the norms of {len(norms)} latents over the square root of D: mean "
        f"{norms.mean():.3f}, standard deviation {norms.std():.3f}. White noise has "
        f"{mean:.3f} and {deviation:.3f}."
    )
    return _figure(parts, label)


def bias_plot(bank: LatentBank, classes: Sequence[ClassHealth]) -> str:
    """Plot the largest channel mean of centroids against √members, predicted and measured."""
    shown = from_most_biased(classes, MAX_CURVES)
    worst, largest = shown[0], max(2, *(c.statistics.count for c in shown))
    top = 1.12 * max(BIAS_THRESHOLD, *(c.fixed_bias for c in shown))
    x, y = _axes(1, math.sqrt(largest), top)
    parts = []
    for at in _ticks(0, top):
        parts.append(f'<path class="grid" d="M{LEFT} {y(at):.1f}H{RIGHT}"/>')
        parts.append(_text(LEFT - 6, y(at) + 4, f"{at:g}", "tick", "end"))
    for c in reversed(shown):
        suffix, count = " worst" if c is worst else "", c.statistics.count
        roots = np.linspace(1, math.sqrt(count), 24)
        numbers = sorted({round(root**2) for root in roots})
        grown = [(math.sqrt(n), predicted_bias(c.statistics, n, math.inf)) for n in numbers]
        kept = [(at, c.statistics.largest[0]) for at in (1, math.sqrt(count))]
        for rule, points in (("fix/0", grown), ("fix/chm", kept)):
            kind = ("fix" if rule == "fix/0" else "chm") + suffix
            parts.append(_line(x, y, points, kind, f"{c.name}: {rule}, predicted"))
    latents = bank.latents(worst.name)
    for rule, kind in (("fix/0", "fix"), ("fix/chm", "chm")):
        for n in _counts_of_members(len(latents)):
            bias = measured_bias(latents, rule, n)
            place = f'cx="{x(math.sqrt(n)):.1f}" cy="{y(bias):.1f}" r="3.5"'
            words = escape(f"{worst.name}: {rule}, measured with {n} members: {bias:.3f}")
            parts.append(f'<circle class="{kind} dot" {place}><title>{words}</title></circle>')
    parts.append(f'<path class="limit" d="M{LEFT} {y(BIAS_THRESHOLD):.1f}H{RIGHT}"/>')
    marks = [2**k for k in range(11) if 2**k <= largest]
    if largest > 2048:
        marks = [1, largest // 16, largest // 4, largest]
    named = {math.sqrt(n): str(n) for n in marks}
    parts += _frame(x, named, "members of a centroid, in equal parts (on a scale of √N)")
    label = (
        "Largest channel mean of centroids against the root of their members. With fix/0 it grows "
        f"to {worst.fixed_bias:.2f} for {worst.statistics.count} members of class {worst.name}; "
        f"with fix/chm it stays at {worst.statistics.largest[0]:.2f}."
    )
    return _figure(parts, label)


def _axes(low: float, high: float, top: float) -> tuple[Scale, Scale]:
    """Return the maps from values to pixels: x from low to high, y from 0 to top."""
    return (
        lambda value: LEFT + (value - low) / (high - low) * (RIGHT - LEFT),
        lambda value: BASE + value / top * (TOP - BASE),
    )


def _line(
    x: Scale, y: Scale, points: Sequence[tuple[float, float]], kind: str, name: str = ""
) -> str:
    places = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    title = f"<title>{escape(name)}</title>" if name else ""
    return f'<polyline class="{kind}" points="{places}">{title}</polyline>'


def _text(x: float, y: float, words: str, kind: str = "tick", anchor: str = "middle") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text class="{kind}" {place} text-anchor="{anchor}">{escape(words)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers in a range.

    >>> _ticks(0.0, 0.9)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    """
    raw = (high - low) / 5
    base = 10 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(x: Scale, marks: dict[float, str], words: str) -> list[str]:
    """Return the horizontal axis with its marks and title."""
    parts = [f'<path class="axis" d="M{LEFT} {BASE}H{RIGHT}"/>']
    for at, name in marks.items():
        parts.append(f'<path class="axis" d="M{x(at):.1f} {BASE}v4"/>')
        parts.append(_text(x(at), BASE + 17, name))
    return [*parts, _text((LEFT + RIGHT) / 2, HEIGHT - 6, words, "label")]


def _figure(parts: Sequence[str], label: str) -> str:
    """Return an SVG; the label is read to those who do not see it."""
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg class="plot" {box} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _counts_of_members(total: int) -> list[int]:
    """Return numbers of members to measure, about √2 apart, up to all or 128 of them."""
    usual, last = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91), min(total, 128)
    return [*(n for n in usual if n < last), last]
