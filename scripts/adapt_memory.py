"""Compute the memory of a step of `latent-augment adapt` at full size, without running it.

    python scripts/adapt_memory.py                        # the table of docs/adapt.md
    python scripts/adapt_memory.py --check --pixels 256   # beside a step of SD 1.5 on this CPU

Tensors have shapes and no data (torch's FakeTensorMode), and `Peak` adds up those that are alive at
the same time in a forward pass, its gradient and AdamW, of a network with the
configuration of the public model and LoRA of rank 16. Beside that are the frozen parts: autoencoder
and text encoders. With bf16-mixed all that is frozen is in bfloat16. What is left out: CUDA's own
gigabyte or less, workspaces and fragmentation.
"""

import argparse
import resource
import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from benchmarks.backbone_configs import SD15, SDXL
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from augment.report.evaluate import markdown
from augment.training.adapt.module import PROJECTIONS
from augment.training.models.finetune import ends_in

MODELS: dict[str, tuple[dict[str, Any], int, float]] = {
    "SD 1.5, 512²": (SD15, 512, 83.7e6 + 123.1e6),
    "SDXL, 1024²": (SDXL, 1024, 83.7e6 + 123.1e6 + 694.7e6),
}
"""Configuration, pixels, and number of weights of the autoencoder and the text encoders."""

GIB = 2**30


class Peak(TorchDispatchMode):
    """The bytes of all tensors that are alive, and the most that there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the storages of what an operation returns."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


class LowRank(nn.Module):
    """A frozen layer and its LoRA; peft's own cannot be built of tensors without data."""

    def __init__(self, layer: Any, rank: int = 16) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Add the low-rank product."""
        return self.layer(rows) + self.up(self.down(rows))


def build(
    config: dict[str, Any], again: bool, half: bool
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build a network with LoRA, and its optimiser."""
    torch.set_default_dtype(torch.bfloat16 if half else torch.float32)
    network: Any = UNet2DConditionModel(**config).requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    for name in PROJECTIONS:
        for place, layer in ends_in(network, name):
            network.set_submodule(place, LowRank(layer))
    if again:
        network.enable_gradient_checkpointing()
        network.train()
    tuned = [weight for weight in network.parameters() if weight.requires_grad]
    return network, torch.optim.AdamW(tuned)


def one_step(
    network: nn.Module, optimizer: torch.optim.Optimizer, pixels: int, batch: int, half: bool
) -> None:
    """Do one step: forward, gradient, AdamW."""
    side, added = pixels // 8, {}
    config: Any = network.config
    ones = partial(torch.ones, batch, dtype=torch.bfloat16 if half else torch.float32)
    if config["addition_embed_type"]:
        added = {"text_embeds": ones(1280), "time_ids": ones(6)}
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        answer = network(
            ones(4, side, side),
            ones(),
            ones(77, config["cross_attention_dim"]),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        loss = answer.float().square().mean()
    loss.backward()
    optimizer.step()


def computed(config: dict[str, Any], pixels: int, batch: int, half: bool, again: bool) -> float:
    """Return the peak of one step in GiB, of the network alone."""
    with FakeTensorMode(), Peak() as peak:
        one_step(*build(config, again, half), pixels, batch, half)
    return peak.most / GIB


def resident() -> float:
    """Return the largest memory of this process until now, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Print the table, or one measured step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--pixels", type=int, default=512)
    args = parser.parse_args()
    if args.check:
        expected, before = computed(SD15, args.pixels, 1, False, False), resident()
        one_step(*build(SD15, False, False), args.pixels, 1, False)
        print(f"SD 1.5, {args.pixels} pixels, batch 1, float32, the UNet alone:")
        print(f"computed {expected:.2f} GiB, measured {resident() - before:.2f} GiB")
        return
    rows = []
    for model, (config, pixels, frozen) in MODELS.items():
        for half in (False, True):
            for again in (False, True):
                row = {"model": model, "precision": "bf16-mixed" if half else "32-true"}
                row["checkpointing"] = "yes" if again else "no"
                beside = (2 if half else 4) * frozen / GIB
                for batch in (1, 4):
                    peak = computed(config, pixels, batch, half, again) + beside
                    row[f"batch {batch}"] = f"{peak:.1f} GiB"
                rows.append(row)
                print(row, flush=True)
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
