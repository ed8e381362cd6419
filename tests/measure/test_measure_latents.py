"""What is measured of a class's latents, and what their bias grows to."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from augment import Rule, UserError
from augment.centroid.means import channel_mean, low_pass
from augment.diffusion.usage import KNOWN
from augment.measure import amplification, bias_warning, latent_statistics, predicted_bias
from augment.measure.health import VERDICT, ClassHealth, Fitting, findings
from augment.measure.latents import norm_law
from augment.plan.weights import dirichlet

BIAS = torch.tensor([0.13, -0.06, 0.0, 0.04])[:, None, None]


def white(count=64, channels=4, size=16, seed=0):
    return torch.randn(
        count, channels, size, size, generator=torch.Generator().manual_seed(seed)
    )  # fmt: skip


def correlations(statistics):
    return np.array([statistics.horizontal, statistics.vertical]) / statistics.correlation_error


@pytest.mark.parametrize("shape", [(64, 4, 16), (400, 4, 8), (5, 1, 32), (8, 16, 8)])
def test_white_noise_passes_for_white_noise(shape):
    statistics = latent_statistics(white(*shape))
    count, channels, size = shape
    assert (statistics.count, statistics.dim) == (count, channels * size**2)
    assert not statistics.biased
    scores = np.divide(statistics.channel_means, 1 / math.sqrt(count * size**2))
    assert np.abs(scores).max() < 4
    assert abs(statistics.norm_sigmas) < 4
    assert statistics.norm_spread == pytest.approx(
        norm_law(statistics.dim)[1], rel=4 / (2 * count) ** 0.5
    )
    assert np.abs(correlations(statistics)).max() < 4
    pairs = count * (count - 1) / 2
    assert abs(statistics.shared) < 4 / math.sqrt(pairs * statistics.dim)


def test_the_scores_of_white_noise_have_unit_spread():
    runs = [latent_statistics(white(8, 2, 8, seed)) for seed in range(300)]
    for scores in ([r.norm_sigmas for r in runs], [correlations(r) for r in runs]):
        assert np.mean(scores) == pytest.approx(0, abs=0.2)
        assert np.std(scores) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("count", [2, 3, 6, 30])
def test_white_noise_is_seldom_called_biased(count):
    assert sum(latent_statistics(white(count, 4, 8, seed)).biased for seed in range(500)) <= 12


@pytest.mark.parametrize("dim", [16, 256, 16384])
def test_the_law_of_the_norm_is_the_chi_law(dim):
    side = math.isqrt(dim)
    mean, spread = norm_law(latent_statistics(torch.ones(1, 1, side, side)).dim)
    exact = math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2)) * math.sqrt(2 / dim)
    assert mean == pytest.approx(exact, abs=0.2 / dim**2)
    assert spread == pytest.approx(math.sqrt(1 - exact**2), rel=1 / dim)


def test_a_bias_of_channels_is_found():
    found = latent_statistics(white() + BIAS)
    assert found.biased
    means, errors = np.array(found.channel_means), np.array(found.channel_errors)
    assert (np.abs(means - BIAS.flatten().numpy()) < 4 * errors).all()
    assert errors == pytest.approx(np.full(4, 1 / math.sqrt(64 * 256)), rel=0.4)
    assert found.largest == (means[0], errors[0])
    share = BIAS.square().mean().item()
    assert found.shared == pytest.approx(share, abs=0.0015)
    assert found.energy == pytest.approx(1 + share, abs=0.02)
    assert not latent_statistics(white() + BIAS - BIAS).biased


@pytest.mark.parametrize(
    ("count", "no", "yes"), [(3, 9.92, 11.5), (5, 4.60, 4.7), (11, 3.16, 3.18), (101, 2.62, 2.64)]
)
def test_significance_is_student_s_at_one_percent(count, no, yes):
    """Critical t of n - 1 degrees of freedom: 9.925, 4.604, 3.169 and 2.626."""
    one = dataclasses.replace(latent_statistics(white(channels=1)), count=count)
    for t, verdict in ((no, False), (yes, True)):
        found = dataclasses.replace(one, channel_means=(-0.01 * t,), channel_errors=(0.01,))
        assert found.biased == verdict


def test_a_bias_of_channels_is_no_correlation():
    one, other = latent_statistics(white()), latent_statistics(white() + 5 * BIAS)
    assert correlations(other) == pytest.approx(correlations(one), abs=1e-3)


def test_the_largest_mean_may_be_negative():
    assert latent_statistics(white() - 3 * BIAS).largest[0] == pytest.approx(0.39, abs=0.02)


def test_a_scatter_of_the_means_themselves_is_no_bias():
    scatter = white(20, 4, 1, seed=1) * 0.3  # each latent has its own, as large as a real bias
    own = latent_statistics(white(20) + scatter)
    assert np.min(own.channel_errors) > 0.03
    assert not own.biased


def test_a_mean_latent_without_channel_means_is_found():
    pattern = white(1, seed=5)
    pattern = pattern - pattern.mean((-2, -1), keepdim=True)
    statistics = latent_statistics(white() + 0.5 * pattern)
    assert statistics.shared == pytest.approx(0.25 * pattern.square().mean().item(), rel=0.1)
    assert not statistics.biased


@pytest.mark.parametrize("scale", [0.9, 1.1, 3.0])
def test_a_scale_moves_the_norms_and_nothing_else(scale):
    latents = white() + BIAS
    one, other = latent_statistics(latents), latent_statistics(scale * latents.double())
    for field, power in (("norm", 1), ("norm_spread", 1), ("energy", 2), ("shared", 2)):
        assert getattr(other, field) == pytest.approx(scale**power * getattr(one, field))
    for field in ("horizontal", "vertical"):
        assert getattr(other, field) == pytest.approx(getattr(one, field))
    assert other.biased
    assert other.norm_sigmas * (scale - 1) > 0
    assert abs(other.norm_sigmas) > 20


def test_a_blur_correlates_neighbours():
    blurred = latent_statistics(low_pass(white()[None], 0.5)[0])
    assert correlations(blurred).min() > 20
    assert blurred.horizontal == pytest.approx(blurred.vertical, abs=0.02)
    rows = latent_statistics(white().repeat_interleave(2, 3))  # pairs of equal pixels in a row
    assert rows.horizontal == pytest.approx(16 / 31, abs=0.02)
    assert abs(rows.vertical) < 0.02


def test_channels_count_alike_whatever_their_scale():
    loud = torch.tensor([100.0, 1.0, 1.0, 1.0])[:, None, None]
    one, other = latent_statistics(white()), latent_statistics(loud * white())
    assert other.horizontal == pytest.approx(one.horizontal)


def test_the_order_of_the_images_does_not_matter():
    latents = low_pass(white()[None])[0] + BIAS
    shuffled = latents[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    one, other = (dataclasses.astuple(latent_statistics(x)) for x in (latents, shuffled))
    for a, b in zip(one, other, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_statistics_are_of_float64(dtype):
    latents = (white() + BIAS).to(dtype)
    assert latent_statistics(latents) == latent_statistics(latents.double())


def test_one_latent_has_statistics_but_no_significance():
    statistics = latent_statistics(white(1) + 3 * BIAS)
    assert statistics.channel_errors == (1 / 16,) * 4
    assert statistics.norm_spread == 0
    assert statistics.shared == pytest.approx(np.square(statistics.channel_means).mean())
    assert not statistics.biased
    assert not latent_statistics(white(1) + 100).biased


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 1, 8), (3, 4, 8, 1), (2, 1, 4, 4)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_statistics_are_finite_in_every_corner(shape, value):
    statistics = latent_statistics(torch.full(shape, value))
    numbers = [statistics.norm_sigmas, *statistics.largest, *norm_law(statistics.dim)]
    numbers += [predicted_bias(statistics, 4, 1.0), *np.hstack(dataclasses.astuple(statistics))]
    assert np.isfinite(numbers).all()
    assert statistics.biased == (value == 1 and shape[0] > 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_latent_that_is_not_finite_is_named(value):
    latents = white(6)
    latents[4, 2, 3, 1] = value
    with pytest.raises(UserError, match="latent 4"):
        latent_statistics(latents)


def test_no_latents_are_refused():
    with pytest.raises(UserError, match="add images"):
        latent_statistics(white(0))


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.1, 1.0, 10.0, 1e300, math.inf])
@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_amplification_is_that_of_the_dirichlet_law(alpha, count):
    generator = np.random.default_rng(0)
    weights = torch.stack([dirichlet(generator, alpha, count) for _ in range(1500)])
    q = weights.square().sum(1)
    assert amplification(count, alpha) == pytest.approx(q.mean().item() ** -0.5, rel=0.03)
    if alpha < 1e100:
        exact = math.sqrt((count * alpha + 1) / (alpha + 1))
        assert amplification(count, alpha) == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("count", "alpha"), [(3, -1.0), (3, math.nan), (0, 1.0), (-1, 1.0)])
def test_bad_numbers_are_refused(count, alpha):
    statistics = latent_statistics(white())
    for refuse in (amplification, lambda *a: predicted_bias(statistics, *a)):
        with pytest.raises(UserError, match="expected"):
            refuse(count, alpha)


def fixed_bias(latents, count, alpha, draws=200):
    """The largest |channel mean| of fix/0 centroids of some of the latents, by doing it."""
    generator, rule, total = np.random.default_rng(0), Rule.parse("fix/0"), 0
    for _ in range(draws):
        points = latents[generator.permutation(len(latents))[:count]]
        weights = dirichlet(generator, alpha, count).float()
        total += rule(points[None], weights[None])[0].mean((-2, -1))
    return (total / draws).abs().max().item()


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.3, 0.06), (1.0, 0.03), (math.inf, 0.01)])
@pytest.mark.parametrize("count", [2, 8, 32, 64])
@pytest.mark.parametrize("strength", [1, 5])
def test_the_predicted_bias_is_that_of_fix_0(count, alpha, tolerance, strength):
    # without chance means of their own, centroids show the gain alone, and few of them do
    noise = white(96) - channel_mean(white(96)[None])[0]
    latents = 0.9 * noise + strength * BIAS
    predicted = predicted_bias(latent_statistics(latents), count, alpha)
    assert predicted == pytest.approx(fixed_bias(latents, count, alpha), rel=tolerance)


def test_a_mean_latent_damps_the_predicted_bias():
    latents = white(96) + BIAS
    shaped = latents + 0.5 * white(1, seed=3)
    plain, damped = (predicted_bias(latent_statistics(x), 64, math.inf) for x in (latents, shaped))
    assert damped == pytest.approx(fixed_bias(shaped, 64, math.inf), rel=0.03)
    assert damped < plain / 2


def test_the_predicted_bias_grows_with_n_and_saturates():
    latents = white(64, size=32) + 0.2
    statistics = latent_statistics(latents)
    grown = [predicted_bias(statistics, count, math.inf) for count in (1, 4, 64, 10**9)]
    assert grown == sorted(grown)
    assert grown[0] == pytest.approx(0.2, rel=0.05)
    assert grown[1] == pytest.approx(0.4, rel=0.1)
    assert grown[-1] == pytest.approx(1, rel=0.04), "d is all there is, of norm √D"
    assert predicted_bias(statistics, 64, 0.0) == pytest.approx(grown[0])


def test_what_a_user_reads_has_the_numbers():
    health = ClassHealth.of("cup", white() + BIAS)
    (mean, error), text = health.statistics.largest, str(findings([health], "ddim")[0])
    assert text.startswith("Bias. ") and f"the {mean:.2f} ± {error:.2f} of cup to" in text
    noise = findings([ClassHealth.of("cup", white())], "ddim")
    assert noise[0].text.startswith("The class has no significant channel bias")


def test_a_shared_part_that_came_out_negative_counts_as_none():
    statistics = dataclasses.replace(latent_statistics(white()), shared=-1e-3, energy=1.0)
    predicted = predicted_bias(statistics, 10**4, math.inf)
    assert predicted == pytest.approx(100 * statistics.largest[0])


def warning_of(latents, rule, count=16, draws=8):
    """The warning for centroids of random members in equal parts."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randperm(len(latents), generator=generator)[:count] for _ in range(draws)]
    points, weights = latents[torch.stack(rows)].float(), torch.full((draws, count), 1 / count)
    means = Rule.parse(rule)(points, weights).mean((-2, -1))
    return bias_warning(latent_statistics(latents), means, points.mean((1, -2, -1)), rule)


