"""Stable Diffusion 1, 2 and XL through diffusers: a UNet and one or two CLIP text encoders.

Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, arXiv 2112.10752;
Podell et al., *SDXL*, arXiv 2307.01952.
"""

import torch
from torch import Tensor, nn

from augment.diffusion.backbone import Condition
from augment.diffusion.backbones.latent_diffusion import LatentDiffusion, check_length
from augment.diffusion.usage import PHOTO, Usage


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1 and 2: a UNet and one CLIP text encoder."""

    name = "stable-diffusion"
    usage = Usage(PHOTO, 7.5)
    needed = ("text_encoder",)
    plain = (*LatentDiffusion.plain, "addition_embed_type")
    absent = ("safety_checker", "feature_extractor", "image_encoder")

    def prepare(self, compile: bool) -> None:
        """Set channels last and fuse projections; the compiler does the latter by itself."""
        nn.Module.to(self.net, memory_format=torch.channels_last)
        if not compile:
            self.net.fuse_qkv_projections()
        super().prepare(compile)

    def trainable(self) -> nn.Module:
        """Return the UNet, its fused projections apart again."""
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
        return {"text": text}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Return the UNet's ε or v."""
        text = condition["text"].to(self.dtype)
        return self.net(latent, times, text, return_dict=False)[0]


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
        return {"text": text, "pooled": pooled, "time_ids": time_ids}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Return the UNet's ε or v."""
        pooled, time_ids = condition["pooled"].to(self.dtype), condition["time_ids"]
        added, text = {"text_embeds": pooled, "time_ids": time_ids}, condition["text"]
        text = text.to(self.dtype)
        return self.net(latent, times, text, added_cond_kwargs=added, return_dict=False)[0]
