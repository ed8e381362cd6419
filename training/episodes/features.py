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

from augment.core.errors import UserError
from augment.core.files import write_bytes
from augment.core.progress import Progress
from augment.networks import BATCH, in_batches, normalise
from augment.networks.timm import check_classes
from augment.sources import Source

Network = Callable[[Tensor], Tensor]


def frozen_classifier(name: str, path: str, classes: int, device: torch.device) -> Network:
    """Load a checkpoint of our `Classifier` as a function of images in [0, 1].

    Images are brought to its channels, resolution, mean and deviation.

    Args:
        name: its network, to make sure; empty is any.
        path: the checkpoint.
        classes: number of logits; 0 gives features, which its head would get.
        device: where it runs.

    Raises:
        UserError: it cannot be read, or is of another network or number of classes.
    """
    from augment.training.models.classifier import Classifier, agreed
    from augment.training.models.finetune import features

    model = Classifier.load_from_checkpoint(path)
    hp = model.hp
    if name not in (hp.network, hp.source):
        agreed("a network", name or None, hp.network, None, path)
    if classes:
        check_classes(len(hp.counts), classes, path)
    model.eval().requires_grad_(False).to(device)
    size = hp.resolution and (hp.resolution,) * 2

    def run(images: Tensor) -> Tensor:
        inputs = normalise(images.to(device), hp.channels, size, (0.0,), (1.0,), "bilinear")
        if classes:
            return model(inputs) * model.scale
        return features(model.network, model.normalized(inputs)).flatten(1)

    return partial(in_batches, run)


def _read_features(path: Path) -> dict[str, Tensor]:
    """Return the features that an interrupted run kept; none if none can be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            ids = json.loads(file.metadata()["ids"])
            return dict(zip(ids, file.get_tensor("features"), strict=True))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return {}


def embed(
    path: Path, source: Source, ids: Sequence[str], network: Network, channels: int, resolution: int
) -> dict[str, Float[Tensor, " f"]]:
    """Return the features of images, float32, each computed once and kept in a file.

    Raises:
        ImageRejected: an image cannot be read.
        UserError: the network gives NaN or infinity.
    """
    vectors = _read_features(path)
    todo = [i for i in ids if i not in vectors]
    with Progress(total=len(todo), desc="features", unit="image", disable=not todo) as bar:
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
    """Return features in float32; refuse what is not finite."""
    if not features.isfinite().all():
        raise UserError(
            "expected finite features, got NaN or infinity; check the network's weights"
        )
    return features.float()
