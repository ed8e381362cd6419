"""Laws of the walks: ends, continuity, norms where claimed; over every entry of WALKS."""

import math

import pytest
import torch

from augment import Rule, UserError, walk
from augment.centroid import MEANS, slide, tour
from augment.centroid.prior import log_chi, nominal_norm
from augment.centroid.walks import WALKS

SHAPE = (4, 16, 16)
ONE_WAY = {
    "translation": "b comes in from one side",
    "slice": "b comes in from one side",
    "circle": "the other half of it comes first",
}
JUMPING = {name: "whole columns change at once" for name in ("translation", "slice")}
MOVING = {
    "circle": "it has no direction to turn to",
    "normalised": "it takes both ends for independent",
    "fade": "its norm goes over √D",
    "translation": "the window slides",
}


def every_walk_but(exempt):
    """The walks a law holds for; why not for the others, the table says."""
    return pytest.mark.parametrize("name", [name for name in WALKS if name not in exempt])


every_walk = every_walk_but({})


def ends(first=0.85, last=1.1, dtype=torch.float64, seed=0):
    """Two latents of norms first·√D and last·√D."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, *SHAPE, generator=generator, dtype=dtype)
    both = both / both.flatten(1).norm(dim=1)[:, None, None, None]
    return both[0] * first * nominal_norm(1024), both[1] * last * nominal_norm(1024)


def norms(latents):
    return latents.flatten(1).norm(dim=1)


@every_walk
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [2, 3, 17])
def test_a_walk_goes_from_a_to_b(name, dtype, count):
    a, b = ends(dtype=dtype)
    frames = walk(a, b, count, name)
    assert frames.shape == (count, *SHAPE) and frames.dtype == dtype
    torch.testing.assert_close(frames[0], a, rtol=0, atol=1e-5)
    torch.testing.assert_close(frames[-1], a if name == "circle" else b, rtol=0, atol=1e-5)


@every_walk_but(ONE_WAY)
def test_back_is_the_same_way(name):
    a, b = ends()
    there, back = walk(a, b, 9, name), walk(b, a, 9, name)
    torch.testing.assert_close(there, back.flip(0), rtol=0, atol=1e-9)


@every_walk_but(JUMPING)
def test_twice_the_frames_are_half_the_steps(name):
    a, b = ends()
    few, many = (walk(a, b, n, name).diff(dim=0).flatten(1).norm(dim=1).max() for n in (65, 129))
    assert many / few == pytest.approx(0.5, abs=0.05)


@every_walk_but(MOVING)
def test_a_walk_from_a_latent_to_itself_stays(name):
    a, _ = ends()
    torch.testing.assert_close(walk(a, a, 5, name), a.expand(5, *SHAPE))


@pytest.mark.parametrize("name", ["nin", "slerp"])
def test_norms_are_interpolated(name):
    a, b = ends()
    expected = torch.linspace(norms(a[None]).item(), norms(b[None]).item(), 9, dtype=a.dtype)
    torch.testing.assert_close(norms(walk(a, b, 9, name)), expected)


@pytest.mark.parametrize("name", ["nin", "fade", "slerp", "circle"])
def test_latents_of_the_nominal_norm_keep_it(name):
    a, b = ends(1, 1)
    torch.testing.assert_close(norms(walk(a, b, 9, name)), torch.full((9,), 32.0, dtype=a.dtype))


def test_lerp_cuts_the_corner_and_normalised_does_not():
    a, b = ends(1, 1)
    assert norms(walk(a, b, 3, "lerp"))[1] == pytest.approx(32 / math.sqrt(2), rel=0.05)
    assert norms(walk(a, b, 3, "normalised"))[1] == pytest.approx(32, rel=0.05)
    place = torch.linspace(0, 1, 9, dtype=a.dtype)[:, None, None, None]
    expected = ((1 - place) * a + place * b) / (place * (2 * place - 2) + 1).sqrt()
    torch.testing.assert_close(walk(a, b, 9, "normalised"), expected)


def test_slerp_turns_at_a_constant_speed():
    frames = walk(*ends(), 9, "slerp").flatten(1)
    turns = torch.cosine_similarity(frames[1:], frames[:-1]).acos()
    torch.testing.assert_close(turns, turns[:1].expand_as(turns))
    theta = torch.cosine_similarity(frames[0], frames[-1], 0).acos()
    assert turns.sum().item() == pytest.approx(theta.item())


def test_circle_passes_b_and_comes_back():
    a, b = ends(1, 1)
    frames = walk(a, b, 721, "circle").flatten(1)
    assert (frames - b.flatten()).norm(dim=1).min() < 32 * math.pi / 360
    steps = frames.diff(dim=0).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-6, atol=0)


def metric_steps(frames, dim=1024):
    """NAO length of each step of a fine walk."""
    flat = frames.flatten(1)
    middles = norms((flat[1:] + flat[:-1]) / 2)
    return flat.diff(dim=0).norm(dim=1) * -log_chi(middles, dim)


def test_nao_walks_the_sphere_between_two_far_latents():
    a, b = ends(0.85, 1.1)
    frames = walk(a, b, 2001, "nao")
    inner = norms(frames)
    on_sphere = (inner - math.sqrt(1023)).abs() < 0.1
    turns = torch.cosine_similarity(frames.flatten(1), a.flatten()[None]).clamp(-1, 1).acos()
    assert on_sphere[(turns > 0.01) & (turns < turns[-1] - 0.01)].all()  # all turning is done there
    assert (on_sphere.sum() > 500) and not on_sphere[0]
    steps = frames.diff(dim=0).flatten(1).norm(dim=1)
    assert ((steps / steps.median() - 1).abs() > 0.01).sum() <= 4  # those that cut the corners
    for other in ("lerp", "slerp", "nin", "fade"):
        assert metric_steps(frames).sum() < metric_steps(walk(a, b, 2001, other)).sum()


def test_nao_between_neighbours_does_not_climb_to_the_sphere():
    a, _ = ends(0.85)
    b = a + 1e-4 * ends(seed=1)[1]
    assert norms(walk(a, b, 9, "nao")).max() < norms(a[None]) + 0.1


@pytest.mark.parametrize("turn", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(("first", "last"), [(0.85, 0.9), (0.9, 1.1), (1.1, 1.2)])
def test_nao_goes_around_at_the_cheapest_norm(first, last, turn):
    """No way along the radius to another norm, around, and along the radius is shorter."""
    x, y = (torch.nn.functional.normalize(z.flatten(), dim=0) for z in ends())
    y = torch.nn.functional.normalize(y - (y @ x) * x, dim=0)
    y = math.cos(turn) * x + math.sin(turn) * y
    a, b = first * 32 * x, last * 32 * y
    found = metric_steps(walk(a.view(SHAPE), b.view(SHAPE), 3001, "nao")).sum()
    share = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None]
    arc = (turn * (1 - share)).sin() * x + (turn * share).sin() * y
    for norm in torch.linspace(25, 40, 61).tolist():
        around = norm * arc / math.sin(turn)
        legs = [a + share * (around[0] - a), around, around[-1] + share * (b - around[-1])]
        assert found < sum(metric_steps(leg[:, None, None]).sum() for leg in legs) * 1.002


@pytest.mark.parametrize("name", ["slerp", "circle", "nao"])
def test_a_walk_that_has_no_way_to_turn_is_refused(name):
    a, _ = ends()
    for other in (-a, 0 * a, -a + 1e-5):
        with pytest.raises(UserError, match="take lerp"):
            walk(a, other, 5, name)


def test_a_walk_between_neighbours_keeps_its_digits():
    a, _ = ends()
    b = a + 1e-7 * ends(seed=1)[1]
    frames = walk(a, b, 3, "slerp")
    torch.testing.assert_close(frames[1] - a, (b - a) / 2, rtol=0, atol=1e-9)


def test_translation_slides_and_slice_cuts():
    a, b = ends()
    slid, cut = walk(a, b, 17, "translation"), walk(a, b, 17, "slice")
    for at in range(17):
        both = torch.cat([a, b], -1)
        assert torch.equal(slid[at], both[..., at : at + 16])
        assert torch.equal(cut[at][..., :at], b[..., :at])
        assert torch.equal(cut[at][..., at:], a[..., at:])


def several(number):
    return torch.cat([torch.stack(ends(seed=seed)) for seed in range(number)])[:number]


def test_a_window_slides_over_any_number_of_latents():
    latents = several(4)
    joined, windows = torch.cat(list(latents), -1), slide(latents, 49)
    assert all(torch.equal(windows[at], joined[..., at : at + 16]) for at in range(49))
    assert torch.equal(slide(latents, 4), latents)
    assert torch.equal(slide(latents[:2], 17), walk(*latents[:2], 17, "translation"))


@pytest.mark.parametrize("mean", [mean for mean in MEANS if mean != "mu"])
@pytest.mark.parametrize("norm", ["nin", "fade", "slerp"])
@pytest.mark.parametrize("number", [2, 3, 7])
def test_a_tour_passes_all_latents_and_closes(norm, mean, number):
    latents = several(number)
    path = tour(latents, 8 * number, Rule(norm, mean))
    torch.testing.assert_close(path[::8], latents, rtol=0, atol=1e-4)
    steps = (path - path.roll(1, 0)).flatten(1).norm(dim=1)
    assert steps[0] < 1.5 * steps.median()  # the last step, back to the first latent


def test_a_tour_mixes_by_fejers_kernel():
    """The kernel is a mean of cosines: 1/N² Σ (N − |k|) cos(k x)."""
    latents, number = several(5), 5
    path = tour(latents, 60, Rule("lin", "0"))
    orders = torch.arange(1 - number, number, dtype=torch.float64)
    for place in range(60):
        x = 2 * math.pi * (place / 60 - torch.arange(number, dtype=torch.float64) / number)
        weights = ((number - orders.abs()) * (orders * x[:, None]).cos()).sum(1) / number**2
        assert weights.min() > -1e-12 and weights.sum() == pytest.approx(1)
        expected = (weights[:, None, None, None] * latents).sum(0)
        torch.testing.assert_close(path[place], expected, rtol=0, atol=1e-9)


def test_a_tour_of_one_latent_is_refused():
    with pytest.raises(UserError, match="at least 2 latents"):
        tour(several(1), 5)


def test_faults_are_told():
    a, b = ends()
    with pytest.raises(UserError, match="slerp"):
        walk(a, b, 5, "slurp")
    with pytest.raises(UserError, match="at least 2"):
        walk(a, b, 1)
    with pytest.raises(UserError, match="one shape"):
        walk(a, b[..., :8], 5)
    with pytest.raises(UserError, match="finite"):
        walk(a, b * math.nan, 5)
