"""Inversions against the exact Gaussian model, and what each is for."""

import pytest
import torch

from augment import UserError, invert, sample
from augment.core.rng import normal, rng
from augment.diffusion.backbone import LIMITS, denoiser
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.diffusion.process import Flow, VariancePreserving
from augment.diffusion.solver import SOLVERS
from augment.inversion import INVERTERS, FixedPoint, Inverter, inverted, inverter
from augment.inversion.fireflow import FireFlow
from augment.measure import latent_statistics
from augment.sources import Folder
from augment.sources.fashion import write_fashion

FIRST, SECOND = 1.6, 2.8
ORDERS = {
    "ddim": FIRST,
    "published_ddim": FIRST,
    "negative_prompt": FIRST,
    "fixed_point": SECOND,
    "midpoint": SECOND,
    "fireflow": SECOND,
}
"""By how much twice the steps divide the error of the round trip, at least."""

EXEMPT = {
    "forward_start": "draws noise: an image comes back changed by what the noise drowned",
    "null_text": "is about guidance, which the Gaussian model does not have",
    "noise": "inverts nothing",
}
PROCESSES = {
    "epsilon": VariancePreserving("epsilon"),
    "v": VariancePreserving("v"),
    "v to zero SNR": VariancePreserving("v", zero_terminal_snr=True),
    "v, leading": VariancePreserving("v", spacing="leading", offset=1, clean_end=False),
    "flow": Flow(),
    "flow, shift 3": Flow(shift=3.0),
    "flow, linspace": Flow(shift=3.0, spacing="linspace"),
}


def noise(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rms(x):
    return x.square().mean().sqrt().item()


def test_every_inversion_has_a_law_or_a_reason_and_the_members_of_the_protocol():
    assert set(ORDERS) | set(EXEMPT) == set(INVERTERS)
    for name in INVERTERS:
        made = inverter(name, steps=7)
        assert isinstance(made, Inverter)
        assert made.solver in SOLVERS
        assert made.steps == 7
        assert (made.evaluations > 0) == (name != "noise")


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ORDERS)
def test_images_come_back_better_with_more_steps(name, process):
    backbone = GaussianBackbone(mean=0.2, std=0.5, process=PROCESSES[process])
    clean = 0.2 + 0.5 * noise(4, 4, 16, 16)

    def error(steps):
        run, denoise = inverter(name, steps=steps), denoiser(backbone, [""] * 4)
        latents = run(denoise, clean)["latents"]
        levels = backbone.process.levels(steps)[::-1]
        return rms(SOLVERS[run.solver](denoise, latents, levels, lambda: None) - clean)

    errors = [error(steps) for steps in (25, 50, 100, 200)]
    assert errors[-1] < 0.02
    assert errors[0] > ORDERS[name] ** 3 * errors[-1]


@pytest.mark.parametrize("process", [name for name in PROCESSES if "leading" not in name])
@pytest.mark.parametrize("name", ORDERS)
def test_latents_go_to_the_exact_ones(name, process):
    backbone = GaussianBackbone(mean=0.2, std=0.5, process=PROCESSES[process])
    clean = 0.2 + 0.5 * noise(4, 4, 16, 16)

    def error(steps):
        latents = inverter(name, steps=steps)(denoiser(backbone, [""] * 4), clean)["latents"]
        return rms(latents - backbone.transport(clean))

    coarse, fine = error(25), error(200)
    assert fine < 0.06
    assert fine < max(coarse / 2, 1e-4)


@pytest.mark.parametrize("name", INVERTERS)
def test_network_evaluations_are_as_many_as_promised(name):
    calls = 0

    class Counting(GaussianBackbone):
        def network(self, latent, timestep, condition):
            nonlocal calls
            calls += 1
            return super().network(latent, timestep, condition) + 0 * condition["text"].sum()

    run = inverter(name, steps=6)
    prompts = "a" if name == "null_text" else None
    inverted(run, Counting(), torch.full((1, 4, 16, 16), 0.4), prompts)
    # null-text stops early; and one evaluation with its gradient was counted as three
    assert calls == run.evaluations if name != "null_text" else 6 <= calls <= run.evaluations


def test_better_at_equal_evaluations_by_second_order_and_by_a_fixed_point():
    backbone = GaussianBackbone(mean=0.2, std=0.5)
    images = (0.6 + 0.25 * noise(4, 4, 16, 16, dtype=torch.float32)).clamp(0, 1)

    def error(name, **settings):
        run = inverter(name, **settings)
        assert run.evaluations <= 51
        latents = inverted(run, backbone, images)["latents"]
        return rms(sample(backbone, latents, solver=run.solver, steps=run.steps) - images)

    plain = error("ddim", steps=50)
    assert error("fixed_point", steps=25, iterations=2) < plain / 10
    assert error("midpoint", steps=25) < plain / 10
    assert error("fireflow", steps=50) < error("midpoint", steps=25) / 2


@pytest.mark.parametrize("process", PROCESSES)
def test_the_fixed_point_is_the_preimage_of_the_samplers_step(process):
    backbone, clean = GaussianBackbone(std=0.5, process=PROCESSES[process]), 0.5 * noise(2, 4, 8, 8)
    denoise = denoiser(backbone, ["", ""])
    latents = FixedPoint(steps=10, iterations=40)(denoise, clean)["latents"]
    back = SOLVERS["ddim"](denoise, latents, backbone.process.levels(10)[::-1], lambda: None)
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-9)


