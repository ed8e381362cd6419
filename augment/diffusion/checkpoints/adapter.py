"""What `latent-augment adapt` leaves in a folder: a LoRA, tokens, and what they were made of.

``pytorch_lora_weights.safetensors`` and ``learned_embeds.safetensors`` are diffusers' own, and a
folder of diffusers' training scripts is read too. ``adapter.json`` adds what only we ask for: the
weights that were adapted, the prompt of each class, and the images by their digests.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from augment.core.errors import UserError
from augment.core.files import read_json
from augment.diffusion.checkpoints.lora import LORA
from augment.diffusion.checkpoints.tokens import TOKENS

ADAPTER = "adapter.json"
IMAGES = "adapted_to"
"""Key of a backbone's fingerprint: digests of the images that it was adapted to, with spaces."""


@dataclass(frozen=True)
class Adapter:
    """A folder with an adaptation.

    Attributes:
        folder: with the files.
        weights: digest of the model that was adapted; empty if it is unknown.
        prompts: of each class.
        images: first digits of the SHA-256 of each image.
    """

    folder: Path
    weights: str = ""
    prompts: dict[str, str] = field(default_factory=dict)
    images: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: str | Path) -> "Adapter":
        """Read an adaptation.

        Raises:
            UserError: the folder has none, or a record that nobody wrote.
        """
        folder = Path(folder)
        if not any((folder / name).is_file() for name in (LORA, *TOKENS.values())):
            raise UserError(
                f"expected {LORA} or {TOKENS['text_encoder']} in {folder}, got neither; give the "
                "--out of latent-augment adapt"
            )
        if not (folder / ADAPTER).exists():
            return cls(folder)
        record = read_json(folder / ADAPTER, "an adaptation")
        record = record if isinstance(record, dict) else {}
        prompts, images = record.get("prompts"), record.get("images")
        if (
            not isinstance(prompts, dict)
            or not isinstance(images, list)
            or not all(isinstance(text, str) for text in (*prompts.values(), *images))
        ):
            raise UserError(
                f"expected prompts and images in {folder / ADAPTER}, got others; adapt again"
            )
        return cls(folder, str(record.get("weights", "")), prompts, tuple(images))

    @property
    def lora(self) -> Path | None:
        """The LoRA, if there is one."""
        return self.folder / LORA if (self.folder / LORA).exists() else None

    def check(self, weights: str) -> None:
        """Refuse a model other than the one that was adapted."""
        if self.weights and self.weights != weights:
            raise UserError(
                f"expected the model that {self.folder} adapts (weights {self.weights[:8]}…), got "
                f"another ({weights[:8]}…); name that one"
            )

    def fingerprint(self) -> dict[str, str]:
        """Return the entries in a backbone's fingerprint beside the LoRA's."""
        files = [path for name in TOKENS.values() if (path := self.folder / name).exists()]
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        tokens = {"tokens": digest} if files else {}
        return tokens | ({IMAGES: " ".join(self.images)} if self.images else {})


def adapter_of(
    adapter: str | Path | None, lora: str | Path | None
) -> tuple[Adapter | None, str | Path | None]:
    """Read the adaptation of a backbone's options; return it, and the LoRA to add.

    Raises:
        UserError: see `Adapter.read`; or a LoRA beside the adaptation.
    """
    if adapter is None:
        return None, lora
    if lora:
        raise UserError(f"expected lora or adapter, got both, {lora} and {adapter}; leave one out")
    found = Adapter.read(adapter)
    return found, found.lora


def adapted_to(fingerprint: Mapping[str, str]) -> dict[str, str]:
    """Return what a backbone's fingerprint says of the images that it was adapted to.

    Returns:
        Text for an error, by the first digits of the SHA-256 of each image.
    """
    return dict.fromkeys(fingerprint.get(IMAGES, "").split(), "an image of the adaptation")


def record_of(weights: str, prompts: dict[str, str], images: list[str]) -> dict[str, Any]:
    """Return what is in `ADAPTER`; see `Adapter`."""
    return {"weights": weights, "prompts": prompts, "images": images}
