"""The classifier: a network, a loss, an optimiser, and what is measured."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision.transforms import v2

from augment.errors import UserError, lookup
from augment.seeds import rng
from training.losses import class_weights, cost, make_loss, smooth
from training.metrics import Report, write_tables
from training.networks import build_network
from training.tuning import (
    TUNES,
    AuxiliaryBatchNorm,
    CosineHead,
    ScaledHead,
    add_lora,
    auxiliary,
    features,
    freeze,
    get_head,
    set_head,
    tau_normalised,
    train_mode,
    with_auxiliary_norms,
)

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
WAYS = (*TUNES, "scale")
TAUS = tuple(t / 10 for t in range(21))
"""What `Classifier.tau` is chosen from (Kang et al., arXiv 1910.09217)."""


class Classifier(pl.LightningModule):
    """A classifier of real and synthetic images; the rate follows a half cosine to zero.

    Two-stage training (Kang et al., arXiv 1910.09217) starts from a checkpoint of the first stage:
    cRT is ``tune: head`` with the sampler ``class``, LWS ``tune: scale``; the τ-normalised head
    needs no training, ``tau: val`` when testing.

    Args:
        counts: how many *real* training images there are of each class: what losses take for the
            prior, and what many, medium and few are told by.
        class_names: for the tables; by default the labels.
        network: see `training.networks.build_network`.
        channels: of the images.
        pretrained: start with timm's weights.
        start: start with the weights of a checkpoint; a head of other classes is passed over.
        tune: ``all`` weights; a new ``head`` on the frozen rest; one ``scale`` a class of the head
            there is; or ``lora``, adapters of low rank and a new head.
        rank, targets: of the adapters; see `training.tuning.add_lora`.
        loss, loss_options: see `training.losses`; ``ldam`` gives the network a cosine head.
        smoothing: of the labels.
        reweight_from: epoch from which the costs are weighted by class (deferred re-weighting).
        real_weight: λ of λ·loss(real) + (1 − λ)·loss(synthetic), the means over a batch's parts
            (DataDream, arXiv 2407.10910); a part that a batch lacks counts as zero. By default all
            images weigh the same.
        auxiliary_norms: synthetic images have batch norms of their own.
        mixup, cutmix: α of mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899), each taken for
            half of the batches if both are given.
        optimizer: sgd, adam or adamw.
        lr, weight_decay, momentum: of the optimiser.
        reference_batch: the images a step, of all ranks, that ``lr`` is meant for: it is scaled in
            proportion; by default it is taken as it is.
        warm_up: steps over which the rate rises.
        tau: exponent of the τ-normalised head when testing; ``val`` chooses it by the validation
            images.
        seed: of mixup, dropout and the like; each step has dice of its own.

    Raises:
        UserError: an unknown network, loss, optimiser or ``tune``, or an option out of its range.
    """

    counts: Tensor

    def __init__(
        self,
        counts: list[int],
        class_names: list[str] | None = None,
        network: str = "small_cnn",
        channels: int = 3,
        pretrained: bool = False,
        start: str | None = None,
        tune: str = "all",
        rank: int = 8,
        targets: list[str] | None = None,
        loss: str = "cross_entropy",
        loss_options: dict[str, Any] | None = None,
        smoothing: float = 0.0,
        reweight_from: int | None = None,
        real_weight: float | None = None,
        auxiliary_norms: bool = False,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        optimizer: str = "adamw",
        lr: float = 2e-3,
        weight_decay: float = 1e-2,
        momentum: float = 0.9,
        reference_batch: int | None = None,
        warm_up: int = 0,
        tau: float | str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if tune not in WAYS:
            raise UserError(f"expected tune out of {', '.join(WAYS)}, got {tune!r}; choose one")
        if real_weight is not None and not 0 <= real_weight <= 1:
            raise UserError(f"expected real_weight in [0, 1], got {real_weight}")
        if isinstance(tau, str) and tau != "val":
            raise UserError(f"expected a number or val for tau, got {tau!r}")
        if min(mixup, cutmix, lr, weight_decay, warm_up, smoothing) < 0 or rank < 1:
            raise UserError(
                "expected mixup, cutmix, lr, weight_decay, warm_up, smoothing ≥ 0, rank ≥ 1, got "
                f"{[mixup, cutmix, lr, weight_decay, warm_up, smoothing]} and {rank}"
            )
        if len(counts) < 2:
            raise UserError(f"expected at least 2 classes to tell apart, got {len(counts)}")
        lookup(OPTIMIZERS, optimizer, "optimiser")
        classes = len(counts)
        self.loss = make_loss(loss, **(loss_options or {}))
        self.network = build_network(network, channels, classes, pretrained)
        self.mean, self.std = normalization(self.network, pretrained)
        if loss == "ldam":
            head = get_head(self.network)
            set_head(self.network, CosineHead(head.in_features, classes))
        if auxiliary_norms:
            with_auxiliary_norms(self.network)
        if start:
            load_weights(self.network, start, but_head=tune in ("head", "lora"))
        self._prepare()
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("counts", torch.tensor(counts), persistent=False)
        mixes = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
        self.mixes = [mix(alpha=a, num_classes=classes) for mix, a in mixes if a]
        self.report = Report(classes, counts)

    def _prepare(self) -> None:
        """Freeze what is not tuned."""
        hp: Any = self.hparams
        if hp.tune == "lora":
            add_lora(self.network, hp.rank, hp.targets)
        elif hp.tune == "scale":
            set_head(self.network, ScaledHead(get_head(self.network)))
        if hp.tune in ("head", "scale"):
            freeze(self.network)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Logits of images in [0, 1]."""
        return self.network(self.normalized(images))

    def normalized(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """What the network takes."""
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let a training resume after an epoch's end with the next epoch's first batch."""
        prepare_resume(checkpoint)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Throw this step's dice, whatever came before; keep what is frozen as it is."""
        hp: Any = self.hparams
        loop: Any = self.trainer.fit_loop.epoch_loop
        done = loop.batch_progress.total.processed
        torch.manual_seed(int(rng(hp.seed, "step", done, self.global_rank).integers(2**63)))
        train_mode(self.network, "head" if hp.tune == "scale" else hp.tune)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of (images, labels) or (images, labels, whether synthetic)."""
        images, labels, *rest = batch
        fake = rest[0] if rest else torch.zeros(len(images), dtype=torch.bool, device=self.device)
        loss = self.loss_of(images, labels, fake)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def loss_of(
        self, images: Float[Tensor, "n c h w"], labels: Tensor, fake: Bool[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """The mean cost; or λ of the real images' mean and 1 − λ of the synthetic ones'.

        Real and synthetic images are mixed with their like where they are told apart.
        """
        hp: Any = self.hparams
        apart = hp.real_weight is not None or hp.auxiliary_norms
        parts = [~fake, fake] if apart else [torch.ones_like(fake)]
        parts = [part.nonzero().squeeze(1) for part in parts if part.any()]
        mixed = [self._mixed(images[part], labels[part]) for part in parts]
        inputs, targets = (torch.cat(column) for column in zip(*mixed, strict=True))
        synthetic = fake[torch.cat(parts)]
        costs = self._costs(self._logits(inputs, synthetic), targets)
        if hp.real_weight is None:
            return costs.mean() + self._nothing()
        means = [
            weight * costs[flag].sum() / flag.sum().clamp_min(1)
            for weight, flag in ((hp.real_weight, ~synthetic), (1 - hp.real_weight, synthetic))
        ]
        return means[0] + means[1] + self._nothing()

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and their labels, by mixup or CutMix and smoothing if these are wanted."""
        hp: Any = self.hparams
        if self.mixes:
            mix = self.mixes[int(torch.randint(len(self.mixes), ()))]
            images, labels = mix(images, labels)
        if hp.smoothing:
            labels = smooth(labels, len(self.counts), hp.smoothing)
        return images, labels

    def _logits(self, images: Tensor, fake: Bool[Tensor, " n"]) -> Float[Tensor, "n k"]:
        """Logits of real images and, after them, synthetic ones, each by their own norms if any.

        A lone image of either, which no batch norm takes, goes with the others.
        """
        hp: Any = self.hparams
        count = int(fake.sum())
        if not hp.auxiliary_norms or count < 2:
            return self(images)
        if len(images) - count < 2:
            with auxiliary(self.network):
                return self(images)
        real = self(images[~fake])
        with auxiliary(self.network):
            return torch.cat([real, self(images[fake])])

    def _costs(self, logits: Float[Tensor, "n k"], labels: Tensor) -> Float[Tensor, " n"]:
        """The cost of each image; re-weighted ones keep the scale, as in the code of LDAM-DRW."""
        hp: Any = self.hparams
        table = self.loss(logits.float(), self.counts)
        if hp.reweight_from is None or self.current_epoch < hp.reweight_from:
            return cost(table, labels)
        weights = class_weights(self.counts).expand_as(table)
        return cost(table * weights, labels) / cost(weights, labels).mean()

    def _nothing(self) -> Tensor | float:
        """Zero, of all norms: DDP waits for gradients of those too that a rank had no image for."""
        norms = [m for m in self.network.modules() if isinstance(m, AuxiliaryBatchNorm)]
        return sum(0.0 * p.sum() for norm in norms for p in norm.parameters())

    def evaluation_step(self, batch: Any, batch_idx: int) -> None:
        """Count."""
        images, labels = batch[:2]
        self.report.update(self(images).float() * getattr(self.loss, "scale", 1.0), labels)

    validation_step = test_step = evaluation_step

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy`` and the like."""
        self._tell("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy`` and the like, and write the tables beside the log."""
        names = self.hparams.class_names or [str(k) for k in range(len(self.counts))]  # type: ignore[attr-defined]
        confusion = self.report.confusion  # of all ranks
        folder = self.trainer.log_dir if self.trainer.loggers else None
        if folder and self.trainer.is_global_zero:
            write_tables(Path(folder), names, self.counts.tolist(), confusion)
        self._tell("test")

    def _tell(self, stage: str) -> None:
        values = {f"{stage}/{name}": value for name, value in self.report.compute().items()}
        for name, value in values.items():
            shown = name == f"{stage}/accuracy"
            self.log(name, value, prog_bar=shown, sync_dist=True)  # the same on all ranks
        self.report.reset()

    def on_test_start(self) -> None:
        """Put the τ-normalised head in, if there is to be one."""
        hp: Any = self.hparams
        if hp.tau is not None:
            self.head = get_head(self.network)
            tau = self.best_tau() if hp.tau == "val" else float(hp.tau)
            print(f"tau {tau:g}")
            set_head(self.network, tau_normalised(self.head, tau))

    def on_test_end(self) -> None:
        """Put the head back."""
        if self.hparams.tau is not None:  # type: ignore[attr-defined]
            set_head(self.network, self.head)

    @torch.no_grad()
    def best_tau(self) -> float:
        """The τ out of `TAUS` of the best balanced accuracy on the validation images."""
        data, labels = [], []
        for images, truth in self.trainer.datamodule.all_of("val"):  # type: ignore[attr-defined]
            data.append(features(self.network, self.normalized(images.to(self.device))))
            labels.append(truth)
        rows, truth = torch.cat(data), torch.cat(labels).to(self.device)
        heads = {tau: tau_normalised(self.head, tau) for tau in TAUS}
        hits = {tau: (head(rows).argmax(1) == truth).float() for tau, head in heads.items()}
        present = F.one_hot(truth, len(self.counts)).float()
        recall = {tau: (hit @ present) / present.sum(0).clamp_min(1) for tau, hit in hits.items()}
        return max(TAUS, key=lambda tau: recall[tau].mean().item())

    def configure_optimizers(self) -> Any:
        """The optimiser; the rate rises over ``warm_up`` steps and falls along a half cosine."""
        hp: Any = self.hparams
        kind, steps = OPTIMIZERS[hp.optimizer], self.total_steps()
        rate = hp.lr
        if hp.reference_batch:
            trainer: Any = self.trainer
            images = trainer.datamodule.batch_size * trainer.world_size
            rate *= images * trainer.accumulate_grad_batches / hp.reference_batch
        more = {"momentum": hp.momentum} if hp.optimizer == "sgd" else {}
        tuned = [p for p in self.parameters() if p.requires_grad]
        optimizer = kind(tuned, lr=rate, weight_decay=hp.weight_decay, **more)

        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / (hp.warm_up + 1))
            return rising * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def total_steps(self) -> int:
        """The optimiser's steps of the whole training.

        Not the trainer's ``estimated_stepping_batches``, which makes it lose a loader's state.

        Raises:
            UserError: the training has no end.
        """
        trainer: Any = self.trainer
        data: Any = getattr(trainer, "datamodule", None)
        ends = [trainer.max_steps] if trainer.max_steps > 0 else []
        if (trainer.max_epochs or -1) > 0 and hasattr(data, "draws"):
            ends.append(trainer.max_epochs * -(-len(data.draws) // trainer.accumulate_grad_batches))
        if not ends:
            raise UserError(
                "expected trainer.max_steps ≥ 1, or max_epochs and ImageData, got neither; set "
                "--trainer.max_steps"
            )
        return min(ends)


def prepare_resume(checkpoint: dict[str, Any]) -> None:
    """Correct the loop counters of a checkpoint that was not written after a batch within an epoch.

    Lightning 2.6 resumes correctly only there. After an epoch's end it takes one batch of
    the next epoch for the whole epoch, so that a training with ``max_epochs`` ends too early.
    """
    loops = checkpoint.get("loops", {}).get("fit_loop")
    if not loops or not loops["epoch_loop.batch_progress"]["current"]["ready"]:
        return
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    if batch["current"]["processed"] < batch["current"]["ready"]:  # an error came within a batch
        batch["is_last_batch"] = False
        for count in (batch["total"], batch["current"]):
            count["ready"] = count["started"] = count["processed"]
    ready, complete = batch["current"]["ready"], batch["current"]["completed"]
    if not batch["is_last_batch"]:
        if complete == ready and epoch["total"]["processed"] == epoch["total"]["ready"]:
            for count in (epoch["total"], epoch["current"]):  # max_steps cut this epoch short
                count["processed"] = count["completed"] = count["ready"] - 1
        return
    epochs = batch["total"]["ready"] // ready
    if complete == ready and epoch["total"]["processed"] < epochs:
        return  # written after the validation: the epoch's end is still to come
    if complete == ready:
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    for count in (batch["total"], batch["current"]):
        count["completed"] = count["ready"] - 1
    batch["is_last_batch"] = False
    for count in (epoch["total"], epoch["current"]):
        count.update(ready=epochs + 1, started=epochs, processed=epochs, completed=epochs)


def normalization(network: nn.Module, pretrained: bool) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the pixels that a network was trained with, or usual ones."""
    known = getattr(network, "pretrained_cfg", None) if pretrained else None
    return (known["mean"], known["std"]) if known else ((0.5,), (0.25,))


def load_weights(network: nn.Module, path: str, but_head: bool) -> None:
    """Load a network's weights from a checkpoint of a `Classifier`.

    Args:
        network: what they are for.
        path: of the checkpoint; nothing is unpickled but tensors and plain values.
        but_head: leave the head as it is.

    Raises:
        UserError: it cannot be read, or is of another network.
    """
    try:
        state = torch.load(Path(path), map_location="cpu", weights_only=True)["state_dict"]
        state = {
            k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")
        }
        if but_head:
            head = {id(p) for p in get_head(network).parameters()}
            last = {name for name, p in network.named_parameters() if id(p) in head}
            state = {k: v for k, v in state.items() if k not in last}
            state |= {k: v for k, v in network.state_dict().items() if k in last}
        network.load_state_dict(state)
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError) as error:
        told = " ".join(str(error).split())[:160]
        raise UserError(
            f"expected a checkpoint of the same network at {path}, got {told or error!r}; give one "
            "that latent-augment train wrote"
        ) from None
    except Exception as error:  # pickle.UnpicklingError is raised for what is refused
        raise UserError(
            f"expected a checkpoint of tensors and plain values at {path}, got one that is refused "
            f"({type(error).__name__}); give one that latent-augment train wrote"
        ) from None
