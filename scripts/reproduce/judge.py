"""What reproductions look at and with: real images, and a frozen network that judges others."""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from augment.diffusion import Backbone
from augment.measure.features import frechet_distance
from augment.networks import Network, feature_network, unit
from augment.report.evaluate import embed
from augment.sources import Folder, Slice, Source
from augment.sources.fashion import write_fashion


def pictures(args: argparse.Namespace, count: int) -> tuple[Source, Source]:
    """So many images a class to work with, and the others to compare with.

    Of ``--images``; by default the 200 embedded test images a class, which ``tiny`` never saw.
    """
    root = args.images or write_fashion(args.out / "images", "test")
    source = Folder(root)
    return Slice(source, last=count), Slice(source, count)


@dataclass(frozen=True)
class FeatureJudge:
    """A network, and what it sees in real images.

    Args:
        network: images to features.
        means: (k, d), of each class, of unit length.
        real: (m, d), features of the real images.
    """

    network: Network
    means: Tensor
    real: Tensor

    def assess(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of images (n, C, R, R): features, and by the class means whether the class is kept."""
        features = self.network(images)
        cosines = unit(features) @ self.means.T
        own = cosines.gather(1, labels[:, None])[:, 0]
        kept = (cosines.argmax(1) == labels).double()
        return {"features": features, "kept": kept, "distance": 1 - own}

    def fid(self, features: Tensor) -> float:
        """To the real images."""
        return frechet_distance(features, self.real)


def open_judge(args: argparse.Namespace, backbone: Backbone, real: Source) -> FeatureJudge:
    """The network of ``--network``, and its view of real images."""
    network = feature_network(args.network, "", backbone.device)
    seen = embed(
        real, real.classes, network, (backbone.channels, backbone.resolution), "real images"
    )
    rows = unit(seen.features)
    means = [rows[seen.labels == label].mean(0) for label in range(len(real.classes))]
    return FeatureJudge(network, unit(torch.stack(means)), seen.features)


def mean_and_error(values: Tensor, scale: float = 1.0) -> tuple[float, float]:
    """The mean, and the half width of its 95 % interval."""
    error = 1.96 * values.double().std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return scale * values.double().mean().item(), scale * error


def told(values: Tensor, scale: float = 1.0) -> str:
    """Mean ± 95 %."""
    return "{:.3g} ± {:.2g}".format(*mean_and_error(values, scale))


def better(one: Tensor, other: Tensor) -> bool | None:
    """Whether one is larger, pair by pair; None within the interval."""
    gain, error = mean_and_error(one.double() - other.double())
    return None if abs(gain) <= error else gain > 0


def show(axes: Any, image: Tensor, title: str = "") -> None:
    """An image in a figure."""
    pixels = image.clamp(0, 1).permute(1, 2, 0).squeeze(-1)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8)
