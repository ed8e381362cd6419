"""What a network is conditioned on, as values: prompts, embeddings, and schedules of them by level.

All of these can be given to `augment.sample` for the images of a batch, and to guide away from:

- one prompt for all, or a list with an entry for each image;
- embeddings: a `Condition` as ``backbone.condition`` returns, or its tensor ``text`` alone, with a
  row for each image or one for all;
- a `Schedule` of these: one while there is much noise, another one further down;
- any of these beside references, `Referred`: vectors or tokens of images, which condition a network
  as words do. An IP-Adapter (Ye et al., arXiv 2308.06721) makes such a network of Stable Diffusion.

So what papers do with the words along the way is a value too. Prompts switched at a level (Smooth
Diffusion, arXiv 2312.04410, eq. 15) are ``Schedule(((0.6, "a cat"), (0.0, "a dog")))``; Diff-II's
two stages, the whole prompt first and the plain one after, are `two_stages`; null-text inversion
guides away from ``Schedule.by_step(levels, embeddings)``; and `mix` interpolates embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Protocol, Union, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError

Condition = dict[str, Tensor]
"""A network's inputs beside latent and timestep: tensors by name, a row an image each.

The entry ``text`` holds floats that the network is differentiable in, if it can take a prompt.
Where prompts have embeddings of different lengths, zeros fill them up; see `unpadded`.
The entry ``reference`` is that of no image, unless `Referred` replaces it.
The entry ``heads`` has weights of image heads; see `augment.diffusion.checkpoints.heads`.
"""

HEADS = "heads"
"""The entry of a condition whose references are weights of image heads."""

Words = Union[str, Tensor, Condition, "Schedule", "Referred"]
"""A prompt, embeddings, or a schedule of these; or one of them beside a reference."""

Given = Words | Sequence[Words] | None
"""What a caller gives for a batch: one for all or, in a list or in tensors, one for each image."""

ByLevel = Callable[[float], Condition]
"""The conditions of a batch as a function of the noise level."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """Prompts or embeddings by noise level.

    Args:
        parts: (bound, what holds at levels above it), from the noisiest level down; the bounds
            fall, the last one is 0.

    Raises:
        UserError: no parts, or other bounds.

    >>> Schedule(((0.6, "a cat"), (0.0, "a dog"))).at(0.7)
    'a cat'
    """

    parts: tuple[tuple[float, Given], ...]

    def __post_init__(self) -> None:
        bounds = [1.0, *(bound for bound, _ in self.parts)]
        if bounds[-1] != 0 or not all(high > low for high, low in pairwise(bounds)):
            raise UserError(
                f"expected levels below 1 that fall to 0 in a schedule, got {bounds[1:]}; write "
                "it as ((0.6, 'first'), (0.0, 'last'))"
            )

    @classmethod
    def by_step(
        cls, levels: Sequence[float], embeddings: Float[Tensor, "n steps ..."]
    ) -> "Schedule":
        """Return the schedule of an embedding for each solver step; a level takes the nearest's.

        Args:
            levels: the grid that was walked, ascending, one more than there are steps.
            embeddings: step k is from level k + 1 to level k.
        """
        bounds = [0.0, *(sum(pair) / 2 for pair in pairwise(levels[1:]))]
        return cls(tuple((b, embeddings[:, k]) for k, b in enumerate(bounds))[::-1])

    def at(self, level: float) -> Given:
        """Return what holds at a level."""
        return next((words for bound, words in self.parts if level > bound), self.parts[-1][1])


@dataclass(frozen=True, eq=False)
class Referred:
    """Prompts, embeddings or a schedule, beside references.

    Args:
        words: what it is without references.
        references: as the backbone embeds images, a row for each image or one for all.
    """

    words: Given
    references: Float[Tensor, "n ..."]

    def same(self, other: object) -> bool:
        """Tell whether another one is of the same prompt and the same references."""
        return (
            isinstance(other, Referred)
            and isinstance(self.words, str)
            and self.words == other.words
            and torch.equal(self.references, other.references)
        )


def two_stages(prompts: Sequence[str], suffix: str, share: float) -> Schedule:
    """Return Diff-II's schedule: prompts with a suffix first, and plain ones for the rest.

    Wang et al., *Inversion Circle Interpolation*, CVPR 2025.

    Args:
        prompts: of the images.
        suffix: appended to each, with a comma.
        share: of the levels, from the noisiest down, that have the suffix; in (0, 1).
    """
    return Schedule(((1 - share, [f"{p}, {suffix}" for p in prompts]), (0.0, list(prompts))))


def mix(conditions: Condition, weights: Float[Tensor, "b n"]) -> Condition:
    """Return weighted sums of the rows of conditions, such as text between two prompts.

    Args:
        conditions: n rows, as ``backbone.condition`` returns them.
        weights: of each row in each of b sums.

    Raises:
        UserError: rows that are no floats, such as numbers of classes.
    """
    if odd := [key for key, rows in conditions.items() if not rows.is_floating_point()]:
        raise UserError(
            f"expected embeddings to mix, got {odd[0]}, which are numbers; give one prompt"
        )
    return {
        key: torch.einsum("bn,n...->b...", weights.to(rows), rows)
        for key, rows in conditions.items()
    }


def padded(rows: Float[Tensor, "length width"], length: int) -> Float[Tensor, "1 n width"]:
    """Return the embeddings of a prompt's tokens with rows of zeros behind, as one row."""
    return torch.nn.functional.pad(rows, (0, 0, 0, length - len(rows)))[None]


