"""Stable Diffusion 1, 2 and XL through diffusers: a UNet and one or two CLIP text encoders.

Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models*, arXiv 2112.10752;
Podell et al., *SDXL*, arXiv 2307.01952.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from augment.diffusion.backbone import Condition
from augment.diffusion.backbones.latent_diffusion import LatentDiffusion, check_length
from augment.diffusion.checkpoints.checkpoint import Checkpoint


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1 and 2: a UNet and one CLIP text encoder.

    Args:
        checkpoint, device, dtype: see `LatentDiffusion`.
        resolution, lora, lora_scale, tiny_vae, compile: see `LatentDiffusion`.
        spacing, clean_end, zero_terminal_snr: see `read_process`.
    """

    name = "stable-diffusion"
    needed = ("text_encoder",)
    plain = (*LatentDiffusion.plain, "addition_embed_type")
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

    def trainable(self) -> nn.Module:
        """The UNet, its fused projections apart again."""
        self.net.unfuse_qkv_projections()
        self.net.original_attn_processors = None
        for module in self.net.modules():
            for fused in ("to_qkv", "to_kv"):
                module._modules.pop(fused, None)
        return self.net

    def embed(self, prompt: str) -> Condition:
        """(1, 77, width) of the last layer."""
        check_length(prompt, self.pipe.tokenizer)
        text, _ = self.pipe.encode_prompt(prompt, self.device, 1, False)
        return {"text": text}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The UNet's ε or v."""
        text = condition["text"].to(self.dtype)
        return self.net(latent, times, text, return_dict=False)[0]


class StableDiffusionXL(StableDiffusion):
    """SDXL: two CLIPs side by side, the second's pooled output, and the image's size and crop.

    The network is told that the image was as large as the resolution, and not cropped.
    """

    name = "sdxl"
    needed = ("text_encoder", "text_encoder_2")
    plain = LatentDiffusion.plain
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
        return {"text": text, "pooled": pooled, "time_ids": time_ids}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The UNet's ε or v."""
        added = {
            "text_embeds": condition["pooled"].to(self.dtype),
            "time_ids": condition["time_ids"],
        }
        text = condition["text"].to(self.dtype)
        return self.net(latent, times, text, added_cond_kwargs=added, return_dict=False)[0]
