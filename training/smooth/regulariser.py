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
import re
from collections.abc import Callable, Sequence
from functools import partial

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from augment.core.errors import UserError
from augment.diffusion import known_options
from augment.diffusion.backbone import Backbone, Trainable
from augment.diffusion.checkpoints.lora import inject_adapters
from augment.diffusion.process import GOALS, PREDICTIONS, Process
from training.checks import at_least, expect
from training.lightning import Checkpoint
from training.models.finetune import ends_in
from training.smooth.data import Batch

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Names that diffusers gives the four projections of an attention layer."""

_RATE = 0.01  # of the running mean a


def measured(
    process: Process,
    network: Callable[[Tensor, Tensor], Tensor],
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
    pairs = torch.tensor([process.alpha_sigma(level) for level in levels]).to(clean)
    alpha, sigma = pairs.T.reshape(2, -1, 1, 1, 1)
    times = torch.tensor([process.timestep(level) for level in levels]).to(clean)
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


class SmoothDiffusion(pl.LightningModule):
    """A backbone's network in training, by low-rank adapters (LoRA, arXiv 2106.09685) or in full.

    The network is changed in place, so that the backbone is the smoothed one afterwards.

    Args:
        backbone: the model, in float32.
        weight: λ.
        rank: of the adapters; 0 trains all weights.
        targets: ends of the names of the linear layers that get adapters.
        lr: the rate, which is constant.
        weight_decay: of AdamW: the paper's; its code has 1e-2.
        seed: of the adapters' first weights.

    Attributes:
        a: the running mean of v; NaN before the first batch.

    Raises:
        UserError: a backbone that cannot be trained or is not in float32, a layer that is not
            there, or a number out of its range.
    """

    a: Tensor

    def __init__(
        self,
        backbone: Backbone,
        weight: float = 1.0,
        rank: int = 8,
        targets: Sequence[str] = PROJECTIONS,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        at_least(0, weight=weight, rank=rank, weight_decay=weight_decay)
        expect(lr > 0, "lr > 0", lr)
        self.backbone = _checked(backbone, rank)
        self.weight, self.rank, self.lr, self.weight_decay = weight, rank, lr, weight_decay
        self.network = self.backbone.trainable()
        self.network.requires_grad_(not rank)
        if rank:
            _add_adapters(self.network, rank, targets, seed)
        self.register_buffer("a", torch.tensor(math.nan))
        self.strict_loading = False  # a checkpoint has what is trained, not the whole network

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return L of a batch."""
        with torch.no_grad():
            clean = self.backbone.encode(batch["image"])
        condition = self.backbone.condition(batch["prompt"])
        base, change = measured(
            self.backbone.process,
            partial(self.backbone.network, condition=condition),
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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make AdamW of what is trained."""
        tuned = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(tuned, lr=self.lr, weight_decay=self.weight_decay)

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keep what is trained, and a."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad} | {"a"}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in trained}

    def adapters(self) -> dict[str, Tensor]:
        """Return the low-rank weights by diffusers' names, which `load_backbone` takes as lora."""
        from peft import get_peft_model_state_dict

        state: dict[str, Tensor] = get_peft_model_state_dict(self.network)
        part = self.backbone.part
        return {f"{part}.{k}": v.detach().cpu().contiguous() for k, v in state.items()}


def _checked(backbone: Backbone, rank: int) -> Trainable:
    """Refuse a backbone that cannot be trained, or that cannot load what comes of it."""
    name = backbone.fingerprint["name"]
    if not isinstance(backbone, Trainable):
        raise UserError(f"expected a backbone with a network to train, got {name}; take another")
    if "lora" in backbone.fingerprint:
        raise UserError(
            f"expected {name} without a LoRA, beside which the new one could not be loaded, got "
            "one; leave it out"
        )
    if rank and "lora" not in known_options(type(backbone)):
        raise UserError(f"expected rank 0 for {name}, which takes no LoRA, got {rank}")
    dtypes = {weight.dtype for weight in backbone.trainable().parameters()}
    if dtypes != {torch.float32}:
        raise UserError(
            f"expected {name} in float32 to be trained, got {', '.join(map(str, dtypes))}; "
            "load it with dtype float32"
        )
    return backbone


def _add_adapters(network: nn.Module, rank: int, targets: Sequence[str], seed: int) -> None:
    """Freeze a network but for low-rank adapters, which at first change nothing."""
    for target in targets:
        if not any(isinstance(module, nn.Linear) for _, module in ends_in(network, target)):
            linear = [n for n, module in network.named_modules() if isinstance(module, nn.Linear)]
            ends = {re.sub(r".*\.(?=[a-z])", "", name) for name in linear}
            raise UserError(
                f"expected targets out of the linear layers of {type(network).__name__}, such as "
                f"{', '.join(sorted(ends))}, got {target!r}; correct it"
            )
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.random.default_generator.manual_seed(seed)
        inject_adapters(network, rank, targets)
