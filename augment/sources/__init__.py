"""Sources: where labelled images come from.

A `Source` is a torch Dataset whose images have ids and bytes. To add one: a file with a subclass,
and an entry in `SOURCES`.
"""

from augment.sources.folder import Folder
from augment.sources.items import Items, as_source, place_of
from augment.sources.listing import ImageNetLT, INaturalist18, ListFile, PlacesLT
from augment.sources.source import Source
from augment.sources.subsets import FewShot, LongTail, Slice

SOURCES: dict[str, type[Source]] = {
    "Folder": Folder,
    "ListFile": ListFile,
    "ImageNetLT": ImageNetLT,
    "PlacesLT": PlacesLT,
    "INaturalist18": INaturalist18,
    "Items": Items,
    "FewShot": FewShot,
    "LongTail": LongTail,
    "Slice": Slice,
}
"""Sources by name."""

__all__ = [
    "SOURCES",
    "FewShot",
    "Folder",
    "INaturalist18",
    "ImageNetLT",
    "Items",
    "ListFile",
    "LongTail",
    "PlacesLT",
    "Slice",
    "Source",
    "as_source",
    "place_of",
]
