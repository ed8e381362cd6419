"""Laws of the interpolation rules, over every entry of NORMS and MEANS."""

import itertools
import math

import pytest
import torch

from augment import Rule, UserError
from augment.centroid import MEANS, NORMS
from augment.centroid.means import low_pass, split_named
from augment.centroid.norms import GAINS
from augment.centroid.prior import log_chi, nominal_norm

SHAPE = (4, 4, 4)
TWO_POINTS_ONLY = {"circle": "a great circle has two latents; its laws are further down"}
MANY = [norm for norm in NORMS if norm not in TWO_POINTS_ONLY]
SPLITS = [*MEANS, "lp0.7", "lp∞"]
MEANS_OF = {name: split_named(name) for name in SPLITS}
RULES = [Rule(norm, mean) for norm, mean in itertools.product(MANY, [*MEANS, "lp0.7"])]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}
NOT_REPRODUCING = {
    "fix": "it sets every norm to √D, that of a single latent too",
    "mode": "it sets every norm to √(D − 1), that of a single latent too",
    "nao": "it sets the norm to √(D − 1) where that is likelier by more than the way there costs",
}

every_rule = pytest.mark.parametrize("rule", RULES, ids=str)
every_norm = pytest.mark.parametrize("norm", MANY)
every_mean = pytest.mark.parametrize("mean", SPLITS)
every_count = pytest.mark.parametrize("count", [1, 2, 5, 50])
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def draw(count, dtype=torch.float64, batch=3, shape=SHAPE, seed=0):
    """Biased latents of unequal norms, and weights on the simplex."""
    rng = torch.Generator().manual_seed(seed)
    points = torch.randn(batch, count, *shape, generator=rng, dtype=dtype)
    points = points * (0.5 + torch.rand(batch, count, 1, 1, 1, generator=rng, dtype=dtype)) + 0.1
    weights = torch.rand(batch, count, generator=rng, dtype=dtype) + 0.1
    return points, weights / weights.sum(1, keepdim=True)


def assert_near(actual, expected):
    """Equal up to a few rounding errors of their type, beside the size of the expected."""
    assert actual.dtype == expected.dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=TOLERANCE[expected.dtype] * max(scale, 1)
    )


@every_rule
@every_count
@every_dtype
def test_the_order_of_the_points_does_not_matter(rule, count, dtype):
    points, weights = draw(count, dtype)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    assert_near(rule(points[:, order], weights[:, order]), rule(points, weights))


@every_rule
@every_count
@every_dtype
def test_a_point_of_weight_zero_might_as_well_be_absent(rule, count, dtype):
    points, weights = draw(count, dtype)
    place = count // 2
    extra = torch.full_like(points[:, :1], 7.0)
    more = torch.cat([points[:, :place], extra, points[:, place:]], 1)
    none = torch.zeros_like(weights[:, :1])
    padded = torch.cat([weights[:, :place], none, weights[:, place:]], 1)
    assert_near(rule(more, padded), rule(points, weights))


@every_rule
@every_count
@every_dtype
def test_a_batch_is_its_rows_one_by_one(rule, count, dtype):
    points, weights = draw(count, dtype)
    rows = [rule(p[None], w[None])[0] for p, w in zip(points, weights, strict=True)]
    assert_near(rule(points, weights), torch.stack(rows))


@every_norm
@every_count
@every_dtype
def test_rotating_the_points_rotates_the_centroid(norm, count, dtype):
    points, weights = draw(count, dtype)
    dim = math.prod(SHAPE)
    rng = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=rng, dtype=torch.float64))[0]
    rotation = rotation.to(dtype)

    def turn(latents):
        return (latents.flatten(-3) @ rotation).unflatten(-1, SHAPE)

    rule = Rule(norm, "0")
    assert_near(rule(turn(points), weights), turn(rule(points, weights)))


