"""A run of `training.smooth.regulariser`: where it resumes, and what it leaves.

``out`` gets ``run.json`` (the settings), ``metrics.csv``, ``checkpoints/last.ckpt`` and in the end
``pytorch_lora_weights.safetensors``, or the whole backbone. On one CPU thread a run that was
interrupted ends with the same bits; on a GPU some kernels add in any order.
"""

import json
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save

from augment.core.errors import UserError, first_few
from augment.core.files import check_folder, locked, remember, sha256, write_bytes
from augment.core.registry import refuse_reserved
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.checkpoints.lora import LORA
from augment.jobs.job import planning_device
from augment.shards.dataset import open_images
from augment.sources import Source, as_source
from augment.sources.prompts import prompts_of
from training import lightning
from training.checks import at_least, expect
from training.data.identity import check_run
from training.smooth.data import NoisedData, NoisedImages, read_captions
from training.smooth.regulariser import PROJECTIONS, SmoothDiffusion

SAVE_STEPS = 200  # between two checkpoints


@dataclass(frozen=True, kw_only=True)
class SmoothSettings:
    """The options of ``latent-augment smooth``.

    Args:
        images: folder with one sub-folder of image files a class, a folder of shards, or
            another source, as for invert.
        out: folder of the run, which gets pytorch_lora_weights.safetensors, for
            --backbone-options '{lora: OUT}'; an interrupted run is resumed.
        backbone: diffusion model, as for invert.
        prompt: template of the prompts, such as 'a photo of a {name}'.
        prompts: prompts by class, as YAML such as '{Coat: top}'; they replace the template's.
        captions: metadata.jsonl with file_name and text of images; captions replace prompts.
        weight: weight of the regulariser.
        rank: rank of the low-rank weights; 0 trains all weights, and leaves a whole backbone.
        targets: endings of the names of layers that get low-rank weights; by default the
            projections of the attention.
        steps: number of optimiser steps.
        batch_size: images a batch, on each device.
        accumulate: batches a step.
        lr: learning rate, which is constant.
        drop: share of the images that are trained without their prompt, in [0, 1].
        seed: seed of all random draws.
        device: device such as cuda or cpu; by default the GPU if there is one.
        devices: number of processes, each on a device of its own.
        precision: precision of the training; bf16-mixed computes in bfloat16 where it can.
        workers: number of processes that load images.
        backbone_options: options of the backbone, as YAML such as '{resolution: 384}'.

    Raises:
        UserError: a number is out of its range.
    """

    images: Source | str
    out: str
    backbone: str = "tiny"
    prompt: str = ""
    prompts: dict[str, str] | None = None
    captions: str | None = None
    weight: float = 1.0
    rank: int = 8
    targets: list[str] | None = None
    steps: int = 30000
    batch_size: int = 3
    accumulate: int = 32
    lr: float = 1e-4
    drop: float = 0.1
    seed: int = 0
    device: str | None = None
    devices: int = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    workers: int = 0
    backbone_options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size, accumulate=self.accumulate)
        at_least(1, steps=self.steps, devices=self.devices)
        expect(0 <= self.drop <= 1, "drop in [0, 1]", self.drop)
        refuse_reserved(self.backbone_options or {}, "name_or_path", "device", "dtype")

    def texts(self, source: Source) -> list[str]:
        """Return the caption of each image, or else the prompt of its class."""
        captions = {} if self.captions is None else read_captions(self.captions, source)
        prompts = prompts_of(source.classes, self.prompt, self.prompts)
        unknown = prompts.keys() - set(source.classes)
        if unknown:
            raise UserError(
                f"expected prompts for classes out of {first_few(source.classes)}, got one for "
                f"{min(unknown)!r}; choose one of these"
            )
        classes = [prompts.get(name, "") for name in source.classes]
        return [captions.get(image_id, classes[label]) for image_id, label in source.samples]


def smooth_backbone(settings: SmoothSettings, backbone: Backbone | None = None) -> Path:
    """Train a backbone to be smooth, in place, or resume the run.

    Args:
        settings: of the run.
        backbone: the model, in float32; by default that of the settings is loaded.

    Returns:
        The LoRA, or the place of the whole backbone, which `load_backbone` takes.

    Raises:
        UserError: a wrong backbone, target or prompt; other settings than the run in ``out`` has.
    """
    s, out = settings, Path(settings.out)
    check_folder(out)
    source = as_source(open_images(s.images)).readable(name="training")
    texts = s.texts(source)
    if backbone is None:
        options = s.backbone_options or {}
        backbone = load_backbone(s.backbone, planning_device(s.device), torch.float32, **options)
    for text in dict.fromkeys(texts):
        backbone.condition([text])  # a bad one is refused now, not after a thousand steps
    targets = [*(s.targets or PROJECTIONS)]
    module = SmoothDiffusion(backbone, s.weight, s.rank, targets, s.lr, seed=s.seed)
    last = out / "checkpoints" / "last.ckpt"
    digest = sha256(json.dumps(texts).encode())
    record = {
        "backbone": backbone.fingerprint,
        "data": {"images": len(texts), "prompts": digest, "drop": s.drop},
        **{"weight": s.weight, "rank": s.rank, "targets": targets, "lr": s.lr, "seed": s.seed},
        **{"precision": s.precision, "steps": s.steps, "batch_size": s.batch_size},
        **{"accumulate": s.accumulate, "devices": s.devices},
    }
    images = NoisedImages(source, texts, module.backbone, s.drop, s.seed)
    data = NoisedData(images, s.batch_size, s.workers)
    lock = locked(out) if lightning.is_first_rank() else nullcontext()
    with lock as held, warnings.catch_warnings(), lightning.interruptible():
        if held:
            lightning.remove_partial(held, out, last.parent)
            check_run(out, source, last.exists(), "training")
        remember(out / "run.json", record, "--out", last.exists())
        lightning.silence_lightning()
        # there is no dropout to turn on, and the backbone is used in this mode
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
        trainer = _make_trainer(out, backbone.device, settings)
        try:
            trainer.fit(
                module, data, ckpt_path=str(last) if last.exists() else None, weights_only=True
            )
        except torch.OutOfMemoryError:
            raise UserError(
                "expected memory for a batch and its second derivatives, got none left; take a "
                "smaller batch_size and a larger accumulate"
            ) from None
        trainer.save_checkpoint(last, weights_only=False)
        module.to(backbone.device)
        module.network.requires_grad_(False)
        if not trainer.is_global_zero:
            return out
        if not s.rank:
            return module.backbone.save(out)
        write_bytes(out / LORA, save(module.adapters(), {"format": "pt"}))
        return out / LORA


def _make_trainer(out: Path, device: torch.device, settings: SmoothSettings) -> pl.Trainer:
    """Make a trainer that logs and keeps checkpoints in the folder of the run."""
    gpu, devices, steps = device.type == "cuda", settings.devices, settings.steps
    checkpoint = ModelCheckpoint(
        out / "checkpoints", "last", every_n_train_steps=SAVE_STEPS, enable_version_counter=False
    )
    return pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=[device.index or 0] if gpu and devices == 1 else devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=1.0,
        precision=settings.precision,
        default_root_dir=out,
        logger=lightning.csv_log(out),
        log_every_n_steps=min(50, steps),
        callbacks=[checkpoint, lightning.PlainSignals()],
        plugins=[lightning.SafeCheckpoints()],
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
