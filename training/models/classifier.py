"""The classifier: a network, a loss, an optimiser, and what is measured."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchvision.transforms import v2

from augment.core.errors import AugmentWarning, UserError, lookup
from augment.core.files import JsonObject
from augment.core.registry import make
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
from augment.training.checks import at_least, expect
from augment.training.lightning import Checkpoint, batches_done, prepare_resume
from augment.training.models import finetune
from augment.training.models.losses import LOSSES, class_weights, cost, smooth
from augment.training.models.metrics import LongTailMetrics, write_tables
from augment.training.models.networks import build_network, usual_resolution

__all__ = ["Classifier"]

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_TAUS = tuple(t / 10 for t in range(21))
"""What `Classifier.tau` is chosen from (Kang et al., arXiv 1910.09217)."""


class Classifier(pl.LightningModule):
    """A classifier of real and synthetic images; the rate follows a half cosine to zero.

    Two-stage training (Kang et al., arXiv 1910.09217) starts from a checkpoint of the first stage:
    cRT is ``tune: head`` with the sampler ``class``, LWS ``tune: scale``; the τ-normalised head
    needs no training, ``tau: val`` when testing.

    Mean and deviation of the pixels belong to the weights: those of timm's configuration for
    pretrained ones, those of ``start`` for its, 0.5 and 0.25 otherwise. They lie in the state dict
    (``mean_std``), and all that rebuilds the network lies in the hyperparameters of a checkpoint.

    Args:
        counts: number of *real* training images of each class, by which classes are many, medium or
            few. Losses take them for the prior, unless the datamodule is an
            `augment.training.data.module.ImageData` that adds synthetic images by count.
        class_names: for the tables; by default the labels.
        network: small_cnn, resnet10, resnet12, resnet32, lite0 or any of timm; by default that of
            ``start``, or small_cnn.
        channels: of the images; by default those of ``start``, or 3.
        resolution: pixels of the images; by default those of ``start``, or the network's usual ones
            (timm's configuration; 32 for our small networks).
        network_options: of ``timm.create_model``, such as ``{drop_path_rate: 0.1}``.
        pretrained: start with timm's weights.
        start: start with the weights of a checkpoint, a state dict, or a model in timm's format
            (``hf-hub:USER/MODEL``, ``local-dir:FOLDER``); a head of other classes is passed over.
        tune: ``all`` weights; a new ``head`` on the frozen rest; one ``scale`` a class of the head
            there is; or ``lora``, adapters of low rank and a new head.
        rank: of the adapters of ``lora``.
        targets: layers that get adapters; see `augment.training.models.finetune.add_lora`.
        loss: cross_entropy, balanced_softmax, logit_adjustment, ldam (which has a cosine head),
            class_balanced or focal; see `augment.training.models.losses`.
        loss_options: of the loss, by name.
        smoothing: of the labels.
        reweight_from: epoch from which the costs are weighted by class (deferred re-weighting).
        real_weight: λ of λ·loss(real) + (1 − λ)·loss(synthetic), the means over a batch's parts
            (DataDream, arXiv 2407.10910); a part that a batch lacks counts as zero. By default all
            images weigh the same.
        auxiliary_norms: synthetic images have batch norms of their own.
        mixup: α of mixup (arXiv 1710.09412); 0 is none.
        cutmix: α of CutMix (arXiv 1905.04899); with mixup each is taken for half of the batches.
        optimizer: sgd, adam or adamw.
        lr: learning rate after the warm-up; it then falls along a cosine.
        weight_decay: of the optimiser.
        momentum: of sgd.
        reference_batch: the images a step, of all ranks, that ``lr`` is meant for: it is scaled in
            proportion; by default it is taken as it is.
        warm_up: steps over which the rate rises.
        tau: exponent of the τ-normalised head when testing; ``val`` chooses it by the validation
            images.
        seed: of mixup, dropout and the like; each step has a random generator of its own.

    Raises:
        UserError: an unknown network, loss, optimiser or ``tune``, an option out of its range, or
            one that contradicts ``start``.
    """

    counts: Tensor
    mean_std: Tensor
    _drawn: tuple[int, Tensor] | None = None  # an epoch, and what its training data count

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
        lookup(dict.fromkeys((*finetune.TUNES, "scale")), tune, "way to tune")
        lookup(OPTIMIZERS, optimizer, "optimiser")
        at_least(0, mixup=mixup, cutmix=cutmix, lr=lr, weight_decay=weight_decay, warm_up=warm_up)
        at_least(1, rank=rank, reference_batch=reference_batch)
        at_least(0, momentum=momentum, tau=None if isinstance(tau, str) else tau)
        expect(math.isfinite(mixup + cutmix), "finite mixup and cutmix", max(mixup, cutmix))
        expect(not auxiliary_norms or tune == "all", "tune all with auxiliary_norms", tune)
        expect(0 <= smoothing <= 1, "smoothing in [0, 1]", smoothing)
        expect(real_weight is None or 0 <= real_weight <= 1, "real_weight in [0, 1]", real_weight)
        expect(not isinstance(tau, str) or tau == "val", "a number or val for tau", tau)
        classes = len(counts)
        expect(classes >= 2, "at least 2 classes", classes)
        self.loss = make(LOSSES, loss, loss_options or {}, "loss")
        sourced = start and start.startswith(SOURCE_PREFIXES)
        weights = read_weights(start) if start and not sourced else None
        pretrained = bool(sourced) or (pretrained and not start)
        self.network = self._build(weights.settings if weights else {}, classes, pretrained)
        if weights:
            rows = weights.pixels(self.network, self.hp.channels)
        else:
            rows = mean_std(self.network if pretrained else None, self.hp.channels)
        self.register_buffer("mean_std", rows)
        if loss == "ldam":
            head = finetune.get_head(self.network)
            finetune.set_head(self.network, finetune.CosineHead(head.in_features, classes))
        if auxiliary_norms:
            finetune.with_auxiliary_norms(self.network)
        if weights:
            self._load(weights)
        if tune == "lora":
            finetune.add_lora(self.network, rank, targets)
        elif tune == "scale":
            finetune.set_head(self.network, finetune.ScaledHead(finetune.get_head(self.network)))
        if tune in ("head", "scale"):
            finetune.freeze(self.network)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("counts", torch.tensor(counts), persistent=False)
        mixes = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        self.mixes = [mix(alpha=alpha, num_classes=classes) for mix, alpha in mixes if alpha]
        self.metrics = LongTailMetrics(classes, counts)

    @property
    def hp(self) -> Any:
        """The hyperparameters, by attribute."""
        return self.hparams

    @property
    def scale(self) -> float:
        """The factor of logits before a softmax: LDAM's s, or 1."""
        return getattr(self.loss, "scale", 1.0)

    @property
    def names(self) -> list[str]:
        """The names of the classes, or else their labels."""
        return self.hp.class_names or [str(label) for label in range(len(self.counts))]

    def _build(self, stored: JsonObject, classes: int, pretrained: bool) -> nn.Module:
        """Build the network as asked, or as a checkpoint's settings say; note what rebuilds it."""
        hp, start = self.hp, self.hp.start or ""
        sourced = start if start.startswith(SOURCE_PREFIXES) else None
        asked = agreed("a network", hp.network, sourced, None, start)
        if stored and asked == stored.get("source"):
            asked = None
        name = agreed("a network", asked, stored.get("network"), "small_cnn", start)
        options = hp.network_options or stored.get("network_options")
        channels = agreed("channels", hp.channels, stored.get("channels"), 3, start)
        resolution = agreed("a resolution", hp.resolution, stored.get("resolution"), None, start)
        network = build_network(name, channels, classes, pretrained, resolution, options)
        source = stored.get("source")
        if name.startswith(SOURCE_PREFIXES):
            source, (name, more, _) = name, recipe(name)
            options = {**more, **(options or {})} or None
        fixed = getattr(network, "pretrained_cfg", {}).get("fixed_input_size")
        self.hparams.update(
            network=name, network_options=options, source=source, channels=channels,
            resolution=resolution or (usual_resolution(network) if fixed else None),
            crop=stored.get("crop"),
        )  # fmt: skip
        return network

    def _load(self, weights: Weights) -> None:
        """Load the weights to start with; a head of other classes keeps its first weights."""
        hp, name = self.hp, finetune.head_name(self.network) + "."
        own = {k: v for k, v in self.network.state_dict().items() if k.startswith(name)}
        head = {k: v for k, v in weights.state.items() if k.startswith(name)}
        fits = {k: v.shape for k, v in head.items()} == {k: v.shape for k, v in own.items()}
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
            head = own
        body = {k: v for k, v in weights.state.items() if not k.startswith(name)}
        with _weights_of(f"{hp.network} in {hp.start}"):
            self.network.load_state_dict(body | head)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """Return the logits of images in [0, 1]."""
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
        """Return what the network takes."""
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
            crop: share of the shorter side to evaluate; see
                `augment.training.data.module.ImageData`.

        Raises:
            UserError: the data contradict the classifier.
        """
        hp, name, usual = self.hp, "the classifier", usual_resolution(self.network)
        check_names(hp.class_names, classes, name)
        agreed("channels", channels, hp.channels, None, name)
        self.hparams.update(
            resolution=agreed("a resolution", resolution, hp.resolution, usual, name),
            crop=crop or hp.get("crop") or 1.0,
        )
        return hp.channels, hp.resolution, hp.crop

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, map_location: str | torch.device = "cpu", **kwargs: Any
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
        stored = {**weights.settings, "pretrained": False, "start": None, **kwargs}
        model = cls(**{name: value for name, value in stored.items() if name in names})
        model.on_load_checkpoint(weights.record)
        model.load_state_dict(weights.record["state_dict"])
        return model

    def on_load_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Take the priors, refuse a checkpoint of other classes, and correct its counters."""
        prepare_resume(checkpoint)
        hp, stored = self.hp, checkpoint["hyper_parameters"]
        names, own = stored.get("class_names"), hp.class_names
        if names is None or own is None:
            names, own = ([str(k) for k in range(len(c))] for c in (stored["counts"], hp.counts))
        check_names(names, own, "the checkpoint")
        self.hparams.update(
            counts=list(stored["counts"]), crop=hp.get("crop") or stored.get("crop")
        )
        self.counts.copy_(torch.tensor(stored["counts"]))
        self.metrics = LongTailMetrics(len(self.counts), stored["counts"]).to(self.device)
        if "mean_std" not in checkpoint["state_dict"]:
            old = Weights({}, None, stored, True, {})
            self.mean_std.copy_(old.pixels(self.network, hp.channels))

    def on_save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Note mean and deviation among the hyperparameters too, where they can be read."""
        checkpoint["hyper_parameters"].update(mean=list(self.mean), std=list(self.std))

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state dict; one of an old version has no ``mean_std``.

        Raises:
            UserError: it is of another network.
        """
        state = {"mean_std": self.mean_std, **state_dict}
        with _weights_of(self.hp.network):
            return super().load_state_dict(state, strict=strict, assign=assign)

    def on_fit_start(self) -> None:
        """Forget the data of an earlier training."""
        self._drawn = None

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Seed this step, whatever came before; keep what is frozen as it is.

        Dropout, mixup and CutMix take their numbers from torch's global generator and no other.
        """
        generator = rng(self.hp.seed, "step", batches_done(self.trainer), self.global_rank)
        on_cpu = self.device.type == "cpu"  # where other devices need no seed, which takes 1 ms
        seed = torch.random.default_generator.manual_seed if on_cpu else torch.manual_seed
        seed(int(generator.integers(2**63)))
        finetune.train_mode(self.network, "head" if self.hp.tune == "scale" else self.hp.tune)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of (images, labels) or (images, labels, whether synthetic)."""
        images, labels, *rest = batch
        fake = rest[0] if rest else torch.zeros(len(images), dtype=torch.bool, device=self.device)
        loss = self.loss_of(images, labels, fake)
        self.log("loss", loss, prog_bar=True, sync_dist=True)
        return loss

    def loss_of(
        self, images: Float[Tensor, "n c h w"], labels: Tensor, fake: Bool[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """Return the mean cost; or λ of the real images' mean and 1 − λ of the synthetic ones'.

        Real and synthetic images are mixed with their like where the loss tells them apart.
        """
        real_weight = self.hp.real_weight
        apart = real_weight is not None or self.hp.auxiliary_norms
        parts = [~fake, fake] if apart else [torch.ones_like(fake)]
        parts = [part.nonzero().squeeze(1) for part in parts if part.any()]
        mixed = [self._mixed(images[part], labels[part]) for part in parts]
        inputs, targets = (torch.cat(column) for column in zip(*mixed, strict=True))
        synthetic = fake[torch.cat(parts)]
        costs = self._costs(self._logits(inputs, synthetic), targets)
        if real_weight is None:
            return costs.mean() + self._zero_of_norms()
        means = [
            weight * costs[flag].sum() / flag.sum().clamp_min(1)
            for weight, flag in ((real_weight, ~synthetic), (1 - real_weight, synthetic))
        ]
        return means[0] + means[1] + self._zero_of_norms()

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix images and their labels by mixup or CutMix, and smooth labels, as asked."""
        if self.mixes:
            mix = self.mixes[int(torch.randint(len(self.mixes), ()))]
            images, labels = mix(images, labels)
        if self.hp.smoothing:
            labels = smooth(labels, len(self.counts), self.hp.smoothing)
        return images, labels

    def _logits(self, images: Tensor, fake: Bool[Tensor, " n"]) -> Float[Tensor, "n k"]:
        """Return logits of real images and, after them, synthetic ones, each by their own norms.

        A lone image of either, which no batch norm takes, goes with the others.
        """
        count = int(fake.sum())
        if not self.hp.auxiliary_norms or count < 2:
            return self(images)
        if len(images) - count < 2:
            with finetune.auxiliary(self.network):
                return self(images)
        real = self(images[~fake])
        with finetune.auxiliary(self.network):
            return torch.cat([real, self(images[fake])])

    def _costs(self, logits: Float[Tensor, "n k"], labels: Tensor) -> Float[Tensor, " n"]:
        """Return the cost of each image; re-weighted ones keep the scale, as LDAM-DRW's code."""
        counts, begin = self._class_counts(), self.hp.reweight_from
        table = self.loss(logits.float(), counts)
        if begin is None or self.current_epoch < begin:
            return cost(table, labels)
        weights = class_weights(counts).expand_as(table)
        return cost(table * weights, labels) / cost(weights, labels).mean()

    def _class_counts(self) -> Int[Tensor, " k"]:
        """Return the number of images of each class in this epoch's training data."""
        epoch = self.current_epoch
        if self._drawn is None or self._drawn[0] != epoch:
            count = getattr(getattr(self._trainer, "datamodule", None), "class_counts", None)
            counts = self.counts if count is None else torch.tensor(count(epoch))
            self._drawn = epoch, counts.to(self.counts.device)
        return self._drawn[1]

    def _zero_of_norms(self) -> Tensor | float:
        """Return zero, computed from all norms: DDP waits for a gradient of every parameter."""
        norms = finetune.added_norms(self.network)
        return sum(0.0 * p.sum() for norm in norms for p in norm.parameters())

    def evaluation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Count a batch."""
        self.metrics.update(self(batch[0]).float() * self.scale, batch[1])

    validation_step = test_step = evaluation_step

    def predict_step(self, batch: Sequence[Tensor], batch_idx: int) -> Float[Tensor, "n k"]:
        """Return the probabilities of the classes."""
        return (self(batch[0]).float() * self.scale).softmax(1).cpu()

    def on_validation_epoch_end(self) -> None:
        """Log ``val/accuracy`` and the like."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/accuracy`` and the like, and write the tables beside the log."""
        confusion = self.metrics.confusion  # of all ranks
        folder = self.trainer.log_dir if self.trainer.loggers else None
        if folder and self.trainer.is_global_zero:
            write_tables(Path(folder), self.names, self.counts.tolist(), confusion)
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        for name, value in self.metrics.compute().items():  # the same on all ranks
            self.log(f"{stage}/{name}", value, prog_bar=name == "accuracy", sync_dist=True)
        self.metrics.reset()

    def on_test_start(self) -> None:
        """Put the τ-normalised head in, if ``tau`` is given."""
        if self.hp.tau is not None:
            self.head = finetune.get_head(self.network)
            tau = self._best_tau() if self.hp.tau == "val" else float(self.hp.tau)
            print(f"tau {tau:g}")
            finetune.set_head(self.network, finetune.tau_normalised(self.head, tau))

    def on_test_end(self) -> None:
        """Put the head back."""
        if self.hp.tau is not None:
            finetune.set_head(self.network, self.head)

    on_predict_start, on_predict_end = on_test_start, on_test_end

    @torch.no_grad()
    def _best_tau(self) -> float:
        """Return the τ out of `_TAUS` of the best balanced accuracy on the validation images."""
        trainer: Any = self.trainer
        data, labels = [], []
        for images, truth in trainer.datamodule.all_of("val"):
            data.append(finetune.features(self.network, self.normalized(images.to(self.device))))
            labels.append(truth)
        rows, truth = torch.cat(data), torch.cat(labels).to(self.device)
        heads = {tau: finetune.tau_normalised(self.head, tau) for tau in _TAUS}
        hits = {tau: (head(rows).argmax(1) == truth).float() for tau, head in heads.items()}
        present = F.one_hot(truth, len(self.counts)).float()
        recall = {tau: (hit @ present) / present.sum(0).clamp_min(1) for tau, hit in hits.items()}
        return max(_TAUS, key=lambda tau: recall[tau].mean().item())

    def configure_optimizers(self) -> Any:
        """Make the optimiser; the rate rises over ``warm_up`` steps, then falls along a cosine."""
        hp, steps, rate = self.hp, self.total_steps(), self.hp.lr
        trainer: Any = self.trainer
        if hp.reference_batch:
            images = trainer.datamodule.batch_size * trainer.world_size
            rate *= images * trainer.accumulate_grad_batches / hp.reference_batch
        more = {"momentum": hp.momentum} if hp.optimizer == "sgd" else {}
        tuned = [p for p in self.parameters() if p.requires_grad]
        make_optimizer = OPTIMIZERS[hp.optimizer]
        optimizer = make_optimizer(tuned, lr=rate, weight_decay=hp.weight_decay, **more)

        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / (hp.warm_up + 1))
            return rising * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def total_steps(self) -> int:
        """Return the optimiser's steps of the whole training.

        Not the trainer's ``estimated_stepping_batches``, which makes it lose a loader's state.
        """
        trainer: Any = self.trainer
        draws = getattr(getattr(trainer, "datamodule", None), "draws", None)
        ends = [trainer.max_steps] if trainer.max_steps > 0 else []
        if (trainer.max_epochs or -1) > 0 and draws is not None:
            ends.append(trainer.max_epochs * -(-len(draws) // trainer.accumulate_grad_batches))
        if not ends:
            raise UserError(
                "expected trainer.max_steps ≥ 1, or max_epochs and ImageData, got neither; set "
                "--trainer.max-steps"
            )
        return min(ends)


def agreed(what: str, asked: object, known: object, default: object, source: str) -> Any:
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


@contextmanager
def _weights_of(source: str) -> Iterator[None]:
    """Explain why a state dict does not fit a network."""
    try:
        yield
    except RuntimeError as error:
        reason = brief(error).partition(":")[2] or brief(error)
        raise UserError(
            f"expected weights of the network {source}, got others ({reason.strip()}); give the "
            "network and the settings that they were trained with"
        ) from None
