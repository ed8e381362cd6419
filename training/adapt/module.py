r"""Training of a backbone on images with prompts: low-rank weights, class tokens, or all weights.

The loss is the mean squared error of the network's own answer (ε, v or velocity) at
:math:`z_u = \alpha z_0 + \sigma\varepsilon`, with the level u uniform: the trained ones of a
variance-preserving process, 1/1000, …, 1 before the shift of a flow.
`augment.training.smooth.regulariser` adds a second term.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.diffusion import known_options
from augment.diffusion.backbone import REFERENCE, Adaptable, Backbone, Trainable
from augment.diffusion.checkpoints.heads import ImageHeads
from augment.diffusion.checkpoints.lora import METADATA, inject_adapters
from augment.diffusion.checkpoints.tokens import TokenRows
from augment.diffusion.conditions import HEADS, Condition
from augment.diffusion.process import GOALS, Process
from augment.training.adapt.data import Batch
from augment.training.adapt.recipe import Recipe
from augment.training.lightning import Checkpoint
from augment.training.models.finetune import ends_in

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
"""Names that diffusers gives the four projections of an attention layer."""

TEXT_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Names that transformers gives those of a text encoder."""

Network = Callable[[Tensor, Tensor], Tensor]
"""(latents, timesteps) → answers: a network with its condition filled in."""


def amounts(
    process: Process, levels: Sequence[float], like: Tensor
) -> tuple[Float[Tensor, "n 1 1 1"], Float[Tensor, "n 1 1 1"], Float[Tensor, " n"]]:
    """Return α, σ and the timestep of each row's level."""
    pairs = torch.tensor([process.alpha_sigma(level) for level in levels]).to(like)
    alpha, sigma = pairs.T.reshape(2, -1, 1, 1, 1)
    return alpha, sigma, torch.tensor([process.timestep(level) for level in levels]).to(like)


def denoising_loss(
    process: Process,
    network: Network,
    clean: Float[Tensor, "n c h w"],
    noise: Float[Tensor, "n c h w"],
    levels: Sequence[float],
) -> Float[Tensor, " n"]:
    """Return the loss of each row; see the module.

    Args:
        process: the model's noising process.
        network: its answer to latents and their timesteps (n,).
        clean: clean latents z₀.
        noise: ε.
        levels: u of each row, in (0, 1].
    """
    alpha, sigma, times = amounts(process, levels, clean)
    output = network(alpha * clean + sigma * noise, times)
    goal = GOALS[process.prediction](clean, noise, alpha, sigma)
    return (output - goal).square().flatten(1).mean(1)


