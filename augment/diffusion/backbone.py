"""A backbone: a codec, a conditioned network and its noising process.

A backbone is any object with the members of `Backbone`; everything that solvers, inversions and
the synthesis need is derived from them here. Networks may run in low precision; latents go in
and come out in float32.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.core.progress import Progress
from augment.diffusion.checkpoints.heads import ImageHeads
from augment.diffusion.checkpoints.tokens import TokenRows
from augment.diffusion.conditions import (
    ByLevel,
    Condition,
    Given,
    Referred,
    Words,
    embed,
    stacked,
)
from augment.diffusion.process import Pair, Process, split
from augment.diffusion.usage import Usage

T = TypeVar("T")
Timestep = float | Float[Tensor, " n"]
"""The level as a network takes it: one number for all rows or, in training, one a row."""

Recipe = dict[str, Any]
"""Arguments of `augment.diffusion.load_backbone`, as JSON: ``name_or_path`` and options."""


@runtime_checkable
class Backbone(Protocol):
    """A latent diffusion model.

    Attributes:
        channels, resolution: of images (channels, resolution, resolution) in [0, 1].
        latent_shape: (C, H, W) of its latents.
        process: its noising process.
        device: of the network.
        fingerprint: strings that identify it; backbones with equal fingerprints share banks.
        recipe: makes it again; empty if it was not loaded.
        usage: prompts, guidance and steps that its family is used with.
    """

    channels: int
    resolution: int
    latent_shape: tuple[int, int, int]
    process: Process
    device: torch.device
    fingerprint: dict[str, str]
    recipe: Recipe
    usage: Usage

    def encode(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n ..."]:
        """Encode images to clean latents, scaled to unit variance."""
        ...

    def decode(self, clean: Float[Tensor, "n ..."]) -> Float[Tensor, "n c h w"]:
        """Decode clean latents to images in [0, 1]."""
        ...

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Return the conditions of prompts; the empty prompt is the unconditional model."""
        ...

    def network(self, latent: Tensor, timestep: float, condition: Condition) -> Tensor:
        """Return the network's raw output, float32."""
        ...


