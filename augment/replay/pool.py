"""A replay pool: training draws from a set of images that a generator process keeps replacing.

A trainer takes thousands of images a second, a diffusion model makes ten. So each image is drawn
many times; the pool counts how often on average, the *reuse*.

The pool is one file that every process maps (`augment.replay.store`). The generator is its only
writer and fills the slots in turn.
"""

import atexit
import copy
import fcntl
import os
import pickle
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partialmethod
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from augment.core.errors import AugmentWarning, UserError
from augment.core.files import JsonObject
from augment.core.progress import EVERY, Progress
from augment.plan.plan import Plan
from augment.replay.store import CONTROL, Record, Store, layout_of, named, nameless
from augment.sources.kinds import Transforms
from augment.synthesis.dataset import Sample, fetch

USER_ERROR = 2  # the generator's exit code, as the command line's


class ReplayPool(Transforms, Dataset[Sample]):
    """The latest ``capacity`` images of a dataset that a generator process walks through.

    Item i is the image in slot i at the time, modulo the number of filled slots; no draw waits for
    the generator. It goes through the dataset in order, epoch after epoch, and replaces the oldest
    image first. If it dies, or makes no image for ``stall_s``, an `AugmentWarning` says so once,
    and draws go on with the images there are. It ends with `close`, a ``with`` block, the pool or
    the process, killed or not. Workers of a DataLoader, forked or spawned, share the pool.

    What is drawn depends on the generator's speed, so a run cannot be repeated image by image.
    Each image can: `record` gives its epoch and index, `plan` its plan. For repeatable runs, write
    the images to shards first.

    The generator is spawned: a script needs ``if __name__ == "__main__":``. It has a low priority.
    On a GPU it has its own CUDA context and backbone, and the two processes take turns; on a second
    GPU they do not. Under DDP every rank has a pool; give each its own seed and path.

    Args:
        dataset: a `SyntheticDataset`, or any map-style dataset of float images (C, H, W) in [0, 1]
            and numbers or tensors as labels; it is pickled with its backbone. Or a picklable
            function that makes one, for what is large or cannot be pickled.
        capacity: number of slots, from 2.
        path: a file for the pool, which the next run resumes; one run at a time. By default the
            pool has no name and ends with the processes; it is in memory or, where /dev/shm has
            less than twice the room, in the folder for temporary files.
        warm_up: images to wait for; by default one of each class, at most ``capacity``.
        batch_size: images to make at once; by default that of the dataset's synthesizer, or 1.
        stall_s: seconds without a new image before a warning, or an error during the warm-up.
        threads: of torch in the generator.
        transform, target_transform: applied to image and label at every draw.
        as_: kind of image: ``float``, ``uint8`` or ``pil``, as for `SyntheticDataset`.

    Raises:
        UserError: a parameter is out of its range, the dataset cannot be pickled or makes no
            images, there is no room, or the file is another pool's or in use.
    """

    def __init__(
        self,
        dataset: Any,
        capacity: int,
        path: str | Path | None = None,
        warm_up: int | None = None,
        batch_size: int | None = None,
        stall_s: float = 300.0,
        threads: int = 1,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        as_: str = "float",
    ) -> None:
        self._set(as_, transform, target_transform)
        numbers = {"warm_up": warm_up, "batch_size": batch_size, "stall_s": stall_s}
        for name, number in {**numbers, "threads": threads}.items():
            if number is not None and not number > 0:
                raise UserError(f"expected {name} of a replay pool above 0, got {number}")
        if capacity < (least := max(2, warm_up or 0)):
            raise UserError(f"expected a replay pool of capacity {least} or more, got {capacity}")
        try:
            content = pickle.dumps(dataset)  # by value; torch's pickler would share each tensor
        except Exception as error:
            raise UserError(
                f"expected a dataset that can be pickled for the generator, got {error}; give a "
                "function of a module that makes the dataset instead"
            ) from None
        self.dataset, self.stall_s = dataset, stall_s
        self.store = store = Store(*(named(Path(path)) if path else nameless()))
        store.control["ready"], store.control["ended"], store.control["error"] = 0, 0, b""
        store.control["before"] = store.control["made"]
        store.control["started"] = store.control["beat"] = time.monotonic()
        process = get_context("spawn").Process(
            target=generate,
            args=(store, [content], capacity, batch_size, threads, os.getpid()),
            daemon=True,
            name="replay pool",
        )
        halt = threading.Event()
        self._stop = weakref.finalize(self, _stop, store, process, halt, os.getpid())
        try:
            process.start()
            atexit.register(self._stop)  # and so before multiprocessing waits for its children
            self._wait(process, warm_up)
        except BaseException:
            self.close()
            if path and not store.control["layout"].item():
                Path(path).unlink()
            raise
        self.classes: list[str] = store.layout["classes"]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        watcher = store, process, halt, stall_s
        threading.Thread(target=_watch, args=watcher, daemon=True).start()

    def _wait(self, process: BaseProcess, warm_up: int | None) -> None:
        """Wait for the first images."""
        store = self.store
        with Progress(total=warm_up, desc="replay pool", unit="image", delay=2) as bar:
            while True:
                alive = process.is_alive()
                if store.open():
                    bar.total = warm_up or max(1, min(len(self), len(store.layout["classes"])))
                    bar.update(min(self.made, bar.total) - bar.n)
                    if self.made >= bar.total:
                        return
                if process.exitcode == USER_ERROR:
                    raise UserError(store.error)
                if not alive or store.silence > self.stall_s:
                    cause = _none_for(self.stall_s) if alive else _reason(store, process)
                    raise UserError(
                        f"expected the replay pool's generator to make its first images, got "
                        f"{cause}; see whether dataset[0] gives one here"
                    )
                time.sleep(0.02)

    @property
    def soft(self) -> bool:
        """Whether a label is a share of each class in place of a number."""
        return bool(self.store.layout["form"][2])

    def __getstate__(self) -> JsonObject:
        return {key: self.__dict__[key] for key in self.__dict__ if key not in ("dataset", "_stop")}

    def __len__(self) -> int:
        return self.store.layout["capacity"]

    @property
    def made(self) -> int:
        """Images made since the pool began, including earlier runs on its file."""
        return int(self.store.control["made"])

    @property
    def filled(self) -> int:
        """Slots that have had an image."""
        return min(self.made, len(self))

    @property
    def draws(self) -> int:
        """Images drawn since the pool began, by all processes."""
        return int(self.store.control["draws"].sum())

    @property
    def reuse(self) -> float:
        """Average draws of an image: `draws` / `made`."""
        return self.draws / max(self.made, 1)

    def statistics(self) -> dict[str, float]:
        """Return made, draws, reuse, images_per_second of this run and alive (1.0 or 0.0)."""
        control = self.store.control
        seconds = max(float(control["beat"] - control["started"]), 1e-9)
        return {
            "made": float(self.made),
            "draws": float(self.draws),
            "reuse": self.reuse,
            "images_per_second": (self.made - int(control["before"])) / seconds,
            "alive": float(not control["ended"] and self.store.silence <= self.stall_s),
        }

    def record(self, index: int) -> Record:
        """Return the image that is in a slot now, without transforms; this is no draw.

        Raises:
            IndexError: the index is out of range.
            UserError: the pool is closed, or its file is damaged.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"expected an index below {len(self)}, got {index}")
        first, filled = index % len(self), self.filled
        for slot in range(first, first + filled + 8):
            record = self.store.read(slot % filled)
            if record is not None:
                return record
        raise UserError("expected images in the replay pool, got none that is whole; make it anew")

    def plan(self, record: Record) -> Plan:
        """Return the plan of a record's image."""
        dataset: Any = copy.copy(self.__dict__.get("dataset"))
        if not hasattr(dataset, "plan"):
            raise UserError(
                "expected a pool of a dataset that has plans, in the process that made it, got "
                "none; set the epoch of a dataset like it and ask that for the plan"
            )
        dataset.set_epoch(record.epoch)
        return dataset.plan(record.index)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Draw the items of a batch."""
        records = [self.record(index) for index in indices]
        self.store.count_draws(len(records))
        return [self._give(record.image, record.label) for record in records]

    def close(self) -> None:
        """Release the images and, in the process that made the pool, end the generator."""
        if "_stop" in self.__dict__:
            self._stop()
        self.store.slots = None

    def __enter__(self) -> "ReplayPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def generate(
    store: Store,
    content: list[bytes],
    capacity: int,
    batch_size: int | None,
    threads: int,
    parent: int,
) -> None:
    """Make the images of a dataset for ever, from where the file stands; runs in the generator."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's to handle
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its default is a semaphore that a kill would leave behind
    os.environ.pop(EVERY, None)
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]
    torch.set_num_threads(threads)
    os.nice(5)  # where cores are few, the trainer goes first
    try:
        dataset = _unpickle(content.pop())  # the list is kept by multiprocessing
        synthesizer = getattr(dataset, "synthesizer", None)
        usual = 1 if synthesizer is None else synthesizer.resolved.batch_size
        store.control["started"] = time.monotonic()
        while True:
            epoch, start = divmod(int(store.control["made"]), len(dataset))
            rows = range(start, min(start + (batch_size or usual), len(dataset)))
            if hasattr(dataset, "set_epoch"):
                dataset.set_epoch(epoch)
            samples = fetch(dataset, list(rows))
            if not store.layout:
                store.settle(layout_of(dataset, samples[0], capacity))
                store.open()
            store.control["beat"] = time.monotonic()
            for row, (image, label) in zip(rows, samples, strict=True):
                store.write(Record(image, label, epoch, row))
    except Exception as error:
        expected = isinstance(error, UserError)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        store.control["error"] = text.encode()[: CONTROL["error"].itemsize]
        if expected:
            sys.exit(USER_ERROR)
        raise