@every_rule
@every_count
@every_dtype
def test_a_vertex_gives_back_its_point(rule, count, dtype):
    points, _ = draw(count, dtype)
    for chosen in {0, count - 1}:
        vertex = torch.eye(count, dtype=dtype)[chosen].expand(len(points), -1)
        centroid, point = rule(points, vertex), points[:, chosen]
        if rule.norm in NOT_REPRODUCING:  # but its direction
            mean = MEANS_OF[rule.mean](point)
            centroid = torch.nn.functional.normalize((centroid - mean).flatten(1))
            point = torch.nn.functional.normalize((point - mean).flatten(1))
        assert_near(centroid, point)


@pytest.mark.parametrize("norm", NOT_REPRODUCING)
def test_an_exemption_is_needed(norm):
    points, _ = draw(1, batch=64)
    centroids = Rule(norm, "0")(points, torch.ones(64, 1, dtype=points.dtype))
    assert (centroids - points[:, 0]).abs().max() > 0.1


@every_mean
def test_a_split_shares_out_the_point(mean):
    """d broadcasts to z, and splitting a constant latent leaves no residual but with split 0."""
    points, _ = draw(2)
    means = MEANS_OF[mean](points)
    assert torch.broadcast_shapes(means.shape, points.shape) == points.shape
    constant = torch.full_like(points, 0.3)
    expected = torch.zeros_like(points) if mean in ("0", "mu") else constant
    torch.testing.assert_close(MEANS_OF[mean](constant).expand_as(points), expected)


@every_mean
def test_the_split_of_a_mixture_is_the_mixture_of_the_splits(mean):
    points, weights = draw(5)
    shares = weights[:, :, None, None, None]
    mixed = (shares * MEANS_OF[mean](points)).sum(1)
    assert_near(MEANS_OF[mean]((shares * points).sum(1)), mixed)


@every_count
def test_fix_sets_the_norm_to_root_d(count):
    points, weights = draw(count)
    norms = Rule("fix", "0")(points, weights).flatten(1).norm(dim=1)
    assert_near(norms, torch.full_like(norms, nominal_norm(math.prod(SHAPE))))


@every_count
@pytest.mark.parametrize("norm", ["nin", "slerp"])
def test_nin_and_slerp_interpolate_the_norms(count, norm):
    points, weights = draw(count)
    norms = Rule(norm, "0")(points, weights).flatten(1).norm(dim=1)
    assert_near(norms, (weights * points.flatten(2).norm(dim=2)).sum(1))


@every_count
def test_mode_sets_the_norm_to_the_likeliest(count):
    points, weights = draw(count)
    norms = Rule("mode", "0")(points, weights).flatten(1).norm(dim=1)
    assert_near(norms, torch.full_like(norms, math.sqrt(math.prod(SHAPE) - 1)))
    step = torch.tensor([-0.01, 0.0, 0.01], dtype=torch.float64)
    assert log_chi(norms[0] + step, math.prod(SHAPE)).argmax() == 1


def test_fade_goes_from_the_norm_of_the_input_to_root_d():
    nominal = nominal_norm(math.prod(SHAPE))
    points = torch.nn.functional.normalize(draw(256)[0].flatten(2), dim=2) * 0.8 * nominal
    points = points.unflatten(2, SHAPE)
    seen = []
    for count in (1, 2, 4, 16, 256):
        weights = torch.full((3, count), 1 / count, dtype=torch.float64)
        seen.append(Rule("fade", "0")(points[:, :count], weights).flatten(1).norm(dim=1).mean())
    ratios = [norm.item() / nominal for norm in seen]
    assert ratios[0] == pytest.approx(0.8)
    assert ratios == sorted(ratios)
    assert ratios[-1] == pytest.approx(1, abs=1e-3)


