"""Prompts from the names of class folders.

Data sets name their folders by WordNet id (``n01440764``) or with numbers
(``001.Black_footed_Albatross``), and networks take words. The names of the 1000 classes of
ImageNet-1k are in ``sources/imagenet.txt``.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from string import Formatter

from augment.core.errors import UserError, shown

_NAMES = Path(__file__).parent / "imagenet.txt"
_FIELDS = ("name", "article", "folder")  # of a template

_WORDNET_ID = re.compile(r"n\d{8}")
_NUMBERING = re.compile(r"^(\d+\.|0\d*[\s_-]|n\d{8}[\s_-])[\s_-]*(?=\D)")
"""``001.`` of CUB, ``007_``, ``n02085620-`` of Stanford Dogs; not the number of ``3-wheeler``."""

_ARTICLE = re.compile(r"\b([Aa])n? (?=\{name\})")
_VOWEL = re.compile(
    r"(?!eu|ew|one\b|uni(?!n|m)|use|u[bcfhjkqrst][aeiou])[aeiou]|hour|heir|honest", re.IGNORECASE
)
"""Names that begin with the sound of a vowel: an hourglass, but a unicycle."""

_SPELT = re.compile(r"[AEFHILMNORSX](?=[A-Z0-9]{0,3}\b)")
"""Names that begin with a letter's name, and that with a vowel: an X-ray, an SUV."""


def nfc(name: str) -> str:
    """Return a name in Unicode's form NFC, in which names that look alike by accents are equal."""
    return unicodedata.normalize("NFC", name)


def by_class(texts: Mapping[str, str], classes: Iterable[str]) -> dict[str, str]:
    """Return texts by class name; their keys may be in another Unicode form than the names."""
    names = {nfc(name): name for name in classes}
    return {names.get(nfc(key), key): text for key, text in texts.items()}


@cache
def imagenet_names() -> dict[str, str]:
    """Read the names of the classes of ImageNet-1k by WordNet id, in label order."""
    lines = _NAMES.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines if not line.startswith("#"))


def class_name(folder: str) -> str:
    """Return the everyday name of a folder's class.

    >>> class_name("n01440764"), class_name("001.Black_footed_Albatross")
    ('tench', 'Black footed Albatross')

    Args:
        folder: a WordNet id of ImageNet-1k; or words, with underscores, hyphens and leading
            numbering to remove.

    Raises:
        UserError: a WordNet id that is not in ImageNet-1k.
    """
    if _WORDNET_ID.fullmatch(folder):
        if folder not in imagenet_names():
            raise UserError(
                f"expected a WordNet id of ImageNet-1k, got {folder}, which has no name here; "
                "give it one"
            )
        return imagenet_names()[folder]
    words = re.split(r"[\s_-]+", _NUMBERING.sub("", folder))
    return " ".join(words).strip() or folder


def class_prompts(
    classes: Sequence[str],
    template: str,
    names: dict[str, str] | None = None,
    keep: Collection[str] = (),
) -> dict[str, str]:
    """Return a prompt for each class, such as `augment.fill_bank` takes.

    >>> class_prompts(["n01440764", "great_owl"], "a photo of a {name}", {"great_owl": "owl"})
    {'n01440764': 'a photo of a tench', 'great_owl': 'a photo of an owl'}

    Args:
        classes: folder names.
        template: a prompt with ``{name}`` and perhaps ``{folder}``; other braces are doubled. An
            article right before ``{name}`` becomes a or an by the sound of the name, and so does
            ``{article}`` anywhere.
        names: names of single classes, by folder, in place of `class_name`'s.
        keep: further fields, which stay as they are, such as ``context``.

    Raises:
        UserError: a template without ``{name}`` or with another field, a name of a class that is
            not there, or a class of unknown name.
    """
    names = by_class(names or {}, classes)
    _check_template(template, keep)
    unknown = names.keys() - set(classes)
    if unknown:
        raise UserError(
            f"expected names for classes out of {', '.join(classes)}, got one for "
            f"{shown(min(unknown))}; choose one of these"
        )
    called = {c: names[c] if c in names else class_name(nfc(c)) for c in classes}
    return {folder: _fill(template, folder, name, keep) for folder, name in called.items()}


def prompts_of(
    classes: Sequence[str], template: str = "", prompts: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the prompt of each class that has one: its own, else the template's.

    >>> prompts_of(["owl", "cat"], "a {name}", {"cat": "a tabby"})
    {'cat': 'a tabby', 'owl': 'an owl'}

    Args:
        classes: folder names.
        template: see `class_prompts`; empty for none.
        prompts: prompts of single classes, by folder.

    Raises:
        UserError: see `class_prompts`.
    """
    own = by_class(prompts or {}, classes)
    rest = [name for name in classes if name not in own]
    return own | (class_prompts(rest, template) if template else {})


def _check_template(template: str, keep: Collection[str]) -> None:
    """Refuse a template without a name, with other fields, or with braces that do not match."""
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise UserError(
            f"expected a template such as 'a photo of a {{name}}', got {template!r} ({error}); "
            "double the braces that are the prompt's own"
        ) from None
    for field, form, conversion in parts:
        if field not in (*_FIELDS, *keep) or form or conversion:
            raise UserError(
                f"expected no field but {{name}}, {{article}} and {{folder}} in a template, got "
                f"one of {field!r} in {template!r}; double the braces if they are the prompt's own"
            )
    if "name" not in {field for field, _, _ in parts}:
        raise UserError(
            f"expected {{name}} in a template, got {template!r}; write one such as "
            "'a photo of a {name}'"
        )


def _fill(template: str, folder: str, name: str, keep: Iterable[str]) -> str:
    """Fill a name into a template, with the article that fits it."""
    spelt = re.match(r"[A-Z][A-Z0-9]{0,3}\b", name)
    vowel = (_SPELT if spelt else _VOWEL).match(name)
    spelled = _ARTICLE.sub(r"\1n " if vowel else r"\1 ", template)
    left = {field: f"{{{field}}}" for field in keep}
    return spelled.format(name=name, folder=folder, article="an" if vowel else "a", **left)
