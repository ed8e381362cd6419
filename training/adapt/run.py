"""A run of a backbone's training: where it resumes, and what it leaves.

``out`` gets ``run.json`` (the settings), ``metrics.csv``, ``checkpoints/last.ckpt`` and in the end
the low-rank weights and tokens, as `augment.diffusion.checkpoints.adapter` reads them, or the whole
backbone. On one CPU thread a run that was interrupted ends with the same bits; on a GPU some
kernels add in any order.
"""

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from safetensors.torch import save
from torch import Tensor

from augment.core.errors import UserError
from augment.core.files import (
    check_folder,
    locked,
    remember,
    replacing,
    sha256,
    write_bytes,
    write_json,
)
from augment.core.rng import normal, rng
from augment.diffusion import Backbone
from augment.diffusion.backbone import Adaptable
from augment.diffusion.checkpoints.adapter import ADAPTER, record_of
from augment.diffusion.checkpoints.heads import HEADS_FILE, thumbnails
from augment.diffusion.checkpoints.lora import LORA, serialized
from augment.diffusion.checkpoints.tokens import TOKENS, class_tokens
from augment.diffusion.solver import sample
from augment.diffusion.usage import PHOTO
from augment.sources import Source
from augment.sources.images import sheet
from augment.sources.prompts import class_name, class_prompts, nfc
from augment.training import lightning
from augment.training.adapt.data import NoisedData, NoisedImages
from augment.training.adapt.module import PROJECTIONS, Adaptation
from augment.training.adapt.prior import PRIOR, Prior
from augment.training.adapt.recipe import Recipe
from augment.training.adapt.settings import AdaptSettings, RunSettings
from augment.training.data.identity import check_run

SAVE_STEPS = 200  # between two checkpoints
_SHOWN, _SHEET_STEPS = 8, 10  # classes of a sheet, and solver steps of its images


def adapt_backbone(settings: AdaptSettings, backbone: Backbone | None = None) -> Path:
    """Adapt a backbone to the classes of images, in place, or resume the run.

    Args:
        settings: of the run.
        backbone: the model, in float32 or bfloat16; by default that of the settings is loaded.

    Returns:
        The folder, which `load_backbone` takes as ``adapter``.

    Raises:
        UserError: a wrong backbone, target, prompt or word; other settings than the run in ``out``
            has; no preset of that name.
    """
    s, recipe, out = settings, settings.recipe, Path(settings.out)
    check_folder(out)
    s.source.keep_out(out)
    backbone = backbone or s.load()
    weights, before = backbone.fingerprint.get("weights", ""), backbone.fingerprint
    classes, targets = s.source.classes, [*(s.targets or PROJECTIONS)]
    reads = isinstance(backbone, Adaptable) and bool(backbone.encoders() or backbone.usage.template)
    tokens = class_tokens(classes) if recipe.tokens or (recipe.tokens is None and not reads) else {}
    own = s.check_classes(s.words, "words")
    words = {
        token: own.get(name, (recipe.start or class_name(nfc(name))) if reads else "")
        for name, token in tokens.items()
    }
    total = recipe.total(len(classes), len(s.source), s.devices)
    given = s.check_classes(s.prompts, "prompts")
    usual = (backbone.usage.template or PHOTO) if reads else "{name}" if tokens else ""
    template = s.prompt or usual
    rest = [name for name in classes if name not in given]
    called = {name: tokens[name] for name in rest if tokens}
    prompts = given | (class_prompts(rest, template, called) if template else {})
    texts = s.texts(prompts)
    known = (_known(s.source, backbone), s.class_texts(prompts)) if recipe.image_heads else None
    module = Adaptation(backbone, recipe, targets, words, total, s.seed, s.prior_weight, known)
    how = asdict(recipe)
    for name in () if recipe.image_heads else ("image_heads", "head_lr"):
        del how[name]  # runs of older versions do not have them
    record = {
        "backbone": before,
        "data": {"images": len(texts), "prompts": digest_of(texts), "words": words},
        **how,
        **{"total": total, "targets": targets, "seed": s.seed},
        **{"precision": s.precision, "devices": s.devices},
        **({"prior": {"prompt": s.prior.prompt, "weight": s.prior.weight}} if s.prior else {}),
    }
    network: Any = module.network
    if s.checkpointing:
        network.enable_gradient_checkpointing()

    def write(digests: set[str]) -> Path:
        if state := module.adapters():
            write_bytes(out / LORA, serialized(state, module.metadata()))
        if module.heads is not None:
            heads = serialized(module.heads.state(), module.heads.metadata())
            write_bytes(out / HEADS_FILE, heads)
        for name, rows in module.vectors().items():
            write_bytes(out / TOKENS[name], save(rows, {"format": "pt"}))
        named = [token for token in words if any(token in text for text in prompts.values())]
        write_json(out / ADAPTER, record_of(weights, prompts, sorted(digests), named))
        return out

    sheets = [Sheets(out, s.sheets, prompts or {"": ""}, s.seed)] if s.sheets else []
    place = fit(module, s, recipe, texts, record, write, sheets, s.prior)
    if s.checkpointing:
        network.disable_gradient_checkpointing()
    return place


