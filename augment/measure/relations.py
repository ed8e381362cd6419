r"""Relations between noises, inverted latents and samples.

Staniszewski et al., *There and Back Again*, arXiv 2410.23530: samples :math:`x_0` of noises
:math:`x_T`, and the latents :math:`\hat x_T` that inversion makes of those samples. A perfect
inversion gives the noise back. Real ones leave some of the image in the latent, which shows as
correlated pixels, as nearness to the image, and as a shift along the sampling trajectory.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from augment.centroid.residuals import TINY
from augment.core.errors import UserError
from augment.diffusion.backbone import Backbone
from augment.diffusion.solver import sample
from augment.measure.features import blocks


def top_correlations(
    tensors: Float[Tensor, "n c h w"], count: int = 10, patch: int = 8
) -> Float[Tensor, " p"]:
    """Return the mean of the largest |correlations| of element pairs, for each image patch.

    Correlations run over the n tensors, for every pair of elements (pixels and channels) of a
    patch. Table 1 of the paper is the mean over patches, 0.159 to 0.177 for noise. Fewer tensors
    correlate more by chance, so compare with the same number of noises.

    Args:
        tensors: noises, latents or samples; at least 3.
        count: number of largest correlations to average; 10 in the paper.
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


def assignment(
    tensors: Float[Tensor, "n ..."], others: Float[Tensor, "n ..."], centred: bool = False
) -> Bool[Tensor, " n"]:
    """Return whether each row's L2-nearest row among the others is the same row.

    The paper's x⁰ → x^T is ``assignment(samples, noises)``. Chance is 1/n. Samples of a common
    brightness are nearest to few noises; ``centred`` takes each set's mean out first.

    Args:
        tensors: rows to assign, (n, …).
        others: rows to assign to, (n, …).
        centred: subtract the mean row of each set.
    """
    a, b = tensors.flatten(1), others.flatten(1)
    if centred:
        a, b = a - a.mean(0), b - b.mean(0)
    return torch.cat([d.argmin(1) == torch.arange(len(a))[rows] for rows, d in blocks(a, b)])


class OffsetResponse(NamedTuple):
    """Result of `offset_response`: mean |change| of pixels by each of b offsets of n latents.

    Args:
        inside: in the top quarter, where it was added, (b, n).
        outside: elsewhere, (b, n).
        images: image of the first latent without an offset and under each, (1 + b, C, H, W).
    """

    inside: Float[Tensor, "b n"]
    outside: Float[Tensor, "b n"]
    images: Float[Tensor, "s c h w"]


def offset_response(
    backbone: Backbone,
    noises: Float[Tensor, "n c h w"],
    offsets: Sequence[float] = (0.1, 0.2, 0.4, 0.8),
    at: Literal["T", "0"] = "T",
    solver: str = "ddim",
    steps: int = 50,
) -> OffsetResponse:
    """Measure what an offset of two channels in the top quarter of a latent changes.

    The set-up of Landolsi & Kahl, arXiv 2505.07481, Fig. 6: channel 0 is lowered by b and channel 1
    raised by b, so that the mean over channels stays. At t = 0 the decoder alone answers to it; at
    t = T a network may take it for a remnant of a picture.

    Args:
        backbone: the diffusion model, of at least two latent channels.
        noises: latents at the last level.
        offsets: the b offsets.
        at: ``T``: added to the noises; ``0``: to the sampled clean latents, before decoding.
        solver: see `augment.sample`.
        steps: see `augment.sample`.
    """
    plain = sample(backbone, noises, None, solver, steps)
    clean = backbone.encode(plain)
    if at == "0":
        plain = backbone.decode(clean)
    rows, inside, outside = plain.shape[-2] // 4, [], []
    images = [plain[0].cpu()]
    for offset in offsets:
        if at == "0":
            made = backbone.decode(shifted(clean, offset))
        else:
            made = sample(backbone, shifted(noises, offset), None, solver, steps)
        change = (made - plain).abs().cpu()
        inside.append(change[..., :rows, :].flatten(1).mean(1))
        outside.append(change[..., rows:, :].flatten(1).mean(1))
        images.append(made[0].cpu())
    return OffsetResponse(torch.stack(inside), torch.stack(outside), torch.stack(images))


def shifted(latents: Float[Tensor, "n c h w"], offset: float) -> Float[Tensor, "n c h w"]:
    """Lower channel 0 and raise channel 1 by an offset, in the top quarter of latents."""
    latents = latents.clone()
    rows = latents.shape[-2] // 4
    latents[:, 0, :rows] -= offset
    latents[:, 1, :rows] += offset
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
