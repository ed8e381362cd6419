r"""One deterministic first-order step, used in both directions.

Given the estimates :math:`(\hat z_0, \hat\varepsilon)` at a level, the step to another level u is

.. math:: z_u = \alpha(u)\,\hat z_0 + \sigma(u)\,\hat\varepsilon .

Read with a variance-preserving process this is DDIM with η = 0 (Song et al., arXiv 2010.02502,
eq. 12); read with rectified flow it is the Euler step, exactly. Sampling walks the levels down;
inversion (`augment.inversion`) walks the same levels up.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from augment.diffusion.backbone import Backbone, Denoiser, batched, denoiser
from augment.diffusion.process import Process
from augment.errors import UserError, lookup


def ddim(
    denoise: Denoiser, process: Process, latent: Tensor, steps: int, tick: Callable[[], Any]
) -> Tensor:
    """Latent to clean latent in ``steps`` first-order steps."""
    for here, there in pairwise(reversed(process.levels(steps))):
        clean, noise = denoise(latent, here)
        alpha, sigma = process.alpha_sigma(there)
        latent = alpha * clean + sigma * noise
        tick()
    return latent


SOLVERS = {"ddim": ddim, "euler": ddim}
"""Solvers by name."""


def sample(
    backbone: Backbone,
    latents: Float[Tensor, "n c h w"],
    prompts: str | Sequence[str] | None = None,
    solver: str = "ddim",
    steps: int = 50,
    guidance: float = 1.0,
    batch_size: int = 64,
) -> Float[Tensor, "n channels height width"]:
    """Images of latents.

    Args:
        backbone: the model.
        latents: at the noisiest level, of the backbone's latent shape.
        prompts: one for all, one a row, or none.
        solver: a key of `SOLVERS`.
        steps: network evaluations an image (twice that with guidance).
        guidance: scale of classifier-free guidance; 1 is none.
        batch_size: rows a network call.

    Returns:
        float32 images in [0, 1] on the backbone's device.

    Raises:
        UserError: an unknown solver, no steps, or latents of another shape.
    """
    run_solver = lookup(SOLVERS, solver, "solver")
    if tuple(latents.shape[1:]) != tuple(backbone.latent_shape):
        raise UserError(
            f"expected latents of shape (N, {', '.join(map(str, backbone.latent_shape))}), "
            f"got {tuple(latents.shape)}; invert images with this backbone"
        )
    check_steps(steps)

    def run(part: Tensor, texts: list[str], tick: Callable[[], Any]) -> Tensor:
        denoise = denoiser(backbone, texts, guidance)
        latent = part.to(backbone.device, torch.float32)
        return backbone.decode(run_solver(denoise, backbone.process, latent, steps, tick))

    return batched(run, latents, prompts, batch_size, steps, "sample")


def check_steps(steps: int) -> None:
    """Refuse less than one solver step."""
    if steps < 1:
        raise UserError(f"expected at least 1 solver step, got {steps}; 20 to 50 are usual")
