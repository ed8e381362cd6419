"""The base of the backbones through diffusers: loading, the codec, prompts, calling the network.

Only the parts are diffusers'; the process (`augment.diffusion.process`) is read from the
checkpoint's scheduler file, and the solvers are this package's own.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from augment.core.errors import AugmentWarning, UserError
from augment.diffusion.backbone import Condition, Recipe, Timestep, as_times
from augment.diffusion.checkpoints.adapter import adapter_of
from augment.diffusion.checkpoints.checkpoint import MAX_NUMBER, Checkpoint, read_process
from augment.diffusion.checkpoints.codec import Codec, load_tiny
from augment.diffusion.checkpoints.heads import ImageHeads, refuse_beside_heads
from augment.diffusion.checkpoints.hub import damaged, quiet, require
from augment.diffusion.checkpoints.lora import add_lora, find_lora
from augment.diffusion.checkpoints.tokens import (
    TOKENS,
    TokenRows,
    append_tokens,
    expanded,
    load_tokens,
    start_rows,
    tokenizer_of,
)
from augment.diffusion.conditions import HEADS
from augment.diffusion.process import VariancePreserving
from augment.diffusion.usage import FEW_STEPS, Usage, few_step_sign

_MAX_CACHED = 2**30
"""Bytes of prompts' embeddings that are kept."""


