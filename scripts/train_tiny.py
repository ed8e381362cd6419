"""Train the embedded backbones, without class labels.

    python scripts/train_tiny.py            # 10 000 steps, about an hour on 2 cores
    python scripts/train_tiny.py --bf16     # compiled, in bfloat16
    python scripts/train_tiny.py --images CIFAR --run runs/tiny-cifar --out tiny-cifar.safetensors
    python scripts/train_tiny.py --flow --steps 2048 --lr 5e-4 --keep --run runs/tiny-flow --start \
        augment/diffusion/backbones/weights/tiny.safetensors --out tiny-flow.safetensors

The last is a rectified flow, which ends at pure noise, as ``--zero-snr`` does; Stable Diffusion's
own schedule leaves 7 % of the latent. ``--keep`` keeps the weights at steps that are powers of two.
``augment/diffusion/backbones/weights/*.md`` have the commands of the weights in the package. The
images are Fashion-MNIST's 60 000 training images, of Debian's package ``dataset-fashion-mnist`` or
of torchvision's download; or CIFAR-10's in class folders. Of those the first 100 of each class are
left out, for few shots, and so are those from the 4000th on, for tests. Interrupt it at any time:
the same command resumes from the last checkpoint in ``--run``.
"""

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from fashion_mnist import CLASSES, load_split
from long_run import DenoiserRun, half_precision, options
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from augment.core.files import sha256, write_bytes
from augment.diffusion.backbones.tiny import PROMPTS, WEIGHTS, build_network, haar
from augment.diffusion.process import GOALS, Flow, Process, VariancePreserving
from augment.sources import Folder
from augment.sources.fashion import COARSE
from augment.sources.images import prepare

VEHICLES = ("airplane", "automobile", "ship", "truck")
KEPT = slice(100, 4000)  # of each class of CIFAR-10
PROMPT_DROPOUT = 0.5
LEVELS = 1000  # of noise in training
UNET = {
    "sample_size": 16,
    "layers_per_block": 2,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
    "attention_head_dim": 32,
}


class Data(NamedTuple):
    """Clean latents of unit variance with their prompts, and how they are made."""

    clean: Tensor
    prompts: Tensor
    words: tuple[str, ...]
    scale: float
    white: float  # the pixel whose clean latent is zero
    mirror: bool  # Haar's horizontal and diagonal details change their sign


def load_fashion() -> Data:
    """Load Fashion-MNIST: grey, and white is zero."""
    images, labels = load_split("train")
    prompts = torch.tensor([PROMPTS.index(COARSE[name]) for name in CLASSES])[labels]
    clean = torch.cat([haar(prepare(part, 1, 32) - 1.0) for part in images.split(1000)])
    scale = 1 / clean.std().item()
    return Data(clean * scale, prompts, PROMPTS, scale, 1.0, mirror=False)


def load_cifar(root: Path) -> Data:
    """Load CIFAR-10 from class folders, `KEPT` of each: colour, and mid grey is zero."""
    folder = Folder(root)
    kept = [(name, i) for name, names in folder.ids.items() for i in names[KEPT]]
    images = torch.stack([folder.load(i, 3, 32) for _, i in tqdm(kept, "images")])
    clean = haar(images - 0.5)
    words = ("", "animal", "vehicle")
    prompts = torch.tensor([1 + (name in VEHICLES) for name, _ in kept])
    scale = 1 / clean.std().item()
    return Data(clean * scale, prompts, words, scale, 0.5, mirror=True)


