"""Stable Diffusion 3 and 3.5 through diffusers: a transformer of rectified flow.

Esser et al., *Scaling Rectified Flow Transformers for High-Resolution Image Synthesis*, arXiv
2403.03206. Its third text encoder, T5-XXL, is 9.5 GB in half precision and was left out of almost
half of the training prompts; it is off unless asked for, and its rows of the condition are zeros.
"""

from typing import Any

import torch
from torch import Tensor

from augment.diffusion.backbone import Condition
from augment.diffusion.backbones.latent_diffusion import LatentDiffusion, check_length
from augment.diffusion.checkpoints.checkpoint import Checkpoint
from augment.diffusion.checkpoints.tokens import expanded
from augment.diffusion.process import Flow
from augment.diffusion.usage import PHOTO, Usage

T5 = "text_encoder_3"


class StableDiffusion3(LatentDiffusion):
    """Two CLIPs, T5 if asked for, and a transformer that predicts the velocity.

    Its projections are not fused: diffusers' fused attention leaves out the normalised queries and
    keys of 3.5.

    Args:
        checkpoint, device, dtype: see `LatentDiffusion`.
        t5: whether to load and use the third text encoder.
        max_sequence_length: rows of the condition for T5, zeros without it. Every network call
            pays for them; diffusers' own default is 256.
        options: see `LatentDiffusion`.

    Raises:
        UserError: T5 is asked for and not in the checkpoint.
    """

    name = "sd3"
    usage = Usage(PHOTO, 7.0, 28)
    needed = ("text_encoder", "text_encoder_2")
    part = "transformer"
    half = torch.bfloat16
    blocks = ("JointTransformerBlock",)
    cell = 2
    fixed = ("clean_end", "zero_terminal_snr")

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        t5: bool = False,
        max_sequence_length: int = 77,
        **options: Any,
    ) -> None:
        self.t5, self.rows = t5, max_sequence_length
        self.absent = ("feature_extractor", "image_encoder")
        self.absent += () if t5 else (T5, "tokenizer_3")
        self.needed += (T5,) if t5 else ()
        super().__init__(checkpoint, device, dtype, **options)
        self.fingerprint["max_sequence_length"] = str(max_sequence_length)

    def family_usage(self) -> Usage:
        """Return what it is used with; 3.5, whose queries are normalised, with less guidance."""
        newer = self.net.config.get("qk_norm")
        return Usage(PHOTO, 4.5, 28) if newer else self.usage

    def pipeline_options(
        self, latents: Tensor, steps: int, guidance: float
    ) -> dict[str, Any] | None:
        """Return the options of the pipeline; its own grid of noise levels is ``linspace``."""
        given: dict[str, Any] = {"latents": latents.to(self.dtype), "guidance_scale": guidance}
        if isinstance(self.process, Flow) and self.process.spacing == "trailing":
            given["sigmas"] = [1 - step / steps for step in range(steps)]
        return {**given, "max_sequence_length": self.rows}

    def embed(self, prompt: str) -> Condition:
        """Return ``text`` (1, 77 + max_sequence_length, width) and ``pooled`` (1, width)."""
        check_length(prompt, self.pipe.tokenizer)
        check_length(prompt, self.pipe.tokenizer_2)
        if self.t5:
            cure = "shorten it or raise max_sequence_length"
            check_length(prompt, self.pipe.tokenizer_3, self.rows, cure)
        text, _, pooled, _ = self.pipe.encode_prompt(
            expanded(prompt, self.pipe.tokenizer),  # which this pipeline leaves to us
            expanded(prompt, self.pipe.tokenizer_2),
            prompt,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.rows,
        )
        return {"text": text, "pooled": pooled}

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Return the transformer's velocity."""
        return self.net(
            hidden_states=latent,
            timestep=times,
            encoder_hidden_states=condition["text"].to(self.dtype),
            pooled_projections=condition["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
