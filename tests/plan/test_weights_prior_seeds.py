"""Mixing weights, the law of the norm, and counter-based generator."""

import itertools
import math

import numpy as np
import pytest
import torch

from augment import UserError
from augment.centroid.prior import log_chi, nominal_norm
from augment.core.rng import PURPOSES, normal, rng
from augment.plan.weights import dirichlet, effective_count, expected_count

ALPHAS = [0.0, 5e-324, 1e-300, 1e-3, 0.1, 1.0, 10.0, 1e6, 1e300, math.inf]


def draws(alpha, count, number):
    generator = np.random.default_rng(0)
    return torch.stack([dirichlet(generator, alpha, count) for _ in range(number)])


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("count", [1, 2, 5, 50])
def test_weights_are_on_the_simplex(alpha, count):
    weights = draws(alpha, count, 50)
    assert weights.dtype == torch.float64
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("count", [2, 5])
def test_weights_have_the_moments_of_the_dirichlet_law(alpha, count):
    weights = draws(alpha, count, 8000)
    mean, variance = 1 / count, (1 / count) * (1 - 1 / count) / (count * alpha + 1)
    error = 5 * math.sqrt(variance / len(weights))
    torch.testing.assert_close(
        weights.mean(0), weights.new_full((count,), mean), rtol=0, atol=error
    )
    torch.testing.assert_close(
        weights.var(0), weights.new_full((count,), variance), rtol=0.1, atol=0
    )


def test_a_tiny_alpha_is_nearly_one_hot_and_never_uniform():
    weights = draws(1e-3, 5, 3000)
    assert not weights.isnan().any()
    assert (weights.max(1).values > 0.21).all()
    assert (weights.max(1).values > 0.99).double().mean() > 0.97
    assert weights.mean(0).min() > 0.15, "each member has its turn"


def test_alpha_zero_is_a_vertex_and_infinity_the_centre():
    vertices = draws(0.0, 4, 400)
    assert vertices.unique().tolist() == [0, 1]
    assert vertices.sum(0).min() > 60, "each member has its turn"
    assert (draws(math.inf, 4, 3) == 0.25).all()


SEVERAL = [
    (1.0,), (3.0, 1.0), (10.0, 1.0, 1.0), (0.0, 2.0, 0.0, 0.5), (1e-3, 2e-3), (5e-324, 1.0),
    (1e-12, 3e-12, 0.0), (5e-324, 0.0), (1e300, 1e300, 0.0), (0.05, 20.0, 3.0),
]  # fmt: skip


@pytest.mark.parametrize("alphas", SEVERAL, ids=str)
def test_weights_of_several_alphas_have_the_mean_of_the_dirichlet_law(alphas):
    weights = draws(alphas, len(alphas), 4000)
    assert weights.dtype == torch.float64
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(4000, dtype=torch.float64))
    parts = torch.tensor(alphas, dtype=torch.float64) / max(alphas)
    assert (weights[:, parts == 0] == 0).all(), "a zero shuts its member out"
    mean = parts / parts.sum()
    error = 5 * (mean * (1 - mean) / (sum(alphas) + 1) / 4000).sqrt() + 1e-12
    assert ((weights.mean(0) - mean).abs() <= error).all()


@pytest.mark.parametrize("alpha", [1e-9, 1e-3, 1.0, 1e6])
def test_several_equal_alphas_are_one(alpha):
    assert torch.equal(draws((alpha,) * 4, 4, 20), draws(alpha, 4, 20))


class Unlucky(np.random.Generator):
    """Draws the least uniform number there is."""

    def random(self, size):
        return np.zeros(size)


def test_a_zero_alpha_shuts_its_member_out_whatever_is_thrown():
    weights = dirichlet(Unlucky(np.random.Philox(0)), (0.0, 1.0, 1.0), 3)
    assert weights[0] == 0
    assert weights.sum().item() == pytest.approx(1)


BAD_SEVERAL = [(), (1.0, 2.0), (1.0, -1.0, 1.0), (1.0, math.nan, 1.0), (1.0, math.inf, 1.0),
               (0.0, 0.0, 0.0)]  # fmt: skip


