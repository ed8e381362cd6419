"""Records on disk: no bit changes unseen, and no value or file is of another kind."""

import errno
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from augment import UserError
from augment.core.errors import Damaged, Missing
from augment.core.files import LARGEST_RECORD, read_json, write_json
from augment.core.schema import Record, build, load, read, sealed, write


@dataclass(frozen=True)
class Pet:
    name: str
    age: int
    weight: float = 1.0


@dataclass(frozen=True)
class Zoo(Record):
    WHAT: ClassVar = "a zoo"
    CURE: ClassVar = "catch the animals again"
    SCHEMA: ClassVar = 3
    OLDEST: ClassVar = 2

    pets: list[Pet]
    by_keeper: dict[str, list[Pet]] = field(default_factory=dict)
    prices: dict[str, Any] | None = None
    schema: int = 2

    def __post_init__(self) -> None:
        if not self.pets:
            raise ValueError("a zoo without pets")


ZOO = Zoo([Pet("Æ\udce9", 3, 2.5), Pet("b", 0)], {"k": [Pet("c", 1)]}, {"x": [1, None]}, 3)


def test_a_record_comes_back_as_it_was_written(tmp_path):
    for indent in (1, None):
        write(tmp_path / "zoo.json", ZOO, indent)
        assert read(Zoo, tmp_path / "zoo.json") == ZOO
        assert json.loads((tmp_path / "zoo.json").read_bytes())["pets"][1]["name"] == "b"


@pytest.mark.parametrize("indent", [1, None])
def test_every_bit_of_a_record_is_guarded(tmp_path, indent):
    path, content = tmp_path / "zoo.json", sealed(ZOO, indent)
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(Damaged):
            read(Zoo, path)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(Damaged):
            read(Zoo, path)


def test_a_record_of_an_older_version_has_no_digest(tmp_path):
    write_json(tmp_path / "zoo.json", {"pets": [{"name": "a", "age": 1}]})
    assert read(Zoo, tmp_path / "zoo.json") == Zoo([Pet("a", 1)])
    write_json(tmp_path / "zoo.json", {"pets": [{"name": "a", "age": 1}], "schema": 3})
    with pytest.raises(Damaged, match="no digest"):
        read(Zoo, tmp_path / "zoo.json")
    for schema in (1, 4):
        write(tmp_path / "zoo.json", {"pets": [], "schema": schema})
        with pytest.raises(UserError, match=f"schema 2 or 3 .*got schema {schema}"):
            read(Zoo, tmp_path / "zoo.json")


PET = {"name": "a", "age": 1}
WRONG: dict[str, Any] = {
    "pets that is not a list": {"pets": {}},
    "pets that is not an object": {"pets": [PET, 1]},
    "no pets;": {"schema": 3},
    "pets.age that is not an integer": {"pets": [PET, {**PET, "age": True}]},
    r"pets.age that is not an integer ≥ 0": {"pets": [{**PET, "age": -1}]},
    r"pets.age that is not an integer.*": {"pets": [{**PET, "age": 2**63}]},
    "pets.weight that is not a number": {"pets": [{**PET, "weight": 1e300}]},
    "no pets.age": {"pets": [PET, {"name": "b"}]},
    "an unknown key 'wings' in pets": {"pets": [{**PET, "wings": 2}]},
    "an unknown key 'lions'": {"pets": [PET], "lions": 1},
    "by_keeper.name that is not text": {"pets": [PET], "by_keeper": {"k": [{**PET, "name": 1}]}},
    "a zoo without pets": {"pets": []},
    "schema that is not an integer": {"pets": [PET], "schema": "3"},
}


@pytest.mark.parametrize("words", WRONG)
def test_a_value_of_another_form_is_named(words, tmp_path):
    write(tmp_path / "zoo.json", WRONG[words])
    with pytest.raises(Damaged, match=words.replace(".*", "") + ".*catch the animals"):
        read(Zoo, tmp_path / "zoo.json")


def test_values_are_built_by_their_annotations():
    assert build(list[list[int]], [[1], []]) == [[1], []]
    assert build(dict[str, Pet], {"a": {"name": "a", "age": 1}}) == {"a": Pet("a", 1)}
    assert build(str | None, None) is None
    for kind, value in ((bool, 1), (float, True), (list[str], ["a", None]), (dict[str, int], [])):
        with pytest.raises(ValueError, match="that is not"):
            build(kind, value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b'{"a": NaN}', b"\xff{}", b"[" * 10**5]
)
def test_what_is_no_json_object_is_damaged(content, tmp_path):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"r\.json"):
        load(tmp_path / "r.json", "a record", 2, "make it again")


def test_what_is_no_file_is_never_opened_and_what_is_too_large_never_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    for name in ("pipe", "folder", "zero", "sparse"):
        with pytest.raises(Damaged, match=name):
            read_json(tmp_path / name, "a record")
    assert LARGEST_RECORD < 2**30
    for path in (tmp_path / "none", tmp_path / "sparse" / "none"):
        with pytest.raises(Missing, match="none, got none"):
            read_json(path, "a record")


@pytest.mark.parametrize("name", ["EACCES", "EMFILE", "EIO", "ENOMEM"])
def test_what_cannot_be_read_now_is_not_damaged(name, tmp_path, monkeypatch):
    (tmp_path / "r.json").write_text("{}")

    def fail(*args: object) -> int:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(UserError, match=os.strerror(getattr(errno, name))) as caught:
        read_json(tmp_path / "r.json", "a record")
    assert not isinstance(caught.value, Damaged | Missing)


def test_a_record_that_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("augment.core.schema.LARGEST_RECORD", 100)
    with pytest.raises(UserError, match="at most 100 bytes"):
        write(tmp_path / "zoo.json", {"name": "a" * 50})
    assert list(Path(tmp_path).iterdir()) == []
