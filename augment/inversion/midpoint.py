"""Second-order inversion: the sampler's own second-order step, upwards on the same levels.

The midpoint rule up and down the same grid undoes itself to third order in the step, where DDIM's
first-order step leaves a second-order error: so images come back better at the same number of
evaluations, without a fixed point to solve. Sample with the solver of the same name.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from augment.diffusion.backbone import Denoiser
from augment.diffusion.solver import SOLVERS


@dataclass(frozen=True)
class Midpoint:
    """Inversion by `augment.diffusion.solver.midpoint`; RF-Solver, for rectified flow.

    Args:
        steps: solver steps, each two network evaluations.
    """

    steps: int = 25
    solver: ClassVar[str] = "midpoint"
    guidance: ClassVar[float] = 1.0
    away: ClassVar[str] = "empty"

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        return 2 * self.steps

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """See `augment.inversion.Inverter`."""
        levels = denoise.backbone.process.levels(self.steps)
        return {"latents": SOLVERS[self.solver](denoise, clean, levels, tick)}
