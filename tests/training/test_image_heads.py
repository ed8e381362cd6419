"""Image heads: a B for each image, from their gradients through a bank to mixtures of them."""

from itertools import pairwise

import pytest
import torch
from checkpoints import dit, ip_adapter, stable_diffusion
from conftest import Cut, cut_short, paint
from safetensors.torch import load_file, save_file
from torch.utils.data import default_collate

from augment import Mixing, Plan, Rule, Sampling, Synthesizer, UserError, fill_bank, load_backbone
from augment.diffusion.backbone import denoiser
from augment.diffusion.checkpoints.heads import HEADS_FILE, ImageHeads, thumbnails
from augment.diffusion.conditions import HEADS, Referred, rows_of
from augment.diffusion.process import split
from augment.diffusion.solver import sample
from augment.inversion import inverter
from augment.sources import Folder
from augment.synthesis.synthesizer import planner_of
from augment.training.adapt.data import NoisedImages
from augment.training.adapt.module import Adaptation
from augment.training.adapt.recipe import Recipe
from augment.training.adapt.run import adapt_backbone
from augment.training.adapt.settings import AdaptSettings

COUNTS = {"Bag": 3, "Ankle boot": 2}
QUICK = {"steps": 4, "batch_size": 2, "rank": 2, "lr": 1e-2, "token_lr": 1e-2, "head_lr": 0.1}
WEIGHTS = (0.5, 0.3, 0.2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return Folder(paint(tmp_path_factory.mktemp("heads"), COUNTS, size=28))


@pytest.fixture(scope="module", params=["tiny", "stable-diffusion", "dit"])
def name(request, tmp_path_factory):
    if request.param == "tiny":
        return "tiny"
    make = {"stable-diffusion": stable_diffusion, "dit": dit}[request.param]
    return str(make(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def adapted(name, images, tmp_path_factory):
    """The folder of a short run, and the backbone as it was left."""
    backbone = fresh(name)
    return adapt(images, tmp_path_factory.mktemp("run"), backbone), backbone


@pytest.fixture(scope="module")
def of_tiny(images, tmp_path_factory):
    return adapt(images, tmp_path_factory.mktemp("tiny"), fresh())


def adapt(source, out, backbone, **settings):
    given = {"images": source, "out": str(out), "image_heads": True, **QUICK, **settings}
    return adapt_backbone(AdaptSettings(**given), backbone)


def fresh(name="tiny", **options):
    return load_backbone(name, "cpu", torch.float32, **options)


def pixels_of(source, backbone):
    form = backbone.channels, backbone.resolution
    return torch.stack([source.load(image_id, *form) for image_id, _ in source.samples])


def latents(backbone, count):
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))


def answer(backbone, rows, prompt):
    """What the network says to one latent with these weights of the heads."""
    latent = latents(backbone, 1).expand(len(rows), -1, -1, -1)
    condition = backbone.condition([prompt] * len(rows)) | {HEADS: rows}
    return backbone.network(latent, 700, condition)


def test_a_layer_adds_the_weighted_heads_of_each_row_and_is_linear_in_them():
    layer = torch.nn.Sequential(torch.nn.Linear(5, 7))
    heads = ImageHeads.begin(layer, ["0"], 2, torch.zeros(3, 4), ["a", "a", "b"])
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
    heads.weights = torch.rand(4, 3)
    torch.testing.assert_close(layer(x), layer[0].forward(x))  # B begins as 0
    with torch.no_grad():
        heads.up[0].copy_(torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(2)))
    expected = [
        layer[0].forward(row) + sum(w * row @ heads.down[0].T @ heads.up[0][i].T
                                    for i, w in enumerate(weights))
        for row, weights in zip(x, heads.weights, strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(layer(x), torch.stack(expected))
    torch.testing.assert_close(heads.of(["a", "b", "c"]), torch.tensor(
        [[0.5, 0.5, 0], [0, 0, 1], [1 / 3, 1 / 3, 1 / 3]]
    ))  # fmt: skip


def test_the_gradient_is_of_a_and_of_the_heads_of_the_batch(name, images):
    backbone = fresh(name)
    known = thumbnails(pixels_of(images, backbone)), [""] * 5
    module = Adaptation(backbone, Recipe(rank=2, image_heads=True), known=known)
    module.log = lambda *_, **__: None
    with torch.no_grad():
        for up in module.heads.up:
            up.fill_(0.01)
    batch = default_collate([NoisedImages(images, [""] * 5, backbone, 0.0, 0, False)[k]
                             for k in range(2)])  # fmt: skip
    rows = set(batch["row"].tolist())
    module.training_step(batch, 0).backward()
    for down, up in zip(module.heads.down, module.heads.up, strict=True):
        assert {k for k, grad in enumerate(up.grad) if grad.any()} == rows and down.grad.any()
    learnt = {n for n, p in module.named_parameters() if p.grad is not None}
    assert all(n.startswith("heads.") for n in learnt) and len(rows) < 5


def test_it_loads_with_a_head_for_each_image_and_the_mean_for_others(
    name, adapted, images, tmp_path
):
    place, trained = adapted
    again = fresh(name, adapter=place)
    assert again.fingerprint["reference"].startswith("image heads ")
    prompt = again.adapted_prompts["Bag"]
    rows = again.refer(pixels_of(images, again))
    assert torch.equal(rows, torch.eye(5))
    ours = answer(again, torch.eye(5), prompt)
    torch.testing.assert_close(ours, answer(trained, torch.eye(5), prompt), rtol=0, atol=1e-5)
    apart = torch.cdist(ours.flatten(1), ours.flatten(1)) + torch.eye(5)
    assert apart.min() > 1e-3, "no two heads are the same"
    other = Folder(paint(tmp_path / "other", {"Bag": 2}, size=28, seed=9))
    assert not again.refer(pixels_of(other, again)).any()
    own = [label == images.classes.index("Bag") for _, label in images.samples]
    bags = torch.tensor([own]).float()
    torch.testing.assert_close(again.condition([prompt])[HEADS], bags / 3)
    z = latents(again, 1)
    how = {"solver": "ddim", "steps": 2}
    without = sample(again, z, Referred(prompt, torch.zeros(1, 5)), **how)
    torch.testing.assert_close(without, sample(again, z, prompt, **how), rtol=0, atol=1e-5)
    mean = sample(again, z, Referred(prompt, bags / 3), **how)
    torch.testing.assert_close(without, mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_centroid_mixes_the_heads_of_its_members(guidance, name, adapted, images, tmp_path):
    """Of one member it is that image's head; guidance is from the same heads."""
    backbone = fresh(name, adapter=adapted[0])
    bank = fill_bank(tmp_path / "bank", backbone, images, inversion="ddim", steps=3)
    ids, prompt = bank.members["Bag"], bank.prompt("Bag")
    how = {"solver": "ddim", "steps": 3, "guidance": guidance}
    made = Synthesizer(backbone, bank, Rule.parse("lin/0"), Sampling(**how))
    alone = Plan.equal(0, "Bag", ids[1:2])
    near = Plan(0, "Bag", ids, (0.0, 1.0, 0.0), 0.0, 0, 0, 0)
    plans = [alone, near, Plan(0, "Bag", ids, WEIGHTS, 0.0, 0, 0, 0)]
    rows = bank.references("Bag")
    assert rows.sum() == 3 and torch.equal(rows, backbone.refer(pixels_of(images, backbone)[
        [images.samples.index((i, images.classes.index("Bag"))) for i in ids]
    ]).float())  # fmt: skip
    weights = torch.cat([rows[1:2], rows[1:2], torch.tensor([WEIGHTS]) @ rows])
    for plan, expected in zip(plans, weights, strict=True):
        torch.testing.assert_close(made.reference_of(plan), expected)
    z = made.mix(plans).centroids
    images_of = made.images(plans)
    torch.testing.assert_close(images_of[0], images_of[1], rtol=0, atol=1e-5)
    process, levels = backbone.process, backbone.process.levels(3)[::-1]
    with torch.no_grad():
        for here, there in pairwise(levels):
            free, ours = (
                backbone.network(
                    z, process.timestep(here), backbone.condition([text] * 3) | {HEADS: weights}
                )
                for text in ("", prompt)
            )
            clean, noise = split(process, z, free + guidance * (ours - free), here)
            alpha, sigma = process.alpha_sigma(there)
            z = alpha * clean + sigma * noise
    torch.testing.assert_close(images_of, backbone.decode(z), rtol=0, atol=1e-4)
    with pytest.raises(UserError, match=r"expected reference_rule lin for the bank .*'nin'"):
        planner_of(bank, Mixing(reference_rule="nin"))


def test_an_image_is_inverted_with_its_own_head(of_tiny, images, tmp_path):
    backbone = fresh(adapter=of_tiny)
    bank = fill_bank(tmp_path / "bank", backbone, images, inversion="ddim", steps=3, stored=())
    pixels = torch.stack([images.load(i, 1, 32) for i in bank.members["Bag"]])
    run, rows = inverter("ddim", steps=3), bank.references("Bag")

    @torch.no_grad()
    def inverted(weights):
        words = rows_of(Referred(bank.prompt("Bag"), weights), 3)
        return run(denoiser(backbone, words), backbone.encode(pixels))["latents"]

    torch.testing.assert_close(bank.latents("Bag"), inverted(rows), rtol=0, atol=2e-3)
    others = inverted(rows.roll(1, 0)) - inverted(rows)
    assert (others.abs().amax((1, 2, 3)) > 0.02).all()


def test_a_run_that_was_cut_short_ends_with_the_same_bits(images, tmp_path, monkeypatch):
    whole = adapt(images, tmp_path / "whole", fresh())
    seen = cut_short(monkeypatch, Adaptation, 3)
    with pytest.raises(Cut):
        adapt(images, tmp_path / "cut", fresh())
    assert not (tmp_path / "cut" / HEADS_FILE).exists()
    place = adapt(images, tmp_path / "cut", fresh())
    assert len(seen) == 3 + 2
    for file in (HEADS_FILE, "learned_embeds.safetensors", "adapter.json"):
        assert (place / file).read_bytes() == (whole / file).read_bytes()
    assert not (place / "pytorch_lora_weights.safetensors").exists()


def test_what_does_not_go_with_image_heads_is_one_sentence(of_tiny, images, tmp_path):
    folder = stable_diffusion(tmp_path / "sd")
    cases = (
        ({"rank": 0}, "rank ≥ 1 for image_heads, got 0"),
        ({"head_lr": 0}, "head_lr > 0"),
        ({"prior_prompt": "top"}, "no prior_prompt with image_heads.*'top'"),
        ({"targets": ["to_x"]}, "targets out of the linear layers.*'to_x'"),
        ({"backbone_options": {"adapter": str(of_tiny)}}, "without a LoRA"),
    )
    for given, message in cases:
        settings = {"images": images, "out": str(tmp_path / "run"), "device": "cpu", **QUICK}
        with pytest.raises(UserError, match=message):
            adapt_backbone(AdaptSettings(**settings | {"image_heads": True} | given))
        assert not (tmp_path / "run" / "checkpoints").exists(), message
    with pytest.raises(UserError, match="image heads without compile, got both"):
        fresh(adapter=of_tiny, compile=True)
    file = of_tiny / HEADS_FILE
    state, other = load_file(file), tmp_path / "other"
    other.mkdir()
    for change, message in (
        (lambda s: s, "got another file"),
        (lambda s: {k: v for k, v in s.items() if "lora_B" not in k}, "got another file"),
        (lambda s: {k: v / 0 for k, v in s.items()}, "got another file"),
    ):
        save_file(change(state), other / HEADS_FILE)
        with pytest.raises(UserError, match=message):
            fresh(adapter=other)
    (other / HEADS_FILE).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"image heads for this model.*take the model"):
        fresh(str(folder), adapter=other)
    adapter = ip_adapter(tmp_path / "adapter", folder)
    place = adapt(images, tmp_path / "sd-run", fresh(str(folder)))
    with pytest.raises(UserError, match="image heads without ip_adapter, got both"):
        fresh(str(folder), adapter=place, ip_adapter=adapter)