def test_independent_noise_keeps_its_norm_under_vp_and_shrinks_under_lin():
    shape, count, batch = (4, 16, 16), 16, 64
    rng = torch.Generator().manual_seed(3)
    points = torch.randn(batch, count, *shape, generator=rng)
    nominal = nominal_norm(math.prod(shape))
    _, uneven = draw(count, torch.float32, batch)
    even = torch.full((batch, count), 1 / count)
    for weights in (uneven, even):
        vp = Rule("vp", "0")(points, weights).flatten(1).norm(dim=1).mean()
        assert vp.item() == pytest.approx(nominal, rel=0.02)
    lin = Rule("lin", "0")(points, even).flatten(1).norm(dim=1).mean()
    assert lin.item() == pytest.approx(nominal / math.sqrt(count), rel=0.02)


def biased_channel_means(rule, bias, count, trials=64):
    """Channel means of the centroids of z_n = d + e_n, averaged over trials."""
    rng = torch.Generator().manual_seed(count)
    points = torch.randn(trials, count, 4, 16, 16, generator=rng) + bias[:, None, None]
    weights = torch.full((trials, count), 1 / count)
    return rule(points, weights).mean((0, 2, 3))


def test_fix_amplifies_a_small_channel_bias_by_root_n():
    """Landolsi & Kahl, arXiv 2505.07481: the slope of the channel means against √N is d."""
    bias = torch.tensor([0.03, -0.02, 0.025, 0.0])
    counts = [2**k for k in range(1, 9)]
    roots = torch.tensor(counts).sqrt()
    means = torch.stack([biased_channel_means(Rule("fix", "0"), bias, n) for n in counts])
    centred = roots - roots.mean()
    slope = (centred[:, None] * means).sum(0) / centred.square().sum()
    torch.testing.assert_close(slope, bias, rtol=0.15, atol=0.002)


def test_the_amplified_bias_of_fix_saturates_when_it_is_all_there_is():
    """The average is d + e/√N of mean square δ² + 1/N, so its gain is √(N / (1 + N·δ²))."""
    bias = torch.tensor([0.1, -0.05, 0.08, 0.0])
    for count in (2, 16, 64, 256):
        gain = math.sqrt(count / (1 + count * bias.square().mean().item()))
        means = biased_channel_means(Rule("fix", "0"), bias, count)
        torch.testing.assert_close(means, gain * bias, rtol=0.05, atol=0.03)


@every_norm
@every_count
@every_dtype
@pytest.mark.parametrize(("mean", "dims"), [("chm", (-2, -1)), ("m", (-3, -2, -1))])
def test_a_mean_split_keeps_the_weighted_mean(norm, count, dtype, mean, dims):
    points, weights = draw(count, dtype)
    expected = (weights[:, :, None] * points.mean(dims).reshape(3, count, -1)).sum(1)
    actual = Rule(norm, mean)(points, weights).mean(dims).reshape(3, -1)
    assert_near(actual, expected)


@every_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_latent_that_is_not_finite_is_refused_and_named(rule, bad):
    points, weights = draw(5)
    points[1, 3, 0, 0, 0] = bad
    with pytest.raises(UserError, match="point 3 of row 1"):
        rule(points, weights)


@pytest.mark.parametrize(
    ("name", "table"), [("fixx", NORMS), ("", NORMS), ("fix/0/0", MEANS), ("fix/channel", MEANS)]
)
def test_an_unknown_name_is_answered_with_the_right_ones(name, table):
    with pytest.raises(UserError) as caught:
        Rule.parse(name)
    assert ", ".join(table) in str(caught.value)


@every_rule
def test_a_rule_is_its_name(rule):
    assert Rule.parse(str(rule)) == rule
    assert str(rule) == f"{rule.norm}/{rule.mean}"


@every_norm
def test_a_norm_alone_means_no_split(norm):
    assert Rule.parse(norm) == Rule(norm, "0")


@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_points_of_half_precision_come_out_in_float32(rule, dtype):
    points, weights = draw(5, torch.float32)
    points = points.to(dtype)
    assert_near(rule(points, weights), rule(points.float(), weights))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (3, 8), (16, 16), (64, 64)])
