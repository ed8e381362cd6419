"""Labelled images from ``root/class/*.png|jpg``."""

import errno
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from augment.errors import AugmentWarning, UserError
from augment.images import SUFFIXES
from augment.sources.source import Source

ORIGINS = ".origins.json"
"""File in a folder of exported images: the real ones that they come from."""


class Folder(Source):
    """An image folder: one sub-folder a class, files and folders in alphabetical order.

    Hidden files and folders are passed over, and so are links that lead out of the root, with a
    warning. Image ids are paths relative to the root.

    Args:
        root: the folder.
        links: follow links that lead out of the root.
        transform, target_transform: applied to the PIL image and to the label of an item.

    Raises:
        UserError: the root is missing, holds no class folder, or a class folder holds no image,
            unless ``latent-augment export`` left it empty.
    """

    def __init__(
        self,
        root: str | Path,
        links: bool = False,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.root, self.transform, self.target_transform = Path(root), transform, target_transform
        if not self.root.is_dir():
            raise UserError(f"expected a folder of class folders, got {root}, which is not there")
        real, self._outside = self.root.resolve(), 0
        self._inside = None if links else real
        try:
            folders = sorted(
                p for p in self.root.iterdir() if p.name[0] != "." and self._stays(p) and p.is_dir()
            )
            self.ids = {folder.name: self._images(folder) for folder in folders}
        except OSError as error:
            raise UserError(
                f"expected to read {error.filename}, got {error.strerror}; change its permissions"
            ) from None
        if self._outside:
            warnings.warn(
                f"expected files in {root}, got {self._outside} links that lead out of it, which "
                "are passed over; copy what they point to, or follow links",
                AugmentWarning,
                stacklevel=2,
            )
        if not folders:
            raise UserError(f"expected class folders in {root}, got none; use root/class/*.png|jpg")

    def _stays(self, path: Path) -> bool:
        """Whether a path is to be looked at: it is no link, or one that stays in the root."""
        if self._inside is None or not path.is_symlink():
            return True
        try:
            stays = path.resolve().is_relative_to(self._inside)
        except (OSError, RuntimeError):  # a loop
            return True  # as a file that cannot be read it is told of later
        self._outside += not stays
        return stays

    def _images(self, folder: Path) -> list[str]:
        names = sorted(
            p.name
            for p in folder.iterdir()
            if p.suffix.lower() in SUFFIXES and p.name[0] != "." and self._stays(p)
        )
        if not names and not (self.root / ORIGINS).exists():
            raise UserError(
                f"expected images ({', '.join(SUFFIXES)}) in the class folder {folder}, got none; "
                "add one or remove the folder"
            )
        return [f"{folder.name}/{name}" for name in names]

    def read(self, image_id: str) -> bytes:
        """The bytes of an image's file.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        path = self.root / image_id
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "Not a regular file", str(path))  # a pipe would never end
        return path.read_bytes()
