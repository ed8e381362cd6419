"""The file of a replay pool: slots of images that one process writes and every process reads.

A control block (`CONTROL`), then slots of one image each, in bytes, with its label, its epoch and
index in the dataset, and a checksum. Slots have no locks: what is read while it is being written,
or was left half written by a kill, does not match its checksum, whatever the order in which
processors and disks carry out writes, and the reader takes the next slot.
"""

import fcntl
import json
import mmap
import os
import tempfile
import time
import weakref
import zlib
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError
from augment.core.files import JsonObject, lock_handle, sha256
from augment.synthesis.dataset import Sample

MAGIC = b"latent-augment replay pool 1"
CELLS = 4096  # maximum number of processes that draw at a time
CONTROL: Any = np.dtype(
    [
        ("magic", "S64"),
        ("made", "i8"),  # images ever; the next one goes to slot made % capacity
        ("before", "i8"),  # images made before this run
        ("started", "f8"),  # time.monotonic() when this run began to make images
        ("beat", "f8"),  # time.monotonic() when it had made the last ones
        ("ready", "i8"),  # 1 + the number of the file that holds the slots, in this run
        ("ended", "i8"),  # whether the generator has ended, in this run
        ("error", "S4096"),  # its last error, if it raised one
        ("draws", "i8", (CELLS,)),  # a cell for each process; see `Store.count_draws`
        ("layout", "S1000000"),  # JSON: see `layout_of`
    ],
    align=True,
)
PREFIX = 8  # bytes of a slot's checksum
PATIENCE_S = 10.0  # for the processes of a killed run to end, and its lock with them


@dataclass(frozen=True, eq=False)
class Record:
    """An image with its label, and their epoch and index in the dataset."""

    image: Float[Tensor, "c h w"]
    label: Any
    epoch: int
    index: int


class Store:
    """The pool's file, mapped; sent to a child process it is the same file.

    Args:
        where: its place, for errors.
        files: descriptors of the file; or of several, of which the first with room is taken.
    """

    def __init__(self, where: str, files: list[int]) -> None:
        self.where, self.files, self.layout = where, files, {}
        self.slots: Any = None
        self._cell = (0, 0)  # the process that counts its draws, and where
        weakref.finalize(self, lambda: [os.close(file) for file in files])
        self.control: Any = np.ndarray((), CONTROL, mmap.mmap(files[0], CONTROL.itemsize))

    def __reduce__(self) -> Any:
        return _received, (self.where, [DupFd(file) for file in self.files])

    @property
    def error(self) -> str:
        """The last error of the generator; empty if it raised none."""
        return self.control["error"].item().decode(errors="replace")

    @property
    def silence(self) -> float:
        """Seconds since the last new image."""
        return time.monotonic() - float(self.control["beat"])

    def count_draws(self, count: int) -> None:
        """Add to the draws of this process."""
        process = os.getpid()
        if self._cell[0] != process:  # forked, or the first draw
            self._cell = process, self._claim_cell()
        self.control["draws"][self._cell[1]] += count

    def _claim_cell(self) -> int:
        """Claim a cell that no living process uses, by a lock of the kernel on one byte."""
        first = CONTROL.fields["draws"][1]
        for cell in range(CELLS):
            with suppress(OSError):
                fcntl.lockf(self.files[0], fcntl.LOCK_EX | fcntl.LOCK_NB, 1, first + cell)
                return cell
        return os.getpid() % CELLS  # the file system has no such locks

    def settle(self, layout: JsonObject) -> None:
        """Reserve the slots of a layout, or check that they are there."""
        size = CONTROL.itemsize + layout["capacity"] * (PREFIX + _slot_of(layout).itemsize)
        text = json.dumps(layout | {"bytes": size}, default=str).encode()
        layout, kept = json.loads(text), self.control["layout"].item()
        with suppress(ValueError):
            kept = json.loads(kept) | {"bytes": os.fstat(self.files[0]).st_size}
        for key in layout if kept else ():
            old = kept.get(key) if isinstance(kept, dict) else "a damaged one"
            if old != layout[key]:
                raise UserError(
                    f"expected a replay pool of {key} {layout[key]!s:.200} at {self.where}, got "
                    f"{old!s:.200}; choose another path, or remove the file"
                )
        if len(text) > CONTROL["layout"].itemsize:
            raise UserError("expected class names of at most a megabyte, got more; shorten them")
        cause = ""
        for number, file in enumerate(self.files, 1):
            try:
                room = os.fstatvfs(file)
                if number < len(self.files) and room.f_bavail * room.f_frsize < 2 * size:
                    continue  # the workers of a DataLoader need shared memory too
                _reserve(file, size)
                self.control["layout"], self.control["ready"] = text, number
                return
            except OSError as error:
                cause = error.strerror
                os.ftruncate(file, size if kept else CONTROL.itemsize)
        raise UserError(
            f"expected room for a replay pool of {size:,} bytes in {self.where}, got: {cause}; "
            "make room, or choose another path or a smaller capacity"
        )

    def open(self) -> bool:
        """Map the slots if their layout is known; return whether it is."""
        if self.control["ready"] and not self.layout:
            self.layout = json.loads(self.control["layout"].item())
            self.slot = _slot_of(self.layout)
            content = mmap.mmap(self.files[int(self.control["ready"]) - 1], self.layout["bytes"])
            shape = self.layout["capacity"], PREFIX + self.slot.itemsize
            self.slots = np.ndarray(shape, np.uint8, content, CONTROL.itemsize)
        return bool(self.layout)

    def write(self, record: Record) -> None:
        """Replace the oldest image."""
        form, label = form_of(record.image, record.label)
        if form != self.layout["form"]:
            raise UserError(
                "expected every image and label to be as the first: (shape, number, its shape) "
                f"{self.layout['form']}, got {form}; make them so"
            )
        pixels = (
            (record.image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        )
        row = np.array((record.epoch, record.index, label, pixels), self.slot).tobytes()
        slot = int(self.control["made"]) % self.layout["capacity"]
        self.slots[slot] = np.frombuffer(_checksum(row) + row, np.uint8)
        self.control["made"] += 1

    def read(self, number: int) -> Record | None:
        """Return the content of a slot; None if it is not whole."""
        if self.slots is None:
            raise UserError("expected an open replay pool, got one that was closed")
        row = self.slots[number].tobytes()
        if _checksum(memoryview(row)[PREFIX:]) != row[:PREFIX]:
            return None
        epoch, index, label, pixels = np.frombuffer(row, self.slot, 1, PREFIX)[0]
        label = torch.from_numpy(label.copy()) if label.ndim else label.item()
        image = torch.from_numpy(pixels.astype(np.float32) / 255)
        return Record(image, label, int(epoch), int(index))


def _received(where: str, copies: list[Any]) -> Store:
    """Open a store that came from another process."""
    store = Store(where, [file.detach() for file in copies])
    store.open()
    return store


def form_of(image: object, label: object) -> tuple[list[Any], np.ndarray]:
    """Return [shape of an image, dtype and shape of its label], and the label as an array."""
    if not (isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point()):
        form = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image)
        raise UserError(
            f"expected images as float tensors (C, H, W) in [0, 1], got {form}; give other "
            "transforms to the pool, which applies them at every draw"
        )
    number = torch.as_tensor(label).detach().cpu().numpy()
    return [list(image.shape), number.dtype.str, list(number.shape)], number


