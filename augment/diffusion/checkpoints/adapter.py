"""What `latent-augment adapt` leaves in a folder: a LoRA, tokens, and what they were made of.

``pytorch_lora_weights.safetensors`` and ``learned_embeds.safetensors`` are diffusers' own, and a
folder of diffusers' training scripts is read too, here or on the hub, and one file of tokens
(textual inversion). ``adapter.json`` adds what only we ask for: the
weights that were adapted, the prompt of each class, and the images by their digests.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.core.files import read_json
from augment.diffusion.checkpoints.heads import HEADS_FILE, IMAGE_HEADS
from augment.diffusion.checkpoints.hub import REPOSITORY, local_folder
from augment.diffusion.checkpoints.lora import LORA
from augment.diffusion.checkpoints.tokens import TOKENS, read_tokens, token_files

ADAPTER = "adapter.json"
IMAGES = "adapted_to"
"""Key of a backbone's fingerprint: digests of the images that it was adapted to, with spaces."""


@dataclass(frozen=True)
class Adapter:
    """An adaptation.

    Attributes:
        place: folder with the files, or a file of tokens.
        weights: digest of the model that was adapted; empty if it is unknown.
        prompts: of each class.
        images: first digits of the SHA-256 of each image.
        tokens: that the prompts name.
    """

    place: Path
    weights: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

    @classmethod
    def read(cls, source: str | Path, local_files_only: bool = False) -> "Adapter":
        """Read an adaptation.

        Args:
            source: a folder, a file of tokens, or a repository ``owner/name`` of the hub.
            local_files_only: take a repository from the hub's cache alone.

        Raises:
            UserError: there is none, or a record that nobody wrote.
        """
        folder = Path(source)
        if not folder.exists() and re.fullmatch(REPOSITORY, str(source)):
            files = [LORA, HEADS_FILE, *TOKENS.values(), ADAPTER]
            folder = local_folder(str(source), files, local_files_only)
        if folder.is_file():
            if folder.suffix != ".safetensors":
                raise UserError(
                    f"expected tokens in a .safetensors file, got {folder}, which may be a pickle "
                    "that runs code; have it converted"
                )
            return cls(folder)
        if not any((folder / name).is_file() for name in (LORA, HEADS_FILE, *TOKENS.values())):
            raise UserError(
                f"expected {LORA} or {TOKENS['text_encoder']} in {folder}, got neither; give the "
                "--out of latent-augment adapt"
            )
        if not (folder / ADAPTER).exists():
            return cls(folder)
        record = read_json(folder / ADAPTER, "an adaptation")
        record = record if isinstance(record, dict) else {}
        prompts, images = record.get("prompts"), record.get("images")
        tokens = record.get("tokens", [])
        if (
            not isinstance(prompts, dict)
            or not isinstance(images, list)
            or not isinstance(tokens, list)
            or not all(isinstance(text, str) for text in (*prompts.values(), *images, *tokens))
        ):
            raise UserError(
                f"expected prompts and images in {folder / ADAPTER}, got others; adapt again"
            )
        weights = str(record.get("weights", ""))
        return cls(folder, weights, prompts, tuple(images), tuple(tokens))

    @property
    def lora(self) -> Path | None:
        """The LoRA, if there is one."""
        return self.place / LORA if (self.place / LORA).exists() else None

    @property
    def heads(self) -> Path | None:
        """The file of image heads, if there is one."""
        return self.place / HEADS_FILE if (self.place / HEADS_FILE).exists() else None

    def vectors(self) -> dict[str, dict[str, Float[Tensor, " width"]]]:
        """Read the vectors of its tokens by text encoder and token.

        Raises:
            UserError: see `read_tokens`; or a token is missing that its prompts name.
        """
        found = read_tokens(self.place)
        there = {token for rows in found.values() for token in rows}
        if missing := [token for token in self.tokens if token not in there]:
            raise UserError(
                f"expected a vector of {missing[0]!r}, which the prompts of {self.place} name, got "
                f"none; bring back its {TOKENS['text_encoder']}, or adapt again"
            )
        return found

    def check(self, weights: str) -> None:
        """Refuse a model other than the one that was adapted."""
        if self.weights and self.weights != weights:
            raise UserError(
                f"expected the model that {self.place} adapts (weights {self.weights[:8]}…), got "
                f"another ({weights[:8]}…); name that one"
            )

    def fingerprint(self) -> dict[str, str]:
        """Return the entries in a backbone's fingerprint beside the LoRA's."""
        files = token_files(self.place).values()
        content = b"".join(path.read_bytes() for path in files)
        named = self.place.name.encode() if self.place.is_file() else b""  # it may name the token
        found = {"tokens": hashlib.sha256(named + content).hexdigest()} if files else {}
        if self.heads:
            digest = hashlib.sha256(self.heads.read_bytes()).hexdigest()
            found["reference"] = f"{IMAGE_HEADS} {digest}"
        return found | ({IMAGES: " ".join(self.images)} if self.images else {})


def adapter_of(
    adapter: str | Path | None, lora: str | Path | None, local_files_only: bool = False
) -> tuple[Adapter | None, str | Path | None]:
    """Read the adaptation of a backbone's options; return it, and the LoRA to add.

    Raises:
        UserError: see `Adapter.read`; or a LoRA beside the adaptation.
    """
    if adapter is None:
        return None, lora
    if lora:
        raise UserError(f"expected lora or adapter, got both, {lora} and {adapter}; leave one out")
    found = Adapter.read(adapter, local_files_only)
    return found, found.lora


def adapted_to(fingerprint: Mapping[str, str]) -> dict[str, str]:
    """Return what a backbone's fingerprint says of the images that it was adapted to.

    Returns:
        Text for an error, by the first digits of the SHA-256 of each image.
    """
    return dict.fromkeys(fingerprint.get(IMAGES, "").split(), "an image of the adaptation")


def record_of(
    weights: str, prompts: dict[str, str], images: list[str], tokens: list[str]
) -> dict[str, Any]:
    """Return what is in `ADAPTER`; see `Adapter`."""
    record = {"weights": weights, "prompts": prompts, "images": images}
    return record | ({"tokens": tokens} if tokens else {})
