"""The real images of a reproduction, and a frozen network that judges other images."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from works import Interval

from augment.core.rng import rng
from augment.diffusion import Backbone
from augment.measure.features import frechet_distance
from augment.networks import Network, feature_network, unit
from augment.report.evaluate import embed
from augment.sources import Folder, Slice, Source
from augment.sources.fashion import COARSE, write_fashion
from augment.sources.prompts import class_prompts
from augment.training.models.metrics import student_t


def pictures(args: argparse.Namespace, count: int) -> tuple[Source, Source]:
    """Return ``count`` images a class to work with, and the others to compare with.

    They are from ``--images``; by default from the 200 embedded test images a class, which ``tiny``
    never saw.
    """
    root = args.images or write_fashion(args.out / "images", "test")
    source = Folder(root)
    return Slice(source, last=count), Slice(source, count)


def prompts_for(backbone: Backbone, source: Source) -> dict[str, str]:
    """Return the prompt of each class: those of ``tiny``'s training, or the family's template."""
    if backbone.fingerprint["name"] == "tiny":
        return {name: COARSE.get(name, "") for name in source.classes}
    return class_prompts(source.classes, backbone.usage.template or "a photo of a {name}")


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
        labels: (m,), their classes.
    """

    network: Network
    means: Tensor
    real: Tensor
    labels: Tensor

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
    return FeatureJudge(network, unit(torch.stack(means)), seen.features, seen.labels)


def mean(values: Tensor, scale: float = 1.0) -> Interval:
    """Return the mean and its 95 % interval, by Student's t."""
    centre, count = scale * values.double().mean().item(), len(values)
    if count < 2:
        return Interval(-math.inf, centre, math.inf)
    half = student_t(count - 1) * scale * values.double().std().item() / count**0.5
    return Interval(centre - half, centre, centre + half)


def gain(one: Tensor, other: Tensor) -> Interval:
    """Return the mean of one less the other, pair by pair; n alike show less than 3/n at 95 %."""
    found = mean(one.double() - other.double())
    half = 3 / len(one) if found.low == found.high else 0.0
    return Interval(found.low - half, found.value, found.high + half)


def share(hits: Tensor) -> Interval:
    """Return the share of hits, and Wilson's interval."""
    p, n, z = hits.double().mean().item(), len(hits), 1.96
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    return Interval((middle - half) / (1 + z * z / n), p, (middle + half) / (1 + z * z / n))


def bootstrap(measure: Callable[[Tensor], float], count: int, draws: int = 200) -> Interval:
    """Return a measure of rows 0 … count − 1, and the interval ± 1.96 deviations of resamples.

    A measure takes the numbers of rows, so that several sets can be resampled in pairs.
    """
    value = measure(torch.arange(count))
    values = [
        measure(torch.from_numpy(rng(0, "order", draw).integers(count, size=count)))
        for draw in range(draws)
    ]
    half = 1.96 * torch.tensor(values, dtype=torch.float64).std().item()
    return Interval(value - half, value, value + half)


def mean_and_error(values: Tensor, scale: float = 1.0) -> tuple[float, float]:
    """Return the mean, and the half width of its 95 % interval."""
    low, value, _ = mean(values, scale)
    return value, value - low


def better(one: Tensor, other: Tensor) -> bool | None:
    """Return whether one is larger, pair by pair; None within the interval."""
    low, value, high = gain(one, other)
    return None if low <= 0 <= high else value > 0


def ci95(values: Tensor, scale: float = 1.0) -> str:
    """Format mean ± 95 %."""
    low, value, high = mean(values, scale)
    return f"{value:.3g} ± {(high - low) / 2:.2g}"


def error_bars(
    axes: Any, places: Sequence[float], found: Sequence[Interval], style: str, **how: Any
) -> None:
    """Draw a line through values, each with its interval."""
    below, above = ([abs(x.value - end) for x, end in zip(found, ends, strict=True)]
                    for ends in ([x.low for x in found], [x.high for x in found]))  # fmt: skip
    values = [x.value for x in found]
    axes.errorbar(places, values, (below, above), fmt=style, capsize=2, elinewidth=0.8, **how)


def show(axes: Any, image: Tensor, title: str = "") -> None:
    """Draw an image into a figure."""
    pixels = image.clamp(0, 1).permute(1, 2, 0).squeeze(-1)
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8)
