"""Features of images by a frozen network, each computed once and kept in a file."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from augment.diffusion.hub import brief
from augment.errors import UserError
from augment.files import write_bytes
from augment.networks import BATCH, in_batches, timm_network
from augment.sources import Source

Network = Callable[[Tensor], Tensor]


def feature_network(name: str, weights: str, device: torch.device) -> Network:
    """A frozen network without its head, as a function of images in [0, 1].

    Args:
        name: a network of timm; or what a checkpoint is of.
        weights: a ``.safetensors`` file, see `augment.networks.timm_network`; or a
            checkpoint (``.ckpt``) of `training.classifier.Classifier`, which knows its network
            and how it takes images; empty takes timm's pretrained ones.
        device: where it runs.

    Raises:
        UserError: the network is unknown, or the weights are missing or of another network.
    """
    if not weights.endswith(".ckpt"):
        return timm_network(name, weights, 0, device)
    from training.classifier import Classifier, normalization
    from training.tuning import features

    try:
        record = torch.load(weights, map_location="cpu", weights_only=True)
        given = dict(record["hyper_parameters"])
        if given["network"] != name:
            raise ValueError(f"one of {given['network']}")
        model = Classifier(**{**given, "start": None, "pretrained": False})
        model.mean, model.std = normalization(model.network, given["pretrained"])
        model.load_state_dict(record["state_dict"])
    except Exception as error:  # of any type: unpicklers stumble over hostile bytes as they like
        raise UserError(
            f"expected a checkpoint of {name} by latent-augment train, got {weights} "
            f"({brief(error)}); name its network, or give weights as .safetensors"
        ) from None
    model.eval().requires_grad_(False).to(device)
    return partial(in_batches, lambda x: features(model.network, model.normalized(x.to(device))))


def known_features(path: Path) -> dict[str, Tensor]:
    """The features that an interrupted run kept; none if there are no readable ones."""
    try:
        with safe_open(str(path), framework="pt") as file:
            ids = json.loads(file.metadata()["ids"])
            return dict(zip(ids, file.get_tensor("features"), strict=True))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return {}


def embed(
    path: Path, source: Source, ids: Sequence[str], network: Network, channels: int, resolution: int
) -> dict[str, Float[Tensor, " f"]]:
    """The features of images, float32, each computed once and kept in a file.

    Raises:
        ImageRejected: an image cannot be read.
        UserError: the network gives NaN or infinity.
    """
    vectors = known_features(path)
    todo = [i for i in ids if i not in vectors]
    with tqdm(total=len(todo), desc="features", unit="image", disable=not todo) as bar:
        for start in range(0, len(todo), BATCH):
            part = todo[start : start + BATCH]
            images = torch.stack([source.load(i, channels, resolution) for i in part])
            vectors |= zip(part, finite(network(images)), strict=True)
            bar.update(len(part))
    if todo:
        rows = torch.stack(list(vectors.values()))
        write_bytes(path, save({"features": rows}, {"ids": json.dumps(list(vectors))}))
    return vectors


def finite(features: Tensor) -> Tensor:
    """Features in float32.

    Raises:
        UserError: they are not finite.
    """
    if not features.isfinite().all():
        raise UserError(
            "expected finite features, got NaN or infinity; check the network's weights"
        )
    return features.float()