class LatentDiffusion:
    """Base of the diffusers backbones; see `augment.diffusion.backbone.Backbone`.

    A subclass embeds prompts (`embed`) and calls its network (`answer`).

    Args:
        checkpoint: from `augment.diffusion.checkpoints.find.find_checkpoint`.
        device: where everything runs.
        dtype: precision of the networks; by default float32 on the CPU, ``half`` on a GPU.
        resolution: of the images, in pixels; the model's own by default.
        spacing, clean_end, zero_terminal_snr: see `read_process`.
        lora: low-rank weights to add: a safetensors file, a folder, or ``owner/name``.
        lora_scale: factor of the low-rank weights.
        adapter: folder of ``latent-augment adapt`` or of diffusers' training scripts, or
            ``owner/name``: low-rank weights, tokens, or both; or a file of tokens.
        tiny_vae: folder or repository of an ``AutoencoderTiny`` to decode with: faster, less exact.
        compile: compile the network's repeated blocks, each kind and shape once.

    Attributes:
        half: precision on a GPU.
        blocks: classes of the repeated blocks.
        cell: side of the network's patches, in latent pixels.
        packing: side of the patches whose pixels the network takes as channels; 1 is none.
        own_resolution: of the family, in pixels, if its networks do not say it.
        needed: parts of the pipeline that it cannot do without, beside the network.
        absent: parts and options of the pipeline class to load it without.
        fixed: options that it does not have.
        plain: settings that the network must not have.
        counted: tokenizers whose ``model_max_length`` bounds prompts.
        usage: what its family, or a few-step model, is used with.

    Raises:
        UserError: missing packages, weights or network, or a resolution that does not fit.

    Warns:
        AugmentWarning: a few-step model.
    """

    name: str
    part = "unet"
    half = torch.float16
    usage = Usage()
    blocks: tuple[str, ...] = ("BasicTransformerBlock", "ResnetBlock2D")
    cell = 1
    packing = 1
    own_resolution: int | None = None
    channels = 3
    needed: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    plain = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    counted: tuple[str, ...] = ("tokenizer", "tokenizer_2")

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        resolution: int | None = None,
        spacing: str = "trailing",
        clean_end: bool = True,
        zero_terminal_snr: bool = False,
        lora: str | Path | None = None,
        lora_scale: float = 1.0,
        adapter: str | Path | None = None,
        tiny_vae: str | Path | None = None,
        compile: bool = False,
    ) -> None:
        given, lora = adapter_of(adapter, lora, checkpoint.local_files_only)
        require("transformers", "accelerate", *(["peft"] if lora else []))
        self.device = torch.device(device)
        self.dtype = dtype or (self.half if self.device.type == "cuda" else torch.float32)
        checkpoint = checkpoint.fetch(self.absent)
        parts = checkpoint.parts(self.absent)
        for name in (self.part, "vae", *self.needed):
            if name not in parts:
                raise UserError(
                    f"expected {name} in {checkpoint.source}, got none; take another checkpoint, "
                    "or leave out the option that asks for it"
                )
        self.pipe = self.load(checkpoint, parts)
        self.net = getattr(self.pipe, self.part)
        self._check_parts(checkpoint.source)
        self.recipe: Recipe = {}
        self._cache: dict[str, Condition] = {}
        self._cached = 0  # bytes
        weights = checkpoint.digest(parts)
        self.adapted_prompts = given.prompts if given else {}
        adapted = given.fingerprint() if given else {}
        if given:
            given.check(weights)
            self.load_tokens(given.vectors())
        if lora:
            file = find_lora(lora, checkpoint.local_files_only)
            adapted = self.add_lora(file, lora_scale) | adapted
        for name in parts:
            # not diffusers' own ``to``, which warns of half precision that nobody asked for
            module = getattr(self.pipe, name).eval().requires_grad_(False)
            nn.Module.to(module, self.device, self.dtype)
        self.heads: ImageHeads | None = None
        if given and given.heads:
            refuse_beside_heads(compile=compile, ip_adapter=getattr(self, "ip_adapter", None))
            heads = ImageHeads.load(self.net, given.heads)
            self.heads = heads.to(self.device, self.dtype)
        tiny = load_tiny(tiny_vae, checkpoint.local_files_only)
        self.codec = Codec(self.pipe.vae, self.device, self.vae_dtype(), tiny)
        self._set_size(resolution)
        with damaged(checkpoint.source):
            config = self.pipe.scheduler.config
            settings = spacing, clean_end, zero_terminal_snr, self.mu(config)
            self.process = read_process(config, *settings)
        self.prepare(compile)
        self.net.requires_grad_(False)  # fused projections are new
        self.usage = self.family_usage()
        self._check_steps(checkpoint.source, lora)
        self.fingerprint = {
            "name": self.name,
            "weights": weights,
            "process": repr(self.process),
            "resolution": str(self.resolution),
            **adapted,
        }

    def load(self, checkpoint: Checkpoint, parts: Sequence[str]) -> Any:
        """Load the pipeline, on the CPU."""
        return checkpoint.load(self.dtype, parts, self.absent)

    def mu(self, config: Mapping[str, Any]) -> float | None:
        """Return the parameter of the shift at this resolution, of a scheduler that needs it."""
        return None

    def _check_parts(self, source: str) -> None:
        """Refuse a network that is not a plain text-to-image one, and prompts of no length."""
        config, latent = self.net.config, self.pipe.vae.config.latent_channels * self.packing**2
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
        for name in self.counted:
            length = getattr(getattr(self.pipe, name, None), "model_max_length", 77)
            if type(length) is not int or not 2 < length < MAX_NUMBER:
                raise UserError(
                    f"expected a model_max_length of {name} in {source}, got {length!r}; "
                    "download it again"
                )

    def load_tokens(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add tokens that were trained before, by text encoder."""
        load_tokens(self.pipe, found)

    def add_lora(self, path: Path, scale: float) -> dict[str, str]:
        """Add low-rank weights; return the entry in the fingerprint."""
        return add_lora(self.pipe, path, scale)

    def family_usage(self) -> Usage:
        """Return what models of this family are used with."""
        return self.usage

    def few_step_sign(self) -> str:
        """Return what shows that the pipeline is a few-step one, beside scheduler and names."""
        return "is_distilled in its index" if self.pipe.config.get("is_distilled") else ""

    def _check_steps(self, source: str, lora: str | Path | None) -> None:
        """Warn of a model that is distilled to few steps, and sample it as such."""
        configs = self.pipe.config, self.net.config
        names = [config.get("_name_or_path") for config in configs]
        sign = few_step_sign(self.pipe.scheduler.config, source, lora, *names)
        sign = sign or self.few_step_sign()
        if sign and self.usage.template:
            self.usage = FEW_STEPS
            warnings.warn(
                f"expected a model of many steps, got {source}, a few-step one by {sign}: such a "
                "model forgets its noise, so that its latents say little of their images; take "
                "the model that it was distilled from",
                AugmentWarning,
                stacklevel=5,
            )

    def _set_size(self, resolution: int | None) -> None:
        """Set the resolution and the latent shape; the network's own by default."""
        factor, own = self.codec.factor, self.own_resolution
        said = self.net.config.get("sample_size")
        if own is None and type(said) is int and said > 0:
            own = said * factor
        if resolution is None and own is None:
            raise UserError(
                f"expected a network that says its sample_size, got {said!r}; give resolution"
            )
        self.resolution: int = resolution or own or 0
        if self.resolution % (factor * self.cell) or self.resolution < 1:
            raise UserError(
                f"expected a resolution that is a multiple of {factor * self.cell}, got "
                f"{resolution}; this model's own is {own}"
            )
        size = self.resolution // factor
        positions = self.net.config.get("pos_embed_max_size")
        if positions and size > positions * self.cell:
            raise UserError(
                f"expected a resolution of at most {positions * self.cell * factor}, got "
                f"{resolution}; the network has no positions beyond"
            )
        self.latent_shape: tuple[int, int, int] = (self.codec.channels, size, size)

    def vae_dtype(self) -> torch.dtype:
        """Return the autoencoder's precision."""
        return self.dtype

    def prepare(self, compile: bool) -> None:
        """Make the network fast where that does not change its output."""
        if compile:
            _compile_blocks(self.net, self.blocks)

    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c H W"]:
        """Encode images to the means of the posteriors."""
        return self.codec.encode(images.to(self.device))

    def decode(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Decode clean latents to images in [0, 1], float32."""
        return self.codec.decode(clean.to(self.device))

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Embed prompts one by one, once each, so that rows do not depend on the batch.

        Raises:
            UserError: a prompt is too long.
        """
        rows = [self._row(prompt) for prompt in prompts or [""]]
        rows = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        found = rows if prompts else {key: value[:0] for key, value in rows.items()}
        return self._with_heads(found, prompts)

    def _with_heads(self, rows: Condition, prompts: Sequence[str]) -> Condition:
        """Add the weights of the image heads of prompts, if there are any."""
        return rows if self.heads is None else {**rows, HEADS: self.heads.of(prompts)}

    def _row(self, prompt: str) -> Condition:
        if prompt not in self._cache:
            # ordinary tensors, also under the caller's inference mode: null-text differentiates
            with torch.inference_mode(False), torch.no_grad():
                row = self.embed(prompt)
            self._cache[prompt] = row
            self._cached += _bytes_of(row)
            while len(self._cache) > 1 and self._cached > _MAX_CACHED:
                self._cached -= _bytes_of(self._cache.pop(next(iter(self._cache))))
        return self._cache[prompt]

    def embed(self, prompt: str) -> Condition:
        """Return the condition of a prompt, of one row."""
        raise NotImplementedError

    def network(
        self, latent: Float[Tensor, "n c h w"], timestep: Timestep, condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        """Return the network's output in float32; differentiable in the latent and ``text``."""
        if not len(latent):  # diffusers' attention cannot reshape nothing
            return torch.zeros_like(latent)
        times = as_times(timestep, latent)
        if self.heads is not None:
            self.heads.weights = condition[HEADS]
        return self.answer(latent.to(self.dtype), times, condition).float()

    def answer(self, latent: Tensor, times: Float[Tensor, " n"], condition: Condition) -> Tensor:
        """Call the network."""
        raise NotImplementedError

    def sample_by_diffusers(
        self, latents: Float[Tensor, "n c h w"], prompts: Sequence[str], steps: int, guidance: float
    ) -> Float[Tensor, "n 3 H W"] | None:
        """Sample and decode with diffusers' own pipeline and scheduler, to compare with ours.

        The steps are of first order, at the process's noise levels. The network is ours, with its
        fused layers; latents have its precision, where ours have float32.

        Returns:
            float32 images in [0, 1], or None if the pipeline cannot begin at given latents.
        """
        options = self.pipeline_options(latents.to(self.device), steps, guidance)
        if options is None:
            return None
        pipe, own = self.pipe, (self.pipe.scheduler, self.pipe.vae)
        pipe.set_progress_bar_config(disable=True)
        with torch.no_grad(), quiet():
            try:
                pipe.scheduler = self._first_order()
                # the pipeline decides itself whether it decodes in float32
                pipe.vae = nn.Module.to(copy.deepcopy(own[1]), self.dtype)
                images = pipe(
                    prompt=list(prompts), num_inference_steps=steps, height=self.resolution,
                    width=self.resolution, output_type="pt", **options,
                ).images  # fmt: skip
            finally:
                pipe.scheduler, pipe.vae = own
        return images.float()

    def _first_order(self) -> Any:
        """Return diffusers' scheduler that walks the process's noise levels by first order."""
        from diffusers import DDIMScheduler

        process, scheduler = self.process, self.pipe.scheduler
        if not isinstance(process, VariancePreserving):
            return scheduler
        return DDIMScheduler.from_config(
            scheduler.config, timestep_spacing=process.spacing, set_alpha_to_one=process.clean_end,
            rescale_betas_zero_snr=process.zero_terminal_snr, clip_sample=False,
        )  # fmt: skip

    def pipeline_options(
        self, latents: Float[Tensor, "n c h w"], steps: int, guidance: float
    ) -> dict[str, Any] | None:
        """Return the options of diffusers' pipeline for latents; None if it takes none.

        Args:
            latents: at the noisiest level, float32.
            steps: solver steps.
            guidance: scale of classifier-free guidance.
        """
        return {"latents": latents.to(self.dtype), "guidance_scale": guidance}

    def trainable(self) -> nn.Module:
        """Return the network with its layers as the checkpoint has them, to be trained further."""
        return self.net

    def encoders(self) -> dict[str, nn.Module]:
        """Return the CLIP text encoders, which can be trained, by diffusers' names."""
        every: dict[str, Any] = {name: getattr(self.pipe, name, None) for name in TOKENS}
        return {key: one for key, one in every.items() if type(one).__name__.startswith("CLIP")}

    def add_tokens(self, words: Mapping[str, str], keep_norm: bool) -> dict[str, TokenRows]:
        """Add tokens that begin as words; return their rows, to be trained, by text encoder."""
        self._cache.clear()
        made = {}
        for name, encoder in self.encoders().items():
            tokenizer = getattr(self.pipe, tokenizer_of(name))
            rows, norm = start_rows(encoder, tokenizer, [*words.values()], keep_norm)
            by_token = dict(zip(words, rows, strict=True))
            made[name] = append_tokens(encoder, tokenizer, by_token, norm)
        return made

    def embedded(self, prompts: Sequence[str]) -> Condition:
        """Embed prompts as `condition` does, differentiably in what text encoders learn."""
        self._cache.clear()  # of vectors that are about to change
        rows = [self.embed(prompt) for prompt in prompts]
        found = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
        return self._with_heads(found, prompts)

    def refer(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n ..."]:
        """Return the image heads of images as references.

        Raises:
            UserError: the backbone has none.
        """
        if self.heads is None:
            raise UserError(
                "expected a backbone with ip_adapter or image heads for references, got one without"
            )
        return self.heads.refer(images)

    def save(self, folder: Path) -> Path:
        """Write the pipeline below a folder; return the path for `load_backbone`."""
        self.pipe.save_pretrained(folder / "model")
        return folder / "model"


def check_length(
    prompt: str, tokenizer: Any, limit: int | None = None, cure: str = "shorten it"
) -> None:
    """Refuse a prompt that a tokenizer of transformers would cut off.

    Args:
        prompt: to count.
        tokenizer: of transformers.
        limit: maximum number of tokens; the tokenizer's by default.
        cure: for the error.
    """
    limit, given = limit or tokenizer.model_max_length, prompt
    prompt = expanded(prompt, tokenizer)
    special = tokenizer.num_special_tokens_to_add()
    count = len(tokenizer(prompt, verbose=False).input_ids) - special
    if count > limit - special:
        raise UserError(
            f"expected a prompt of at most {limit - special} tokens, got {count} in {given!r}; "
            f"{cure}"
        )


def _bytes_of(condition: Condition) -> int:
    return sum(tensor.nbytes for tensor in condition.values())


def _compile_blocks(network: nn.Module, names: Sequence[str]) -> None:
    """Compile every block of these classes; blocks alike in code and shape share their graph."""
    import torch._dynamo

    settings: Any = torch._dynamo.config
    # a UNet has a dozen shapes of the same block, times batch sizes; the default limit is 8
    settings.recompile_limit = max(settings.recompile_limit, 128)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 1024)
    for module in network.modules():
        if type(module).__name__ in names:
            module.compile(dynamic=False)
