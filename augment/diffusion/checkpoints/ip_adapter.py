"""IP-Adapter: image embeddings beside the prompt, through attention layers of their own.

Ye et al., *IP-Adapter: Text Compatible Image Prompt Adapter for Text-to-Image Diffusion Models*,
arXiv 2308.06721. CLIP embeds an image; a projection makes tokens of the embedding, 4 or, in the
variants *plus* and *full face*, more of CLIP's penultimate layer; and each cross-attention adds
scale × the attention to these, eq. 5. What is mixed and kept here is what goes into the projection,
``ip_adapter_image_embeds`` in diffusers. No image is zeros, or a black image's layer for *plus*, as
in diffusers.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.core.files import read_json
from augment.diffusion.checkpoints.checkpoint import check_indices, essential, samples_of
from augment.diffusion.checkpoints.hub import brief, damaged, local_folder, quiet

ENCODER = "image_encoder"
_PARTS = ("image_proj", "ip_adapter")
_PROJECTIONS = ("proj.weight", "proj.3.weight", "latents")
"""Tensors by which projections of CLIP are known: plain, full face, plus. FaceID has none."""


@dataclass(frozen=True)
class IPAdapter:
    """The files of an IP-Adapter.

    Args:
        file: its weights.
        encoder: folder of the CLIP image encoder that it was trained with.
        scale: factor of the attention to references.
    """

    file: Path
    encoder: Path
    scale: float = 1.0

    @classmethod
    def find(
        cls,
        source: str | Path,
        encoder: str | Path | None = None,
        scale: float = 1.0,
        local_files_only: bool = False,
    ) -> "IPAdapter":
        """Find the files.

        Args:
            source: a ``.safetensors`` file; or one of the hub, ``owner/name/path.safetensors``.
            encoder: a folder, or one of the hub, ``owner/name/path``; by default ``image_encoder``
                beside the weights.
            scale: see `IPAdapter`.
            local_files_only: take from the hub's cache alone.

        Raises:
            UserError: one of them is not there, or the scale is not finite.
        """
        if not math.isfinite(scale):
            raise UserError(f"expected a finite number for ip_adapter_scale, got {scale!r}")
        encoder = encoder or Path(source).parent / ENCODER
        file = _local(source, [""], local_files_only)
        folder = _local(encoder, ["/*.json", "/*.safetensors"], local_files_only)
        if file.suffix != ".safetensors" or not file.is_file():
            raise UserError(
                f"expected an IP-Adapter in a .safetensors file, got {source}, which is no such "
                "file; give a file, or owner/name/path.safetensors on the hub"
            )
        if not (folder / "config.json").is_file():
            raise UserError(
                f"expected the CLIP image encoder of the IP-Adapter in {encoder}, got no "
                "config.json there; give its folder as image_encoder"
            )
        return cls(file, folder, scale)

    @property
    def fingerprint(self) -> str:
        """What a reference depends on: weights, scale and encoder."""
        encoder = hashlib.sha256()
        with damaged(self.encoder), self.file.open("rb") as file:
            weights = hashlib.file_digest(file, "sha256")
            config = read_json(self.encoder / "config.json", "the config of an image encoder")
            encoder.update(json.dumps(essential(config), sort_keys=True).encode())
            for path in sorted(self.encoder.glob("*.safetensors")):
                for piece in samples_of(path):
                    encoder.update(piece)
        return f"{weights.hexdigest()} × {self.scale:g}, image encoder {encoder.hexdigest()}"

    def add_to(self, pipe: Any, device: torch.device, dtype: torch.dtype) -> "ImageEncoder":
        """Add the adapter to a pipeline; return what embeds images.

        Raises:
            UserError: it is of another model or kind, or damaged.
        """
        state = self._read()
        check_indices(self.encoder)
        with quiet(), damaged(self.encoder):
            from transformers import CLIPVisionModelWithProjection

            encoder = CLIPVisionModelWithProjection.from_pretrained(
                self.encoder, use_safetensors=True, local_files_only=True
            )
        nn.Module.to(encoder.eval().requires_grad_(False), device, dtype)
        pipe.register_modules(image_encoder=encoder)
        with quiet():
            try:
                pipe.load_ip_adapter(state, subfolder="", weight_name="")
                pipe.set_ip_adapter_scale(self.scale)
                found = ImageEncoder(pipe, device)
                layer = pipe.unet.encoder_hid_proj.image_projection_layers[0]
                layer(found.none.to(dtype))
            except Exception as error:  # of any type, since files may be hostile
                raise self._misfit(brief(error)) from None
        return found

    def _read(self) -> dict[str, dict[str, Tensor]]:
        """Read the weights of projection and attention."""
        state: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
        with damaged(self.file), safe_open(self.file, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                part, _, name = key.partition(".")
                if part not in state:
                    raise self._misfit(f"a tensor {key!r}")
                state[part][name] = file.get_tensor(key)
                if not state[part][name].isfinite().all():
                    raise self._misfit(f"{key} is not finite")
        if not all(state.values()) or not any(name in state["image_proj"] for name in _PROJECTIONS):
            raise self._misfit("no projection of CLIP's embeddings (FaceID is another kind)")
        return state

    def _misfit(self, reason: str) -> UserError:
        """Build the error for an adapter of another model."""
        return UserError(
            f"expected an IP-Adapter for this model and image encoder, got {self.file}: {reason}; "
            "take the model and image_encoder that it was trained with"
        )


class ImageEncoder:
    """The CLIP image encoder of a pipeline with an IP-Adapter.

    Args:
        pipe: the pipeline.
        device: of the encoder.

    Attributes:
        none: the reference of no image, of one row.
    """

    def __init__(self, pipe: Any, device: torch.device) -> None:
        from diffusers.models import ImageProjection

        layer = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        hidden, self.processor = not isinstance(layer, ImageProjection), pipe.feature_extractor
        # its second value is of a black image, whatever the first is of
        self.encode = partial(
            pipe.encode_image, device=device, num_images_per_prompt=1, output_hidden_states=hidden
        )
        side = pipe.image_encoder.config.image_size
        with torch.inference_mode(False), torch.no_grad():
            self.none: Tensor = self.encode(torch.zeros(1, 3, side, side))[1]

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n ..."]:
        """Embed images in [0, 1], of 8 bits, by CLIP's own resizing and cropping."""
        if not len(images):
            return self.none[:0]
        rows = [*(images.cpu() * 255).round().to(torch.uint8)]
        return self.encode(self.processor(rows, return_tensors="pt").pixel_values)[0]


def _local(source: str | Path, kinds: Sequence[str], local_files_only: bool) -> Path:
    """Return a path, or download it where it is ``owner/name/path``, with some kinds of files."""
    match = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)/([\w./-]+)", str(source))
    if Path(source).exists() or not match or ".." in match[2]:
        return Path(source)
    patterns = [match[2] + kind for kind in kinds]
    return local_folder(match[1], patterns, local_files_only) / match[2]