def unpadded(text: Float[Tensor, "b n width"]) -> list[Float[Tensor, "length width"]]:
    """Return the embeddings of each prompt's tokens, without the rows of zeros behind them.

    >>> [len(rows) for rows in unpadded(torch.cat([padded(torch.ones(k, 2), 4) for k in (3, 1)]))]
    [3, 1]
    """
    places = torch.arange(1, text.shape[1] + 1, device=text.device)
    lengths = (text.detach().ne(0).any(-1) * places).amax(1)
    return [row[:length] for row, length in zip(text, lengths.tolist(), strict=True)]


@runtime_checkable
class _Embeds(Protocol):
    """The part of a backbone that embeds prompts."""

    def condition(self, prompts: Sequence[str]) -> Condition: ...


def rows_of(given: Given, count: int) -> list[Words]:
    """Return what is given for a batch as one entry an image, embeddings with one row each.

    Raises:
        UserError: it is for another number of images.
    """
    if given is None or isinstance(given, str):
        return [given or ""] * count
    if isinstance(given, Schedule):
        split = [rows_of(words, count) for _, words in given.parts]
        bounds = [bound for bound, _ in given.parts]
        rows = zip(*split, strict=True)
        return [Schedule(tuple(zip(bounds, row, strict=True))) for row in rows]
    if isinstance(given, Referred):
        pairs = zip(
            rows_of(given.words, count), _spread(given.references, count).split(1), strict=True
        )
        return [Referred(words, reference) for words, reference in pairs]
    if isinstance(given, Tensor):
        return list(_spread(given, count).split(1))
    if isinstance(given, dict):
        split = {key: _spread(rows, count).split(1) for key, rows in given.items()}
        return [{key: rows[k] for key, rows in split.items()} for k in range(count)]
    if len(given) != count:
        raise UserError(f"expected {count} prompts, one an image, got {len(given)}")
    return [rows_of(words, 1)[0] for words in given]


def _spread(rows: Tensor, count: int) -> Tensor:
    """Return embeddings with a row for each image."""
    if not rows.ndim or len(rows) not in (1, count):
        raise UserError(
            f"expected embeddings of {count} images or of one for all, got a tensor of shape "
            f"{tuple(rows.shape)}; the first dimension is the images'"
        )
    return rows.expand(count, *rows.shape[1:])


