"""Prior preservation: its gradient, the images that it is of, and that a run resumes with it."""

import json

import numpy as np
import pytest
import torch
from checkpoints import stable_diffusion
from conftest import Cut, cut_short, paint
from PIL import Image
from safetensors.torch import load_file

from augment import UserError, load_backbone, sample
from augment.core.files import write_bytes
from augment.core.rng import normal, rng
from augment.diffusion.backbones.stable_diffusion import StableDiffusion
from augment.diffusion.usage import PHOTO, Usage
from augment.sources import Folder
from augment.sources.images import to_pil
from augment.training.adapt.data import NoisedImages
from augment.training.adapt.module import Adaptation
from augment.training.adapt.recipe import Recipe
from augment.training.adapt.run import adapt_backbone
from augment.training.adapt.settings import AdaptSettings

LORA = "pytorch_lora_weights.safetensors"
COUNTS = {"Bag": 3, "Ankle boot": 2}
QUICK = {"steps": 3, "batch_size": 2, "rank": 2, "lr": 1e-2, "token_lr": 1e-2, "device": "cpu"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return Folder(paint(tmp_path_factory.mktemp("few"), COUNTS, size=28))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Two solver steps for an image, of which two are made together."""
    monkeypatch.setattr(StableDiffusion, "usage", Usage(PHOTO, 2.0, 2))
    monkeypatch.setattr("augment.training.adapt.prior._TOGETHER", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(stable_diffusion(tmp_path_factory.mktemp("sd")))


def adapt(source, out, **settings):
    given = {"images": source, "out": str(out), **QUICK, **settings}
    return adapt_backbone(AdaptSettings(**given))


def test_the_gradient_is_the_weighted_sum_of_both_losses(folder, images):
    """By hand: ε-prediction of a UNet, mean squared error, λ = 0.3."""
    backbone = load_backbone(folder, "cpu", torch.float32)
    module = Adaptation(backbone, Recipe(rank=2), prior_weight=0.3)
    module.log = lambda *_, **__: None
    tuned = [weight for weight in module.network.parameters() if weight.requires_grad]
    with torch.no_grad():
        for number, weight in enumerate(tuned):
            weight.copy_(normal(rng(number, "noise"), *weight.shape) / 10)
    own = NoisedImages(images, ["a cat"] * 5, backbone, 0.0, 0, directions=False)
    own.prior = NoisedImages(images, ["a mat"] * 5, backbone, 0.0, 0, False, purpose="prior")
    batch = torch.utils.data.default_collate([own[0], own[1]])
    assert (batch["level"] != batch["prior"]["level"]).all()
    found = torch.autograd.grad(module.training_step(batch, 0), tuned)

    total = torch.zeros(())
    for part, weight in ((batch, 1.0), (batch["prior"], 0.3)):
        clean = backbone.encode(part["image"])
        pairs = [backbone.process.alpha_sigma(level) for level in part["level"].tolist()]
        alpha, sigma = torch.tensor(pairs).T.reshape(2, 2, 1, 1, 1)
        times = torch.tensor([backbone.process.timestep(u) for u in part["level"].tolist()])
        text = backbone.condition(part["prompt"])["text"]
        answer = backbone.net(alpha * clean + sigma * part["noise"], times, text).sample
        total = total + weight * ((answer - part["noise"]) ** 2).sum() / answer.numel()
    expected = torch.autograd.grad(total, tuned)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
    assert any(grad.any() for grad in found)


def test_the_unadapted_model_makes_the_images(folder, images, tmp_path):
    given = {"backbone": folder, "prior_prompt": "a cat", "prior_images": 3}
    place = adapt(images, tmp_path, text_rank=2, **given)
    plain = load_backbone(folder, "cpu", torch.float32)
    noises = torch.stack([normal(rng(0, "noise", k), *plain.latent_shape) for k in range(3)])
    usage = plain.usage
    expected = sample(plain, noises, "a cat", steps=usage.steps, guidance=usage.guidance)
    made = sorted((place / "prior").glob("*.png"))
    assert [path.name for path in made] == ["00000.png", "00001.png", "00002.png"]
    for path, image in zip(made, expected, strict=True):
        there, ours = np.asarray(Image.open(path), int), np.asarray(to_pil(image), int)
        assert abs(there - ours).max() <= 1  # of 255; batches of other sizes round otherwise
    record = json.loads((place / "adapter.json").read_text())
    assert len(record["images"]) == len(images)  # none of what the model knew before
    head, *_, last = (line.split(",") for line in (place / "metrics.csv").read_text().splitlines())
    assert float(last[head.index("prior")]) > 0


def test_a_run_that_was_cut_short_ends_with_the_same_bits(folder, images, tmp_path, monkeypatch):
    own = {"backbone": folder, "steps": 4, "tokens": True, "words": dict.fromkeys(COUNTS, "cat")}
    given = {**own, "prior_prompt": "a cat", "prior_images": 5, "prior_weight": 0.5}
    whole, place = adapt(images, tmp_path / "whole", **given), tmp_path / "cut"
    plain = adapt(images, tmp_path / "plain", **own)

    def cut_write(path, content):
        write_bytes(path, content)
        if path.name == "00002.png":
            raise Cut

    seen = cut_short(monkeypatch, Adaptation, 3)
    with monkeypatch.context() as patch:
        patch.setattr("augment.training.adapt.prior.write_bytes", cut_write)
        with pytest.raises(Cut):
            adapt(images, place, **given)
    assert not seen and len(list((place / "prior").glob("*.png"))) == 3
    with pytest.raises(UserError, match=r'of prompt "a mat", got "a cat"'):
        adapt(images, place, **given | {"prior_prompt": "a mat"})
    with pytest.raises(Cut):
        adapt(images, place, **given)
    (place / "prior" / "00001.png").unlink()  # made again, with the same bits
    assert adapt(images, place, **given) == place and len(seen) == 3 + 2
    for name in [LORA, "learned_embeds.safetensors", *(f"prior/{k:05d}.png" for k in range(5))]:
        assert (place / name).read_bytes() == (whole / name).read_bytes()
    one, other = load_file(whole / LORA), load_file(plain / LORA)
    assert any((one[name] - other[name]).abs().max() > 1e-4 for name in one)
    with pytest.raises(UserError, match=r"of prior\.weight 0\.1, got 0\.5"):
        adapt(images, place, **given | {"prior_weight": 0.1})
    (place / "prior" / "00002.png").write_bytes((place / "prior" / "00001.png").read_bytes())
    with pytest.raises(UserError, match="expected the prior images that the run"):
        adapt(images, place, **given)


def test_given_images_are_known_to_the_adaptation(images, tmp_path):
    folder = paint(tmp_path / "given", {"tops": 3}, size=28, seed=7) / "tops"
    given = {"prior_prompt": "top", "prior_images": str(folder)}
    place = adapt(images, tmp_path / "run", **given)
    assert not (place / "prior").exists()
    record = json.loads((place / "adapter.json").read_text())
    assert len(record["images"]) == len(images) + 3
    sorted(folder.iterdir())[0].unlink()
    with pytest.raises(UserError, match="expected the prior images that the run"):
        adapt(images, tmp_path / "run", **given)


def test_a_wrong_prior_is_one_sentence(images, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = (
        ({"prior_weight": 2.0}, "expected prior_prompt with"),
        ({"prior_images": 5}, "expected prior_prompt with"),
        ({"prior_prompt": "top", "prior_weight": -1}, "prior_weight ≥ 0, got -1"),
        ({"prior_prompt": "top", "prior_images": 0}, "prior_images ≥ 1, got 0"),
        ({"prior_prompt": "top", "rank": 0}, "low-rank weights with prior_prompt 'top'"),
        ({"prior_prompt": "hat"}, "expected a prompt out of"),
        ({"prior_prompt": "top", "prior_images": str(tmp_path / "empty")}, "images in .*empty"),
        ({"prior_prompt": "top", "prior_images": str(tmp_path / "none")}, "images in .*none"),
    )
    for given, message in cases:
        with pytest.raises(UserError, match=message):
            adapt(images, tmp_path / "run", **given)
        assert not (tmp_path / "run" / "checkpoints").exists(), message
