"""Filters: which synthetic images to keep.

A filter gives each image a score, the higher the better, and those of its ``minimum`` and above are
kept. Each filter says what its scores mean; those that depend on the data are on the scale of the
real images, so that the defaults hold for any bank.

To add one: a file with a frozen dataclass that has the members of `Filter`, and an entry in
`FILTERS`. Its fields are its settings; a network is loaded in ``prepare``, with the helpers of
`augment.networks`, and the real images are measured with those of
`augment.synthesis.filters.reference`. An image's score may depend on its pixels, its label and the
bank, not on the images beside it.
"""

from typing import Any, Protocol, runtime_checkable

from augment.core.registry import make
from augment.synthesis.filters.classifier import Classifier
from augment.synthesis.filters.clip import Clip
from augment.synthesis.filters.degenerate import Degenerate
from augment.synthesis.filters.duplicate import Duplicate
from augment.synthesis.filters.prototype import Prototype
from augment.synthesis.filters.reference import Reference, Scores

__all__ = ["FILTERS", "Filter", "Reference", "Scores", "make_filter"]


@runtime_checkable
class Filter(Protocol):
    """A filter with its settings, which are its fields."""

    @property
    def minimum(self) -> float | None:
        """The least score to keep; None only scores."""
        ...

    def prepare(self, reference: Reference) -> Scores:
        """Load what is needed, once.

        Args:
            reference: the bank's classes, prompts and real images.

        Returns:
            The function (images, labels) → scores; see `Scores`.

        Raises:
            UserError: settings that do not fit the bank, or something missing.
        """
        ...


FILTERS: dict[str, type[Filter]] = {
    "classifier": Classifier,
    "prototype": Prototype,
    "clip": Clip,
    "duplicate": Duplicate,
    "degenerate": Degenerate,
}
"""Filters by name."""


def make_filter(name: str, **settings: Any) -> Filter:
    """Build a filter by name.

    Raises:
        UserError: an unknown name or setting, or one of another type or out of its range.

    >>> make_filter("degenerate", minimum=None)
    Degenerate(quantile=0.01, minimum=None)
    """
    return make(FILTERS, name, settings, "filter")
