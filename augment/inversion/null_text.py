r"""Null-text inversion: make the *guided* sampler follow the inversion.

DDIM inversion at guidance 1 gives a pivot, the latents :math:`z^*_0 … z^*_N` of every step; sampled
with a guidance scale g ≠ 1 they do not come back. Mokady et al. (*Null-text Inversion*, arXiv
2211.09794, alg. 1) optimise the unconditional embedding ∅ of each step, from the noisiest down, so
that one guided step from where the last one ended falls on the pivot:

.. math:: \min_{\varnothing_t} \lVert z^*_{t-1} - z_{t-1}(\bar z_t, \varnothing_t) \rVert^2 .

Adam takes about ten steps for each, with a falling learning rate, from the embedding of the step
before, until the mean square is small enough. This is the best reconstruction under guidance, and
costs an order of magnitude more than the other inversions.

Here a batch is optimised at once, each image with its own loss, Adam moments and stopping, so that
the result does not depend on the batch; finished images drop out. The conditional half does not
depend on the embedding and is evaluated once a step. An image's embeddings take much more room than
its latent (50 × 77 × 768 numbers for Stable Diffusion 1, 180 times as much), so that a batch, which
is of one class in a bank, can share one set, optimised for its mean loss. A centroid samples with
its members' embeddings mixed by the plan's weights, as that paper's appendix interpolates them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.diffusion.backbone import Condition, Denoiser
from augment.diffusion.process import split
from augment.diffusion.solver import ddim
from augment.inversion.ddim import DDIM

SCALE = 2.0**14
"""Factor of the loss during backpropagation: half precision would round its gradient to 0."""


@dataclass(frozen=True)
class NullText(DDIM):
    """DDIM inversion and an unconditional embedding for each step.

    Args:
        steps: solver steps; sampling takes as many.
        inner: maximum number of Adam steps for each.
        shared: one set of embeddings for a whole batch instead of one for each image.

    Raises:
        UserError: ``inner`` below 1.
    """

    inner: int = 10
    shared: bool = False
    guidance: ClassVar[float] = 7.5
    negative: ClassVar[str] = "null_embeddings"

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise UserError(f"expected at least 1 inner step, got {self.inner}; 10 are usual")

    @property
    def evaluations(self) -> int:
        """Maximum network evaluations an image; one with its gradient counts as three."""
        return self.steps_made * (3 + 3 * self.inner)

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """See `augment.inversion.Inverter`; float16 ``nulls`` (g, steps, …), ``null_rows`` (n,).

        An image's embeddings are row ``null_rows[image]`` of ``nulls``.
        """
        if denoise.both is None:  # no images, or `check_guidance` would have refused
            return {"latents": clean}
        plain, condition = Denoiser(denoise.backbone, denoise.condition), denoise.condition(1.0)
        levels, steps = self.levels(denoise.backbone.process), self.steps_made
        pivots = [clean]
        for here, there in pairwise(levels):
            pivots.append(ddim(plain, pivots[-1], (here, there)))
        # both() stacks the unconditional rows before the conditional ones
        free = {key: rows[: len(clean)] for key, rows in denoise.both(1.0).items()}
        owner = torch.arange(len(clean), device=clean.device) * (not self.shared)
        null, nulls, latent = free["text"][owner.unique()].float(), [], pivots[-1]
        everyone = torch.arange(len(clean), device=clean.device)
        for number in reversed(range(steps)):
            step = _Step(denoise, free, owner, levels[number : number + 2])
            done = 50 * (steps - 1 - number) / steps  # the paper's i, of its 50 steps
            conditional = step.evaluate(latent, condition)
            null = step.fit(latent, conditional, pivots[number], null, self.inner, done)
            latent = step.guided(latent, conditional, null, everyone)
            nulls.append(null.half().cpu())  # a bank's precision; and there are many of them
            tick()
        stacked = torch.stack(nulls[::-1], 1)
        return {"latents": pivots[-1], "nulls": stacked, "null_rows": owner.cpu()}


@dataclass
class _Step:
    """One guided DDIM step down as a function of the unconditional embedding."""

    denoise: Denoiser
    free: Condition
    owner: Tensor
    levels: Sequence[float]

    def evaluate(self, latent: Tensor, condition: Condition) -> Tensor:
        """Evaluate the network at the upper level."""
        timestep = self.denoise.backbone.process.timestep(self.levels[1])
        return self.denoise.backbone.network(latent, timestep, condition)

    def land(self, latent: Tensor, output: Tensor) -> Tensor:
        """Make the step with an output of the network."""
        process = self.denoise.backbone.process
        alpha, sigma = process.alpha_sigma(self.levels[0])
        clean, noise = split(process, latent, output, self.levels[1])
        return alpha * clean + sigma * noise

    def guided(self, latent: Tensor, conditional: Tensor, null: Tensor, rows: Tensor) -> Tensor:
        """Return the latents of some rows after the step, given the conditional outputs."""
        free = {key: value[rows] for key, value in self.free.items()}
        free["text"] = null[self.owner[rows]].to(free["text"])
        output = self.evaluate(latent[rows], free)
        change = self.denoise.guidance * (conditional[rows] - output)
        return self.land(latent[rows], output + change)

    def fit(
        self,
        latent: Tensor,
        conditional: Tensor,
        goal: Tensor,
        null: Tensor,
        inner: int,
        done: float,
    ) -> Tensor:
        """Optimise the embeddings (g, …) so that the step reaches its goal."""
        rate, threshold = 1e-2 * (1 - done / 100), 1e-5 + 2e-5 * done
        null = null.clone()
        first, second = torch.zeros_like(null), torch.zeros_like(null)
        open_groups = torch.arange(len(null), device=null.device)
        for count in range(1, inner + 1):
            if not len(open_groups):
                break
            rows = torch.isin(self.owner, open_groups).nonzero()[:, 0]
            with torch.enable_grad():
                variable = null.detach().requires_grad_()
                off = self.guided(latent, conditional, variable, rows) - goal[rows]
                losses = off.square().flatten(1).mean(1)
                # the paper's loss is an image's; of a shared embedding, its images' mean
                sizes = torch.bincount(self.owner, minlength=len(null))[self.owner[rows]]
                (slope,) = torch.autograd.grad(SCALE * (losses / sizes).sum(), variable)
                slope = slope / SCALE
            # Adam (Kingma & Ba, arXiv 1412.6980) by hand: torch's would go on moving finished rows
            first = first.lerp(slope, 0.1)
            second = second.lerp(slope.square(), 0.001)
            move = (first / (1 - 0.9**count)) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
            null[open_groups] -= rate * move[open_groups]
            mean = torch.zeros(len(null), device=null.device)
            mean = mean.index_add(0, self.owner[rows], losses.detach() / sizes)
            open_groups = open_groups[mean[open_groups] >= threshold]
        return null
