"""Files that appear whole or not at all."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from augment.errors import UserError


def check_folder(path: Path) -> None:
    """Refuse a place for a folder where a file is."""
    if path.exists() and not path.is_dir():
        raise UserError(f"expected a folder at {path}, got a file; choose another place")


def write_bytes(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, record: Any) -> None:
    """Write a record as indented JSON."""
    write_bytes(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, what: str) -> Any:
    """Read a JSON record.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"expected {what} at {path.parent}, got no {path.name} there") from None
    except (OSError, ValueError) as error:
        raise UserError(f"expected {what} at {path.parent}, got {path.name}: {error}") from None


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 digest."""
    return hashlib.sha256(content).hexdigest()
