"""Negative-prompt inversion: the image's own prompt in place of the empty one.

Null-text inversion (`augment.inversion.null_text`) optimises what guidance points away from until
the guided sampler follows the inversion. Miyake et al. (*Negative-prompt Inversion*, arXiv
2305.16807) found that the prompt's own embedding is nearly the optimum, at no cost: the inversion
is DDIM's, and sampling guides away from the prompt that the image was inverted with. With that
prompt to sample there is then nothing to guide, whatever the scale; with another one guidance acts
on the difference alone.
"""

from dataclasses import dataclass
from typing import ClassVar

from augment.inversion.ddim import DDIM


@dataclass(frozen=True)
class NegativePrompt(DDIM):
    """DDIM inversion whose latents are sampled away from their prompt.

    Args:
        steps: solver steps, each a network evaluation.
    """

    negative: ClassVar[str] = "prompt"
