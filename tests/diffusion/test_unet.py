"""The UNet of `tiny` is diffusers' ``UNet2DModel`` to the bit, and takes no import of it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open

from augment.diffusion.backbones.tiny import EMBEDDED
from augment.diffusion.backbones.unet import UNet


def unet_of(name):
    """Return the UNet's config of an embedded backbone."""
    with safe_open(EMBEDDED[name], "pt") as file:
        return json.loads(file.metadata()["config"])["unet"]


TINY = unet_of("tiny")
SCALED = unet_of("tiny-cifar") | {"block_out_channels": (16, 32, 64)}


def loss_and_gradients(network, *inputs):
    network.zero_grad()
    loss = network(*inputs).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in network.parameters())]


def equal(some, others):
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.parametrize("config", [TINY, SCALED], ids=["tiny", "scaled"])
def test_it_is_that_of_diffusers_to_the_bit(config):
    from diffusers import UNet2DModel

    networks = []
    for kind in (UNet, UNet2DModel):
        torch.manual_seed(0)
        network = kind(**config)
        networks.append(torch.nn.Module.to(network, memory_format=torch.channels_last))
    ours, theirs = networks
    assert [*ours.state_dict()] == [*theirs.state_dict()], "weights and their order"
    assert equal(ours.state_dict().values(), theirs.state_dict().values()), "a seed's beginning"

    def other(*inputs):
        return theirs(*inputs, return_dict=False)[0]

    other.zero_grad, other.parameters = theirs.zero_grad, theirs.parameters
    for count in (1, 8, 65):  # from 64 rows on diffusers enlarges another layout
        latents = torch.randn(count, config["in_channels"], 16, 16)
        inputs = latents, torch.linspace(0, 999, count), torch.arange(count) % 5
        for training in (True, False):
            for network in networks:
                network.train(training)
            with torch.no_grad():
                assert torch.equal(ours(*inputs), other(*inputs))
    latents = torch.randn(8, config["in_channels"], 16, 16)
    inputs = latents, torch.linspace(0, 999, 8), torch.arange(8) % 5
    found = loss_and_gradients(ours, *inputs)
    assert equal(found, loss_and_gradients(other, *inputs))
    ours.enable_gradient_checkpointing()
    assert equal(found, loss_and_gradients(ours, *inputs)), "checkpoints change nothing"
    ours.disable_gradient_checkpointing()
    assert not any(getattr(part, "checkpointing", False) for part in ours.modules())


def test_the_embedded_backbone_loads_without_diffusers():
    code = (
        "import sys; from augment import load_backbone; load_backbone('tiny'); "
        "print({'diffusers', 'transformers', 'peft', 'scipy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
