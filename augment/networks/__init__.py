"""Frozen networks that look at images: for filters, and to measure by. EXTEND.

A network is a function of images (n, C, R, R) in [0, 1] to features (n, d), in batches; its weights
never change, and but for ``inception`` it has gradients for images that ask for them. A new one is
one file here and one line in `NETWORKS`; any other name is one of timm's.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from augment.networks.clip import load_clip
from augment.networks.fashion import load_fashion
from augment.networks.frozen import BATCH, in_batches, normalise, unit
from augment.networks.inception import load_inception
from augment.networks.timm import find_timm, read_weights, recipe, timm_network

Network = Callable[[Float[Tensor, "n c h w"]], Float[Tensor, "n d"]]

NETWORKS: dict[str, Callable[[str, torch.device], Network]] = {
    "fashion": load_fashion,  # embedded: grey clothes
    "clip": lambda weights, device: load_clip(weights, device).images,
    "inception": load_inception,  # that of the usual FID, by torch-fidelity
}


def feature_network(name: str, weights: str, device: torch.device) -> Network:
    """A network without its head, as a function of images in [0, 1].

    Args:
        name: out of `NETWORKS`, or a network of timm; empty is that of a checkpoint.
        weights: a ``.safetensors`` file or another state dict, a checkpoint of latent-augment train
            (``clip``: a folder or a repository of the hub); empty takes those that it is known
            with.
        device: where it runs.

    Raises:
        UserError: a package is missing, the name is unknown, or the weights are missing or of
            another network.
    """
    if name in NETWORKS:
        return NETWORKS[name](weights, device)
    return timm_network(name, weights, 0, device)


def usual_form(name: str, weights: str) -> tuple[int, int]:
    """Return the channels and the resolution of the images that a network is made for.

    >>> usual_form("fashion", ""), usual_form("resnet50", "")
    ((1, 32), (3, 224))

    Args:
        name: as of `feature_network`.
        weights: as of `feature_network`.

    Raises:
        UserError: see `feature_network`.
    """
    known = read_weights(weights).settings if weights.endswith(".ckpt") else {}
    if known.get("resolution"):
        return known["channels"], known["resolution"]
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
