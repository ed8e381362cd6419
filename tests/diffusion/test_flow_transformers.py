"""Z-Image, FLUX.2 [klein] and FLUX.1 against diffusers' pipelines, on small random models."""

import math
from inspect import signature

import diffusers
import pytest
import torch
import torch.nn.functional as F
from checkpoints import PROMPT, check_batches, flux, flux2, z_image
from conftest import paint
from safetensors.torch import save_file

from augment import Plan, Synthesizer, UserError, fill_bank, load_backbone, sample
from augment.core.errors import AugmentWarning, BankMismatch
from augment.diffusion import Backbone
from augment.diffusion.conditions import mix
from augment.diffusion.usage import PHOTO, Usage
from augment.sources import Folder

MAKERS = {"z-image": z_image, "flux2-klein": flux2, "flux": flux}
OPTIONS = {
    "z-image": {"max_sequence_length": 60},
    "flux2-klein": {"max_sequence_length": 60, "shift_steps": 5},
    "flux": {"max_sequence_length": 40},
}
STEPS, GUIDANCE = 5, 4.5
LONG = "a cat on a mat in a big old barn"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline folder of each kind."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make(root / name) for name, make in MAKERS.items()}


def load(folder, name, **changes):
    return load_backbone(folder, device="cpu", **{"resolution": 32, **OPTIONS[name], **changes})


@pytest.fixture(scope="module")
def backbones(folders):
    return {name: load(folder, name) for name, folder in folders.items()}


def noise(backbone, count=2):
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))


