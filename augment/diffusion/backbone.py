"""What a backbone is: a codec, a conditioned network and its noising process.

A backbone is any object with the members of `Backbone`; everything that solvers, inversions and
the synthesis need is derived from them here. Networks may run in low precision; latents go in
and come out in float32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from augment.core.errors import UserError
from augment.diffusion.process import Pair, Process, split

T = TypeVar("T")
Timestep = float | Float[Tensor, " n"]
"""What a network is told of the level: one number for all rows, or, in training, one a row."""

Condition = dict[str, Tensor]
"""What a network is told beside latent and timestep: tensors by name, a row an image each.

The entry ``text`` holds floats that the network is differentiable in, if it can take a prompt.
"""


@runtime_checkable
class Backbone(Protocol):
    """A latent diffusion model.

    Attributes:
        channels, resolution: the image format, (channels, resolution, resolution) in [0, 1].
        latent_shape: (C, H, W) of its latents.
        process: its noising process.
        device: where the network runs.
        fingerprint: strings that identify it; two backbones with equal fingerprints share banks.
        recipe: the arguments of `load_backbone` that make it again; empty if it was not loaded.
    """

    channels: int
    resolution: int
    latent_shape: tuple[int, int, int]
    process: Process
    device: torch.device
    fingerprint: dict[str, str]
    recipe: dict[str, Any]

    def encode(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n ..."]:
        """Images to clean latents, scaled to unit variance."""
        ...

    def decode(self, clean: Float[Tensor, "n ..."]) -> Float[Tensor, "n c h w"]:
        """Clean latents to images in [0, 1]."""
        ...

    def condition(self, prompts: Sequence[str]) -> Condition:
        """The conditions of prompts; the empty prompt is the unconditional model."""
        ...

    def network(self, latent: Tensor, timestep: float, condition: Condition) -> Tensor:
        """The network's raw answer, float32."""
        ...


@runtime_checkable
class Trainable(Backbone, Protocol):
    """A backbone whose network can be trained further.

    Attributes:
        part: what diffusers calls its network, ``unet`` or ``transformer``.
    """

    part: str

    def network(self, latent: Tensor, timestep: Timestep, condition: Condition) -> Tensor:
        """As of any backbone; the timesteps may differ by row."""
        ...

    def trainable(self) -> nn.Module:
        """The network, which is changed in place."""
        ...

    def save(self, folder: Path) -> Path:
        """Write the backbone below a folder; the place is what `load_backbone` takes."""
        ...


@dataclass(frozen=True)
class Denoiser:
    """(latent, level) → (clean, noise): a backbone with its condition and guidance filled in.

    The guided answer is u + guidance·(c − u), of conditional c and unconditional u (Ho & Salimans,
    arXiv 2207.12598, eq. 6), both asked for in one batch; outside the interval it is c
    (Kynkäänniemi et al., arXiv 2404.07724).

    Args:
        backbone: the model.
        condition: of a batch.
        both: if it is to be guided, the conditions of u and c in one, u's rows first, by level.
        guidance: its scale.
        interval: the levels between which there is guidance, ends included.
    """

    backbone: Backbone
    condition: Condition
    both: Callable[[float], Condition] | None = None
    guidance: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __call__(self, latent: Float[Tensor, "n *d"], level: float) -> Pair:
        """The estimates at a level, each of the latent's shape."""
        process, network = self.backbone.process, self.backbone.network
        timestep = process.timestep(level)
        if self.both and self.interval[0] <= level <= self.interval[1]:
            answers = network(torch.cat([latent, latent]), timestep, self.both(level))
            free, output = answers.chunk(2)
            output = free + self.guidance * (output - free)
        else:
            output = network(latent, timestep, self.condition)
        return split(process, latent, output, level)


