"""Inversion that begins with forward diffusion: the default.

The latents of an inversion that starts at the clean image are not quite noise: they contain
structure of the image, mostly of its smooth regions. It comes from the first steps, where the image
is least noisy and the network's estimate of the noise worst (Staniszewski et al., *There and Back
Again*, arXiv 2410.23530). Forward diffusion replaces these steps: the clean latent is mixed with
fresh noise up to a low level, where the solver takes over.

The latent then has the norm and the spectrum of noise, and its image changes a little. For mixing
that is better: RESULTS.md has the FID of centroids. Take ``fireflow`` for exact reconstruction.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.core.rng import normal, rng
from augment.diffusion.backbone import Denoiser
from augment.diffusion.solver import fireflow
from augment.inversion.ddim import DDIM


@dataclass(frozen=True)
class ForwardStart(DDIM):
    """Noise up to a level, and inversion by `augment.diffusion.solver.fireflow` from there.

    Args:
        steps: solver steps from level 0, those that noise replaces included.
        start: noise level where the solver takes over, in [0, 1); 0 is `FireFlow`.

    Raises:
        UserError: ``start`` out of range.
    """

    steps: int = 25
    start: float = 0.04
    solver: ClassVar[str] = "fireflow"

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise UserError(
                f"expected a level to start at in [0, 1), got {self.start}; 0.02 to 0.1 are usual"
            )

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        return self.steps_made - math.floor(self.start * self.steps + 1e-6) + 1

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """See `augment.inversion.Inverter`; an image's noise depends on its seed alone."""
        process, latent = denoise.backbone.process, clean
        levels = self.levels(process)
        if self.start >= levels[-1]:
            raise UserError(
                f"expected to start below the last level of {self.steps_made} steps, "
                f"{levels[-1]:.3g}, got {self.start}; 0.02 to 0.1 are usual"
            )
        if self.start and len(clean):
            levels = [self.start, *(level for level in levels if level > self.start + 1e-9)]
            alpha, sigma = process.alpha_sigma(self.start)
            generators = [rng(seed, "forward") for seed in seeds]
            noise = torch.stack([normal(generator, *clean.shape[1:]) for generator in generators])
            latent = alpha * clean + sigma * noise.to(clean)
        return {"latents": fireflow(denoise, latent, levels, tick)}
