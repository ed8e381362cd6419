"""A run of `training.smooth.regulariser`: where it resumes, and what it leaves.

``out`` gets ``run.json`` (the settings), ``metrics.csv``, ``checkpoints/last.ckpt`` and in the end
``pytorch_lora_weights.safetensors``, or the whole backbone. On one CPU thread a run that was
interrupted ends with the same bits; on a GPU some kernels add in any order.
"""

import json
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save

from augment.core.errors import UserError
from augment.core.files import check_folder, locked, remember, sha256, write_bytes
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.checkpoints.lora import LORA
from augment.jobs.job import planning_device
from augment.shards.dataset import open_images
from augment.sources import as_source
from training import lightning
from training.data.identity import check_run
from training.smooth.data import NoisedData, NoisedImages
from training.smooth.regulariser import PROJECTIONS, SmoothDiffusion
from training.smooth.settings import SmoothSettings

SAVE_STEPS = 200  # between two checkpoints


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