def denoiser(
    backbone: Backbone,
    prompts: Sequence[str],
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    negative: Sequence[str] | None = None,
    nulls: Float[Tensor, "n steps ..."] | None = None,
) -> Denoiser:
    """A batch's denoiser, with classifier-free guidance if ``guidance`` is not 1.

    Args:
        backbone: the model.
        prompts: one an image.
        guidance: see `Denoiser`.
        interval: see `Denoiser`.
        negative: prompts to guide away from; empty ones by default. Where they are the image's own
            there is nothing to guide.
        nulls: in place of those, embeddings for each image and solver step, of null-text inversion;
            a level takes the nearest step's.

    Raises:
        UserError: an interval that is none.
    """
    check_interval(interval)
    condition = backbone.condition(prompts)
    negative = list(negative or [""] * len(prompts))
    if guidance == 1 or (nulls is None and negative == list(prompts)):
        return Denoiser(backbone, condition)
    free = backbone.condition(negative)
    if nulls is None:
        constant = stack(free, condition)
        return Denoiser(backbone, condition, lambda _: constant, guidance, interval)
    levels = backbone.process.levels(nulls.shape[1])[1:]

    def both(level: float) -> Condition:
        step = min(range(len(levels)), key=lambda k: abs(levels[k] - level))
        return stack({**free, "text": nulls[:, step].to(free["text"])}, condition)

    return Denoiser(backbone, condition, both, guidance, interval)


def stack(first: Condition, second: Condition) -> Condition:
    """Two batches' conditions as one batch's."""
    return {key: torch.cat([first[key], second[key]]) for key in first}


def check_interval(interval: tuple[float, float]) -> None:
    """Refuse levels that are out of order or range."""
    if not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise UserError(
            f"expected two levels for the guidance interval, 0 ≤ low ≤ high ≤ 1, got {interval}"
        )


def as_times(timestep: Timestep, latent: Tensor) -> Float[Tensor, " n"]:
    """One timestep a row.

    A tensor, for diffusers makes an integer of a number, and middles lie between integers.
    """
    times = torch.as_tensor(timestep, dtype=torch.float32, device=latent.device)
    return times.expand(len(latent))


def as_prompts(prompts: str | Sequence[str] | None, count: int) -> list[str]:
    """One prompt a row from one prompt for all, a list, or none.

    Raises:
        UserError: the list is of another length than the batch.
    """
    if prompts is None or isinstance(prompts, str):
        return [prompts or ""] * count
    if len(prompts) != count:
        raise UserError(f"expected {count} prompts, one an image, got {len(prompts)}")
    return list(prompts)


def check_batch(batch_size: int) -> None:
    """Refuse a batch of less than one row."""
    if batch_size < 1:
        raise UserError(f"expected a batch of at least 1, got {batch_size}; 64 is usual")


LIMITS: dict[tuple[int, str], int] = {}
"""The batches that fitted into memory, by a backbone's id and a job, once one did not."""


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
        backbone: whose memory it is.
        count: of rows; of none, ``run`` is called once, for the shape.
        batch_size: rows a call at most.
        steps: ticks a call.
        label: what the job is called.

    Returns:
        What ``run`` returned, call by call.

    Raises:
        UserError: not even one row fits into memory.
    """
    check_batch(batch_size)
    job = id(backbone), label
    parts: list[T] = []
    start = 0
    with tqdm(total=count, desc=label, unit="image", unit_scale=True, delay=2, leave=False) as bar:
        while start < count or not parts:
            size = min(LIMITS.get(job, batch_size), batch_size, max(count - start, 1))
            rows = slice(start, start + size)
            part = attempt(run, rows, partial(advance, bar, min(size, count) / steps))
            if part is not None:
                parts.append(part)
                start += size
            elif size > 1:
                LIMITS[job] = size // 2
            else:
                raise UserError(
                    f"expected memory for one image at a time, got none on {backbone.device}; "
                    "take a smaller resolution, half precision or another device"
                )
            bar.n = min(start, count)
    return parts


def advance(bar: tqdm, share: float) -> None:
    """Move a bar on, not beyond its end by rounding."""
    bar.update(min(share, bar.total - bar.n))


def attempt(
    run: Callable[[slice, Callable[[], Any]], T], rows: slice, tick: Callable[[], Any]
) -> T | None:
    """What ``run`` returns, or None if memory ran out.

    By the time that None is returned, the error, which holds on to the failed batch, is gone.
    """
    try:
        return run(rows, tick)
    except torch.OutOfMemoryError:
        pass
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
