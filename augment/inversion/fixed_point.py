r"""Fixed-point inversion: the sampler's DDIM step undone, not approximated.

Sampling goes from :math:`z_{u'}` to :math:`z_u = \alpha\hat z_0 + \sigma\hat\varepsilon` with the
estimates at :math:`(z_{u'}, u')`. Solved for where it came from, with the noise estimate in hand,

.. math:: z_{u'} = \alpha' \,\frac{z_u - \sigma\hat\varepsilon(z_{u'}, u')}{\alpha}
          + \sigma'\,\hat\varepsilon(z_{u'}, u'),

a fixed point of :math:`z_{u'}`, found by iterating (AIDI, Pan et al., arXiv 2309.04907; ReNoise,
Garibi et al., arXiv 2403.14602, which also averages the estimates of several iterations).

The first guess costs nothing here: the last iteration of the step before asked at the very place
this one starts from, so its estimates make a DDIM step. So one iteration a step takes as many
evaluations as plain DDIM inversion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from augment.diffusion.backbone import Denoiser
from augment.diffusion.solver import estimates
from augment.errors import UserError


@dataclass(frozen=True)
class FixedPoint:
    """DDIM inversion with fixed-point iterations.

    Args:
        steps: solver steps.
        iterations: network evaluations a step, from 1.
        average: how many of the last iterations' noise estimates are averaged, from 1 (none).

    Raises:
        UserError: iterations or average out of range.
    """

    steps: int = 50
    iterations: int = 2
    average: int = 1
    solver: ClassVar[str] = "ddim"
    guidance: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.average <= self.iterations:
            raise UserError(
                f"expected 1 ≤ average ≤ iterations, got {self.average} and {self.iterations}; "
                "2 iterations without averaging (average 1) are usual"
            )

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        return self.steps * self.iterations + 1

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """See `augment.inversion.Inverter`."""
        process = denoise.backbone.process
        levels = process.levels(self.steps)
        latent = clean
        guess, noise = estimates(denoise, clean, levels[0], levels[1])
        for here, there in pairwise(levels):
            (alpha_s, sigma_s), (alpha, sigma) = map(process.alpha_sigma, (here, there))
            moved, found = alpha * guess + sigma * noise, []
            for _ in range(self.iterations):
                guess, noise = denoise(moved, there)
                found = [*found, noise][-self.average :]
                mean = torch.stack(found).mean(0)
                moved = alpha / alpha_s * (latent - sigma_s * mean) + sigma * mean
            latent = moved
            tick()
        return {"latents": latent}
