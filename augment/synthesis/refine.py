r"""SeedSelect: bring a latent's image nearer to the real ones of its class, through the sampler.

Samuel et al., *Generating images of rare concepts using pre-trained diffusion models*, AAAI 2024,
arXiv 2304.14530. A latent is optimised by AdamW for what a deterministic solver makes of it,

.. math:: 10 \sum_{k=1}^{3} w_k \bigl(1 - \cos(f(x_k), \bar f)\bigr)
          + \frac1D \lVert z_0 - \bar z_0 \rVert^2, \qquad w = (0.05,\ 0.25,\ 0.7),

f the features of a frozen network, :math:`\bar f` and :math:`\bar z_0` the means of unit features
and of clean latents over the class's real images, :math:`x_k` the images after the last three
solver steps: 30 steps of 0.1 from noise. From a centroid, which is of the class already, 5 of 0.05
(Samuel et al., arXiv 2306.08687, who begin with NAO's; any rule's will do).

The published code decodes what a step ends with, noise that is left and all. Here :math:`x_1` and
:math:`x_2` are decoded from the network's clean estimates in their steps, which every solver asks
for and which are images at any level of noise; :math:`x_3`, of the last step, is the image itself.
Where a decoder cuts pixels off at black or white, features have no slope, and rightly: a pixel that
is beyond white stays white whatever its latent does. The distance of the clean latents, taken
before the cut, brings it back.

A run of the solver would keep the values of every layer in every evaluation. So each evaluation,
and each look at an image, keeps its input alone and is done again on the way back (Chen et al.,
*Training Deep Nets with Sublinear Memory Cost*, arXiv 1604.06174): memory is a latent for each
evaluation and the layers of one. A step costs the time of some four samplings.

Where an image is about to tip over into another, any step may do it, and the loss jumps. So what
comes out is the latent of the least loss on the way, at worst the one that went in.

Samples share a batch and nothing else. But AdamW moves a number by about the learning rate however
small its slope, so that one whose slope is nothing but rounding goes either way: another batch
layout or device gives nearly the same image, not one within the last bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from augment.core.errors import UserError
from augment.diffusion.backbone import Backbone, Denoiser, batched, denoiser
from augment.diffusion.conditions import Given, rows_of
from augment.diffusion.process import Pair, levels_to
from augment.diffusion.sampling import ResolvedSampling
from augment.diffusion.solver import SOLVERS
from augment.networks import BATCH, Network, feature_network, unit
from augment.networks.timm import network_of

SMALL = 64
"""Pixels up to which images of colour are looked at by ``lite0``, which needs no download."""

SHARES = (0.05, 0.25, 0.7)
"""Of the images after the last three steps."""

SCALES = (2.0**14, 2.0**7, 1.0)
"""Of the loss while its slope goes through the network, the next one where the last overflows.

