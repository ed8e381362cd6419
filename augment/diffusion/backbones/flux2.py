"""FLUX.2 [klein] through diffusers: a transformer of rectified flow with Qwen3's embeddings.

Black Forest Labs, 2026, github.com/black-forest-labs/flux2. Its autoencoder has 32 channels, whose
patches of 2 by 2 are normalised by a batch norm; here a latent keeps its pixels, and the network's
patches are its own matter. The shift of its noise levels also depends on the number of steps;
here that is an option, so that a bank can be sampled in another number of steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from augment.core.errors import UserError
from augment.diffusion.backbone import Condition
from augment.diffusion.backbones.flow_transformer import (
    FlowTransformer,
    check_chat,
    grid,
    packed,
    unpacked,
)
from augment.diffusion.checkpoints.checkpoint import Checkpoint
from augment.diffusion.usage import PHOTO, Usage

LAYERS = 28
"""Layers of Qwen3 that are kept: the 9th, 18th and 27th are read. The output of the last one that a
text encoder has is normalised, so there has to be one more.
"""


class Flux2Klein(FlowTransformer):
    """FLUX.2 [klein], the base models; those without base in their names are few-step models.

    Args:
        checkpoint, device, dtype: see `LatentDiffusion`.
        max_sequence_length: rows of the condition; the network also sees those that a prompt does
            not fill.
        shift_steps: number of steps that the shift of the noise levels is for.
        options: see `LatentDiffusion`.

    Raises:
        UserError: less than one step.
    """

    name = "flux2-klein"
    usage = Usage(PHOTO, 4.0, 28)
    needed = ("text_encoder",)
    plain = ()
    packing = 2
    blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    fixed = (*FlowTransformer.fixed, "tiny_vae")

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        max_sequence_length: int = 512,
        shift_steps: int = 28,
        **options: Any,
    ) -> None:
        if shift_steps < 1:
            raise UserError(f"expected shift_steps of at least 1, got {shift_steps}; 28 is usual")
        self.rows, self.shift_steps = max_sequence_length, shift_steps
        super().__init__(checkpoint, device, dtype, **options)
        self.fingerprint["max_sequence_length"] = str(max_sequence_length)

    def load(self, checkpoint: Checkpoint, parts: Sequence[str]) -> Any:
        """Load the pipeline, without the layers of the text encoder that nothing reads."""
        pipe = super().load(checkpoint, parts)
        decoder = pipe.text_encoder.model
        decoder.layers = decoder.layers[:LAYERS]
        return pipe

    def mu(self, config: Mapping[str, Any]) -> float:
        """Return the logarithm of the shift: linear in tokens at 10 and 200 steps, and between.

        The numbers are those that Black Forest Labs fitted.
        """
        many = 0.00016927 * self.tokens + 0.45666666
        few = 8.73809524e-05 * self.tokens + 1.89833333
        if self.tokens > 4300:
            return many
        return many + (few - many) * (200 - self.shift_steps) / 190

    def pipeline_options(
        self, latents: Tensor, steps: int, guidance: float
    ) -> dict[str, Any] | None:
        """Return the options of the pipeline; None if its levels, by the steps, are not ours."""
        if steps != self.shift_steps:
            return None
        given = {"latents": F.pixel_unshuffle(latents, 2).to(self.dtype)}
        return {**given, "guidance_scale": guidance, "max_sequence_length": self.rows}

    def embed(self, prompt: str) -> Condition:
        """Return ``text`` (1, max_sequence_length, width): three of Qwen3's layers side by side."""
        check_chat(prompt, self.pipe.tokenizer, self.rows, enable_thinking=False)
        text, _ = self.pipe.encode_prompt(prompt, self.device, max_sequence_length=self.rows)
        return {"text": text}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Return the transformer's velocity."""
        text, side = condition["text"].to(self.dtype), latent.shape[-1] // 2
        places = torch.arange(text.shape[1], device=self.device, dtype=torch.float32)
        tokens = self.net(
            hidden_states=packed(latent),
            timestep=times / 1000,
            encoder_hidden_states=text,
            txt_ids=F.pad(places[:, None], (3, 0)),
            img_ids=grid(side, 1, 1, self.device),
            return_dict=False,
        )[0]
        return unpacked(tokens, side)
