"""CLIP filter: does the image show what the class's prompt says, or what its real images show?

Radford et al., *Learning Transferable Visual Models from Natural Language Supervision*,
arXiv 2103.00020.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from augment.diffusion.hub import brief, explained, quiet
from augment.errors import UserError, lookup
from augment.filters.network import BATCH, in_batches, normalise, unit
from augment.filters.reference import Reference, Scores, check_quantile, typical

TARGETS = ("prompt", "images")


@dataclass(frozen=True)
class Clip:
    """Cosine of CLIP features to the class's prompt or images, on the scale of the real images'.

    For the formula see `augment.filters.reference.typical`.

    Args:
        model: a CLIP of transformers: a folder, or a repository of the hub.
        to: ``prompt`` or ``images``.
        quantile: the share of real images that score below 0.
        minimum: keep images of this score and above: 1 is as typical as the median real image.

    Raises:
        UserError: a setting is out of range.
    """

    model: str = "openai/clip-vit-base-patch32"
    to: str = "prompt"
    quantile: float = 0.05
    minimum: float | None = 0.0

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(TARGETS), self.to, "thing to compare with")
        check_quantile(self.quantile)

    def prepare(self, reference: Reference) -> Scores:
        """See `augment.filters.Filter`.

        Raises:
            UserError: transformers or the model is missing, or a class has no prompt or one that is
                too long; and see `typical`.
        """
        bare = [name for name, p in zip(reference.classes, reference.prompts, strict=True) if not p]
        if self.to == "prompt" and bare:
            raise UserError(
                f"expected a prompt for every class, got none for {bare[0]!r}; give it one, or "
                "compare to images"
            )
        model, tokenizer, processor = load_clip(self.model, reference.device)
        form, vision = (processor.image_mean, processor.image_std), model.config.vision_config
        size = (vision.image_size, vision.image_size)

        def embed(images: Tensor) -> Tensor:
            pixels = normalise(images.to(reference.device), vision.num_channels, size, *form)
            return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

        def describe(images: Tensor) -> Tensor:
            return unit(in_batches(embed, images))

        texts = text_features(model, tokenizer, reference) if self.to == "prompt" else None
        return typical(reference, describe, self.quantile, texts)


def text_features(model: Any, tokenizer: Any, reference: Reference) -> Float[Tensor, "k d"]:
    """Unit features of the classes' prompts."""
    from augment.diffusion.latent_diffusion import check_length

    for prompt in reference.prompts:
        check_length(prompt, tokenizer)
    parts, prompts = [], reference.prompts
    for start in range(0, len(prompts), BATCH):
        given = tokenizer(prompts[start : start + BATCH], padding=True, return_tensors="pt")
        with torch.no_grad():
            pooled = model.text_model(**given.to(reference.device)).pooler_output
            parts.append(model.text_projection(pooled).cpu().double())
    return unit(torch.cat(parts))


def load_clip(source: str, device: torch.device) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor.

    Raises:
        UserError: transformers is not installed, or there is no whole CLIP.
    """
    try:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    except ModuleNotFoundError:
        raise UserError(
            "expected transformers for CLIP, got no such package; pip install 'latent-augment[sd]'"
        ) from None
    load: Any = CLIPModel.from_pretrained
    how = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    parts: list[Any] = []
    try:
        with explained(source), quiet():
            parts += load(source, **how)
            parts += [kind.from_pretrained(source) for kind in (CLIPTokenizer, CLIPImageProcessor)]
        problem = ", ".join(sorted(parts.pop(1)["missing_keys"])[:1])
    except (KeyError, RuntimeError, SafetensorError) as error:
        problem = brief(error)
    if problem:
        raise UserError(
            f"expected a whole CLIP of transformers at {source!r}, got one damaged in {problem}; "
            "give another folder or a repository of the hub"
        )
    model, tokenizer, processor = parts
    return model.eval().requires_grad_(False).to(device), tokenizer, processor