@runtime_checkable
class Referring(Backbone, Protocol):
    """A backbone that can be conditioned on references: vectors or tokens of images.

    Its condition then has an entry ``reference``, which without images is that of the
    unconditional model, or ``heads``; and its fingerprint says under ``reference`` what makes them.
    """

    def refer(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n ..."]:
        """Embed images in [0, 1], of the backbone's channels and resolution, as references."""
        ...


REFERENCE = "reference"
"""Key of a backbone's fingerprint: what makes references, if it takes any."""


def referred(
    backbone: Backbone, words: Given, images: Float[Tensor, "n c h w"]
) -> tuple[Given, Tensor | None]:
    """Return words beside the references of images, and these; as they are without any.

    References are rounded to float16, as a bank keeps them.
    """
    if REFERENCE not in backbone.fingerprint or not isinstance(backbone, Referring):
        return words, None
    references = backbone.refer(images).half()
    return Referred(words, references.float()), references


@runtime_checkable
class Trainable(Backbone, Protocol):
    """A backbone whose network can be trained further.

    Attributes:
        part: diffusers' name of its network, ``unet`` or ``transformer``.
    """

    part: str

    def network(self, latent: Tensor, timestep: Timestep, condition: Condition) -> Tensor:
        """Return the network's raw output; the timesteps may differ by row."""
        ...

    def trainable(self) -> nn.Module:
        """Return the network, to be changed in place."""
        ...

    def save(self, folder: Path) -> Path:
        """Write the backbone below a folder; return the path for `load_backbone`."""
        ...


@runtime_checkable
class Adaptable(Trainable, Protocol):
    """A backbone that can learn new words for classes.

    Attributes:
        adapted_prompts: by class, those that it was adapted with; empty if it was not.
        heads: low-rank weights by image, if it has any.
    """

    adapted_prompts: dict[str, str]
    heads: ImageHeads | None

    def encoders(self) -> dict[str, nn.Module]:
        """Return the text encoders that can be trained, by diffusers' names."""
        ...

    def add_tokens(self, words: Mapping[str, str], keep_norm: bool) -> dict[str, TokenRows]:
        """Add tokens that begin as words; return their rows, to be trained, by text encoder.

        Args:
            words: by token.
            keep_norm: whether the rows keep the mean length of the vocabulary's.
        """
        ...

    def embedded(self, prompts: Sequence[str]) -> Condition:
        """Return the conditions of prompts, differentiable in tokens and text encoders."""
        ...


@dataclass(frozen=True)
class Denoiser:
    """(latent, level) → (clean, noise): a backbone with its condition and guidance filled in.

    The guided output is u + guidance·(c − u), of conditional c and unconditional u (Ho & Salimans,
    arXiv 2207.12598, eq. 6), both computed in one batch; outside the interval it is c
    (Kynkäänniemi et al., arXiv 2404.07724), and so in all but the first channels of a backbone with
    ``guided_channels``.

    Args:
        backbone: the model.
        condition: of a batch, by level.
        both: for guidance, the conditions of u and c in one by level, u's rows first.
        guidance: scale.
        interval: lowest and highest level with guidance.
    """

    backbone: Backbone
    condition: ByLevel
    both: ByLevel | None = None
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __call__(self, latent: Float[Tensor, "n *d"], level: float) -> Pair:
        """Return the estimates at a level, each of the latent's shape."""
        process, network = self.backbone.process, self.backbone.network
        timestep = process.timestep(level)
        if self.both and self.interval[0] <= level <= self.interval[1]:
            outputs = network(torch.cat([latent, latent]), timestep, self.both(level))
            free, output = outputs.chunk(2)
            guided = free + self.guidance * (output - free)
            if first := getattr(self.backbone, "guided_channels", None):
                guided = torch.cat([guided[:, :first], output[:, first:]], 1)
            output = guided
        else:
            output = network(latent, timestep, self.condition(level))
        return split(process, latent, output, level)


def denoiser(
    backbone: Backbone,
    prompts: Sequence[Words],
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    negative: Sequence[Words] | None = None,
) -> Denoiser:
    """Build the denoiser of a batch, with classifier-free guidance if ``guidance`` is not 1.

    Args:
        backbone: the model.
        prompts: one an image, or embeddings or schedules; see `augment.diffusion.conditions`.
        guidance: see `Denoiser`.
        interval: see `Denoiser`.
        negative: what to guide away from, as ``prompts``; empty prompts by default. There is no
            guidance away from the images' own prompts.

    Raises:
        UserError: see `check_interval` and `augment.diffusion.conditions.embed`.
    """
    check_interval(interval)
    condition = embed(backbone, prompts)
    away_from = list(negative or [""] * len(prompts))
    if guidance == 1 or all(_same(*pair) for pair in zip(prompts, away_from, strict=True)):
        return Denoiser(backbone, condition)
    both = stacked(embed(backbone, away_from), condition)
    return Denoiser(backbone, condition, both, guidance, interval)


def _same(words: Words, other: Words) -> bool:
    """Tell whether a prompt, and its reference if it has one, is the same as another."""
    if isinstance(words, Referred):
        return words.same(other)
    return isinstance(words, str) and words == other


def check_interval(interval: tuple[float, float]) -> None:
    """Refuse an interval of guidance that is not 0 ≤ low ≤ high ≤ 1."""
    if not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise UserError(
            f"expected two levels for the guidance interval, 0 ≤ low ≤ high ≤ 1, got {interval}"
        )


def as_times(timestep: Timestep, latent: Tensor) -> Float[Tensor, " n"]:
    """Return one timestep a row, as a tensor: diffusers would round a number to an integer."""
    if isinstance(timestep, Tensor):
        return timestep.to(latent.device, torch.float32).expand(len(latent))
    # filled on the device: a copy from the host would wait for all that a GPU has to do
    return torch.full((len(latent),), timestep, dtype=torch.float32, device=latent.device)


def as_prompts(prompts: str | Sequence[str] | None, count: int) -> list[str]:
    """Return one prompt a row, from one prompt for all, a list of this length, or None."""
    if prompts is None or isinstance(prompts, str):
        return [prompts or ""] * count
    if len(prompts) != count:
        raise UserError(f"expected {count} prompts, one an image, got {len(prompts)}")
    return list(prompts)


def check_batch(batch_size: int) -> None:
    """Refuse a batch of less than one row."""
    if batch_size < 1:
        raise UserError(f"expected a batch of at least 1, got {batch_size}; 64 is usual")


LIMITS: WeakKeyDictionary[Backbone, dict[str, int]] = WeakKeyDictionary()
"""Batch sizes that fit into memory by backbone and job, once one did not."""


_silent = ContextVar("_silent", default=False)


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no progress bars meanwhile, as within a user's own loop."""
    token = _silent.set(True)
    try:
        yield
    finally:
        _silent.reset(token)


def batched(
    run: Callable[[slice, Callable[[], Any]], T],
    backbone: Backbone,
    count: int,
    batch_size: int,
    steps: int,
    label: str,
) -> list[T]:
    """Call ``run(rows, tick)`` for ``count`` rows in batches, with a progress bar if it takes long.

    A batch that does not fit into a GPU's memory is halved, and the smaller size kept for the rest
    of the process.

    Args:
        run: makes some rows, and calls ``tick`` ``steps`` times meanwhile.
        backbone: the model that is used.
        count: number of rows; for 0, ``run`` is called once, for the shape.
        batch_size: maximum number of rows a call.
        steps: number of ticks a call.
        label: name of the job.

    Returns:
        The results of ``run``, call by call.

    Raises:
        UserError: not even one row fits into memory.
    """
    check_batch(batch_size)
    limits = LIMITS.setdefault(backbone, {})
    parts: list[T] = []
    start = 0
    form: Any = {"unit": "image", "unit_scale": True, "delay": 2, "leave": False}
    form |= {"disable": True} if _silent.get() else {}  # else the environment says
    with Progress(total=count, desc=label, **form) as bar:
        while start < count or not parts:
            size = min(limits.get(label, batch_size), batch_size, max(count - start, 1))
            rows = slice(start, start + size)
            part = attempt(run, rows, partial(_advance, bar, min(size, count) / steps))
            if part is not None:
                parts.append(part)
                start += size
            elif size > 1:
                limits[label] = size // 2
            else:
                raise UserError(
                    f"expected memory for one image at a time, got none on {backbone.device}; "
                    "take a smaller resolution, half precision or another device"
                )
            bar.n = min(start, count)
    return parts


def _advance(bar: Progress, share: float) -> None:
    """Move a bar on, not beyond its end by rounding."""
    bar.update(min(share, bar.total - bar.n))


def attempt(
    run: Callable[[slice, Callable[[], Any]], T], rows: slice, tick: Callable[[], Any]
) -> T | None:
    """Return ``run(rows, tick)``, or None if memory ran out.

    By then the error, which holds references to the failed batch, is gone.
    """
    try:
        return run(rows, tick)
    except RuntimeError as error:
        # MPS has no type of its own for it
        if not isinstance(error, torch.OutOfMemoryError) and "MPS backend out of" not in str(error):
            raise
    for backend in (torch.cuda, torch.mps):
        if backend.is_available():
            backend.empty_cache()
    return None
