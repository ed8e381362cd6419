"""Stable Diffusion 1, 2 and XL through diffusers, and what all of diffusers' models share.

Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, arXiv 2112.10752;
Podell et al., *SDXL*, arXiv 2307.01952. Only the parts are diffusers': the process is ours
(`augment.diffusion.process`), read from the checkpoint's scheduler file, and so are the solvers.
"""

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from augment.diffusion.backbone import Condition
from augment.diffusion.checkpoint import (
    Checkpoint,
    brief,
    damaged,
    explained,
    quiet,
    read_process,
    require,
)
from augment.errors import PrecisionWarning, UserError

PIXELS = 2**22
"""The autoencoder sees so many at a time, which bounds its memory; 16 images of 512 pixels."""

PROMPTS = 1000
"""Prompts whose embeddings are kept."""

LORA = "pytorch_lora_weights.safetensors"
DIRECTIONS = {"down": "lora_A", "up": "lora_B"}


class LatentDiffusion:
    """What the diffusers backbones share; see `augment.diffusion.backbone.Backbone`.

    A subclass says what the prompts' conditions are (`embed`) and how its network is called
    (`answer`).

    Args:
        checkpoint: from `augment.diffusion.checkpoint.find_checkpoint`.
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
        self.pipe = checkpoint.load(self.dtype, parts, **absent)
        self.process = read_process(self.pipe.scheduler.config, **process)
        self.recipe: dict[str, Any] = {}
        self._known: dict[str, Condition] = {}
        print_of_lora = {}
        if lora:
            file = find_lora(lora, checkpoint.local_files_only)
            add_lora(self.pipe, file, lora_scale)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            print_of_lora = {"lora": f"{digest} × {lora_scale:g}"}
        for name in parts:
            # not diffusers' own ``to``, which warns of half precision that nobody asked for
            module = getattr(self.pipe, name).eval().requires_grad_(False)
            nn.Module.to(module, self.device, self.dtype)
        self.net = getattr(self.pipe, self.part)
        self.codec = Codec(self.pipe.vae, self.device, self.vae_dtype(), load_tiny(tiny_vae))
        self._set_size(resolution)
        self.prepare(compile)
        self.fingerprint = {
            "name": self.name,
            "weights": checkpoint.digest(parts),
            "process": repr(self.process),
            "resolution": str(self.resolution),
            **print_of_lora,
        }

    def _set_size(self, resolution: int | None) -> None:
        """Resolution and latent shape, by the network's own or the wished size."""
        factor = self.codec.factor
        self.resolution: int = resolution or self.net.config.sample_size * factor
        if self.resolution % (factor * self.cell) or self.resolution < 1:
            raise UserError(
                f"expected a resolution that is a multiple of {factor * self.cell}, got "
                f"{resolution}; this model's own is {self.net.config.sample_size * factor}"
            )
        size = self.resolution // factor
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
        self, latent: Float[Tensor, "n c h w"], timestep: float, condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        """The network's answer in float32; differentiable in the latent and ``text``."""
        if not len(latent):  # diffusers' attention cannot reshape nothing
            return torch.zeros_like(latent)
        times = torch.full((len(latent),), float(timestep), device=self.device)
        return self.answer(latent.to(self.dtype), times, condition).float()

    def answer(self, latent: Tensor, times: Float[Tensor, " n"], condition: Condition) -> Tensor:
        """The network called the way it wants to be."""
        raise NotImplementedError


