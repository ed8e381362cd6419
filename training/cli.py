"""``latent-augment train …``: Lightning's own command line over our classifier and data."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from augment.errors import UserError
from augment.files import remember, replacing, write_json
from training.classifier import Classifier
from training.data import ImageData, ReuseLogger

FREE = (
    *("accelerator", "logger", "log_every_n_steps", "default_root_dir", "profiler", "barebones"),
    *("enable_progress_bar", "enable_model_summary", "detect_anomaly", "num_sanity_val_steps"),
    *("limit_val_batches", "limit_test_batches", "val_check_interval", "check_val_every_n_epoch"),
)
"""What of the trainer may be other than before, when a training goes on."""


class SafeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all.

    Lightning's own go by way of the folder for temporary files, and from another file system a
    move is a copy, which a kill cuts short.
    """

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write one."""
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)

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


class TrainCLI(LightningCLI):
    """`fit`, which goes on where it was interrupted and ends with a test; `validate` and `test`."""

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
                "checkpoint.enable_version_counter": False,
                "checkpoint.save_on_train_epoch_end": True,
            }
        )
        parser.link_arguments("data.counts", "model.counts", apply_on="instantiate")
        parser.link_arguments("data.channels", "model.channels", apply_on="instantiate")
        parser.link_arguments("data.classes", "model.class_names", apply_on="instantiate")
        for part in ("data", "model"):
            parser.link_arguments("seed_everything", f"{part}.seed")

    def _parse_ckpt_path(self) -> None:
        """What the command says holds; Lightning would take the checkpoint's settings instead."""

    subcommand: str
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

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer, logging to ``metrics.csv`` unless it is told otherwise."""
        config = self._get(self.config_init, "trainer")
        if config["logger"] is None:
            kwargs["logger"] = log_of(self.root, self.subcommand)
        steps = len(self.datamodule.draws)
        kwargs["log_every_n_steps"] = min(config["log_every_n_steps"] or 50, steps)
        limit, each = config["max_steps"], self.datamodule.draws.asked
        if config["max_epochs"] is None and limit > 0 and each:  # for the progress bar
            batches = limit * config["accumulate_grad_batches"]
            kwargs["max_epochs"] = -(-batches // each)
        plugins = config["plugins"] or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        return super().instantiate_trainer(plugins=[*plugins, SafeCheckpoints()], **kwargs)

    def before_fit(self) -> None:
        """Go on from the last checkpoint of the same run, if there is one."""
        config, file = self.config_init["fit"], self.root / "run.json"
        self.datamodule.check_trainer(self.trainer)
        given = config["ckpt_path"]
        if given and given not in ("best", "last", "hpc") and not Path(given).is_file():
            raise UserError(f"expected a checkpoint at {given}, got none; correct --ckpt_path")
        last = Path(config["checkpoint"].dirpath or "") / "last.ckpt"
        begun = given is None and last.exists()
        remember(file, self.settings(), "--trainer.default_root_dir", begun)
        if begun:
            config["ckpt_path"] = str(last)

    def settings(self) -> dict[str, Any]:
        """What a training that goes on must have in common with the one before."""
        text = self.parser.dump(self.config, skip_link_targets=False)
        config = yaml.safe_load(text)["fit"]
        trainer = {k: v for k, v in config["trainer"].items() if k not in FREE}
        same = {key: config.get(key) for key in ("model", "data", "seed_everything")}
        return {**same, "trainer": trainer}

    def after_fit(self) -> None:
        """Test with the last weights, if there are images to test on.

        Raises:
            UserError: the training ended before its last step, and nothing asked it to.
        """
        steps, done = self.model.total_steps(), self.trainer.global_step
        if done < steps and not self.trainer.should_stop:
            raise UserError(
                f"expected {steps} steps of training in {self.root}, got {done}; train in another "
                "--trainer.default_root_dir"
            )
        if "test" in self.datamodule.held_out:
            self.trainer.test(self.model, datamodule=self.datamodule)
            self.after_test()

    def before_validate(self) -> None:
        """Take the run's last checkpoint, unless another is given."""
        self._need("val")

    def before_test(self) -> None:
        """Take the run's last checkpoint, unless another is given."""
        self._need("test")

    def _need(self, images: str) -> None:
        """Weights, and images to measure them by."""
        self.datamodule.all_of(images)
        config, last = self.config_init[self.subcommand], self.root / "checkpoints" / "last.ckpt"
        if config["ckpt_path"] is None:
            if not last.exists():
                raise UserError(
                    f"expected a checkpoint to {self.subcommand}, got none in {self.root}; give "
                    "--ckpt_path, or the run's --trainer.default_root_dir"
                )
            config["ckpt_path"] = str(last)

    def after_test(self) -> None:
        """Keep what was measured beside the log."""
        if self.trainer.is_global_zero:
            measured = {k: float(v) for k, v in self.trainer.logged_metrics.items()}
            found = {k: v for k, v in measured.items() if k.startswith("test/")}
            folder = self.root if self.subcommand == "fit" else self.root / self.subcommand
            write_json(folder / "test.json", found)
            self.found = found


def log_of(root: Path, subcommand: str) -> CSVLogger:
    """A log in a run's folder, of a test in one therein; an interrupted run's is kept beside."""
    log = root / "metrics.csv"
    if subcommand != "fit":
        return CSVLogger(root, name=subcommand, version="")
    if log.exists() and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        number = 1 + len(list(root.glob("metrics-*.csv")))
        log.rename(root / f"metrics-{number}.csv")
    return CSVLogger(root, name="", version="")


def hush() -> None:
    """Keep from the screen what Lightning says of every run, until warnings are reset."""
    # without TensorBoard Lightning logs to CSV, which is what we want, and warns
    warnings.filterwarnings("ignore", ".*tensorboardX.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
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
    try:
        return TrainCLI(
            Classifier,
            ImageData,
            args=args,
            parser_kwargs={"prog": "latent-augment train"},
            save_config_kwargs=overwrite,
            trainer_defaults={
                "callbacks": [ReuseLogger()],
                "enable_progress_bar": sys.stderr.isatty(),  # of no use in a file
            },
            seed_everything_default=0,
            load_from_checkpoint_support=False,
        )
    except SystemExit as stop:  # Lightning's, at an interrupt
        if stop.code == 1:
            raise KeyboardInterrupt from None
        raise
