"""The codec with real latents of FLUX.2, by its tiny autoencoder (github.com/madebyollin/taesd).

The folder with ``taef2_encoder.safetensors`` and ``taef2_decoder.safetensors`` is named by the
environment variable TAEF2; without it the tests are skipped.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from safetensors.torch import load_file
from torch import nn

from augment.diffusion.checkpoints.codec import Codec
from augment.sources import Folder
from augment.sources.fashion import write_fashion

FOLDER = Path(os.environ.get("TAEF2", "nowhere"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="TAEF2 names no folder of weights")
CONFIG = {"block_out_channels": (64,) * 4, "latent_channels": 32, "batch_norm_eps": 1e-4}


class Stack(nn.Module):
    """One half of TAEF2: layers by number, of convolutions and blocks."""

    def __init__(self, name, strided=(), doubled=()):
        super().__init__()
        self.state = {k: v.float() for k, v in load_file(FOLDER / f"{name}.safetensors").items()}
        self.strided, self.doubled = strided, doubled

    def conv(self, name, x, **options):
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, **options)

    def block(self, number, x):
        if f"{number}.pool.0.weight" in self.state:
            norm = (self.state[f"{number}.pool.1.{kind}"] for kind in ("weight", "bias"))
            pooled = F.group_norm(self.conv(f"{number}.pool.0", x), 4, *norm)
            x = x + self.conv(f"{number}.pool.3", F.relu(pooled))
        inner = x
        for place in (0, 2, 4):
            inner = self.conv(f"{number}.conv.{place}", inner if place == 0 else F.relu(inner))
        return F.relu(inner + x)

    def forward(self, x):
        for number in sorted({int(key.split(".")[0]) for key in self.state}):
            if f"{number}.conv.0.weight" in self.state:
                x = self.block(number, x)
                continue
            if number in self.doubled:
                x = F.interpolate(x, scale_factor=2)
            x = self.conv(f"{number}", x, stride=2 if number in self.strided else 1)
            x = F.relu(x) if self.doubled and number == 1 else x
        return x


class Taef2(nn.Module):
    """TAEF2 with the interface of diffusers, and a batch norm of patches as FLUX.2's."""

    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.encoder = Stack("taef2_encoder", strided=(2, 6, 10))
        self.decoder = Stack("taef2_decoder", doubled=(7, 12, 17))
        self.bn = nn.BatchNorm2d(128, eps=CONFIG["batch_norm_eps"], affine=False)
        self.config = FrozenDict(CONFIG | {"patch_size": (2, 2), "scaling_factor": 1.0})

    def encode(self, images):
        return SimpleNamespace(latents=self.encoder(images / 2 + 0.5))

    def decode(self, latents, return_dict=False):
        return (2 * self.decoder(3 * (latents / 3).tanh()) - 1,)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Garments in colours, at 64 pixels."""
    source = Folder(write_fashion(tmp_path_factory.mktemp("images"), "shots", [0, 1]))
    ids = [image_id for members in source.ids.values() for image_id in members]
    grey = torch.stack([source.load(image_id, 1, 64) for image_id in ids])
    colours = torch.rand(len(ids), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return grey * colours + (1 - grey) * colours.flip(0)


def psnr(images, others):
    return -10 * (images - others).square().mean().log10()


@torch.no_grad()
def test_real_latents_are_normalised_by_place_and_come_back(images):
    vae = Taef2()
    raw = vae.encode(2 * images - 1).latents
    patches = F.pixel_unshuffle(raw, 2)
    vae.bn.running_mean.copy_(patches.mean((0, 2, 3)))
    vae.bn.running_var.copy_(patches.var((0, 2, 3), correction=0))
    codec = Codec(vae, torch.device("cpu"), torch.float32)
    clean = codec.encode(images)
    assert (codec.factor, codec.channels, clean.shape[1:]) == (8, 32, (32, 8, 8))
    expected = (patches - patches.mean((0, 2, 3), keepdim=True)) / (
        patches.var((0, 2, 3), correction=0, keepdim=True) + 1e-4
    ).sqrt()
    torch.testing.assert_close(F.pixel_unshuffle(clean, 2), expected, rtol=0, atol=1e-4)
    by_place = F.pixel_unshuffle(clean, 2)
    assert by_place.mean((0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(by_place.var((0, 2, 3)), torch.ones(128), rtol=0, atol=0.01)
    back = codec.decode(clean)
    direct = (vae.decode(raw)[0] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(back, direct, rtol=0, atol=1e-4)
    assert psnr(back, images) > 22
