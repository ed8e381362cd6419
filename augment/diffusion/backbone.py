"""What a backbone is: a codec, a conditioned network and its noising process.

A backbone is any object with the members of `Backbone`; everything that solvers, inversions and
the synthesis need is derived from them here. Networks may run in low precision; latents go in
and come out in float32.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from augment.diffusion.process import Pair, Process, split
from augment.errors import UserError

Denoiser = Callable[[Tensor, float], Pair]
"""(latent, level) → (clean, noise): a backbone with its condition and guidance filled in."""


@runtime_checkable
class Backbone(Protocol):
    """A latent diffusion model.

    Attributes:
        channels, resolution: the image format, (channels, resolution, resolution) in [0, 1].
        latent_shape: (C, H, W) of its latents.
        process: its noising process.
        fingerprint: strings that identify it; two backbones with equal fingerprints share banks.
    """

    channels: int
    resolution: int
    latent_shape: tuple[int, int, int]
    process: Process
    device: torch.device
    fingerprint: dict[str, str]

    def encode(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n ..."]:
        """Images to clean latents, scaled to unit variance."""
        ...

    def decode(self, clean: Float[Tensor, "n ..."]) -> Float[Tensor, "n c h w"]:
        """Clean latents to images in [0, 1]."""
        ...

    def condition(self, prompts: Sequence[str]) -> Tensor:
        """One row of conditioning a prompt; the empty prompt is the unconditional model."""
        ...

    def network(self, latent: Tensor, timestep: float, condition: Tensor) -> Tensor:
        """The network's raw answer, float32."""
        ...


def denoiser(backbone: Backbone, prompts: Sequence[str], guidance: float = 1.0) -> Denoiser:
    """A batch's denoiser, with classifier-free guidance if ``guidance`` is not 1.

    The guided answer is u + guidance·(c − u), of conditional c and unconditional u (Ho & Salimans,
    arXiv 2207.12598, eq. 6); rows without a prompt are their own u.
    """
    condition = backbone.condition(prompts)
    null = backbone.condition([""] * len(prompts))

    @torch.inference_mode()
    def denoise(latent: Tensor, level: float) -> Pair:
        timestep = backbone.process.timestep(level)
        output = backbone.network(latent, timestep, condition)
        if guidance != 1 and any(prompts):
            free = backbone.network(latent, timestep, null)
            output = free + guidance * (output - free)
        return split(backbone.process, latent, output, level)

    return denoise


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


def batched(
    run: Callable[[Tensor, list[str], Callable[[], Any]], Tensor],
    rows: Float[Tensor, "n ..."],
    prompts: str | Sequence[str] | None,
    batch_size: int,
    steps: int,
    label: str,
) -> Float[Tensor, "n ..."]:
    """Call ``run(rows, prompts, tick)`` in batches, with a progress bar if that takes long."""
    check_batch(batch_size)
    texts = as_prompts(prompts, len(rows))
    with tqdm(total=len(rows) * steps, desc=label, unit="eval", delay=2, leave=False) as bar:
        parts = []
        # an empty batch is run too: it has the shape of a full one
        for start in range(0, max(len(rows), 1), batch_size):
            part = rows[start : start + batch_size]
            tick = partial(bar.update, len(part))
            parts.append(run(part, texts[start : start + batch_size], tick))
    return torch.cat(parts)
