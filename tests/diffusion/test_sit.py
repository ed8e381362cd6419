"""SiT against a reference written from its paper, on small random weights by published names."""

import json

import pytest
import torch
import torch.nn.functional as F
from checkpoints import SIT, Hub, sit, sit_state
from safetensors.torch import load_file, save_file

from augment import UserError, load_backbone, sample
from augment.diffusion.conditions import mix
from augment.diffusion.usage import Usage

STEPS = 5


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def velocity(state, latent, share, labels, heads=SIT["num_heads"]):
    """The network of arXiv 2401.08740: DiT's blocks, embedding the share of the image in [0, 1]."""
    frequencies = 10000 ** (-torch.arange(128) / 128)
    angles = share * frequencies.expand(len(latent), -1)
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    embedding = linear(state, "t_embedder.mlp.2", F.silu(linear(state, "t_embedder.mlp.0", waves)))
    embedding = F.silu(embedding + state["y_embedder.embedding_table.weight"][labels])
    weight, bias = state["x_embedder.proj.weight"], state["x_embedder.proj.bias"]
    x = F.conv2d(latent, weight, bias, stride=2).flatten(2).mT + state["pos_embed"]
    for number in range(SIT["depth"]):
        block = f"blocks.{number}"
        parts = linear(state, f"{block}.adaLN_modulation.1", embedding).chunk(6, 1)
        rows = linear(state, f"{block}.attn.qkv", modulated(x, *parts[:2]))
        q, k, v = rows.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        mixed = linear(state, f"{block}.attn.proj", (weights @ v).transpose(1, 2).flatten(2))
        x = x + parts[2][:, None] * mixed
        inner = linear(state, f"{block}.mlp.fc1", modulated(x, *parts[3:5]))
        inner = linear(state, f"{block}.mlp.fc2", F.gelu(inner, approximate="tanh"))
        x = x + parts[5][:, None] * inner
    parts = linear(state, "final_layer.adaLN_modulation.1", embedding).chunk(2, 1)
    pixels = linear(state, "final_layer.linear", modulated(x, *parts)).unflatten(2, (2, 2, -1))
    side = latent.shape[-1] // 2
    grid = pixels.unflatten(1, (side, side)).permute(0, 5, 1, 3, 2, 4)
    return grid.flatten(4).flatten(2, 3)[:, :4]


def sampled(state, latent, label, guidance):
    """Euler's method from noise (share 0) to image (share 1), with guidance on all channels."""
    classes, none = (torch.full((len(latent),), k) for k in (label, SIT["num_classes"]))
    for step in range(STEPS):
        share = torch.tensor(step / STEPS)
        own, free = (velocity(state, latent, share, labels) for labels in (classes, none))
        latent = latent + (free + guidance * (own - free)) / STEPS
    return latent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sit(tmp_path_factory.mktemp("pipelines") / "sit")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, device="cpu")


@pytest.fixture(scope="module")
def state(folder):
    return load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")


def noise(backbone, count=2):
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sit_samples_what_the_published_sampler_samples(guidance, backbone, state):
    latents = noise(backbone)
    ours = sample(backbone, latents, "goldfish", "ddim", STEPS, guidance)
    theirs = backbone.decode(sampled(state, latents, 1, guidance))
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("change", [{"learn_sigma": False}, {"depth": 1, "num_classes": 7}])
def test_the_size_is_the_checkpoints(change, tmp_path):
    backbone = load_backbone(sit(tmp_path / "sit", **change), device="cpu")
    output = backbone.network(noise(backbone), 300.0, backbone.condition(["3", ""]))
    assert output.shape == (2, *backbone.latent_shape) and output.std() > 0.1


def test_sit_is_used_as_published_and_knows_imagenets_names(backbone, tmp_path):
    assert backbone.usage == Usage("", 4.0)
    assert backbone.fingerprint["process"] == "Flow()"
    labels = backbone.condition(["Carassius auratus", "7", ""])["labels"]
    assert labels.tolist() == [1, 7, 1000]
    with pytest.raises(UserError, match="embeddings to mix, got labels"):
        mix(backbone.condition(["1", "7"]), torch.tensor([[0.5, 0.5]]))
    plain = load_backbone(sit(tmp_path / "sit", labels=False), device="cpu")
    assert plain.condition(["tench", "toilet tissue"])["labels"].tolist() == [0, 999]
    with pytest.raises(UserError, match=r"number below 1000.*'unicorn'"):
        plain.condition(["unicorn"])


def test_a_saved_sit_is_the_one_that_was_loaded(backbone, state, tmp_path):
    place = backbone.save(tmp_path)
    saved = load_file(place / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.testing.assert_close(saved, state, rtol=0, atol=0)
    again = load_backbone(place, device="cpu")
    latents = noise(backbone)
    ours, theirs = (sample(b, latents, "goldfish", steps=2) for b in (again, backbone))
    assert torch.equal(ours, theirs)


def test_fingerprints_differ_where_the_weights_or_the_settings_do(backbone, folder, tmp_path):
    spaced = load_backbone(folder, device="cpu", spacing="linspace")
    seen = [backbone.fingerprint, spaced.fingerprint]
    for change in ({"seed": 1}, {"num_heads": 2}):
        seen.append(load_backbone(sit(tmp_path / str(change), **change), device="cpu").fingerprint)
    assert all(one != other for n, one in enumerate(seen) for other in seen[:n])
    assert load_backbone(**backbone.recipe, device="cpu").fingerprint == backbone.fingerprint


def test_a_folder_of_a_repository_is_fetched_without_its_code(
    backbone, folder, monkeypatch, tmp_path
):
    (folder / "pipeline.py").write_text("raise SystemExit")
    hub = Hub({"me/many": folder.parent})
    with hub.used(monkeypatch, tmp_path):
        found = load_backbone("me/many/sit", device="cpu")
        assert not any(path.endswith(".py") for path in hub.asked)
        load_backbone("me/many/sit", device="cpu", local_files_only=True)
    assert found.recipe == {"name_or_path": "me/many/sit"}
    assert found.fingerprint == backbone.fingerprint


def test_weights_of_another_network_are_refused(tmp_path):
    folder = sit(tmp_path / "sit")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(sit_state(SIT) | {"blocks.0.attn.q_norm.weight": torch.ones(8)}, path)
    with pytest.raises(UserError, match=r"whole checkpoint at .*sit, got .*q_norm"):
        load_backbone(folder, device="cpu")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({"depth": 2}))
    with pytest.raises(UserError, match="whole checkpoint"):
        load_backbone(folder, device="cpu")