@pytest.mark.parametrize("alphas", BAD_SEVERAL, ids=str)
@pytest.mark.parametrize("ask", [expected_count, lambda *a: draws(*a, 1)])
def test_several_bad_alphas_are_refused(alphas, ask):
    with pytest.raises(UserError, match="alpha"):
        ask(alphas, 3)


@pytest.mark.parametrize("alphas", [0.0, 0.1, 1.0, 10.0, 1e300, math.inf, *SEVERAL], ids=str)
def test_the_expected_count_is_that_of_many_draws(alphas):
    count = len(alphas) if isinstance(alphas, tuple) else 6
    squares = draws(alphas, count, 4000).square().sum(1)
    error = 5 * squares.std().item() / math.sqrt(len(squares)) + 1e-9
    assert 1 / expected_count(alphas, count) == pytest.approx(squares.mean().item(), abs=error)


@pytest.mark.parametrize(("alpha", "count"), [(0.5, 4), (2.0, 5), (30.0, 2)])
def test_the_expected_count_of_one_alpha_has_a_short_form(alpha, count):
    short = (count * alpha + 1) / (alpha + 1)
    assert expected_count(alpha, count) == pytest.approx(short)
    assert expected_count((alpha,) * count, count) == pytest.approx(short)


@pytest.mark.parametrize(("alpha", "count"), [(-1.0, 3), (math.nan, 3), (1.0, 0), (1.0, -1)])
def test_weights_of_bad_parameters_are_refused(alpha, count):
    with pytest.raises(UserError):
        dirichlet(np.random.default_rng(0), alpha, count)


def test_effective_count_runs_from_one_at_a_vertex_to_all_in_the_middle():
    assert effective_count(torch.eye(5)).tolist() == [1] * 5
    assert effective_count(torch.full((2, 3, 8), 1 / 8)).tolist() == [[8] * 3] * 2
    between = effective_count(draws(1.0, 8, 100))
    assert ((between > 1) & (between < 8)).all()


@pytest.mark.parametrize("dim", [2, 3, 64, 1024, 16384])
def test_the_law_of_the_norm_integrates_to_one_with_its_mode_at_root_d_minus_one(dim):
    centre = nominal_norm(dim)
    grid = torch.linspace(max(centre - 8, 1e-6), centre + 8, 160001, dtype=torch.float64)
    density = log_chi(grid, dim).exp()
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)
    assert grid[density.argmax()].item() == pytest.approx(math.sqrt(dim - 1), abs=2e-4)


@pytest.mark.parametrize("dim", [2, 64, 1024])
def test_the_norms_of_noise_follow_the_law(dim):
    norms = normal(rng(0, "noise"), 4000, dim).double().norm(dim=1)
    grid = torch.linspace(1e-6, nominal_norm(dim) + 8, 40001, dtype=torch.float64)
    mean = torch.trapezoid(grid * log_chi(grid, dim).exp(), grid)
    assert norms.mean().item() == pytest.approx(mean.item(), abs=0.05)


COUNTERS = [(), (1,), (1, 2), (2, 1), (1, 3)]
STREAMS = list(itertools.product([0, 1], PURPOSES, COUNTERS))


@pytest.mark.parametrize(("seed", "purpose", "counters"), STREAMS)
def test_the_same_counters_throw_the_same_numbers(seed, purpose, counters):
    first, second = (rng(seed, purpose, *counters).random(8) for _ in range(2))
    assert (first == second).all()


def test_every_seed_purpose_and_counter_has_numbers_of_its_own():
    drawn = {rng(seed, purpose, *c).integers(2**62).item() for seed, purpose, c in STREAMS}
    assert len(drawn) == len(STREAMS)
    assert len(set(PURPOSES.values())) == len(PURPOSES)


def test_dice_leave_the_global_generators_alone():
    def states():
        kind, keys, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest)

    before = states()
    normal(rng(0, "noise", 1, 2), 4, 16, 16)
    dirichlet(rng(0, "plan", 1, 2), 0.5, 5)
    assert states() == before


def test_noise_is_standard_normal_in_float32():
    noise = normal(rng(0, "noise"), 4, 128, 128)
    assert noise.shape == (4, 128, 128)
    assert noise.dtype == torch.float32
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
