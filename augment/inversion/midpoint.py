"""Second-order inversion: the sampler's own second-order step, upwards on the same levels.

The midpoint rule up and down the same grid undoes itself to third order in the step, DDIM's step
only to second order: images are reconstructed better with the same number of evaluations, without a
fixed point to solve. Sample with the solver of the same name.
"""

from dataclasses import dataclass
from typing import ClassVar

from augment.inversion.ddim import DDIM


@dataclass(frozen=True)
class Midpoint(DDIM):
    """Inversion by `augment.diffusion.solver.midpoint`; RF-Solver, for rectified flow.

    Args:
        steps: solver steps, each two network evaluations.
    """

    steps: int = 25
    solver: ClassVar[str] = "midpoint"

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        return 2 * self.steps_made
