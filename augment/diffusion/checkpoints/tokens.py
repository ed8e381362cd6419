"""New tokens of a vocabulary, such as one a class (textual inversion, arXiv 2208.01618).

A folder keeps them as diffusers does: ``learned_embeds.safetensors`` has a vector by token, and
``learned_embeds_2.safetensors`` has those of the second text encoder. A token of several vectors
becomes ``<name> <name>_1 …``, which diffusers' pipelines put into a prompt by themselves. A file of
one token that has no name in it is called as the file, as in Automatic1111's web UI.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import count
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

_NAMELESS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "emb_params": "text_encoder"}
"""Text encoders by the keys of a file of one token: SDXL's and Automatic1111's layouts."""


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
        taken = {*tokens.values()}
        tokens[name] = next(x for n in count() if (x := _numbered(stem, n)) not in taken)
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


def check_vectors(rows: Mapping[str, Tensor], width: int, known: Collection[str]) -> None:
    """Refuse a token that is there already, or a vector of another model.

    Args:
        rows: vectors by new token.
        width: numbers of a vector.
        known: tokens that are there.
    """
    for token, row in rows.items():
        if token in known:
            raise UserError(
                f"expected new tokens, got {token!r}, which is in the vocabulary; rename it"
            )
        if row.shape != (width,) or not row.isfinite().all():
            raise UserError(
                f"expected {width} finite numbers for token {token!r}, got {tuple(row.shape)}; "
                "take the model that it was trained on"
            )


def append_tokens(
    encoder: Any, tokenizer: Any, rows: Mapping[str, Tensor], norm: float | None = None
) -> TokenRows:
    """Add tokens to a tokenizer and their vectors to its text encoder, changed in place.

    Raises:
        UserError: see `check_vectors`.
    """
    table: nn.Embedding = encoder.get_input_embeddings()
    check_vectors(rows, table.weight.shape[1], tokenizer.get_vocab())
    first = len(tokenizer)
    tokenizer.add_tokens([*rows])
    stacked = torch.stack([*rows.values()]).to(table.weight)
    made = TokenRows(table, stacked, first, norm)
    encoder.set_input_embeddings(made)
    return made


def token_files(place: Path) -> dict[str, Path]:
    """Return the files of tokens in a folder by text encoder, or a file as the first one's."""
    if place.is_file():
        return {"text_encoder": place}
    return {name: place / file for name, file in TOKENS.items() if (place / file).exists()}


def read_tokens(place: Path) -> dict[str, dict[str, Float[Tensor, " width"]]]:
    """Read vectors by text encoder and token; one of several vectors becomes as many tokens.

    Args:
        place: a folder with the files of `TOKENS`, or a file. A token without a name
            (`_NAMELESS`) is called as its file.

    Raises:
        UserError: a damaged file, or one of something else.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, path in token_files(place).items():
        with damaged(path):
            state = load_file(path)
        for key, vectors in state.items():
            if "lora" in key or not 1 <= vectors.ndim <= 2:
                raise UserError(
                    f"expected vectors by token in {path}, got {key}; give low-rank weights as "
                    "lora, in place of adapter"
                )
            token, rows = (path.stem if key in _NAMELESS else key), vectors.float()
            parts = rows.reshape(-1, rows.shape[-1])
            own = found.setdefault(_NAMELESS.get(key, name), {})
            own |= {f"{token}_{k}" if k else token: part for k, part in enumerate(parts)}
        if not state:
            raise UserError(f"expected vectors by token in {path}, got none; adapt again")
    return found


def load_tokens(pipe: Any, found: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Add the tokens of `read_tokens` to a pipeline's tokenizers and text encoders.

    Raises:
        UserError: they are of another model.
    """
    for name, rows in found.items():
        encoder = getattr(pipe, name, None)
        if encoder is None:
            raise UserError(
                f"expected tokens for this model, got {min(rows)!r} for {name}, which it does not "
                "have; take the model that they were trained on"
            )
        append_tokens(encoder, getattr(pipe, tokenizer_of(name)), rows)


def only_tokens(
    found: Mapping[str, Mapping[str, Tensor]], model: str
) -> Mapping[str, Float[Tensor, " width"]]:
    """Return the tokens of `read_tokens` for a model that looks its prompts up; empty for none.

    Raises:
        UserError: some are of a second text encoder.
    """
    if other := found.keys() - {"text_encoder"}:
        raise UserError(
            f"expected tokens of {model}, got some of {min(other)}, which it does not have; take "
            "the model that they were trained on"
        )
    return found.get("text_encoder", {})


def expanded(prompt: str, tokenizer: Any) -> str:
    """Return a prompt with all vectors of its tokens, as diffusers expands it.

    >>> from types import SimpleNamespace
    >>> tokens = {"<owl>": 1, "<owl>_1": 2}
    >>> expanded("an <owl>", SimpleNamespace(added_tokens_encoder=tokens, tokenize=str.split))
    'an <owl> <owl>_1'
    """
    from diffusers.loaders import TextualInversionLoaderMixin

    return str(TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer))


def tokenizer_of(encoder: str) -> str:
    """Return diffusers' name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")
