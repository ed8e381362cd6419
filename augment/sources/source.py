"""A source: labelled images with ids and bytes, as a torch Dataset."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from augment.core.errors import AugmentWarning, ImageRejected, UserError, shown
from augment.core.files import sha256
from augment.core.progress import Progress
from augment.sources.decoding import open_image
from augment.sources.images import fit, has_colour, pixels_of

_LOOK = 4096  # images that `readable` opens before it moves its bar


def check_share(max_rejects: float) -> None:
    """Refuse a share of rejects outside [0, 1]."""
    if not 0 <= max_rejects <= 1:
        raise UserError(f"expected max_rejects in [0, 1], got {max_rejects}; try 0.05")


def refuse_rejects(count: int, total: int, max_rejects: float, what: str, first: str) -> None:
    """Raise `ImageRejected` if more than a share of all images are rejected."""
    if count > math.ceil(max_rejects * total):  # one of a few is no sign that something is wrong
        raise ImageRejected(
            f"expected no more than {max_rejects:.1%} of {total} {what} to be rejected, got "
            f"{count}, such as {first}; repair or remove them, or allow more by max_rejects"
        )


class Source(Dataset[tuple[Any, Any]]):
    """Labelled images, as torchvision's datasets are: item i is (PIL image, label).

    A subclass sets ``root`` and ``ids``, and overrides `read` where an id is not a path below the
    root. Banks, filters and training take any source.

    Attributes:
        root: place of the images, for information.
        ids: image ids of each class, in label order; a class may have none.
        transform, target_transform: applied to the image and to the label of an item.
        background: colour that is seen through transparent pixels.
        threads: whether `open` may be called by several threads.
    """

    root: Path
    ids: dict[str, list[str]]
    transform: Callable[[Any], Any] | None = None
    target_transform: Callable[[Any], Any] | None = None
    background: str = "white"
    threads: bool = True

    @property
    def classes(self) -> list[str]:
        """Return the class names in label order."""
        return list(self.ids)

    @property
    def class_to_idx(self) -> dict[str, int]:
        """Return the labels by class name."""
        return {name: label for label, name in enumerate(self.ids)}

    @property
    def counts(self) -> list[int]:
        """Return the number of images of each class."""
        return [len(ids) for ids in self.ids.values()]

    @cached_property
    def samples(self) -> list[tuple[str, int]]:
        """Return (image id, label) of every item, class by class."""
        return [(i, label) for label, ids in enumerate(self.ids.values()) for i in ids]

    @property
    def targets(self) -> list[int]:
        """Return the label of every item."""
        return [label for _, label in self.samples]

    def read(self, image_id: str) -> bytes:
        """Return the bytes of an image's file; raise `OSError` if it cannot be read."""
        return (self.root / image_id).read_bytes()

    def size(self, image_id: str) -> int:
        """Return the size of an image's file in bytes, without reading it; 0 if it is unknown."""
        try:
            place = os.path.join(self.root, image_id)  # noqa: PTH118, half the time of a Path
            return os.stat(place).st_size  # noqa: PTH116
        except OSError:
            return 0

    def digest(self, image_id: str) -> str:
        """Return the SHA-256 of an image's file; raise `OSError` if it cannot be read."""
        return sha256(self.read(image_id))

    def load(self, image_id: str, channels: int, resolution: int) -> Float[Tensor, "c r r"]:
        """Open an image and `augment.sources.images.prepare` it for a backbone."""
        return fit(pixels_of(self.open(image_id), channels), resolution)

    def open(self, image_id: str, quick: bool = False) -> Image.Image:
        """Open an image as a viewer shows it; see `augment.sources.decoding.open_image`.

        Raises:
            ImageRejected: it is not readable.
        """
        try:
            return open_image(self.read(image_id), self.background, image_id, quick)
        except (OSError, ImageRejected) as error:
            raise ImageRejected(
                f"expected a readable image, got {self.root / image_id} ({error}); repair or "
                "remove the file"
            ) from error

    def examples(self, count: int = 16) -> Iterator[Image.Image]:
        """Open up to a number of images, evenly chosen; those that cannot be read are left out."""
        for image_id, _ in self.samples[:: -(-len(self) // count) or 1]:
            with suppress(ImageRejected):
                yield self.open(image_id)

    def keep_out(self, place: Path) -> None:
        """Refuse to write to a place among the images, which would be taken for one of them.

        Raises:
            UserError: the place is in the folder whose sub-folders are the classes.
        """

    def readable(self, max_rejects: float = 0.05, name: str = "") -> "Source":
        """Return the source without the images that cannot be read, and warn of these.

        Args:
            max_rejects: share of images that may be left out, rounded up to a whole image.
            name: what the images are for, such as test.

        Raises:
            ImageRejected: there are more, or a class is left without any image.
        """
        check_share(max_rejects)
        name = f"{name} " if name else ""

        def reason(image_id: str) -> str:
            try:
                self.open(image_id, quick=True)
            except ImageRejected as error:
                return f"{image_id} ({error.__cause__ or error})"
            return ""

        ids, out = [image_id for image_id, _ in self.samples], {}
        workers = (os.cpu_count() or 1) if self.threads else 1
        with (
            ThreadPoolExecutor(workers) as pool,
            Progress(ids, f"look at {name}images", delay=2) as bar,
        ):
            for first in range(0, len(ids), _LOOK):
                part = ids[first : first + _LOOK]
                out |= {i: why for i, why in zip(part, pool.map(reason, part), strict=True) if why}
                bar.update(len(part))
        if not out:
            return self
        first = next(iter(out.values()))
        refuse_rejects(len(out), len(ids), max_rejects, f"{name}images", first)
        warnings.warn(
            f"expected {len(ids)} readable {name}images, got {len(out)} that cannot be read and "
            f"are left out, such as {first}",
            AugmentWarning,
            stacklevel=2,
        )
        kept = copy(self)
        kept.__dict__.pop("samples", None)
        kept.ids = {n: [i for i in members if i not in out] for n, members in self.ids.items()}
        for class_name, members in self.ids.items():
            if members and not kept.ids[class_name]:
                raise ImageRejected(
                    f"expected a readable {name}image of class {shown(class_name)}, got none, "
                    f"such as {out[members[0]]}; repair one, or remove the class"
                )
        return kept

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image_id, label = self.samples[index]
        image = self.open(image_id)
        return (
            self.transform(image) if self.transform else image,
            self.target_transform(label) if self.target_transform else label,
        )


def choose_backbone(name: str, images: Iterable[Image.Image]) -> str:
    """Return a backbone's name; for ``auto`` the embedded one for such images.

    It is tiny-cifar if an image has colour, and otherwise tiny, which knows grey clothes.

    Args:
        name: the name; any but ``auto`` is returned.
        images: some of the images, opened one after the other.
    """
    if name != "auto":
        return name
    return "tiny-cifar" if any(map(has_colour, images)) else "tiny"


def warn_of_copies(rows: Iterable[tuple[str, str, str]], name: str) -> None:
    """Warn of the first file that is in two classes, by (id, class, digest) of each image."""
    seen: dict[str, tuple[str, str]] = {}
    for image_id, class_name, digest in rows:
        first, other = seen.setdefault(digest, (image_id, class_name))
        if other != class_name:
            warnings.warn(
                f"expected every {name} image in one class, got {image_id} of class {class_name}, "
                f"which is {first} of class {other}; remove it from one of them",
                AugmentWarning,
                stacklevel=3,
            )
            return
