"""References: conditions by images, from an IP-Adapter through a bank to images and shards."""

import io
from dataclasses import replace
from itertools import pairwise

import diffusers
import pytest
import torch
from checkpoints import PROMPT, ip_adapter, sdxl, stable_diffusion
from conftest import call, paint, snapshot
from PIL import Image
from safetensors.torch import load_file, save_file

from augment import (
    BankMismatch,
    LatentBank,
    Mixing,
    Plan,
    Rule,
    Sampling,
    Synthesizer,
    SyntheticDataset,
    UserError,
    load_backbone,
    open_shards,
    sample,
)
from augment.bank.fill import fill_bank
from augment.bank.merge import merge
from augment.diffusion.backbones.tiny import Tiny
from augment.diffusion.conditions import Referred, Schedule
from augment.diffusion.process import split
from augment.report.provenance import Provenance
from augment.shards.format import read_settings
from augment.shards.write import write_shards
from augment.sources import Folder
from augment.sources.fashion import write_fashion
from augment.synthesis.synthesizer import Undoing, planner_of

STEPS, SCALE = 5, 0.7
MAKERS = {"stable-diffusion": stable_diffusion, "sdxl": sdxl}
OPTIONS = {"stable-diffusion": {"spacing": "leading", "clean_end": False}, "sdxl": {}}
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return Folder(paint(tmp_path_factory.mktemp("photos"), {"ant": 3, "bee": 1}, size=32))


@pytest.fixture(scope="module", params=["plain", "plus"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=MAKERS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def parts(family, kind, tmp_path_factory):
    """A pipeline's folder, its IP-Adapter, the backbone of both, and diffusers' pipeline."""
    root = tmp_path_factory.mktemp("parts")
    folder = MAKERS[family](root / "model")
    file = ip_adapter(root / "adapter", folder, kind)
    options = {"spacing": "leading"} | OPTIONS[family]
    backbone = load_backbone(
        folder, device="cpu", ip_adapter=file, ip_adapter_scale=SCALE, **options
    )
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(root / "adapter"), subfolder="", weight_name=file.name)
    pipe.set_ip_adapter_scale(SCALE)
    return folder, file, backbone, pipe


def embeds(pipe, photos, ids, hidden):
    """Embed image files by diffusers; return them, and what it has for no image."""
    images = [Image.open(io.BytesIO(photos.read(i))).convert("RGB") for i in ids]
    with torch.no_grad():
        return pipe.encode_image(images, "cpu", 1, hidden)


def drawn(pipe, latents, references, none, guidance):
    """Sample latents one by one by diffusers."""
    images = []
    for row, reference in enumerate(references):
        rows = torch.stack([none[0], reference] if guidance > 1 else [reference])
        images += pipe(
            PROMPT, latents=latents[row : row + 1], num_inference_steps=STEPS,
            guidance_scale=guidance, height=32, width=32, output_type="pt",
            ip_adapter_image_embeds=[rows[:, None]],
        ).images  # fmt: skip
    return torch.stack(images)


def photos_of(photos, ids):
    return torch.stack([photos.load(i, 3, 32) for i in ids])


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_images_are_those_of_diffusers_by_one_reference_and_by_a_mixture(
    guidance, parts, kind, photos, tmp_path
):
    _, _, backbone, pipe = parts
    prompts = dict.fromkeys(photos.classes, PROMPT)
    bank = fill_bank(tmp_path / "bank", backbone, photos, prompts, "ddim", steps=STEPS, stored=())
    ids = bank.members["ant"]
    mixed = Plan(0, "ant", ids, WEIGHTS, 0.0, 0, 0, 0)
    plans = [Plan.equal(0, "ant", ids[1:2]), mixed, replace(mixed, noise=0.25)]
    made = Synthesizer(backbone, bank, sampling=Sampling(guidance=guidance))
    theirs, none = embeds(pipe, photos, ids, kind == "plus")
    torch.testing.assert_close(backbone.refer(photos_of(photos, ids)), theirs, rtol=0, atol=1e-5)
    theirs = theirs.half().float()
    mean = sum(w * row for w, row in zip(WEIGHTS, theirs, strict=True))
    latents = made.mix(plans).centroids
    expected = drawn(pipe, latents, [theirs[1], mean, mean], none, guidance)
    images = made.images(plans)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-4)
    plain = sample(backbone, latents, PROMPT, "ddim", STEPS, guidance)
    assert (plain - images).abs().max() > 0.01, "references change the images"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline's folder, and its IP-Adapter."""
    root = tmp_path_factory.mktemp("model")
    folder = stable_diffusion(root / "model")
    return folder, ip_adapter(root / "adapter", folder)


