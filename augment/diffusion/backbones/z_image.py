"""Z-Image through diffusers: a single-stream transformer of rectified flow, and Qwen3's embeddings.

Z-Image Team, *Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion
Transformer*, arXiv 2511.22699. Its latents are those of FLUX.1's autoencoder. The network
takes the share of the image, 1 − σ, in place of a timestep; its velocity leads to the image, and
ours to the noise. Prompts keep their own lengths: their embeddings are filled up with zeros, which
the network does not see.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from augment.diffusion.backbone import Condition
from augment.diffusion.backbones.flow_transformer import FlowTransformer, check_chat
from augment.diffusion.checkpoints.checkpoint import Checkpoint
from augment.diffusion.conditions import padded, unpadded
from augment.diffusion.usage import PHOTO, Usage


class ZImage(FlowTransformer):
    """Z-Image, the base model; Turbo is a few-step model.

    Its guidance is u + g·(c − u) as everywhere here; diffusers' pipeline writes c + s·(c − u), so
    that its scale s is g − 1.

    Args:
        checkpoint, device, dtype: see `LatentDiffusion`.
        max_sequence_length: maximum number of a prompt's tokens, with those of the chat template.
            It changes no image.
        options: see `LatentDiffusion`.
    """

    name = "z-image"
    usage = Usage(PHOTO, 6.0, 28)
    needed = ("text_encoder",)
    plain = ("siglip_feat_dim",)  # of Omni, which reads images too
    blocks = ("ZImageTransformerBlock",)

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        max_sequence_length: int = 128,
        **options: Any,
    ) -> None:
        self.rows = max_sequence_length
        self._lengths: tuple[Tensor, list[int]] | None = None
        super().__init__(checkpoint, device, dtype, **options)

    def pipeline_options(
        self, latents: Tensor, steps: int, guidance: float
    ) -> dict[str, Any] | None:
        """Return the options of the pipeline, which keeps latents in float32."""
        given = {"latents": latents, "guidance_scale": guidance - 1}
        return {**given, "max_sequence_length": self.rows}

    def embed(self, prompt: str) -> Condition:
        """Return ``text`` (1, max_sequence_length, width), of the last layer but one."""
        check_chat(prompt, self.pipe.tokenizer, self.rows, enable_thinking=True)
        (rows,), _ = self.pipe.encode_prompt(
            prompt, self.device, False, max_sequence_length=self.rows
        )
        return {"text": padded(rows, self.rows)}

    def _prompts(self, text: Float[Tensor, "b n width"]) -> list[Float[Tensor, "length width"]]:
        """Return the embeddings of each prompt; their lengths are asked once, not every step."""
        if self._lengths is None or self._lengths[0] is not text:
            self._lengths = text, [len(rows) for rows in unpadded(text)]
        pairs = zip(text.to(self.dtype), self._lengths[1], strict=True)
        return [rows[:length] for rows, length in pairs]

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Return the transformer's velocity, from the image to the noise."""
        frames = list(latent.unsqueeze(2))
        text = self._prompts(condition["text"])
        velocities = self.net(frames, 1 - times / 1000, text, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)
