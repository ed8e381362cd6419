"""Subsets of a source: few shots, long tails, slices of every class.

Which images these are depends on the seed and on how many images the classes have, in label order,
and on nothing else; a class's images stay in the source's order.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from augment.core.errors import UserError
from augment.sources.items import as_source
from augment.sources.source import Source


class Selection(Source):
    """Some images of a source, which reads them.

    Args:
        source: the source; of a path an image folder.
        transform, target_transform: applied to the PIL image and to the label of an item; by
            default those of the source.

    Raises:
        UserError: see `augment.sources.Folder`.
    """

    def __init__(
        self,
        source: Source | str | Path,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self.source = as_source(source)
        self.root, self.ids = self.source.root, dict(self.source.ids)
        self.threads, self.background = self.source.threads, self.source.background
        self.transform = transform or self.source.transform
        self.target_transform = target_transform or self.source.target_transform

    def read(self, image_id: str) -> bytes:
        """Return the bytes of an image's file; see `Source.read`."""
        self.source.background = self.background  # which may have been set meanwhile
        return self.source.read(image_id)

    def keep_out(self, place: Path) -> None:
        """Refuse to write to a place among the images; see `Source.keep_out`."""
        self.source.keep_out(place)

    def size(self, image_id: str) -> int:
        """Return the size of an image's file in bytes; see `Source.size`."""
        self.source.background = self.background
        return self.source.size(image_id)

    def open(self, image_id: str, quick: bool = False) -> Image.Image:
        """Open an image as a viewer shows it; see `Source.open`."""
        self.source.background = self.background
        return self.source.open(image_id, quick)


class FewShot(Selection):
    """A few images of every class, at random.

    One generator permutes the images of class after class, as in the code of DA-Fusion (Trabucco
    et al., arXiv 2302.07944), and the first ``shots`` are taken: a draw of fewer shots is part of
    any draw of more with the same seed.

    Args:
        source: the source; of a path an image folder.
        shots: images a class.
        seed: of the draw.
        skip: images of each permutation to pass over, such as those of another draw.
        transform, target_transform: see `Selection`.

    Raises:
        UserError: a class has fewer images, no shots, or a negative seed or skip.
    """

    def __init__(
        self,
        source: Source | str | Path,
        shots: int,
        seed: int = 0,
        skip: int = 0,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(source, transform, target_transform)
        if shots < 1:
            raise UserError(f"expected 1 or more shots, got {shots}; change it")
        if skip < 0:
            raise UserError(f"expected 0 or more images to skip, got {skip}; change it")
        self.ids = _drawn(self.ids, [shots] * len(self.ids), seed, skip)


class LongTail(Selection):
    """A source made long-tailed: class j of C has n_max · IF^(−j/(C−1)) images, rounded down.

    The exponential profile of CIFAR-10-LT and CIFAR-100-LT (Cao et al., LDAM-DRW, arXiv 1906.07413)
    in label order; its images are drawn by another generator than in their code.

    Args:
        source: the source; of a path an image folder.
        imbalance_factor: IF, the largest class's images over the smallest's.
        seed: of the draw.
        largest: n_max; by default as many as the source's smallest class has.
        transform, target_transform: see `Selection`.

    Raises:
        UserError: a factor below 1 or not finite, one class, a class that has too few images or
            would have none, or a negative seed.
    """

    def __init__(
        self,
        source: Source | str | Path,
        imbalance_factor: float,
        seed: int = 0,
        largest: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(source, transform, target_transform)
        if not 1 <= imbalance_factor < float("inf"):
            factor = f"{imbalance_factor:g}"
            raise UserError(f"expected an imbalance factor of 1 or more, got {factor}; change it")
        if len(self.ids) < 2:
            raise UserError(f"expected 2 or more classes, got {len(self.ids)}; take others")
        largest = min(self.counts) if largest is None else largest
        last = len(self.ids) - 1
        counts = [int(largest * (1 / imbalance_factor) ** (j / last)) for j in range(last + 1)]
        if counts[-1] < 1:
            raise UserError(
                f"expected an imbalance factor that leaves every class an image, got "
                f"{imbalance_factor:g} of {largest}; make it smaller"
            )
        self.ids = _drawn(self.ids, counts, seed)


class Slice(Selection):
    """The images ``[first:last]`` of every class, by Python's slicing.

    So images are held out: ``Slice(source, last=-1000)`` to train on, ``Slice(source, -1000)`` to
    validate on.

    Args:
        source: the source; of a path an image folder.
        first, last: as in Python, negative ones from the end.
        transform, target_transform: see `Selection`.

    Raises:
        UserError: a class is left without images.
    """

    def __init__(
        self,
        source: Source | str | Path,
        first: int | None = 0,
        last: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(source, transform, target_transform)
        for name, members in self.ids.items():
            self.ids[name] = members[first:last]
            if not self.ids[name]:
                raise UserError(
                    f"expected images [{first}:{last}] in class {name!r}, got none of its "
                    f"{len(members)}; take others"
                )


def _drawn(
    ids: dict[str, list[str]], counts: Sequence[int], seed: int, skip: int = 0
) -> dict[str, list[str]]:
    """Draw a number of images of each class, by permutations of one generator."""
    if seed < 0:
        raise UserError(f"expected a seed of 0 or more, got {seed}; change it")
    rng, drawn = np.random.default_rng(seed), {}
    for (name, members), count in zip(ids.items(), counts, strict=True):
        if len(members) < skip + count:
            raise UserError(
                f"expected {skip + count} or more images in class {name!r}, got {len(members)}; "
                "ask for fewer"
            )
        places = np.sort(rng.permutation(len(members))[skip : skip + count])
        drawn[name] = [members[place] for place in places]
    return drawn
