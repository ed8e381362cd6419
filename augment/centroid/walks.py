r"""Walks between two latents: T latents from the first to the second, (T, C, H, W).

===============  =================================================================================
walk             its latent at the place γ in [0, 1]
===============  =================================================================================
``lerp``         (1 − γ) a + γ b
``normalised``   lerp / √(γ(2γ − 2) + 1): of unit variance where a and b are independent
``nin``          lerp at the interpolated norm
``fade``         lerp at a norm that goes from ‖a‖ over √D to ‖b‖; see `augment.centroid.norms`
``slerp``        at a constant angular speed on the arc, the norm interpolated
``raw_slerp``    slerp's coefficients applied to a and b as they are: eq. 3 of arXiv 2505.07481
``circle``       around the great circle of a and b: through b and the opposite side back to a
``nao``          the geodesic of the NAO metric, in equal steps; see `augment.centroid.nao`
``translation``  a window that slides over a and b, set side by side along the width
``slice``        a and b, each in its place, cut at one column that slides
===============  =================================================================================

``normalised``, ``translation`` and ``slice`` (its "corrected" translation, where the picture does
not move) are those of Ribeiro, *Exploring the latent space of text-to-image diffusion models*,
2023. They end at γ = 1 in b itself, all but ``circle``. Translations move by whole columns: a
fraction of one would blur the noise. `slide` is the translation over any number of latents, and
`tour` a closed path through any number of them, by a rule.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from augment.centroid.nao import climb
from augment.centroid.prior import log_chi, modal_norm
from augment.centroid.rule import Rule
from augment.core.errors import UserError, lookup

Latent = Float[Tensor, "c h w"]
Walk = Float[Tensor, "t c h w"]


def _by_rule(a: Latent, b: Latent, count: int, norm: str) -> Walk:
    """Walk by a norm rule with the weights (1 − γ, γ)."""
    return _mixed(a, b, norm, torch.linspace(0, 1, count, dtype=a.dtype, device=a.device))


def _circle(a: Latent, b: Latent, count: int) -> Walk:
    """Walk around the great circle; the rule's weight w_2 is ½ in the middle of the arc a b."""
    half = _angle(a, b) / (4 * math.pi)
    place = 0.5 - half + torch.linspace(0, 1, count, dtype=torch.float64)
    return _mixed(a, b, "circle", place.to(a))


def _mixed(a: Latent, b: Latent, norm: str, place: Float[Tensor, " t"]) -> Walk:
    points = torch.stack([a, b]).expand(len(place), -1, -1, -1, -1)
    return Rule(norm, "0")(points, torch.stack([1 - place, place], 1))


def _angle(a: Latent, b: Latent) -> float:
    """Return the angle between two latents in radians."""
    a, b = (x.double().flatten() / x.double().norm() for x in (a, b))
    # Kahan's formula loses no digits near 0 and π, unlike the arc cosine
    return 2 * math.atan2((a - b).norm().item(), (a + b).norm().item())


def _nao(a: Latent, b: Latent, count: int) -> Walk:
    """Walk along the geodesic of Samuel et al., arXiv 2306.08687, sec. 4.1, between a and b.

    The walk goes along the radius to a norm r, around at that norm, and along the radius to b. The
    true geodesic rounds the two corners, over an angle of about 1/√D. The norm r is the cheapest:
    near √(D − 1) if a and b are far apart, their own norms if they are close. Its latents are
    equally spaced, as the published penalty on long pieces demands.
    """
    turn = _angle(a, b)
    ends = torch.tensor([x.double().norm().item() for x in (a, b)], dtype=torch.float64)
    (first, last), middle = ends.tolist(), _cheapest(ends, turn, a.numel())
    corners = ends.new_tensor([[first, 0], [middle, 0], [middle, turn], [last, turn]])
    legs = ends.new_tensor([abs(middle - first), middle * turn, abs(last - middle)])
    far = torch.cat([legs.new_zeros(1), legs.cumsum(0)])
    goal = torch.linspace(0, 1, count, dtype=torch.float64) * far[-1]
    leg = torch.searchsorted(far, goal).clamp(1, 3)
    # norm and angle are linear in the length of each leg
    share = ((goal - far[leg - 1]) / legs[leg - 1].clamp_min(1e-300)).clamp(0, 1)
    radius, phi = torch.lerp(corners[leg - 1], corners[leg], share[:, None]).T
    if turn < 1e-9:
        on_a, on_b = 1 - phi, phi
    else:
        on_a, on_b = (turn - phi).sin() / math.sin(turn), phi.sin() / math.sin(turn)
    shares = (radius[:, None] * torch.stack([on_a, on_b], 1)).to(a.device)
    units = torch.stack([a, b]).double().flatten(1) / ends[:, None].to(a.device)
    return (shares @ units).unflatten(1, a.shape).to(a)


def _cheapest(ends: Float[Tensor, " 2"], turn: float, dim: int) -> float:
    """Find the norm of least cost for the arc: the climbs to and from it, and the arc itself."""
    reach = torch.cat([ends, ends.new_tensor([modal_norm(dim)])])
    radii = torch.linspace(reach.min().item(), reach.max().item(), 1025, dtype=torch.float64)
    height = climb(torch.cat([ends, radii]), dim) * (torch.cat([ends, radii]) - reach[2]).sign()
    ways = (height[:2, None] - height[2:]).abs().sum(0) - radii * turn * log_chi(radii, dim)
    return radii[ways.argmin()].item()


