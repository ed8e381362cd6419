"""What the models of a family are used with: prompts, guidance, steps; and few-step models.

The guidance of each family is the default of its pipeline in diffusers, which is that of its paper
or model card. Inversion does without guidance; it is for sampling.

A few-step model (SD Turbo, arXiv 2311.17042; LCM, arXiv 2310.04378; SDXL-Lightning, arXiv
2402.13929; DMD, arXiv 2311.18828) is distilled to jump from any noise to an image. How its images
depend on the noise is not that of the probability-flow ODE any more, so that an inverted latent
says little of its image.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, NamedTuple

from augment.core.errors import UserError

PHOTO = "a photo of a {name}"
"""The template of CLIP (arXiv 2103.00020), of DA-Fusion, Diff-Mix and most others."""

_FEW_STEPS = re.compile(r"(?<![a-z])(turbo|lcm|lightning|dmd2?|hyper-?sd|flash|schnell)(?![a-z])")


@dataclass(frozen=True)
class Usage:
    """What a family of models is used with.

    Args:
        template: template of the prompts; empty for a family that is used without.
        guidance: scale of classifier-free guidance in sampling with prompts; 1 is none.
        steps: number of solver steps, for `augment.diffusion.solver.fireflow`.
    """

    template: str = ""
    guidance: float = 1.0
    steps: int = 25

    def __post_init__(self) -> None:
        """Refuse less than one step."""
        if self.steps < 1:
            raise UserError(f"expected at least 1 solver step, got {self.steps}")


FEW_STEPS = Usage(PHOTO, 1.0, 4)
"""Few-step models are distilled with guidance, and sampled without."""


class Usual(NamedTuple):
    """What an inversion makes of images that a model was trained on.

    Args:
        psnr: of images sampled back, in dB.
        norm: ‖z‖/√D of the latents.
        correlation: of horizontal neighbours in the latents.
    """

    psnr: float
    norm: float
    correlation: float


@dataclass(frozen=True)
class Known:
    """What an embedded model was trained on.

    Args:
        images: such images, in words.
        usual: what becomes of such images, by inversion and its number of steps.
    """

    images: str
    usual: Mapping[str, Mapping[int, Usual]]

    def at(self, inversion: str) -> Usual | None:
        """Return what is usual for an inversion in words, between two numbers of steps too.

        From the largest number on it is that of the largest. None below the smallest, and for
        another inversion.
        """
        words = re.fullmatch(r"(\w+) in (\d+) steps", inversion)
        known = self.usual.get(words[1], {}) if words else {}
        steps = int(words[2]) if words else 0
        below, above = [n for n in known if n <= steps], [n for n in known if n >= steps]
        if not below:
            return None
        first = known[max(below)]
        if not above or min(above) == max(below):
            return first
        share = math.log(steps / max(below)) / math.log(min(above) / max(below))
        pairs = zip(first, known[min(above)], strict=True)
        return Usual(*(a + share * (b - a) for a, b in pairs))


KNOWN = {
    "tiny": Known(
        "grey clothes of 32×32 pixels",
        {
            "forward_start": {10: Usual(27.3, 1.00, 0.00)},
            "ddim": {10: Usual(20.7, 0.71, -0.07), 25: Usual(24.8, 0.82, -0.06),
                     50: Usual(30.5, 0.86, -0.05)},
            "fixed_point": {25: Usual(34.9, 0.97, -0.03)},
            "midpoint": {25: Usual(38.5, 0.91, -0.04)},
            "fireflow": {25: Usual(38.2, 0.91, -0.04)},
        },
    )
}  # fmt: skip
"""Embedded models by name. The figures are of 20 embedded images that tiny never saw."""


def few_step_sign(scheduler: Mapping[str, Any], *names: object) -> str:
    """Return what shows that a model is a few-step one; empty if nothing does.

    >>> few_step_sign({"_class_name": "LCMScheduler"}), few_step_sign({}, "stabilityai/sd-turbo")
    ('LCMScheduler', 'the name stabilityai/sd-turbo')
    >>> few_step_sign({"_class_name": "EulerDiscreteScheduler"}, "me/turbot-fish")
    ''

    Args:
        scheduler: config of its scheduler.
        names: of the checkpoint and its LoRA, and those that its configs hold; None is left out.
    """
    kind = str(scheduler.get("_class_name", ""))
    if kind in ("LCMScheduler", "TCDScheduler"):
        return kind
    # the Turbo models ship with it; no model of many steps pairs Euler, trailing and ε
    euler = kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
    plain = scheduler.get("prediction_type") == "epsilon"
    if euler and plain and scheduler.get("timestep_spacing") == "trailing":
        return f"{kind} with trailing timesteps"
    for name in map(str, filter(None, names)):
        path = PurePath(name)
        last = path.parent.name if path.name in ("unet", "transformer") else path.name
        if _FEW_STEPS.search(last.lower()):
            return f"the name {name}"
    return ""
