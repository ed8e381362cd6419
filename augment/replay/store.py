"""The file of a replay pool: slots of images that one process writes and every process reads.

A control block (`CONTROL`), then slots of one image each, in bytes, with its label, the epoch and
index it was made for, and a checksum of all that. There are no locks: what is read while it is
being written, or was left half written by a kill, does not fit its checksum, in whatever order
processors and disks carry writes out, and the reader takes the next slot.
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
from augment.core.files import sha256
from augment.synthesis.dataset import Sample

MAGIC = b"latent-augment replay pool 1"
CONTROL: Any = np.dtype(
    [
        ("magic", "S64"),
        ("made", "i8"),  # images ever; the next one goes to slot made % capacity
        ("before", "i8"),  # images made before this run,
        ("started", "f8"),  # when it began to make more, by the clock that processes share,
        ("beat", "f8"),  # and when it had made the last ones
        ("ready", "i8"),  # in this run: 1 + the number of the file that the slots are in
        ("ended", "i8"),  # in this run: the generator is gone,
        ("error", "S4096"),  # and of what, if it could tell
        ("draws", "i8", (4096,)),  # every process adds up in a cell of its own, by its number
        ("layout", "S1000000"),  # JSON: what the slots are of
    ],
    align=True,
)
PREFIX = 8  # bytes of a slot's checksum
PATIENCE_S = 10.0  # for the processes of a killed run to notice and let go of its file


@dataclass(frozen=True, eq=False)
class Record:
    """An image and its label, and the epoch and index of the dataset that they were made for."""

    image: Float[Tensor, "c h w"]
    label: Any
    epoch: int
    index: int


class Store:
    """The pool's file, mapped; sent to a child process it is the same file.

    Args:
        where: what to call it.
        files: descriptors of the file; or of several, the first with room is taken.
    """

    def __init__(self, where: str, files: list[int]) -> None:
        self.where, self.files, self.layout = where, files, {}
        self.slots: Any = None
        weakref.finalize(self, lambda: [os.close(file) for file in files])
        self.control: Any = np.ndarray((), CONTROL, mmap.mmap(files[0], CONTROL.itemsize))

    def __reduce__(self) -> Any:
        return sent, (self.where, [DupFd(file) for file in self.files])

    @property
    def error(self) -> str:
        """What the generator died of, if it could tell."""
        return self.control["error"].item().decode(errors="replace")

    @property
    def silence(self) -> float:
        """Seconds since there were new images."""
        return time.monotonic() - float(self.control["beat"])

    def settle(self, layout: dict[str, Any]) -> None:
        """Take the room for the slots of a layout, or see that they are there.

        Raises:
            UserError: there is no room, or the file has other slots.
        """
        size = CONTROL.itemsize + layout["capacity"] * (PREFIX + slot_of(layout).itemsize)
        text = json.dumps(layout | {"bytes": size}, default=str).encode()
        layout, kept = json.loads(text), self.control["layout"].item()
        with suppress(ValueError):
            kept = json.loads(kept) | {"bytes": os.fstat(self.files[0]).st_size}
        for key in layout if kept else ():
            found = kept.get(key) if isinstance(kept, dict) else "what was harmed"
            if found != layout[key]:
                raise UserError(
                    f"expected a replay pool of {key} {layout[key]!s:.200} at {self.where}, got "
                    f"{found!s:.200}; choose another path, or remove the file"
                )
        if len(text) > CONTROL["layout"].itemsize:
            raise UserError("expected class names of a megabyte at most, got more; shorten them")
        cause = ""
        for number, file in enumerate(self.files, 1):
            try:
                room = os.fstatvfs(file)
                if number < len(self.files) and room.f_bavail * room.f_frsize < 2 * size:
                    continue  # of what is in memory a DataLoader's workers want their part
                reserve(file, size)
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
        """Map the slots as soon as it is known what they are of."""
        if self.control["ready"] and not self.layout:
            self.layout = json.loads(self.control["layout"].item())
            self.slot = slot_of(self.layout)
            content = mmap.mmap(self.files[int(self.control["ready"]) - 1], self.layout["bytes"])
            shape = self.layout["capacity"], PREFIX + self.slot.itemsize
            self.slots = np.ndarray(shape, np.uint8, content, CONTROL.itemsize)
        return bool(self.layout)

    def write(self, record: Record) -> None:
        """Put an image in the place of the oldest.

        Raises:
            UserError: it is not of the form that the first image had.
        """
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
        self.slots[slot] = np.frombuffer(checksum(row) + row, np.uint8)
        self.control["made"] += 1

    def read(self, number: int) -> Record | None:
        """What is in a slot, if it is whole."""
        if self.slots is None:
            raise UserError("expected an open replay pool, got one that was closed")
        row = self.slots[number].tobytes()
        if checksum(memoryview(row)[PREFIX:]) != row[:PREFIX]:
            return None
        epoch, index, label, pixels = np.frombuffer(row, self.slot, 1, PREFIX)[0]
        label = torch.from_numpy(label.copy()) if label.ndim else label.item()
        image = torch.from_numpy(pixels.astype(np.float32) / 255)
        return Record(image, label, int(epoch), int(index))


def sent(where: str, copies: list[Any]) -> Store:
    """A store that came from another process."""
    store = Store(where, [file.detach() for file in copies])
    store.open()
    return store


def form_of(image: Any, label: Any) -> tuple[list[Any], np.ndarray]:
    """[shape of an image, kind and shape of its label], and the label as an array.

    Raises:
        UserError: the image is not a float tensor (C, H, W).
    """
    if not (isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point()):
        found = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image)
        raise UserError(
            f"expected images as float tensors (C, H, W) in [0, 1], got {found}; give other "
            "transforms to the pool, which applies them at every draw"
        )
    number = torch.as_tensor(label).detach().cpu().numpy()
    return [list(image.shape), number.dtype.str, list(number.shape)], number


def layout_of(dataset: Any, sample: Sample, capacity: int) -> dict[str, Any]:
    """What a pool's slots are of: their form, the classes, and whatever shapes the images."""
    low, high = sample[0].aminmax()
    if not -0.01 <= low <= high <= 1.01:
        raise UserError(
            f"expected images in [0, 1], got one from {low:.3g} to {high:.3g}; give other "
            "transforms to the pool, which applies them at every draw"
        )
    names = list(dataset.classes)
    layout = {"capacity": capacity, "form": form_of(*sample)[0], "classes": names}
    layout |= {"length": len(dataset)}
    if (synthesizer := getattr(dataset, "synthesizer", None)) is not None:
        settings = ("rule", "solver", "steps", "guidance", "interval", "prompts")
        layout |= {key: getattr(synthesizer, key) for key in settings}
        layout |= {"fingerprint": synthesizer.bank.fingerprint}
    if (plan := getattr(dataset, "plan", None)) is not None:
        dataset.set_epoch(0)
        plans = [plan(index).to_json() for index in range(len(names))]
        layout |= {"plans": sha256("".join(plans).encode())}
    return layout


