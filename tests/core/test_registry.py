"""Named strategies are built from a table, and wrong settings are answered with the right ones."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from augment.core.errors import UserError
from augment.core.registry import check_settings, make, parameters


@dataclass(frozen=True)
class Blur:
    radius: float = 1.0
    steps: int = 3
    edges: bool = False
    mask: Path | str | None = None
    names: list[str] | None = None


@dataclass(frozen=True)
class Plain:
    pass


TABLE = {"blur": Blur, "plain": Plain}


def test_settings_that_fit_are_taken_and_the_others_are_the_defaults():
    assert make(TABLE, "blur", {}, "effect") == Blur()
    settings = {"radius": 2, "edges": True, "mask": Path("a"), "names": ["b"]}
    assert make(TABLE, "blur", settings, "effect") == Blur(2, 3, True, Path("a"), ["b"])
    assert make(TABLE, "blur", {"mask": None, "radius": float("inf")}, "effect").mask is None


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("blurr", {}, "expected an effect out of blur, plain, got 'blurr'; choose one of these"),
        (
            "blur",
            {"size": 1},
            "expected settings of blur out of radius, steps, edges, mask, names, got 'size'; "
            "choose one of these",
        ),
        ("plain", {"size": 1}, "expected no settings, got 'size'; plain has none"),
        (
            "blur",
            {"radius": "1"},
            "expected radius of blur as float, got '1'; the default is 1.0",
        ),
        ("blur", {"radius": float("nan")}, "expected radius of blur as float, got nan; the"),
        ("blur", {"radius": True}, "expected radius of blur as float, got True; the"),
        ("blur", {"steps": 1.0}, "expected steps of blur as int, got 1.0; the default is 3"),
        ("blur", {"steps": True}, "expected steps of blur as int, got True"),
        ("blur", {"edges": 1}, "expected edges of blur as bool, got 1"),
        ("blur", {"mask": 1}, "expected mask of blur as Path or str or None, got 1"),
        ("blur", {"names": "b"}, "expected names of blur as list or None, got 'b'"),
    ],
)
def test_what_does_not_fit_is_answered_in_one_sentence(name, settings, sentence):
    with pytest.raises(UserError) as error:
        make(TABLE, name, settings, "effect")
    assert str(error.value).startswith(sentence)


def test_the_settings_of_two_factories_are_checked_together():
    def load(source: str, revision: str | None = None, **options: object) -> None: ...

    allowed = parameters(load, Blur)
    assert list(allowed) == ["source", "revision", "radius", "steps", "edges", "mask", "names"]
    check_settings("checkpoint", {"revision": "main", "radius": 1}, allowed)
    with pytest.raises(UserError, match=r"source of checkpoint as str, got 1$"):
        check_settings("checkpoint", {"source": 1}, allowed)
