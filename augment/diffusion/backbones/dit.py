"""The class-conditional DiT of ImageNet through diffusers.

Peebles & Xie, *Scalable Diffusion Models with Transformers*, arXiv 2212.09748. Its process is
DDPM's linear one, as its scheduler file says, and its network also predicts a variance, which
deterministic solvers do not use. Its table of classes can get new rows: the paper has one table,
of which diffusers keeps a copy in every block.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from augment.core.errors import UserError
from augment.diffusion.backbone import Condition
from augment.diffusion.backbones.latent_diffusion import LatentDiffusion
from augment.diffusion.checkpoints.lora import fuse_lora
from augment.diffusion.checkpoints.tokens import TokenRows, check_vectors, only_tokens
from augment.diffusion.usage import Usage


class DiT(LatentDiffusion):
    """Prompts are class names or numbers; the empty prompt is the class of no class.

    The network looks its classes up by number, so the condition has ``labels`` and no ``text``:
    null-text inversion has nothing to optimise. It has one resolution.

    Attributes:
        added: names of the classes that were added.
    """

    name = "dit"
    part = "transformer"
    half = torch.bfloat16
    usage = Usage("", 4.0)  # no template: it has names for its own classes only
    blocks = ("BasicTransformerBlock",)
    fixed = ("resolution", "zero_terminal_snr")
    added: tuple[str, ...] = ()

    def pipeline_options(
        self, latents: Tensor, steps: int, guidance: float
    ) -> dict[str, Any] | None:
        """Return None: the pipeline draws its own latents."""

    def embed(self, prompt: str) -> Condition:
        """Return ``labels`` (1,)."""
        return {"labels": torch.tensor([self._label(prompt)], device=self.device)}

    def _label(self, prompt: str) -> int:
        """Return the row of the table for a prompt."""
        classes: int = self.net.config.num_embeds_ada_norm
        labels: dict[str, int] = self.pipe.labels
        if not prompt:
            return classes
        if prompt in self.added:
            return classes + 1 + self.added.index(prompt)  # behind the class of no class
        if prompt in labels:
            return labels[prompt]
        if prompt.isdecimal() and int(prompt) < classes:
            return int(prompt)
        raise UserError(
            f"expected a class of the checkpoint or a number below {classes} as prompt, got "
            f"{prompt!r}; names are such as {', '.join([*self.added, *labels][:3])}"
        )

    def add_tokens(self, words: Mapping[str, str], keep_norm: bool) -> dict[str, TokenRows]:
        """Add classes that begin as others; return their rows, to be trained.

        Args:
            words: a class by new class.
            keep_norm: not used, as a table of classes is no vocabulary.
        """
        table = self._embedders()[0].embedding_table.weight
        rows = {token: table[self._label(word)].detach() for token, word in words.items()}
        return {"text_encoder": self._append(rows)}

    def load_tokens(self, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Add classes that were trained before."""
        if rows := only_tokens(found, self.name):
            self._append(rows)

    def add_lora(self, path: Path, scale: float) -> dict[str, str]:
        """Add low-rank weights; its pipeline class cannot."""
        return fuse_lora(self.net, path, scale)

    def _embedders(self) -> list[Any]:
        """Return what looks classes up in each block."""
        return [block.norm1.emb.class_embedder for block in self.net.transformer_blocks]

    def _append(self, rows: Mapping[str, Tensor]) -> TokenRows:
        """Add classes behind those of the checkpoint, to the table that all blocks then share."""
        first, *others = (embedder.embedding_table for embedder in self._embedders())
        if any(not torch.equal(first.weight, other.weight) for other in others):
            raise UserError(
                "expected blocks that share a table of classes, as DiT has it, got blocks with "
                "tables of their own; adapt it with tokens false"
            )
        check_vectors(rows, first.weight.shape[1], [*self.added, *self.pipe.labels])
        self.added += tuple(rows)
        stacked = torch.stack([*rows.values()]).to(first.weight)
        made = TokenRows(first, stacked, len(first.weight))
        for embedder in self._embedders():
            embedder.embedding_table = made
        return made

    def answer(self, latent: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """Return the transformer's ε, without the variance."""
        labels = condition["labels"]
        both = self.net(latent, timestep=times, class_labels=labels, return_dict=False)[0]
        return both[:, : latent.shape[1]]
