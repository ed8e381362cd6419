"""The embedded backbone: its codec, its prompts, and what it gives back of real images."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from augment import Rule, UserError, invert, load_backbone, sample
from augment.core.rng import normal, rng
from augment.diffusion import Backbone
from augment.diffusion.backbones.tiny import (
    EMBEDDED,
    HAAR,
    PROMPTS,
    ROWS,
    WEIGHTS,
    haar,
    inverse_haar,
)
from augment.diffusion.process import Flow, VariancePreserving
from augment.sources import Folder
from augment.sources.fashion import CLASSES, write_fashion

LATENTS = normal(rng(0, "noise"), 8, 4, 16, 16)


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """One embedded image of each class, which the network never saw."""
    source = Folder(write_fashion(tmp_path_factory.mktemp("clothes"), "shots", [0]))
    assert source.classes == sorted(CLASSES)
    return torch.stack([source.load(i, 1, 32) for ids in source.ids.values() for i in ids])


def psnr(images, others):
    return -10 * (images - others).square().mean((1, 2, 3)).log10()


@pytest.mark.parametrize("name", EMBEDDED)  # the others want a checkpoint: test_checkpoints.py
def test_a_backbone_has_what_the_protocol_asks_for(name):
    backbone = load_backbone(name, device="cpu")
    assert isinstance(backbone, Backbone)
    assert all(isinstance(field, str) for field in backbone.fingerprint.values())
    assert backbone.fingerprint["name"] == name
    assert backbone.fingerprint == load_backbone(name, device="cpu").fingerprint


def test_colour_photographs_come_back_from_their_latents():
    backbone = load_backbone("tiny-cifar", device="cpu")
    folder = Path(str(files("augment.sources"))) / "pictures"
    source = Folder(folder)
    images = torch.stack([source.load(i, 3, 32) for i, _ in source.samples])
    latents = invert(backbone, images, steps=10)
    assert latents.shape == (3, 12, 16, 16)
    back = sample(backbone, latents, "", "fireflow", 10)
    assert psnr(back, images).min() > 30


def test_the_network_hears_of_levels_between_the_trained_ones(tiny):
    condition = tiny.condition([""] * 8)
    answers = [tiny.network(LATENTS, t, condition) for t in (500, 500.5, 501)]
    assert not torch.equal(answers[0], answers[1])
    torch.testing.assert_close(answers[1], (answers[0] + answers[2]) / 2, rtol=0, atol=1e-3)


def test_haar_is_orthonormal_and_undone_by_its_inverse():
    torch.testing.assert_close(HAAR @ HAAR.T, torch.eye(4))
    pixels = torch.rand(3, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    latents = haar(pixels)
    assert latents.shape == (3, 4, 4, 6)
    torch.testing.assert_close(inverse_haar(latents), pixels)
    torch.testing.assert_close(latents.norm(), pixels.norm())


def test_the_first_haar_channel_is_the_average_and_a_flat_image_has_no_details():
    latents = haar(torch.full((1, 1, 4, 4), 0.3))
    torch.testing.assert_close(latents[:, 0], torch.full((1, 2, 2), 0.6))
    torch.testing.assert_close(latents[:, 1:], torch.zeros(1, 3, 2, 2))


def test_the_codec_loses_nothing(tiny, clothes):
    torch.testing.assert_close(tiny.decode(tiny.encode(clothes)), clothes, rtol=0, atol=1e-5)


def test_clean_latents_have_about_unit_variance(tiny, clothes):
    assert tiny.encode(clothes).std().item() == pytest.approx(1, abs=0.3)


def test_inverted_images_come_back_when_sampled(tiny, clothes):
    latents = invert(tiny, clothes, inversion="fireflow", steps=50)
    quality = psnr(sample(tiny, latents, steps=50), clothes)
    # measured with the weights fe1bd93c on 240 training images: 42.7 dB
    assert quality.mean() > 39
    assert quality.min() > 34
    assert 0.6 < latents.std() < 1.2, "inverted latents are nearly standard normal"


def test_more_steps_bring_images_back_better(tiny, clothes):
    latents = {n: invert(tiny, clothes[:4], inversion="fireflow", steps=n) for n in (5, 20)}
    coarse, fine = (psnr(sample(tiny, latents[n], steps=n), clothes[:4]).mean() for n in latents)
    assert fine > coarse + 3


def test_noise_becomes_pictures_like_clothes(tiny, clothes):
    # the last level's latents are not centred in training either
    means = invert(tiny, clothes, steps=10).mean((0, 2, 3), keepdim=True)
    images = sample(tiny, LATENTS + means, steps=20)
    assert images.shape == (8, 1, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    border = torch.cat([images[..., 0, :].flatten(), images[..., -1, :].flatten()])
    assert border.median() < 0.05, "clothes lie on a black ground"
    assert images.mean().item() == pytest.approx(clothes.mean().item(), abs=0.15)


def test_many_latents_degenerate_under_fix_and_not_with_their_channel_means_apart(tiny, tmp_path):
    source = Folder(write_fashion(tmp_path, "shots"))
    images = torch.stack([source.load(image_id, 1, 32) for image_id in source.ids["Bag"]])
    points = invert(tiny, images, steps=20)[None]
    rules = [Rule.parse(name) for name in ("fix/0", "fix/chm")]
    centroids = torch.cat([rule(points, torch.full((1, 32), 1 / 32)) for rule in rules])
    fixed, adjusted = sample(tiny, centroids, steps=20).mean((1, 2, 3)) / images.mean()
    assert fixed < 0.5, "the channel bias, amplified, is darkness"
    assert 0.7 < adjusted < 1.7


def test_guidance_one_and_no_prompt_are_no_guidance(tiny):
    latents = LATENTS[:2]
    plain = sample(tiny, latents, steps=3)
    assert torch.equal(sample(tiny, latents, steps=3, guidance=7.0), plain)
    named = sample(tiny, latents, "top", steps=3)
    assert torch.equal(sample(tiny, latents, "top", steps=3, guidance=1.0), named)
    assert not torch.allclose(named, plain)
    torch.testing.assert_close(
        sample(tiny, latents, "top", steps=3, guidance=0.0), plain, rtol=0, atol=1e-5
    )
    assert not torch.allclose(sample(tiny, latents, "top", steps=3, guidance=3.0), named)


def test_a_row_without_a_prompt_is_not_guided(tiny):
    plain = sample(tiny, LATENTS[:3], ["", "bag", ""], steps=3)
    guided = sample(tiny, LATENTS[:3], ["", "bag", ""], steps=3, guidance=4.0)
    torch.testing.assert_close(guided[::2], plain[::2], rtol=0, atol=1e-5)
    assert not torch.allclose(guided[1], plain[1])


@pytest.mark.parametrize("prompt", PROMPTS[1:])
def test_every_prompt_means_something(tiny, prompt):
    plain, named = (sample(tiny, LATENTS[:1], p, steps=2) for p in ("", prompt))
    assert not torch.allclose(plain, named)


def test_an_unknown_prompt_is_answered_with_the_right_ones(tiny):
    for call in (lambda: sample(tiny, LATENTS, "hat"), lambda: tiny.condition(["", "hat"])):
        with pytest.raises(UserError) as caught:
            call()
        assert "'hat'" in str(caught.value)
        assert ", ".join(filter(None, PROMPTS)) in str(caught.value)


def test_the_same_batch_gives_the_same_bits(tiny):
    assert torch.equal(sample(tiny, LATENTS, steps=5), sample(tiny, LATENTS, steps=5))


def test_eight_batches_of_one_give_the_images_of_a_batch_of_eight(tiny):
    whole = sample(tiny, LATENTS, steps=10)
    singly = sample(tiny, LATENTS, steps=10, batch_size=1)
    torch.testing.assert_close(singly, whole, rtol=0, atol=1e-4)


def test_nothing_is_learnt_while_sampling(tiny):
    assert not any(weight.requires_grad for weight in tiny.unet.parameters())
    assert not tiny.unet.training
    assert not sample(tiny, LATENTS[:1], steps=1).requires_grad


GARBAGE = {
    "missing": None,
    "a folder": "folder",
    "empty": b"",
    "short": b"\x01\x02",
    "text": b"these are not weights, whoever says so",
    "truncated": WEIGHTS.read_bytes()[:100_000],
    "no config": save({"weight": torch.zeros(3)}),
    "config not JSON": save({"weight": torch.zeros(3)}, metadata={"config": "{"}),
    "empty config": save({"weight": torch.zeros(3)}, metadata={"config": "{}"}),
    **{
        kind: save(
            {"weight": torch.zeros(3)},
            metadata={"config": json.dumps({"scale": 1.0, "unet": {}} | config)},
        )
        for kind, config in {
            "another network": {"white": 1.0},
            "unknown setting": {"white": 1.0, "unet": {"hat": 1}},
            "of another codec": {},
        }.items()
    },
}


@pytest.mark.parametrize("kind", GARBAGE)
def test_a_file_that_is_not_our_weights_is_refused_by_name(kind, tmp_path: Path):
    path, content = tmp_path / "odd.safetensors", GARBAGE[kind]
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"odd\.safetensors"):
        load_backbone(path)


def test_weights_are_identified_by_their_bytes(tiny, tmp_path: Path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(WEIGHTS.read_bytes())
    assert load_backbone(copy, device="cpu").fingerprint == tiny.fingerprint
    changed = bytearray(WEIGHTS.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    assert load_backbone(copy, device="cpu").fingerprint != tiny.fingerprint


@pytest.mark.parametrize(
    ("named", "process"),
    [
        (["flow", {"shift": 2.0}], Flow(shift=2.0)),
        (
            ["diffusion", {"prediction": "v", "zero_terminal_snr": True}],
            VariancePreserving("v", zero_terminal_snr=True),
        ),
    ],
    ids=["flow", "no signal at the end"],
)
def test_weights_say_which_process_they_learnt(tiny, tmp_path: Path, named, process):
    path = tmp_path / "other.safetensors"
    state = load_file(WEIGHTS)
    path.write_bytes(save(state, {"config": json.dumps(tiny.config | {"process": named})}))
    other = load_backbone(path, device="cpu")
    assert other.process == process
    assert other.fingerprint["process"] == repr(process)
    again = load_backbone(other.save(tmp_path / "again"), device="cpu")
    assert again.process == process
    pure = sample(other, LATENTS[:1], solver="ddim", steps=1)  # from nothing but noise
    answer = other.network(LATENTS[:1], process.timestep(1.0), other.condition([""]))
    clean = LATENTS[:1] - answer if isinstance(process, Flow) else -answer
    torch.testing.assert_close(pure, other.decode(clean), rtol=0, atol=1e-5)
    path.write_bytes(save(state, {"config": json.dumps(tiny.config | {"process": ["hat", {}]})}))
    with pytest.raises(UserError, match=r"other\.safetensors.*'hat'"):
        load_backbone(path, device="cpu")


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="banana"):
        load_backbone("tiny", device="banana")


@pytest.mark.slow
def test_a_compiled_network_answers_the_same_whatever_the_batch(tiny):
    compiled = load_backbone("tiny", device="cpu", compile=True)
    assert compiled.fingerprint == tiny.fingerprint
    latents = normal(rng(1, "noise"), 2 * ROWS + 5, 4, 16, 16)
    condition = tiny.condition(["top"] * len(latents))
    with torch.no_grad():
        for count in (5, ROWS, len(latents)):
            inputs = latents[:count], 700, {"text": condition["text"][:count]}
            torch.testing.assert_close(
                compiled.network(*inputs), tiny.network(*inputs), rtol=0, atol=1e-5
            )
    text = condition["text"][:ROWS].requires_grad_()
    answer = compiled.network(latents[:ROWS], 700, {"text": text})
    assert torch.autograd.grad(answer.sum(), text)[0].abs().max() > 0
    for weight in compiled.trainable().parameters():
        weight.zero_()
    with torch.no_grad():
        assert not compiled.network(latents[:ROWS], 700, {"text": text}).any(), "not the old ones"
