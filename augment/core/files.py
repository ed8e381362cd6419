"""Files that are written whole or not at all, and locks of folders."""

import csv
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from augment.core.errors import Damaged, Missing, UserError

JsonObject = dict[str, Any]
"""A JSON object: values by name."""


def check_folder(path: Path) -> None:
    """Refuse a place for a folder where a file is."""
    if path.exists() and not path.is_dir():
        raise UserError(f"expected a folder at {path}, got a file; choose another place")


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a file to write that takes its place when it is complete, and else is removed.

    It is written under a temporary name in the same folder, synchronised, renamed, and the folder
    synchronised: after a power cut there is the old file or the new one. A kill leaves at most
    the temporary file, for `Lock.sweep`.

    Args:
        path: the file.
        sync: wait for the disk; not needed where its digest is compared later.

    Raises:
        UserError: the disk is full, the folder read-only or the like.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if sync:
            _sync_folder(path.parent)
    except IsADirectoryError:
        raise UserError(
            f"expected to write a file at {path}, got a folder there; name a file in it"
        ) from None
    except OSError as error:
        raise UserError(
            f"expected to write {path}, got {error.strerror or error}; make room there or choose "
            "another place, and run the same command again: nothing that was finished is lost"
        ) from None


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file, by `replacing`."""
    with replacing(path, sync) as file:
        file.write(content)


def write_json(path: Path, record: Any) -> None:
    """Write a record as indented JSON, by `replacing`."""
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode("utf-8", "surrogatepass"))  # names of files may be no UTF-8


def write_table(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, by `replacing`."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_bytes(path, text.getvalue().encode("utf-8", "surrogatepass"))


TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")
PATIENCE_S = 5.0  # while another rank checks whether it is alone in a shared folder


def in_use(folder: Path) -> bool:
    """Tell whether a folder holds anything but temporary files of `replacing`."""
    return any(not TEMPORARY.fullmatch(path.name) for path in folder.iterdir())


def _leftovers(folder: Path) -> list[Path]:
    """Return the temporary files of `replacing` in a folder."""
    with suppress(OSError):
        files = [path for path in folder.rglob(".*.tmp") if path.is_file()]
        return [path for path in files if TEMPORARY.fullmatch(path.name)]
    return []


_HANDLES: set[int] = set()
"""File handles of the locks that this process holds."""


def _close_handles() -> None:
    """Close, in a forked process, its copies of handles: a lock ends with the run that took it."""
    while _HANDLES:
        os.close(_HANDLES.pop())


os.register_at_fork(after_in_child=_close_handles)


class Lock(NamedTuple):
    """The lock of a folder; see `locked`.

    Args:
        path: the folder.
        alone: whether nobody else can be at work there while it is held.
        dead: what killed writers had left when it was taken.
    """

    path: Path
    alone: bool
    dead: Sequence[Path] = ()

    def sweep(self) -> None:
        """Remove what killed writers left; beside others only what preceded them."""
        for path in _leftovers(self.path) if self.alone else self.dead:
            with suppress(OSError):
                path.unlink()


@contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[Lock]:
    """Hold a folder, made if needed, for one run, or for the ranks of one job.

    The lock is the kernel's (``flock`` on the folder), so that a killed run leaves none behind.
    A file system without locks (NFS) gives none, and nothing is swept: two runs then repeat each
    other's work, no more.

    Raises:
        UserError: another run holds it.
    """
    try:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
        _HANDLES.add(handle)
    except OSError as error:
        raise UserError(
            f"expected a folder to write to at {path}, got {error.strerror}; choose another place"
        ) from None
    try:
        try:
            lock = _take(path, handle, shared)
        except BlockingIOError:
            raise UserError(
                f"expected {path} for this run alone, got one that another run is at "
                "work on; wait for it or stop it, or start both as ranks of one job"
            ) from None
        except OSError:  # there are no locks here
            lock = Lock(path, alone=False)
        yield lock
    finally:
        if handle in _HANDLES:  # not so in a forked process
            _HANDLES.remove(handle)
            os.close(handle)
        for folder in new:
            with suppress(OSError):
                folder.rmdir()  # nothing came of it


def _take(path: Path, handle: int, shared: bool) -> Lock:
    """Lock an open folder for one run, or for several.

    A rank tries to be alone first, to list the files of dead writers. The kernel lets go for a
    moment before it shares a lock; if another run comes first, the rank waits for it.
    """
    if not shared:
        lock_handle(handle)
        return Lock(path, alone=True)
    dead: list[Path] = []
    with suppress(BlockingIOError):
        lock_handle(handle)
        dead = _leftovers(path)
    lock_handle(handle, fcntl.LOCK_SH, PATIENCE_S)
    return Lock(path, alone=False, dead=dead)


def lock_handle(handle: int, kind: int = fcntl.LOCK_EX, patience_s: float = 0.0) -> None:
    """Take the kernel's lock of an open file or folder, which ends when all its copies are closed.

    Args:
        handle: of the file.
        kind: ``fcntl.LOCK_EX`` or ``LOCK_SH``.
        patience_s: seconds to wait for another process.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            return fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)


