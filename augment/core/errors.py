"""Errors and warnings.

Every message has one form: what was expected, what came, what to do. The command line prints the
message alone and ends with exit code 2; a traceback means a fault of this package.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A wrong argument, file or folder; the message says what to do."""


class BankMismatch(UserError):
    """A bank that was inverted with another backbone or other settings than the run asks for."""


class ImageRejected(UserError):
    """An image file that cannot be read; the message names it."""


class Missing(UserError):
    """A file that is not there."""


class Damaged(UserError):
    """A file that is not what was written.

    One that cannot be read now (no permission, too many open files, a failing disk) is a plain
    `UserError`: its content is unknown, so nothing may be removed because of it.
    """


class NotAsExpected(UserError):
    """Something that was checked is not as it should be.

    Args:
        message: how much is wrong, and what to do.
        record: what was found, as JSON.
    """

    def __init__(self, message: str, record: Mapping[str, object]) -> None:
        super().__init__(message)
        self.record = record


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM."""


class AugmentWarning(UserWarning):
    """Something that a user should know; the command line prints it in one line."""


class BiasWarning(AugmentWarning):
    """A rule amplifies a bias of the bank's latents so much that images degenerate."""


class PrecisionWarning(AugmentWarning):
    """A part of the backbone overflowed in half precision and went on in float32."""


class EnlargedWarning(AugmentWarning):
    """Images are much smaller than the backbone's resolution."""


class UnknownImagesWarning(AugmentWarning):
    """Images are of a kind that the backbone was not trained on."""


def first_few(names: Sequence[str]) -> str:
    """Join at most five names for a sentence.

    >>> first_few(list("abcdefg"))
    'a, b, c, d, e and 2 others'
    """
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} others" if more > 0 else "")


def shown(name: str) -> str:
    r"""Quote a name so that it differs visibly from others that look alike.

    >>> shown("ant"), shown("e\u0301")
    ("'ant'", "'e\u0301' ('e\\u0301')")
    """
    return repr(name) if name.isascii() else f"{name!r} ({name!a})"


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """Return the entry ``name`` of a table.

    Raises:
        UserError: there is none; the message lists the names.
    """
    if name not in table:
        names = ", ".join(table)
        article = "an" if what[0] in "aeiou" else "a"
        raise UserError(
            f"expected {article} {what} out of {names}, got {name!r}; choose one of these"
        )
    return table[name]
