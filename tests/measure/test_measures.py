"""Measures of sets of images, against references and worked cases."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from augment import UserError
from augment.measure.features import (
    class_distance,
    deviation,
    diversity,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    precision_recall,
)


def draw(seed, n, d=6, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99)).double()
    return torch.randn(n, d, generator=generator).double() @ mix + shift


class Identity(torch.nn.Module):
    """Features that are handed in as if they were images."""

    num_features = 6

    def forward(self, x):
        return x


@pytest.mark.parametrize(("n", "m"), [(40, 60), (4, 5), (500, 30)])
def test_fid_is_scipys_and_torchmetrics(n, m):
    a, b = draw(0, n), draw(1, m, shift=0.5)
    first, second = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(first @ second).real
    means = ((a.mean(0) - b.mean(0)) ** 2).sum().item()
    expected = means + np.trace(first + second - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    if n > 6 and m > 6:
        theirs = FrechetInceptionDistance(Identity(), input_img_size=(6,)).set_dtype(torch.float64)
        theirs.update(a, real=True), theirs.update(b, real=False)
        assert frechet_distance(a, b) == pytest.approx(theirs.compute().item(), rel=1e-6)


def test_fid_of_a_set_with_itself_is_nothing_and_of_gaussians_is_known():
    a = draw(0, 300)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(x, 3 * x + 1) == pytest.approx(2 * (3 - 1) ** 2 + 2, rel=0.02)
    wide = torch.randn(20, 2048, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(wide, wide) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_sum_over_pairs_and_torchmetrics():
    a, b = draw(0, 20), draw(1, 30, shift=0.3)

    def mean(x, y, same):
        values = [
            (float(p @ q) / 6 + 1) ** 3
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not (same and i == j)
        ]
        return sum(values) / len(values)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    b = b[:20]
    with pytest.warns(UserWarning, match="memory"):
        theirs = KernelInceptionDistance(Identity(), subsets=1, subset_size=20)
    theirs.update(a, real=True), theirs.update(b, real=False)
    assert kernel_distance(a, b) == pytest.approx(theirs.compute()[0].item(), rel=1e-4)


def test_kid_of_one_law_is_nothing_on_average():
    found = [kernel_distance(draw(s, 30), draw(s + 1000, 50)) for s in range(300)]
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found)) < 3 * error
    assert 0.3 < np.mean(np.array(found) < 0) < 0.8


def test_precision_and_recall_of_points_on_a_line():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    fake = torch.tensor([[0.5], [0.6], [30.0]])
    found = {k: v.tolist() for k, v in precision_recall(real, fake, nearest=1).items()}
    assert found["precision"] == [1, 1, 0]  # balls of radius 1, 1, 1 and 8
    assert found["density"] == [2, 2, 0]
    assert found["coverage"] == [1, 1, 0, 0]
    assert found["recall"] == [0, 1, 1, 1]  # balls of radius 0.1, 0.1 and 29.4


def test_precision_and_recall_by_brute_force():
    real, fake, k = draw(0, 60), draw(1, 45, shift=0.5), 5

    def ball(x, i):
        return sorted((x[i] - y).norm().item() for y in x)[k]

    wide, narrow = [ball(real, i) for i in range(60)], [ball(fake, i) for i in range(45)]
    inside = np.array(
        [[(r - f).norm().item() <= w for f in fake] for r, w in zip(real, wide, strict=False)]
    )
    other = np.array(
        [[(r - f).norm().item() <= w for f, w in zip(fake, narrow, strict=False)] for r in real]
    )
    found = {name: values.numpy() for name, values in precision_recall(real, fake, k).items()}
    np.testing.assert_array_equal(found["precision"], inside.any(0))
    np.testing.assert_array_equal(found["recall"], other.any(1))
    np.testing.assert_allclose(found["density"], inside.sum(0) / k)
    np.testing.assert_array_equal(found["coverage"], inside.any(1))


def test_nothing_is_as_plausible_or_as_covered_as_the_set_itself():
    real = draw(0, 100)
    same = precision_recall(real, real)
    assert all(same[name].mean() == 1 for name in ("precision", "recall", "coverage"))
    far = precision_recall(real, real + 1000)
    assert all(far[name].mean() == 0 for name in far)
    one = precision_recall(real, real[:1].expand(100, -1))
    assert one["precision"].mean() == 1 and one["coverage"].mean() < 0.2


def test_class_distance_of_worked_cases():
    real = torch.tensor([[2.0, 0], [0, 3.0], [-1.0, 0]])
    labels, ours = torch.tensor([0, 0, 1]), torch.tensor([[5.0, 5.0], [1.0, 0], [0, 1.0]])
    found = class_distance(ours, torch.tensor([0, 1, 1]), real, labels)
    torch.testing.assert_close(found, torch.tensor([0.0, 2.0, 1.0]).double())
    among = class_distance(real[:2], labels[:2], real[:2], labels[:2], same=True)
    torch.testing.assert_close(among, torch.ones(2).double())
    with pytest.raises(UserError, match="at least 2 images to compare, got 1"):
        class_distance(real, labels, real, labels, same=True)
    with pytest.raises(UserError, match="at least 1 images to compare, got 0"):
        class_distance(ours, torch.tensor([0, 2, 1]), real, labels)


def test_a_copy_is_at_distance_nothing_and_real_images_at_one():
    real = draw(0, 201)
    assert nearest_distance(real[:5], real).abs().max() < 1e-12
    assert nearest_distance(real, real, same=True).median() == 1
    assert nearest_distance(real * 100, real).median() > 3


def test_diversity_of_worked_cases():
    x = torch.tensor([[1.0, 0], [0, 2.0], [3.0, 0]])
    assert diversity(x) == pytest.approx(2 / 3)
    assert diversity(x[:1].expand(4, -1)) == pytest.approx(0)
    assert math.isnan(diversity(x[:1]))


def test_the_bootstrap_finds_the_error_of_a_mean():
    x = draw(0, 400, d=1)
    found = deviation(lambda part: part.mean().item(), x, draws=300)
    assert found == pytest.approx(x.std().item() / 20, rel=0.15)
    assert found == deviation(lambda part: part.mean().item(), x, draws=300)


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="at least 2 images to compare, got 1"):
        frechet_distance(draw(0, 1), draw(1, 9))
    with pytest.raises(UserError, match="at least 2 draws of the bootstrap, got 1"):
        deviation(diversity, draw(0, 9), draws=1)
    with pytest.raises(UserError, match="at least 6 images to compare, got 5"):
        precision_recall(draw(0, 9), draw(1, 5))