def mirrored(clean: Tensor) -> Tensor:
    """Return the clean latents of the mirror images."""
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0], device=clean.device).repeat(clean.shape[1] // 4)
    return clean.flip(-1) * sign.view(-1, 1, 1)


class Run(DenoiserRun):
    """A training of ``tiny``'s network by v-prediction, or of a flow."""

    def __init__(self, args: argparse.Namespace, data: Data) -> None:
        torch.manual_seed(args.seed)
        self.data = data
        self.process: Process = (
            Flow() if args.flow else VariancePreserving("v", zero_terminal_snr=args.zero_snr)
        )
        levels = [number / LEVELS for number in range(1, LEVELS + 1)]
        self.amounts = torch.tensor([self.process.alpha_sigma(level) for level in levels])
        self.times = torch.tensor([self.process.timestep(level) for level in levels])
        channels = data.clean.shape[1]
        sizes = {"in_channels": channels, "out_channels": channels}
        self.unet = UNET | sizes | {"num_class_embeds": len(data.words)}
        network = build_network(self.unet)
        if args.start:
            network.load_state_dict(load_file(args.start))
        super().__init__(args, network)
        self.predict = torch.compile(network) if args.bf16 else network

    def rate(self) -> float:
        """Warm up over 200 steps, then follow a half cosine to 2 %."""
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        return self.args.lr * (min(1.0, (self.step + 1) / 200) * (0.02 + 0.98 * cosine))

    def decay(self) -> float:
        """Average over the last 2000 steps, fewer at the start."""
        return min(0.9995, (self.step + 1) / (self.step + 20))

    def update(self, loss: Tensor) -> None:
        """Make a step; keep the weights before it if its number is a power of two."""
        if self.args.keep and self.step & (self.step - 1) == 0:
            self.write_to(self.args.run / f"step-{self.step:06}.safetensors")
        super().update(loss)

    def loss(self) -> Tensor:
        """Return the loss of the step's batch, which is a function of the step."""
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.step)
        clean, prompts, count = self.data.clean, self.data.prompts, self.batch
        rows = torch.randint(len(clean), (count,), generator=generator)
        numbers = torch.randint(LEVELS, (count,), generator=generator)
        noise = torch.randn(count, *clean.shape[1:], generator=generator)
        drop = torch.rand(count, generator=generator) < PROMPT_DROPOUT
        alpha, sigma = self.amounts[numbers].T.view(2, -1, 1, 1, 1)
        z, words = clean[rows], torch.where(drop, 0, prompts[rows])
        if self.data.mirror:
            flip = torch.rand(count, generator=generator) < 0.5
            z = torch.where(flip.view(-1, 1, 1, 1), mirrored(z), z)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            latents, times = alpha * z + sigma * noise, self.times[numbers]
            out = self.predict(latents, times, words)
        goal = GOALS[self.process.prediction](z, noise, alpha, sigma)
        return (out.float() - goal).square().mean()

    def write(self) -> None:
        """Write the averaged weights to ``--out``."""
        self.write_to(self.args.out)

    def write_to(self, path: Path) -> None:
        """Write the averaged weights in float16."""
        settings = {key: getattr(self.args, key) for key in ("batch", "lr", "seed")}
        settings["start"] = sha256(self.args.start.read_bytes()) if self.args.start else None
        about = {"scale": self.data.scale, "white": self.data.white, "prompts": self.data.words}
        options = {"prediction": "v"} | ({"zero_terminal_snr": True} if self.args.zero_snr else {})
        about["process"] = ("flow", {}) if self.args.flow else ("diffusion", options)
        config = {"unet": self.unet, **about, "steps": self.step, **settings}
        path.parent.mkdir(parents=True, exist_ok=True)
        state = half_precision(self.average.state_dict())
        write_bytes(path, save(state, {"config": json.dumps(config)}))


def main() -> None:
    """Read the arguments and train."""
    parser = options(__doc__, steps=10_000, batch=64, lr=1e-3)
    parser.add_argument("--images", type=Path, help="CIFAR-10 in class folders")
    parser.add_argument("--start", type=Path, help="weights to begin with")
    ends = parser.add_mutually_exclusive_group()
    ends.add_argument("--zero-snr", action="store_true", help="schedule that ends at pure noise")
    ends.add_argument("--flow", action="store_true", help="rectified flow")
    parser.add_argument("--keep", action="store_true", help="keep weights at powers of two")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    Run(args, load_cifar(args.images) if args.images else load_fashion()).train()


if __name__ == "__main__":
    main()