def test_low_pass_keeps_a_constant(size):
    points = torch.full((2, 3, 4, *size), 0.7, dtype=torch.float64)
    torch.testing.assert_close(low_pass(points), points)


def test_low_pass_smooths_noise_and_favours_no_direction():
    points, _ = draw(2, shape=(4, 16, 16))
    blurred = low_pass(points)
    assert blurred.std() < 0.3 * points.std()
    torch.testing.assert_close(low_pass(points.mT), blurred.mT)
    torch.testing.assert_close(low_pass(points.flip(-1)), blurred.flip(-1))
    torch.testing.assert_close(low_pass(points.flip(-2)), blurred.flip(-2))


def test_low_pass_is_a_gaussian_of_its_sigma():
    """An impulse far from the border becomes exp(−x²/2σ²), of sum 1."""
    impulse = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    impulse[..., 16, 16] = 1
    axis = torch.arange(-16, 17, dtype=torch.float64)
    bell = torch.exp(-axis.square() / (2 * 2.0**2))
    expected = bell[:, None] * bell / bell.sum() ** 2
    torch.testing.assert_close(low_pass(impulse)[0, 0], expected, rtol=0, atol=1e-6)
    assert low_pass(impulse).sum().item() == pytest.approx(1)


def test_low_pass_goes_from_everything_to_the_channel_mean():
    points, _ = draw(2, shape=(4, 16, 16))
    torch.testing.assert_close(low_pass(points, 1e-3), points, rtol=0, atol=1e-4)
    mean = points.mean((-2, -1), keepdim=True).expand_as(points)
    torch.testing.assert_close(low_pass(points, 1e3), mean)
    torch.testing.assert_close(split_named("lp∞")(points).expand_as(points), mean)
    torch.testing.assert_close(split_named("lpinf")(points), split_named("lp∞")(points))
    torch.testing.assert_close(split_named("lp2.0")(points), low_pass(points))
    torch.testing.assert_close(split_named("lp0.7")(points), low_pass(points, 0.7))


@every_mean
def test_no_split_but_0_and_mu_changes_a_channel_mean(mean):
    """So lp, too, keeps what is left to the norm rule free of a bias of the latent."""
    points, _ = draw(2, shape=(4, 16, 16))
    dims = (-3, -2, -1) if mean == "m" else (-2, -1)
    means = MEANS_OF[mean](points).expand_as(points)
    expected = torch.zeros_like(points) if mean in ("0", "mu") else points
    torch.testing.assert_close(means.mean(dims), expected.mean(dims))


@pytest.mark.parametrize("name", ["fix/lp0", "fix/lp-1", "fix/lpx", "fix/lpnan"])
def test_a_blur_without_a_width_is_refused(name):
    with pytest.raises(UserError, match=r"lp2\.0"):
        Rule.parse(name)


def test_lol_is_vp_with_a_fixed_mean():
    assert Rule.parse("lol") == Rule("vp", "mu")


@every_norm
def test_the_fixed_mean_moves_the_origin(norm):
    """Rule(z; μ) = μ + Rule(z − μ)."""
    points, weights = draw(5)
    mu = draw(1, seed=9)[0][0, 0]
    shifted = Rule(norm, "0")(points - mu, weights) + mu
    assert_near(Rule(norm, "mu")(points, weights, mu), shifted)
    assert (Rule(norm, "mu")(points, weights) - Rule(norm, "0")(points, weights)).abs().max() == 0