def layout_of(dataset: Any, sample: Sample, capacity: int) -> JsonObject:
    """Describe the slots: their form, the classes, and all settings that determine the images."""
    low, high = sample[0].aminmax()
    if not -0.01 <= low <= high <= 1.01:
        raise UserError(
            f"expected images in [0, 1], got one from {low:.3g} to {high:.3g}; give other "
            "transforms to the pool, which applies them at every draw"
        )
    names = list(getattr(dataset, "classes", ()))
    layout = {"capacity": capacity, "form": form_of(*sample)[0], "classes": names}
    layout |= {"length": len(dataset)}
    if (synthesizer := getattr(dataset, "synthesizer", None)) is not None:
        sampling = {k: v for k, v in vars(synthesizer.resolved).items() if k != "batch_size"}
        layout |= sampling | {
            "rule": synthesizer.rule,
            "prompts": synthesizer.prompts and synthesizer.texts,
        }
        bank = synthesizer.bank
        layout |= {"fingerprint": bank.fingerprint, "bank": bank.digest}
        if synthesizer.reference_rule:
            layout |= {"reference_rule": synthesizer.reference_rule}
    if contexts := getattr(getattr(dataset, "planner", None), "contexts", ()):
        layout |= {"contexts": sha256(json.dumps(contexts).encode())}
    if (plan := getattr(dataset, "plan", None)) is not None:
        dataset.set_epoch(0)
        plans = [plan(index).to_json() for index in range(min(len(names), len(dataset)))]
        layout |= {"plans": sha256("".join(plans).encode())}
    return layout


def _slot_of(layout: JsonObject) -> np.dtype:
    """Return the dtype of a slot."""
    shape, *label = layout["form"]
    fields = [("epoch", "i8"), ("index", "i8"), ("label", *label), ("image", "u1", shape)]
    return np.dtype([(name, kind, *map(tuple, size)) for name, kind, *size in fields])


def _checksum(content: bytes | memoryview) -> bytes:
    """Return CRC-32 and a bit, so that a slot of zeros is not whole."""
    return (zlib.crc32(content) | 1 << 32).to_bytes(PREFIX, "little")


def _reserve(file: int, size: int) -> None:
    """Allocate room now, since a full disk kills a process that writes to a mapped page."""
    getattr(os, "posix_fallocate", lambda file, _, size: os.ftruncate(file, size))(file, 0, size)


def nameless() -> tuple[str, list[int]]:
    """Open files without a name in memory and on disk, of which nothing is ever left."""
    folders, files = ("/dev/shm", tempfile.gettempdir()), []
    for folder in folders:
        with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file.fileno(), CONTROL.itemsize)
            files.append(os.dup(file.fileno()))
    if not files:
        raise UserError(f"expected room in {' or '.join(folders)}, got none; make some")
    return " or ".join(folders), files


def named(path: Path) -> tuple[str, list[int]]:
    """Open or make the file of a pool, for this run alone."""
    file = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if os.pread(file, len(MAGIC), 0) not in (b"", MAGIC):
            raise OSError(0, "another file")
        try:
            lock_handle(file, patience_s=PATIENCE_S)
        except BlockingIOError:
            raise OSError(0, "one that another run draws from") from None
        os.pwrite(file, MAGIC, 0)
        _reserve(file, CONTROL.itemsize)
    except OSError as error:
        if file >= 0:
            os.close(file)  # and with it the lock
        raise UserError(
            f"expected the file of a replay pool at {path}, or to make one, got {error.strerror}; "
            "choose another path"
        ) from None
    return str(path), [file]
