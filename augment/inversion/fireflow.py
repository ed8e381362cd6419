"""Second-order inversion at one evaluation a step, by `augment.diffusion.solver.fireflow`."""

from dataclasses import dataclass
from typing import ClassVar

from augment.inversion.ddim import DDIM


@dataclass(frozen=True)
class FireFlow(DDIM):
    """`Midpoint` with the last middle's estimates for half steps (Deng et al., arXiv 2412.07517).

    Args:
        steps: solver steps, each a network evaluation, and one more at the first.
    """

    solver: ClassVar[str] = "fireflow"

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        return self.steps_made + 1
