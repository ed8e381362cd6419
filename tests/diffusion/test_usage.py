"""What families of models are used with: diffusers' own guidance, templates, few-step models."""

import json
from inspect import signature

import diffusers
import pytest
import torch
from checkpoints import dit, sd3, sdxl, stable_diffusion
from conftest import amend, call, paint

from augment import LatentBank, Plan, Sampling, Synthesizer, load_backbone
from augment.bank.fill import fill_bank
from augment.bank.merge import merge
from augment.core.errors import AugmentWarning, BankMismatch, UserError
from augment.diffusion.usage import PHOTO, Usage, few_step_sign
from augment.sources import Folder, decoding
from augment.synthesis.synthesizer import Undoing, resolve

pytestmark = pytest.mark.filterwarnings("ignore:expected images of about 32")
MAKERS = {
    "StableDiffusionPipeline": stable_diffusion,
    "StableDiffusionXLPipeline": sdxl,
    "StableDiffusion3Pipeline": sd3,
    "DiTPipeline": dit,
}


def default(pipeline, name="guidance_scale"):
    return signature(getattr(diffusers, pipeline).__call__).parameters[name].default


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("sd"), prediction_type="epsilon")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return Folder(paint(tmp_path_factory.mktemp("photos"), {"american_owl": 1, "n01440764": 1}))


@pytest.fixture(scope="module")
def bank(backbone, photos, tmp_path_factory):
    """A bank of all defaults but for the steps."""
    return fill_bank(
        tmp_path_factory.mktemp("bank"), backbone, photos, None, "ddim", steps=2, stored=()
    )


@pytest.mark.parametrize("pipeline", MAKERS)
def test_the_guidance_of_a_family_is_that_of_its_pipeline(pipeline, tmp_path):
    folder = MAKERS[pipeline](tmp_path)
    usage = load_backbone(folder, device="cpu").usage
    if pipeline == "StableDiffusion3Pipeline":
        assert usage == Usage(PHOTO, 4.5, 28)  # of the model cards of 3.5
        assert default(pipeline, "num_inference_steps") == usage.steps
        amend_plain(folder / "transformer/config.json", qk_norm=None)
        usage = load_backbone(folder, device="cpu").usage
    assert usage.guidance == default(pipeline)
    assert usage.template == ("" if pipeline == "DiTPipeline" else PHOTO)


def amend_plain(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_bank_records_template_prompts_and_guidance(bank, backbone):
    assert bank.manifest.usage == Usage(PHOTO, 7.5, 2)
    assert bank.prompt("american_owl") == "a photo of an american owl"
    assert bank.prompt("n01440764") == "a photo of a tench"
    assert bank.inversion["guidance"] == 1 and bank.guidance == 7.5
    assert resolve(bank).guidance == 7.5
    assert resolve(bank, Sampling(guidance=2.0)).guidance == 2
    assert Undoing(backbone, bank).resolved.guidance == 1


def test_default_images_are_those_of_the_pipeline_with_its_default_guidance(bank, folder, backbone):
    synthesizer, name = Synthesizer(backbone, bank), "american_owl"
    plan = Plan.equal(0, name, bank.members[name])
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        bank.prompt(name), height=32, width=32, num_inference_steps=2, output_type="pt",
        latents=synthesizer.centroid(plan)[None],
    ).images  # fmt: skip
    torch.testing.assert_close(synthesizer.images([plan]), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "guidance", "sampled"), [(None, 1.0, 1.0), ({}, None, 1.0), (None, 3.0, 3.0)]
)
def test_prompt_and_guidance_can_be_given(prompts, guidance, sampled, backbone, photos, tmp_path):
    bank = fill_bank(
        tmp_path / "b", backbone, photos, prompts, "ddim", steps=1, guidance=guidance, stored=()
    )
    assert (bank.guidance, any(map(bank.prompt, bank.classes))) == (sampled, prompts is None)


def test_a_bank_grows_and_merges_with_its_own_guidance(backbone, photos, tmp_path):
    settings = dict(inversion="ddim", steps=1, stored=())
    for name, guidance in (("a", 1.0), ("b", None)):
        fill_bank(tmp_path / name, backbone, photos, guidance=guidance, **settings)
    for guidance in (None, 1.0):  # what is not said stays as it is
        fill_bank(tmp_path / "a", backbone, photos, guidance=guidance, **settings)
    assert LatentBank.open(tmp_path / "a").guidance == 1
    with pytest.raises(BankMismatch, match=r"guidance to sample with = 1.0, got"):
        fill_bank(tmp_path / "b", backbone, photos, guidance=1.0, **settings)
    for names in (("a", "b"), ("b", "a")):
        with pytest.raises(BankMismatch, match="guidance to sample with"):
            merge([tmp_path / name for name in names], tmp_path / "out")


