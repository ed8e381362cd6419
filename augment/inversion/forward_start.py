"""Inversion that begins with forward diffusion: the default.

The latents of an inversion that starts at the clean image are not quite noise: they keep structure
of the image, mostly in its smooth regions, and the first steps put it there, where the image is
least noisy and the network's estimate of the noise worst (Staniszewski et al., *There and Back
Again*, arXiv 2410.23530). Those steps are replaced by what noising means: the clean latent is mixed
with fresh noise to a low level, and the solver goes on from there.

The latent is then as long and as white as noise is, and its image changed a little, by what that
noise drowned. For mixing that is the better bargain: RESULTS.md has the FID of centroids. Take
``fireflow`` where images have to come back as they were.
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


@dataclass(frozen=True)
class ForwardStart:
    """Noise up to a level, and inversion by `augment.diffusion.solver.fireflow` from there.

    Args:
        steps: solver steps of the whole way, the noised part included.
        start: the noise level where the solver takes over, in [0, 1); 0 is `FireFlow`.

    Raises:
        UserError: ``start`` out of range.
    """

    steps: int = 25
    start: float = 0.04
    solver: ClassVar[str] = "fireflow"
    guidance: ClassVar[float] = 1.0
    away: ClassVar[str] = "empty"

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise UserError(
                f"expected a level to start at in [0, 1), got {self.start}; 0.02 to 0.1 are usual"
            )

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        return self.steps - math.floor(self.start * self.steps + 1e-6) + 1

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """See `augment.inversion.Inverter`; the noise of an image is that of its seed."""
        process, latent = denoise.backbone.process, clean
        levels = process.levels(self.steps)
        if self.start >= levels[-1]:
            raise UserError(
                f"expected to start below the noisiest level of {self.steps} steps, "
                f"{levels[-1]:.3g}, got {self.start}; 0.02 to 0.1 are usual"
            )
        if self.start and len(clean):
            levels = [self.start, *(level for level in levels if level > self.start + 1e-9)]
            alpha, sigma = process.alpha_sigma(self.start)
            dice = [rng(seed, "forward") for seed in seeds]
            noise = torch.stack([normal(one, *clean.shape[1:]) for one in dice])
            latent = alpha * clean + sigma * noise.to(clean)
        return {"latents": fireflow(denoise, latent, levels, tick)}