def slot_of(layout: dict[str, Any]) -> np.dtype:
    """The content of a slot."""
    shape, *label = layout["form"]
    fields = [("epoch", "i8"), ("index", "i8"), ("label", *label), ("image", "u1", shape)]
    return np.dtype([(name, kind, *map(tuple, size)) for name, kind, *size in fields])


def checksum(content: bytes | memoryview) -> bytes:
    """CRC-32, and a bit by which a slot of zeros is never whole."""
    return (zlib.crc32(content) | 1 << 32).to_bytes(PREFIX, "little")


def reserve(file: int, size: int) -> None:
    """Take room now: to find none when a mapped page is written to kills a process."""
    getattr(os, "posix_fallocate", lambda file, _, size: os.ftruncate(file, size))(file, 0, size)


def nameless() -> tuple[str, list[int]]:
    """Files in memory and on disk that have no name, so that nothing is left of them, ever."""
    folders, files = ("/dev/shm", tempfile.gettempdir()), []
    for folder in folders:
        with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
            reserve(file.fileno(), CONTROL.itemsize)
            files.append(os.dup(file.fileno()))
    if not files:
        raise UserError(f"expected room in {' or '.join(folders)}, got none; make some")
    return " or ".join(folders), files


def named(path: Path) -> tuple[str, list[int]]:
    """The file of a pool, made if needed, for this run alone.

    Raises:
        UserError: it is in use, is no pool, or cannot be made.
    """
    file, end = -1, time.monotonic() + PATIENCE_S
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if os.pread(file, len(MAGIC), 0) not in (b"", MAGIC):
            raise OSError(0, "another file")
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise OSError(0, "one that another run draws from") from None
                time.sleep(0.1)
        os.pwrite(file, MAGIC, 0)
        reserve(file, CONTROL.itemsize)
    except OSError as error:
        if file >= 0:
            os.close(file)  # and with it the lock
        raise UserError(
            f"expected the file of a replay pool at {path}, or to make one, got {error.strerror}; "
            "choose another path"
        ) from None
    return str(path), [file]
