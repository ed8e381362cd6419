"""No inversion: the clean latent, to which each plan adds noise of its own when it is sampled.

That is SDEdit (Meng et al., arXiv 2108.01073), as DA-Fusion (arXiv 2302.07944) and Diff-Mix
(arXiv 2403.19600) use it: an image is noised up to a level and denoised with a prompt. What the
noise covers is new, what it leaves is the image's. No network is asked, and the level is each
plan's, where a bank of another inversion has one level for all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from augment.diffusion.backbone import Denoiser


@dataclass(frozen=True)
class Noise:
    """The clean latent as it is.

    Args:
        steps: solver steps from the noisiest level, by which images are sampled by default.
    """

    steps: int = 25
    solver: ClassVar[str] = "fireflow"
    guidance: ClassVar[float] = 1.0
    negative: ClassVar[str] = "empty"

    @property
    def level(self) -> float:
        """Where the inversion stops: it has no level of its own."""
        return 1.0

    @property
    def steps_made(self) -> int:
        """Solver steps: none."""
        return 0

    @property
    def evaluations(self) -> int:
        """Network evaluations an image."""
        return 0

    def __call__(
        self,
        denoise: Denoiser,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
        seeds: Sequence[int] = (),
    ) -> dict[str, Tensor]:
        """See `augment.inversion.Inverter`; the latents are clean."""
        return {"latents": clean}
