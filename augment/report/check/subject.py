"""A model under check, with what the stages share: images, their clean latents, prompts, noise."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.files import JsonObject
from augment.core.rng import normal, rng
from augment.diffusion.backbone import Backbone
from augment.measure.reconstruction import psnr, reconstruction
from augment.sources.prompts import prompts_of
from augment.sources.source import Source


@dataclass(frozen=True)
class Line:
    """A thing that was found.

    Args:
        topic: what it is about, in a word.
        text: what was found.
        expected: whether it is as expected; None is no judgement.
        reason: why it is not as expected, and what to do.
        values: the numbers.
    """

    topic: str
    text: str
    expected: bool | None = None
    reason: str = ""
    values: JsonObject = field(default_factory=dict)

    def __str__(self) -> str:
        judged = {True: "as expected", False: "not as expected", None: ""}[self.expected]
        why = f"\n{'':17}{self.reason}" if self.reason else ""
        return f"{judged:15}  {self.topic}: {self.text}{why}"


@dataclass
class Subject:
    """A loaded model and the images that it is checked with.

    Args:
        backbone: the model.
        source: images of one class.
        steps: solver steps; by default those of the family.
        batch: images of the timed runs; by default 16 on a GPU, 4 above 512 pixels, 3 on a CPU.
    """

    backbone: Backbone
    source: Source
    steps: int = 0
    batch: int = 0

    def __post_init__(self) -> None:
        self.device = self.backbone.device
        self.dtype: torch.dtype = getattr(self.backbone, "dtype", torch.float32)
        self.steps = self.steps or self.backbone.usage.steps
        usual = 16 if self.backbone.resolution <= 512 else 4
        self.batch = self.batch or (3 if self.device.type == "cpu" else usual)
        (self.name, self.ids), *_ = self.source.ids.items()
        template = self.backbone.usage.template
        self.prompts = prompts_of([self.name], template, None) if template else {}
        self.prompt = self.prompts.get(self.name, "")

    def about(self) -> Line:
        """Say which model it is, and what it is used with."""
        b, usage = self.backbone, self.backbone.usage
        text = (
            f"{b.fingerprint['name']}, {short(self.dtype)}, {b.resolution} pixels, latents of "
            f"{'×'.join(map(str, b.latent_shape))}, {b.process!r}; guidance {usage.guidance:g}, "
            f"{self.steps} steps, prompt {self.prompt!r}"
        )
        return Line("model", text, True, values={"fingerprint": b.fingerprint})

    @cached_property
    def pixels(self) -> Float[Tensor, "n c h w"]:
        """The images in the backbone's form."""
        form = self.backbone.channels, self.backbone.resolution
        return torch.stack([self.source.load(image_id, *form) for image_id in self.ids])

    @cached_property
    def clean(self) -> Float[Tensor, "n c h w"]:
        """Their clean latents."""
        with torch.no_grad():
            return self.backbone.encode(self.pixels.to(self.device)).float()

    @cached_property
    def codec_psnr(self) -> float:
        """PSNR of the images behind the codec, in dB."""
        with torch.no_grad():
            back = self.backbone.decode(self.clean).cpu()
        return psnr(reconstruction(self.pixels, back)["mse"].mean().item())

    @cached_property
    def noise(self) -> Float[Tensor, "n c h w"]:
        """The noise that timed runs sample."""
        return normal(rng(0, "noise"), self.batch, *self.backbone.latent_shape)

    @property
    def words(self) -> list[str]:
        """The prompts of a timed run."""
        return [self.prompt] * self.batch


def short(dtype: torch.dtype) -> str:
    """Return the name of a precision, such as float16."""
    return str(dtype).removeprefix("torch.")