@pytest.mark.parametrize("rule", ["fix/0", "nin/0", "vp/0", "mode/m", "slerp/0", "nao/0"])
@pytest.mark.parametrize("draws", [1, 8])
def test_a_rule_that_enlarges_a_bias_is_told_with_numbers(rule, draws):
    latents = white(64) + BIAS
    statistics = latent_statistics(latents)
    message = warning_of(latents, rule, draws=draws)
    assert message.startswith(f"{rule} makes the channel means")
    assert f"{statistics.largest[0]:.3f}" in message
    assert f"{rule.split('/')[0]}/chm" in message
    times = float(message.split(" times")[0].split()[-1])
    predicted = predicted_bias(statistics, 16, math.inf) / statistics.largest[0]
    assert times == pytest.approx(predicted, rel=0.15)


@pytest.mark.parametrize("rule", ["lin/0", "fix/chm", "nin/lp", "nao/chm"])
@pytest.mark.parametrize("scatter", [0, 0.3])
def test_a_rule_that_keeps_the_bias_is_not(rule, scatter):
    """However much the channel means of the latents scatter, and whichever one is drawn."""
    means = white(64, size=1, seed=3) * scatter
    for count in (1, 3, 16):
        assert warning_of(white(64) + BIAS + means, rule, count, draws=1) is None


