"""FLUX.1 through diffusers: a transformer of rectified flow with T5's and CLIP's embeddings.

Black Forest Labs, 2024, github.com/black-forest-labs/flux. FLUX.1-dev is distilled to take the
scale of guidance as an input, so that it needs no second evaluation; it is not distilled to few
steps. FLUX.1-schnell is.
"""

from typing import Any

import torch
from torch import Tensor

from augment.diffusion.backbone import Condition
from augment.diffusion.backbones.flow_transformer import FlowTransformer, grid, packed, unpacked
from augment.diffusion.backbones.latent_diffusion import check_length
from augment.diffusion.checkpoints.checkpoint import Checkpoint
from augment.diffusion.usage import PHOTO, Usage


class Flux(FlowTransformer):
    """FLUX.1-dev, and models that were trained from it.

    CLIP reads the first 77 tokens of a prompt, and T5 all of it.

    Args:
        checkpoint, device, dtype: see `LatentDiffusion`.
        embedded_guidance: guidance scale that is an input of the network, in inversion and
            sampling; ``guidance`` itself is on top of it, and 1, none, is usual.
        max_sequence_length: rows of the condition for T5; the network also sees those that a
            prompt does not fill.
        options: see `LatentDiffusion`.
    """

    name = "flux"
    usage = Usage(PHOTO, 1.0, 28)
    needed = ("text_encoder", "text_encoder_2")
    absent = ("feature_extractor", "image_encoder")
    plain = ()
    packing = 2
    blocks = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    counted = ("tokenizer",)

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        embedded_guidance: float = 3.5,
        max_sequence_length: int = 512,
        **options: Any,
    ) -> None:
        self.embedded_guidance, self.rows = embedded_guidance, max_sequence_length
        super().__init__(checkpoint, device, dtype, **options)
        self.fingerprint["max_sequence_length"] = str(max_sequence_length)
        if self.net.config.guidance_embeds:
            self.fingerprint["embedded_guidance"] = f"{embedded_guidance:g}"

    def few_step_sign(self) -> str:
        """Return what shows FLUX.1-schnell, whatever its folder is called."""
        shifted = self.pipe.scheduler.config.get("use_dynamic_shifting")
        return "" if shifted or self.net.config.guidance_embeds else "its levels without a shift"

    def pipeline_options(
        self, latents: Tensor, steps: int, guidance: float
    ) -> dict[str, Any] | None:
        """Return the options of the pipeline, whose own guidance scale is the network's input."""
        given: dict[str, Any] = {"latents": packed(latents).to(self.dtype)}
        given |= {"guidance_scale": self.embedded_guidance, "true_cfg_scale": guidance}
        given |= {"negative_prompt": [""] * len(latents)} if guidance != 1 else {}
        return {**given, "max_sequence_length": self.rows}

    def embed(self, prompt: str) -> Condition:
        """Return T5's ``text`` (1, max_sequence_length, width) and CLIP's ``pooled`` (1, width)."""
        cure = "shorten it or raise max_sequence_length"
        check_length(prompt, self.pipe.tokenizer_2, self.rows, cure)
        text, pooled, _ = self.pipe.encode_prompt(
            prompt, device=self.device, max_sequence_length=self.rows
        )
        return {"text": text, "pooled": pooled}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Return the transformer's velocity."""
        text, side = condition["text"].to(self.dtype), latent.shape[-1] // 2
        scale = torch.full_like(times, self.embedded_guidance)
        tokens = self.net(
            hidden_states=packed(latent),
            timestep=times / 1000,
            guidance=scale if self.net.config.guidance_embeds else None,
            pooled_projections=condition["pooled"].to(self.dtype),
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=grid(side, 1, 0, self.device).to(self.dtype),
            return_dict=False,
        )[0]
        return unpacked(tokens, side)
