"""Records on disk: a frozen dataclass is a JSON object in a file that ends with its own digest.

The last line of a record is ``"digest"``, the SHA-256 in hexadecimal of all bytes before the comma
in front of it. So no bit of a record changes unseen. Records of older versions have none.

`read` compares the digest and checks every value by the annotations of the dataclass: an ``int`` is
no bool, not negative and below 2^63, a ``float`` is an integer or a finite number, a key is known,
and one without a default is there. What fields have to do with each other a class checks itself, in
``__post_init__``, which raises `ValueError` with a few words of what it found.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from augment.core.errors import UserError
from augment.core.files import (
    LARGEST_RECORD,
    JsonObject,
    damaged,
    parse_json,
    read_file,
    sha256,
    write_bytes,
)

T = TypeVar("T", bound="Record")

TAIL = re.compile(rb',\n "digest": "([0-9a-f]{64})"\n\}\n\Z')
TAIL_BYTES = len(',\n "digest": ""\n}\n') + 64


class Record:
    """Base of a record's dataclass, which has a field ``schema``.

    Attributes:
        WHAT: what the record is, for errors.
        CURE: what to do if it is damaged.
        SCHEMA: the schema that is written.
        OLDEST: the oldest schema that is read; a record without a schema is of that.
    """

    WHAT: ClassVar[str]
    CURE: ClassVar[str]
    SCHEMA: ClassVar[int]
    OLDEST: ClassVar[int]


def sealed(record: Any, indent: int | None = 1) -> bytes:
    """Return the bytes of a record, a dataclass or a dictionary, with its digest at the end.

    Args:
        record: what is written.
        indent: of JSON; None is one line, but for the digest.
    """
    separators = None if indent else (",", ":")
    options: Any = {"indent": indent, "separators": separators, "default": as_object}
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, **options)
    body = text[:-1].rstrip().encode("utf-8", "surrogatepass")  # file names may not be UTF-8
    return body + f',\n "digest": "{sha256(body)}"\n}}\n'.encode()


def as_object(value: Any) -> JsonObject:
    """Return the fields of a dataclass; those that are None are left out."""
    named = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: inner for name, inner in named.items() if inner is not None}


def write(path: Path, record: Any, indent: int | None = 1) -> None:
    """Write a record, a dataclass or a dictionary, with its digest, whole or not at all."""
    content = sealed(record, indent)
    if len(content) > LARGEST_RECORD:
        raise UserError(
            f"expected at most {LARGEST_RECORD:,} bytes for {path}, got {len(content):,}; make "
            "several folders of fewer images"
        )
    write_bytes(path, content)


def load(path: Path, what: str, since: int, cure: str) -> JsonObject:
    """Read a record as a dictionary, without its digest, which is compared.

    Args:
        path: the file.
        what: what it is to be, for errors.
        since: the schema from which on a record has a digest.
        cure: what to do if it is damaged.
    """
    content = read_file(path, what, cure)
    record = parse_json(content, path, what, cure)
    if not isinstance(record, dict):
        raise damaged(path, what, "no JSON object", cure)
    tail, number = TAIL.search(content, max(0, len(content) - TAIL_BYTES)), record.get("schema", 0)
    if tail is None:
        if "digest" in record or not isinstance(number, int) or number >= since:
            raise damaged(path, what, "no digest at its end", cure)
    elif sha256(content[: tail.start()]) != record.pop("digest"):
        raise damaged(path, what, "other bytes than were written", cure)
    return record


def read(kind: type[T], path: Path) -> T:
    """Read a record of a type."""
    record = load(path, kind.WHAT, kind.SCHEMA, kind.CURE)
    number = record.get("schema", kind.OLDEST)
    if type(number) is int and not kind.OLDEST <= number <= kind.SCHEMA:
        schemas = " or ".join(map(str, range(kind.OLDEST, kind.SCHEMA + 1)))
        raise UserError(
            f"expected {kind.WHAT} of schema {schemas} at {path.parent}, got schema {number} of "
            "another version of latent-augment; use that version, or make a new folder"
        )
    try:
        return build(kind, record)
    except ValueError as flaw:
        raise damaged(path, kind.WHAT, str(flaw), kind.CURE) from None


def build(kind: Any, value: Any) -> Any:
    """Build the value of an annotation from JSON.

    Raises:
        ValueError: it is of another form.

    >>> build(list[int], [1, 2]), build(dict[str, float], {"a": 0.5})
    ([1, 2], {'a': 0.5})
    """
    return _converted(_form_of(kind), [value], "")[0]


class _Form(NamedTuple):
    """What an annotation asks for, looked at once.

    Args:
        tag: list, tuple, dict, `UnionType` of a type and None, `Record` for a dataclass, or a plain
            type.
        kind: the dataclass.
        inner: the form of what is in a list or dictionary, or may be None.
    """

    tag: Any
    kind: Any = None
    inner: Any = None


@cache
def _form_of(kind: Any) -> _Form:
    """Return the form of an annotation."""
    if is_dataclass(kind):
        return _Form(Record, kind)
    inner = [part for part in get_args(kind) if part not in (NoneType, ...)]
    return _Form(get_origin(kind), None, _form_of(inner[-1])) if inner else _Form(kind)


def _converted(form: _Form, values: list[Any], name: str) -> list[Any]:
    """Build values of a form, all at once: a record of many images is quickly read."""
    tag = form.tag
    if tag is Any or not values:
        return values
    if tag in PLAIN:
        allowed, words, good = PLAIN[tag]
        _require(set(map(type, values)) <= allowed and good(values), name, words)
        return values
    if tag is UnionType:
        given = iter(_converted(form.inner, [v for v in values if v is not None], name))
        return [None if value is None else next(given) for value in values]
    if tag in (list, tuple):  # tuples are of any length
        _require(set(map(type, values)) <= {list}, name, "a list")
        inner = values[0] if len(values) == 1 else list(chain.from_iterable(values))
        given = _converted(form.inner, inner, name)
        parts = values if given is inner else _split(given, map(len, values))
        return parts if tag is list else list(map(tuple, parts))
    _require(set(map(type, values)) <= {dict}, name, "an object")
    if tag is Record:
        return _objects(form.kind, values, name)
    inner = [item for value in values for item in value.values()]
    given = _converted(form.inner, inner, name)
    if given is inner:
        return values
    left = iter(given)
    return [{key: next(left) for key in value} for value in values]


PLAIN: dict[Any, tuple[set[type], str, Callable[[list[Any]], bool]]] = {
    str: ({str}, "text", lambda values: True),
    bool: ({bool}, "true or false", lambda values: True),
    int: ({int}, "an integer ≥ 0", lambda values: min(values) >= 0 and max(values) < 2**63),
    float: ({int, float}, "a number", lambda values: max(map(abs, values)) < 1e30),
}
"""Of a plain type the types of its values, its name, and a check of several values."""


def _split(items: list[Any], lengths: Iterable[int]) -> list[list[Any]]:
    """Cut a list into parts of some lengths."""
    given = iter(items)
    return [list(islice(given, length)) for length in lengths]


def _require(good: bool, name: str, words: str) -> None:
    """Raise `ValueError` with the name of a key whose value is of another form."""
    if not good:
        raise ValueError(f"{name or 'a value'} that is not {words}")


def _objects(kind: Any, values: list[JsonObject], name: str) -> list[Any]:
    """Build dataclasses of JSON objects."""
    columns, count = [], 0
    for field, form, make in _known_fields(kind):
        place = f"{name}.{field}" if name else field
        try:
            here = list(map(itemgetter(field), values))
        except KeyError:
            here = [value[field] for value in values if field in value]
        count += len(here)
        column = _converted(form, here, place)
        if len(here) < len(values):
            if make is None:
                raise ValueError(f"no {place}")
            given = iter(column)
            column = [next(given) if field in value else make() for value in values]
        columns.append(column)
    if count < sum(map(len, values)):
        strange = {key for value in values for key in value} - {f for f, *_ in _known_fields(kind)}
        raise ValueError(f"an unknown key {min(strange)[:60]!r}" + (f" in {name}" if name else ""))
    names = [field for field, *_ in _known_fields(kind)]
    if any(field.kw_only for field in fields(kind)):
        return [kind(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]
    return list(map(kind, *columns))


@cache
def _known_fields(kind: Any) -> list[tuple[str, _Form, Callable[[], Any] | None]]:
    """Return name, form and maker of the default, if there is one, of each field."""
    hints = get_type_hints(kind)
    return [(field.name, _form_of(hints[field.name]), _maker(field)) for field in fields(kind)]


def _maker(field: Field[Any]) -> Callable[[], Any] | None:
    """Return what makes the default of a field; None if it has none."""
    if field.default is not MISSING:
        return lambda: field.default
    return None if field.default_factory is MISSING else field.default_factory
