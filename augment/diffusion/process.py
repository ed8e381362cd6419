r"""The noising process, as one view of ε-, v- and flow-prediction models.

A process says how much of the clean latent :math:`z_0` is left at a noise level and how much
noise :math:`\varepsilon \sim \mathcal N(0, I)` was added,

.. math:: z_u = \alpha(u)\, z_0 + \sigma(u)\, \varepsilon, \qquad u \in [0, 1],

with :math:`u = 0` clean and :math:`u = 1` the noisiest level. Networks differ only in their input
(the *timestep*) and in what they predict; `split` turns each prediction into the same pair
:math:`(\hat z_0, \hat\varepsilon)`, so that no solver depends on it:

================  ==================================  =================================
prediction        :math:`\hat z_0`                    :math:`\hat\varepsilon`
================  ==================================  =================================
``epsilon``       (z − σ·out) / α                     out
``v``             α·z − σ·out                         σ·z + α·out
``flow``          z − σ·out                           z + (1 − σ)·out
================  ==================================  =================================

The path between two levels is the solver's.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError, lookup

Pair = tuple[Tensor, Tensor]
Amount = float | Tensor
"""An α or σ: a number, or a tensor that broadcasts where levels differ by row."""

PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Amount, Amount], Pair]] = {
    "epsilon": lambda z, out, alpha, sigma: ((z - sigma * out) / alpha, out),
    "v": lambda z, out, alpha, sigma: (alpha * z - sigma * out, sigma * z + alpha * out),
    "flow": lambda z, out, alpha, sigma: (z - sigma * out, z + (1 - sigma) * out),
}
"""How each kind of network output splits into (clean, noise)."""

GOALS: dict[str, Callable[[Tensor, Tensor, Amount, Amount], Tensor]] = {
    "epsilon": lambda clean, noise, alpha, sigma: noise,
    "v": lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean,
    "flow": lambda clean, noise, alpha, sigma: noise - clean,
}
"""The training target of each kind of network; split, it is (clean, noise) again."""

BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "scaled_linear": lambda a, b, n: torch.linspace(a**0.5, b**0.5, n, dtype=torch.float64) ** 2,
    "linear": lambda a, b, n: torch.linspace(a, b, n, dtype=torch.float64),
}
"""β of each training step: √β linear in the step (latent diffusion), or β (DDPM, DiT)."""


@runtime_checkable
class Process(Protocol):
    """The noising process of a backbone, as solvers use it."""

    @property
    def prediction(self) -> str:
        """A key of `PREDICTIONS`."""
        ...

    def levels(self, steps: int) -> list[float]:
        """Return ``steps + 1`` noise levels u, ascending from the clean end to the noisiest."""
        ...

    def middle(self, low: float, high: float) -> float:
        """Return the level halfway between two, for second-order steps."""
        ...

    def alpha_sigma(self, level: float) -> tuple[float, float]:
        """Return (α(u), σ(u))."""
        ...

    def timestep(self, level: float) -> float:
        """Return the network's timestep at this level."""
        ...


def split(
    process: Process, latent: Float[Tensor, "b *d"], output: Float[Tensor, "b *d"], level: float
) -> Pair:
    """Return the (clean, noise) estimates, each (B, …), of a network's output at a noise level."""
    return lookup(PREDICTIONS, process.prediction, "prediction")(
        latent, output, *process.alpha_sigma(level)
    )


def level_number(steps: int, strength: float) -> int:
    """Return how many of ``steps`` steps lead to a level, by diffusers' rule for its strength.

    Raises:
        UserError: a level outside (0, 1], or below the first step.

    >>> level_number(25, 0.7)
    17
    """
    if not 0 < strength <= 1:
        raise UserError(
            f"expected a level in (0, 1], got {strength}; 1 is pure noise, 0.3 to 0.9 are usual"
        )
    number = int(steps * strength)
    if number < 1:
        raise UserError(
            f"expected a level of at least {math.ceil(1e4 / steps) / 1e4:g}, one of {steps} steps, "
            f"got {strength}; take a higher level or more steps"
        )
    return number


