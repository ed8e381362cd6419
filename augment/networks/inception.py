"""The Inception v3 that FID is usually measured by: torch-fidelity's, through torchmetrics."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from augment.core.errors import UserError
from augment.diffusion.checkpoints.hub import brief
from augment.networks.frozen import in_batches


def load_inception(weights: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Load the network as a function to the 2048 features before its head.

    Args:
        weights: torch-fidelity's file; empty downloads it.
        device: of the network.

    Raises:
        UserError: torch-fidelity or its weights are missing.
    """
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights or None).to(device)
    except ModuleNotFoundError:
        raise UserError(
            "expected torch-fidelity for Inception's features, got no such package; "
            "pip install torch-fidelity, or name a network of timm"
        ) from None
    except Exception as error:  # of any type, since files may be hostile
        raise UserError(
            f"expected torch-fidelity's weights of Inception, got none ({brief(error)}); download "
            "them where there is a network, and give the file"
        ) from None

    def run(images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return network((colour.to(device) * 255).round().to(torch.uint8))

    return partial(in_batches, run)