class Codec:
    """An autoencoder between images in [0, 1] and latents of unit variance.

    Where half precision overflows, it goes on in float32.

    Args:
        vae: diffusers' ``AutoencoderKL``.
        device, dtype: where and in what precision it runs.
        tiny: an ``AutoencoderTiny`` to decode with instead.
    """

    def __init__(
        self, vae: Any, device: torch.device, dtype: torch.dtype, tiny: Any = None
    ) -> None:
        self.vae, self.decoder = vae, tiny or vae
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        for module in (self.vae, self.decoder):
            nn.Module.to(module, device, dtype)
            nn.Module.to(module, memory_format=torch.channels_last)

    def encode(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n c H W"]:
        """Posterior means, (x − shift)·scale."""
        config = self.vae.config
        if not len(images):
            height, width = (side // self.factor for side in images.shape[2:])
            return images.new_zeros(0, config.latent_channels, height, width)
        clean = self._run(
            lambda part: self.vae.encode(part.to(self.vae.dtype)).latent_dist.mode(),
            2 * images - 1,
            PIXELS // images[0, 0].numel(),
        )
        return (clean - (config.shift_factor or 0)) * config.scaling_factor

    def decode(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Images, clamped to [0, 1]."""
        config = self.decoder.config
        if not len(clean):
            return clean.new_zeros(0, 3, *(side * self.factor for side in clean.shape[2:]))
        images = self._run(
            lambda part: self.decoder.decode(part.to(self.decoder.dtype), return_dict=False)[0],
            clean / config.scaling_factor + (config.shift_factor or 0),
            PIXELS // (clean[0, 0].numel() * self.factor**2),
        )
        return (images / 2 + 0.5).clamp(0, 1)

    def _run(self, call: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
        done = torch.cat([call(part).float() for part in rows.split(max(size, 1))])
        if done.isfinite().all():
            return done
        if not rows.isfinite().all():
            raise UserError(
                "expected finite numbers, got overflow in what goes into the autoencoder; "
                "take dtype float32 or bfloat16"
            )
        if self.vae.dtype == self.decoder.dtype == torch.float32:
            raise UserError(
                "expected finite numbers from the autoencoder, got overflow in float32; "
                "look whether the checkpoint is whole"
            )
        warnings.warn(
            f"the autoencoder overflowed in {self.vae.dtype} and goes on in float32; "
            "an autoencoder made for half precision would be faster",
            PrecisionWarning,
            stacklevel=4,
        )
        for module in (self.vae, self.decoder):
            module.float()
        return self._run(call, rows, size)


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1 and 2: a UNet and one CLIP text encoder.

    Args:
        checkpoint, device, dtype: see `LatentDiffusion`.
        resolution, lora, lora_scale, tiny_vae, compile: see `LatentDiffusion`.
        spacing, clean_end, zero_terminal_snr: see `read_process`.
    """

    name = "stable-diffusion"
    absent = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}  # noqa: RUF012

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
        tiny_vae: str | Path | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__(
            checkpoint,
            device,
            dtype,
            absent=self.absent,
            resolution=resolution,
            lora=lora,
            lora_scale=lora_scale,
            tiny_vae=tiny_vae,
            compile=compile,
            spacing=spacing,
            clean_end=clean_end,
            zero_terminal_snr=zero_terminal_snr,
        )

    def prepare(self, compile: bool) -> None:
        """Channels last, and one product in place of three; the compiler does that by itself."""
        nn.Module.to(self.net, memory_format=torch.channels_last)
        if not compile:
            self.net.fuse_qkv_projections()
        super().prepare(compile)

    def embed(self, prompt: str) -> Condition:
        """(1, 77, width) of the last layer."""
        check_length(prompt, self.pipe.tokenizer)
        text, _ = self.pipe.encode_prompt(prompt, self.device, 1, False)
        return {"text": text.float()}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The UNet's ε or v."""
        text = condition["text"].to(self.dtype)
        return self.net(latent, times, text, return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    """SDXL: two CLIPs side by side, the second's pooled output, and the image's size and crop.

    The network is told that the image was as large as the resolution, and not cropped.
    """

    name = "sdxl"
    absent = {"feature_extractor": None, "image_encoder": None}  # noqa: RUF012

    def vae_dtype(self) -> torch.dtype:
        """float32 where the original autoencoder would overflow in float16."""
        narrow = self.dtype == torch.float16 and self.pipe.vae.config.force_upcast
        return torch.float32 if narrow else self.dtype

    def embed(self, prompt: str) -> Condition:
        """``text`` (1, 77, width), ``pooled`` (1, width) and ``time_ids`` (1, 6).

        The unconditional ``text`` and ``pooled`` are zeros if the model was trained so.
        """
        check_length(prompt, self.pipe.tokenizer)
        check_length(prompt, self.pipe.tokenizer_2)
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=False
        )
        if not prompt and self.pipe.config.force_zeros_for_empty_prompt:
            text, pooled = torch.zeros_like(text), torch.zeros_like(pooled)
        size = float(self.resolution)
        time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=self.device)
        return {"text": text.float(), "pooled": pooled.float(), "time_ids": time_ids}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The UNet's ε or v."""
        added = {
            "text_embeds": condition["pooled"].to(self.dtype),
            "time_ids": condition["time_ids"],
        }
        text = condition["text"].to(self.dtype)
        return self.net(latent, times, text, added_cond_kwargs=added, return_dict=False)[0]


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


def load_tiny(source: str | Path | None) -> Any:
    """An ``AutoencoderTiny``, or None for none."""
    if source is None:
        return None
    from diffusers import AutoencoderTiny

    with quiet(), damaged(source):
        tiny = AutoencoderTiny.from_pretrained(str(source), use_safetensors=True)
    return tiny.eval().requires_grad_(False)


def find_lora(source: str | Path, local_files_only: bool = False) -> Path:
    """The file of a LoRA: itself, a folder's or a repository's ``pytorch_lora_weights``.

    Raises:
        UserError: no such file, or no safetensors.
    """
    path = Path(source)
    if path.is_dir():
        path /= LORA
    elif not path.suffix and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        from huggingface_hub import hf_hub_download

        with explained(str(source)):
            path = Path(hf_hub_download(str(source), LORA, local_files_only=local_files_only))
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(
            f"expected a LoRA in a .safetensors file or a folder with {LORA}, got {path}, which is "
            "no such file"
        )
    return path


def add_lora(pipe: Any, path: Path, scale: float) -> None:
    """Add low-rank weights to a pipeline's: W + scale·up·down (Hu et al., arXiv 2106.09685).

    Takes what diffusers takes, and the attention processors of diffusers 0.20 and before
    (``….attn1.processor.to_q_lora.down.weight``).

    Raises:
        UserError: weights that have no place in this model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    with damaged(path):
        state = {modern(key): value for key, value in load_file(path).items()}
    wanted = sum(bool(re.search(r"(lora_A|down)\.weight$", key)) for key in state)
    reason = f"{wanted} layers of low rank"
    with quiet():
        try:
            pipe.load_lora_weights(state, adapter_name="lora")
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            reason = brief(error)
        networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        layers = [layer for network in networks for layer in network.modules()]
        placed = sum(isinstance(layer, BaseTunerLayer) for layer in layers)
        if placed < max(wanted, 1):
            raise UserError(
                f"expected a LoRA for this model, got {path}, of which {placed} layers have a "
                f"place in it: {reason}; take the model that it was trained on"
            )
        pipe.fuse_lora(lora_scale=scale)
        pipe.unload_lora_weights()


def modern(key: str) -> str:
    """A LoRA's key in peft's words, if it is of an attention processor."""
    match = re.fullmatch(r"(?:unet\.)?(.+)\.processor\.(to_\w+?)_lora\.(down|up)\.weight", key)
    if not match:
        return key
    layer = "to_out.0" if match[2] == "to_out" else match[2]
    return f"unet.{match[1]}.{layer}.{DIRECTIONS[match[3]]}.weight"


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
