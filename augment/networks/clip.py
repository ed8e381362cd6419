"""CLIP: features of images and of texts that can be compared.

Radford et al., *Learning Transferable Visual Models from Natural Language Supervision*,
arXiv 2103.00020.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.diffusion.checkpoints.checkpoint import check_indices
from augment.diffusion.checkpoints.hub import brief, explained, quiet
from augment.networks.frozen import BATCH, in_batches, normalise, unit

DEFAULT = "openai/clip-vit-base-patch32"


@dataclass(frozen=True)
class Clip:
    """A model of transformers, with its tokenizer and its image processor; see `load_clip`."""

    model: Any
    tokenizer: Any
    processor: Any

    def images(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """Compute unit features of images in [0, 1], float64 on the CPU."""
        return unit(in_batches(self._embed, images))

    def texts(self, texts: list[str]) -> Float[Tensor, "k d"]:
        """Compute unit features of texts, float64 on the CPU.

        Raises:
            UserError: a text is too long.
        """
        from augment.diffusion.backbones.latent_diffusion import check_length

        for text in texts:
            check_length(text, self.tokenizer)
        parts = []
        for start in range(0, len(texts), BATCH):
            given = self.tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt")
            with torch.no_grad():
                pooled = self.model.text_model(**given.to(self.model.device)).pooler_output
                parts.append(self.model.text_projection(pooled).cpu().double())
        return unit(torch.cat(parts))

    def _embed(self, images: Tensor) -> Tensor:
        vision, processor = self.model.config.vision_config, self.processor
        channels, size = vision.num_channels, (vision.image_size, vision.image_size)
        images = images.to(self.model.device)
        pixels = normalise(images, channels, size, processor.image_mean, processor.image_std)
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return self.model.visual_projection(pooled)


def load_clip(source: str, device: torch.device) -> Clip:
    """Load a CLIP of transformers.

    Args:
        source: a folder, or a repository of the hub; empty for `DEFAULT`.
        device: of the model.

    Raises:
        UserError: transformers is not installed, or there is no whole CLIP.
    """
    source = source or DEFAULT
    try:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    except ModuleNotFoundError:
        raise UserError(
            "expected transformers for CLIP, got no such package; pip install 'latent-augment[sd]'"
        ) from None
    load: Any = CLIPModel.from_pretrained
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    if Path(source).is_dir():
        check_indices(Path(source))
    try:
        with explained(source), quiet():
            model, info = load(source, **options)
            tokenizer = CLIPTokenizer.from_pretrained(source)
            processor = CLIPImageProcessor.from_pretrained(source)
        if info["missing_keys"]:
            raise ValueError(min(info["missing_keys"]))
    except UserError:
        raise
    except Exception as error:  # of any type, since files may be hostile
        raise UserError(
            f"expected a whole CLIP of transformers at {source!r}, got one damaged in "
            f"{brief(error)}; give another folder or a repository of the hub"
        ) from None
    return Clip(model.eval().requires_grad_(False).to(device), tokenizer, processor)