As it is, the slope of a mean over a latent would be 0 in half precision.
"""

open_network = lru_cache(1)(feature_network)
"""The last one stays: classes, batches and shards look with the same."""


class Goal(NamedTuple):
    """What a class's real images are like on average, or those of a batch's classes.

    Args:
        features: (…, d), means of unit features.
        clean: (…, C, H, W), means of clean latents.
    """

    features: Tensor
    clean: Tensor


class Refined(NamedTuple):
    """What comes of latents.

    Args:
        latents: (n, C, H, W), those of the least losses, float32 on the backbone's device.
        losses: (n, steps + 1), float32 on the CPU: before the first step, and after each.
    """

    latents: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Recorder(Denoiser):
    """A denoiser that forgets the values of its layers, and notes its clean estimates."""

    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, latent: Float[Tensor, "n *d"], level: float) -> Pair:
        """See `Denoiser`."""
        pair: Pair = checkpoint(super().__call__, latent, level, use_reentrant=False)  # type: ignore[assignment]
        self.seen.append(pair[0])
        return pair


def losses(
    recorder: Recorder,
    latents: Float[Tensor, "n c h w"],
    goal: Goal,
    see: Callable[[Tensor], Tensor],
    solver: str,
    levels: Sequence[float],
) -> Float[Tensor, " n"]:
    """Return the loss of each latent; see the module's docstring.

    Args:
        recorder: the batch's denoiser, new.
        latents: at the first level.
        goal: a row for each.
        see: images (n, C, R, R) → features (n, d), differentiable.
        solver: a key of `SOLVERS`.
        levels: that it walks, three steps or more.
    """

    def look(clean: Tensor) -> Tensor:
        return see(recorder.backbone.decode(clean))

    steps: list[Tensor] = []
    clean = SOLVERS[solver](recorder, latents, levels, lambda: steps.append(recorder.seen[-1]))
    total = (clean - goal.clean).square().flatten(1).mean(1)
    for share, estimate in zip(SHARES, (*steps[-3:-1], clean), strict=True):
        features: Tensor = checkpoint(look, estimate, use_reentrant=False)  # type: ignore[assignment]
        cosines = F.cosine_similarity(features, goal.features, dim=1)
        total = total + 10 * share * (1 - cosines).to(total)
    return total


def slope(
    loss: Callable[[Tensor], Tensor], latents: Float[Tensor, "n c h w"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c h w"]]:
    """Return the losses of latents, and their gradients.

    Raises:
        UserError: they overflow.
    """
    for scale in SCALES:
        with torch.enable_grad():
            values = loss(latents)
            (gradient,) = torch.autograd.grad(scale * values.sum(), latents)
        if gradient.isfinite().all():
            return values.detach(), gradient / scale
    raise UserError(
        "expected a finite slope to refine latents by, got overflow; take dtype float32 or bfloat16"
    )


def check_sampling(steps: int) -> None:
    """Refuse fewer solver steps than there are images to look at."""
    if steps < len(SHARES):
        raise UserError(
            f"expected at least {len(SHARES)} solver steps to refine latents by the images of the "
            f"last three, got {steps}; 10 to 25 are usual"
        )


@dataclass(frozen=True)
class SeedSelect:
    """Refines latents; see the module's docstring.

    Args:
        steps: of AdamW.
        lr: learning rate; 0.05 is for 5 steps from a centroid, 0.1 for 30 from noise.
        network: whose features: clip, fashion (embedded: grey clothes), or a network of timm; by
            default that of a checkpoint, or fashion for grey images, lite0 for others of at most
            64 pixels, and clip for larger ones.
        weights: of the network: a .safetensors file, a state dict or a checkpoint of
            latent-augment train; of clip a folder or a repository of the hub; by default those that
            it comes with.

    Raises:
        UserError: a setting is out of its range, or a network without slopes.
    """

    steps: int = 5
    lr: float = 0.05
    network: str | None = None
    weights: str = ""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"expected at least 1 step to refine, got {self.steps}; 5 are usual")
        if not 0 < self.lr < float("inf"):
            raise UserError(
                f"expected a learning rate above 0, got {self.lr}; 0.05 is usual from a centroid"
            )
        if self.network == "inception":
            raise UserError(
                "expected a network that is differentiable in the images, got inception, which "
                "counts grey levels; take clip, fashion or a network of timm"
            )

    def of(self, backbone: Backbone) -> "SeedSelect":
        """Return the same with the network that is the default for a backbone's images."""
        coloured = "lite0" if backbone.resolution <= SMALL else "clip"
        usual = "fashion" if backbone.channels == 1 else coloured
        return replace(self, network=network_of(self.network, self.weights, usual))

    def see(self, backbone: Backbone) -> Network:
        """Load the network, a function of images (n, C, R, R) in [0, 1].

        Raises:
            UserError: see `augment.networks.feature_network`.
        """
        return open_network(self.of(backbone).network or "", self.weights, backbone.device)

    @torch.inference_mode(False)  # what is made here takes part in what is differentiated
    @torch.no_grad()
    def goal(self, backbone: Backbone, images: Float[Tensor, "n c h w"]) -> Goal:
        """Return what to refine a class's latents for.

        Args:
            backbone: the model.
            images: the class's real ones, n ≥ 1, in the backbone's format.
        """
        clean = torch.cat([backbone.encode(part) for part in images.split(BATCH)])
        return Goal(unit(self.see(backbone)(images)).mean(0), clean.mean(0))

    def __call__(
        self,
        backbone: Backbone,
        latents: Float[Tensor, "n c h w"],
        goals: Sequence[Goal],
        prompts: Given = None,
        sampling: ResolvedSampling = ResolvedSampling(),
        negative: Given = None,
        level: float | None = None,
    ) -> Refined:
        """Refine latents for how `augment.sample` will sample them.

        Args:
            backbone: the model.
            latents: to begin from.
            goals: of each latent.
            prompts: see `augment.sample`.
            sampling: the run of the solver, at least 3 steps.
            negative: what to guide away from; the empty prompt by default.
            level: noise level u of the latents; the noisiest by default.

        Raises:
            UserError: too few steps, or overflow in half precision.
        """
        texts, others = rows_of(prompts, len(latents)), rows_of(negative, len(latents))
        levels, see = levels_to(backbone.process, sampling.steps, level)[::-1], self.see(backbone)
        check_sampling(len(levels) - 1)

        @torch.inference_mode(False)  # it differentiates, whatever the caller does
        def run(rows: slice, tick: Callable[[], Any]) -> Refined:
            how = sampling.guidance, sampling.interval
            denoise = denoiser(backbone, texts[rows], *how, others[rows])
            features, clean = map(torch.stack, zip(*goals[rows], strict=True))
            goal = Goal(features, clean.to(backbone.device))
            start = latents[rows].to(backbone.device, torch.float32).clone()
            return self._fit(
                lambda latent: losses(
                    Recorder(**vars(denoise)), latent, goal, see, sampling.solver, levels
                ),
                start,
                tick,
            )

        parts = batched(run, backbone, len(latents), sampling.batch_size, self.steps, "refine")
        return Refined(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def _fit(
        self, loss: Callable[[Tensor], Tensor], latents: Tensor, tick: Callable[[], Any]
    ) -> Refined:
        """Optimise latents; return the best on the way, and all losses."""
        latents.requires_grad_()
        optimiser, history, way = torch.optim.AdamW([latents], self.lr), [], []
        for _ in range(self.steps):
            values, latents.grad = slope(loss, latents)
            history.append(values)
            way.append(latents.detach().clone())
            optimiser.step()
            tick()
        with torch.no_grad():
            history.append(loss(latents))
        way.append(latents.detach())
        losses = torch.stack(history, 1).cpu()
        best = losses.nan_to_num(torch.inf).argmin(1).tolist()
        return Refined(torch.stack([way[k][row] for row, k in enumerate(best)]), losses)
