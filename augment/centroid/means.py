r"""Mean splits: which part of a latent is averaged plainly and kept out of the norm rule.

Inverted latents share a small bias: their channel means are not zero. A norm rule that lengthens
the average of N latents √N-fold lengthens that bias too, until the images degenerate. A split
z = d + e takes the bias d out, and only the residual e is rescaled (Landolsi & Kahl, *Addressing
degeneracies in latent interpolation for diffusion models*, arXiv 2505.07481, sec. 5).

Each split is a *linear* map (\*b, C, H, W) → d of a shape that broadcasts to it, so that the split
of a mixture is the mixture of the splits:

========  =====================================================================
split     d
========  =====================================================================
``0``     nothing
``m``     the mean over all of the latent
``chm``   the mean of each channel
``lp``    the low frequencies: a Gaussian blur of σ = 2 latent pixels
``lp0.5`` the same of another σ; ``lp∞`` or ``lpinf`` is ``chm``
``mu``    for every point the same latent μ, given to the rule; zero if none is
========  =====================================================================

The blur reflects the latent at its border (d c b a | a b c d | d c b a). Such a blur is diagonal in
the cosines of the DCT-II, with gain exp(−σ²ω²/2) at frequency ω: its gain at ω = 0 is exactly 1,
it keeps every channel's mean, and for σ → ∞ nothing but that mean is left.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError, lookup

Latents = Float[Tensor, "*b c h w"]
Means = Float[Tensor, "*b #c #h #w"]
Split = Callable[[Latents], Means]
LOW_PASS_SIGMA = 2.0
CPU = torch.device("cpu")


def nothing(latents: Latents) -> Means:
    return torch.zeros_like(latents[..., :1, :1, :1])


def latent_mean(latents: Latents) -> Means:
    return latents.mean((-3, -2, -1), keepdim=True)


def channel_mean(latents: Latents) -> Means:
    return latents.mean((-2, -1), keepdim=True)


@lru_cache(maxsize=32)
def blur(
    size: int, sigma: float, dtype: torch.dtype = torch.float64, device: torch.device = CPU
) -> Float[Tensor, "n n"]:
    """Return the matrix of a Gaussian blur of ``size`` pixels in a row, computed in float64."""
    with torch.inference_mode(False):  # the cached matrix may be used where gradients are wanted
        frequency = torch.arange(size, dtype=torch.float64) * (math.pi / size)
        cosines = torch.cos(frequency[:, None] * (torch.arange(size) + 0.5))
        cosines = cosines / torch.linalg.vector_norm(cosines, dim=1, keepdim=True)
        gain = torch.exp(-(sigma**2) * frequency.square() / 2)
        return (cosines.mT @ (gain[:, None] * cosines)).to(device, dtype)


def low_pass(latents: Latents, sigma: float = LOW_PASS_SIGMA) -> Latents:
    """Blur by a Gaussian of ``sigma`` latent pixels and unit DC gain, with reflecting borders."""
    height, width = (blur(n, sigma, latents.dtype, latents.device) for n in latents.shape[-2:])
    return height @ latents @ width


MEANS: dict[str, Split] = {
    **{"0": nothing, "m": latent_mean, "chm": channel_mean, "lp": low_pass},
    "mu": nothing,
}
"""Mean splits by name; ``lp`` followed by a number is a name too. The rule handles ``mu``."""


def split_named(name: str) -> Split:
    """Look a mean split up; raise `UserError` for an unknown name or a σ of ``lpσ`` ≤ 0."""
    if name not in MEANS and name.startswith("lp"):
        try:
            sigma = float(name[2:].replace("∞", "inf"))
        except ValueError:
            sigma = math.nan
        if not sigma > 0:
            raise UserError(
                f"expected lp and the width of a blur in latent pixels, such as lp2.0 or lp∞, got "
                f"{name!r}; plain lp is lp{LOW_PASS_SIGMA}"
            )
        return channel_mean if math.isinf(sigma) else partial(low_pass, sigma=sigma)
    return lookup(MEANS, name, "mean split")
