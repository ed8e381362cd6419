"""SiT and LightningDiT against references written from their papers, on small random weights."""

import json

import pytest
import torch
from checkpoints import SIT, Hub, lightningdit, sit, sit_state
from published import lightningdit_velocity, sampled, sit_velocity
from safetensors.torch import load_file, save_file

from augment import UserError, load_backbone, sample
from augment.diffusion.conditions import mix
from augment.diffusion.usage import Usage

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
STEPS = 5
FAMILIES = {
    "sit": (sit, sit_velocity, 1.0, Usage("", 4.0), "Flow()"),
    "lightningdit": (
        *(lightningdit, lightningdit_velocity, 0.3),
        *(Usage("", 6.7), "Flow(shift=3.33333)"),
    ),
}
"""How each is made, its network, the published shift of shares, what it is used with."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return FAMILIES[family][0](tmp_path_factory.mktemp("pipelines") / family)


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, device="cpu")


@pytest.fixture(scope="module")
def state(folder):
    return load_file(folder / WEIGHTS)


def noise(backbone, count=2):
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_it_samples_what_the_published_sampler_samples(guidance, family, backbone, state):
    latents, (_, velocity, shift, *_) = noise(backbone), FAMILIES[family]
    ours = sample(backbone, latents, "goldfish", "ddim", STEPS, guidance)
    theirs = backbone.decode(sampled(velocity, state, latents, 1, guidance, STEPS, shift))
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_it_is_used_as_published(family, backbone):
    assert (backbone.usage, backbone.fingerprint["process"]) == FAMILIES[family][3:]
    labels = backbone.condition(["Carassius auratus", "7", ""])["labels"]
    assert labels.tolist() == [1, 7, 1000]
    with pytest.raises(UserError, match="embeddings to mix, got labels"):
        mix(backbone.condition(["1", "7"]), torch.tensor([[0.5, 0.5]]))


def test_a_saved_one_is_the_one_that_was_loaded(backbone, state, tmp_path):
    place = backbone.save(tmp_path)
    torch.testing.assert_close(load_file(place / WEIGHTS), state, rtol=0, atol=0)
    again = load_backbone(place, device="cpu")
    assert again.fingerprint["process"] == backbone.fingerprint["process"]
    latents = noise(backbone)
    ours, theirs = (sample(b, latents, "goldfish", steps=2) for b in (again, backbone))
    assert torch.equal(ours, theirs)


def test_fingerprints_differ_where_the_weights_or_the_settings_do(
    family, backbone, folder, tmp_path
):
    spaced = load_backbone(folder, device="cpu", spacing="linspace")
    seen = [backbone.fingerprint, spaced.fingerprint]
    for change in ({"seed": 1}, {"num_heads": 2}):
        made = FAMILIES[family][0](tmp_path / str(change), **change)
        seen.append(load_backbone(made, device="cpu").fingerprint)
    assert all(one != other for n, one in enumerate(seen) for other in seen[:n])
    assert load_backbone(**backbone.recipe, device="cpu").fingerprint == backbone.fingerprint


@pytest.mark.parametrize("change", [{"learn_sigma": False}, {"depth": 1, "num_classes": 7}])
def test_the_size_is_the_checkpoints(change, tmp_path):
    backbone = load_backbone(sit(tmp_path / "sit", **change), device="cpu")
    output = backbone.network(noise(backbone), 300.0, backbone.condition(["3", ""]))
    assert output.shape == (2, *backbone.latent_shape) and output.std() > 0.1


def test_a_checkpoint_without_names_has_imagenets(tmp_path):
    plain = load_backbone(sit(tmp_path / "sit", labels=False), device="cpu")
    assert plain.condition(["tench", "toilet tissue"])["labels"].tolist() == [0, 999]
    with pytest.raises(UserError, match=r"number below 1000.*'unicorn'"):
        plain.condition(["unicorn"])


def test_a_folder_of_a_repository_is_fetched_without_its_code(monkeypatch, tmp_path):
    folder = sit(tmp_path / "many" / "sit")
    (folder / "pipeline.py").write_text("raise SystemExit")
    hub = Hub({"me/many": folder.parent})
    with hub.used(monkeypatch, tmp_path / "cache"):
        found = load_backbone("me/many/sit", device="cpu")
        assert not any(path.endswith(".py") for path in hub.asked)
        load_backbone("me/many/sit", device="cpu", local_files_only=True)
    assert found.recipe == {"name_or_path": "me/many/sit"}
    assert found.fingerprint == load_backbone(folder, device="cpu").fingerprint


def test_weights_of_another_network_are_refused(tmp_path):
    folder = sit(tmp_path / "sit")
    path = folder / WEIGHTS
    save_file(sit_state(SIT) | {"blocks.0.attn.q_norm.weight": torch.ones(8)}, path)
    with pytest.raises(UserError, match=r"whole checkpoint at .*sit, got .*q_norm"):
        load_backbone(folder, device="cpu")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({"depth": 2}))
    with pytest.raises(UserError, match="whole checkpoint"):
        load_backbone(folder, device="cpu")
