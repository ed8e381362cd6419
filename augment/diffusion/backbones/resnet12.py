"""ResNet-12 without its head: it embeds images as references of the tiny backbones.

Lee et al., *Meta-Learning with Differentiable Convex Optimization*, arXiv 1904.03758, use it for
CIFAR-FS; ``scripts/train_resnet12.py`` makes the weights.
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.diffusion.checkpoints.hub import brief

MEAN, DEVIATION = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)  # of CIFAR-100


class Pooled(nn.Module):
    """Three 3×3 convolutions beside a 1×1 one, and a maximum of 2×2."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in (narrow, wide, wide):
            conv = nn.Conv2d(size, wide, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(wide), nn.LeakyReLU(0.1)]
        self.residual = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(narrow, wide, 1, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Float[Tensor, "n narrow h w"]) -> Float[Tensor, "n wide h2 w2"]:
        """Return the pooled sum of residual and shortcut."""
        return F.max_pool2d(F.leaky_relu(self.residual(x) + self.shortcut(x), 0.1), 2)


def trunk(channels: int, width: int = 64) -> list[nn.Module]:
    """Build four blocks, 1, 2.5, 5 and 10 times ``width`` wide, and mean pooling."""
    widths = [channels, width, 5 * width // 2, 5 * width, 10 * width]
    blocks = [Pooled(*pair) for pair in pairwise(widths)]
    return [*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def normalised(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Centre images in [0, 1], and scale them to unit variance."""
    mean, deviation = (images.new_tensor(v).view(-1, 1, 1) for v in (MEAN, DEVIATION))
    return (images - mean) / deviation


def load_trunk(path: Path, features: int) -> nn.Sequential:
    """Load the network without its head, frozen.

    Args:
        path: ``weights.safetensors`` of ``scripts/train_resnet12.py``.
        features: how many features it has to make.

    Raises:
        UserError: another file, or a network of another width.
    """
    try:
        with safe_open(path, framework="pt") as file:
            width = json.loads(file.metadata()["config"])["width"]
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if 10 * width != features:
            raise ValueError(f"{10 * width} features instead of {features}")
        network = nn.Sequential(*trunk(3, width))
        head = f"{len(network)}."
        network.load_state_dict({k: v for k, v in state.items() if not k.startswith(head)})
    except Exception as error:  # of any type, since files may be hostile
        raise UserError(
            f"expected the ResNet-12 whose features the backbone learned from, got {path}: "
            f"{brief(error)}; give weights.safetensors of scripts/train_resnet12.py"
        ) from None
    return network.eval().requires_grad_(False)


@torch.no_grad()
def features_of(network: nn.Module, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n f"]:
    """Return the features of images in [0, 1], of length 1, float32."""
    return F.normalize(network(normalised(images)).float(), dim=1)
