r"""Fixed-point inversion: the sampler's DDIM step undone, not approximated.

Sampling goes from :math:`z_{u'}` to :math:`z_u` with the estimates at :math:`(z_{u'}, u')`; so
where it came from is

.. math:: z_{u'} = z_u + (\alpha' - \alpha)\,\hat z_0(z_{u'}, u')
          + (\sigma' - \sigma)\,\hat\varepsilon(z_{u'}, u'),

a fixed point of :math:`z_{u'}`, found by iterating (AIDI, Pan et al., arXiv 2309.04907; ReNoise,
Garibi et al., arXiv 2403.14602, which also averages the estimates of several iterations). They put
:math:`(z_u - \sigma\hat\varepsilon)/\alpha` for :math:`\hat z_0`, which has the same fixed point,
but contracts less: at a level without signal not at all.

The first guess costs nothing: the last iteration of the step before was evaluated where this step
starts, so its estimates make a DDIM step. One iteration a step takes as many evaluations as plain
DDIM inversion.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.diffusion.backbone import Denoiser
from augment.diffusion.solver import estimates, move
from augment.inversion.ddim import DDIM


@dataclass(frozen=True)
class FixedPoint(DDIM):
    """DDIM inversion with fixed-point iterations.

    Args:
        steps: solver steps.
        iterations: network evaluations a step, from 1.
        average: number of last iterations whose estimates are averaged, from 1 (none).

    Raises:
        UserError: iterations or average out of range.
    """

    iterations: int = 2
    average: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.average <= self.iterations:
            raise UserError(
                f"expected 1 ≤ average ≤ iterations, got {self.average} and {self.iterations}; "
                "2 iterations without averaging (average 1) are usual"
            )

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        return self.steps_made * self.iterations + 1

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """See `augment.inversion.Inverter`."""
        levels = self.levels(denoise.backbone.process)
        latent, pair = clean, estimates(denoise, clean, levels[0], levels[1])
        for here, there in pairwise(levels):
            moved, recent = move(denoise, latent, here, there, pair), []
            for _ in range(self.iterations):
                pair = denoise(moved, there)
                recent = [*recent, pair][-self.average :]
                mean = [torch.stack(parts).mean(0) for parts in zip(*recent, strict=True)]
                moved = move(denoise, latent, here, there, (mean[0], mean[1]))
            latent = moved
            tick()
        return {"latents": latent}