def test_circle_goes_once_around_through_both_points():
    points = torch.nn.functional.normalize(draw(2, batch=1)[0].flatten(2), dim=2).unflatten(
        2, SHAPE
    )
    share = torch.linspace(0, 1, 361, dtype=torch.float64)
    around = Rule.parse("circle")(
        points.expand(361, -1, -1, -1, -1), torch.stack([1 - share, share], 1)
    )
    flat, ends = around.flatten(1), points[0].flatten(1)
    torch.testing.assert_close(flat.norm(dim=1), torch.ones_like(share))
    torch.testing.assert_close(flat[0], flat[-1])
    steps = flat.diff(dim=0).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), rtol=1e-9, atol=0)
    assert ((flat @ ends.T).amax(0) > math.cos(math.pi / 360)).all()  # it passes both
    middle = torch.nn.functional.normalize(ends.sum(0), dim=0)
    torch.testing.assert_close(flat[180], middle)
    torch.testing.assert_close(flat[0], -middle)


@every_dtype
def test_circle_does_not_care_for_the_order_nor_for_its_batch(dtype):
    points, weights = draw(2, dtype)
    rule = Rule.parse("circle/chm")
    assert_near(rule(points.flip(1), weights.flip(1)), rule(points, weights))
    rows = [rule(p[None], w[None])[0] for p, w in zip(points, weights, strict=True)]
    assert_near(rule(points, weights), torch.stack(rows))


def test_circle_of_a_point_with_itself_stays_finite():
    points, _ = draw(1, torch.float32)
    twice = Rule.parse("circle")(points.expand(-1, 2, -1, -1, -1), torch.full((3, 2), 0.5))
    torch.testing.assert_close(twice, points[:, 0])


@pytest.mark.parametrize("count", [1, 3])
def test_circle_wants_two_points(count):
    with pytest.raises(UserError, match="two latents"):
        Rule.parse("circle")(*draw(count))


def test_nao_sticks_to_the_heavier_of_two():
    """A weighted geometric median does not mix: see `augment.centroid.nao`."""
    points, _ = draw(2, batch=1, shape=(4, 16, 16))
    for share in (0.51, 0.7, 0.9):
        weights = torch.tensor([[1 - share, share]], dtype=torch.float64)
        centroid = Rule.parse("nao")(points, weights)[0].flatten()
        assert torch.cosine_similarity(centroid, points[0, 1].flatten(), 0) > 1 - 1e-12


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.2])
def test_nao_of_equal_weights_is_near_mode(scale):
    points = draw(8, batch=4, shape=(4, 16, 16))[0]
    points = torch.nn.functional.normalize(points.flatten(2), dim=2) * 32 * scale
    weights = torch.full((4, 8), 1 / 8, dtype=torch.float64)
    points = points.unflatten(2, (4, 16, 16))
    nao, mode = (Rule(n, "0")(points, weights).flatten(1) for n in ("nao", "mode"))
    assert (torch.cosine_similarity(nao, mode) > 0.999).all()
    assert_near(nao.norm(dim=1), mode.norm(dim=1))


@every_norm
@every_dtype
def test_a_latent_without_a_residual_adds_no_direction(norm, dtype):
    """A constant latent under chm: of its residual only rounding is left, and must not be mixed."""
    for constant in (0.1, 0.3, 3.3):
        points, weights = draw(5, dtype, shape=(4, 16, 16))
        points[:, 2] = constant
        found = Rule(norm, "chm")(points, weights)
        points[:, 2] = 0
        expected = Rule(norm, "chm")(points, weights)
        expected = expected + constant * weights[:, 2, None, None, None]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 if norm == "nao" else 1e-4)


