"""New tokens of a vocabulary, such as one a class (textual inversion, arXiv 2208.01618).

A folder keeps them as diffusers does: ``learned_embeds.safetensors`` has a vector by token, and
``learned_embeds_2.safetensors`` has those of the second text encoder. A token of several vectors
becomes ``<name> <name>_1 …``, which diffusers' pipelines put into a prompt by themselves.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.diffusion.checkpoints.hub import damaged
from augment.sources.prompts import nfc

TOKENS = {
    "text_encoder": "learned_embeds.safetensors",
    "text_encoder_2": "learned_embeds_2.safetensors",
}
"""Files of a folder by the text encoder that their tokens are of."""


class TokenRows(nn.Module):
    """A table of embeddings that is frozen, with rows behind it that can be trained.

    Args:
        table: of the tokens that were there before.
        rows: first values of the new tokens' vectors.
        first: number of the first new token.
        norm: length that the vectors keep, so that only their directions are trained (Directional
            Textual Inversion, arXiv 2512.13672); None leaves it free.
    """

    def __init__(
        self,
        table: nn.Embedding,
        rows: Float[Tensor, "n width"],
        first: int,
        norm: float | None = None,
    ) -> None:
        super().__init__()
        self.table, self.first, self.norm = table.requires_grad_(False), first, norm
        self.rows = nn.Parameter(rows.detach().clone())

    @property
    def weight(self) -> Float[Tensor, "m width"]:
        """Return the table that was there before."""
        return self.table.weight

    def values(self) -> Float[Tensor, "n width"]:
        """Return the vectors of the new tokens."""
        return self.rows if self.norm is None else self.norm * F.normalize(self.rows, dim=1)

    def forward(self, numbers: Int[Tensor, "..."]) -> Float[Tensor, "... width"]:
        """Look tokens up."""
        before = self.table(numbers.clamp(max=self.first - 1))
        new = self.values()[(numbers - self.first).clamp(min=0)].to(before)
        return torch.where((numbers >= self.first).unsqueeze(-1), new, before)


def class_tokens(classes: Sequence[str]) -> dict[str, str]:
    """Return a token for each class, made of its name; names that look alike get a number.

    >>> class_tokens(["Ankle boot", "ankle-boot"])
    {'Ankle boot': '<ankle-boot>', 'ankle-boot': '<ankle-boot-1>'}
    """
    tokens: dict[str, str] = {}
    for name in classes:
        stem = re.sub(r"\W+", "-", nfc(name).lower()).strip("-") or "class"
        same = sum(
            re.fullmatch(rf"<{stem}(-\d+)?>", token) is not None for token in tokens.values()
        )
        tokens[name] = f"<{stem}-{same}>" if same else f"<{stem}>"
    return tokens


def _numbered(stem: str, number: int) -> str:
    return f"<{stem}-{number}>" if number else f"<{stem}>"


def start_rows(
    encoder: Any, tokenizer: Any, words: Sequence[str], keep_norm: bool
) -> tuple[Float[Tensor, "n width"], float | None]:
    """Return the mean vector of each word's tokens, and the length to keep: the vocabulary's mean.

    Raises:
        UserError: a word has no token.
    """
    table = encoder.get_input_embeddings().weight
    norm = table.norm(dim=1).mean().item() if keep_norm else None
    rows = []
    for word in words:
        numbers = tokenizer(word, add_special_tokens=False, verbose=False).input_ids
        if not numbers:
            raise UserError(f"expected a word for a token to begin as, got {word!r}; name one")
        rows.append(table[numbers].float().mean(0))
    return torch.stack(rows), norm


def append_tokens(
    encoder: Any, tokenizer: Any, rows: Mapping[str, Tensor], norm: float | None = None
) -> TokenRows:
    """Add tokens to a tokenizer and their vectors to its text encoder, changed in place.

    Raises:
        UserError: a token that is there already, or a vector of another model.
    """
    table: nn.Embedding = encoder.get_input_embeddings()
    vocabulary, first = tokenizer.get_vocab(), len(tokenizer)
    for token, row in rows.items():
        if token in vocabulary:
            raise UserError(
                f"expected new tokens, got {token!r}, which is in the vocabulary; rename it"
            )
        if row.shape != table.weight.shape[1:] or not row.isfinite().all():
            raise UserError(
                f"expected {table.weight.shape[1]} finite numbers for token {token!r}, got "
                f"{tuple(row.shape)}; take the model that it was trained on"
            )
    tokenizer.add_tokens([*rows])
    stacked = torch.stack([*rows.values()]).to(table.weight)
    made = TokenRows(table, stacked, first, norm)
    encoder.set_input_embeddings(made)
    return made


def read_tokens(path: Path) -> dict[str, Float[Tensor, " width"]]:
    """Read vectors by token; one of several vectors becomes as many tokens."""
    with damaged(path):
        state = load_file(path)
    rows: dict[str, Tensor] = {}
    for token, vectors in state.items():
        parts = vectors.float().reshape(-1, vectors.shape[-1]) if vectors.ndim else vectors[None]
        rows |= {f"{token}_{k}" if k else token: part for k, part in enumerate(parts)}
    if not rows:
        raise UserError(f"expected vectors by token in {path}, got none; adapt again")
    return rows


def load_tokens(pipe: Any, folder: Path) -> None:
    """Add the tokens of a folder to a pipeline's tokenizers and text encoders.

    Raises:
        UserError: they are of another model.
    """
    for name, file in TOKENS.items():
        if not (folder / file).exists():
            continue
        encoder = getattr(pipe, name, None)
        if encoder is None:
            raise UserError(
                f"expected tokens for this model, got {folder / file}, and it has no {name}; take "
                "the model that it was trained on"
            )
        append_tokens(encoder, getattr(pipe, tokenizer_of(name)), read_tokens(folder / file))


def tokenizer_of(encoder: str) -> str:
    """Return diffusers' name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")
