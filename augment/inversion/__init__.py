"""Inversions: from an image to the latent that the sampler turns back into it.

To add one: a file with a frozen dataclass that has the members of `Inverter`, and an entry in
`INVERTERS`.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.core.files import sha256
from augment.core.registry import make
from augment.diffusion.backbone import (
    Backbone,
    Denoiser,
    as_prompts,
    batched,
    denoiser,
    referred,
)
from augment.diffusion.conditions import rows_of
from augment.diffusion.process import level_number
from augment.diffusion.solver import check_steps
from augment.inversion.ddim import DDIM, PublishedDDIM
from augment.inversion.fireflow import FireFlow
from augment.inversion.fixed_point import FixedPoint
from augment.inversion.forward_start import ForwardStart
from augment.inversion.midpoint import Midpoint
from augment.inversion.negative_prompt import NegativePrompt
from augment.inversion.noise import Noise
from augment.inversion.null_text import NullText
from augment.sources.images import prepare

__all__ = ["INVERTERS", "Inverter", "check_guidance", "invert", "inverted", "inverter"]


@runtime_checkable
class Inverter(Protocol):
    """An inversion with its settings, which are its fields.

    Attributes:
        solver: the solver that undoes it, a key of `augment.diffusion.solver.SOLVERS`.
        guidance: scale that it is meant for; 1 is none.
        negative: what guided sampling points away from: the ``empty`` prompt, the ``prompt`` of the
            inversion, or ``null_embeddings`` that it stores.
    """

    solver: ClassVar[str]
    guidance: ClassVar[float]
    negative: ClassVar[str]

    @property
    def steps(self) -> int:
        """Solver steps to the noisiest level."""
        ...

    @property
    def level(self) -> float:
        """Where the inversion stops, as a share of the steps."""
        ...

    @property
    def steps_made(self) -> int:
        """Solver steps up to the level."""
        ...

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        ...

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """Invert a batch.

        Args:
            denoise: the backbone with the batch's condition and guidance.
            clean: clean latents.
            tick: called after each solver step.
            seeds: an integer for each image, for inversions with random draws.

        Returns:
            ``latents`` (n, C, H, W) at the last level, and other tensors that sampling needs.
        """
        ...


INVERTERS: dict[str, type[Inverter]] = {
    "forward_start": ForwardStart,
    "ddim": DDIM,
    "published_ddim": PublishedDDIM,
    "fixed_point": FixedPoint,
    "midpoint": Midpoint,
    "fireflow": FireFlow,
    "negative_prompt": NegativePrompt,
    "null_text": NullText,
    "noise": Noise,
}
"""Inversions by name."""


def inverter(name: str, **settings: Any) -> Inverter:
    """Build an inversion by name."""
    made = make(INVERTERS, name, settings, "inversion")
    check_steps(made.steps)
    level_number(made.steps, made.level)
    return made


def check_guidance(
    run: Inverter, backbone: Backbone, prompts: Sequence[str], guidance: float
) -> None:
    """Refuse an inversion that optimises guidance where there is none."""
    if run.guidance == 1:
        return
    if "text" not in backbone.condition([""]):
        raise UserError(
            f"expected a backbone that takes text for {type(run).__name__}, got "
            f"{backbone.fingerprint['name']}; take another inversion"
        )
    if guidance == 1 or not all(prompts):
        raise UserError(
            f"expected a prompt for every image and a guidance other than 1 for "
            f"{type(run).__name__}, got {'guidance 1' if guidance == 1 else 'none for some'}; "
            "give prompts and a guidance such as 7.5, or take another inversion, such as ddim"
        )


def invert(
    backbone: Backbone,
    images: Float[Tensor, "n c h w"],
    prompts: str | Sequence[str] | None = None,
    inversion: str = "forward_start",
    steps: int = 25,
    guidance: float | None = None,
    batch_size: int = 64,
    seeds: Sequence[int] | None = None,
    **settings: Any,
) -> Float[Tensor, "n C H W"]:
    """Invert images to latents.

    Where the backbone takes references, each image is inverted with its own; sample it back with
    ``Referred(prompts, backbone.refer(images))``.

    Args:
        backbone: the model.
        images: in [0, 1]; `augment.sources.images.prepare` fits their size and channels.
        prompts: one for all, one for each image, or none.
        inversion: a key of `INVERTERS`.
        steps: solver steps; see the inversion for network evaluations.
        guidance: scale of classifier-free guidance; 1, which is none, but 7.5 for ``null_text``.
            Any other scale makes the reconstruction worse.
        batch_size: images a network call; halved if a GPU's memory is too small.
        seeds: an integer for each image, for inversions with random draws; by default a hash of its
            pixels, so that its latent is the same in any batch.
        settings: other settings of the inversion, such as ``iterations`` of ``fixed_point``, or
            ``level``, the share of the steps that is made.

    Returns:
        float32 latents at the last level, on the backbone's device.

    Raises:
        UserError: an unknown inversion or setting, no steps, or pixels outside [0, 1].
    """
    run = inverter(inversion, steps=steps, **settings)
    return inverted(run, backbone, images, prompts, guidance, batch_size, seeds)["latents"]


def _seed_of(image: Float[Tensor, "c h w"]) -> int:
    """Hash an image's pixels."""
    return int(sha256(image.detach().cpu().contiguous().numpy().tobytes())[:8], 16)


def inverted(
    run: Inverter,
    backbone: Backbone,
    images: Float[Tensor, "n c h w"],
    prompts: str | Sequence[str] | None = None,
    guidance: float | None = None,
    batch_size: int = 64,
    seeds: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """Invert images as `invert` does, and return all tensors that the inversion gives.

    Where the backbone takes references, each image is inverted with its own, as it is sampled back
    with it; the float16 ``references`` are returned too.
    """
    if len(images) and not (images.min() >= 0 and images.max() <= 1):
        raise UserError(
            f"expected pixels in [0, 1], got {images.min():.3g} to {images.max():.3g}; "
            "divide 8-bit images by 255"
        )
    texts = as_prompts(prompts, len(images))
    seeds = [_seed_of(image) for image in images] if seeds is None else seeds
    scale = run.guidance if guidance is None else guidance
    check_guidance(run, backbone, texts, scale)

    @torch.inference_mode(False)  # null-text differentiates, whatever the caller does
    @torch.no_grad()
    def invert_rows(rows: slice, tick: Callable[[], Any]) -> dict[str, Tensor]:
        part = prepare(images[rows], backbone.channels, backbone.resolution).to(backbone.device)
        given, references = referred(backbone, texts[rows], part)
        words = rows_of(given, len(part))
        denoise = denoiser(
            backbone, words, scale, negative=words if run.negative == "prompt" else None
        )
        found = run(denoise, backbone.encode(part), tick, seeds[rows])
        return found if references is None else {**found, "references": references.cpu()}

    label = f"invert by {type(run).__name__}"
    parts = batched(invert_rows, backbone, len(images), batch_size, max(run.steps_made, 1), label)
    offset = 0
    for part in parts if "nulls" in parts[0] else ():
        part["null_rows"] = part["null_rows"] + offset
        offset += len(part["nulls"])
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
