"""The few errors a caller may want to tell apart.

Every message has one form: what was expected, what came, what to do. The command line prints the
message alone and ends with exit code 2; a traceback means a fault of ours.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A wrong argument, file or folder; the message says how to mend it."""


class BankMismatch(UserError):
    """A bank that was inverted with another backbone or other settings than the run asks for."""


class ImageRejected(UserError):
    """An image file that cannot be read; the message names it."""


class Missing(UserError):
    """A file that is not there."""


class Damaged(UserError):
    """A file that was read, or need not be, and is not what was written.

    A file that cannot be read now (no permission, too many open files, a disk that fails) is a
    plain `UserError`: nothing is known of what is in it, so nothing may be removed because of it.
    """


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by SIGTERM."""


class AugmentWarning(UserWarning):
    """Something that a user should know; the command line prints it in one line."""


class BiasWarning(AugmentWarning):
    """A rule makes a bias of the bank's latents so large that images will degenerate."""


class PrecisionWarning(AugmentWarning):
    """Half precision was too narrow for a part of the backbone, which went on in float32."""


class EnlargedWarning(AugmentWarning):
    """Images are much smaller than the backbone's and have to be enlarged."""


def first_few(names: Sequence[str]) -> str:
    """Return names for a sentence, five at most.

    >>> first_few(list("abcdefg"))
    'a, b, c, d, e and 2 others'
    """
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} others" if more > 0 else "")


def shown(name: str) -> str:
    r"""Quote a name so that it can be told from others that look alike.

    >>> shown("ant"), shown("e\u0301")
    ("'ant'", "'e\u0301' ('e\\u0301')")
    """
    return repr(name) if name.isascii() else f"{name!r} ({name!a})"


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """The entry ``name`` of an extension table, or a `UserError` that lists the right names."""
    if name not in table:
        known = ", ".join(table)
        raise UserError(f"expected a {what} out of {known}, got {name!r}; choose one of these")
    return table[name]
