"""The fast rules against slow ones written from the papers' formulae in all D dimensions."""

import math

import numpy as np
import pytest
import torch
from reference.centroids import (
    diff_ii_circle,
    geodesic_cost,
    karcher_mean,
    lol,
    nao_by_adam,
    nao_objective_of,
    rho,
)

from augment import Rule, invert
from augment.images import prepare
from augment.prior import modal_norm
from augment.sources.fashion import CLASSES, DATA

SHAPE = (4, 8, 8)
every_count = pytest.mark.parametrize("count", [1, 2, 5, 20, 50])


def draw(count, dim_share=1.0, seed=0, shape=SHAPE):
    """Latents of norms around √D with something in common, and uneven weights."""
    dice = torch.Generator().manual_seed(seed)
    points = torch.randn(count, *shape, generator=dice, dtype=torch.float64)
    points = dim_share * points + 0.1
    weights = -torch.rand(count, generator=dice, dtype=torch.float64).log()
    return points, weights / weights.sum()


def centroid(name, points, weights, mu=None):
    return Rule.parse(name)(points[None], weights[None], mu)[0].flatten()


@every_count
def test_lol_is_the_papers_formula(count):
    points, weights = draw(count)
    mu = draw(1, seed=5)[0][0]
    expected = lol(points, weights, mu).flatten()
    torch.testing.assert_close(centroid("lol", points, weights, mu), expected)


@every_count
def test_lol_is_vp_chm_where_the_latents_share_their_channel_means(count):
    """LOL with μ the common channel means is vp/chm."""
    points, weights = draw(count)
    common = draw(1, seed=5)[0][0].mean((-2, -1), keepdim=True)
    points = points - points.mean((-2, -1), keepdim=True) + common
    mu = common.expand(SHAPE)
    torch.testing.assert_close(
        centroid("vp/chm", points, weights), lol(points, weights, mu).flatten()
    )
    shifted = points + draw(count, seed=6)[0].mean((-2, -1), keepdim=True)  # and not where not
    assert (centroid("vp/chm", shifted, weights) - lol(shifted, weights, mu).flatten()).norm() > (
        0.01 if count > 1 else -1
    )


@every_count
@pytest.mark.parametrize("bias", [0.0, 1.0], ids=["wide", "close"])
def test_slerp_is_the_karcher_mean(count, bias):
    points, weights = draw(count)
    points = points + bias
    expected = karcher_mean(points.flatten(1), weights)
    torch.testing.assert_close(
        centroid("slerp", points, weights), expected, rtol=0, atol=1e-7 * expected.norm().item()
    )


def test_slerp_of_two_is_shoemakes():
    points, _ = draw(2)
    x, y = points.flatten(1) / points.flatten(1).norm(dim=1, keepdim=True)
    theta = torch.acos(x @ y)
    for share in (0.1, 0.5, 0.8):
        weights = torch.tensor([1 - share, share], dtype=torch.float64)
        unit = (torch.sin((1 - share) * theta) * x + torch.sin(share * theta) * y) / theta.sin()
        radius = (weights * points.flatten(1).norm(dim=1)).sum()
        torch.testing.assert_close(centroid("slerp", points, weights), radius * unit)


def test_slerp_far_beyond_a_right_angle_still_stands_on_the_arc():
    points, weights = draw(2)
    opposite = torch.stack([points[0], -points[0] + 0.05 * points[1]])
    expected = karcher_mean(opposite.flatten(1), weights)
    torch.testing.assert_close(
        centroid("slerp", opposite, weights), expected, rtol=0, atol=1e-6 * expected.norm().item()
    )


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_circle_is_diff_iis(share):
    points, _ = draw(2)
    points = points / points.flatten(1).norm(dim=1)[:, None, None, None]
    x, y = points.flatten(1)
    place = torch.acos(x @ y) / 2 + 2 * math.pi * (share - 0.5)  # from x, towards y
    weights = torch.tensor([1 - share, share], dtype=torch.float64)
    torch.testing.assert_close(
        centroid("circle", points, weights), diff_ii_circle(x, y, -place), atol=1e-9, rtol=0
    )


@pytest.mark.parametrize(
    ("a", "b", "angle"), [(27.3, 30.0, 1.0), (27.3, 27.3, 0.3), (36.0, 28.0, 0.6)]
)
def test_naos_distance_is_clairauts(a, b, angle):
    """d = h θ + A(a) + A(b), what makes NAO a geometric median (see `augment.centroid.nao`)."""
    dim = 1024
    radii = torch.linspace(-0.1, 0.1, 20001, dtype=torch.float64) + modal_norm(dim)
    turning = (rho(radii, dim) * radii).argmin()
    radius, h = radii[turning].item(), (rho(radii, dim) * radii)[turning].item()

    def to_sphere(norm):
        s = torch.linspace(radius, norm, 20001, dtype=torch.float64)
        rate = (rho(s, dim).square() - (h / s).square()).clamp_min(0).sqrt()
        return abs(torch.trapezoid(rate, s).item())

    expected = h * angle + to_sphere(a) + to_sphere(b)
    assert geodesic_cost(a, b, angle, dim) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def inverted(tiny):
    """Latents of real images of one class, as a bank holds them."""
    with np.load(DATA, allow_pickle=False) as archive:
        pixels = torch.from_numpy(archive["pixels"][CLASSES.index("Sandal")][:5]).float() / 255
    return invert(tiny, prepare(pixels[:, None], 1, 32), steps=20).double()


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("even", [True, False], ids=["even", "uneven"])
@pytest.mark.parametrize("kind", ["noise", "inverted"])
def test_nao_is_below_the_published_optimiser(count, even, kind, inverted):
    """At its own stopping rule or 1000 steps, and with its paths polished for it besides."""
    points, weights = draw(count, shape=(4, 16, 16))
    points = (inverted[:count] if kind == "inverted" else points).float()
    weights = torch.full((count,), 1 / count) if even else weights.float()
    flat = points.flatten(1)
    theirs, loss, _ = nao_by_adam(flat, weights, limit=1000)
    ours = nao_objective_of(flat, weights, centroid("nao", points, weights))
    assert ours <= loss
    assert ours <= nao_objective_of(flat, weights, theirs) + 0.3  # L-BFGS may stop a little early


@pytest.mark.parametrize("count", [2, 5, 20])
def test_no_centroid_nearby_is_better_than_naos(count):
    """The published objective, polished, of nao, and of centroids turned or lengthened a little."""
    points, weights = draw(count, shape=(4, 16, 16))
    flat = points.flatten(1)
    ours = centroid("nao", points, weights)
    best = nao_objective_of(flat, weights, ours)
    for other in (0.97 * ours, 1.03 * ours, *(0.9 * ours + 0.1 * flat[:2])):
        assert nao_objective_of(flat, weights, other) > best - 0.1
