r"""Deterministic solvers of the probability-flow ODE, used in both directions.

A network's answer at a level is a pair of estimates :math:`(\hat z_0, \hat\varepsilon)`, and for
any process the ODE reads

.. math:: dz = \hat z_0\, d\alpha + \hat\varepsilon\, d\sigma .

A solver walks a list of levels: down, it samples; up the same list, it inverts
(`augment.inversion`). What it cannot do alike in both directions is ask at level 0, which no
network was trained on: there the estimate of the noise is made at the level gone to, or halfway.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError, lookup
from augment.diffusion.backbone import Backbone, Denoiser, batched, denoiser
from augment.diffusion.conditions import Given, rows_of
from augment.diffusion.process import Pair, levels_to

Solver = Callable[[Denoiser, Tensor, Sequence[float], Callable[[], Any]], Tensor]
"""(denoise, latent at the first level, levels, tick) → latent at the last level."""


def ddim(
    denoise: Denoiser,
    latent: Float[Tensor, "n c h w"],
    levels: Sequence[float],
    tick: Callable[[], Any] = lambda: None,
) -> Float[Tensor, "n c h w"]:
    r"""First order: :math:`z_u = \alpha(u)\,\hat z_0 + \sigma(u)\,\hat\varepsilon`.

    Read with a variance-preserving process this is DDIM with η = 0 (Song et al., arXiv 2010.02502,
    eq. 12) and the Euler step of k-diffusion; with rectified flow it is the Euler step, exactly.
    One evaluation a step.
    """
    process = denoise.backbone.process
    for here, there in pairwise(levels):
        alpha, sigma = process.alpha_sigma(there)
        clean, noise = estimates(denoise, latent, here, there)
        latent = alpha * clean + sigma * noise
        tick()
    return latent


def dpm(
    denoise: Denoiser,
    latent: Float[Tensor, "n c h w"],
    levels: Sequence[float],
    tick: Callable[[], Any] = lambda: None,
) -> Float[Tensor, "n c h w"]:
    r"""DPM-Solver++(2M): second order from the clean estimate of the step before.

    Lu et al., *DPM-Solver++*, arXiv 2211.01095, alg. 2, in :math:`\lambda = \log(\alpha/\sigma)`;
    the first step and the one to level 0 are of first order. One evaluation a step. Only downwards:
    upwards it is unstable below some 20 steps.
    """
    process, before = denoise.backbone.process, None
    for here, there in pairwise(levels):
        (alpha_s, sigma_s), (alpha, sigma) = map(process.alpha_sigma, (here, there))
        clean, _ = denoise(latent, here)
        ratio = 0.0 if sigma == 0 else sigma / sigma_s  # e^{-h} = ratio · α_s/α
        direction = clean
        step = math.log(max(alpha, TINY) / max(sigma, TINY))
        step -= math.log(max(alpha_s, TINY) / max(sigma_s, TINY))
        if before is not None and sigma > 0:
            last_clean, last_step = before
            direction = clean + step / (2 * last_step) * (clean - last_clean)
        latent = ratio * latent + (alpha - ratio * alpha_s) * direction
        before = clean, step if alpha_s > 0 else math.inf
        tick()
    return latent


def midpoint(
    denoise: Denoiser,
    latent: Float[Tensor, "n c h w"],
    levels: Sequence[float],
    tick: Callable[[], Any] = lambda: None,
) -> Float[Tensor, "n c h w"]:
    """Second order: a first-order half step, and the whole one by the estimates found there.

    For rectified flow this is RF-Solver (Wang et al., arXiv 2411.04746). Two evaluations a step.
    """
    for here, there in pairwise(levels):
        middle = denoise.backbone.process.middle(here, there)
        latent, _ = halfway(denoise, latent, (here, middle, there), None)
        tick()
    return latent


def fireflow(
    denoise: Denoiser,
    latent: Float[Tensor, "n c h w"],
    levels: Sequence[float],
    tick: Callable[[], Any] = lambda: None,
) -> Float[Tensor, "n c h w"]:
    """`midpoint` at one evaluation a step: half steps reuse the last middle's estimates.

    Deng et al., *FireFlow*, arXiv 2412.07517, for rectified flow; here for any process.
    The first step takes one evaluation more.
    """
    last = None
    for here, there in pairwise(levels):
        middle = denoise.backbone.process.middle(here, there)
        latent, last = halfway(denoise, latent, (here, middle, there), last)
        tick()
    return latent


def halfway(
    denoise: Denoiser, latent: Tensor, way: tuple[float, float, float], pair: Pair | None
) -> tuple[Tensor, Pair]:
    """Step from way[0] by way[1] to way[2]; return the latent, and the estimates at way[1]."""
    here, middle, there = way
    if pair is None:
        pair = estimates(denoise, latent, here, middle)
    half = move(denoise, latent, here, middle, pair)
    pair = denoise(half, middle)
    return move(denoise, latent, here, there, pair), pair


def estimates(denoise: Denoiser, latent: Tensor, here: float, there: float) -> Pair:
    """(clean, noise) at ``here``; at level 0 the latent is clean, and its noise asked for there."""
    clean, noise = denoise(latent, here or there)
    return (clean if here else latent), noise


def move(denoise: Denoiser, latent: Tensor, here: float, there: float, pair: Pair) -> Tensor:
    """One step of the ODE with constant estimates."""
    process = denoise.backbone.process
    (alpha_s, sigma_s), (alpha, sigma) = map(process.alpha_sigma, (here, there))
    return latent + (alpha - alpha_s) * pair[0] + (sigma - sigma_s) * pair[1]


TINY = 1e-30
SOLVERS: dict[str, Solver] = {
    "ddim": ddim,
    "dpm++": dpm,
    "midpoint": midpoint,
    "fireflow": fireflow,
}
"""Solvers by name."""


def sample(
    backbone: Backbone,
    latents: Float[Tensor, "n c h w"],
    prompts: Given = None,
    solver: str = "fireflow",
    steps: int = 25,
    guidance: float = 1.0,
    batch_size: int = 64,
    interval: tuple[float, float] = (0.0, 1.0),
    negative: Given = None,
    level: float | None = None,
) -> Float[Tensor, "n channels height width"]:
    """Sample and decode latents.

    Args:
        backbone: the model.
        latents: at ``level``, of the backbone's latent shape.
        prompts: one for all, one a row, or none; or embeddings, or a schedule of either by level:
            see `augment.diffusion.conditions`.
        solver: a key of `SOLVERS`.
        steps: solver steps, each a network evaluation (two with ``midpoint``; twice with guidance).
        guidance: scale of classifier-free guidance; 1 is none.
        batch_size: rows a network call; halved if they do not fit into a GPU's memory.
        interval: noise levels, of 0 to 1, between which there is guidance.
        negative: what to guide away from, as ``prompts``; the empty prompt by default.
        level: noise level u of the latents, from where the grid of ``steps`` below it is walked;
            the noisiest one by default, and at 0 the latents are clean and only decoded.

    Returns:
        float32 images in [0, 1] on the backbone's device.

    Raises:
        UserError: an unknown solver, no steps, a level outside [0, 1], or latents or embeddings of
            another shape.
    """
    run_solver = lookup(SOLVERS, solver, "solver")
    if tuple(latents.shape[1:]) != tuple(backbone.latent_shape):
        raise UserError(
            f"expected latents of shape (N, {', '.join(map(str, backbone.latent_shape))}), "
            f"got {tuple(latents.shape)}; invert images with this backbone"
        )
    check_steps(steps)
    texts, others = rows_of(prompts, len(latents)), rows_of(negative, len(latents))
    if level is not None and not 0 <= level <= 1:
        raise UserError(f"expected latents at a noise level in [0, 1], got {level}")
    levels = levels_to(backbone.process, steps, level)[::-1]

    @torch.no_grad()
    def run(rows: slice, tick: Callable[[], Any]) -> Tensor:
        denoise = denoiser(backbone, texts[rows], guidance, interval, others[rows])
        latent = latents[rows].to(backbone.device, torch.float32)
        return backbone.decode(run_solver(denoise, latent, levels, tick))

    walked = max(len(levels) - 1, 1)
    return torch.cat(batched(run, backbone, len(latents), batch_size, walked, "sample"))


def check_images(
    backbone: Backbone, images: Float[Tensor, "n channels h w"]
) -> Float[Tensor, "n channels h w"]:
    """Return synthetic images; refuse those that are not finite, or in half precision all black.

    Overflow in half precision comes out black on some devices, such as Apple's GPUs. `sample` does
    not call it, for a bank leaves images out one by one.

    Raises:
        UserError: they are refused.
    """
    dtype = getattr(backbone, "dtype", torch.float32)
    if not images.isfinite().all():
        wrong = "some that are not"
    elif dtype != torch.float32 and len(images) and not images.any():
        wrong = "only black ones"
    else:
        return images
    raise UserError(
        f"expected images of finite pixels, got {wrong}, in {dtype} on {backbone.device}; take "
        "dtype float32, and look by latent-augment check whether the model works"
    )


def check_steps(steps: int) -> None:
    """Refuse less than one solver step."""
    if steps < 1:
        raise UserError(f"expected at least 1 solver step, got {steps}; 20 to 50 are usual")
