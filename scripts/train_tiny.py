"""Train the embedded backbone on Fashion-MNIST's 60 000 training images, without class labels.

    python scripts/train_tiny.py            # 10 000 steps, about an hour on 2 cores
    python scripts/train_tiny.py --bf16     # compiled, in bfloat16

``augment/diffusion/weights/tiny.md`` has the command of the weights in the package.

The images come from Debian's package ``dataset-fashion-mnist`` or from torchvision's download.
Interrupt it when you like: the same command goes on from the last checkpoint in ``--run``.
"""

import argparse
import copy
import json
import math
from pathlib import Path

import torch
from fashion_mnist import CLASSES, load_split
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from augment.diffusion.process import VariancePreserving
from augment.diffusion.tiny import PROMPTS, WEIGHTS, build_network, haar
from augment.files import sha256
from augment.images import prepare

COARSE = dict.fromkeys(CLASSES, "top") | {
    "Trouser": "trousers",
    "Bag": "bag",
    **dict.fromkeys(("Sandal", "Sneaker", "Ankle boot"), "footwear"),
}
PROMPT_DROPOUT = 0.5
WHITE = 1.0  # the pixel whose clean latent is zero
UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (32, 64, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
    "attention_head_dim": 32,
    "num_class_embeds": len(PROMPTS),
}
ALPHAS2 = VariancePreserving().alphas_cumprod[1:].float()


def load_data() -> tuple[Tensor, Tensor, float]:
    """Clean latents (60 000, 4, 16, 16) of unit variance, prompt numbers, and the latent scale."""
    images, labels = load_split("train")
    prompts = torch.tensor([PROMPTS.index(COARSE[name]) for name in CLASSES])[labels]
    clean = torch.cat([haar(prepare(part, 1, 32) - WHITE) for part in images.split(1000)])
    scale = 1 / clean.std().item()
    return clean * scale, prompts, scale


class Run:
    """Network, its running average, optimiser and step: what a checkpoint holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.args, self.step, self.losses = args, 0, []
        self.network = build_network(UNET)
        if args.start:
            self.network.load_state_dict(load_file(args.start))
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)
        self.parts = ("network", "average", "optimizer", "schedule")
        self.checkpoint = args.run / "last.pt"
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            for part in self.parts:
                getattr(self, part).load_state_dict(state[part])
            self.step, self.losses = state["step"], state["losses"]

    def rate(self, step: int) -> float:
        """200 steps of warm-up, then a half cosine to 2 %."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.args.steps))
        return min(1.0, (step + 1) / 200) * (0.02 + 0.98 * cosine)

    def update(self, loss: Tensor) -> None:
        """One optimiser step, and one of the running average."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        decay = min(0.9995, (self.step + 1) / (self.step + 20))
        with torch.no_grad():
            pairs = [list(net.parameters()) for net in (self.average, self.network)]
            torch._foreach_lerp_(*pairs, 1 - decay)
        self.losses.append(loss.item())
        self.step += 1

    def save(self, scale: float) -> None:
        """Write the checkpoint, and the averaged weights in float16."""
        state = {part: getattr(self, part).state_dict() for part in self.parts}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save({**state, "step": self.step, "losses": self.losses}, temporary)
        temporary.replace(self.checkpoint)
        settings = {key: getattr(self.args, key) for key in ("batch", "lr", "seed")}
        settings["start"] = sha256(self.args.start.read_bytes()) if self.args.start else None
        config = {"unet": UNET, "scale": scale, "white": WHITE, "steps": self.step, **settings}
        weights = {k: v.half().contiguous() for k, v in self.average.state_dict().items()}
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, self.args.out, metadata={"config": json.dumps(config)})


def loss_of(network: nn.Module, clean: Tensor, prompts: Tensor, run: Run) -> Tensor:
    """v-prediction loss of the step's batch; its dice belong to the step, so runs can resume."""
    dice = torch.Generator().manual_seed(run.args.seed * 1_000_003 + run.step)
    rows = torch.randint(len(clean), (run.args.batch,), generator=dice)
    times = torch.randint(len(ALPHAS2), (run.args.batch,), generator=dice)
    noise = torch.randn(run.args.batch, *clean.shape[1:], generator=dice)
    drop = torch.rand(run.args.batch, generator=dice) < PROMPT_DROPOUT
    alpha, sigma = (a[times].sqrt().view(-1, 1, 1, 1) for a in (ALPHAS2, 1 - ALPHAS2))
    z, told = clean[rows], torch.where(drop, 0, prompts[rows])
    with torch.autocast("cpu", torch.bfloat16, enabled=run.args.bf16):
        out = network(alpha * z + sigma * noise, times, told, return_dict=False)[0]
    return (out.float() - (alpha * noise - sigma * z)).square().mean()


def main() -> None:
    """Train, with a checkpoint every 500 steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)
    clean, prompts, scale = load_data()
    run = Run(args)
    network = torch.compile(run.network) if args.bf16 else run.network
    with tqdm(total=args.steps, initial=run.step, mininterval=1) as bar:
        while run.step < args.steps:
            run.update(loss_of(network, clean, prompts, run))
            bar.update()
            if run.step % 50 == 0:
                bar.set_postfix(loss=f"{sum(run.losses[-200:]) / len(run.losses[-200:]):.4f}")
            if run.step % 500 == 0 or run.step == args.steps:
                run.save(scale)


if __name__ == "__main__":
    main()
