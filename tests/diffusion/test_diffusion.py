"""Process, solver and inversion against diffusers and against the exact Gaussian model."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch

from augment import UserError, invert, load_backbone, sample
from augment.diffusion import BACKBONES
from augment.diffusion.backbone import denoiser
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.diffusion.process import PREDICTIONS, Flow, VariancePreserving, split
from augment.diffusion.solver import SOLVERS, ddim, dpm

PROCESSES = [
    VariancePreserving("epsilon"),
    VariancePreserving("v"),
    VariancePreserving("v", zero_terminal_snr=True),
    Flow(),
    Flow(shift=3.0),
]
ANSWERS = {
    "epsilon": lambda clean, noise, alpha, sigma: noise,
    "v": lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean,
    "flow": lambda clean, noise, alpha, sigma: noise - clean,
}
"""What a perfect network of each prediction answers, as its paper defines it."""

FIRST, SECOND = 1.6, 2.8
"""By how much twice the steps divide the error of a method of that order, at least."""

ORDERS = {"ddim": FIRST, "dpm++": FIRST, "midpoint": SECOND, "fireflow": SECOND}
"""Of each solver; DPM-Solver++(2M) ends with a step of first order, as diffusers has it."""

NAMES = ["epsilon", "v", "v to zero SNR", "flow", "flow, shift 3"]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=NAMES)


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
    actual = ddim(denoiser(backbone, [""] * 3), latent, backbone.process.levels(20)[::-1])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("ours", "theirs"), [("epsilon", "epsilon"), ("v", "v_prediction")])
def test_sampling_is_that_of_diffusers_euler(ours, theirs):
    """In k-diffusion's coordinates z/α, on the grid of SDXL's scheduler file."""
    process = VariancePreserving(ours, spacing="leading", offset=1)
    backbone = GaussianBackbone(mean=0.2, process=process)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
        timestep_spacing="leading", steps_offset=1, prediction_type=theirs,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    latent = noise(3, 4, 16, 16, dtype=torch.float32)
    expected = latent * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(expected, timestep)
        output = backbone.network(scaled, timestep.item(), backbone.condition([""] * 3))
        expected = scheduler.step(output, timestep, expected).prev_sample
    actual = SOLVERS["ddim"](
        denoiser(backbone, [""] * 3), latent, process.levels(20)[::-1], lambda: None
    )
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
    actual = ddim(denoiser(backbone, [""] * 3), latent, backbone.process.levels(20)[::-1])
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
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_error_of_sampling_falls_with_the_steps_as_the_order_says(process, solver):
    backbone = GaussianBackbone(mean=0.2, std=0.5, process=process)
    clean = 0.2 + 0.5 * noise(4, 4, 16, 16)

    def error(steps):
        levels, start = process.levels(steps)[::-1], backbone.transport(clean)
        back = SOLVERS[solver](denoiser(backbone, [""] * 4), start, levels, lambda: None)
        return (back - clean).square().mean().sqrt().item()

    errors = errors_by_steps(error)
    assert errors[-1] < 0.02
    assert errors[0] > ORDERS[solver] ** 3 * errors[-1]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("steps", [3, 10, 20, 25])
def test_sampling_is_that_of_diffusers_dpm_solver(prediction, steps):
    backbone = GaussianBackbone(mean=0.2, process=VariancePreserving(prediction))
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        reference_scheduler("v_prediction" if prediction == "v" else prediction).config
    )
    scheduler.set_timesteps(steps)
    levels = backbone.process.levels(steps)[::-1]
    assert [backbone.process.timestep(u) for u in levels[:-1]] == scheduler.timesteps.tolist()
    expected = latent = noise(3, 4, 16, 16, dtype=torch.float32)
    for timestep in scheduler.timesteps:
        output = backbone.network(expected, timestep.item(), backbone.condition([""] * 3))
        expected = scheduler.step(output, timestep, expected).prev_sample
    actual = dpm(denoiser(backbone, [""] * 3), latent, levels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"spacing": "leading", "offset": 1, "clean_end": False},
         {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}),
        ({"spacing": "leading"}, {"timestep_spacing": "leading"}),
        ({"spacing": "linspace"}, {"timestep_spacing": "linspace"}),
        ({"betas": "linear", "beta_start": 1e-4, "beta_end": 0.02},
         {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        ({"prediction": "v", "zero_terminal_snr": True},
         {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ],
    ids=["leading, as SD 1", "leading", "linspace", "linear betas", "zero terminal SNR"],
)  # fmt: skip
def test_spacings_and_schedules_are_those_of_diffusers(ours, theirs):
    backbone = GaussianBackbone(mean=0.2, process=VariancePreserving(**ours))
    scheduler = diffusers.DDIMScheduler.from_config({
        key: value for key, value in {**reference_scheduler().config, **theirs}.items()
        if key != "_use_default_values"
    })  # fmt: skip
    steps = 1000 if ours.get("spacing") == "linspace" else 20  # see below
    scheduler.set_timesteps(steps)
    levels = backbone.process.levels(steps)[::-1]
    assert [backbone.process.timestep(u) for u in levels[:-1]] == scheduler.timesteps.tolist()
    expected = latent = noise(2, 4, 4, 4)
    # diffusers steps by train_steps // steps whatever its timesteps are, so linspace has to agree
    for timestep in scheduler.timesteps:
        output = backbone.network(expected, timestep.item(), backbone.condition([""] * 2))
        expected = scheduler.step(output, timestep, expected, eta=0).prev_sample
    actual = ddim(denoiser(backbone, [""] * 2), latent, levels)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 7, 28])
def test_flow_linspace_is_the_grid_of_diffusers(steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    process = Flow(shift=3.0, spacing="linspace")
    sigmas = [process.alpha_sigma(level)[1] for level in process.levels(steps)[::-1]]
    torch.testing.assert_close(torch.tensor(sigmas), scheduler.sigmas, rtol=0, atol=1e-6)


@every_process
def test_the_middle_lies_halfway_and_is_a_level_too(process):
    for low, high in pairwise(process.levels(7)):
        middle = process.middle(low, high)
        assert low < middle < high
        ends, here = (process.alpha_sigma(u) for u in (low, high)), process.alpha_sigma(middle)
        if isinstance(process, Flow):
            assert here[1] == pytest.approx(sum(s for _, s in ends) / 2, abs=1e-12)
        else:
            assert math.atan2(*here[::-1]) == pytest.approx(
                sum(math.atan2(s, a) for a, s in ends) / 2, abs=1e-4
            )


def test_zero_terminal_snr_leaves_nothing_clean_and_takes_v_prediction():
    process = VariancePreserving("v", zero_terminal_snr=True)
    assert process.alpha_sigma(1) == (0, 1)
    assert process.alpha_sigma(0.001)[0] == VariancePreserving().alpha_sigma(0.001)[0]
    with pytest.raises(UserError, match="v-prediction"):
        VariancePreserving("epsilon", zero_terminal_snr=True)


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
    "unknown solver": (lambda b: sample(b, LATENTS, solver="heun"), "ddim, dpm"),
    "unknown method": (lambda b: invert(b, IMAGES, inversion="edict"), "ddim"),
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
    "an unknown setting": (lambda b: invert(b, IMAGES, iterations=3), "steps, start"),
    "no iteration": (lambda b: invert(b, IMAGES, inversion="fixed_point", iterations=0), "average"),
    "all noise": (lambda b: invert(b, IMAGES, start=1.0), "[0, 1)"),
    "no inner step": (lambda b: invert(b, IMAGES, inversion="null_text", inner=0), "inner"),
    "null-text of nothing": (lambda b: invert(b, IMAGES, inversion="null_text"), "prompt"),
    "null-text unguided": (
        lambda b: invert(b, IMAGES, "a", inversion="null_text", guidance=1.0),
        "guidance",
    ),
    "an interval upside down": (lambda b: sample(b, LATENTS, interval=(0.8, 0.2)), "interval"),
    "an interval out of range": (lambda b: sample(b, LATENTS, interval=(0, 2.0)), "interval"),
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
        GaussianBackbone(process=VariancePreserving(spacing="leading")),
    ]
    seen = [variant.fingerprint for variant in variants]
    assert all(one != other for n, one in enumerate(seen) for other in seen[:n])


def test_an_unknown_backbone_is_answered_with_the_right_ones():
    with pytest.raises(UserError, match=", ".join(BACKBONES)):
        load_backbone("sd42")