def test_midpoint_of_flow_is_rf_solver():
    """x + h·v + ½h²·v', with the derivative of v from half a step (Wang et al., 2411.04746)."""
    backbone = GaussianBackbone(mean=0.3, std=0.5, process=Flow())
    latent, (high, low) = noise(2, 4, 8, 8), (0.8, 0.6)

    def velocity(z, level):
        return backbone.network(z, 1000 * level, backbone.condition(["", ""]))

    h, here = low - high, velocity(latent, high)
    slope = (velocity(latent + h / 2 * here, (high + low) / 2) - here) / (h / 2)
    expected = latent + h * here + 0.5 * h**2 * slope
    actual = SOLVERS["midpoint"](denoiser(backbone, ["", ""]), latent, (high, low), lambda: None)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_forward_start_is_noise_mixed_in_and_belongs_to_the_image():
    backbone = GaussianBackbone()
    images = torch.rand(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    run = inverter("forward_start", steps=1000, start=0.999)
    whole = inverted(run, backbone, images, seeds=[5, 6, 7])["latents"]
    alpha, sigma = backbone.process.alpha_sigma(0.999)
    expected = alpha * backbone.encode(images[1:2])[0] + sigma * normal(
        rng(6, "forward"), 4, 16, 16
    )
    torch.testing.assert_close(whole[1], expected, rtol=0, atol=0.02)  # and one DDIM step
    alone = inverted(run, backbone, images[1:2], seeds=[6])["latents"]
    torch.testing.assert_close(whole[1:2], alone)
    other = inverted(run, backbone, images, seeds=[5, 8, 7])["latents"]
    assert (other - whole).flatten(1).norm(dim=1)[1] > 10
    plain = inverter("forward_start", steps=10, start=0.0)
    expected = invert(backbone, images, inversion="fireflow", steps=10)
    torch.testing.assert_close(inverted(plain, backbone, images)["latents"], expected)


@pytest.mark.parametrize("steps", [1, 3, 25, 40])
def test_forward_start_begins_at_its_level_whatever_the_grid(steps):
    backbone, levels = GaussianBackbone(), []
    denoise = denoiser(backbone, [""])

    class Watched(type(denoise)):
        def __call__(self, latent, level):
            levels.append(level)
            return super().__call__(latent, level)

    watched = Watched(backbone, denoise.condition)
    inverter("forward_start", steps=steps)(watched, noise(1, 4, 8, 8), seeds=[0])
    assert levels[0] == 0.04
    assert min(levels[1:]) > 0.04
    assert len(levels) == inverter("forward_start", steps=steps).evaluations


def test_latents_of_a_forward_start_are_as_white_as_noise(tiny, tmp_path):
    """What it is for: on real pictures, the norm and the neighbours of noise."""
    source = Folder(write_fashion(tmp_path, "shots", [0, 1]))
    ids = [image_id for members in source.ids.values() for image_id in members]
    images = torch.stack([source.load(image_id, 1, 32) for image_id in ids])
    plain, started = (
        latent_statistics(invert(tiny, images, inversion=name))
        for name in ("ddim", "forward_start")
    )
    assert plain.norm < 0.93
    assert started.norm == pytest.approx(1, abs=0.03)
    for direction in ("horizontal", "vertical"):
        assert abs(getattr(started, direction)) < 0.5 * abs(getattr(plain, direction))


class Small(GaussianBackbone):
    """A backbone whose memory holds ``room`` rows of the network."""

    room, sizes = 4, ()

    def network(self, latent, timestep, condition):
        if len(latent) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.sizes = (*self.sizes, len(latent))
        return super().network(latent, timestep, condition)


def test_a_batch_that_does_not_fit_is_halved_and_the_size_remembered():
    images = torch.rand(20, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    backbone = Small()
    latents = invert(backbone, images, inversion="ddim", steps=1, batch_size=16)
    assert backbone.sizes == (4, 4, 4, 4, 4)
    expected = invert(GaussianBackbone(), images, inversion="ddim", steps=1)
    torch.testing.assert_close(latents, expected)
    assert LIMITS[backbone]["invert by DDIM"] == 4
    backbone.sizes = ()
    invert(backbone, images[:6], inversion="ddim", steps=1, batch_size=64)
    assert backbone.sizes == (4, 2)
    backbone.room = 0
    with pytest.raises(UserError, match="memory for one image"):
        sample(backbone, latents, steps=1)


def test_an_image_has_its_own_latent_and_its_own_noise(tiny, tmp_path):
    """In any batch, by default: else latents made one by one would share their noise."""
    images = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = invert(tiny, images, steps=5)
    alone = torch.cat([invert(tiny, image[None], steps=5) for image in images])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-3)
    seeded = invert(tiny, images, steps=5, seeds=[0, 0, 1, 1])
    assert (seeded - whole).abs().max() > 0.1


def test_a_start_beyond_the_grid_is_refused():
    leading = GaussianBackbone(process=VariancePreserving(spacing="leading", offset=1))
    with pytest.raises(UserError, match="last level of 10 steps"):
        invert(leading, torch.full((1, 4, 16, 16), 0.5), steps=10, start=0.95)


def test_fireflow_takes_one_evaluation_a_step():
    assert FireFlow(steps=10).evaluations == 11