def _translation(a: Latent, b: Latent, count: int) -> Walk:
    """Slide a window over [a | b]."""
    return slide(torch.stack([a, b]), count)


def _cut(a: Latent, b: Latent, count: int) -> Walk:
    """Take the first columns from b and the others from a."""
    places = _columns(a.shape[-1], count)
    return torch.stack([torch.cat([b[..., :at], a[..., at:]], -1) for at in places])


def _columns(width: int, count: int) -> list[int]:
    """Return numbers of whole columns, from none to all, in equal steps."""
    return [round(width * step / max(count - 1, 1)) for step in range(count)]


def slide(latents: Float[Tensor, "n c h w"], count: int) -> Float[Tensor, "t c h w"]:
    """Slide a window over latents that stand side by side, from the first to the last.

    Ribeiro, *Exploring the latent space of text-to-image diffusion models*, 2023.

    Args:
        latents: joined along the width.
        count: number T of windows, in nearly equal steps of whole columns.
    """
    joined, width = torch.cat(list(latents), -1), latents.shape[-1]
    places = _columns(joined.shape[-1] - width, count)
    return torch.stack([joined[..., at : at + width] for at in places])


def tour(
    latents: Float[Tensor, "n c h w"], count: int, rule: Rule = Rule()
) -> Float[Tensor, "t c h w"]:
    r"""Walk a closed path through all latents, mixed by a rule.

    Landolsi & Kahl, *Addressing degeneracies in latent interpolation for diffusion models*, arXiv
    2505.07481, sec. 7, wish for morphing of many images. At the place φ in [0, 2π) latent n of N
    has the weight

    .. math:: w_n = \Bigl(\frac{\sin(N x_n / 2)}{N \sin(x_n / 2)}\Bigr)^2,
        \qquad x_n = φ - 2πn/N,

    Fejér's kernel: never negative, of sum 1, smooth, and 1 at the latent's own place, where all
    other weights are 0. Halfway between neighbours these have about 0.4 each.

    Args:
        latents: N ≥ 2.
        count: number T of latents on the path; T = kN passes each latent. After the last one comes
            the first again.
        rule: norm and mean split; ``nin``, ``fade`` and ``slerp`` pass through the latents
            themselves.

    Raises:
        UserError: fewer than two latents, or a rule that does not take N of them.

    >>> latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(tour(latents, 6, Rule("nin", "chm"))[::2], latents, atol=1e-5)
    True
    """
    number = len(latents)
    if number < 2:
        raise UserError(f"expected at least 2 latents for a tour, got {number}; pass more")
    place = torch.arange(count, dtype=torch.float64)[:, None] / count
    turn = place - torch.arange(number, dtype=torch.float64) / number
    weights = (torch.sinc(number * turn) / torch.sinc(turn)).square()  # sinc(x) = sin(πx)/(πx)
    return rule(latents.expand(count, *latents.shape), weights)


WALKS: dict[str, Callable[[Latent, Latent, int], Walk]] = {
    "lerp": partial(_by_rule, norm="lin"),
    "normalised": partial(_by_rule, norm="vp"),
    **{name: partial(_by_rule, norm=name) for name in ("nin", "fade", "slerp", "raw_slerp")},
    **{"circle": _circle, "nao": _nao, "translation": _translation, "slice": _cut},
}
"""Walks by name."""
_TURNING = ("slerp", "raw_slerp", "circle", "nao")  # from one direction to the other


def walk(
    a: Float[Tensor, "c h w"], b: Float[Tensor, "_ _ _"], count: int, name: str = "slerp"
) -> Float[Tensor, "t c h w"]:
    """Return latents on the way from a to b, in float32 (float64 stays float64).

    Args:
        a: the first latent, finite.
        b: the last, of the same shape.
        count: number T of latents, both ends included, at least 2.
        name: a key of `WALKS`.

    Raises:
        UserError: the walk is unknown, the count is below 2, or the ends do not fit.

    >>> a, b = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> walk(a, b, 5).shape
    torch.Size([5, 4, 8, 8])
    """
    way = lookup(WALKS, name, "walk")
    if count < 2:
        raise UserError(f"expected a walk of at least 2 latents, got {count}; both ends are in it")
    if a.shape != b.shape:
        raise UserError(
            f"expected two latents of one shape, got {tuple(a.shape)} and {tuple(b.shape)}; "
            "invert both with the same backbone"
        )
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    a, b = a.to(dtype), b.to(dtype)
    if not (a.sum() + b.sum()).isfinite():
        raise UserError("expected finite latents, got NaN or infinity; invert that image again")
    if name in _TURNING:
        turn = _angle(a, b) if a.any() and b.any() else math.pi
        if not (1e-3 if name == "circle" else -1) < turn < math.pi - 1e-3:
            raise UserError(
                f"expected latents of two directions for a {name} walk, got zero, opposite ones, "
                "or one twice; take lerp"
            )
    return way(a, b, count)
