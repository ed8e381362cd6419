"""Stable Diffusion 1, 2 and XL through diffusers: a UNet and one or two CLIP text encoders.

Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, arXiv 2112.10752;
Podell et al., *SDXL*, arXiv 2307.01952.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.diffusion.backbone import REFERENCE, Condition
from augment.diffusion.backbones.latent_diffusion import LatentDiffusion, check_length
from augment.diffusion.checkpoints.checkpoint import Checkpoint
from augment.diffusion.checkpoints.ip_adapter import ImageEncoder, IPAdapter
from augment.diffusion.usage import PHOTO, Usage


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1 and 2: a UNet and one CLIP text encoder.

    Args:
        checkpoint, device, dtype: see `LatentDiffusion`.
        ip_adapter: IP-Adapter that takes references: a ``.safetensors`` file, or
            ``owner/name/path.safetensors`` of the hub.
        ip_adapter_scale: factor of its attention.
        image_encoder: folder of its CLIP image encoder, also of the hub; by default
            ``image_encoder`` beside it.
        options: see `LatentDiffusion`.

    Raises:
        UserError: see `augment.diffusion.checkpoints.ip_adapter.IPAdapter`; or a scale or encoder
            without an IP-Adapter.
    """

    name = "stable-diffusion"
    usage = Usage(PHOTO, 7.5)
    needed = ("text_encoder",)
    plain = (*LatentDiffusion.plain, "addition_embed_type")
    absent = ("safety_checker", "feature_extractor", "image_encoder")

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        ip_adapter: str | Path | None = None,
        ip_adapter_scale: float = 1.0,
        image_encoder: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.ip_adapter: IPAdapter | None = None
        self.embed_images: ImageEncoder | None = None
        if ip_adapter:
            hub = checkpoint.local_files_only
            self.ip_adapter = IPAdapter.find(ip_adapter, image_encoder, ip_adapter_scale, hub)
        elif image_encoder or ip_adapter_scale != 1:
            raise UserError(
                "expected ip_adapter beside image_encoder or ip_adapter_scale, got none; name it"
            )
        super().__init__(checkpoint, device, dtype, **options)
        if self.ip_adapter:
            self.fingerprint[REFERENCE] = self.ip_adapter.fingerprint

    def prepare(self, compile: bool) -> None:
        """Set channels last, and fuse projections where nothing else needs them apart."""
        nn.Module.to(self.net, memory_format=torch.channels_last)
        if self.ip_adapter:
            self.embed_images = self.ip_adapter.add_to(self.pipe, self.device, self.dtype)
        elif not compile and self.heads is None:
            self.net.fuse_qkv_projections()
        super().prepare(compile)

    def pipeline_options(
        self, latents: Tensor, steps: int, guidance: float
    ) -> dict[str, Any] | None:
        """Return the options of the pipeline; None with an IP-Adapter."""
        return None if self.ip_adapter else super().pipeline_options(latents, steps, guidance)

    def refer(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n ..."]:
        """Embed images as the IP-Adapter's references, or return their image heads.

        Raises:
            UserError: the backbone has neither.
        """
        return self.embed_images(images) if self.embed_images else super().refer(images)

    def none_referred(self) -> Condition:
        """Return the part of a prompt's condition that says that there is no reference."""
        return {"reference": self.embed_images.none} if self.embed_images else {}

    def added(self, condition: Condition) -> dict[str, Any]:
        """Return the arguments of the UNet for references, if it takes any."""
        if self.embed_images is None:
            return {}
        return {"image_embeds": [condition["reference"].to(self.dtype)[:, None]]}

    def trainable(self) -> nn.Module:
        """Return the UNet, its fused projections apart again.

        Raises:
            UserError: it has an IP-Adapter.
        """
        if self.ip_adapter:
            raise UserError(
                "expected a backbone without ip_adapter to train, got one with it; leave it out, "
                "and give it beside what was trained"
            )
        self.net.unfuse_qkv_projections()
        self.net.original_attn_processors = None
        for module in self.net.modules():
            for fused in ("to_qkv", "to_kv"):
                module._modules.pop(fused, None)
        return self.net

    def embed(self, prompt: str) -> Condition:
        """Return the last layer as ``text`` (1, 77, width)."""
        check_length(prompt, self.pipe.tokenizer)
        text, _ = self.pipe.encode_prompt(prompt, self.device, 1, False)
        return {"text": text, **self.none_referred()}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Return the UNet's ε or v."""
        text = condition["text"].to(self.dtype)
        added = self.added(condition) or None
        return self.net(latent, times, text, added_cond_kwargs=added, return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    """SDXL: two CLIPs side by side, the second's pooled output, and the image's size and crop.

    The network gets the resolution as the image's size, and no crop.
    """

    name = "sdxl"
    usage = Usage(PHOTO, 5.0)
    needed = ("text_encoder", "text_encoder_2")
    plain = LatentDiffusion.plain
    absent = ("feature_extractor", "image_encoder")

    def vae_dtype(self) -> torch.dtype:
        """Return float32 where the original autoencoder would overflow in float16."""
        narrow = self.dtype == torch.float16 and self.pipe.vae.config.force_upcast
        return torch.float32 if narrow else self.dtype

    def embed(self, prompt: str) -> Condition:
        """Return ``text`` (1, 77, width), ``pooled`` (1, width) and ``time_ids`` (1, 6).

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
        known = {"text": text, "pooled": pooled, "time_ids": time_ids}
        return {**known, **self.none_referred()}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Return the UNet's ε or v."""
        pooled, time_ids = condition["pooled"].to(self.dtype), condition["time_ids"]
        added = {"text_embeds": pooled, "time_ids": time_ids, **self.added(condition)}
        text = condition["text"].to(self.dtype)
        return self.net(latent, times, text, added_cond_kwargs=added, return_dict=False)[0]
