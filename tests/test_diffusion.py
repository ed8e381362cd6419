"""Process, solver and inversion against diffusers and against the exact Gaussian model."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch

from augment import UserError, invert, load_backbone, sample
from augment.diffusion import BACKBONES
from augment.diffusion.backbone import denoiser
from augment.diffusion.gaussian import GaussianBackbone
from augment.diffusion.process import PREDICTIONS, Flow, VariancePreserving, split
from augment.diffusion.solver import SOLVERS, ddim
from augment.inversion import INVERTERS

PROCESSES = [
    VariancePreserving("epsilon"),
    VariancePreserving("v"),
    Flow(),
    Flow(shift=3.0),
]
ANSWERS = {
    "epsilon": lambda clean, noise, alpha, sigma: noise,
    "v": lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean,
    "flow": lambda clean, noise, alpha, sigma: noise - clean,
}
"""What a perfect network of each prediction answers, as its paper defines it."""

HALVES = (1.6, 2.25)
"""By how much twice the steps divide an error of first order. The low end is for the schedules'
ends: σ rises as √u from the clean one in Stable Diffusion's, and α falls to 0 in flow's."""

every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: repr(p)[:40])


def noise(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@every_process
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 999])
def test_levels_ascend_from_clean_to_the_noisiest(process, steps):
    levels = process.levels(steps)
    assert len(levels) == steps + 1
    assert (levels[0], levels[-1]) == (0, 1)
    assert all(here < there for here, there in pairwise(levels))
    assert process.alpha_sigma(0) == (1, 0)
    sigmas = [process.alpha_sigma(level)[1] for level in levels]
    assert sigmas == sorted(set(sigmas))


@every_process
def test_signal_and_noise_add_up(process):
    for level in process.levels(100):
        alpha, sigma = process.alpha_sigma(level)
        kept = alpha + sigma if isinstance(process, Flow) else alpha**2 + sigma**2
        assert kept == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_splits_into_the_clean_and_the_noise_it_was_made_of(prediction):
    process = Flow() if prediction == "flow" else VariancePreserving(prediction)
    clean, epsilon = noise(2, 4, 4, 4), noise(2, 4, 4, 4, seed=1)
    for level in (0.1, 0.5, 0.9):
        alpha, sigma = process.alpha_sigma(level)
        answer = ANSWERS[prediction](clean, epsilon, alpha, sigma)
        pair = split(process, alpha * clean + sigma * epsilon, answer, level)
        torch.testing.assert_close(pair, (clean, epsilon), rtol=0, atol=1e-9)


def test_an_unknown_prediction_is_answered_with_the_right_ones():
    with pytest.raises(UserError, match=", ".join(PREDICTIONS)):
        split(VariancePreserving("x0"), noise(1, 2), noise(1, 2), 0.5)


def reference_scheduler(prediction="epsilon"):
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        prediction_type=prediction,
    )


def test_variance_preserving_is_the_schedule_of_diffusers():
    process, scheduler = VariancePreserving(), reference_scheduler()
    ours = process.alphas_cumprod[1:].float()
    torch.testing.assert_close(ours, scheduler.alphas_cumprod, rtol=1e-4, atol=0)
    for steps in (1, 2, 4, 5, 8, 10, 20, 25, 30, 40, 50, 100, 250, 1000):
        scheduler.set_timesteps(steps)
        levels = process.levels(steps)[:0:-1]
        assert [process.timestep(u) for u in levels] == scheduler.timesteps.tolist()


@pytest.mark.parametrize(("ours", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_sampling_is_that_of_diffusers_ddim(ours, theirs):
    backbone = GaussianBackbone(mean=0.2, process=VariancePreserving(ours))
    scheduler = reference_scheduler(theirs)
    scheduler.set_timesteps(20)
    expected = latent = noise(3, 4, 16, 16)
    for timestep in scheduler.timesteps:
        output = backbone.network(expected, timestep.item(), backbone.condition([""] * 3))
        expected = scheduler.step(output, timestep, expected, eta=0).prev_sample
    actual = ddim(denoiser(backbone, [""] * 3), backbone.process, latent, 20, lambda: None)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_sampling_is_that_of_diffusers_euler(shift):
    backbone = GaussianBackbone(mean=0.2, process=Flow(shift))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[k / 20 for k in range(20, 0, -1)])
    expected = latent = noise(3, 4, 16, 16)
    for timestep in scheduler.timesteps:
        output = backbone.network(expected, timestep.item(), backbone.condition([""] * 3))
        expected = scheduler.step(output, timestep, expected).prev_sample
    actual = ddim(denoiser(backbone, [""] * 3), backbone.process, latent, 20, lambda: None)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@every_process
def test_the_exact_network_answers_the_posterior_mean(process):
    """Where data and noise are jointly Gaussian, the answer is the linear regression on z."""
    backbone, mean, std = GaussianBackbone(mean=0.3, std=0.7, process=process), 0.3, 0.7
    for level in process.levels(5)[1:]:
        alpha, sigma = process.alpha_sigma(level)
        latent = noise(2, 4, 16, 16)
        gain = 1 / (alpha**2 * std**2 + sigma**2)
        clean = mean + alpha * std**2 * gain * (latent - alpha * mean)
        epsilon = sigma * gain * (latent - alpha * mean)
        found = denoiser(backbone, ["", ""])(latent, level)
        torch.testing.assert_close(found, (clean, epsilon), rtol=0, atol=1e-9)


def errors_by_steps(error):
    return [error(steps) for steps in (25, 50, 100, 200)]


@every_process
@pytest.mark.parametrize("method", INVERTERS)
def test_the_error_of_inversion_halves_with_twice_the_steps(process, method):
    backbone = GaussianBackbone(mean=0.2, process=process)
    clean = 0.2 + noise(4, 4, 16, 16)

    def error(steps):
        latent = INVERTERS[method](steps)(denoiser(backbone, [""] * 4), process, clean)
        return (latent - backbone.transport(clean)).square().mean().sqrt().item()

    errors = errors_by_steps(error)
    assert errors[-1] < 0.05
    for coarse, fine in pairwise(errors):
        assert HALVES[0] < coarse / fine < HALVES[1]


@every_process
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_of_sampling_halves_with_twice_the_steps(process, solver):
    backbone = GaussianBackbone(mean=0.2, std=0.5, process=process)
    clean = 0.2 + 0.5 * noise(4, 4, 16, 16)

    def error(steps):
        denoise, start = denoiser(backbone, [""] * 4), backbone.transport(clean)
        back = SOLVERS[solver](denoise, process, start, steps, lambda: None)
        return (back - clean).square().mean().sqrt().item()

    errors = errors_by_steps(error)
    assert errors[-1] < 0.05
    for coarse, fine in pairwise(errors):
        assert HALVES[0] < coarse / fine < HALVES[1]


@every_process
def test_the_error_of_the_round_trip_halves_with_twice_the_steps(process):
    backbone = GaussianBackbone(std=0.5, process=process)
    images = 0.5 + 0.2 * noise(4, 4, 16, 16, dtype=torch.float32).clamp(-2.5, 2.5)

    def error(steps):
        back = sample(backbone, invert(backbone, images, steps=steps), steps=steps)
        return (back - images).square().mean().sqrt().item()

    errors = errors_by_steps(error)
    assert errors[-1] < 0.02
    for coarse, fine in pairwise(errors):
        assert HALVES[0] < coarse / fine < HALVES[1]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_batch_size_changes_nothing_for_exact_arithmetic_rows(batch_size):
    backbone = GaussianBackbone()
    images = torch.rand(7, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = invert(backbone, images, steps=3)
    torch.testing.assert_close(invert(backbone, images, steps=3, batch_size=batch_size), whole)
    back = sample(backbone, whole, steps=3)
    torch.testing.assert_close(sample(backbone, whole, steps=3, batch_size=batch_size), back)


IMAGES, LATENTS = torch.full((3, 4, 16, 16), 0.5), torch.zeros(3, 4, 16, 16)
FAULTS = {
    "unknown solver": (lambda b: sample(b, LATENTS, solver="heun"), "ddim, euler"),
    "unknown method": (lambda b: invert(b, IMAGES, method="edict"), "ddim"),
    "wrong shape": (lambda b: sample(b, LATENTS[:, :3]), "(N, 4, 16, 16)"),
    "no sampling step": (lambda b: sample(b, LATENTS, steps=0), "1 solver step"),
    "no inversion step": (lambda b: invert(b, IMAGES, steps=0), "1 solver step"),
    "8-bit pixels": (lambda b: invert(b, IMAGES * 255), "[0, 1]"),
    "negative pixels": (lambda b: invert(b, IMAGES - 1), "[0, 1]"),
    "NaN pixels": (lambda b: invert(b, IMAGES * math.nan), "[0, 1]"),
    "prompts to sample": (lambda b: sample(b, LATENTS, ["", ""]), "3 prompts"),
    "prompts to invert": (lambda b: invert(b, IMAGES, [""] * 4), "3 prompts"),
    "no batch to sample": (lambda b: sample(b, LATENTS, batch_size=0), "batch"),
    "no batch to invert": (lambda b: invert(b, IMAGES, batch_size=0), "batch"),
    "negative batch": (lambda b: sample(b, LATENTS, batch_size=-1), "batch"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_argument_is_refused_in_a_sentence(fault):
    call, words = FAULTS[fault]
    with pytest.raises(UserError) as caught:
        call(GaussianBackbone())
    assert words in str(caught.value)


def test_no_images_have_no_latents_and_no_latents_no_images():
    backbone = GaussianBackbone()
    assert invert(backbone, IMAGES[:0]).shape == (0, 4, 16, 16)
    assert sample(backbone, LATENTS[:0]).shape == (0, 4, 16, 16)


def test_backbones_that_differ_have_fingerprints_that_differ():
    variants = [
        GaussianBackbone(),
        GaussianBackbone(mean=0.1),
        GaussianBackbone(std=0.1),
        GaussianBackbone(latent_shape=(1, 8, 8)),
        GaussianBackbone(mean=torch.zeros(4, 16, 16)),
        GaussianBackbone(
            mean=torch.zeros(4, 16, 16).index_put([torch.tensor([1])], torch.ones(()))
        ),
        *(GaussianBackbone(process=process) for process in PROCESSES[1:]),
    ]
    seen = [variant.fingerprint for variant in variants]
    assert all(one != other for n, one in enumerate(seen) for other in seen[:n])


def test_an_unknown_backbone_is_answered_with_the_right_ones():
    with pytest.raises(UserError, match=", ".join(BACKBONES)):
        load_backbone("sd42")
