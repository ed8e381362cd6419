r"""Whether the latents of a class are white noise, as norm rules assume.

Norm rules assume latents that are N(0, I): zero mean, norms of the chi law, uncorrelated pixels.
Inverted latents :math:`z_n = d + e_n` are not quite: they share d, of mean square δ² an element,
and the rest has variance v. With ⟨a, b⟩ the mean product over elements, δ² is estimated by the mean
of :math:`⟨z_m, z_n⟩, m ≠ n`, and δ² + v by that of :math:`⟨z_n, z_n⟩`. Both are unbiased, and make
the mean square of an average of these very latents, δ² + v·Σw², exact in expectation over the
members drawn. `augment.measure.bias` derives what that does to a centroid. Not measured:
correlation between channels, or of pixels further apart.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from augment.centroid.prior import nominal_norm
from augment.centroid.residuals import TINY
from augment.core.errors import UserError


@dataclass(frozen=True)
class ChannelMeans:
    """Channel means of a class's latents.

    Args:
        count: number n of latents whose scatter gave the errors.
        channel_means: mean of each channel; 0 is expected of white noise.
        channel_errors: standard errors of the means, from the scatter between latents; for a
            single latent those of white noise, and no bias is called significant.
    """

    count: int
    channel_means: tuple[float, ...]
    channel_errors: tuple[float, ...]

    @property
    def largest(self) -> tuple[float, float]:
        """The largest absolute channel mean and its standard error."""
        return max(zip(map(abs, self.channel_means), self.channel_errors, strict=True))

    @property
    def biased(self) -> bool:
        """Whether the largest channel mean differs from 0: Student's test at 1 % for all channels.

        Uses Wallace's normal score of t (Ann. Math. Stat. 30, 1959), which is conservative for 2
        or 3 latents.
        """
        (mean, error), freedom = self.largest, max(self.count - 1, TINY)
        score = math.sqrt(freedom * math.log1p((mean / max(error, TINY)) ** 2 / freedom))
        score *= (8 * freedom + 1) / (8 * freedom + 3)
        return len(self.channel_means) * math.erfc(score / math.sqrt(2)) < 0.01


@dataclass(frozen=True)
class LatentStatistics(ChannelMeans):
    """Statistics of a class's latents; in brackets the value expected of white noise.

    Args:
        count, channel_means, channel_errors: see `ChannelMeans`.
        dim: number D of elements of a latent.
        energy: mean square of an element, δ² + v [1].
        shared: δ² [0]; the estimate may be a little below 0. For a single latent, the part of its
            channel means only.
        norm, norm_spread: mean and standard deviation (0 for one latent) of ‖z‖/√D [`norm_law`].
        horizontal, vertical: correlation of neighbouring pixels, without the channel means [0].
    """

    dim: int
    energy: float
    shared: float
    norm: float
    norm_spread: float
    horizontal: float
    vertical: float

    @property
    def norm_sigmas(self) -> float:
        """Deviation of `norm` from that of white latents, in standard errors for n latents."""
        mean, spread = norm_law(self.dim)
        return (self.norm - mean) / spread * math.sqrt(self.count)

    @property
    def correlation_error(self) -> float:
        """Standard error of `horizontal` and `vertical` for n white latents."""
        return 1 / math.sqrt(self.count * self.dim)


def norm_law(dim: int) -> tuple[float, float]:
    """Return mean and deviation of ‖z‖/√D for white noise of D elements, by the chi law."""
    return math.sqrt(1 - 1 / (2 * dim)), 1 / math.sqrt(2 * dim)


def latent_statistics(latents: Float[Tensor, "n c h w"]) -> LatentStatistics:
    """Measure the latents of a class, at least one and finite, in float64 on the CPU.

    Raises:
        UserError: there are no latents, or one is not finite.

    >>> noise = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> latent_statistics(noise).biased, latent_statistics(noise + 0.1).biased
    (False, True)
    """
    if not latents.numel():
        raise UserError(f"expected latents, got a shape of {tuple(latents.shape)}; add images")
    bad = (~latents.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        what = f"got NaN or infinity in latent {bad[0]}; invert that image again"
        raise UserError(f"expected finite latents, {what}")
    latents = latents.detach().cpu().double()
    n, dim, means = len(latents), latents[0].numel(), latents.mean((-2, -1))
    mean, energy = means.mean(0), latents.square().mean().item()
    errors, shared = torch.full_like(mean, math.sqrt(len(mean) / dim)), mean.square().mean().item()
    if n > 1:
        errors = means.std(0) / math.sqrt(n)
        shared = (n * latents.mean(0).square().mean().item() - energy) / (n - 1)
    norms, centred = latents.flatten(1).norm(dim=1).clamp_min(TINY), latents - mean[:, None, None]
    return LatentStatistics(
        count=n,
        dim=dim,
        channel_means=tuple(mean.tolist()),
        channel_errors=tuple(errors.tolist()),
        energy=energy,
        shared=shared,
        norm=norms.mean().item() / nominal_norm(dim),
        norm_spread=norms.std(correction=min(n - 1, 1)).item() / nominal_norm(dim),
        horizontal=neighbour_correlation(centred),
        vertical=neighbour_correlation(centred.mT),
    )


def neighbour_correlation(centred: Float[Tensor, "n c h w"]) -> float:
    """Return the correlation of horizontal neighbours, averaged over channels; 0 for width 1."""
    if centred.shape[-1] == 1:
        return 0.0
    products = (centred[..., 1:] * centred[..., :-1]).mean((0, 2, 3))
    return (products / centred.square().mean((0, 2, 3)).clamp_min(TINY)).mean().item()
