"""Sources: where labelled images come from.

A source has ``ids`` (class → image ids), ``read(id)`` (its bytes) and ``load(id, channels,
resolution)`` (the prepared image). To add one: a file with such a class, and an entry in `SOURCES`.
"""

from augment.sources.folder import Folder

SOURCES = {"folder": Folder}
"""Sources by name; each takes the place it reads from."""

__all__ = ["SOURCES", "Folder"]