def _unpickle(content: bytes) -> Any:
    """Return the pickled dataset, or the one that a pickled function makes."""
    made = pickle.loads(content)
    return made() if callable(made) else made


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, whatever it is doing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _none_for(stall_s: float) -> str:
    return f"none for {stall_s:g} s"


def _reason(store: Store, process: BaseProcess) -> str:
    """Return what a generator died of."""
    code = process.exitcode or 0
    if store.error:
        return store.error
    if code < 0:
        return signal.Signals(-code).name + (" (out of memory?)" if code == -9 else "")
    return f'exit code {code} (a script needs if __name__ == "__main__":)'


def _watch(store: Store, process: BaseProcess, halt: threading.Event, stall_s: float) -> None:
    """Warn that the generator ended or stalls, each once, in a thread of the pool's process.

    That process may never draw itself, and the workers that draw would all warn.
    """
    warned = False
    while not halt.wait(min(1.0, stall_s / 4)):
        ended, stalled = not process.is_alive(), store.silence > stall_s
        if halt.is_set() or not (ended or (stalled and not warned)):
            continue
        warned, store.control["ended"] = True, ended
        cause = _reason(store, process) if ended else _none_for(stall_s)
        warnings.warn(
            f"expected the replay pool's generator to go on making images, got {cause}; draws go "
            "on with the images there are, start again for others",
            AugmentWarning,
            stacklevel=1,
        )
        if ended:
            return


def _stop(store: Store, process: BaseProcess, halt: threading.Event, owner: int) -> None:
    """End the generator, if this process is its owner and no forked worker."""
    if os.getpid() != owner:
        return
    halt.set()
    if process.pid is not None:
        process.kill()
        process.join(5)
    store.control["ended"] = 1
    with suppress(OSError):
        fcntl.flock(store.files[0], fcntl.LOCK_UN)
