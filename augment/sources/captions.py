"""Words of single images: captions at inversion, and contexts that are drawn in sampling.

Captions come from a ``metadata.jsonl`` as Hugging Face's image folders have it, or from a text file
beside each image. Contexts are what surrounds an object (``on a beach, at dusk``): lines of a text
file, or a column of a ``metadata.jsonl``. Drawn for images of any class, they take away what a
class and its surroundings have in common by chance (BOB, arXiv 2510.24078).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from augment.core.errors import UserError, shown
from augment.sources.source import Source

BESIDE = "txt"
"""In place of a file of captions: each image has one of its name beside it, ``image.txt``."""

CONTEXT = "{context}"
"""In a prompt, where its context goes."""


def read_captions(path: str | Path, source: Source) -> dict[str, str]:
    """Read captions by image id from a ``metadata.jsonl``; images without one are left out.

    A line is an image: ``{"file_name": "class/0.png", "text": "…"}``.

    Raises:
        UserError: a line is something else, or no image of the source is among them.
    """
    ids = {image_id for image_id, _ in source.samples}
    texts = {record["file_name"]: record["text"] for record in _records(path, "file_name", "text")}
    if not ids & texts.keys():
        raise UserError(
            f"expected captions in {path} for images such as {min(ids)}, got none for any of "
            "them; name files as below the folder of images"
        )
    return {name: text for name, text in texts.items() if name in ids}


def captions_of(source: Source, where: str) -> dict[str, str]:
    """Return the caption of every image by its id.

    Args:
        source: the images.
        where: a ``metadata.jsonl``, see `read_captions`; or ``txt``, for a file beside each image.

    Raises:
        UserError: see `read_captions`; or an image has no caption, or an empty one.
    """
    if where == BESIDE:
        files = {i: (source.root / i).with_suffix(".txt") for i, _ in source.samples}
        there = ((image_id, file) for image_id, file in files.items() if file.is_file())
        captions = {image_id: " ".join(_lines(file, "a caption")) for image_id, file in there}
    else:
        captions = read_captions(where, source)
    captions = {image_id: text.strip() for image_id, text in captions.items()}
    check_captions(source, captions)
    return captions


def check_captions(source: Source, captions: Mapping[str, str]) -> None:
    """Refuse captions of some of the images only."""
    missing = [image_id for image_id, _ in source.samples if not captions.get(image_id)]
    if missing:
        raise UserError(
            f"expected a caption of each of {len(source)} images, got none of {len(missing)}, such "
            f"as {shown(missing[0])}; add them, or leave captions out"
        )


def read_contexts(where: str) -> tuple[str, ...]:
    """Read contexts, in the order of the file; empty lines are left out.

    Args:
        where: a text file with a context a line; or a ``metadata.jsonl``, whose column ``text`` is
            read, or another one: ``metadata.jsonl:background``.

    Raises:
        UserError: no such file, no UTF-8, a line of another form, or no context at all.
    """
    path, column = where, "text"
    if not Path(where).exists() and ".jsonl:" in where:
        path, column = where.rsplit(":", 1)
    if path.endswith(".jsonl"):
        lines: Iterator[str] = (record[column] for record in _records(path, column))
    else:
        lines = _lines(path, "contexts")
    contexts = tuple(" ".join(line.split()) for line in lines if line.strip())
    if not contexts:
        raise UserError(f"expected a context a line in {path}, got an empty file; write some")
    return contexts


def with_context(prompt: str, context: str) -> str:
    """Return a prompt with its context, behind a comma if it does not say where.

    >>> with_context("a photo of an owl", "on snow")
    'a photo of an owl, on snow'
    >>> with_context("{context}: a photo of an owl", "on snow")
    'on snow: a photo of an owl'
    """
    if CONTEXT in prompt:
        return prompt.replace(CONTEXT, context).strip(" ,")
    return ", ".join(filter(None, (prompt, context)))


def _lines(path: str | Path, what: str) -> Iterator[str]:
    """Yield the lines of a text file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        got = getattr(error, "strerror", None) or "bytes that are no UTF-8 text"
        raise UserError(f"expected {what} at {path}, got {got}; correct the file") from None
    yield from text.splitlines()


def _records(path: str | Path, *columns: str) -> Iterator[dict[str, str]]:
    """Yield the lines of a ``metadata.jsonl``, which have texts in some columns."""
    for number, line in enumerate(_lines(path, "captions"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            texts = {c: record[c] for c in columns if isinstance(record[c], str)}
        except (ValueError, KeyError, TypeError, RecursionError):
            texts = {}
        if len(texts) < len(columns):
            form = ", ".join(f'"{column}": …' for column in columns)
            raise UserError(
                f"expected {{{form}}} in every line of {path}, got {line[:60]!r} in line {number}; "
                "correct it"
            )
        yield texts
