r"""DDIM inversion: the sampler's steps, backwards.

Sampling steps from a noisier level u' to u with the estimates made at :math:`(z_{u'}, u')`; undoing
that step exactly is implicit. DDIM inversion (Song et al., arXiv 2010.02502, sec. 4.3) takes the
estimates at :math:`(z_u, u)` instead, the end it has, and makes the solver's own step with them:

.. math:: z_{u'} = \alpha(u')\,\hat z_0(z_u, u) + \sigma(u')\,\hat\varepsilon(z_u, u),

the Euler step of the same differential equation in the other direction. The error is of first
order in the step. Only the first step, from the noiseless level 0 that no network was trained on,
evaluates at the level it goes to.

Mokady et al. (arXiv 2211.09794, eq. 3) and diffusers' ``DDIMInverseScheduler`` give the network the
level they go *to* in every step, as the papers on latents do: :math:`\hat\varepsilon(z_u, u')`.
That is `PublishedDDIM`. The network then takes clean signal for noise: on ``tiny`` the mean
inverted latent of a class has more of the clean one, the bias that centroids amplify, and images
are reconstructed worse (RESULTS.md). diffusers also splits the network's v by the level it
leaves: 8 dB worse (BENCHMARKS.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from augment.diffusion.backbone import Denoiser
from augment.diffusion.process import Process, level_number
from augment.diffusion.solver import SOLVERS


@dataclass(frozen=True)
class DDIM:
    """Plain DDIM inversion; the Euler step, for rectified flow.

    Args:
        steps: solver steps to the noisiest level, each a network evaluation.
        level: where the inversion stops, in (0, 1]: that share of the steps is made.
    """

    steps: int = 50
    level: float = field(default=1.0, kw_only=True)
    solver: ClassVar[str] = "ddim"
    guidance: ClassVar[float] = 1.0
    negative: ClassVar[str] = "empty"

    @property
    def steps_made(self) -> int:
        """Solver steps up to the level."""
        return level_number(self.steps, self.level)

    def levels(self, process: Process) -> list[float]:
        """Return the noise levels that are walked, ascending."""
        return process.levels(self.steps)[: self.steps_made + 1]

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        return self.steps_made

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """See `augment.inversion.Inverter`."""
        levels = self.levels(denoise.backbone.process)
        return {"latents": SOLVERS[self.solver](denoise, clean, levels, tick)}


@dataclass(frozen=True)
class PublishedDDIM(DDIM):
    """DDIM inversion that asks the network at the level that each step goes to.

    Args:
        steps: solver steps, each a network evaluation.
    """

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """See `augment.inversion.Inverter`."""
        process, latent = denoise.backbone.process, clean
        for here, there in pairwise(self.levels(process)):
            (alpha_s, sigma_s), (alpha, sigma) = map(process.alpha_sigma, (here, there))
            _, noise = denoise(latent, there)
            latent = alpha * (latent - sigma_s * noise) / alpha_s + sigma * noise
            tick()
        return {"latents": latent}
