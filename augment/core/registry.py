"""Build a named strategy from a table, with its settings checked."""

import re
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from augment.core.errors import UserError, lookup

T = TypeVar("T")


def make(
    table: Mapping[str, Callable[..., T]], name: str, settings: Mapping[str, Any], what: str
) -> T:
    """Build an entry of an extension table with some settings; the others have their defaults.

    Args:
        table: strategies by name: dataclasses whose fields are their settings, or functions.
        name: a key of the table.
        settings: values by the names of fields.
        what: what the entries are, for errors.

    Raises:
        UserError: an unknown name or setting, a value of another type, or NaN.

    >>> from augment.core.errors import UserError
    >>> make({"error": UserError}, "eror", {}, "class")
    Traceback (most recent call last):
    augment.core.errors.UserError: expected a class out of error, got 'eror'; choose one of these
    """
    factory = lookup(table, name, what)
    check_settings(name, settings, parameters(factory))
    return factory(**settings)


def parameters(*factories: Callable[..., Any]) -> dict[str, Parameter]:
    """Return the parameters that can be given by name, by name; later factories go first."""
    given = [p for factory in factories for p in signature(factory).parameters.values()]
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter for parameter in given if parameter.kind in by_name}


def check_settings(
    name: str, settings: Mapping[str, Any], allowed: Mapping[str, Parameter]
) -> None:
    """Refuse settings that a strategy does not have.

    Args:
        name: of the strategy, for errors.
        settings: values by name.
        allowed: see `parameters`.
    """
    for key, value in settings.items():
        if key not in allowed:
            which = f"settings of {name} out of {', '.join(allowed)}" if allowed else "no settings"
            cure = "choose one of these" if allowed else f"{name} has none"
            raise UserError(f"expected {which}, got {key!r}; {cure}")
        annotation = allowed[key].annotation
        kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
        not_a_number = isinstance(value, float) and value != value
        if not_a_number or not any(_is_a(value, kind) for kind in kinds):
            names = ("None" if k is NoneType else getattr(k, "__name__", str(k)) for k in kinds)
            words, default = " or ".join(names), allowed[key].default
            cure = "" if default is Parameter.empty else f"; the default is {default!r}"
            raise UserError(f"expected {key} of {name} as {words}, got {value!r}{cure}")


def refuse_reserved(settings: Mapping[str, Any], *reserved: str) -> None:
    """Refuse settings among others that a command takes as options of their own."""
    for name in reserved:
        if name in settings:
            raise UserError(
                f"expected {name} as an option of its own, got it among others; see --help"
            )


def _is_a(value: object, kind: object) -> bool:
    """Tell whether a value is of an annotated type; true and false are no numbers."""
    if kind in (Any, Parameter.empty):
        return True
    if kind in (int, float):
        return type(value) is int or type(value) is kind
    kind = get_origin(kind) or kind
    return not isinstance(kind, type) or isinstance(value, kind)


class Dashed:
    """Base of a parser whose help spells options with dashes; both spellings are parsed."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help."""
        text: str = super().format_help(*args, **kwargs)  # type: ignore[misc]
        return re.sub(r"(?<![\w-])--\w[\w.-]*", lambda option: option[0].replace("_", "-"), text)