@every_rule
@every_dtype
def test_latents_without_any_residual_stay_as_they_are(rule, dtype):
    """No rule makes a picture of rounding."""
    if rule.mean in ("0", "mu"):
        constant, count = 0.0, 3
    else:
        constant, count = 0.7, 3
    points = torch.full((2, count, 4, 7, 9), constant, dtype=dtype)
    weights = torch.tensor([[0.2, 0.3, 0.5]] * 2, dtype=dtype)
    torch.testing.assert_close(rule(points, weights), points[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mean", MEANS)
@every_dtype
def test_opposite_latents_of_equal_weights_have_no_slerp(mean, dtype):
    point = draw(1, dtype)[0][:, 0]
    points = torch.stack([point, -point], 1)
    found = Rule("slerp", mean)(points, torch.full((3, 2), 0.5, dtype=dtype))
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-5)


@every_norm
def test_a_large_bias_costs_few_digits(norm):
    points, weights = draw(5, torch.float32, shape=(4, 16, 16))
    rule = Rule(norm, "chm")
    expected = rule(points.double(), weights.double()).float()
    torch.testing.assert_close(rule(points + 100, weights) - 100, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mean", ["m", "chm"])
@pytest.mark.parametrize("bias", [0.9, 2.0, 30.0, 1000.0])
def test_a_bias_of_many_standard_deviations_is_no_part_of_a_length(norm, mean, bias):
    """Neither in one point nor in all, nor does it touch the rows beside."""
    points, weights = draw(2, torch.float32, batch=4, shape=(4, 16, 16))
    points[1] += bias
    points[2, 1] += bias
    rule = Rule(norm, mean)
    found, expected = rule(points, weights), rule(points.double(), weights.double()).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 + 3e-7 * bias)
    rest = rule(points[::3], weights[::3])
    torch.testing.assert_close(found[::3], rest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mean", ["m", "chm", "lp"])
def test_latents_that_differ_in_their_last_digits_only_stay_where_they_are(norm, mean):
    points, _ = draw(1, torch.float32, shape=(4, 16, 16))
    apart = draw(2, torch.float32, shape=(4, 16, 16), seed=1)[0] * 1e-6
    found = Rule(norm, mean)(points + apart, torch.full((3, 2), 0.5))
    alone = Rule(norm, mean)(points, torch.ones(3, 1)) if norm != "circle" else points[:, 0]
    tolerance = 2e-5 if norm not in ("fade", "vp") else math.inf  # they look at the weights alone
    torch.testing.assert_close(found, alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("norm", GAINS)
@every_mean
def test_a_row_of_a_stretched_mixture_is_the_same_bits_in_any_batch(norm, mean):
    """Other rules need inner products, whose last bits depend on how threads share the batch."""
    points, weights = draw(4, torch.float32, batch=150, shape=(4, 32, 32))
    points[::7] += 5
    found = Rule(norm, mean)(points, weights)
    for rows in (slice(3), slice(69, 75), slice(149, None)):
        assert torch.equal(found[rows], Rule(norm, mean)(points[rows], weights[rows]))


@every_norm
def test_weights_and_the_fixed_mean_have_a_gradient(norm):
    points, weights = draw(2, batch=2)
    mu = draw(1, seed=9)[0][0, 0].requires_grad_()
    centroid = Rule(norm, "mu")(points, weights.requires_grad_(), mu)
    gradients = torch.autograd.grad(centroid.sum(), [weights, mu], allow_unused=True)
    assert all(x is None or x.isfinite().all() for x in gradients)


@every_rule
def test_an_empty_batch_gives_no_centroid(rule):
    points, weights = draw(3)
    assert rule(points[:0], weights[:0]).shape == (0, *SHAPE)


@every_norm
def test_bad_weights_are_refused(norm):
    points, weights = draw(3)
    weights[1, 1] = math.nan
    with pytest.raises(UserError, match="check weights"):
        Rule(norm, "chm")(points, weights)


@pytest.mark.parametrize("norm", NORMS)
def test_a_centroid_has_a_gradient(norm):
    """Of every point; by finite differences along one direction."""
    points, weights = draw(2, batch=2)
    points.requires_grad_()
    rule, other = Rule(norm, "chm"), draw(2, batch=2, seed=5)[0]

    def value(x):
        return (rule(x, weights) * other[:, 0]).sum()

    (gradient,) = torch.autograd.grad(value(points), points)
    with torch.no_grad():
        slope = (value(points + 1e-6 * other) - value(points - 1e-6 * other)) / 2e-6
    assert (gradient * other).sum().item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-6)
