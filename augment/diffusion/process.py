r"""The noising process, as one view of ε-, v- and flow-prediction models.

A process says how much of the clean latent :math:`z_0` is left at a noise level and how much
noise :math:`\varepsilon \sim \mathcal N(0, I)` was added,

.. math:: z_u = \alpha(u)\, z_0 + \sigma(u)\, \varepsilon, \qquad u \in [0, 1],

with :math:`u = 0` clean and :math:`u = 1` the noisiest level. Networks differ only in what they
are told (the *timestep*) and in what they answer; `Process.split` turns each answer into the
same pair :math:`(\hat z_0, \hat\varepsilon)`, after which nothing downstream needs to know:

================  ==================================  =================================
prediction        :math:`\hat z_0`                    :math:`\hat\varepsilon`
================  ==================================  =================================
``epsilon``       (z − σ·out) / α                     out
``v``             α·z − σ·out                         σ·z + α·out
``flow``          z − σ·out                           z + (1 − σ)·out
================  ==================================  =================================

What is left open here is the path between two levels: that is the solver's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from augment.errors import lookup

Pair = tuple[Tensor, Tensor]
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, float, float], Pair]] = {
    "epsilon": lambda z, out, alpha, sigma: ((z - sigma * out) / alpha, out),
    "v": lambda z, out, alpha, sigma: (alpha * z - sigma * out, sigma * z + alpha * out),
    "flow": lambda z, out, alpha, sigma: (z - sigma * out, z + (1 - sigma) * out),
}
"""How each kind of network answer splits into (clean, noise)."""


@runtime_checkable
class Process(Protocol):
    """What a solver needs to know of a backbone's noising process."""

    @property
    def prediction(self) -> str:
        """A key of `PREDICTIONS`."""
        ...

    def levels(self, steps: int) -> list[float]:
        """``steps + 1`` noise levels u, ascending from 0 (clean) to 1."""
        ...

    def alpha_sigma(self, level: float) -> tuple[float, float]:
        """(α(u), σ(u))."""
        ...

    def timestep(self, level: float) -> float:
        """What the network is told at this level."""
        ...


def split(
    process: Process, latent: Float[Tensor, "b *d"], output: Float[Tensor, "b *d"], level: float
) -> Pair:
    """(clean, noise) estimates, each (B, …), from a network's answer at a noise level."""
    return lookup(PREDICTIONS, process.prediction, "prediction")(
        latent, output, *process.alpha_sigma(level)
    )


@dataclass(frozen=True)
class VariancePreserving:
    r"""Stable Diffusion's process: :math:`\alpha^2 + \sigma^2 = 1`, with √β linear in the step.

    Ho et al., *Denoising Diffusion Probabilistic Models*, arXiv 2006.11239, eq. 4; the
    ``scaled_linear`` schedule of Rombach et al., arXiv 2112.10752. It ends at
    :math:`\alpha(1)^2 = 0.0047`, not at 0: 7 % of the clean latent's amplitude is still there,
    which is one source of the channel bias that centroids amplify.

    Levels are multiples of 1 / ``train_steps`` and level u is the network's timestep
    u·train_steps − 1 (so ``levels`` is diffusers' *trailing* spacing with a clean end).
    """

    prediction: str = "epsilon"
    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, " t"]:
        """ᾱ at each of ``train_steps + 1`` levels in float64, beginning with the clean 1."""
        root = torch.linspace(
            self.beta_start**0.5, self.beta_end**0.5, self.train_steps, dtype=torch.float64
        )
        return torch.cat([torch.ones(1, dtype=torch.float64), (1 - root**2).cumprod(0)])

    def levels(self, steps: int) -> list[float]:
        return [round(self.train_steps * k / steps) / self.train_steps for k in range(steps + 1)]

    def alpha_sigma(self, level: float) -> tuple[float, float]:
        alpha2 = self.alphas_cumprod[round(level * self.train_steps)].item()
        return alpha2**0.5, (1 - alpha2) ** 0.5

    def timestep(self, level: float) -> float:
        return max(round(level * self.train_steps) - 1, 0)


@dataclass(frozen=True)
class Flow:
    r"""Rectified flow: :math:`\alpha = 1 - \sigma`, with the levels warped by ``shift``.

    Liu et al., *Flow Straight and Fast*, arXiv 2209.03003; the shift
    :math:`\sigma = s u / (1 + (s - 1) u)` is eq. 23 of Esser et al., arXiv 2403.03206.
    """

    shift: float = 1.0
    prediction: str = field(default="flow", init=False)

    def levels(self, steps: int) -> list[float]:
        return [k / steps for k in range(steps + 1)]

    def alpha_sigma(self, level: float) -> tuple[float, float]:
        sigma = self.shift * level / (1 + (self.shift - 1) * level)
        return 1 - sigma, sigma

    def timestep(self, level: float) -> float:
        return 1000 * self.alpha_sigma(level)[1]
