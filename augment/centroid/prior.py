r"""The law of the norm of a latent: ‖z‖ for z ~ N(0, I) in D dimensions is chi-distributed.

.. math:: \log \chi_D(r) = (D - 1)\log r - \tfrac12 r^2 - (\tfrac D2 - 1)\log 2
          - \log\Gamma(\tfrac D2)

Nearly all of its mass lies within :math:`\sqrt D \pm 2`, its mode is :math:`\sqrt{D - 1}`: a
latent of another norm is one the backbone never saw. (Samuel et al., *Norm-guided latent space
exploration for text-to-image generation*, arXiv 2306.08687, sec. 4.1, call a latent a seed;
here a seed is only ever an integer.)
"""

import math

from jaxtyping import Float
from torch import Tensor


def nominal_norm(dim: int) -> float:
    r"""Return the norm that rules restore, :math:`\sqrt D`: the root mean square of ‖z‖."""
    return math.sqrt(dim)


def modal_norm(dim: int) -> float:
    r"""Return the likeliest norm, :math:`\sqrt{D - 1}`: the mode of the chi density."""
    return math.sqrt(dim - 1)


def log_chi(norm: Float[Tensor, "*b"], dim: int) -> Float[Tensor, "*b"]:
    """Return the log density of the norm of a ``dim``-dimensional standard normal vector.

    >>> import torch
    >>> r = torch.tensor([31.0, 31.98, 33.0])  # the mode for D = 1024 is √1023 = 31.98
    >>> log_chi(r, 1024).argmax().item()
    1
    """
    constant = (dim / 2 - 1) * math.log(2) + math.lgamma(dim / 2)
    return (dim - 1) * norm.log() - norm.square() / 2 - constant
