"""What the backbones through diffusers share: loading, the codec, prompts, one call of the network.

Only the parts are diffusers': the process is ours (`augment.diffusion.process`), read from the
checkpoint's scheduler file, and so are the solvers.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.diffusion.backbone import Condition, Timestep, as_times
from augment.diffusion.checkpoints.checkpoint import LARGEST, Checkpoint, read_process
from augment.diffusion.checkpoints.codec import Codec, load_tiny
from augment.diffusion.checkpoints.hub import damaged, require
from augment.diffusion.checkpoints.lora import add_lora, find_lora

PROMPTS = 1000
"""Prompts whose embeddings are kept."""


class LatentDiffusion:
    """What the diffusers backbones share; see `augment.diffusion.backbone.Backbone`.

    A subclass says what the prompts' conditions are (`embed`) and how its network is called
    (`answer`).

    Args:
        checkpoint: from `augment.diffusion.checkpoints.find.find_checkpoint`.
        device: where everything runs.
        dtype: the networks' precision; by default float32 on the CPU, ``half`` on a GPU.
        absent: parts and options of the pipeline class to load it without.
        resolution: of the images, in pixels; the model's own by default.
        lora: low-rank weights to add: a safetensors file, a folder, or ``owner/name``.
        lora_scale: how much of them.
        tiny_vae: folder or repository of an ``AutoencoderTiny`` to decode with: faster, less exact.
        compile: compile the network's repeated blocks, each kind and shape once.
        process: keywords of `read_process`.

    Raises:
        UserError: missing packages, weights or network, or a resolution that does not fit.
    """

    name: str
    part = "unet"
    half = torch.float16
    blocks: tuple[str, ...] = ("BasicTransformerBlock", "ResnetBlock2D")
    cell = 1
    channels = 3
    needed: tuple[str, ...] = ()
    plain = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype | None,
        *,
        absent: dict[str, None],
        resolution: int | None = None,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        tiny_vae: str | Path | None = None,
        compile: bool = False,
        **process: Any,
    ) -> None:
        require("transformers", "accelerate", *(["peft"] if lora else []))
        self.device = torch.device(device)
        self.dtype = dtype or (self.half if self.device.type == "cuda" else torch.float32)
        checkpoint = checkpoint.fetch(**absent)
        parts = checkpoint.parts(**absent)
        for name in (self.part, "vae", *self.needed):
            if name not in parts:
                raise UserError(
                    f"expected {name} in {checkpoint.source}, got none; take another checkpoint"
                )
        self.pipe = checkpoint.load(self.dtype, parts, **absent)
        self.net = getattr(self.pipe, self.part)
        self._check_network(checkpoint.source)
        for name in ("tokenizer", "tokenizer_2"):
            length = getattr(getattr(self.pipe, name, None), "model_max_length", 77)
            if type(length) is not int or not 2 < length < LARGEST:
                raise UserError(
                    f"expected a model_max_length of {name} in {checkpoint.source}, got "
                    f"{length!r}; download it again"
                )
        with damaged(checkpoint.source):
            self.process = read_process(self.pipe.scheduler.config, **process)
        self.recipe: dict[str, Any] = {}
        self._known: dict[str, Condition] = {}
        print_of_lora = {}
        if lora:
            file = find_lora(lora, checkpoint.local_files_only)
            print_of_lora = add_lora(self.pipe, file, lora_scale)
        for name in parts:
            # not diffusers' own ``to``, which warns of half precision that nobody asked for
            module = getattr(self.pipe, name).eval().requires_grad_(False)
            nn.Module.to(module, self.device, self.dtype)
        tiny = load_tiny(tiny_vae, checkpoint.local_files_only)
        self.codec = Codec(self.pipe.vae, self.device, self.vae_dtype(), tiny)
        self._set_size(resolution)
        self.prepare(compile)
        self.net.requires_grad_(False)  # fused projections are new
        self.fingerprint = {
            "name": self.name,
            "weights": checkpoint.digest(parts),
            "process": repr(self.process),
            "resolution": str(self.resolution),
            **print_of_lora,
        }

    def _check_network(self, source: str) -> None:
        """Refuse a network that takes, or is told, something else than a text-to-image one."""
        config, latent = self.net.config, self.pipe.vae.config.latent_channels
        if config.in_channels != latent:
            raise UserError(
                f"expected a network of {latent} channels, as the autoencoder's, got {self.part} "
                f"of {config.in_channels} in {source}, as for inpainting; take another model"
            )
        for key in self.plain:
            if config.get(key) is not None:
                raise UserError(
                    f"expected a plain text-to-image network, got {self.part} in {source} with "
                    f"{key} {config[key]!r}; take another checkpoint"
                )

    def _set_size(self, resolution: int | None) -> None:
        """Resolution and latent shape, by the network's own or the wished size."""
        factor, own = self.codec.factor, self.net.config.sample_size
        if not isinstance(resolution, int | None):
            raise UserError(f"expected a resolution in whole pixels, got {resolution!r}")
        if resolution is None and (type(own) is not int or own < 1):
            raise UserError(
                f"expected a network that says its sample_size, got {own!r}; give resolution"
            )
        self.resolution: int = resolution or own * factor
        if self.resolution % (factor * self.cell) or self.resolution < 1:
            raise UserError(
                f"expected a resolution that is a multiple of {factor * self.cell}, got "
                f"{resolution}; this model's own is {own * factor}"
            )
        size = self.resolution // factor
        most = self.net.config.get("pos_embed_max_size")
        if most and size > most * self.cell:
            raise UserError(
                f"expected a resolution of at most {most * self.cell * factor}, got {resolution}; "
                "the network knows no positions beyond"
            )
        self.latent_shape: tuple[int, int, int] = (self.net.config.in_channels, size, size)

    def vae_dtype(self) -> torch.dtype:
        """The autoencoder's precision."""
        return self.dtype

    def prepare(self, compile: bool) -> None:
        """Make the network fast where that does not change what it answers."""
        if compile:
            compile_blocks(self.net, self.blocks)

    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c H W"]:
        """The means of the posteriors."""
        return self.codec.encode(images.to(self.device))

    def decode(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Images in [0, 1], float32."""
        return self.codec.decode(clean.to(self.device))

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Prompts are embedded one by one, once each, so that no batch changes another's rows.

        Raises:
            UserError: a prompt that is too long.
        """
        rows = [self._row(prompt) for prompt in prompts or [""]]
        rows = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        return rows if prompts else {key: value[:0] for key, value in rows.items()}

    def _row(self, prompt: str) -> Condition:
        if prompt not in self._known:
            # ordinary tensors, also under the caller's inference mode: null-text differentiates
            with torch.inference_mode(False), torch.no_grad():
                row = self.embed(prompt)
            while len(self._known) >= PROMPTS:
                del self._known[next(iter(self._known))]
            self._known[prompt] = row
        return self._known[prompt]

    def embed(self, prompt: str) -> Condition:
        """One prompt's condition, of one row."""
        raise NotImplementedError

    def network(
        self, latent: Float[Tensor, "n c h w"], timestep: Timestep, condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        """The network's answer in float32; differentiable in the latent and ``text``."""
        if not len(latent):  # diffusers' attention cannot reshape nothing
            return torch.zeros_like(latent)
        times = as_times(timestep, latent)
        return self.answer(latent.to(self.dtype), times, condition).float()

    def answer(self, latent: Tensor, times: Float[Tensor, " n"], condition: Condition) -> Tensor:
        """The network called the way it wants to be."""
        raise NotImplementedError

    def trainable(self) -> nn.Module:
        """The network with its layers as the checkpoint has them, to be trained further."""
        return self.net

    def save(self, folder: Path) -> Path:
        """Write the pipeline below a folder; the place is what `load_backbone` takes."""
        self.pipe.save_pretrained(folder / "model")
        return folder / "model"


def check_length(prompt: str, tokenizer: Any, limit: int | None = None, mend: str = "") -> None:
    """Refuse a prompt that the tokenizer would cut off.

    Args:
        prompt: to count.
        tokenizer: of transformers.
        limit: of tokens; the tokenizer's by default.
        mend: what to do.
    """
    limit = limit or tokenizer.model_max_length
    special = tokenizer.num_special_tokens_to_add()
    count = len(tokenizer(prompt, verbose=False).input_ids) - special
    if count > limit - special:
        raise UserError(
            f"expected a prompt of at most {limit - special} tokens, got {count} in {prompt!r}; "
            f"{mend or 'shorten it'}"
        )


def compile_blocks(network: nn.Module, names: Sequence[str]) -> None:
    """Compile every block of these classes; blocks alike in code and shape share their graph."""
    import torch._dynamo

    settings: Any = torch._dynamo.config
    # a UNet has a dozen shapes of the same block, times batch sizes; the default limit is 8
    settings.recompile_limit = max(settings.recompile_limit, 128)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 1024)
    for module in network.modules():
        if type(module).__name__ in names:
            module.compile(dynamic=False)
