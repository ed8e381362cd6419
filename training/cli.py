"""``latent-augment train …``: Lightning's own command line over our classifier and data."""

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from augment.core.errors import UserError
from augment.core.files import (
    TEMPORARY,
    Lock,
    locked,
    remember,
    replacing,
    write_json,
    write_table,
)
from augment.networks.timm import check_names, read_weights
from training.data.identity import IMAGES
from training.data.module import ImageData, ReuseLogger
from training.models.classifier import Classifier, agreed

FREE = (
    *("accelerator", "logger", "log_every_n_steps", "default_root_dir", "profiler", "barebones"),
    *("enable_progress_bar", "enable_model_summary", "detect_anomaly", "num_sanity_val_steps"),
    *("limit_val_batches", "limit_test_batches", "val_check_interval", "check_val_every_n_epoch"),
)
"""What of the trainer may be other than before, when a training goes on."""

FORM = ("channels", "resolution")
"""Of the images, which belong to the weights."""


class Writer:
    """A file to write that keeps its error, of which torch makes a `RuntimeError`."""

    error: OSError | None = None

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.flush = file, file.flush

    def write(self, content: Any) -> int:
        """Write to the file."""
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise


class SafeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all.

    Lightning's own go by way of the folder for temporary files, and from another file system a
    move is a copy, which a kill cuts short.
    """

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write one.

        Raises:
            UserError: the disk is full or the like.
        """
        with replacing(Path(path)) as file:
            writer = Writer(file)
            try:
                torch.save(checkpoint, writer)  # type: ignore[arg-type]
            except RuntimeError:
                if writer.error:
                    raise writer.error from None
                raise

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read one; nothing is unpickled but tensors and plain values, wherever it comes from."""
        try:
            return torch.load(Path(path), map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # of any type: unpicklers stumble over hostile bytes
            told = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(
                f"expected a checkpoint of tensors and plain values at {path}, got one that cannot "
                f"be read ({told}); give one that latent-augment train wrote"
            ) from None


class PlainSignals(pl.Callback):
    """Keeps the handler of SIGTERM that was there before Lightning's.

    Lightning's lets a training end with exit code 0, and waits in it for other ranks.
    """

    handler: Any = signal.SIG_DFL

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember the handler."""
        self.handler = signal.getsignal(signal.SIGTERM)

    def restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the handler back; signals are the main thread's."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)

    on_sanity_check_start = on_train_start = restore
    on_validation_start = on_test_start = on_predict_start = restore


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise an interruption or a termination again, of which Lightning makes a `SystemExit`."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise


def remove_partial(lock: Lock, *folders: Path) -> None:
    """Remove files that killed writers left in folders of a run, but not in folders therein."""
    for path in [path for folder in folders for path in folder.glob(".*.tmp")]:
        if lock.alone and TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


