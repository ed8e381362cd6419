"""Train ResNet-12 on CIFAR-FS's base classes, and test it on 5-way episodes of the others.

    OMP_NUM_THREADS=1 nice -n 19 python scripts/train_resnet12.py CIFAR100 --run RUN [--width 32]

``CIFAR100`` holds CIFAR-100's training images in class folders. The network learns from all but
the last 50 images of each base class, on which it is tested. Stop it at any time: the same command
resumes from ``RUN``. At the end, and with ``--report`` from the last checkpoint, it prints its
accuracy and writes ``features.safetensors``: features of length 1 of all images, by part.

Published with 600 images of each base class and 90 epochs at full width: 71.5 ± 0.8 and
86.0 ± 0.5 % at 1 and 5 shots (Tian et al., arXiv 2003.11539, table 2, a logistic head on features
of length 1).
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from cifar_fs import PARTS, classes_of, load_part
from long_run import LongRun, half_precision, options
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from augment.core.files import write_bytes
from augment.diffusion.backbones.resnet12 import normalised
from augment.networks import in_batches, unit
from augment.sources import Folder
from augment.training.episodes.evaluate import TaskEvaluator
from augment.training.episodes.protocol import Episodes
from augment.training.models.heads import HEADS
from augment.training.models.metrics import normal_interval
from augment.training.models.networks import resnet12

HELD_OUT, SHIFT = 50, 4


class Run(LongRun):
    """The network and its optimiser."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args = args
        images, labels = load_part(args.images, "base")
        images, labels = (x.unflatten(0, (len(classes_of("base")), -1)) for x in (images, labels))
        self.images, self.labels = (x[:, :-HELD_OUT].flatten(0, 1) for x in (images, labels))
        self.images = normalised(self.images)
        self.test = [x[:, -HELD_OUT:].flatten(0, 1) for x in (images, labels)]
        self.network = resnet12(3, len(classes_of("base")), args.width)
        nn.Module.to(self.network, args.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), args.lr, 0.9, weight_decay=5e-4, nesterov=True
        )
        self.per_epoch = len(self.images) // args.batch
        steps = args.epochs * self.per_epoch
        parts = {"network": self.network, "optimizer": self.optimizer}
        super().__init__(args.run, steps, args.batch, **parts)

    def loss(self) -> Tensor:
        """Return the cross-entropy of the step's batch, mirrored and shifted at random."""
        epoch, place = divmod(self.step, self.per_epoch)
        order = torch.Generator().manual_seed(self.args.seed * 1_000_003 + epoch)
        rows = torch.randperm(len(self.images), generator=order)
        rows = rows[place * self.batch : (place + 1) * self.batch]
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + 1_000 + self.step)
        flip = torch.rand(self.batch, generator=generator) < 0.5
        images = self.images[rows]
        images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        shifts = torch.randint(2 * SHIFT + 1, (2, self.batch, 1), generator=generator)
        down, across = shifts + torch.arange(images.shape[-1])
        padded = F.pad(images, (SHIFT,) * 4)
        which = torch.arange(self.batch).view(-1, 1, 1)
        images = padded[which, :, down[:, :, None], across[:, None]].permute(0, 3, 1, 2)
        images, labels = (x.to(self.args.device) for x in (images, self.labels[rows]))
        return F.cross_entropy(self.network.train()(images), labels)

    def update(self, loss: Tensor) -> None:
        """Make a step; the rate rises in the first twentieth, then falls as a half cosine."""
        share = self.step / self.steps
        cosine = 0.5 * (1 + math.cos(math.pi * share))
        self.optimizer.param_groups[0]["lr"] = self.args.lr * min(1.0, 20 * share + 1e-3) * cosine
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def write(self) -> None:
        """Write the weights in half precision."""
        state = half_precision(self.network.state_dict())
        config = {"width": self.args.width, "classes": list(classes_of("base")), **self.clocks}
        write_bytes(
            self.folder / "weights.safetensors", save(state, {"config": json.dumps(config)})
        )


def load_network(path: Path) -> nn.Sequential:
    """Load the network of a ``weights.safetensors``, frozen; its last layer is the head."""
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
    network = resnet12(3, len(config["classes"]), config["width"])
    network.load_state_dict(load_file(path))
    return network.eval().requires_grad_(False)


def report(run: Run) -> None:
    """Print accuracies, and write the features."""
    network = run.network.cpu().eval()
    trunk = nn.Sequential(*list(network)[:-1])
    seen = [normalised(run.test[0]), run.images[:: len(run.images) // len(run.test[0])]]
    seen_labels = [run.test[1], run.labels[:: len(run.images) // len(run.test[0])]]
    for name, images, labels in zip(("held out", "seen"), seen, seen_labels, strict=True):
        hits = in_batches(network, images).argmax(1) == labels
        print(f"{name} images of base classes: {100 * hits.double().mean():.1f} %")
    features = {}
    for part in PARTS:
        images, _ = load_part(run.args.images, part)
        features[part] = unit(in_batches(lambda x: trunk(normalised(x)), images)).float()
        write_bytes(run.folder / "features.safetensors", save(features))
    for part, shots, name in itertools.product(PARTS[1:], (1, 5), ("prototype", "logistic")):
        source = Folder(run.args.images)
        source.ids = {name: source.ids[name] for name in classes_of(part)}
        vectors = dict(zip((i for i, _ in source.samples), features[part], strict=True))
        evaluate = TaskEvaluator(HEADS[name](), vectors, trunk, None, (3, 32), 1.0)
        tasks = Episodes.draw(source, 5, shots, 15, run.args.episodes).tasks
        found = [evaluate(number, task)[0] for number, task in enumerate(tasks)]
        mean, half = sum(found) / len(found), normal_interval(found)
        print(f"{part}, 5-way {shots}-shot, {name}: {100 * mean:.2f} ± {100 * half:.2f} %")


def main() -> None:
    """Read the arguments, train and report."""
    parser = options(__doc__, epochs=60, batch=64, lr=0.05, episodes=600)
    parser.add_argument("images", type=Path, help="CIFAR-100's training images in class folders")
    parser.add_argument("--run", type=Path, default=Path("runs/resnet12"))
    parser.add_argument("--width", type=int, default=64, help="of the first block; 64 is ResNet-12")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", action="store_true", help="do not train")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    if not args.report:
        run.train()
    with torch.no_grad():
        report(run)


if __name__ == "__main__":
    main()
