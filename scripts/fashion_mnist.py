"""Fashion-MNIST in full, for the scripts: Debian's package, or torchvision's download.

    python scripts/fashion_mnist.py     # writes the embedded slice of the test split

The slice has 32 + 200 images a class. The backbone and the feature network are trained on the
training split alone, so nothing in the package has seen these images. Xiao, Rasul, Vollgraf,
*Fashion-MNIST*, arXiv 1708.07747 (MIT).
"""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from augment.sources.fashion import CLASSES, DATA, SHOTS, TESTS

__all__ = ["CLASSES", "load_split"]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


def load_split(split: str) -> tuple[Tensor, Tensor]:
    """Load images (N, 1, 28, 28) float32 in [0, 1] and labels (N,) of ``train`` or ``test``."""
    if DEBIAN.is_dir():
        stem = {"train": "train", "test": "t10k"}[split]
        pixels = gzip.decompress((DEBIAN / f"{stem}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((DEBIAN / f"{stem}-labels-idx1-ubyte.gz").read_bytes())
        images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        targets = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
        return torch.from_numpy(images / np.float32(255)), torch.from_numpy(targets)
    from torchvision.datasets import FashionMNIST

    data = FashionMNIST("runs/data", train=split == "train", download=True)
    return data.data[:, None] / 255, data.targets


def main() -> None:
    """Write the embedded archive."""
    images, labels = load_split("test")
    rng, count = np.random.default_rng(0), SHOTS + TESTS
    rows = np.stack(
        [rng.permutation(np.flatnonzero(labels.numpy() == c))[:count] for c in range(10)]
    )
    pixels = (images[:, 0] * 255).round().byte().numpy()[rows]
    np.savez_compressed(DATA, pixels=pixels, rows=rows.astype(np.int16))
    print(f"{DATA}: {pixels.shape}, {Path(DATA).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
