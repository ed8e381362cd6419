"""A run of `training.smooth.regulariser`: where it goes on, and what it leaves.

``out`` gets ``run.json`` (the settings), ``metrics.csv``, ``checkpoints/last.ckpt`` and in the end
``pytorch_lora_weights.safetensors``, or the whole backbone. On one CPU thread a run that was
interrupted ends with the same bits; on a GPU some kernels add in any order.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save
from torch import Tensor

from augment.core.errors import UserError
from augment.core.files import check_folder, locked, remember, sha256, write_bytes
from augment.diffusion.backbone import Backbone, check_batch
from augment.diffusion.checkpoints.lora import LORA
from augment.sources import Source
from training.cli import (
    PlainSignals,
    SafeCheckpoints,
    hush,
    interruptible,
    is_first_rank,
    log_of,
    remove_partial,
)
from training.data.identity import check_run
from training.data.module import brief
from training.smooth.data import NoisingData, Noisings
from training.smooth.regulariser import PROJECTIONS, SmoothDiffusion

Precision = Literal["32-true", "bf16-mixed"]
SAVE_STEPS = 200  # between two checkpoints


def smooth_backbone(
    backbone: Backbone,
    source: Source,
    out: str | Path,
    prompts: Mapping[str, str] | None = None,
    captions: Mapping[str, str] | None = None,
    weight: float = 1.0,
    rank: int = 8,
    targets: Sequence[str] = PROJECTIONS,
    steps: int = 30_000,
    batch_size: int = 3,
    accumulate: int = 32,
    lr: float = 1e-4,
    drop: float = 0.1,
    seed: int = 0,
    devices: int = 1,
    precision: Precision = "32-true",
    workers: int = 0,
) -> Path:
    """Train a backbone to be smooth, in place, or go on with it; see `augment.commands.smooth`.

    Args:
        backbone: the model, in float32.
        source: the images.
        out: folder of the run.
        prompts: one a class; of a class without, empty.
        captions: one an image, by id; they go before the prompts.
        weight: see `SmoothDiffusion`.
        rank: see `SmoothDiffusion`.
        targets: see `SmoothDiffusion`.
        steps: of the optimiser.
        batch_size: images a batch, of each rank.
        accumulate: batches a step.
        lr: see `SmoothDiffusion`.
        drop: see `Noisings`.
        seed: of all dice.
        devices: ranks on this machine, each with the backbone on its own.
        precision: ``bf16-mixed`` computes in bfloat16 what can be.
        workers: processes that load images.

    Returns:
        The LoRA, or the place of the whole backbone, which `load_backbone` takes.

    Raises:
        UserError: a backbone, a target, a prompt or a number that cannot be; other settings than
            the run in ``out`` has.
    """
    check_batch(batch_size)
    if min(steps, accumulate, devices) < 1 or not 0 <= drop <= 1:
        raise UserError(
            f"expected steps, accumulate, devices ≥ 1 and a share to drop in [0, 1], got {steps}, "
            f"{accumulate}, {devices} and {drop}"
        )
    prompts, captions, out = prompts or {}, captions or {}, Path(out)
    check_folder(out)
    if prompts.keys() - set(source.classes):
        raise UserError(
            f"expected prompts for classes out of {brief(source.classes)}, got one for "
            f"{min(prompts.keys() - set(source.classes))!r}; choose one of these"
        )
    classes = [prompts.get(name, "") for name in source.classes]
    texts = [captions.get(image_id, classes[label]) for image_id, label in source.samples]
    for text in dict.fromkeys(texts):
        backbone.condition([text])  # a bad one is told of now, not after a thousand steps
    module = SmoothDiffusion(backbone, weight, rank, targets, lr, seed=seed)
    last = out / "checkpoints" / "last.ckpt"
    data = {"images": len(texts), "prompts": sha256(json.dumps(texts).encode()), "drop": drop}
    how = {"weight": weight, "rank": rank, "targets": list(targets), "lr": lr, "seed": seed}
    batch = {"batch_size": batch_size, "accumulate": accumulate, "devices": devices}
    numbers = {"precision": precision, "steps": steps, **batch}
    settings = {"backbone": backbone.fingerprint, "data": data, **how, **numbers}
    rows = Noisings(source, texts, module.backbone, drop, seed)
    with locked(out) if is_first_rank() else nullcontext() as lock, calm():
        if lock:
            remove_partial(lock, out, last.parent)
            check_run(out, source, last.exists(), "training")
        remember(out / "run.json", settings, "--out", last.exists())
        trainer = make_trainer(out, backbone.device, steps, accumulate, devices, precision)
        begun = str(last) if last.exists() else None
        images = NoisingData(rows, batch_size, workers)
        trainer.fit(module, images, ckpt_path=begun, weights_only=True)
        trainer.save_checkpoint(last, weights_only=False)
        module.to(backbone.device)
        module.network.requires_grad_(False)
        return leave(module, out) if trainer.is_global_zero else out


def make_trainer(
    out: Path, device: torch.device, steps: int, accumulate: int, devices: int, precision: Precision
) -> pl.Trainer:
    """A trainer that logs and keeps checkpoints in the folder of the run."""
    gpu = device.type == "cuda"
    checkpoint = ModelCheckpoint(
        out / "checkpoints",
        "last",
        every_n_train_steps=SAVE_STEPS,
        enable_version_counter=False,
    )
    return pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=[device.index or 0] if gpu and devices == 1 else devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        precision=precision,
        default_root_dir=out,
        logger=log_of(out, "fit"),
        log_every_n_steps=min(50, steps),
        callbacks=[checkpoint, PlainSignals()],
        plugins=[SafeCheckpoints()],
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


@contextmanager
def calm() -> Iterator[None]:
    """Run Lightning without its tips; an interruption is raised as one."""
    with warnings.catch_warnings():
        hush()
        # there is no dropout to be had, and the backbone is used in this mode
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
        try:
            with interruptible():
                yield
        except torch.OutOfMemoryError:
            raise UserError(
                "expected memory for a batch and its second derivatives, got none left; take a "
                "smaller batch_size and a larger accumulate"
            ) from None


def leave(module: SmoothDiffusion, out: Path) -> Path:
    """Write what was trained."""
    if module.rank:
        state: dict[str, Tensor] = module.adapters()
        write_bytes(out / LORA, save(state, {"format": "pt"}))
        return out / LORA
    return module.backbone.save(out)
