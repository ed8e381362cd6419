"""The kinds of image that datasets give to transforms: PIL, uint8 or float.

torchvision's transforms take all of them. timm's and the image processors of Hugging Face's
transformers take PIL images, or pixels of 0 to 255: a float image in [0, 1] becomes black there
without an error, which `Transforms` reports.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from augment.core.errors import UserError, lookup
from augment.sources.images import pixels_of, to_pil

KINDS = {
    "float": "float32 tensors (C, H, W) in [0, 1]",
    "uint8": "uint8 tensors (C, H, W)",
    "pil": "RGB images of PIL",
}
"""What the kinds are."""

BYTES = ("ToNumpy", "MaybePILToTensor")
"""timm's last transforms before its prefetching loader, which casts images to uint8."""

LOST = 1 / 40
"""Share of its contrast that an image keeps where it is divided by 255 twice, at most: 1 / 57."""


def as_kind(image: Any, kind: str) -> Any:
    """Convert an image, PIL or a tensor (C, H, W), to a key of `KINDS`.

    A grey tensor stays grey as a tensor, and becomes RGB as a PIL image.

    Raises:
        UserError: it is something else.

    >>> as_kind(torch.ones(1, 2, 3), "pil").mode
    'RGB'
    """
    if isinstance(image, Image.Image):
        if kind == "pil":
            return image if image.mode == "RGB" else image.convert("RGB")
        pixels = pixels_of(image, 1 if image.mode == "L" else 3)
        return pixels if kind == "uint8" else pixels / 255
    if not isinstance(image, Tensor) or image.ndim != 3:
        raise UserError(
            f"expected an image, PIL or a tensor (C, H, W), got {type(image).__name__}; leave "
            "transforms to the dataset that converts it"
        )
    if kind == "pil":
        return to_pil(image if image.is_floating_point() else image / 255).convert("RGB")
    if kind == "uint8":
        pixels = (image.clamp(0, 1) * 255).round() if image.is_floating_point() else image
        return pixels.to(torch.uint8)
    return image if image.is_floating_point() else image / 255


class Transforms:
    """What a dataset does to an image and its label before it gives them away.

    Attributes:
        as_: kind of image; None leaves it as it is.
        transform, target_transform: applied to the image of that kind, and to the label.
    """

    as_: str | None = "float"
    transform: Callable[[Any], Any] | None = None
    target_transform: Callable[[Any], Any] | None = None
    _approved: Any = None

    def _set(
        self,
        as_: str | None,
        transform: Callable[[Any], Any] | None,
        target_transform: Callable[[Any], Any] | None,
    ) -> None:
        """Take the settings; raise `UserError` for an unknown kind."""
        if as_ is not None:
            lookup(KINDS, as_, "kind of image (as_)")
        self.as_, self.transform, self.target_transform = as_, transform, target_transform

    def _give(self, image: Any, label: Any) -> tuple[Any, Any]:
        """Return an item: the image and its label, converted and transformed."""
        image = image if self.as_ is None else as_kind(image, self.as_)
        if self.transform is not None:
            image = self._transformed(image, self.transform)
        return image, self.target_transform(label) if self.target_transform else label

    def _transformed(self, image: Any, transform: Callable[[Any], Any]) -> Any:
        """Apply the transform; an error says which kind it got, and lost contrast is an error."""
        try:
            made = transform(image)
        except Exception as error:
            if self.as_:
                error.add_note(
                    f"the transform got {KINDS[self.as_]}; as_={' or '.join(map(repr, KINDS))} "
                    "of the dataset chooses what it gets"
                )
            raise
        if self._approved is not transform:
            if isinstance(image, Tensor) and image.is_floating_point():
                _check_contrast(transform, image, made)
            self._approved = transform
        return made


def _check_contrast(transform: Callable[[Any], Any], image: Tensor, made: Any) -> None:
    """Refuse a transform that takes float images for pixels of 0 to 255.

    It is timm's, or it leaves nothing of the image, nor of noise in three tries: a crop of a flat
    background is no fault.
    """
    steps = getattr(transform, "transforms", None) or [transform]
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    if type(steps[-1]).__name__ in BYTES or (
        _lost(image, made) and all(_lost(noise, transform(noise)) for _ in range(3))
    ):
        raise UserError(
            f"expected a transform of {KINDS['float']}, got {type(transform).__name__}, which "
            "takes pixels of 0 to 255 and leaves nothing of the image; pass as_='pil' to the "
            "dataset"
        )


def _lost(image: Tensor, made: Any) -> bool:
    """Tell whether a transform has left next to nothing of a float image's contrast."""
    while isinstance(made, (Mapping, list, tuple)):
        made = next(iter(made.values() if isinstance(made, Mapping) else made), None)
    if not isinstance(made, (Tensor, np.ndarray)):
        return False
    pixels = torch.as_tensor(made)
    if pixels.ndim < 2 or pixels.numel() < 4:  # a number or features, no image
        return False
    if pixels.dtype == torch.uint8:  # cut to whole numbers, 1 where the image is white
        return not pixels.any() or (float(image.max()) >= 1 and int(pixels.max()) <= 1)
    if not pixels.is_floating_point():
        return False
    return float(pixels.max() - pixels.min()) < LOST * float(image.max() - image.min())