def embed(backbone: _Embeds, rows: Sequence[Words]) -> ByLevel:
    """Return the conditions of a batch as a function of the level, its prompts embedded already.

    Args:
        backbone: the model.
        rows: of `rows_of`.

    Raises:
        UserError: a prompt or reference that the model does not take, or embeddings of another
            shape.
    """
    schedules = list(map(_scheduled, rows))
    bounds = sorted({bound for known in schedules for bound, _ in known.parts} or {0.0})
    above = [torch.finfo(torch.float64).eps + bound for bound in bounds]
    parts = [_join(backbone, [known.at(level) for known in schedules]) for level in above]

    @lru_cache(1)
    def part(number: int) -> Condition:
        fixed, replaced = parts[number]
        found = dict(fixed)
        for key, changes in replaced.items():
            own = [changes.get(k, row) for k, row in enumerate(fixed[key].split(1))]
            found[key] = torch.cat([row.to(fixed[key]) for row in own])
        return found

    return lambda level: part(max(sum(level > bound for bound in bounds) - 1, 0))


def _scheduled(row: Given) -> Schedule:
    """Return a row as a schedule, whose parts have its reference."""
    if isinstance(row, Referred):
        parts = _scheduled(row.words).parts
        return Schedule(tuple((bound, Referred(part, row.references)) for bound, part in parts))
    return row if isinstance(row, Schedule) else Schedule(((0.0, row),))


def _join(
    backbone: _Embeds, words: Sequence[Given]
) -> tuple[Condition, dict[str, dict[int, Tensor]]]:
    """Return the condition of a batch's prompts, and by name the rows that embeddings replace."""
    plain = [word.words if isinstance(word, Referred) else word for word in words]
    fixed = backbone.condition([word if isinstance(word, str) else "" for word in plain])
    replaced: dict[str, dict[int, Tensor]] = {}
    for row, (given, word) in enumerate(zip(words, plain, strict=True)):
        own: Condition = {}
        if isinstance(word, Tensor):
            own = {"text": word}
        elif isinstance(word, dict):
            own = word
        if own.keys() - fixed.keys() or (isinstance(word, dict) and fixed.keys() - own.keys()):
            raise UserError(
                f"expected embeddings named {', '.join(fixed)}, got {', '.join(own)}; take them "
                "from the condition() of this backbone"
            )
        if isinstance(given, Referred):
            entry = HEADS if HEADS in fixed else "reference"
            if entry not in fixed:
                raise UserError(
                    "expected a backbone that takes references, got one without; load it with "
                    "ip_adapter or reference, or leave references out"
                )
            value, none = given.references, own.get(entry, fixed[entry][row : row + 1])
            if entry == HEADS and value.shape[1:] == none.shape[1:]:
                value = value.to(none) + (1 - value.to(none).sum(1, keepdim=True)) * none
            own = {**own, entry: value}
        for key, value in own.items():
            if value.shape[1:] != fixed[key].shape[1:]:
                raise UserError(
                    f"expected embeddings {key} of shape (N, "
                    f"{', '.join(map(str, fixed[key].shape[1:]))}), got {tuple(value.shape)}; take "
                    "them from this backbone"
                )
            replaced.setdefault(key, {})[row] = value
    return fixed, replaced


def stacked(first: ByLevel, second: ByLevel) -> ByLevel:
    """Return the conditions of two batches in one, the first's rows first.

    Image heads are part of the network, not of its words: those of the second hold for both.
    """
    last: list[tuple[Condition, Condition, Condition]] = []

    def both(level: float) -> Condition:
        one, other = first(level), second(level)
        if not last or last[0][0] is not one or last[0][1] is not other:
            first_rows = {**one, HEADS: other[HEADS]} if HEADS in other else one
            rows = {key: torch.cat([first_rows[key], other[key]]) for key in one}
            last[:] = [(one, other, rows)]
        return last[0][2]

    return both