LARGEST_RECORD = 2**28
"""Maximum bytes of a record: those of the manifest of a bank of seven million images."""

REMOVE = "remove it, or copy it anew"


@contextmanager
def reading(path: Path, what: str, cure: str = REMOVE) -> Iterator[io.BufferedReader]:
    """Open a regular file to read; a pipe or a device is never opened.

    Raises:
        Missing: there is none.
        Damaged: there is something else.
        UserError: it cannot be read now.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116, half the time of Path.stat
            raise damaged(path, what, "no regular file", cure)
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
            yield file
    except OSError as error:
        raise unreadable(path, what, error) from None


def damaged(path: Path, what: str, flaw: str, cure: str = REMOVE) -> Damaged:
    """Build the error for a file that is not what was written."""
    return Damaged(f"expected {what} in {path}, got {flaw}; {cure}")


def unreadable(path: Path, what: str, error: OSError) -> UserError:
    """Build the error for a file that is missing, or that cannot be read now."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Missing(f"expected {what} at {path}, got none; check the path")
    return UserError(
        f"expected to read {path}, got {error.strerror or error}; make that possible and run the "
        "same command again: nothing is known to be wrong with the file"
    )


def read_file(path: Path, what: str, cure: str = REMOVE) -> bytes:
    """Read a regular file of at most `LARGEST_RECORD` bytes."""
    with reading(path, what, cure) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_RECORD:
            raise damaged(path, what, f"{size:,} bytes", cure)
        return file.read(size)


def read_json(path: Path, what: str) -> Any:
    """Read a JSON record."""
    return parse_json(read_file(path, what), path, what)


def parse_json(content: bytes, path: Path, what: str, cure: str = REMOVE) -> Any:
    """Parse the content of a JSON file, in UTF-8, without NaN and infinity."""
    try:
        return DECODER.decode(content.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, what, f"no JSON ({error})", cure) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def sha256(content: bytes) -> str:
    """Return the hexadecimal SHA-256 digest."""
    return hashlib.sha256(content).hexdigest()


def model_digest(place: str) -> str | None:
    """Return the SHA-256 of a model: a file, or a folder with a config.json and its files' names.

    Args:
        place: the path; ``local-dir:`` may be before it.

    Returns:
        The digest; None if there is no model on the disk.
    """
    path = Path(place.removeprefix("local-dir:"))
    if path.is_file():
        return _file_digest(path)
    if not (path / "config.json").is_file():
        return None
    files = sorted(file for file in path.iterdir() if file.is_file())
    return sha256(json.dumps([(file.name, _file_digest(file)) for file in files]).encode())


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remember(path: Path, settings: JsonObject, option: str, begun: bool = True) -> None:
    """Write the settings of a job into its folder; refuse to resume a job of other settings.

    Args:
        path: a JSON file in the folder.
        settings: what must not change when the job is resumed; may be nested.
        option: the command's option that names the folder, for errors.
        begun: whether anything that depends on the settings is there.

    Raises:
        UserError: the folder is of other settings; the first that differs is named.
    """
    settings = json.loads(json.dumps(settings))
    old = read_json(path, "the settings of a job") if begun and path.exists() else settings
    if other := difference(old, settings):
        name, before, now = other
        raise UserError(
            f"expected {path.parent} to be new or of {name} {now}, got {before}; choose another "
            f"{option}, or the same settings to go on"
        )
    write_json(path, settings)


def difference(old: object, new: object, name: str = "") -> tuple[str, str, str] | None:
    """Return the first setting that differs, by its dotted name, and both values.

    >>> difference({"model": {"lr": 0.1}}, {"model": {"lr": 0.2}})
    ('model.lr', '0.1', '0.2')
    """
    if isinstance(old, dict) and isinstance(new, dict):
        parts = (difference(old.get(k), new.get(k), f"{name}.{k}") for k in {**new, **old})
        return next(filter(None, parts), None)
    if old == new:
        return None
    return name.lstrip(".") or "settings", json.dumps(old), json.dumps(new)
