"""The embedded network: the features of a small classifier of Fashion-MNIST.

It measures by features without a download. ``scripts/train_features.py`` trained it; see its model
card, ``fashion.md``.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.networks.frozen import in_batches, normalise

WEIGHTS = Path(__file__).parent / "fashion.safetensors"


class FashionNet(nn.Module):
    """Four convolutions, 64 features and a linear head: 0.27 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for narrow, wide, stride in ((1, 32, 2), (32, 64, 1), (64, 128, 2), (128, 128, 2)):
            conv = nn.Conv2d(narrow, wide, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(wide), nn.ReLU()]
        pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3)]
        self.features = nn.Sequential(*layers, *pool, nn.Linear(512, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, images: Float[Tensor, "n 1 32 32"]) -> Float[Tensor, "n 10"]:
        """Compute logits of images in [0, 1], grey and 32×32, in Fashion-MNIST's class order."""
        return self.head(self.features(images))


def fashion_net(device: torch.device) -> FashionNet:
    """Load the trained network, frozen."""
    network = FashionNet()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval().requires_grad_(False).to(device)


def load_fashion(weights: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the network as a function to its 64 features; images are made grey and 32×32.

    Raises:
        UserError: weights were given; it has its own.
    """
    if weights:
        raise UserError(f"expected no weights for fashion, which has its own, got {weights}")
    network = fashion_net(device)

    def run(images: Tensor) -> Tensor:
        return network.features(normalise(images.to(device), 1, (32, 32), (0.0,), (1.0,)))

    return partial(in_batches, run)
