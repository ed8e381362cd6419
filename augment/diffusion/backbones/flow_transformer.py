"""The base of the large transformers of rectified flow: FLUX.1, FLUX.2, Z-Image.

Their networks have no resolution of their own. Where a scheduler file leaves the shift of the noise
levels to the number of tokens, it is a constant at the backbone's resolution, a part of the
process, and so of the fingerprint.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.diffusion.backbones.latent_diffusion import LatentDiffusion
from augment.diffusion.checkpoints.tokens import TokenRows


class FlowTransformer(LatentDiffusion):
    """Base of the large flow transformers; see `LatentDiffusion`."""

    part = "transformer"
    half = torch.bfloat16
    cell = 2
    own_resolution = 1024
    fixed = ("clean_end", "zero_terminal_snr")
    counted: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Number of patches of the latent."""
        return (self.latent_shape[-1] // self.cell) ** 2

    def mu(self, config: Mapping[str, Any]) -> float | None:
        """Return the logarithm of the shift, which is linear in the number of tokens.

        Esser et al., arXiv 2403.03206, derive such a shift (eq. 23); FLUX.1 fitted this one.
        """
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return first + (last - first) * (self.tokens - low) / (high - low)

    def add_tokens(self, words: Mapping[str, str], keep_norm: bool) -> dict[str, TokenRows]:
        """Refuse new tokens, which a language model would have to learn to read."""
        raise UserError(
            f"expected a backbone that reads prompts by CLIP alone for tokens, got {self.name}; "
            "leave the tokens out"
        )


def packed(latent: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n d"]:
    """Return the patches of 2 by 2 latent pixels as tokens of four times the channels."""
    return F.pixel_unshuffle(latent, 2).flatten(2).mT


def unpacked(tokens: Float[Tensor, "b n d"], side: int) -> Float[Tensor, "b c h w"]:
    """Undo `packed`, for a square of ``side`` by ``side`` tokens."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (side, side)), 2)


def grid(
    side: int, before: int, behind: int, device: torch.device
) -> Float[Tensor, "n coordinates"]:
    """Return the rows and columns of tokens, with columns of zeros before and behind."""
    lines = torch.arange(side, device=device, dtype=torch.float32)
    places = torch.cartesian_prod(lines, lines)
    return F.pad(places, (before, behind))


def check_chat(prompt: str, tokenizer: Any, limit: int, **template: Any) -> None:
    """Refuse a prompt that a chat model's tokenizer would cut off.

    Args:
        prompt: to count.
        tokenizer: of transformers, with a chat template.
        limit: maximum number of tokens, with those of the template.
        template: its options.
    """

    def count(text: str) -> int:
        messages = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template
        )
        return len(tokenizer(chat, verbose=False).input_ids)

    whole, frame = count(prompt), count("")
    if whole > limit:
        raise UserError(
            f"expected a prompt of at most {limit - frame} tokens, got {whole - frame} in "
            f"{prompt!r}; shorten it or raise max_sequence_length"
        )
