r"""The exact backbone: data :math:`z_0 \sim \mathcal N(\mu, s^2 I)`, whose noise is known.

With :math:`z = \alpha z_0 + \sigma\varepsilon` the posterior mean of the noise is

.. math:: \hat\varepsilon(z) = \frac{\sigma\,(z - \alpha\mu)}{\alpha^2 s^2 + \sigma^2},

and the probability-flow ODE carries :math:`z_0` to :math:`\alpha\mu + \sqrt{\alpha^2 s^2 +
\sigma^2}\,(z_0 - \mu)/s`. So inversion and sampling can be checked against the truth, on a CPU,
in milliseconds. Its images are its latents (the codec is the identity up to a shift of the range).
"""

import hashlib
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from augment.diffusion.backbone import Condition, Recipe
from augment.diffusion.process import Process, VariancePreserving
from augment.diffusion.usage import Usage


class GaussianBackbone:
    """A backbone of Gaussian data; see `augment.diffusion.backbone.Backbone`.

    Args:
        mean: μ, the same for all coordinates or a tensor that broadcasts to ``latent_shape``.
        std: s > 0.
        process: noising process, whose prediction the network makes.
        latent_shape: (C, H, W).
        device: where to compute.
    """

    def __init__(
        self,
        mean: float | Tensor = 0.0,
        std: float = 1.0,
        process: Process | None = None,
        latent_shape: tuple[int, int, int] = (4, 16, 16),
        device: torch.device | str = "cpu",
    ) -> None:
        self.mean, self.std, self.latent_shape = mean, std, latent_shape
        self.process = process or VariancePreserving()
        self.device = torch.device(device)
        self.channels, self.resolution = latent_shape[0], latent_shape[1]
        law = mean.tolist() if isinstance(mean, Tensor) else mean, std, latent_shape, self.process
        digest = hashlib.sha256(repr(law).encode()).hexdigest()
        self.fingerprint = {"name": "gaussian", "weights": digest}
        self.recipe: Recipe = {}
        self.usage = Usage()

    def encode(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return 2 * images - 1

    def decode(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return ((clean + 1) / 2).clamp(0, 1)

    def condition(self, prompts: Sequence[str]) -> Condition:
        return {"text": torch.zeros(len(prompts), 1, device=self.device)}

    def network(
        self, latent: Float[Tensor, "n c h w"], timestep: float, condition: Condition
    ) -> Float[Tensor, "n c h w"]:
        """Return the exact ε, v or velocity at a timestep."""
        if isinstance(self.process, VariancePreserving):  # timestep 0 is its first noisy level
            level = (timestep + 1) / self.process.train_steps
            alpha, sigma = self.process.alpha_sigma(level)
        else:
            alpha, sigma = 1 - timestep / 1000, timestep / 1000
        noise = sigma * (latent - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)
        clean = self.mean + alpha * self.std**2 * noise / sigma
        if self.process.prediction == "epsilon":
            return noise
        return alpha * noise - sigma * clean if self.process.prediction == "v" else noise - clean

    def transport(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Return the exact latent of a clean latent, at level 1."""
        alpha, sigma = self.process.alpha_sigma(1.0)
        spread = (alpha**2 * self.std**2 + sigma**2) ** 0.5 / self.std
        return alpha * self.mean + spread * (clean - self.mean)
