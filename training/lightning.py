"""What every training here needs of Lightning: whole checkpoints, plain signals, a log, silence."""

import logging
import math
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch.serialization import MAP_LOCATION

from augment.core.errors import UserError
from augment.core.files import TEMPORARY, Lock, replacing
from augment.core.progress import EVERY, Progress

Checkpoint = dict[str, Any]
"""What Lightning keeps of a training."""

_SAID_OF_EVERY_RUN = (
    ".*tensorboardX.*",  # without TensorBoard Lightning logs to CSV, which is what we want
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*The dirpath has changed from.*",  # weights of another run
    "Be aware that when using `ckpt_path`",
    ".*does not have many workers.*",
    ".*Experiment logs directory.*",
    ".*LeafSpec.*",
)


class _Writer:
    """A file that keeps the error of a write, of which torch makes a `RuntimeError`."""

    error: OSError | None = None

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.flush = file, file.flush

    def write(self, content: bytes | memoryview) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise


class SafeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all.

    Lightning's own go through the folder for temporary files; from another file system a move is a
    copy, which a kill cuts short.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, object], path: str | Path, storage_options: object = None
    ) -> None:
        """Write a checkpoint."""
        with replacing(Path(path)) as file:
            writer = _Writer(file)
            try:
                torch.save(checkpoint, cast("IO[bytes]", writer))
            except RuntimeError:
                if writer.error:
                    raise writer.error from None
                raise

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: MAP_LOCATION = None,
        weights_only: bool | None = None,
    ) -> Checkpoint:
        """Read a checkpoint; nothing is unpickled but tensors and plain values."""
        try:
            return torch.load(Path(path), map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # of any type: unpicklers stumble over hostile bytes
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise UserError(
                f"expected a checkpoint of tensors and plain values at {path}, got one that cannot "
                f"be read ({reason}); give one that latent-augment train wrote"
            ) from None


class PlainSignals(pl.Callback):
    """Keep the handler of SIGTERM that was there before Lightning's.

    Lightning's lets a training end with exit code 0, and waits in it for other ranks.
    """

    handler: Any = signal.SIG_DFL

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember the handler."""
        self.handler = signal.getsignal(signal.SIGTERM)

    def restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the handler back; only the main thread may set one."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handler)

    on_sanity_check_start = on_train_start = restore
    on_validation_start = on_test_start = on_predict_start = restore


class Lines(pl.Callback):
    """Print how far a training is, a line a minute, where there is no terminal for a bar."""

    bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count."""
        if EVERY in os.environ and trainer.is_global_zero:
            total, done = trainer.estimated_stepping_batches, trainer.global_step
            known = total if math.isfinite(total) else None
            self.bar = Progress(total=known, initial=done, desc="train", unit="step")

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Count."""
        if self.bar:
            self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """End."""
        if self.bar:
            self.bar.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End."""
        self.on_train_end(trainer, pl_module)


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise an interruption or a termination again, of which Lightning makes a `SystemExit`."""
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise stop.__context__ from None
        raise


def silence_lightning() -> None:
    """Hide what Lightning says of every run, until warnings are reset."""
    for message in _SAID_OF_EVERY_RUN:
        warnings.filterwarnings("ignore", message)
    for name in ("lightning_fabric", "pytorch_lightning.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)  # "Seed set to 0", tips


def is_first_rank() -> bool:
    """Return whether this process is the only one of a training, or the first of several."""
    return getattr(rank_zero_only, "rank", 0) == 0


def batches_done(trainer: pl.Trainer) -> int:
    """Return how many batches a training has had; a checkpoint brings the number back."""
    loop: Any = trainer.fit_loop.epoch_loop
    return loop.batch_progress.total.processed


def remove_partial(lock: Lock, *folders: Path) -> None:
    """Remove files that killed writers left in folders of a run, but not in folders therein."""
    for path in [path for folder in folders for path in folder.glob(".*.tmp")]:
        if lock.alone and TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def csv_log(root: Path, subcommand: str = "fit") -> CSVLogger:
    """Return a log in a run's folder, or below it for a test; keep an interrupted run's beside."""
    log = root / "metrics.csv"
    if subcommand != "fit":
        return CSVLogger(root, name=subcommand, version="")
    if log.exists() and is_first_rank():
        number = 1 + len(list(root.glob("metrics-*.csv")))
        log.rename(root / f"metrics-{number}.csv")
    return CSVLogger(root, name="", version="")


def prepare_resume(checkpoint: Checkpoint) -> None:
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
