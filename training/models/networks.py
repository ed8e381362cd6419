"""Networks: ours for small images and for long tails, and all of timm's.

A network maps images to logits, and its last layer, the head, is found by the name in
``pretrained_cfg["classifier"]``, as timm has it. To add a network: write the function here (or in a
file of its own) and enter it in `NETWORKS`; every network of timm is known by its own name.
"""

from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.diffusion.backbones.resnet12 import trunk
from augment.diffusion.checkpoints.hub import brief
from augment.networks.lite0 import lite0_net
from augment.networks.timm import find_timm, recipe
from augment.training.checks import expect

Images = Float[Tensor, "n c h w"]


class Chain(nn.Sequential):
    """Layers in a row, the last of which is the head."""

    @property
    def pretrained_cfg(self) -> dict[str, str]:
        """The head's name, as timm has it."""
        return {"classifier": list(self._modules)[-1]}


def small_cnn(channels: int, num_classes: int, width: int = 32) -> nn.Sequential:
    """Build three strided 3×3 convolutions with batch norm, mean pooling and a linear head.

    Made for 32×32 images and a few hundred of them: 0.1 M parameters, milliseconds a step.
    """
    layers: list[nn.Module] = []
    for wide in (width, 2 * width, 4 * width):
        layers += [
            nn.Conv2d(channels, wide, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
        ]
        channels = wide
    return Chain(
        *layers,
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * channels, num_classes),
    )


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters (option A).

    Where the channels grow, the shortcut takes every ``stride``-th pixel and pads the channels
    with zeros, half of them on each side.
    """

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        self.stride, self.pad = wide // narrow, (wide - narrow) // 2
        self.conv1 = nn.Conv2d(narrow, wide, 3, self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)

    def forward(self, x: Images) -> Float[Tensor, "n wide h2 w2"]:
        """Return the sum of residual and shortcut."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


def resnet32(channels: int, num_classes: int) -> nn.Sequential:
    """Build ResNet-32 for CIFAR; He et al., arXiv 1512.03385, sec. 4.2: 0.46 M parameters.

    Three stages of five blocks, 16, 32 and 64 wide, and Kaiming's initialisation of every weight,
    as in the code of LDAM-DRW and BALMS.
    """
    widths = [16] * 6 + [32] * 5 + [64] * 5
    network = Chain(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(Block(*pair) for pair in pairwise(widths)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return network


def resnet12(channels: int, num_classes: int, width: int = 64) -> nn.Sequential:
    """Build ResNet-12, the network of CIFAR-FS; Lee et al., arXiv 1904.03758: 12.4 M parameters.

    Four blocks, 1, 2.5, 5 and 10 times ``width`` wide, and mean pooling.
    """
    network = Chain(*trunk(channels, width), nn.Linear(10 * width, num_classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, 0.1, "fan_out", "leaky_relu")
    return network


def resnet10(channels: int, num_classes: int) -> nn.Module:
    """Build ResNet-10, one basic block a stage: the small network of ImageNet-LT.

    timm's ResNet, with batch norms that begin at one as in Kang et al.'s code (arXiv 1910.09217).
    """
    return _from_timm("resnet18", channels, num_classes, layers=(1, 1, 1, 1), zero_init_last=False)


def _from_timm(
    name: str, channels: int, num_classes: int, resolution: int | None = None, **options: Any
) -> nn.Module:
    timm = find_timm(name, f"{', '.join(NETWORKS)} or a network of timm")
    try:
        _, stored, config = recipe(name)
        if resolution and config.get("fixed_input_size"):
            options["img_size"] = resolution
        options = {**stored, **options}
        return timm.create_model(name, in_chans=channels, num_classes=num_classes, **options)
    except (OSError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"expected to build {name} with timm, got: {brief(error).rstrip('.')}; "
            "see timm.list_models(pretrained=True), check the connection, or train from scratch"
        ) from None


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "small_cnn": small_cnn,
    "resnet32": resnet32,
    "resnet12": resnet12,
    "resnet10": resnet10,
    "lite0": lambda channels, num_classes: _from_timm(
        "tf_efficientnet_lite0", channels, num_classes
    ),
}
"""Our networks by name, made of channels and number of classes."""


def build_network(
    name: str,
    channels: int,
    num_classes: int,
    pretrained: bool = False,
    resolution: int | None = None,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a network of `NETWORKS` or of timm.

    Args:
        name: its name; ``hf-hub:USER/MODEL`` and ``local-dir:FOLDER`` are models in timm's format.
        channels: image channels.
        num_classes: number of classes.
        pretrained: with timm's weights, or those of the repository or folder, but for the head.
        resolution: image pixels, for a network that is made for one size; by default that size.
        options: of ``timm.create_model``; of ours, ``width`` of small_cnn and resnet12.

    Raises:
        UserError: the name is unknown, timm is not installed, or the weights do not exist or
            cannot be downloaded.
    """
    options = options or {}
    if name not in NETWORKS:
        return _from_timm(
            name, channels, num_classes, resolution, **{"pretrained": pretrained, **options}
        )
    known = list(signature(NETWORKS[name]).parameters)[2:]
    if unknown := options.keys() - set(known):
        raise UserError(
            f"expected {', '.join(known) or 'none'} as options of {name}, got "
            f"{', '.join(sorted(unknown))}; leave them out"
        )
    if pretrained:
        expect(name == "lite0", "lite0 or a network of timm to be pretrained", name)
        expect(channels == 3, "3 channels for the weights of lite0", channels)
        return lite0_net(num_classes)
    return NETWORKS[name](channels, num_classes, **options)


def usual_resolution(network: nn.Module) -> int:
    """Return the pixels of the images that a network is made for: timm's, or 32 for ours.

    >>> usual_resolution(small_cnn(1, 2))
    32
    """
    return getattr(network, "pretrained_cfg", {}).get("input_size", (0, 0, 32))[-1]
