"""What LightningDiT has beside SiT: latents of VA-VAE, its own settings, files of the makers."""

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from checkpoints import lightningdit
from published import HEADS, SIDE, WIDTH, lightningdit_velocity
from safetensors.torch import load_file, save_file

from augment import UserError, load_backbone
from scripts.convert_lightningdit import convert

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return lightningdit(tmp_path_factory.mktemp("pipelines") / "lightningdit")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, device="cpu")


@pytest.fixture(scope="module")
def state(folder):
    return load_file(folder / WEIGHTS)


def noise(shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def test_latents_are_normalised_by_channel_alone(backbone):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = backbone.pipe.vae.encode(2 * images - 1).latent_dist.mode()
    config = backbone.pipe.vae.config
    statistics = config.latents_mean, config.latents_std
    mean, std = (torch.tensor(part)[:, None, None] for part in statistics)
    torch.testing.assert_close(backbone.encode(images), (plain - mean) / std)


def test_norms_of_queries_and_keys_are_read(tmp_path):
    folder = lightningdit(tmp_path / "m", use_qknorm=True, learn_sigma=True)
    backbone = load_backbone(folder, device="cpu")
    state = load_file(folder / WEIGHTS)
    latents, labels = noise(backbone.latent_shape), torch.tensor([3, 1000])
    ours = backbone.network(latents, 300.0, backbone.condition(["3", ""]))
    theirs = -lightningdit_velocity(state, latents, torch.tensor(0.7), labels, qknorm=True)[:, :4]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_shift_is_the_inverse_of_the_files(backbone, tmp_path):
    found = {
        shift: load_backbone(lightningdit(tmp_path / str(shift), shift=shift), device="cpu")
        for shift in (0.5, 0, None)
    }
    processes = [made.fingerprint["process"] for made in found.values()]
    assert processes == ["Flow(shift=2.0)", "Flow()", "Flow(shift=3.33333)"]
    assert found[None].fingerprint == backbone.fingerprint


def test_angles_in_a_file_of_the_makers_are_not_weights(backbone, tmp_path):
    folder = lightningdit(tmp_path / "m")
    path = folder / WEIGHTS
    save_file(load_file(path) | {"feat_rope.freqs_cos": torch.ones(256, 8)}, path)
    latents, condition = noise(backbone.latent_shape), backbone.condition(["3", ""])
    ours = load_backbone(folder, device="cpu").network(latents, 300.0, condition)
    assert torch.equal(ours, backbone.network(latents, 300.0, condition))


@pytest.mark.parametrize("setting", ["use_rope", "use_swiglu", "use_rmsnorm", "wo_shift"])
def test_ablations_of_the_paper_are_refused(setting, tmp_path):
    folder = lightningdit(tmp_path / "m", **{setting: setting == "wo_shift"})
    with pytest.raises(UserError, match=f"a LightningDiT with {setting}"):
        load_backbone(folder, device="cpu")


def test_latents_without_statistics_are_refused(tmp_path):
    folder = lightningdit(tmp_path / "m")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latents_mean": None}))
    with pytest.raises(UserError, match=r"latents_mean and latents_std in the vae/config.json"):
        load_backbone(folder, device="cpu")


WIDTHS, BLOCKS, CHANNELS = (32, 64), 2, 4


def ldm_state():
    """Random weights of an autoencoder by the names of arXiv 2112.10752's code."""
    made = {}

    def conv(name, inputs, outputs, side=3):
        made[f"{name}.weight"] = (
            torch.randn(outputs, inputs, side, side) / (inputs * side**2) ** 0.5
        )
        made[f"{name}.bias"] = torch.randn(outputs) / 4

    def norm(name, width):
        made[f"{name}.weight"] = 1 + torch.randn(width) / 4
        made[f"{name}.bias"] = torch.randn(width) / 4

    def resnet(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv1", inputs, outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name, width):
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    for part, way in (("encoder", "down"), ("decoder", "up")):
        width = WIDTHS[0] if way == "down" else WIDTHS[-1]
        conv(f"{part}.conv_in", 3 if way == "down" else CHANNELS, width)
        levels = [0, 1] if way == "down" else [1, 0]
        for level in levels:
            for number in range(BLOCKS + (way == "up")):
                resnet(f"{part}.{way}.{level}.block.{number}", width, WIDTHS[level])
                width = WIDTHS[level]
                if level == 1:
                    attention(f"{part}.{way}.{level}.attn.{number}", width)
            if level == levels[0]:
                conv(f"{part}.{way}.{level}.{way}sample.conv", width, width)
        for name in ("block_1", "block_2"):
            resnet(f"{part}.mid.{name}", WIDTHS[-1], WIDTHS[-1])
        attention(f"{part}.mid.attn_1", WIDTHS[-1])
        norm(f"{part}.norm_out", width)
        conv(f"{part}.conv_out", width, 2 * CHANNELS if way == "down" else 3)
    conv("quant_conv", 2 * CHANNELS, 2 * CHANNELS, 1)
    conv("post_quant_conv", CHANNELS, CHANNELS, 1)
    return made


def conv(state, name, x, **options):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def grouped(state, name, x):
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def resnet(state, name, x):
    inner = conv(state, f"{name}.conv1", F.silu(grouped(state, f"{name}.norm1", x)), padding=1)
    inner = conv(state, f"{name}.conv2", F.silu(grouped(state, f"{name}.norm2", inner)), padding=1)
    short = f"{name}.nin_shortcut"
    return inner + (conv(state, short, x) if f"{short}.weight" in state else x)


def attention(state, name, x):
    inner = grouped(state, f"{name}.norm", x)
    q, k, v = (conv(state, f"{name}.{part}", inner).flatten(2) for part in "qkv")
    weights = (q.mT @ k / q.shape[1] ** 0.5).softmax(-1)
    return x + conv(state, f"{name}.proj_out", (v @ weights.mT).view_as(x))


def middle(state, part, x):
    x = attention(state, f"{part}.mid.attn_1", resnet(state, f"{part}.mid.block_1", x))
    return resnet(state, f"{part}.mid.block_2", x)


def end(state, part, x):
    return conv(state, f"{part}.conv_out", F.silu(grouped(state, f"{part}.norm_out", x)), padding=1)


def encoded(state, x):
    x = conv(state, "encoder.conv_in", x, padding=1)
    for level in (0, 1):
        for number in range(BLOCKS):
            x = resnet(state, f"encoder.down.{level}.block.{number}", x)
            if level == 1:
                x = attention(state, f"encoder.down.{level}.attn.{number}", x)
        if level == 0:
            x = conv(state, "encoder.down.0.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = end(state, "encoder", middle(state, "encoder", x))
    return conv(state, "quant_conv", x)[:, :CHANNELS]


def decoded(state, x):
    x = conv(state, "decoder.conv_in", conv(state, "post_quant_conv", x), padding=1)
    x = middle(state, "decoder", x)
    for level in (1, 0):
        for number in range(BLOCKS + 1):
            x = resnet(state, f"decoder.up.{level}.block.{number}", x)
            if level == 1:
                x = attention(state, f"decoder.up.{level}.attn.{number}", x)
        if level == 1:
            x = F.interpolate(x, scale_factor=2.0)
            x = conv(state, "decoder.up.1.upsample.conv", x, padding=1)
    return end(state, "decoder", x)


@pytest.fixture(scope="module")
def published(tmp_path_factory, state):
    """The files of the makers: network, autoencoder, statistics."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published")
    half = WIDTH // HEADS
    turns = {f"feat_rope.freqs_{name}": torch.zeros(SIDE**2, half) for name in ("cos", "sin")}
    torch.save({"ema": {**state, **turns}, "model": {}}, folder / "network.pt")
    vae = ldm_state() | {"loss.logvar": torch.zeros(()), "linear_proj.weight": torch.ones(2, 2)}
    torch.save({"state_dict": vae, "epoch": 3}, folder / "vae.pt")
    statistics = {"mean": torch.randn(1, CHANNELS, 1, 1), "std": torch.rand(1, CHANNELS, 1, 1) + 1}
    torch.save(statistics, folder / "latents_stats.pt")
    return folder / "network.pt", folder / "vae.pt", folder / "latents_stats.pt"


def test_the_makers_files_are_converted(published, state, tmp_path):
    convert(*published, tmp_path / "made")
    backbone = load_backbone(tmp_path / "made", device="cpu")
    vae, statistics = (torch.load(path, weights_only=True) for path in published[1:])
    mean, std = statistics["mean"], statistics["std"]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    clean = (encoded(vae["state_dict"], 2 * images - 1) - mean) / std
    torch.testing.assert_close(backbone.encode(images), clean, rtol=0, atol=1e-4)
    pixels = decoded(vae["state_dict"], clean * std + mean) / 2 + 0.5
    torch.testing.assert_close(backbone.decode(clean), pixels.clamp(0, 1), rtol=0, atol=1e-4)
    ours = backbone.network(clean, 300.0, backbone.condition(["3", "tench"]))
    theirs = -lightningdit_velocity(state, clean, torch.tensor(0.7), torch.tensor([3, 0]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert backbone.fingerprint["process"] == "Flow(shift=3.33333)"
    with pytest.raises(UserError, match="expected a new folder"):
        convert(*published, tmp_path / "made")


def test_files_that_are_not_the_makers_are_refused(published, tmp_path):
    network, vae, statistics = published
    with pytest.raises(UserError, match="these three files in this order"):
        convert(vae, network, statistics, tmp_path / "made")
    code = tmp_path / "code.pt"
    code.write_bytes(pickle.dumps(print, 2))
    for path in (code, tmp_path / "none.pt"):
        with pytest.raises(UserError, match="expected a file of tensors"):
            convert(path, vae, statistics, tmp_path / "made")
    assert not (tmp_path / "made").exists()
