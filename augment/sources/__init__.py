"""Sources: where labelled images come from.

A `Source` is a torch Dataset whose images have ids and bytes. To add one, write a subclass in a
file here and export it.
"""

from augment.sources.folder import Folder
from augment.sources.items import Items, as_source, place_of
from augment.sources.listing import ImageNetLT, INaturalist18, ListFile, PlacesLT
from augment.sources.source import Source
from augment.sources.subsets import FewShot, LongTail, Slice

__all__ = [
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