def _known(source: Source, backbone: Backbone) -> Tensor:
    """Return what the images of a source are known by, in its order."""
    form = backbone.channels, backbone.resolution
    rows = [thumbnails(source.load(image_id, *form)[None]) for image_id, _ in source.samples]
    return torch.cat(rows)


class Sheets(pl.Callback):
    """Write ``samples/STEP.png`` now and then: an image of each of a few classes.

    Args:
        folder: of the run.
        every: steps between two sheets.
        prompts: by class.
        seed: of the noises, which are always the same.
    """

    def __init__(self, folder: Path, every: int, prompts: dict[str, str], seed: int) -> None:
        self.folder, self.every, self.seed = folder / "samples", every, seed
        self.prompts, self.last = dict([*prompts.items()][:_SHOWN]), -1

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Sample, if it is time to."""
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if not due or step in (0, self.last) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Adaptation)
        self.last, backbone = step, pl_module.backbone
        rows = range(len(self.prompts))
        shape = backbone.latent_shape
        noises = torch.stack([normal(rng(self.seed, "noise", k), *shape) for k in rows])
        guidance, texts = backbone.usage.guidance, [*self.prompts.values()]
        images = sample(backbone, noises, texts, "fireflow", _SHEET_STEPS, guidance)
        self.folder.mkdir(exist_ok=True)
        page = sheet({f"step {step}": [*images.cpu()]}, [*self.prompts])
        with replacing(self.folder / f"{step:06d}.png") as file:
            page.save(file, "PNG")


def digest_of(texts: list[str]) -> str:
    """Return the SHA-256 of the texts of all images."""
    return sha256(json.dumps(texts).encode())


def fit(
    module: Adaptation,
    settings: RunSettings,
    recipe: Recipe,
    texts: list[str],
    record: dict[str, Any],
    write: Callable[[set[str]], Path],
    callbacks: Sequence[pl.Callback] = (),
    prior: Prior | None = None,
) -> Path:
    """Train a module, or resume its run; return what it has written.

    Args:
        module: whose backbone is adapted afterwards.
        settings: of the run.
        recipe: how long and how fast.
        texts: of each image.
        record: what a resumed run must have in common with the one before.
        write: what writes the result, by the digests of the images.
        callbacks: more to do in training.
        prior: what must not be forgotten.
    """
    s, out, backbone, source = settings, Path(settings.out), module.backbone, settings.source
    given = [*texts, prior.prompt] if prior else texts
    for text in dict.fromkeys(given):
        backbone.condition([text])  # a bad one is refused now, not after a thousand steps
    last = out / "checkpoints" / "last.ckpt"
    lock = locked(out) if lightning.is_first_rank() else nullcontext()
    with lock as held, warnings.catch_warnings(), lightning.interruptible():
        if held:
            lightning.remove_partial(held, out, last.parent, out / PRIOR)
        remember(out / "run.json", record, "--out", last.exists())
        images = NoisedImages(
            source, texts, backbone, recipe.drop, s.seed, module.directions, recipe.flip
        )
        sources = {"training": source}
        if prior:
            sources[PRIOR] = same = prior.source(backbone, out, s.seed)
            texts = [prior.prompt] * len(same)
            images.prior = NoisedImages(same, texts, backbone, 0.0, s.seed, purpose=PRIOR)
        digests = check_run(out, last.exists(), **sources) if held else {}
        data = NoisedData(images, recipe.batch_size, s.workers)
        lightning.silence_lightning()
        # there is no dropout to turn on, and the backbone is used in this mode
        warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
        trainer = _make_trainer(module, s, recipe, callbacks)
        try:
            trainer.fit(
                module, data, ckpt_path=str(last) if last.exists() else None, weights_only=True
            )
        except torch.OutOfMemoryError:
            raise UserError(
                f"expected memory for a batch{module.memory}, got none left; take a smaller "
                "batch_size and a larger accumulate"
            ) from None
        trainer.save_checkpoint(last, weights_only=False)
        module.to(backbone.device)
        module.freeze_backbone()
        if prior and not prior.given:
            digests.pop(PRIOR, None)  # the model knew these before
        real = {digest for part in digests.values() for digest in part.values() if digest}
        return write(real) if trainer.is_global_zero else out


def _make_trainer(
    module: Adaptation, settings: RunSettings, recipe: Recipe, callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    """Make a trainer that logs and keeps checkpoints in the folder of the run."""
    out, device, devices = Path(settings.out), module.backbone.device, settings.devices
    gpu, steps = device.type == "cuda", module.total
    checkpoint = ModelCheckpoint(
        out / "checkpoints", "last", every_n_train_steps=SAVE_STEPS, enable_version_counter=False
    )
    # the last layer of some text encoders goes unused
    strategy = "ddp_find_unused_parameters_true" if len(module.encoders) else "ddp"
    return pl.Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=[device.index or 0] if gpu and devices == 1 else devices,
        strategy=strategy if devices > 1 else "auto",
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=recipe.accumulate,
        gradient_clip_val=1.0,
        precision=settings.precision,
        default_root_dir=out,
        logger=lightning.csv_log(out),
        log_every_n_steps=min(50, steps),
        callbacks=[*callbacks, checkpoint, lightning.PlainSignals(), lightning.Lines()],
        plugins=[lightning.SafeCheckpoints()],
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
