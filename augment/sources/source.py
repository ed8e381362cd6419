"""What every source is: labelled images with names and bytes, and a torch Dataset of them."""

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from augment.errors import ImageRejected
from augment.files import sha256
from augment.images import decode_image, open_image


class Source(Dataset[tuple[Any, Any]]):
    """Labelled images, as torchvision's datasets are: item i is (PIL image, label).

    A subclass sets ``root``, the place, and ``ids``, the image ids of each class in label order,
    and overrides `read` where an id is not a path below the root. Banks, filters and training all
    take one.

    Attributes:
        root: the place where the images are, for information.
        ids: the image ids of each class, in label order; a class may have none.
        transform, target_transform: applied to the image and to the label of an item.
    """

    root: Path
    ids: dict[str, list[str]]
    transform: Callable[[Any], Any] | None = None
    target_transform: Callable[[Any], Any] | None = None

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return list(self.ids)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Labels by class name."""
        return {name: label for label, name in enumerate(self.ids)}

    @property
    def counts(self) -> list[int]:
        """How many images there are of each class."""
        return [len(ids) for ids in self.ids.values()]

    @cached_property
    def samples(self) -> list[tuple[str, int]]:
        """(image id, label) of every item, class by class."""
        return [(i, label) for label, ids in enumerate(self.ids.values()) for i in ids]

    @property
    def targets(self) -> list[int]:
        """The label of every item."""
        return [label for _, label in self.samples]

    def read(self, image_id: str) -> bytes:
        """The bytes of an image's file.

        Raises:
            OSError: there is none, or it cannot be read.
        """
        return (self.root / image_id).read_bytes()

    def size(self, image_id: str) -> int:
        """How many they are, found without reading them; 0 if that cannot be told."""
        try:
            place = os.path.join(self.root, image_id)  # noqa: PTH118, half the time of a Path
            return os.stat(place).st_size  # noqa: PTH116
        except OSError:
            return 0

    def digest(self, image_id: str) -> str:
        """SHA-256 of an image's bytes.

        Raises:
            OSError: it cannot be read.
        """
        return sha256(self.read(image_id))

    def load(self, image_id: str, channels: int, resolution: int) -> Float[Tensor, "c r r"]:
        """The image, brought to a backbone's format; see `augment.images.prepare`.

        Raises:
            ImageRejected: it is not readable.
        """
        return self._readable(image_id, lambda b: decode_image(b, channels, resolution))

    def open(self, image_id: str) -> Image.Image:
        """The image as it is, upright, grey or RGB.

        Raises:
            ImageRejected: it is not readable.
        """
        return self._readable(image_id, open_image)

    def _readable(self, image_id: str, decode: Callable[[bytes], Any]) -> Any:
        try:
            return decode(self.read(image_id))
        except (OSError, ImageRejected) as error:
            raise ImageRejected(
                f"expected a readable PNG or JPEG image, got {self.root / image_id} ({error}); "
                "mend or remove the file"
            ) from None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image_id, label = self.samples[index]
        image = self.open(image_id)
        return (
            self.transform(image) if self.transform else image,
            self.target_transform(label) if self.target_transform else label,
        )