def test_a_small_bias_may_double():
    """Significant, but nobody will see it."""
    latents = white(2000, size=8) + BIAS / 4
    assert latent_statistics(latents).biased
    assert warning_of(latents, "fix/0", 4) is None
    assert warning_of(latents, "fix/0", 200) is not None


def test_white_latents_are_no_reason_to_warn():
    assert warning_of(white(64), "fix/0") is None


def verdict(mse, backbone="tiny", inversion="forward_start in 25 steps", scale=1.0, images=None):
    latents = white() * scale
    errors = None if mse is None else torch.full((len(latents),), mse)
    health = ClassHealth.of("cup", latents, errors)
    return [f for f in findings([health], inversion, True, backbone, images) if f.topic in VERDICT]


def test_the_first_finding_says_whether_the_model_knows_the_images():
    (first,) = verdict(0.0081)
    assert first.level == "warning" and "tiny DOES NOT KNOW THESE IMAGES" in first.text
    assert "20.9 dB (PSNR), norm over √D of their latents 1.00, correlation" in first.text
    assert "(of grey clothes of 32×32 pixels 27.3 dB, norm 1.00, correlation +0.00)" in first.text
    (knows,) = verdict(0.0018)
    assert knows.level == "good" and "tiny knows images like these" in knows.text
    assert verdict(0.0081, "sd15") == [] and verdict(0.0081, inversion="noise in 25 steps") == []


