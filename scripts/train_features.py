"""Train the embedded feature network on Fashion-MNIST's full training split.

    python scripts/train_features.py        # about 9 minutes on one core

Writes augment/networks/fashion.safetensors and prints the accuracy of its model card. A classifier
of ten classes: flips, shifts by up to two pixels, dropout; nothing was tuned on the test split.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from fashion_mnist import load_split
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from augment.core.files import write_bytes
from augment.networks.fashion import WEIGHTS, FashionNet
from augment.sources.images import prepare


def jitter(images: Tensor) -> Tensor:
    """Flip each image at random, and shift it by up to 2 pixels."""
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(-1), images)
    (top, left), span = torch.randint(5, (2, len(images), 1, 1)), torch.arange(32)
    which = torch.arange(len(images))[:, None, None]
    return F.pad(images, (2, 2, 2, 2))[which, 0, top + span[:, None], left + span][:, None]


def train(epochs: int) -> FashionNet:
    """Train by AdamW with a one-cycle schedule."""
    torch.manual_seed(0)
    network = FashionNet().to(memory_format=torch.channels_last)
    images, labels = load_split("train")
    images = prepare(images, 1, 32)
    batches = [rows for _ in range(epochs) for rows in torch.randperm(len(images)).split(128)]
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, len(batches))
    for rows in tqdm(batches, "train", unit="step"):
        loss = F.cross_entropy(network(jitter(images[rows])), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def main() -> None:
    """Train, save, test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    network = train(args.epochs)
    write_bytes(args.out, save({k: v.contiguous() for k, v in network.state_dict().items()}))
    images, labels = load_split("test")
    with torch.no_grad():
        found = torch.cat([network(part) for part in prepare(images, 1, 32).split(500)]).argmax(1)
    print(f"{args.out}: {100 * (found == labels).float().mean():.2f} % of the test split")


if __name__ == "__main__":
    main()