class Adaptation(pl.LightningModule):
    """A backbone in training; it is changed in place, and is the adapted one afterwards.

    Args:
        backbone: the model, in one of `dtypes`. What is trained is in float32 all the same.
        recipe: what is trained, and how fast.
        targets: ends of the names of the linear layers that get low-rank weights (LoRA, arXiv
            2106.09685).
        words: word that each new token begins as, by token.
        total: number of optimiser steps, for the schedule.
        seed: of the low-rank weights' first values.
        prior_weight: λ of a batch's prior images, if it has any; see
            `augment.training.adapt.prior`.
        known: of the images that get a head, `augment.diffusion.checkpoints.heads.thumbnails`
            and the prompts of their classes.

    Raises:
        UserError: a backbone that cannot be trained or is of another dtype, a layer that is not
            there, or nothing to train.

    Attributes:
        directions: whether a batch needs them.
        dtypes: of the backbone's frozen weights.
        memory: what a batch takes memory for, beside itself.
    """

    directions = False
    dtypes = (torch.float32, torch.bfloat16)
    memory = ""

    def __init__(
        self,
        backbone: Backbone,
        recipe: Recipe,
        targets: Sequence[str] = PROJECTIONS,
        words: Mapping[str, str] | None = None,
        total: int = 0,
        seed: int = 0,
        prior_weight: float = 0.0,
        known: tuple[Float[Tensor, "n d"], Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        self.prior_weight = prior_weight
        self.backbone = check_trainable(backbone, recipe.rank, self.dtypes)
        self.recipe, self.words, self.total = recipe, [*(words or {})], total
        self.network = self.backbone.trainable()
        self.network.requires_grad_(False)
        encoders, self.tables = {}, nn.ModuleDict()
        if recipe.text_rank or words:
            adaptable = self._adaptable("tokens" if words else "text_rank")
            self.tables.update(adaptable.add_tokens(words, recipe.keep_norm) if words else {})
            encoders = adaptable.encoders() if recipe.text_rank else {}
            if recipe.text_rank and not encoders:
                raise UserError(
                    f"expected text_rank 0 for {backbone.fingerprint['name']}, which has no text "
                    f"encoder, got {recipe.text_rank}"
                )
        self.encoders = nn.ModuleDict(encoders)
        self.heads: ImageHeads | None = None
        if known:
            self.heads = self._add_heads(targets, known, seed)
        elif recipe.rank:
            _add_adapters(self.network, recipe.rank, targets, seed)
        for number, encoder in enumerate(self.encoders.values(), 1):
            _add_adapters(encoder, recipe.text_rank, TEXT_PROJECTIONS, seed + number)
        self.tables.requires_grad_(False)
        for rows in self.tables.values():
            assert isinstance(rows, TokenRows)
            rows.rows.requires_grad_()
        for trained in self.parameters():
            if trained.requires_grad:
                trained.data = trained.data.float()
        self.strict_loading = False  # a checkpoint has what is trained, not the whole network

    def _adaptable(self, option: str) -> Adaptable:
        """Return the backbone, if it can learn words."""
        backbone = self.backbone
        if not isinstance(backbone, Adaptable) or "adapter" not in known_options(type(backbone)):
            raise UserError(
                f"expected a backbone that can be adapted for {option}, got "
                f"{backbone.fingerprint['name']}; leave it out"
            )
        return backbone

    def _add_heads(
        self, targets: Sequence[str], known: tuple[Tensor, Sequence[str]], seed: int
    ) -> ImageHeads:
        """Add low-rank weights to the network with a head for each image."""
        backbone = self._adaptable("image_heads")
        if REFERENCE in backbone.fingerprint:
            raise UserError(
                f"expected {backbone.fingerprint['name']} without references for image_heads, "
                "which are references, got it with some; load it without"
            )
        layers = _layers(self.network, targets)
        heads = ImageHeads.begin(self.network, layers, self.recipe.rank, *known, seed)
        backbone.heads = heads.to(backbone.device)
        return heads

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Return the conditions of prompts, differentiable if any word or text encoder learns."""
        learns = len(self.tables) or len(self.encoders)
        backbone = self.backbone
        if learns and isinstance(backbone, Adaptable):
            return backbone.embedded(prompts)
        return backbone.condition(prompts)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, and λ times that of its prior images."""
        loss = self.loss(batch, *self._inputs(batch))
        if "prior" in batch:
            prior = self._rows(batch["prior"], *self._inputs(batch["prior"])).mean()
            self.log("prior", prior, prog_bar=True, sync_dist=True)
            loss = loss + self.prior_weight * prior
        return loss

    def _inputs(self, batch: Batch) -> tuple[Tensor, Network]:
        """Return the clean latents of a batch, and the network with its conditions."""
        with torch.no_grad():
            clean = self.backbone.encode(batch["image"])
        condition = self.condition(batch["prompt"])
        if self.heads is not None:
            condition[HEADS] = F.one_hot(batch["row"], len(self.heads.prompts)).float()
        return clean, partial(self.backbone.network, condition=condition)

    def _rows(self, batch: Batch, clean: Tensor, network: Network) -> Float[Tensor, " n"]:
        """Return the loss of each row."""
        levels, process = batch["level"].tolist(), self.backbone.process
        return denoising_loss(process, network, clean, batch["noise"], levels)

    def loss(self, batch: Batch, clean: Tensor, network: Network) -> Tensor:
        """Return the loss of a batch by its clean latents, and log it."""
        loss = self._rows(batch, clean, network).mean()
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Make AdamW of what is trained, tokens and heads with their own rates."""
        tuned = [p for p in self.parameters() if p.requires_grad]
        if not tuned:
            raise UserError("expected something to train, got rank 0, no tokens; choose one")
        tokens = [rows for rows in self.tables.parameters() if rows.requires_grad]
        ups = [*self.heads.up] if self.heads is not None else []
        others = {id(p) for p in (*tokens, *ups)}
        rest = [p for p in tuned if id(p) not in others]
        r = self.recipe
        rates = ((rest, r.lr), (ups, r.head_lr), (tokens, r.token_lr))
        groups = [{"params": own, "lr": rate} for own, rate in rates if own]
        decay = self.recipe.weight_decay
        optimizer = torch.optim.AdamW(groups, lr=self.recipe.lr, weight_decay=decay)
        if self.recipe.schedule == "constant" and not self.recipe.warm_up:
            return optimizer
        factor = partial(self.recipe.rate, total=self.total)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Keep what is trained, and buffers of this class."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        trained |= {name for name, _ in self.named_buffers(recurse=False)}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in trained}

    def freeze_backbone(self) -> None:
        """Leave nothing that is differentiated."""
        self.requires_grad_(False)

    def adapters(self) -> dict[str, Tensor]:
        """Return the low-rank weights by diffusers' names, which `load_backbone` takes as lora."""
        from peft import get_peft_model_state_dict

        named: dict[str, Tensor] = {}
        for part, network in self._tuned().items():
            state = get_peft_model_state_dict(network, save_embedding_layers=False)
            for key, value in state.items():
                old = part != self.backbone.part and not key.startswith("text_model.")
                # older versions of transformers have the encoder in a part of this name
                name = f"{part}.text_model.{key}" if old else f"{part}.{key}"
                named[name] = value.detach().cpu().contiguous()
        return named

    def metadata(self) -> dict[str, str]:
        """Return the header of the low-rank weights' file: peft's settings, as diffusers has it."""
        settings = {}
        for part, network in self._tuned().items():
            config: Any = network.peft_config
            settings |= {f"{part}.{key}": v for key, v in config["default"].to_dict().items()}
        text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
        return {"format": "pt", METADATA: text}

    def _tuned(self) -> dict[str, nn.Module]:
        """Return the networks with low-rank weights by diffusers' names."""
        lora = self.recipe.rank and self.heads is None
        own = {self.backbone.part: self.network} if lora else {}
        return own | dict(self.encoders.items())

    def vectors(self) -> dict[str, dict[str, Tensor]]:
        """Return the new tokens' vectors by text encoder and token."""
        return {
            name: {
                token: row.detach().cpu().clone()
                for token, row in zip(self.words, rows.values(), strict=True)
            }
            for name, rows in self.tables.items()
            if isinstance(rows, TokenRows)
        }


def check_trainable(
    backbone: Backbone, rank: int, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> Trainable:
    """Refuse a backbone that cannot be trained, or that cannot load what comes of it."""
    name = backbone.fingerprint["name"]
    if not isinstance(backbone, Trainable):
        raise UserError(f"expected a backbone with a network to train, got {name}; take another")
    adapted = {"lora", "tokens"} & backbone.fingerprint.keys()
    if adapted or getattr(backbone, "heads", None) is not None:
        raise UserError(
            f"expected {name} without a LoRA, image heads or tokens, beside which new ones could "
            "not be loaded, got some; leave them out"
        )
    if rank and "lora" not in known_options(type(backbone)):
        raise UserError(f"expected rank 0 for {name}, which takes no LoRA, got {rank}")
    for weight in backbone.trainable().parameters():
        if weight.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise UserError(
                f"expected {name} in {names} to be trained, got {weight.dtype}; "
                "load it with another dtype"
            )
    return backbone


def _add_adapters(network: nn.Module, rank: int, targets: Sequence[str], seed: int) -> None:
    """Freeze a network but for low-rank adapters, which at first change nothing."""
    _layers(network, targets)
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        torch.random.default_generator.manual_seed(seed)
        inject_adapters(network, rank, targets)


def _layers(network: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the names of the linear layers that end in one of the targets.

    Raises:
        UserError: a target has none.
    """
    for target in targets:
        if not any(isinstance(module, nn.Linear) for _, module in ends_in(network, target)):
            linear = [n for n, module in network.named_modules() if isinstance(module, nn.Linear)]
            ends = {re.sub(r".*\.(?=[a-z])", "", name) for name in linear}
            raise UserError(
                f"expected targets out of the linear layers of {type(network).__name__}, such as "
                f"{', '.join(sorted(ends))}, got {target!r}; correct it"
            )
    ends = tuple(f".{target}" for target in targets)
    named = network.named_modules()
    return [n for n, part in named if f".{n}".endswith(ends) and isinstance(part, nn.Linear)]
