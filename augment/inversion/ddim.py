r"""DDIM inversion: the sampler's steps, backwards.

The sampling step from level u' to u is :math:`z_u = \alpha\,\hat z_0 + \sigma\,\hat\varepsilon`,
with the estimates made at :math:`(z_{u'}, u')`. Solved for :math:`z_{u'}`,

.. math:: z_{u'} = \alpha' \frac{z_u - \sigma\,\hat\varepsilon}{\alpha} + \sigma'\,\hat\varepsilon,

which is implicit, since :math:`\hat\varepsilon` belongs to the unknown :math:`z_{u'}`. DDIM
inversion (Song et al., arXiv 2010.02502, sec. 4.3; Mokady et al., arXiv 2211.09794, eq. 3) puts
:math:`z_u` in its place and tells the network the level it goes *to*, which also keeps it from
being asked about the noiseless level 0. The error is of first
order in the step, up to a logarithm where α falls to 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor

from augment.diffusion.backbone import Denoiser
from augment.diffusion.process import Process


@dataclass(frozen=True)
class DDIM:
    """Plain DDIM inversion.

    Args:
        steps: network evaluations an image.
    """

    steps: int = 50

    def __call__(
        self,
        denoise: Denoiser,
        process: Process,
        clean: Float[Tensor, "n c h w"],
        tick: Callable[[], Any] = lambda: None,
    ) -> Float[Tensor, "n c h w"]:
        """Clean latents to latents at the noisiest level."""
        latent = clean
        for here, there in pairwise(process.levels(self.steps)):
            _, noise = denoise(latent, there)
            (alpha, sigma), (alpha_to, sigma_to) = map(process.alpha_sigma, (here, there))
            latent = alpha_to * (latent - sigma * noise) / alpha + sigma_to * noise
            tick()
        return latent
