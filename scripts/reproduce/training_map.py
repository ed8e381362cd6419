"""The map from noise to sample along one training.

    python scripts/reproduce/training_map.py --quick --backbone runs/tiny-flow/tiny-flow.safetensors

Staniszewski et al., *There and Back Again*, arXiv 2410.23530: what a noise becomes is settled early
in training, and later steps change details. ``scripts/train_tiny.py --keep`` writes the averaged
weights at steps that are powers of two into its ``--run``, where the last weights must be, too. The
same noises are sampled by DDIM with all of them. Distance is that of a sample from the last
weights' sample of the same noise, over the mean distance of two of these; so 1 is unrelated. *Own*
is the share of samples whose nearest one of the last weights' is that of their own noise, and
*class* the share that the judge puts into its class.
"""

from pathlib import Path
from typing import Any

import torch
from claims import once, options, record, sized
from judge import mean, open_judge, pictures, share, show
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from augment.core.errors import UserError
from augment.core.rng import normal, rng
from augment.diffusion import load_backbone
from augment.diffusion.solver import sample
from augment.measure.relations import assignment
from augment.networks import unit

SHOWN = 8  # noises in the figure


def draw(images: dict[str, Tensor], path: Path) -> None:
    """Draw the samples of the same noises, a row for each step of the training."""
    figure = Figure(figsize=(SHOWN, len(images)), layout="constrained")
    for line, (step, made) in zip(figure.subplots(len(images), SHOWN), images.items(), strict=True):
        for axes, image in zip(line, made, strict=False):
            show(axes, image)
        line[0].set_ylabel(step, fontsize=8)
    figure.savefig(path, dpi=60)


def main() -> None:
    """Sample with all weights, compare with the last."""
    args = options("The map from noise to sample: arXiv 2410.23530.", "training_map").parse_args()
    count, steps = sized(args, (SHOWN, 2), (64, 10), (256, 50))
    last = Path(args.backbone)
    kept = {int(path.stem[5:]): path for path in sorted(last.parent.glob("step-*.safetensors"))}
    if not kept:
        raise UserError(
            f"expected weights step-*.safetensors beside {last}, got none; train with "
            "scripts/train_tiny.py --keep, and give its last weights as --backbone"
        )
    final = load_backbone(args.backbone, device="cpu")
    total = final.config["steps"]  # type: ignore[attr-defined]
    noises = normal(rng(0, "noise"), count, *final.latent_shape)
    images: dict[str, Tensor] = {}
    for step, path in tqdm([*kept.items(), (total, last)], "weights"):
        backbone = load_backbone(str(path), device="cpu")
        tag = f"{backbone.fingerprint['weights'][:8]}-{count}-{steps}"
        images[str(step)] = once(
            args.out / f"{tag}.safetensors",
            lambda b=backbone: {"i": sample(b, noises, None, "ddim", steps)},
        )["i"]
    judge = open_judge(args, final, pictures(args, 8)[1])
    classes = {
        step: (unit(judge.network(made)) @ judge.means.T).argmax(1) for step, made in images.items()
    }
    goal = images[str(total)].flatten(1)
    apart = torch.cdist(goal, goal).sum() / (count * (count - 1))
    own = {step: assignment(made.flatten(1), goal) for step, made in images.items()}
    rows: list[dict[str, Any]] = [
        {
            "step": step, "of the training, %": 100 * int(step) / total,
            "distance": str(mean((made.flatten(1) - goal).norm(dim=1) / apart)),
            "own": str(share(own[step])),
            "class": str(share(classes[step] == classes[str(total)])),
            "FID": judge.fid(judge.network(made)),
        }
        for step, made in images.items()
    ]  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    draw(images, args.out / "training_map.png")
    early = str(max(step for step in kept if step <= max(total / 4, 1)))
    title = f"samples of {count} noises along a training of {total} steps, DDIM {steps}"
    record(
        args, title, rows, {"st-tuning": {f"step {early}": share(own[early])}},
        training_map="Samples of the same noises, by steps of the training",
    )  # fmt: skip


if __name__ == "__main__":
    main()