class TrainCLI(LightningCLI):
    """`fit`, which goes on where it was interrupted and ends with a test; and what uses weights.

    ``last.ckpt`` is where a training goes on, ``best.ckpt`` what ``--checkpoint.monitor`` says; the
    test of `fit`, `validate`, `test` and `predict` take the best one if there is one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with ExitStack() as self.held:
            super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose faults `augment.cli.main` puts in one sentence."""
        return super().init_parser(exit_on_error=False, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the model to the data, and all dice to one seed."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "trainer.default_root_dir": "runs/train",
                "trainer.use_distributed_sampler": False,  # our draws know their rank
                "checkpoint.filename": "last",
                "checkpoint.mode": None,
                "checkpoint.enable_version_counter": False,
                "checkpoint.save_on_train_epoch_end": True,
            }
        )
        for source, target in (("counts", "counts"), ("classes", "class_names")):
            parser.link_arguments(
                f"data.{source}", f"model.{target}", apply_on="instantiate",
                compute_fn=lambda found, key=target: self.classes_of(key, found),
            )  # fmt: skip
        for name in FORM:
            parser.link_arguments(f"data.{name}", f"model.{name}")
        for part in ("data", "model"):
            parser.link_arguments("seed_everything", f"{part}.seed")

    def _parse_ckpt_path(self) -> None:
        """Leave it to `instantiate_classes`, which refuses what contradicts a checkpoint."""

    subcommand: str
    known: dict[str, Any] = {}  # noqa: RUF012
    """The settings of the checkpoint to go on from, to test or to predict by; empty if none."""
    found: dict[str, float] | None = None
    """What the test measured."""

    @property
    def root(self) -> Path:
        """The folder of the run."""
        return Path(self.config[self.subcommand]["trainer"]["default_root_dir"])

    def before_instantiate_classes(self) -> None:
        """Log and keep checkpoints in the folder of the run."""
        config = self.config[self.subcommand]
        if config["checkpoint"]["dirpath"] is None:
            config["checkpoint"]["dirpath"] = str(self.root / "checkpoints")

    def instantiate_classes(self) -> None:
        """Build all as the command says, and what belongs to weights as their checkpoint says."""
        config = self.config[self.subcommand]
        fit, path = self.subcommand == "fit", self.checkpoint()
        if fit and config["data"]["train"] is None:
            raise UserError("expected images to train on, got none; give --data.train")
        kept = config["checkpoint"]
        parts = [vars(part) for part in (config["data"], config["model"], kept)]
        asked = [part.copy() for part in parts]
        if path:
            self.known = read_weights(path).settings
            self.follow(path)
        if not fit:
            config["ckpt_path"] = path
        self.monitor, self.checkpoints = (kept["monitor"], kept["mode"]), Path(kept["dirpath"])
        kept["monitor"], kept["mode"] = None, "min"  # for what keeps the last
        kept["save_last"] = kept["filename"] != "last"
        super().instantiate_classes()
        for part, settings in zip(parts, asked, strict=True):  # config.yaml says what was asked for
            part.update(settings)

    def checkpoint(self) -> str | None:
        """Return the checkpoint to begin with: for a training the last one, else the best.

        Raises:
            UserError: there is none where one is named or needed.
        """
        config = self.config[self.subcommand]
        given, folder = config["ckpt_path"], Path(config["checkpoint"]["dirpath"])
        fit = self.subcommand == "fit"
        names = [given] if given in ("best", "last") else ["last"] if fit else ["best", "last"]
        if given not in (None, "best", "last"):
            path: Path | None = Path(given)
        else:
            path = next((p for p in (folder / f"{n}.ckpt" for n in names) if p.exists()), None)
            if path is None and fit and not given:
                return None
        if path is None or not path.is_file():
            raise UserError(
                f"expected a checkpoint to {self.subcommand}, got none at {path or folder}; give "
                "--ckpt_path, or the run's --trainer.default_root_dir"
            )
        return str(path)

    def follow(self, path: str) -> None:
        """Take from a checkpoint what belongs to its weights, so that no hub has to be asked.

        A test takes all that the classifier was made with from it, but for ``tau`` and the seed.

        Raises:
            UserError: the command contradicts it, or it does not tell its resolution.
        """
        config, known = self.config[self.subcommand], self.known
        data, model = config["data"], config["model"]
        if "counts" not in known:
            raise UserError(
                f"expected a checkpoint that latent-augment train wrote, got {path}; take weights "
                "of others with --model.start"
            )
        for name in FORM:
            data[name] = model[name] = agreed(name, data[name], known.get(name), None, path)
        data["crop"] = data["crop"] or known.get("crop")
        if data["resolution"] is None:
            raise UserError(
                f"expected a checkpoint that tells its resolution, got {path} of an older version; "
                "give --data.resolution, which was 32 by default"
            )
        defaults = vars(self._parser(self.subcommand).get_defaults()["model"])
        free = {"network", *FORM, "counts", "class_names", "seed", "tau"}
        for name in [] if self.subcommand == "fit" else sorted({*vars(model)} & {*known} - free):
            if model[name] not in (defaults[name], known[name]):
                raise UserError(
                    f"expected {name} {known[name]}, which {path} was trained with, got "
                    f"{model[name]}; leave --model.{name} out"
                )
            model[name] = known[name]
        if model["network"] == known.get("source"):
            model["network"] = None
        model["network"] = agreed("network", model["network"], known["network"], None, path)
        model["network_options"] = known.get("network_options")
        model["pretrained"], model["start"] = False, None
        if model["tau"] is None and self.subcommand != "fit":
            model["tau"] = known.get("tau")

    def classes_of(self, key: str, found: Any) -> Any:
        """Return counts or names of the classes: of a checkpoint to test, or of the images."""
        return found if self.subcommand == "fit" or not self.known else self.known[key]

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer, which logs to ``metrics.csv`` unless it is told otherwise.

        Raises:
            UserError: another training is at work in the folder of the run.
        """
        if self.subcommand == "fit" and is_first_rank():
            lock = self.held.enter_context(locked(self.root))
            folder = self.config[self.subcommand]["checkpoint"]["dirpath"]
            remove_partial(lock, self.root, Path(folder))
        config = self._get(self.config_init, "trainer")
        if config["logger"] is None:
            kwargs["logger"] = log_of(self.root, self.subcommand)
        if self.subcommand == "fit":
            steps = len(self.datamodule.draws)
            kwargs["log_every_n_steps"] = min(config["log_every_n_steps"] or 50, steps)
            limit, each = config["max_steps"], self.datamodule.draws.asked
            if config["max_epochs"] is None and limit > 0 and each:  # for the progress bar
                batches = limit * config["accumulate_grad_batches"]
                kwargs["max_epochs"] = -(-batches // each)
            kwargs["callbacks"] = [*listed(config["callbacks"]), *self.best()]
        plugins = listed(config["plugins"])
        return super().instantiate_trainer(plugins=[*plugins, SafeCheckpoints()], **kwargs)

    def best(self) -> list[ModelCheckpoint]:
        """Return what keeps ``best.ckpt`` by ``--checkpoint.monitor``, beside ``last.ckpt``.

        Raises:
            UserError: there is nothing to measure it by.
        """
        monitor, mode = self.monitor
        if monitor is None:
            return []
        if monitor.startswith("val/"):
            self.datamodule.all_of("val")
        least = monitor.endswith(("loss", "ece"))
        return [
            ModelCheckpoint(
                self.checkpoints, "best", monitor, mode=mode or ("min" if least else "max"),
                save_on_train_epoch_end=True, enable_version_counter=False,
            )
        ]  # fmt: skip

    def before_fit(self) -> None:
        """Go on from the last checkpoint of the same run, if there is one."""
        config, file = self.config_init["fit"], self.root / "run.json"
        self.datamodule.check_trainer(self.trainer)
        given = config["ckpt_path"]
        last = self.checkpoints / "last.ckpt"
        begun = given is None and last.exists()
        remember(file, self.settings(), "--trainer.default_root_dir", begun)
        if begun:  # before contents are compared: a renamed class explains more
            check_names(self.known.get("class_names"), self.datamodule.classes, str(last))
        if is_first_rank():
            self.datamodule.check_images(self.root / IMAGES, begun)
        if begun:
            config["ckpt_path"] = str(last)

    def settings(self) -> dict[str, Any]:
        """What a training that goes on must have in common with the one before."""
        text = self.parser.dump(self.config, skip_link_targets=False)
        config = yaml.safe_load(text)["fit"]
        trainer = {k: v for k, v in config["trainer"].items() if k not in FREE}
        same = {key: config.get(key) for key in ("model", "data", "seed_everything")}
        best = {"monitor": list(self.monitor)} if self.monitor[0] else {}
        return {**same, "trainer": trainer, **best}

    def after_fit(self) -> None:
        """Test with the best weights, or the last ones, if there are images to test on.

        Raises:
            UserError: the training ended before its last step, and nothing asked it to.
        """
        steps, done = self.model.total_steps(), self.trainer.global_step
        if done < steps and not self.trainer.should_stop:
            raise UserError(
                f"expected {steps} steps of training in {self.root}, got {done}; train in another "
                "--trainer.default_root_dir"
            )
        self.keep_last()
        if "test" in self.datamodule.held_out:
            best, last = (self.checkpoints / f"{name}.ckpt" for name in ("best", "last"))
            path = best if self.monitor[0] and best.exists() else last
            if path.exists():  # what a test measures later: averaged weights, if there are any
                self.model.load_state_dict(read_weights(str(path)).record["state_dict"])
            self.trainer.test(self.model, datamodule=self.datamodule)
            self.after_test()

    def keep_last(self) -> None:
        """Write ``last.ckpt`` again if steps were taken since, as where checkpoints are rare."""
        last, trainer = self.checkpoints / "last.ckpt", self.trainer
        stale = last.exists() and (
            read_weights(str(last)).record["global_step"] != trainer.global_step
        )
        if trainer.strategy.broadcast(stale):
            trainer.save_checkpoint(last)

    def before_validate(self) -> None:
        """Look for images to validate on."""
        self.datamodule.all_of("val")

    def before_test(self) -> None:
        """Look for images to test on."""
        self.datamodule.all_of("test")

    def after_predict(self) -> None:
        """Write a row an image: its file, its label, and the probability of each class."""
        if not self.trainer.is_global_zero:
            return
        batches: Any = self.trainer.predict_loop.predictions
        rows, hp = torch.cat(batches), self.model.hparams
        names = hp.class_names or [str(label) for label in range(rows.shape[1])]
        files = [image_id for image_id, _ in self.datamodule.to_label.samples]
        table = [["file", "label", *names]]
        for file, row in zip(files, rows.double(), strict=True):
            table.append([file, names[int(row.argmax())], *(f"{p:.6g}" for p in row.tolist())])
        path = self.root / "predict" / "predictions.csv"
        write_table(path, table)
        print(f"{path}: {len(files)} images of {self.datamodule.to_label.root} labelled")

    def after_test(self) -> None:
        """Keep what was measured beside the log."""
        if self.trainer.is_global_zero:
            measured = {k: float(v) for k, v in self.trainer.logged_metrics.items()}
            found = {k: v for k, v in measured.items() if k.startswith("test/")}
            folder = self.root if self.subcommand == "fit" else self.root / self.subcommand
            write_json(folder / "test.json", found)
            self.found = found


def is_first_rank() -> bool:
    """Whether this process is the only one of a training, or the first of several."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def listed(value: Any) -> list[Any]:
    """Return a setting that may be None, one or several as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]


def log_of(root: Path, subcommand: str) -> CSVLogger:
    """A log in a run's folder, of a test in one therein; an interrupted run's is kept beside."""
    log = root / "metrics.csv"
    if subcommand != "fit":
        return CSVLogger(root, name=subcommand, version="")
    if log.exists() and is_first_rank():
        number = 1 + len(list(root.glob("metrics-*.csv")))
        log.rename(root / f"metrics-{number}.csv")
    return CSVLogger(root, name="", version="")


def hush() -> None:
    """Keep from the screen what Lightning says of every run, until warnings are reset."""
    # without TensorBoard Lightning logs to CSV, which is what we want, and warns
    warnings.filterwarnings("ignore", ".*tensorboardX.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*The dirpath has changed from.*")  # weights of another run
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")  # none is needed
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Experiment logs directory.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    for chatter in ("lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(chatter).setLevel(logging.WARNING)  # "Seed set to 0", tips


def main(args: list[str]) -> TrainCLI:
    """Run ``latent-augment train ARGS``."""
    hush()
    # the arguments stay where they are too, for ranks are started with them
    warnings.filterwarnings("ignore", ".*LightningCLI's args parameter.*")
    overwrite = {"overwrite": True}  # of the config beside the run's own logs
    with interruptible():
        return TrainCLI(
            Classifier,
            ImageData,
            args=args,
            parser_kwargs={"prog": "latent-augment train"},
            save_config_kwargs=overwrite,
            trainer_defaults={
                "callbacks": [ReuseLogger(), PlainSignals()],
                "enable_progress_bar": sys.stderr.isatty(),  # of no use in a file
            },
            seed_everything_default=0,
            load_from_checkpoint_support=False,
        )
