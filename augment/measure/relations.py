r"""Relations between noises, inverted latents and samples.

Staniszewski et al., *There and Back Again*, arXiv 2410.23530: samples :math:`x_0` of noises
:math:`x_T`, and the latents :math:`\hat x_T` that inversion makes of those samples. A perfect
inversion gives the noise back. Real ones leave some of the image in the latent, which shows as
correlated pixels, as nearness to the image, and as a shift along the sampling trajectory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from augment.centroid.residuals import TINY
from augment.core.errors import UserError
from augment.diffusion.backbone import Backbone
from augment.diffusion.solver import sample
from augment.measure.features import blocks


def top_correlations(
    tensors: Float[Tensor, "n c h w"], count: int = 20, patch: int = 8
) -> Float[Tensor, " p"]:
    """Return the mean of the largest |correlations| of element pairs, for each image patch.

    Correlations run over the n tensors, for every pair of elements (pixels and channels) of a
    patch. Table 1 of the paper is the mean over patches: 0.039 for noise with 10 240 tensors. Fewer
    tensors correlate more by chance, so compare with the same number of noises.

    Args:
        tensors: noises, latents or samples; at least 3.
        count: number of largest correlations to average; 20 in the paper.
        patch: side of a patch in pixels; 8 in the paper.

    Raises:
        UserError: there are fewer than 3 tensors.
    """
    if len(tensors) < 3:
        raise UserError(f"expected at least 3 tensors to correlate, got {len(tensors)}")
    largest = []
    for rows in tensors.double().split(patch, dim=-2):
        for part in rows.split(patch, dim=-1):
            x = part.flatten(1) - part.flatten(1).mean(0)
            x = x / x.norm(dim=0).clamp_min(TINY)
            upper = (x.T @ x).triu(1).abs().flatten()
            largest.append(upper.topk(min(count, x.shape[1] * (x.shape[1] - 1) // 2)).values.mean())
    return torch.stack(largest)


def assignment(tensors: Float[Tensor, "n ..."], others: Float[Tensor, "n ..."]) -> float:
    """Return the share of rows whose L2-nearest row among the others is the same row.

    Noise → sample is ``assignment(noises, samples)``. Chance is 1/n.

    Args:
        tensors: rows to assign, (n, …).
        others: rows to assign to, (n, …).
    """
    a, b = tensors.flatten(1), others.flatten(1)
    hits = [(d.argmin(1) == torch.arange(len(a))[rows]) for rows, d in blocks(a, b)]
    return torch.cat(hits).double().mean().item()


class OffsetResponse(NamedTuple):
    """Result of `offset_response`, for the channel that was shifted.

    Args:
        slope: slope of the clean mean against the offset, where it was added and elsewhere.
        images: image of the first noise under each offset, (b, channels, height, width).
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
    """Measure what an offset of one channel at t = T, in the left half, does to the clean latent.

    Compare Landolsi & Kahl, arXiv 2505.07481, Fig. 6. The same offset at t = 0 has slopes 1 and 0.
    At t = T a network may mistake it for a remnant of a picture and answer with up to 1/α(T).

    Args:
        backbone: the diffusion model.
        noises: latents at the last level.
        channel: index of the channel that is shifted.
        offsets: the b offsets; at least one is not 0.
        solver: see `augment.sample`.
        steps: see `augment.sample`.
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
    """Add an offset to the left half of one channel of latents."""
    latents = latents.clone()
    latents[:, channel, :, : (latents.shape[-1] + 1) // 2] += offset
    return latents


class Approach(NamedTuple):
    """Result of `approach`.

    Args:
        distance: mean L2 distance of the trajectory at each of t steps from each of s places.
        places: places on the segment, in [0, 1]: 0 is the noise, 1 the latent.
    """

    distance: Float[Tensor, "t s"]
    places: Float[Tensor, " s"]


def approach(
    ways: Float[Tensor, "t n c h w"],
    noises: Float[Tensor, "n c h w"],
    latents: Float[Tensor, "n c h w"],
    count: int = 11,
) -> Approach:
    """Measure how near sampling trajectories pass the segments from noises to inverted latents.

    Compare Fig. 5 of the first version of the paper: latents lie between noise and sample if the
    trajectory comes nearer to the latent before it leaves.

    Args:
        ways: sampling trajectories, (t, n, C, H, W); the first entry holds the noises.
        noises: noises of the samples, (n, C, H, W).
        latents: inverted latents of the samples, (n, C, H, W).
        count: number of places on the segment, both ends included.
    """
    places = torch.linspace(0, 1, count, dtype=torch.float64)
    a, b = noises.double().flatten(1), latents.double().flatten(1)
    points = torch.stack([torch.lerp(a, b, float(place)) for place in places])
    rows = [(points - x.double().flatten(1)).norm(dim=2).mean(1) for x in ways]
    return Approach(torch.stack(rows), places)