def levels_to(process: Process, steps: int, level: float | None = None) -> list[float]:
    """Return the ascending grid of ``steps`` steps below a noise level, and that level exactly.

    Args:
        process: the noising process.
        steps: of the whole way from the noisiest level, of which those below the level are left.
        level: the noise level u; the noisiest one by default.
    """
    grid = process.levels(steps)
    if level is None:
        return grid
    return [*(known for known in grid if known < level - 1e-9), level]


@dataclass(frozen=True)
class _Brief:
    """A dataclass whose ``repr``, a part of fingerprints, leaves out fields that have defaults.

    So a field that is added later does not change them.
    """

    def __repr__(self) -> str:
        own = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        changed = ", ".join(f"{name}={value!r}" for name, value, usual in own if value != usual)
        return f"{type(self).__name__}({changed})"


@dataclass(frozen=True, repr=False)
class VariancePreserving(_Brief):
    r"""Stable Diffusion's process: :math:`\alpha^2 + \sigma^2 = 1`, with √β linear in the step.

    Ho et al., *Denoising Diffusion Probabilistic Models*, arXiv 2006.11239, eq. 4; the
    ``scaled_linear`` schedule of Rombach et al., arXiv 2112.10752. It ends at
    :math:`\alpha(1)^2 = 0.0047`, not at 0: 7 % of the clean latent's amplitude is still there,
    which is one source of the channel bias that centroids amplify.

    Level u is the network's timestep u·train_steps − 1, and 0 is clean. Levels between two trained
    ones interpolate the angle atan(σ/α).

    Args:
        prediction: of the network, ``epsilon`` or ``v``.
        train_steps: number of trained levels.
        beta_start, beta_end: noise of the first and last training step.
        betas: how β goes from one to the other, a key of `BETAS`.
        spacing: the trained levels that n steps visit. ``trailing`` always begins at the noisiest,
            so that a latent inverted with 50 steps can be sampled with 20; ``leading`` and
            ``linspace``, with ``clean_end=False``, are diffusers' DDIM grids, for comparison.
        offset: added to the timesteps of ``leading``.
        clean_end: whether sampling ends at level 0 (``set_alpha_to_one``) or, as SD 1's scheduler
            files have it, at the first trained level.
        zero_terminal_snr: rescale √ᾱ linearly so that it ends at 0 (Lin et al., *Common Diffusion
            Noise Schedules and Sample Steps are Flawed*, arXiv 2305.08891, alg. 1). Then nothing of
            the clean latent is left at the noisiest level, so that it brings no bias and sampling
            starts from pure noise. It takes v-prediction, and a network that was trained so.

    Raises:
        UserError: an unknown schedule or spacing, or ε-prediction with zero terminal SNR.
    """

    prediction: str = "epsilon"
    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    betas: str = "scaled_linear"
    spacing: str = "trailing"
    offset: int = 0
    clean_end: bool = True
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        lookup(BETAS, self.betas, "noise schedule")
        lookup(PREDICTIONS, self.prediction, "prediction")
        start, end, steps = self.beta_start, self.beta_end, self.train_steps
        cure = "take the scheduler file of the checkpoint's makers"
        if not 0 < start <= end < 1:
            betas = f"{start!r} and {end!r}"
            raise UserError(f"expected 0 < beta_start ≤ beta_end < 1, got {betas}; {cure}")
        if type(steps) is not int or steps < 1:
            raise UserError(f"expected an integer train_steps ≥ 1, got {steps!r}; {cure}")
        lookup(dict.fromkeys(("trailing", "leading", "linspace")), self.spacing, "spacing")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise UserError(
                "expected v-prediction for zero terminal SNR, got epsilon, which says nothing of "
                "the clean latent where nothing of it is left; leave zero_terminal_snr out"
            )

    @cached_property
    def alphas_cumprod(self) -> Float[Tensor, " t"]:
        """Compute ᾱ at each of ``train_steps + 1`` levels in float64, from the clean 1 on."""
        betas = BETAS[self.betas](self.beta_start, self.beta_end, self.train_steps)
        kept = (1 - betas).cumprod(0)
        if self.zero_terminal_snr:
            root = kept.sqrt()
            kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return torch.cat([torch.ones(1, dtype=torch.float64), kept])

    @cached_property
    def kept(self) -> list[float]:
        """ᾱ as numbers, so that no solver asks a tensor."""
        return self.alphas_cumprod.tolist()

    @cached_property
    def angles(self) -> list[float]:
        """Compute atan(σ/α) at each level, ascending from 0."""
        return [math.acos(min(root, 1.0)) for root in self.alphas_cumprod.sqrt().tolist()]

    def levels(self, steps: int) -> list[float]:
        count = self.train_steps
        trained = count - self.offset if self.spacing == "leading" else count
        if steps > trained:
            raise UserError(f"expected at most {trained} steps, the trained ones, got {steps}")
        if self.spacing == "trailing":
            numbers = [round(count * k / steps) for k in range(1, steps + 1)]
        elif self.spacing == "leading":
            numbers = [k * (count // steps) + self.offset + 1 for k in range(steps)]
        else:
            numbers = [round(k * (count - 1) / max(steps - 1, 1)) + 1 for k in range(steps)]
        return [number / count for number in (0 if self.clean_end else 1, *numbers)]

    def middle(self, low: float, high: float) -> float:
        angle = (self._angle(low) + self._angle(high)) / 2
        below = bisect.bisect_right(self.angles, angle) - 1
        here, there = self.angles[below], self.angles[below + 1]
        return (below + (angle - here) / (there - here)) / self.train_steps

    def alpha_sigma(self, level: float) -> tuple[float, float]:
        number = level * self.train_steps
        if abs(number - round(number)) < 1e-6:
            alpha2 = self.kept[round(number)]
            return alpha2**0.5, (1 - alpha2) ** 0.5
        angle = self._angle(level)
        return math.cos(angle), math.sin(angle)

    def timestep(self, level: float) -> float:
        number = level * self.train_steps - 1
        return max(round(number) if abs(number - round(number)) < 1e-6 else number, 0)

    def _angle(self, level: float) -> float:
        number = min(level * self.train_steps, float(self.train_steps))
        below = min(int(number), self.train_steps - 1)
        here, there = self.angles[below], self.angles[below + 1]
        return here + (number - below) * (there - here)


@dataclass(frozen=True, repr=False)
class Flow(_Brief):
    r"""Rectified flow: :math:`\alpha = 1 - \sigma`, with the levels warped by ``shift``.

    Liu et al., *Flow Straight and Fast*, arXiv 2209.03003; the shift
    :math:`\sigma = s u / (1 + (s - 1) u)` is eq. 23 of Esser et al., arXiv 2403.03206.

    Args:
        shift: s > 0.
        spacing: ``trailing``, equal steps in u; or ``linspace``, diffusers' grid for SD 3, whose
            last step but one ends at the least trained noise (a little before 0).

    Raises:
        UserError: an unknown spacing.
    """

    shift: float = 1.0
    prediction: str = field(default="flow", init=False)
    spacing: str = "trailing"

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(("trailing", "linspace")), self.spacing, "spacing")
        if not 0 < self.shift < math.inf:
            raise UserError(f"expected a shift above 0, got {self.shift!r}; 1 is none, 3 SD 3's")

    def levels(self, steps: int) -> list[float]:
        if self.spacing == "trailing":
            return [k / steps for k in range(steps + 1)]
        least = self.alpha_sigma(0.001)[1]
        return [0.0, *(1 - (1 - least) * k / max(steps - 1, 1) for k in reversed(range(steps)))]

    def middle(self, low: float, high: float) -> float:
        sigma = (self.alpha_sigma(low)[1] + self.alpha_sigma(high)[1]) / 2
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def alpha_sigma(self, level: float) -> tuple[float, float]:
        sigma = self.shift * level / (1 + (self.shift - 1) * level)
        return 1 - sigma, sigma

    def timestep(self, level: float) -> float:
        return 1000 * self.alpha_sigma(level)[1]
