r"""Smooth Diffusion: a backbone trained on, until equal steps of noise are equal steps of image.

Guo et al., *Smooth Diffusion*, CVPR 2024, arXiv 2312.04410. At a noise level u, let
:math:`J = \partial \hat z_0 / \partial \varepsilon` say how the clean estimate follows the noise
in :math:`z_u = \alpha z_0 + \sigma\varepsilon`, and let Δ be a random direction of unit
length. Then

.. math:: L = L_\text{base} + \lambda\, E\,(v - a)^2, \qquad v = \sigma\,\|J^\top \Delta\|_2,

where a is what v is on average: a change of the image takes an equally long change of the noise
wherever it is. With ẑ₀ by `augment.diffusion.process.PREDICTIONS` this is one formula for ε, v and
flow; the paper has ε, where σ is √(1 − ᾱ). What is left open there, and what is done here:

- a begins as the mean of the first batch (in the published code as 0, which at first draws v to 0),
  and then a ← a + 0.01·(mean v − a) at every batch, before it is compared with; the penalty takes
  it for a constant. It is in the checkpoint, and the mean is over all ranks.
- L_base is the mean squared error of the network's own answer. Levels are uniform: the trained ones
  of a variance-preserving process, 1/1000, …, 1 before the shift of a flow.
- :math:`J^\top\Delta` is a backward pass that is differentiated again. The fused attention kernels
  (flash, memory-efficient) have no second derivative, so attention is the plain product
  (``SDPBackend.MATH``), whose memory is quadratic in the number of latent pixels.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from augment.diffusion.backbone import Backbone
from augment.diffusion.process import GOALS, PREDICTIONS, Process
from augment.training.adapt.data import Batch
from augment.training.adapt.module import PROJECTIONS, Adaptation, Network, amounts
from augment.training.adapt.recipe import Recipe
from augment.training.checks import at_least

_RATE = 0.01  # of the running mean a


def measured(
    process: Process,
    network: Network,
    clean: Float[Tensor, "n c h w"],
    noise: Float[Tensor, "n c h w"],
    levels: Sequence[float],
    direction: Float[Tensor, "n c h w"],
    graph: bool = True,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Return the base loss and v of each row; see the module.

    Args:
        process: the model's noising process.
        network: its answer to latents and their timesteps (n,).
        clean: clean latents z₀.
        noise: ε.
        levels: u of each row, in (0, 1].
        direction: Δ.
        graph: whether v is to be differentiated.
    """
    alpha, sigma, times = amounts(process, levels, clean)
    noise = noise.detach().requires_grad_()
    latent = alpha * clean + sigma * noise
    with sdpa_kernel(SDPBackend.MATH):
        output = network(latent, times)
        estimate, _ = PREDICTIONS[process.prediction](latent, output, alpha, sigma)
        (pulled,) = torch.autograd.grad(
            (estimate * direction).sum(), noise, retain_graph=True, create_graph=graph
        )
    goal = GOALS[process.prediction](clean, noise.detach(), alpha, sigma)
    base = (output - goal).square().flatten(1).mean(1)
    return base, sigma.flatten() * pulled.flatten(1).norm(dim=1)


class SmoothDiffusion(Adaptation):
    """A backbone's network in training, by low-rank adapters or in full; see `Adaptation`.

    Args:
        backbone: the model, in float32.
        weight: λ.
        rank: of the adapters; 0 trains all weights.
        targets: ends of the names of the linear layers that get adapters.
        lr: the rate, which is constant.
        weight_decay: of AdamW: the paper's; its code has 1e-2.
        seed: of the adapters' first weights.
        total: number of optimiser steps.

    Attributes:
        a: the running mean of v; NaN before the first batch.

    Raises:
        UserError: see `Adaptation`.
    """

    a: Tensor
    directions = True
    dtypes = (torch.float32,)
    memory = " and its second derivatives"

    def __init__(
        self,
        backbone: Backbone,
        weight: float = 1.0,
        rank: int = 8,
        targets: Sequence[str] = PROJECTIONS,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        seed: int = 0,
        total: int = 0,
    ) -> None:
        at_least(0, weight=weight)
        recipe = Recipe(rank=rank, lr=lr, weight_decay=weight_decay)
        super().__init__(backbone, recipe, targets, total=total, seed=seed)
        if not rank:
            self.network.requires_grad_()
        self.weight = weight
        self.register_buffer("a", torch.tensor(math.nan))

    def loss(self, batch: Batch, clean: Tensor, network: Network) -> Tensor:
        """Return L of a batch."""
        base, change = measured(
            self.backbone.process,
            network,
            clean,
            batch["noise"],
            batch["level"].tolist(),
            batch["direction"],
            graph=self.weight > 0,
        )
        self.follow(change)
        uneven = (change - self.a.clone()).square().mean()
        self.log_dict({"base": base.mean(), "uneven": uneven}, prog_bar=True, sync_dist=True)
        self.log("a", self.a, prog_bar=True)  # the same on all ranks
        return base.mean() + self.weight * uneven

    def follow(self, change: Float[Tensor, " n"]) -> None:
        """Update the running mean ``a`` with the mean of v across ranks."""
        gathered = self.all_gather(change.detach())
        assert isinstance(gathered, Tensor)  # as one tensor was given
        mean = gathered.mean()
        self.a.copy_(mean if self.a.isnan() else self.a + _RATE * (mean - self.a))

    def metadata(self) -> dict[str, str]:
        """Return a plain header: alpha is the rank, and files stay what they were."""
        return {"format": "pt"}
