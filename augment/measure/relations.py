r"""How noises, inverted latents and samples lie to each other.

Staniszewski et al., *There and Back Again*, arXiv 2410.23530: samples :math:`x_0` of noises
:math:`x_T`, and the latents :math:`\hat x_T` that inversion makes of those samples. A perfect
inversion gives the noise back; real ones leave some of the image in the latent, which shows as
correlation of its pixels, as nearness to the image, and as a shift along the way of sampling.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from augment.centroid.residuals import TINY
from augment.diffusion.backbone import Backbone
from augment.diffusion.solver import sample
from augment.errors import UserError
from augment.measure.features import blocks


def top_correlations(
    tensors: Float[Tensor, "n c h w"], count: int = 20, patch: int = 8
) -> Float[Tensor, " p"]:
    """The mean of the largest |correlations| of two elements, for each patch of the picture.

    Over the n tensors, of every pair of elements (pixels and channels) of a patch. Table 1 of the
    paper is its mean: 0.039 for noise with 10 240 tensors. Fewer tensors correlate more by chance,
    so compare with noise of the same number.

    Args:
        tensors: noises, latents or samples; at least 3.
        count: how many of the largest; 20 in the paper.
        patch: rows and columns of a patch; 8 in the paper.

    Raises:
        UserError: there are fewer than 3 tensors.
    """
    if len(tensors) < 3:
        raise UserError(f"expected at least 3 tensors to correlate, got {len(tensors)}")
    found = []
    for rows in tensors.double().split(patch, dim=-2):
        for part in rows.split(patch, dim=-1):
            x = part.flatten(1) - part.flatten(1).mean(0)
            x = x / x.norm(dim=0).clamp_min(TINY)
            upper = (x.T @ x).triu(1).abs().flatten()
            found.append(upper.topk(min(count, x.shape[1] * (x.shape[1] - 1) // 2)).values.mean())
    return torch.stack(found)


def assignment(tensors: Float[Tensor, "n ..."], others: Float[Tensor, "n ..."]) -> float:
    """How often the nearest of the others, by L2, is the one of the same row; in [0, 1].

    Of noises and samples: noise → sample as ``assignment(noises, samples)``, and the other way
    round. Chance is 1/n.

    Args:
        tensors: what looks for its other half.
        others: among which it looks.
    """
    a, b = tensors.flatten(1), others.flatten(1)
    hits = [(d.argmin(1) == torch.arange(len(a))[rows]) for rows, d in blocks(a, b)]
    return torch.cat(hits).double().mean().item()


class OffsetResponse(NamedTuple):
    """What `offset_response` found, for the channel that was shifted.

    Args:
        slope: of the clean latent's mean in the offset: where it was added, and elsewhere.
        images: (b, channels, height, width), of the first noise under each offset.
    """

    slope: Float[Tensor, " 2"]
    images: Float[Tensor, "b c h w"]


def offset_response(
    backbone: Backbone,
    noises: Float[Tensor, "n c h w"],
    channel: int,
    offsets: Sequence[float] = (-0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5),
    solver: str = "ddim",
    steps: int = 50,
) -> OffsetResponse:
    """What an offset of one channel at t = T, in the left half, does to the clean latent.

    Landolsi & Kahl, arXiv 2505.07481, Fig. 6. The same offset at t = 0 has slopes 1 and 0; at t = T
    a network may take it for what is left there of a picture, and answer with up to 1/α(T).

    Args:
        backbone: the model.
        noises: at the last level.
        channel: that is shifted.
        offsets: b, of which one is not 0.
        solver: see `augment.sample`.
        steps: see there.
    """
    means, images = [], []
    for offset in offsets:
        made = sample(backbone, shifted(noises, channel, offset), None, solver, steps)
        clean = backbone.encode(made)[:, channel].cpu()
        means.append(torch.stack([x.mean() for x in clean.tensor_split(2, dim=-1)]))
        images.append(made[0].cpu())
    b = torch.tensor(offsets, dtype=torch.float32)
    b = b - b.mean()
    return OffsetResponse(b @ torch.stack(means).float() / b.square().sum(), torch.stack(images))


def shifted(
    latents: Float[Tensor, "n c h w"], channel: int, offset: float
) -> Float[Tensor, "n c h w"]:
    """Latents with an offset in the left half of one channel."""
    latents = latents.clone()
    latents[:, channel, :, : (latents.shape[-1] + 1) // 2] += offset
    return latents


class Approach(NamedTuple):
    """What `approach` found, (t, s) each: steps down, places on the segment across.

    Args:
        distance: mean L2 distance of the sample on its way from the places.
        places: in [0, 1]: 0 is the noise, 1 the latent.
    """

    distance: Float[Tensor, "t s"]
    places: Float[Tensor, " s"]


def approach(
    ways: Float[Tensor, "t n c h w"],
    noises: Float[Tensor, "n c h w"],
    latents: Float[Tensor, "n c h w"],
    count: int = 11,
) -> Approach:
    """How near a sample on its way passes by points on the segment from its noise to its latent.

    Fig. 5 of the first version of the paper: latents lie between noise and sample, if the way from
    the noise comes nearer to the latent before it leaves.

    Args:
        ways: of sampling from the noises, the first the noises themselves.
        noises: of the samples.
        latents: that inversion made of the samples.
        count: points on the segment, both ends among them.
    """
    places = torch.linspace(0, 1, count, dtype=torch.float64)
    a, b = noises.double().flatten(1), latents.double().flatten(1)
    points = torch.stack([torch.lerp(a, b, float(place)) for place in places])
    rows = [(points - x.double().flatten(1)).norm(dim=2).mean(1) for x in ways]
    return Approach(torch.stack(rows), places)
