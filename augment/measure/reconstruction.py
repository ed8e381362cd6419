r"""Reconstruction error of inverted images: mean squared error, PSNR, SSIM, LPIPS.

Real images in [0, 1] are compared with what their inverted latents give when they are sampled. The
codec alone loses something (:math:`D(E(x))` is not x); no latent can do better than that bound.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.diffusion.checkpoints.hub import brief

Images = Float[Tensor, "n c h w"]
MIN_LPIPS_SIDE = 64


def reconstruction(images: Images, others: Images) -> dict[str, Float[Tensor, " n"]]:
    """Compare images in [0, 1] with their reconstructions, one float64 value per image.

    Args:
        images: the originals, (n, C, H, W).
        others: the reconstructions.

    Returns:
        ``mse``; ``psnr``, −10 log₁₀ of the MSE, in dB, at most 120; ``ssim`` of Wang et al., 2004,
        with a Gaussian window of 11 pixels and deviation 1.5 (NaN for images smaller than that).
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    images, others = images.double(), others.double()
    mse = (images - others).square().flatten(1).mean(1)
    similar = torch.full_like(mse, math.nan)
    if min(images.shape[-2:]) >= 11:
        parts = [
            ssim(b, a, data_range=1.0, reduction="none")
            for a, b in zip(images.split(64), others.split(64), strict=True)
        ]
        similar = torch.cat([torch.as_tensor(part).reshape(-1) for part in parts])
    return {"mse": mse, "psnr": -10 * mse.clamp_min(1e-12).log10(), "ssim": similar}


def load_lpips(
    network: Literal["alex", "vgg", "squeeze"] = "alex",
) -> Callable[[Images, Images], Float[Tensor, " n"]]:
    """Load LPIPS (Zhang et al., arXiv 1801.03924), which compares batches of images in [0, 1].

    The distance of equal images is 0. Images need at least `MIN_LPIPS_SIDE` pixels a side.

    Args:
        network: ``alex``, ``vgg`` or ``squeeze``; torchvision downloads its weights once.

    Raises:
        UserError: the weights are not there and cannot be downloaded.
    """
    from torchmetrics.functional.image.lpips import _LPIPS

    try:
        net = _LPIPS(pretrained=True, net=network, eval_mode=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"expected torchvision's weights of {network} for LPIPS, got none ({brief(error)}); "
            "download them once where there is a network, or leave LPIPS out"
        ) from None

    @torch.no_grad()
    def compare(images: Images, others: Images) -> Float[Tensor, " n"]:
        parts = [
            net(*(x.float().expand(-1, 3, -1, -1) for x in pair), normalize=True).reshape(-1)
            for pair in zip(images.split(16), others.split(16), strict=True)
        ]
        return torch.cat(parts).double()

    return compare


def psnr(error: float) -> float:
    """Return the peak signal-to-noise ratio, in dB, of a mean squared error of pixels in [0, 1]."""
    return -10 * math.log10(max(error, 1e-12))
