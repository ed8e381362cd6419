"""How a latent becomes an image: the settings of a solver run.

`Sampling` is what a user asks for: a profile such as ``exact`` and what is left out mean something
only beside the inversion that made the latents. `Sampling.resolve` fills that in, once.
"""

from dataclasses import dataclass

from augment.core.errors import lookup
from augment.diffusion.backbone import check_batch, check_interval
from augment.diffusion.solver import SOLVERS, check_steps

PROFILES = ("exact", "fast")
"""Solvers by what they are for: to undo the bank's inversion, or to be quick."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a latent becomes an image.

    Args:
        solver: exact (undoes the bank's inversion), fast (fireflow in 10 steps), or ddim,
            dpm++, midpoint, fireflow.
        steps: number of solver steps; by default that of the bank, or 10 with fast.
        guidance: scale of classifier-free guidance; by default that of the bank, which is its
            model family's if the bank has prompts.
        interval: noise levels between which guidance is applied, as YAML such as '[0.2, 0.8]'.
        batch_size: images a network call; halved if a GPU's memory is too small.

    Raises:
        UserError: an unknown solver, no steps, levels out of order, or an empty batch.
    """

    solver: str = "exact"
    steps: int | None = None
    guidance: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            lookup(dict.fromkeys([*PROFILES, *SOLVERS]), self.solver, "solver")
        if self.steps is not None:
            check_steps(self.steps)
        check_interval(self.interval)
        check_batch(self.batch_size)

    def resolve(self, solver: str, steps: int, guidance: float) -> "ResolvedSampling":
        """Fill in what is left to the inversion of the latents.

        Args:
            solver: the one that undoes the inversion.
            steps: those of the inversion.
            guidance: that of the bank.
        """
        if self.solver == "fast":
            solver, steps = "fireflow", 10
        elif self.solver != "exact":
            solver = self.solver
        return ResolvedSampling(
            solver=solver,
            steps=steps if self.steps is None else self.steps,
            guidance=float(guidance if self.guidance is None else self.guidance),
            interval=self.interval,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedSampling(Sampling):
    """A `Sampling` of which nothing is left open: the arguments of `augment.sample` by name."""

    solver: str = "fireflow"
    steps: int = 25
    guidance: float = 1.0
