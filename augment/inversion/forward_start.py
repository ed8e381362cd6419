"""DDIM inversion that begins with forward diffusion.

The latents of plain DDIM inversion are not quite noise: they keep structure of the image, mostly in
its smooth regions, and the first steps put it there, where the image is least noisy and the
network's estimate of the noise worst (*There and Back Again*, ICLR 2026). Those steps are replaced
by what noising means: the clean latent is mixed with fresh noise to the level where they end. The
latent is more Gaussian and its image less faithful, by what that much noise drowns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from augment.diffusion.backbone import Denoiser
from augment.diffusion.solver import ddim
from augment.errors import UserError
from augment.seeds import normal, rng


@dataclass(frozen=True)
class ForwardStart:
    """DDIM inversion from a noised latent.

    Args:
        steps: solver steps of the whole way.
        forward: how many of them the noise stands for, from 0 to below ``steps``.

    Raises:
        UserError: ``forward`` out of range.
    """

    steps: int = 50
    forward: int = 3
    solver: ClassVar[str] = "ddim"
    guidance: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.forward < max(self.steps, 1):
            raise UserError(
                f"expected 0 ≤ forward < steps, got {self.forward} of {self.steps}; 2 or 3 of 50 "
                "are usual"
            )

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        return self.steps - self.forward

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """See `augment.inversion.Inverter`; the noise of an image is that of its seed."""
        process, latent = denoise.backbone.process, clean
        levels = process.levels(self.steps)[self.forward :]
        if self.forward and len(clean):
            alpha, sigma = process.alpha_sigma(levels[0])
            dice = [rng(seed, "forward") for seed in seeds]
            noise = torch.stack([normal(one, *clean.shape[1:]) for one in dice])
            latent = alpha * clean + sigma * noise.to(clean)
        for _ in range(self.forward):
            tick()
        return {"latents": ddim(denoise, latent, levels, tick)}
