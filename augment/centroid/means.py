"""Mean splits: which part of a latent is averaged plainly and kept out of the norm rule.

Inverted latents share a small bias (their channel means are not zero). A norm rule that lengthens
the average of N latents √N-fold lengthens that bias too, until the images degenerate. A split
z = d + e takes the bias d out; only the residual e is rescaled. (Landolsi & Kahl, *Mean-adjusted
interpolation*, arXiv 2505.07481, sec. 4.)

Each split is a function (B, K, C, H, W) → d of a shape that broadcasts to it:

========  ====================================================
split     d
========  ====================================================
``0``     nothing
``m``     the mean over all of the latent
``chm``   the mean of each channel
``lp``    the low frequencies: a Gaussian blur of σ = 2 latent pixels, reflected at the border
========  ====================================================
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Latents = Float[Tensor, "b k c h w"]
Means = Float[Tensor, "#b #k #c #h #w"]
LOW_PASS_SIGMA = 2.0


def nothing(points: Latents) -> Means:
    return torch.zeros_like(points[..., :1, :1, :1])


def latent_mean(points: Latents) -> Means:
    return points.mean((-3, -2, -1), keepdim=True)


def channel_mean(points: Latents) -> Means:
    return points.mean((-2, -1), keepdim=True)


def low_pass(points: Latents, sigma: float = LOW_PASS_SIGMA) -> Latents:
    """A separable Gaussian blur of unit DC gain."""
    flat = points.flatten(0, 1)
    for dim in (-2, -1):
        # reflection cannot reach further than the other edge
        reach = min(math.ceil(3 * sigma), flat.shape[dim] - 1)
        kernel = torch.exp(-torch.arange(-reach, reach + 1).to(flat).square() / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).repeat(flat.shape[1], 1, 1, 1)
        pad, weight = (
            ((0, 0, reach, reach), kernel.mT) if dim == -2 else ((reach, reach, 0, 0), kernel)
        )
        flat = F.conv2d(F.pad(flat, pad, mode="reflect"), weight, groups=flat.shape[1])
    return flat.unflatten(0, points.shape[:2])


MEANS: dict[str, Callable[[Latents], Means]] = {
    "0": nothing,
    "m": latent_mean,
    "chm": channel_mean,
    "lp": low_pass,
}
"""Mean splits by name."""
