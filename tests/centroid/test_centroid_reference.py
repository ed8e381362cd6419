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
    split_centroid,
)

from augment import Rule, invert
from augment.centroid.prior import modal_norm
from augment.sources.fashion import CLASSES, DATA
from augment.sources.images import prepare

SHAPE = (4, 8, 8)
every_count = pytest.mark.parametrize("count", [1, 2, 5, 20, 50])


def draw(count, seed=0, shape=SHAPE):
    """Latents of norms around √D with something in common, and uneven weights."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    points = points + 0.1
    weights = -torch.rand(count, generator=generator, dtype=torch.float64).log()
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


def test_raw_slerp_of_two_is_eq_3_of_landolsi_and_kahl_and_leaves_the_range_of_its_norms():
    points, _ = draw(2)
    points[1] = 0.7 * points[1] - 0.3 * points[0]  # an obtuse angle, unequal norms
    flat = points.flatten(1)
    theta = torch.cosine_similarity(*flat, dim=0).acos()
    lengths = []
    for share in torch.linspace(0, 1, 21, dtype=torch.float64):
        expected = torch.sin((1 - share) * theta) * flat[0] + torch.sin(share * theta) * flat[1]
        found = centroid("raw_slerp", points, torch.stack([1 - share, share]))
        torch.testing.assert_close(found, expected / theta.sin())
        lengths.append(found.norm().item())
    ends = sorted((lengths[0], lengths[-1]))
    assert min(lengths) < ends[0] - 0.01 and max(lengths) > ends[1] + 0.01


@pytest.mark.parametrize("norm", ["lin", "fix", "nin"])
@pytest.mark.parametrize("split", ["m", "lp"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_splits_m_and_lp_are_the_papers_formula_at_unequal_weights(norm, split, count):
    points, weights = draw(count)
    expected = split_centroid(norm, split, points, weights).flatten()
    torch.testing.assert_close(centroid(f"{norm}/{split}", points, weights), expected)


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


def test_circle_of_latents_close_together_is_diff_iis():
    x = draw(1)[0].flatten()
    y = x + 0.01 * draw(1, seed=1)[0].flatten()
    points = torch.stack([x / x.norm(), y / y.norm()])
    theta = torch.acos(points[0] @ points[1])
    for share in (0.2, 0.5, 0.9):
        weights = torch.tensor([1 - share, share], dtype=torch.float64)
        expected = diff_ii_circle(*points, -(theta / 2 + 2 * math.pi * (share - 0.5)))
        found = centroid("circle", points.unflatten(1, SHAPE), weights)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


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
    """At its own stopping rule or 600 steps, and with its paths polished for it besides."""
    points, weights = draw(count, shape=(4, 16, 16))
    points = (inverted[:count] if kind == "inverted" else points).float()
    weights = torch.full((count,), 1 / count) if even else weights.float()
    flat = points.flatten(1)
    theirs, loss, _ = nao_by_adam(flat, weights, limit=600)
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


def pull_left(points, weights, direction):
    """How much more the others pull at a direction than the points in its place hold."""
    units = points / points.norm(dim=1, keepdim=True)
    m = direction / direction.norm()
    away = units - (units @ m)[:, None] * m
    length = away.norm(dim=1)
    here = (length < 1e-6) & (units @ m > 0)
    force = (weights[~here, None] * away[~here] / length[~here, None]).sum(0).norm()
    return (force - weights[here].sum()).item()


@pytest.mark.parametrize("kind", ["wide", "close", "twice the same", "one without weight"])
@pytest.mark.parametrize("count", [3, 5, 20])
def test_nao_is_where_all_pulls_cancel(kind, count):
    """The condition of a geometric median, in all D dimensions."""
    for seed in range(12):
        points, weights = draw(count, seed=seed)
        points = points if kind == "wide" else points + 1
        if kind == "twice the same":
            points[1] = points[0]
        if kind == "one without weight":
            points[0], weights[0] = points[1:].mean(0), 0
            weights = weights / weights.sum()
        found = centroid("nao", points, weights)
        some = weights > 0
        assert pull_left(points.flatten(1)[some], weights[some], found) < 1e-3


def test_nao_does_not_stick_to_a_point_that_its_opposite_pulls_at():
    points = torch.eye(256, dtype=torch.float64)[:11]
    points = torch.cat([points[:1], -points[:1], points[1:]]).unflatten(1, SHAPE) * 16
    weights = torch.tensor([0.39, 0.31, *[0.03] * 10], dtype=torch.float64)
    found = centroid("nao", points, weights)
    cosines = points.flatten(1) @ found / (16 * found.norm())
    cost = (weights * cosines.clamp(-1, 1).acos()).sum().item()
    assert cost < weights[1] * math.pi + 0.3 * math.pi / 2 - 0.003


@pytest.mark.parametrize("share", [0.55, 0.6, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("off", [-4.0, -1.2, -0.5, 0.8, 4.0])
def test_nao_stuck_to_a_point_takes_the_cheapest_norm(share, copies, off):
    """Against the radial objective on a fine grid, by trapezoids; some of the points are copies."""
    dim, middle = 1024, modal_norm(1024)
    generator = torch.Generator().manual_seed(0)
    heavy, other = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64)
    own = middle + off
    heavy, other = heavy * own / heavy.norm(), other * own / other.norm()
    points = torch.stack([heavy] * copies + [other])
    weights = torch.tensor([share / copies] * copies + [1 - share], dtype=torch.float64)
    norm = centroid("nao", points, weights).norm().item()
    grid = torch.linspace(middle, own, 4001, dtype=torch.float64)
    way = torch.cumulative_trapezoid(rho(grid, dim), grid).abs()
    way = torch.cat([way.new_zeros(1), way])
    costs = (1 - 2 * share) * way / weights.square().sum() + rho(grid, dim)
    at = (grid - norm).abs().argmin()
    assert (grid[at] - norm).abs() < 0.01
    assert costs[at] - costs.min() < 0.01
