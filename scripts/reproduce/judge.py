"""The real images of a reproduction, and a frozen network that judges other images."""

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
    """Return ``count`` images a class to work with, and the others to compare with.

    They are from ``--images``; by default from the 200 embedded test images a class, which ``tiny``
    never saw.
    """
    root = args.images or write_fashion(args.out / "images", "test")
    source = Folder(root)
    return Slice(source, last=count), Slice(source, count)


def load_all(source: Source, backbone: Backbone) -> Tensor:
    """Load all images of a source (n, C, R, R), class by class, in the form of a backbone."""
    form = backbone.channels, backbone.resolution
    return torch.stack([source.load(i, *form) for name in source.classes for i in source.ids[name]])


@dataclass(frozen=True)
class FeatureJudge:
    """A network, and its features of real images.

    Args:
        network: images to features.
        means: (k, d), of each class, of unit length.
        real: (m, d), features of the real images.
    """

    network: Network
    means: Tensor
    real: Tensor

    def assess(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return features of images (n, C, R, R); by the class means, class kept and distance."""
        features = self.network(images)
        cosines = unit(features) @ self.means.T
        own = cosines.gather(1, labels[:, None])[:, 0]
        kept = (cosines.argmax(1) == labels).double()
        return {"features": features, "kept": kept, "distance": 1 - own}

    def fid(self, features: Tensor) -> float:
        """Return the Fréchet distance to the real images."""
        return frechet_distance(features, self.real)


def open_judge(args: argparse.Namespace, backbone: Backbone, real: Source) -> FeatureJudge:
    """Load the network of ``--network``, and embed the real images."""
    network = feature_network(args.network, "", backbone.device)
    seen = embed(
        real, real.classes, network, (backbone.channels, backbone.resolution), "real images"
    )
    rows = unit(seen.features)
    means = [rows[seen.labels == label].mean(0) for label in range(len(real.classes))]
    return FeatureJudge(network, unit(torch.stack(means)), seen.features)


def mean_and_error(values: Tensor, scale: float = 1.0) -> tuple[float, float]:
    """Return the mean, and the half width of its 95 % interval."""
    error = 1.96 * values.double().std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return scale * values.double().mean().item(), scale * error


def ci95(values: Tensor, scale: float = 1.0) -> str:
    """Format mean ± 95 %."""
    return "{:.3g} ± {:.2g}".format(*mean_and_error(values, scale))


def better(one: Tensor, other: Tensor) -> bool | None:
    """Return whether one is larger, pair by pair; None within the interval."""
    gain, error = mean_and_error(one.double() - other.double())
    return None if abs(gain) <= error else gain > 0


def show(axes: Any, image: Tensor, title: str = "") -> None:
    """Draw an image into a figure."""
    pixels = image.clamp(0, 1).permute(1, 2, 0).squeeze(-1)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8)
