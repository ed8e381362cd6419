r"""Sets of images compared by their features: quality, diversity, memorisation.

With features :math:`x_i` of real and :math:`y_j` of synthetic images, (n, d) and (m, d):

========================  ==========================================================================
`frechet_distance`        FID (Heusel et al., arXiv 1706.08500): of Gaussians with their moments
`kernel_distance`         KID (Bińkowski et al., arXiv 1801.01401): unbiased, whatever n and m
`precision_recall`        fidelity and coverage of the real set (Naeem et al., arXiv 2002.09797)
`class_distance`          1 − cosine to the mean feature of its class (arXiv 2505.07481, sec. 6)
`nearest_distance`        to the nearest real image, on the scale of real ones: 0 is a copy
`nearest_of_class`        to the nearest other image of its class and set, on the same scale
`diversity`               1 − cosine of two images of a class, on average
========================  ==========================================================================

All are computed in float64. FID falls with the number of images, so it compares only sets of the
same size; KID does not. All depend on the network that made the features.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from augment.centroid.residuals import TINY
from augment.core.errors import UserError
from augment.core.rng import rng

Features = Float[Tensor, "n d"]
Labels = Int[Tensor, " n"]
ROWS = 1024
"""Rows of a distance matrix that are computed at a time."""


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    r"""Compute FID, :math:`|\mu-\nu|^2 + \mathrm{tr}(A + B - 2(AB)^{1/2})`.

    With :math:`A = R^\top R` and :math:`B = S^\top S` by QR of the centred features, the trace of
    the root is the nuclear norm of :math:`R S^\top`. So no matrix root is taken, and sets may have
    fewer images than features.

    Args:
        a: features of one set, (n, d).
        b: features of the other set, (m, d).

    Raises:
        UserError: a set has fewer than two images.

    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> round(frechet_distance(x, x), 9), round(frechet_distance(x, x + 2), 6)
    (0.0, 12.0)
    """
    check(2, a, b)
    (mean, root), (mean2, root2) = _moments(a), _moments(b)
    cross = torch.linalg.svdvals(root @ root2.mT).sum()
    spread = root.square().sum() + root2.square().sum() - 2 * cross
    return max(((mean - mean2).square().sum() + spread).item(), 0.0)


def _moments(features: Features) -> tuple[Float[Tensor, " d"], Float[Tensor, "r d"]]:
    """Return the mean of features, and a root R of their covariance RᵀR."""
    features = features.double()
    mean = features.mean(0)
    return mean, torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5).R


def kernel_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    r"""Compute KID, the unbiased squared MMD with the kernel :math:`(x^\top y / d + 1)^3`.

    The sum runs over all pairs, so no subsets are drawn. For sets of the same distribution the
    expectation is 0, and half of the values are negative.

    Args:
        a: features of one set, (n, d).
        b: features of the other set, (m, d).

    Raises:
        UserError: a set has fewer than two images.
    """
    check(2, a, b)
    within = [(_total(x, x) - _diagonal(x)) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return sum(within) - 2 * _total(a, b) / (len(a) * len(b))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return the polynomial kernel of all pairs of rows."""
    return (a.double() @ b.double().mT / a.shape[1] + 1) ** 3


def _total(a: Tensor, b: Tensor) -> float:
    """Sum the kernel over all pairs of rows."""
    return sum(_kernel(part, b).sum().item() for part in a.split(ROWS))


def _diagonal(a: Tensor) -> float:
    """Sum the kernel of each row with itself."""
    return ((a.double().square().sum(1) / a.shape[1] + 1) ** 3).sum().item()


def precision_recall(
    real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], nearest: int = 5
) -> dict[str, Float[Tensor, " _"]]:
    """Compute precision, recall, density and coverage, one value per image; report their means.

    The ball of an image reaches to its ``nearest``-th neighbour in its own set.

    Args:
        real: features of real images, (n, d).
        fake: features of synthetic images, (m, d).
        nearest: rank of the neighbour; 5 in the paper of coverage, 3 in that of precision.

    Returns:
        ``precision`` (m): 1 if a synthetic image lies in the ball of a real one. ``recall`` (n): 1
        if a real image lies in the ball of a synthetic one. ``density`` (m): number of real balls
        that a synthetic image lies in, divided by ``nearest``. ``coverage`` (n): 1 if the ball of
        a real image holds a synthetic one.

    Raises:
        UserError: a set has no more images than ``nearest``.
    """
    check(nearest + 1, real, fake)
    wide, narrow = _reach(real, nearest), _reach(fake, nearest)
    density, recall, covered = torch.zeros(len(fake), dtype=torch.float64), [], []
    for rows, distances in blocks(real, fake):
        inside = distances <= wide[rows, None]
        density += inside.double().sum(0) / nearest
        covered.append(inside.any(1))
        recall.append((distances <= narrow).any(1))
    return {
        "precision": (density > 0).double(),
        "recall": torch.cat(recall).double(),
        "density": density,
        "coverage": torch.cat(covered).double(),
    }