def test_a_bank_of_before_is_sampled_without_guidance(bank, backbone, photos, tmp_path):
    old = fill_bank(tmp_path / "b", backbone, photos, None, "ddim", steps=2, stored=())
    amend(old.path / "manifest.json", lambda manifest: manifest.pop("usage"))
    opened = LatentBank.open(old.path)
    assert opened.guidance == 1 and opened.digest == bank.digest
    fill_bank(
        tmp_path / "b", backbone, photos, None, "ddim", steps=2, stored=()
    )  # and it is resumed
    assert LatentBank.open(old.path).guidance == 1


def test_a_bank_without_prompts_is_warned_of_once(backbone, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "WARNED", set())
    bank = fill_bank(tmp_path / "b", backbone, photos, {}, "ddim", steps=1, stored=())
    with pytest.warns(AugmentWarning, match=r"without, .*'a photo of a \{name\}'"):
        Synthesizer(backbone, bank)
    Synthesizer(backbone, bank)


def test_a_bank_of_tiny_is_as_it_was(tiny, pictures, tmp_path):
    bank = fill_bank(tmp_path / "b", tiny, Folder(pictures), steps=1, stored=())
    assert tiny.usage == Usage() and bank.inversion["guidance"] == bank.guidance == 1
    assert b"usage" not in b"".join(p.read_bytes() for p in bank.path.rglob("*.json"))


def test_the_command_line_says_what_it_chose(folder, photos, tmp_path, monkeypatch, capsys):
    invert = ("invert", "--images", photos.root, "--backbone", folder, "--device", "cpu")
    more = ("--steps", 1, "--errors", "false")
    code, output, _ = call(monkeypatch, capsys, *invert, *more, "--bank", tmp_path / "bank")
    line = output.splitlines()[0]
    assert code == 0 and "'a photo of an american owl'" in line and "7.5 to sample" in line
    shards = ("synthesize", tmp_path / "bank", "--out", tmp_path / "s", "--per-class", 1)
    code, output, _ = call(monkeypatch, capsys, *shards, "--device", "cpu")
    assert code == 0 and "guidance 7.5" in output.splitlines()[0]
    made = json.loads((tmp_path / "s" / "synthesis.json").read_text())
    assert made["guidance"] == 7.5 and made["usage"]["template"] == PHOTO
    options = ("--prompt", "", "--guidance", 1, "--bank", tmp_path / "plain")
    code, output, _ = call(monkeypatch, capsys, *invert, *more, *options)
    bank = LatentBank.open(tmp_path / "plain")
    assert code == 0 and bank.manifest.usage is None and not any(map(bank.prompt, bank.classes))


SIGNS = {
    "LCM": ({"scheduler": "LCMScheduler"}, "LCMScheduler"),
    "Turbo": ({"scheduler": "EulerDiscreteScheduler"}, "trailing"),
    "a name": ({"name": "sdxl-lightning"}, "lightning"),
}


@pytest.mark.parametrize("change", SIGNS)
def test_few_step_models_are_warned_of_and_sampled_without_guidance(change, tmp_path):
    changes, sign = SIGNS[change]
    scheduler = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}
    if "scheduler" in changes:
        scheduler = {"_class_name": changes["scheduler"], "timestep_spacing": "trailing"}
    folder = sdxl(tmp_path / changes.get("name", "model"), **scheduler)
    amend_plain(folder / "model_index.json", scheduler=["diffusers", scheduler["_class_name"]])
    with pytest.warns(AugmentWarning, match=f"few-step one by .*{sign}.*forgets its noise"):
        backbone = load_backbone(folder, device="cpu")
    assert backbone.usage == Usage(PHOTO, 1.0, 4)


@pytest.mark.parametrize(
    "name", ["stabilityai/sdxl-turbo", "lcm-lora-sdv1-5", "tianweiy/DMD2", "ByteDance/Hyper-SD"]
)
def test_few_step_models_are_known_by_name(name):
    assert name in few_step_sign({}, None, name)


@pytest.mark.parametrize("name", ["me/turbulence", "/home/turbo/sd15", "flashlights", "x/dmdx"])
def test_other_names_are_not_few_step_models(name):
    usual = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    assert few_step_sign(usual | {"prediction_type": "epsilon"}, name) == ""


def test_usage_without_steps_is_refused():
    with pytest.raises(UserError, match="at least 1 solver step"):
        Usage(steps=0)
