"""Files that appear whole or not at all, and folders that one run at a time works on."""

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
from typing import Any, BinaryIO

from augment.core.errors import Damaged, Missing, UserError


def check_folder(path: Path) -> None:
    """Refuse a place for a folder where a file is."""
    if path.exists() and not path.is_dir():
        raise UserError(f"expected a folder at {path}, got a file; choose another place")


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write that takes its place when it is complete, and leaves nothing if it is not.

    It is written under a temporary name in the same folder, synchronised, renamed, and the folder
    synchronised: after a power cut there is the old file or the new one. A kill leaves the
    temporary file at most, for `Lock.sweep`.

    Args:
        path: the file.
        sync: wait for the disk; where all is compared again there is no need to.

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
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(
            f"expected to write {path}, got {error.strerror or error}; make room there or choose "
            "another place, and run the same command again: nothing that was finished is lost"
        ) from None


def write_bytes(path: Path, content: bytes, sync: bool = True) -> None:
    """Write a file at once, by `replacing`."""
    with replacing(path, sync) as file:
        file.write(content)


def write_json(path: Path, record: Any) -> None:
    """Write a record as indented JSON."""
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_bytes(path, text.encode("utf-8", "surrogatepass"))  # names of files may be no UTF-8


def write_table(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file at once."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_bytes(path, text.getvalue().encode("utf-8", "surrogatepass"))


TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")
PATIENCE_S = 5.0  # for a rank that looks whether it is alone in a shared folder


def in_use(folder: Path) -> bool:
    """Whether there is anything in a folder but files that are, or were, being written."""
    return any(not TEMPORARY.fullmatch(path.name) for path in folder.iterdir())


def leftovers(folder: Path) -> list[Path]:
    """Return the files in a folder that are, or were, being written."""
    with suppress(OSError):
        found = [path for path in folder.rglob(".*.tmp") if TEMPORARY.fullmatch(path.name)]
        return [path for path in found if path.is_file()]
    return []


HANDLES: set[int] = set()
"""File handles of the locks that this process holds."""


def close_handles() -> None:
    """Close, in a forked process, its copies of handles: a lock ends with the run that took it."""
    while HANDLES:
        os.close(HANDLES.pop())


os.register_at_fork(after_in_child=close_handles)


class Lock:
    """The lock of a folder; see `locked`.

    It is never changed while it is held: to ask the kernel for more would be to let go first.

    Args:
        path: the folder.
        alone: whether nobody else can be at work there while it is held.
        dead: what killed writers had left when it was taken.
    """

    def __init__(self, path: Path, alone: bool, dead: Sequence[Path] = ()) -> None:
        self.path, self.alone, self.dead = path, alone, dead

    def sweep(self) -> None:
        """Remove what killed writers left; beside others only what was there before all of them."""
        for path in leftovers(self.path) if self.alone else self.dead:
            with suppress(OSError):
                path.unlink()


@contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[Lock]:
    """Hold a folder, made if needed, for one run, or for several that know of each other.

    The lock is the kernel's (``flock`` on the folder), so that a killed run leaves none behind.
    Where a file system has none (NFS) there is none, and nothing is swept: two runs then repeat
    each other's work, no more.

    Raises:
        UserError: another run holds it.
    """
    try:
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
        HANDLES.add(handle)
    except OSError as error:
        raise UserError(
            f"expected a folder to write to at {path}, got {error.strerror}; choose another place"
        ) from None
    try:
        try:
            lock = take(path, handle, shared)
        except BlockingIOError:
            raise UserError(
                f"expected {path} for this run alone, got one that another run is at "
                "work on; wait for it or stop it, or start both as ranks of one job"
            ) from None
        except OSError:  # there are no locks here
            lock = Lock(path, alone=False)
        yield lock
    finally:
        if handle in HANDLES:  # not so in a forked process
            HANDLES.remove(handle)
            os.close(handle)
        for folder in new:
            with suppress(OSError):
                folder.rmdir()  # nothing came of it


def take(path: Path, handle: int, shared: bool) -> Lock:
    """Lock an open folder for one run, or for several.

    A rank tries to be alone first, to see what was left by writers that are dead. To share the
    folder it then lets go for a moment; it has not begun to work, so nothing is lost if another
    comes first: it tries again.

    Raises:
        BlockingIOError: another run holds it.
        OSError: the file system has no locks.
    """
    if not shared:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Lock(path, alone=True)
    end = time.monotonic() + PATIENCE_S
    while True:
        dead: list[Path] = []
        try:
            with suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                dead = leftovers(path)
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return Lock(path, alone=False, dead=dead)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


LARGEST_RECORD = 2**28
"""Bytes of a record. The manifest of a bank of seven million images has so many."""


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
    """Read a regular file of at most `LARGEST_RECORD` bytes.

    Raises:
        UserError: see `reading`; `Damaged` also if it is larger.
    """
    with reading(path, what, cure) as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_RECORD:
            raise damaged(path, what, f"{size:,} bytes", cure)
        return file.read(size)


def read_json(path: Path, what: str) -> Any:
    """Read a JSON record.

    Raises:
        UserError: see `read_file`; `Damaged` also if the file is not JSON.
    """
    return parse_json(read_file(path, what), path, what)


def parse_json(content: bytes, path: Path, what: str, cure: str = REMOVE) -> Any:
    """Parse the content of a JSON file, in UTF-8, without NaN and infinity.

    Raises:
        Damaged: it is something else.
    """
    try:
        return DECODER.decode(content.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, what, f"no JSON ({error})", cure) from None


def no_constant(name: str) -> None:
    """Refuse NaN and infinity, which JSON has not."""
    raise ValueError(f"{name} is no number")


DECODER = json.JSONDecoder(parse_constant=no_constant)


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 digest."""
    return hashlib.sha256(content).hexdigest()


def model_digest(place: str) -> str | None:
    """Return the SHA-256 of a model: a file, or a folder with a config.json and its files' names.

    Args:
        place: the path; ``local-dir:`` may be before it.

    Returns:
        The digest; None if there is no model on the disk.
    """
    path = Path(place.removeprefix("local-dir:"))
    files = [path]
    if (path / "config.json").is_file():
        files = sorted(file for file in path.iterdir() if file.is_file())
    elif not path.is_file():
        return None
    digests = []
    for file in files:
        with file.open("rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").hexdigest())
    if files == [path]:
        return digests[0]
    names = [file.name for file in files]
    return sha256(json.dumps([*zip(names, digests, strict=True)]).encode())


def remember(path: Path, settings: dict[str, Any], option: str, begun: bool = True) -> None:
    """Write the settings of a job into its folder, or check that what is there is of the same.

    Args:
        path: a JSON file in the folder.
        settings: what a job that goes on has in common with the one before; may be nested.
        option: what names another folder.
        begun: whether there is anything yet that depends on them.

    Raises:
        UserError: it is of others; the first that differs is named.
    """
    settings = json.loads(json.dumps(settings))
    known = read_json(path, "the settings of a job") if begun and path.exists() else settings
    other = difference(known, settings)
    if other:
        name, old, new = other
        raise UserError(
            f"expected {path.parent} to be new or of {name} {new}, got {old}; choose another "
            f"{option}, or the same settings to go on"
        )
    write_json(path, settings)


def difference(old: Any, new: Any, name: str = "") -> tuple[str, str, str] | None:
    """The first setting that differs, by its dotted name, and both values.

    >>> difference({"model": {"lr": 0.1}}, {"model": {"lr": 0.2}})
    ('model.lr', '0.1', '0.2')
    """
    if isinstance(old, dict) and isinstance(new, dict):
        parts = (difference(old.get(k), new.get(k), f"{name}.{k}") for k in {**new, **old})
        return next(filter(None, parts), None)
    return (
        None if old == new else (name.lstrip(".") or "settings", json.dumps(old), json.dumps(new))
    )