def _reach(features: Features, nearest: int) -> Float[Tensor, " n"]:
    """Return the distance of each image to its ``nearest``-th neighbour in the set."""
    parts = [d.kthvalue(nearest + 1, dim=1).values for _, d in blocks(features, features)]
    return torch.cat(parts)


def blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the distances of rows of ``a`` to all of ``b``, `ROWS` rows at a time."""
    for start in range(0, len(a), ROWS):
        rows = slice(start, min(start + ROWS, len(a)))
        how = "donot_use_mm_for_euclid_dist" if a.shape[1] < 128 else "use_mm_for_euclid_dist"
        yield rows, torch.cdist(a[rows].double(), b.double(), compute_mode=how)


def class_distance(
    features: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    real: Float[Tensor, "m d"],
    real_labels: Int[Tensor, " m"],
    same: bool = False,
) -> Float[Tensor, " n"]:
    """Return 1 − cosine of each image to the mean unit feature of its class's real images.

    Args:
        features: features of the images.
        labels: class of each image.
        real: features of the real images.
        real_labels: class of each real image.
        same: whether both sets are the same; each image is then compared with the others.

    Raises:
        UserError: a class has no real image, or no other.
    """
    distances = torch.zeros(len(features), dtype=torch.float64)
    features, real = (torch.nn.functional.normalize(x.double(), dim=1) for x in (features, real))
    for label in labels.unique().tolist():
        rows, own = labels == label, real[real_labels == label]
        check(1 + same, own)
        centre = own.sum(0) - features[rows] if same else own.sum(0, keepdim=True)
        distances[rows] = 1 - torch.cosine_similarity(features[rows], centre)
    return distances


def nearest_distance(
    features: Float[Tensor, "n d"], real: Float[Tensor, "m d"], same: bool = False
) -> Float[Tensor, " n"]:
    """Return the distance of each image to its nearest real image.

    The unit is the median of the distances of real images to their nearest real neighbours: 0 is a
    copy, 1 is as far as real images are from each other.

    Args:
        features: features of the images.
        real: features of the real images.
        same: whether both sets are the same; each image is then compared with the others.

    Raises:
        UserError: there are fewer than two real images.
    """
    check(2, real)
    usual = _reach(real, 1)
    distances = [usual] if same else [d.amin(1) for _, d in blocks(features, real)]
    return torch.cat(distances) / usual.median().clamp_min(TINY)


def nearest_of_class(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], real: Float[Tensor, "m d"]
) -> Float[Tensor, " n"]:
    """Return the distance of each image to the nearest other of its class in its own set.

    The unit is that of `nearest_distance`. The only image of a class is infinitely far away.

    Args:
        features: features of the images.
        labels: class of each image.
        real: features of the real images.

    Raises:
        UserError: there are fewer than two real images.

    >>> rows = torch.tensor([[0.0], [0.0], [3.0], [9.0]])
    >>> nearest_of_class(rows, torch.tensor([0, 0, 0, 1]), torch.tensor([[0.0], [1.0]]))
    tensor([0., 0., 3., inf], dtype=torch.float64)
    """
    check(2, real)
    away = torch.full((len(features),), torch.inf, dtype=torch.float64)
    for label in labels.unique().tolist():
        rows = labels == label
        if rows.sum() > 1:
            away[rows] = _reach(features[rows], 1)
    return away / _reach(real, 1).median().clamp_min(TINY)


def diversity(features: Float[Tensor, "n d"]) -> float:
    """Return the mean of 1 − cosine over pairs of different images; NaN for one image."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    n, whole = len(unit), unit.sum(0).square().sum().item()
    own = unit.square().sum().item()  # n, but for features of zero length
    return 1 - (whole - own) / (n * (n - 1)) if n > 1 else float("nan")


def deviation(
    measure: Callable[..., float], *sets: Float[Tensor, "_ d"], draws: int = 100, seed: int = 0
) -> float:
    """Return the standard deviation of a measure of sets, by the bootstrap over their images.

    Duplicates in a resampled set shift most measures, so use the spread of the draws only, and the
    value of the sets themselves as the estimate.

    Args:
        measure: a function of the sets.
        sets: features of each set.
        draws: number of resampled sets, at least 2.
        seed: seed of the draws.

    Raises:
        UserError: there are fewer than two draws.
    """
    if draws < 2:
        raise UserError(f"expected at least 2 draws of the bootstrap, got {draws}; 100 is usual")
    values = []
    for draw in range(draws):
        generator = rng(seed, "order", draw)
        rows = [torch.from_numpy(generator.integers(len(x), size=len(x))) for x in sets]
        values.append(measure(*(x[part] for x, part in zip(sets, rows, strict=True))))
    return float(np.std(values, ddof=1))


def check(least: int, *sets: Tensor) -> None:
    """Raise if a set has fewer than ``least`` images."""
    for features in sets:
        if len(features) < least:
            raise UserError(f"expected at least {least} images to compare, got {len(features)}")
