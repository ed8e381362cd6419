"""The classifier: a network, a loss, an optimiser, and what is measured."""

import math
import warnings
from inspect import signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torchvision.transforms import v2

from augment.core.errors import AugmentWarning, UserError, lookup
from augment.core.rng import rng
from augment.diffusion.checkpoints.hub import brief
from augment.networks.timm import (
    SOURCE_PREFIXES,
    Weights,
    check_names,
    mean_std,
    other_classes,
    read_weights,
    recipe,
)
from training.models.finetune import (
    TUNES,
    AuxiliaryBatchNorm,
    CosineHead,
    ScaledHead,
    add_lora,
    auxiliary,
    features,
    freeze,
    get_head,
    head_name,
    set_head,
    tau_normalised,
    train_mode,
    with_auxiliary_norms,
)
from training.models.losses import class_weights, cost, make_loss, smooth
from training.models.metrics import Report, write_tables
from training.models.networks import build_network, usual_resolution

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
        network: see `training.models.networks.build_network`; by default that of ``start``, or
            small_cnn.
        channels: of the images; by default those of ``start``, or 3.
        resolution: pixels of the images; by default those of ``start``, or the network's usual ones
            (timm's configuration; 32 for our small networks).
        network_options: of ``timm.create_model``, such as ``{drop_path_rate: 0.1}``.
        pretrained: start with timm's weights.
        start: start with the weights of a checkpoint, a state dict, or a model in timm's format
            (``hf-hub:USER/MODEL``, ``local-dir:FOLDER``); a head of other classes is passed over.
        tune: ``all`` weights; a new ``head`` on the frozen rest; one ``scale`` a class of the head
            there is; or ``lora``, adapters of low rank and a new head.
        rank, targets: of the adapters; see `training.models.finetune.add_lora`.
        loss, loss_options: see `training.models.losses`; ``ldam`` gives the network a cosine head.
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

    Mean and deviation of the pixels belong to the weights: those of timm's configuration for
    pretrained ones, those of ``start`` for its, 0.5 and 0.25 otherwise. They lie in the state dict
    (``mean_std``), and all that rebuilds the network lies in the hyperparameters of a checkpoint.

    Raises:
        UserError: an unknown network, loss, optimiser or ``tune``, an option out of its range, or
            one that contradicts ``start``.
    """

    counts: Tensor
    mean_std: Tensor

    def __init__(
        self,
        counts: list[int],
        class_names: list[str] | None = None,
        network: str | None = None,
        channels: int | None = None,
        resolution: int | None = None,
        network_options: dict[str, Any] | None = None,
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
        sourced = start and start.startswith(SOURCE_PREFIXES)
        weights = read_weights(start) if start and not sourced else None
        pretrained = bool(sourced) or (pretrained and not start)
        self.network = self._build(weights.settings if weights else {}, classes, pretrained)
        hp: Any = self.hparams
        if weights:
            rows = weights.pixels(self.network, hp.channels)
        else:
            rows = mean_std(self.network if pretrained else None, hp.channels)
        self.register_buffer("mean_std", rows)
        if loss == "ldam":
            head = get_head(self.network)
            set_head(self.network, CosineHead(head.in_features, classes))
        if auxiliary_norms:
            with_auxiliary_norms(self.network)
        if weights:
            self._load(weights)
        self._prepare()
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("counts", torch.tensor(counts), persistent=False)
        mixes = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
        self.mixes = [mix(alpha=a, num_classes=classes) for mix, a in mixes if a]
        self.report = Report(classes, counts)

    def _build(self, known: dict[str, Any], classes: int, pretrained: bool) -> nn.Module:
        """Build the network as asked, or as a checkpoint's settings say; note what rebuilds it."""
        hp: Any = self.hparams
        start = hp.start or ""
        sourced = start if start.startswith(SOURCE_PREFIXES) else None
        asked = agreed("a network", hp.network, sourced, None, start)
        if known and asked == known.get("source"):
            asked = None
        name = agreed("a network", asked, known.get("network"), "small_cnn", start)
        options = hp.network_options or known.get("network_options")
        channels = agreed("channels", hp.channels, known.get("channels"), 3, start)
        resolution = agreed("a resolution", hp.resolution, known.get("resolution"), None, start)
        network = build_network(name, channels, classes, pretrained, resolution, options)
        source = known.get("source")
        if name.startswith(SOURCE_PREFIXES):
            source, (name, more, _) = name, recipe(name)
            options = {**more, **(options or {})} or None
        fixed = getattr(network, "pretrained_cfg", {}).get("fixed_input_size")
        self.hparams.update(
            network=name, network_options=options, source=source, channels=channels,
            resolution=resolution or (usual_resolution(network) if fixed else None),
            crop=known.get("crop"),
        )  # fmt: skip
        return network

    def _load(self, weights: Weights) -> None:
        """Load the weights to start with; a head of other classes keeps its first weights.

        Raises:
            UserError: they are of another network, or a scale is to be learnt of another head.
        """
        hp: Any = self.hparams
        name = head_name(self.network) + "."
        head = {k: v for k, v in self.network.state_dict().items() if k.startswith(name)}
        theirs = {k: v for k, v in weights.state.items() if k.startswith(name)}
        fits = {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in head.items()}
        names = weights.settings.get("class_names")
        problem = other_classes(names, hp.class_names) if fits else "another number or kind of them"
        if problem and hp.tune == "scale":
            raise UserError(
                f"expected the head of {hp.start} to be for the classes of the images, got "
                f"{problem}; scale that of a checkpoint of the same classes"
            )
        if problem and fits and hp.tune == "all":
            warnings.warn(
                f"expected the classes of {hp.start}, got {problem}: its head is passed over and "
                "another one is learnt",
                AugmentWarning,
                stacklevel=2,
            )
        if problem or hp.tune in ("head", "lora"):
            theirs = head
        body = {k: v for k, v in weights.state.items() if not k.startswith(name)}
        load_weights(self.network, body | theirs, f"{hp.network} in {hp.start}")

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

    @property
    def mean(self) -> tuple[float, ...]:
        """What is subtracted from the pixels of each channel."""
        return tuple(round(value, 7) for value in self.mean_std[0].tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """What the pixels of each channel are divided by then."""
        return tuple(round(value, 7) for value in self.mean_std[1].tolist())

    def normalized(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """What the network takes."""
        mean, std = self.mean_std.to(images)[..., None, None]
        return ((images - mean) / std).contiguous(memory_format=torch.channels_last)

    def settle(
        self,
        classes: list[str] | None,
        channels: int | None,
        resolution: int | None,
        crop: float | None,
    ) -> tuple[int, int, float]:
        """Agree with the data on channels, resolution and crop; what is None is the network's.

        Args:
            classes: names of the classes of the images, in label order.
            channels: of the images.
            resolution: of the images, in pixels.
            crop: share of the shorter side to evaluate; see `training.data.module.ImageData`.

        Raises:
            UserError: the data contradict the classifier.
        """
        hp: Any = self.hparams
        check_names(hp.class_names, classes, "the classifier")
        mine, usual = "the classifier", usual_resolution(self.network)
        agreed("channels", channels, hp.channels, None, mine)
        self.hparams.update(
            resolution=agreed("a resolution", resolution, hp.resolution, usual, mine),
            crop=crop or hp.get("crop") or 1.0,
        )
        return hp.channels, hp.resolution, hp.crop

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: Any = "cpu", **kwargs: Any
    ) -> "Classifier":
        """Load a checkpoint; neither the hub nor a ``start`` is asked for what lies in it.

        Args:
            checkpoint_path: nothing is unpickled but tensors and plain values.
            map_location: the device.
            kwargs: settings that go before the checkpoint's, such as ``tau``.

        Raises:
            UserError: it cannot be read, or the settings contradict it.
        """
        path = str(checkpoint_path)
        weights, names = read_weights(path, map_location), signature(cls).parameters
        if not weights.settings:
            raise UserError(
                f"expected a checkpoint of latent-augment train, got {path} without settings; "
                "start with its weights instead"
            )
        known = {**weights.settings, "pretrained": False, "start": None, **kwargs}
        model = cls(**{name: value for name, value in known.items() if name in names})
        model.on_load_checkpoint(weights.record)
        model.load_state_dict(weights.record["state_dict"])
        return model

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the priors from a checkpoint, refuse one of other classes, and correct its counters.

        Raises:
            UserError: its classes have other names or another order, or there are more or fewer.
        """
        prepare_resume(checkpoint)
        hp: Any = self.hparams
        known = checkpoint["hyper_parameters"]
        names, mine = known.get("class_names"), hp.class_names
        if names is None or mine is None:
            names, mine = ([str(k) for k in range(len(c))] for c in (known["counts"], hp.counts))
        check_names(names, mine, "the checkpoint")
        self.hparams.update(counts=list(known["counts"]), crop=hp.get("crop") or known.get("crop"))
        self.counts.copy_(torch.tensor(known["counts"]))
        self.report = Report(len(known["counts"]), known["counts"]).to(self.device)
        if "mean_std" not in checkpoint["state_dict"]:
            old = Weights({}, None, known, True, {})
            self.mean_std.copy_(old.pixels(self.network, hp.channels))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note mean and deviation among the hyperparameters too, where they can be read."""
        checkpoint["hyper_parameters"].update(mean=list(self.mean), std=list(self.std))

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict; one of an old version has no ``mean_std``.

        Raises:
            UserError: it is of another network.
        """
        state = {"mean_std": self.mean_std, **state_dict}
        return load_weights(super(), state, self.hparams.network, strict, assign)  # type: ignore[attr-defined]

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

    def predict_step(self, batch: Any, batch_idx: int) -> Float[Tensor, "n k"]:
        """Return the probabilities of the classes."""
        return (self(batch[0]).float() * getattr(self.loss, "scale", 1.0)).softmax(1).cpu()

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

    on_predict_start, on_predict_end = on_test_start, on_test_end

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


def agreed(what: str, asked: Any, known: Any, default: Any, source: str) -> Any:
    """Return what was asked for or else what is known or else the default.

    >>> agreed("channels", None, 1, 3, "a.ckpt"), agreed("channels", None, None, 3, "")
    (1, 3)

    Args:
        what: its name, for the error.
        asked: by the user, or None.
        known: from weights, or None.
        default: if both are None.
        source: of the weights, for the error.

    Raises:
        UserError: what was asked for is not what is known.
    """
    if asked is None:
        return default if known is None else known
    if known is not None and asked != known:
        raise UserError(
            f"expected {what} as {source} has it, {known}, got {asked}; leave it out, or give "
            "other weights"
        )
    return asked


def load_weights(
    network: Any, state: dict[str, Tensor], source: str, strict: bool = True, assign: bool = False
) -> Any:
    """Load a state dict into a network.

    Raises:
        UserError: it is of another network.
    """
    try:
        return network.load_state_dict(state, strict=strict, assign=assign)
    except RuntimeError as error:
        told = brief(error).partition(":")[2] or brief(error)
        raise UserError(
            f"expected weights of the network {source}, got others ({told.strip()}); give the "
            "network and the settings that they were trained with"
        ) from None