def theirs_of(name, folder, latents):
    """The images of diffusers' pipeline, with prompts of two lengths."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    patches = F.pixel_unshuffle(latents, 2)
    own = {
        "z-image": {"latents": latents, "guidance_scale": GUIDANCE - 1},
        "flux2-klein": {"latents": patches, "guidance_scale": GUIDANCE},
        "flux": {
            "latents": patches.flatten(2).mT,
            "guidance_scale": 3.5,
            "true_cfg_scale": GUIDANCE,
            "negative_prompt": ["", ""],
        },
    }[name]
    length = OPTIONS[name]["max_sequence_length"]
    return pipe(
        prompt=[PROMPT, LONG], height=32, width=32, num_inference_steps=STEPS, output_type="pt",
        max_sequence_length=length, **own,
    ).images  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_a_family_samples_what_diffusers_samples(name, folders, backbones):
    backbone = backbones[name]
    latents = noise(backbone)
    ours = sample(backbone, latents, [PROMPT, LONG], "ddim", STEPS, GUIDANCE)
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs_of(name, folders[name], latents), rtol=0, atol=1e-4)
    other = sample(backbone, latents, [LONG, PROMPT], "ddim", STEPS, GUIDANCE)
    assert (other - ours).abs().max() > 1e-3, "prompts matter"


@pytest.mark.parametrize("name", MAKERS)
def test_a_prompt_has_the_same_rows_and_answer_in_every_batch(name, backbones):
    backbone, prompts = backbones[name], [PROMPT, "", LONG]
    latents = noise(backbone, 3)
    mixed, together = check_batches(backbone, prompts, latents)
    assert together.std() > 0.01
    first = mix(mixed, torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]))
    blended = backbone.network(latents[:1].expand(2, -1, -1, -1), 500.5, first)
    torch.testing.assert_close(blended[:1], together[:1], rtol=0, atol=1e-5)
    assert not torch.allclose(blended[1], blended[0])
    assert len(backbone.condition([])["text"]) == 0


@pytest.mark.parametrize("name", MAKERS)
def test_what_changes_latents_or_images_changes_the_fingerprint(name, folders, backbones):
    backbone, folder = backbones[name], folders[name]
    assert isinstance(backbone, Backbone) and backbone.fingerprint["name"] == name
    assert load_backbone(**backbone.recipe, device="cpu").fingerprint == backbone.fingerprint
    changes = [{}, {"resolution": 16}, {"spacing": "linspace"}]
    changes += {
        "z-image": [],
        "flux2-klein": [{"shift_steps": 28}, {"max_sequence_length": 64}],
        "flux": [{"embedded_guidance": 1.0}, {"max_sequence_length": 64}],
    }[name]
    seen = [load(folder, name, **change).fingerprint for change in changes]
    assert all(one != other for n, one in enumerate(seen) for other in seen[:n])
    if name != "z-image":  # its length changes nothing, and its shift is the file's
        assert len({found["process"] for found in seen[:2]}) == 2
    else:
        assert load(folder, name, max_sequence_length=90).fingerprint == backbone.fingerprint


def test_the_shift_is_the_schedulers_at_this_resolution(backbones, folders, tmp_path):
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
    from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

    dynamic = z_image(tmp_path / "z", use_dynamic_shifting=True, max_shift=1.5)
    linear = flux(tmp_path / "flux", time_shift_type="linear")
    large = load(folders["flux2-klein"], "flux2-klein", resolution=1024)
    for backbone, shift in (
        (backbones["z-image"], 6),
        (load(dynamic, "z-image"), math.exp(calculate_shift(64, max_shift=1.5))),
        (backbones["flux"], math.exp(calculate_shift(64))),
        (load(linear, "flux"), calculate_shift(64)),
        (backbones["flux2-klein"], math.exp(compute_empirical_mu(64, STEPS))),
        (large, math.exp(compute_empirical_mu(256**2, STEPS))),
    ):
        assert backbone.process.shift == pytest.approx(shift, rel=1e-5)


def test_the_statistics_of_flux2_are_those_of_its_batch_norm(backbones):
    backbone = backbones["flux2-klein"]
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    clean, vae = backbone.encode(images), backbone.pipe.vae
    patches = backbone.pipe._encode_vae_image(2 * images - 1, None)
    torch.testing.assert_close(F.pixel_unshuffle(clean, 2), patches, rtol=1e-4, atol=1e-5)
    decoded = vae.decode(vae.encode(2 * images - 1).latent_dist.mode()).sample / 2 + 0.5
    torch.testing.assert_close(backbone.decode(clean), decoded.clamp(0, 1), rtol=0, atol=1e-4)
    assert backbone.encode(images[:0]).shape == (0, *backbone.latent_shape) == (0, 4, 16, 16)


@pytest.mark.filterwarnings("ignore:expected images of about 32")
def test_a_bank_of_another_shift_is_refused(backbones, folders, tmp_path):
    backbone, folder = backbones["flux2-klein"], folders["flux2-klein"]
    photos = Folder(paint(tmp_path / "photos", {"owl": 2}))
    bank = fill_bank(tmp_path / "bank", backbone, photos, None, "ddim", steps=2, stored=())
    assert (bank.guidance, bank.prompt("owl")) == (4.0, "a photo of an owl")
    images = Synthesizer(backbone, bank).images([Plan.equal(0, "owl", bank.members["owl"])])
    assert images.shape == (1, 3, 32, 32) and images.std() > 0.05
    with pytest.raises(BankMismatch, match="process"):
        Synthesizer(load(folder, "flux2-klein", shift_steps=28), bank)


def default(pipeline, name="guidance_scale"):
    return signature(getattr(diffusers, pipeline).__call__).parameters[name].default


def test_families_are_used_as_their_pipelines_are(backbones):
    assert backbones["z-image"].usage == Usage(PHOTO, 1 + default("ZImagePipeline"), 28)
    assert backbones["flux2-klein"].usage == Usage(PHOTO, default("Flux2KleinPipeline"), 28)
    assert backbones["flux"].usage == Usage(PHOTO, default("FluxPipeline", "true_cfg_scale"), 28)
    assert backbones["flux"].embedded_guidance == default("FluxPipeline")


LAYERS = dict.fromkeys(MAKERS, "transformer_blocks.0.attn.to_q")
LAYERS["z-image"] = "layers.0.attention.to_q"


@pytest.mark.parametrize("name", MAKERS)
def test_a_lora_of_the_transformer_is_added(name, folders, backbones, tmp_path):
    path, layer = tmp_path / "lora.safetensors", LAYERS[name]
    weight = backbones[name].net.get_submodule(layer).weight
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    parts = {"lora_A": down, "lora_B": up}
    save_file({f"transformer.{layer}.{k}.weight": v for k, v in parts.items()}, path)
    found = load(folders[name], name, lora=path)
    torch.testing.assert_close(found.net.get_submodule(layer).weight, weight + up @ down)
    assert "lora" in found.fingerprint


DISTILLED = {
    "Z-Image-Turbo": (z_image, {}, "the name .*Turbo"),
    "klein-4B": (flux2, {"distilled": True}, "is_distilled"),
    "FLUX.1-schnell": (flux, {}, "the name .*schnell"),
    "renamed": (flux, {"guided": False, "use_dynamic_shifting": False}, "its levels without"),
}


@pytest.mark.parametrize("model", DISTILLED)
def test_distilled_models_are_warned_of(model, tmp_path):
    make, changes, sign = DISTILLED[model]
    with pytest.warns(AugmentWarning, match=f"few-step one by {sign}.*forgets its noise"):
        backbone = load_backbone(make(tmp_path / model, **changes), device="cpu", resolution=32)
    assert backbone.usage == Usage(PHOTO, 1.0, 4)


@pytest.mark.parametrize("name", MAKERS)
def test_a_prompt_that_would_be_cut_off_is_refused(name, folders):
    backbone = load(folders[name], name)
    with pytest.raises(UserError, match=r"at most \d+ tokens, got \d+ in .*max_sequence_length"):
        backbone.condition([LONG + LONG])
    with pytest.raises(UserError, match="multiple of 4, got 34; this model's own is 1024"):
        load(folders[name], name, resolution=34)
    with pytest.raises(UserError, match=f"CLIP alone for tokens, got {name}; leave"):
        backbone.add_tokens({"<cat>": "cat"}, keep_norm=True)
