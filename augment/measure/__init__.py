"""Measures of latents and images: bias, norms, FID, reconstruction, smoothness."""

from augment.measure.bias import amplification, bias_warning, predicted_bias
from augment.measure.latents import LatentStatistics, latent_statistics

__all__ = [
    "LatentStatistics",
    "amplification",
    "bias_warning",
    "latent_statistics",
    "predicted_bias",
]
