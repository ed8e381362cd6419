"""The embedded images: a slice of Fashion-MNIST's test split, which the backbone never saw.

Per class 32 images to draw few shots from and 200 to test on, 28×28 grey. Fashion-MNIST is
© 2017 Zalando SE, MIT licence (``fashion_mnist.LICENSE`` beside this file); Xiao, Rasul, Vollgraf,
arXiv 1708.07747.
"""

from pathlib import Path

import numpy as np
import torch

from augment.core.progress import Progress
from augment.core.rng import rng
from augment.sources.images import save_image

DATA = Path(__file__).parent / "fashion_mnist.npz"
SHOTS, TESTS = 32, 200
CLASSES = (
    "T-shirt", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

COARSE = dict.fromkeys(CLASSES, "top") | {
    "Trouser": "trousers",
    "Bag": "bag",
    **dict.fromkeys(("Sandal", "Sneaker", "Ankle boot"), "footwear"),
}
"""The prompt of the backbone ``tiny`` for each class."""


def few_shots(seed: int, shots: int) -> list[int]:
    """Draw the numbers of some of the 32 images: the first ``shots`` of the seed's permutation."""
    return sorted(rng(seed, "order").permutation(SHOTS)[:shots].tolist())


def write_fashion(root: str | Path, split: str, numbers: list[int] | None = None) -> Path:
    """Write images of every class as ``root/class/000.png``, and return the root.

    Args:
        root: folder to write to; files that are there stay.
        split: ``shots`` (0 … 31) or ``test`` (0 … 199).
        numbers: of the images of each class; all by default.
    """
    first, count = {"shots": (0, SHOTS), "test": (SHOTS, TESTS)}[split]
    with np.load(DATA, allow_pickle=False) as archive:
        pixels = torch.from_numpy(archive["pixels"]).float() / 255
    for name, images in zip(
        Progress(CLASSES, f"{split} images", delay=2, leave=False), pixels, strict=True
    ):
        for number in range(count) if numbers is None else numbers:
            path = Path(root) / name / f"{number:03d}.png"
            if not path.exists():
                save_image(images[first + number][None], path, sync=False)
    return Path(root)