@pytest.mark.parametrize(
    ("inversion", "clothes", "photographs"),
    [
        ("forward_start in 10 steps", 27.3, 20.4),
        ("forward_start in 50 steps", 27.3, 21.4),
        ("ddim in 10 steps", 20.7, 13.5),
        ("ddim in 25 steps", 24.8, 16.9),
        ("fireflow in 25 steps", 38.2, 29.3),
        ("midpoint in 25 steps", 38.5, 28.2),
    ],
)
def test_the_verdict_holds_for_other_inversions(inversion, clothes, photographs):
    """PSNR of 20 images of Fashion-MNIST and of CIFAR-100, as measured with tiny."""
    assert verdict(10 ** (-clothes / 10), inversion=inversion)[0].level == "good"
    assert verdict(10 ** (-photographs / 10), inversion=inversion)[0].level == "warning"


def test_without_errors_the_length_of_the_latents_is_the_verdict():
    assert verdict(None)[0].level == "good"
    (longer,) = verdict(None, scale=1.09)
    assert longer.level == "warning" and "latents 1.09" in longer.text and "dB" not in longer.text


def test_what_is_usual_between_two_numbers_of_steps():
    at = KNOWN["tiny"].at
    assert at("ddim in 25 steps").psnr == 24.8
    assert at("ddim in 1000 steps") == at("ddim in 50 steps")
    assert 20.7 < at("ddim in 16 steps").psnr < 24.8
    assert at("ddim in 5 steps") is at("ddim in 25 steps up to level 0.5") is None


def test_the_verdict_says_what_images_lost():
    (photographs,) = verdict(None, "sd15", images=Fitting(40, 384, 32, 3, 36))
    assert photographs.topic == "Images" and photographs.level == "warning"
    assert "reduced 12.0-fold" in photographs.text
    assert "36 of 40 images lost their colour" in photographs.text and "3 of 40" in photographs.text
    (fine,) = verdict(None, "sd15", images=Fitting(40, 28, 32, 0, 0))
    assert fine.level == "good" and "enlarged 1.1-fold" in fine.text


@pytest.mark.parametrize("inversion", ["ddim", "forward_start", "fireflow"])
def test_nobody_is_advised_to_do_what_was_done(inversion):
    smooth = white().cumsum(-1) / 3
    health = ClassHealth.of("cup", smooth, torch.full((len(smooth),), 0.1))
    found = findings([health], f"{inversion} in 25 steps")
    warned = [f for f in found if f.level == "warning"]
    said = " ".join(map(str, warned))
    assert {"Norm", "Correlation", "Reconstruction"} <= {f.topic for f in warned}
    for method in ("forward_start", "fireflow"):
        assert (f"of {method} have" in said or f"{method} gives" in said) == (method != inversion)