@pytest.fixture(scope="module")
def backbone(model):
    return load_backbone(model[0], device="cpu", ip_adapter=model[1])


@pytest.fixture(scope="module")
def prompts(photos):
    return dict.fromkeys(photos.classes, PROMPT)


@pytest.fixture(scope="module")
def sd_bank(backbone, photos, prompts, tmp_path_factory):
    where = tmp_path_factory.mktemp("bank")
    return fill_bank(where, backbone, photos, prompts, "ddim", steps=2, stored=())


class Described(Tiny):
    """The embedded backbone with references of 16 grey levels, which add to its prompts."""

    def __init__(self):
        super().__init__()
        self.fingerprint["reference"] = "grey levels"
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(16, 128, generator=generator) * self.texts.std()

    def refer(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    def condition(self, prompts):
        return {**super().condition(prompts), "reference": torch.zeros(len(prompts), 16)}

    def network(self, latent, timestep, condition):
        text = condition["text"] + condition["reference"] @ self.weight
        return super().network(latent, timestep, {"text": text})


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """A coat."""
    root = write_fashion(tmp_path_factory.mktemp("clothes"), "shots", [0])
    source = Folder(root)
    source.ids = {"Coat": source.ids["Coat"]}
    return source


def psnr(images, others):
    return -10 * (images - others).square().mean((1, 2, 3)).log10()


@pytest.mark.parametrize("method", ["fixed_point", "negative_prompt", "null_text"])
def test_an_image_is_inverted_with_its_own_reference_and_comes_back_with_it(
    method, clothes, tmp_path
):
    """A backbone of two methods more than tiny has: nothing else knows what a reference is."""
    backbone, guidance = Described(), 1.0 if method == "fixed_point" else 5.0
    how = {"steps": 8, "guidance": guidance}
    bank = fill_bank(tmp_path / "bank", backbone, clothes, {"Coat": "top"}, method, **how)
    ids, rows = bank.members["Coat"], bank.references("Coat")
    pixels = torch.stack([clothes.load(i, 1, 32) for i in ids])
    assert torch.equal(rows, backbone.refer(pixels).half().float())
    back = Undoing(backbone, bank).images([Plan.equal(0, "Coat", [i]) for i in ids])
    errors = (back - pixels).square().mean((1, 2, 3))
    torch.testing.assert_close(bank.errors("Coat"), errors, rtol=1e-2, atol=1e-6)
    words = "top" if method == "fixed_point" else Referred("top", rows)
    other = sample(backbone, bank.latents("Coat"), words, "ddim", 8, guidance)
    least = 2 if method == "null_text" else 3
    assert psnr(back, pixels) > psnr(other, pixels) + least, "without, or guided from none"


def test_references_go_with_schedules_intervals_and_embeddings(backbone, sd_bank):
    """By hand: one prompt with its reference above level 0.5, another without at and below it."""
    latent = sd_bank.latents("ant")[:2]
    references = sd_bank.references("ant")[:2]
    given = Referred(Schedule(((0.5, "a cat"), (0.0, "a mat"))), references)
    fading = Schedule(((0.5, Referred("a cat", references)), (0.0, "a mat")))
    found = sample(backbone, latent, given, "ddim", 3)
    faded = sample(backbone, latent, fading, "ddim", 3)
    none = backbone.condition([""])["reference"].expand(2, -1)
    for images, last in ((found, references), (faded, none)):
        z, levels = latent, backbone.process.levels(3)[::-1]
        with torch.no_grad():
            for here, there in pairwise(levels):
                above = here > 0.5
                condition = backbone.condition(["a cat" if above else "a mat"] * 2)
                condition["reference"] = references if above else last
                output = backbone.network(z, backbone.process.timestep(here), condition)
                clean, noise = split(backbone.process, z, output, here)
                alpha, sigma = backbone.process.alpha_sigma(there)
                z = alpha * clean + sigma * noise
        torch.testing.assert_close(images, backbone.decode(z), rtol=0, atol=1e-4)
    assert (found - faded).abs().max() > 1e-3
    words = Referred(backbone.condition(["a cat"]), references)
    how = {"solver": "ddim", "steps": 3}
    as_text = sample(backbone, latent, Referred("a cat", references), **how)
    torch.testing.assert_close(sample(backbone, latent, words, **how), as_text, rtol=0, atol=1e-5)
    never = {"guidance": 7.5, "interval": (0.0, 0.0)}
    unguided = sample(backbone, latent, Referred("a cat", references), **how, **never)
    torch.testing.assert_close(unguided, as_text, rtol=0, atol=1e-5)


def test_nin_mixes_at_the_weighted_norm_and_of_one_member_both_are_its_own(backbone, sd_bank):
    ids, rows = sd_bank.members["ant"], sd_bank.references("ant")
    plan = Plan(0, "ant", ids, WEIGHTS, 0.0, 0, 0, 0)
    lin, nin = (Synthesizer(backbone, sd_bank, reference_rule=rule) for rule in ("lin", "nin"))
    weights = torch.tensor(WEIGHTS)
    torch.testing.assert_close(lin.reference_of(plan), weights @ rows)
    torch.testing.assert_close(nin.reference_of(plan).norm(), weights @ rows.norm(dim=1))
    assert torch.cosine_similarity(nin.reference_of(plan), weights @ rows, dim=0) > 0.9999
    for made in (lin, nin):
        alone = made.reference_of(Plan.equal(0, "ant", ids[:1]))
        torch.testing.assert_close(alone, rows[0])


def test_a_bank_is_of_one_adapter_one_scale_and_one_encoder(model, sd_bank, tmp_path):
    folder, file = model
    other = ip_adapter(tmp_path / "other", folder, seed=1)
    encoder = {"image_encoder": tmp_path / "other" / "image_encoder"}
    for options in (
        {}, {"ip_adapter": file, "ip_adapter_scale": 0.5}, {"ip_adapter": other},
        {"ip_adapter": file, **encoder},
    ):  # fmt: skip
        strange = load_backbone(folder, device="cpu", **options)
        with pytest.raises(BankMismatch, match=r"to be made with reference = .*make another bank"):
            sd_bank.check(strange)
    again = load_backbone(**sd_bank.recipe, device="cpu")
    sd_bank.check(again)
    assert again.recipe == {"name_or_path": str(folder), "ip_adapter": str(file)}


def test_shards_record_the_rule_and_each_image_can_be_made_again(backbone, sd_bank, tmp_path):
    lines = tmp_path / "contexts.txt"
    lines.write_text("on a beach\nat dusk\n")
    mixing = Mixing(reference_rule="nin", contexts=str(lines))
    made = Synthesizer(backbone, sd_bank, Rule.parse("fade/chm"), reference_rule="nin")
    write_shards(made, planner_of(sd_bank, mixing), 1, tmp_path / "out", extension="png")
    shards, settings = open_shards(tmp_path / "out"), read_settings(tmp_path / "out")
    assert settings.reference_rule == settings.mixing.reference_rule == "nin"
    assert settings.fingerprint["backbone"]["reference"] == backbone.fingerprint["reference"]
    about = shards.about(0)
    assert about["reference_rule"] == "nin"
    assert about["backbone"]["reference"] == backbone.fingerprint["reference"]
    again = made.images([shards.plan(row) for row in range(2)])
    stored = torch.stack([shards[row][0] for row in range(2)])
    torch.testing.assert_close(again, stored, rtol=0, atol=1.1 / 255)
    code = Provenance.of(sd_bank, tmp_path / "out").python(shards.plan(0), "fade/chm", 0)
    assert "reference_rule" not in code or "'nin'" in code
    with pytest.raises(UserError, match=r"got images of others \(reference_rule\)"):
        other = Synthesizer(backbone, sd_bank, Rule.parse("fade/chm"))
        write_shards(other, planner_of(sd_bank, mixing), 1, tmp_path / "out", extension="png")


def test_references_are_bound_to_their_digest_grow_and_merge(
    backbone, sd_bank, photos, prompts, tmp_path, monkeypatch, capsys
):
    merged = merge([sd_bank.path], tmp_path / "merged")
    torch.testing.assert_close(merged.references("bee"), sd_bank.references("bee"))
    assert merged.digest == sd_bank.digest
    before = snapshot(tmp_path / "merged")
    fill_bank(tmp_path / "merged", backbone, photos, prompts, "ddim", steps=2, stored=())
    assert snapshot(tmp_path / "merged") == before, "nothing is left to do"
    file = tmp_path / "merged" / "0000" / "chunk-0000.references.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"chunk-0000.references.safetensors.*other bytes"):
        LatentBank.open(tmp_path / "merged").references("ant")
    code, out, _ = call(monkeypatch, capsys, "verify", tmp_path / "merged")
    assert code == 2 and "chunk-0000.references.safetensors" in out


def broken(file, place, change):
    """Write an IP-Adapter with other tensors beside the same image encoder."""
    (place / "image_encoder").symlink_to(file.parent / "image_encoder")
    state = change(load_file(file))
    save_file({key: value.contiguous() for key, value in state.items()}, place / "a.safetensors")
    return place / "a.safetensors"


def without(state, part):
    return {key: value for key, value in state.items() if part not in key}


ODD = {
    "FaceID": (lambda s: without(s, "proj.weight"), "FaceID is another kind"),
    "a LoRA": (lambda s: s | {"lora.down": torch.ones(1)}, "a tensor 'lora.down'"),
    "of no layers": (lambda s: without(s, "ip_adapter"), "no projection"),
    "of fewer layers": (lambda s: without(s, "3.to_k_ip"), "3.to_k_ip"),
    "of a wider model": (
        lambda s: {k: torch.cat([v] * 2, -1) if "_ip." in k else v for k, v in s.items()},
        "expected shape",
    ),
    "not a number": (lambda s: {k: v / 0 for k, v in s.items()}, "is not finite"),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_adapter_that_does_not_fit_is_refused_in_one_sentence(odd, model, tmp_path):
    change, message = ODD[odd]
    file = broken(model[1], tmp_path, change)
    with pytest.raises(UserError, match=rf"expected an IP-Adapter for this.*{message}.*take the"):
        load_backbone(model[0], device="cpu", ip_adapter=file)


def test_where_there_are_no_references_a_sentence_says_so(model, tiny, bank, gaussian, tmp_path):
    for options, message in (
        ({"ip_adapter_scale": 0.5}, "expected ip_adapter beside"),
        ({"ip_adapter": tmp_path / "none.safetensors"}, "is no such file"),
        ({"ip_adapter": model[1], "image_encoder": tmp_path}, "no config.json there"),
    ):
        with pytest.raises(UserError, match=message):
            load_backbone(model[0], device="cpu", **options)
    with pytest.raises(UserError, match=r"settings of tiny .*got 'ip_adapter'"):
        load_backbone("tiny", device="cpu", ip_adapter=model[1])
    with pytest.raises(UserError, match="expected a backbone that takes references, got one"):
        sample(tiny, torch.zeros(1, 4, 16, 16), Referred("", torch.ones(1, 8)), steps=1)
    with pytest.raises(UserError, match="which has none, got 'nin'; leave reference_rule out"):
        SyntheticDataset(bank, gaussian, Mixing(reference_rule="nin"))
    with pytest.raises(UserError, match=r"expected a rule for references out of lin, nin"):
        Mixing(reference_rule="fix")
    with pytest.raises(UserError, match=r"that keeps references .* a backbone that takes ref"):
        bank.references("ant")
