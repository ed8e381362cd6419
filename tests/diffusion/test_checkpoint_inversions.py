"""Inversions on diffusers' networks: small, with random weights, so laws and no quality."""

import pytest
import torch
from checkpoints import PROMPT, flux, flux2, lightningdit, sd3, sit, stable_diffusion, z_image

from augment import load_backbone, sample
from augment.diffusion.conditions import Schedule
from augment.inversion import inverted, inverter

MAKERS = {
    "v": lambda folder: stable_diffusion(folder, prediction_type="v_prediction"),
    "flow": sd3,
    "sit": sit,
    "lightningdit": lightningdit,
    "z-image": lambda folder: z_image(folder, time=0.1, shift=3.0),
    "flux2": flux2,
    "flux": flux,
}
GUIDANCE = 7.5


@pytest.fixture(scope="module", params=MAKERS)
def backbone(request, tmp_path_factory):
    """No Stable Diffusion 1: a random network that predicts noise has no smooth flow."""
    folder = MAKERS[request.param](tmp_path_factory.mktemp("pipelines") / request.param)
    large = {"resolution": 32} if request.param in ("z-image", "flux2", "flux") else {}
    return load_backbone(folder, device="cpu", **large)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def errors(backbone, images, latents, **options):
    """Each image's mean square, against the codec's, which is random too."""
    goal = backbone.decode(backbone.encode(images))
    return (sample(backbone, latents, **options) - goal).square().mean((1, 2, 3))


def round_trip(backbone, images, name, steps):
    run = inverter(name, steps=steps)
    latents = inverted(run, backbone, images)["latents"]
    return errors(backbone, images, latents, steps=steps, solver=run.solver).sqrt().item()


def test_inversion_and_sampling_come_back_the_closer_the_more_steps(backbone, images):
    first, second, third = (round_trip(backbone, images[:1], "ddim", n) for n in (4, 12, 36))
    assert first > 2 * second > 4 * third


@pytest.mark.parametrize("name", ["midpoint", "fireflow", "fixed_point"])
def test_second_order_comes_back_faster(name, backbone, images):
    coarse, fine = (round_trip(backbone, images[:1], name, steps) for steps in (4, 16))
    assert coarse > 6 * fine
    assert round_trip(backbone, images[:1], "ddim", 32) > 5 * fine  # at equal evaluations, or more


def test_null_text_brings_guided_sampling_nearer_to_the_images(backbone, images):
    if backbone.name in ("sit", "lightningdit", "flux", "flux2-klein"):
        pytest.skip("takes no text, or as a random network hardly depends on it")
    run = inverter("null_text", steps=3, inner=2)
    kept = inverted(run, backbone, images, PROMPT, GUIDANCE)
    text = backbone.condition([PROMPT])["text"]
    assert kept["latents"].shape == (2, *backbone.latent_shape)
    assert kept["nulls"].shape == (2, 3, *text.shape[1:])
    assert kept["null_rows"].tolist() == [0, 1]
    assert all(kept[key].isfinite().all() for key in ("latents", "nulls"))
    options = {"prompts": PROMPT, "solver": "ddim", "steps": 3, "guidance": GUIDANCE}
    plain = errors(backbone, images, kept["latents"], **options)
    negative = Schedule.by_step(backbone.process.levels(3), kept["nulls"])
    repaired = errors(backbone, images, kept["latents"], negative=negative, **options)
    assert (repaired < 0.95 * plain).all()
