"""Labelled images from ``root/class/*.png|jpg``."""

from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from augment.errors import UserError
from augment.images import SUFFIXES, load_image


class Folder:
    """An image folder: one sub-folder a class, files and folders in alphabetical order.

    Hidden files and folders are passed over. Image ids are paths relative to the root.

    Args:
        root: the folder.

    Raises:
        UserError: the root is missing, holds no class folder, or a class folder holds no image.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"expected a folder of class folders, got {root}, which is not there")
        folders = sorted(p for p in self.root.iterdir() if p.is_dir() and p.name[0] != ".")
        if not folders:
            raise UserError(f"expected class folders in {root}, got none; use root/class/*.png|jpg")
        self.ids = {folder.name: self._images(folder) for folder in folders}

    def _images(self, folder: Path) -> list[str]:
        names = sorted(
            p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.name[0] != "."
        )
        if not names:
            raise UserError(
                f"expected images ({', '.join(SUFFIXES)}) in the class folder {folder}, got none; "
                "add one or remove the folder"
            )
        return [f"{folder.name}/{name}" for name in names]

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return list(self.ids)

    def read(self, image_id: str) -> bytes:
        """The bytes of an image's file."""
        return (self.root / image_id).read_bytes()

    def load(self, image_id: str, channels: int, resolution: int) -> Float[Tensor, "c r r"]:
        """The prepared image.

        Raises:
            ImageRejected: the file is not a readable image.
        """
        return load_image(self.root / image_id, channels, resolution)
