"""Shards written and read: the same bytes, the same images, and records that are checked."""

import hashlib
import json
import pickle
import shutil
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import snapshot
from hypothesis import given
from hypothesis import strategies as st
from shard_folders import CLASSES, fill, picture, plan, put, quickly, rewrite, sample, sane
from torch.utils.data import DataLoader

import augment.shards.dataset
import augment.shards.export
from augment import UserError
from augment.core.schema import as_object
from augment.shards.dataset import Shards, encode, open_shards, verify_shard, write_shard
from augment.shards.format import (
    ShardManifest,
    read_settings,
    read_table,
    shard_path,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 3 and 2 PNG images, not to be damaged."""
    return fill(tmp_path_factory.mktemp("shards") / "folder")


# --- writing


@pytest.mark.parametrize("extension", ["jpg", "webp", "png"])
def test_the_same_samples_make_the_same_bytes(extension, tmp_path):
    for place in "ab":
        fill(tmp_path / place, extension=extension)
        time.sleep(0.01)
    one, other = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert one == other
    assert len(one) == 5


def test_a_tar_is_plain_ustar_of_nobody_and_no_time(shards):
    with tarfile.open(shard_path(shards, 0)) as tar:
        members = tar.getmembers()
    names = [f"{key:08d}.{suffix}" for key in range(3) for suffix in ("png", "cls", "json")]
    assert [member.name for member in members] == names
    for m in members:
        assert (m.type, m.mode, m.mtime, m.uid, m.gid, m.uname, m.gname, m.pax_headers) == (
            tarfile.REGTYPE, 0o644, 0, 0, 0, "", "", {}
        )  # fmt: skip
    content = shard_path(shards, 0).read_bytes()
    assert content[257:265] == b"ustar\x0000"
    assert content.endswith(bytes(1024))


def test_a_record_says_where_each_image_lies_and_what_the_tar_is(shards):
    for number, keys in enumerate([[0, 1, 2], [3, 4]]):
        path = shard_path(shards, number)
        content, (record, _) = path.read_bytes(), read_table(path, len(CLASSES))
        facts = json.loads(path.with_suffix(".json").read_bytes())
        assert as_object(record) == {key: facts[key] for key in facts if key != "digest"}
        assert (record.bytes, record.dropped) == (len(content), {"dark": {"ant": 2}})
        assert record.sha256 == hashlib.sha256(content).hexdigest()
        assert [row[:2] for row in record.samples] == [[key, key % 2] for key in keys]
        for place, (key, label, offset, size) in enumerate(record.samples):
            assert content[offset : offset + size] == sample(key).image
            text = json.dumps(sample(key).about).encode()
            digests = f"{zlib.crc32(sample(key).image, label):08x}{zlib.crc32(text, key):08x}"
            assert record.crc32[16 * place : 16 * place + 16] == digests


def interrupted(error: BaseException):
    yield sample(0)
    yield sample(1)
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no more")])
def test_if_the_samples_raise_nothing_is_left_and_what_was_there_stays(error, tmp_path):
    path = shard_path(tmp_path / "new", 0)
    with pytest.raises(type(error)):
        write_shard(path, interrupted(error), "png")
    assert snapshot(tmp_path / "new") == {}
    before = snapshot(fill(tmp_path / "old"))
    with pytest.raises(type(error)):
        write_shard(shard_path(tmp_path / "old", 0), interrupted(error), "png")
    assert snapshot(tmp_path / "old") == before


@pytest.mark.parametrize("number", [0, 2])
def test_a_shard_that_was_killed_before_its_record_does_not_count(number, tmp_path, monkeypatch):
    """Neither a new one, nor one in place of another, whose record would be of other bytes."""
    folder = fill(tmp_path / "s", (2, 2, 2))
    shard_path(folder, 2).unlink()
    shard_path(folder, 2).with_suffix(".json").unlink()
    monkeypatch.setattr(augment.shards.dataset, "write", None)
    with pytest.raises(TypeError):
        write_shard(shard_path(folder, number), [sample(9)], "png")
    assert shard_path(folder, number).exists()
    assert not shard_path(folder, number).with_suffix(".json").exists()


def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="jpg, webp, png"):
        write_shard(tmp_path / "a.tar", [], "gif")
    with pytest.raises(UserError, match="jpg, webp, png"):
        encode(picture(0), "gif")
    for quality in (0, 101):
        with pytest.raises(UserError, match="from 1 to 100"):
            encode(picture(0), quality=quality)
    with pytest.raises(AssertionError, match="increase"):
        write_shard(tmp_path / "a.tar", [sample(1), sample(1)], "png")
    monkeypatch.setattr(augment.shards.dataset, "MAX_BYTES", 10)
    with pytest.raises(UserError, match="lower resolution"):
        write_shard(tmp_path / "a.tar", [sample(1)], "png")
    assert snapshot(tmp_path) == {}


# --- reading


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("extension", "away"), [("png", 0), ("jpg", 0.01), ("webp", 0.03)])
def test_images_come_back(extension, away, channels, tmp_path):
    opened = open_shards(fill(tmp_path / "s", (2, 1), extension, channels, size=32))
    for key, (image, label) in enumerate(opened):
        expected = picture(key, channels, 32)
        if extension == "webp":
            expected = expected.expand(3, -1, -1)
        assert image.dtype == torch.float32
        torch.testing.assert_close(image, expected, rtol=0, atol=away)
        assert label == key % 2


def test_colours_of_neighbours_do_not_mix_in_jpeg(tmp_path):
    stripes = torch.zeros(3, 16, 16)
    stripes[0, :, ::2], stripes[2, :, 1::2] = 1, 1
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(stripes))
    colours = augment.shards.dataset.decode(path.read_bytes(), "jpg")
    assert (colours - stripes).abs().max() < 0.1


def test_shards_are_a_dataset_like_those_of_torchvision(shards):
    opened = open_shards(shards)
    assert len(opened) == 5
    assert opened.classes == CLASSES
    assert opened.class_to_idx == {"ant": 0, "bee": 1}
    assert opened.targets == [0, 1, 0, 1, 0] == [label for _, label in opened]
    for index in (-5, -1, 3):
        image, label = opened[index]
        assert torch.equal(image, picture(index % 5))
        assert label == index % 5 % 2
        assert opened.read(index) == sample(index % 5).image
        assert opened.about(index) == json.loads(json.dumps(sample(index % 5).about))
        assert opened.plan(index) == plan(index % 5)
    for index in (5, -6):
        for ask in (opened.__getitem__, opened.read, opened.about, opened.plan):
            with pytest.raises(IndexError):
                ask(index)


def test_transforms_are_applied(shards):
    opened = open_shards(shards, torch.mean, str)
    assert opened[1] == (picture(1).mean(), "1")


def test_no_number_of_workers_changes_the_order(shards):
    for workers in (0, 2):
        batches = list(DataLoader(open_shards(shards), batch_size=2, num_workers=workers))
        images = torch.cat([x for x, _ in batches])
        assert torch.equal(images, torch.stack([picture(key) for key in range(5)]))
        assert torch.cat([y for _, y in batches]).tolist() == [0, 1, 0, 1, 0]


def test_shards_that_have_been_read_can_be_pickled(shards):
    opened = open_shards(shards)
    first = opened[0][0]
    again = pickle.loads(pickle.dumps(opened))
    assert isinstance(again, Shards)
    assert torch.equal(again[0][0], first)
    assert again.targets == opened.targets


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_few_files_are_open_and_threads_do_not_mix_them_up(tmp_path, monkeypatch):
    monkeypatch.setattr(augment.shards.dataset, "OPEN_FILES", 2)
    opened = open_shards(fill(tmp_path / "s", (1,) * 8))
    before = open_files()
    with ThreadPoolExecutor(8) as pool:
        indices = [*range(8)] * 50
        contents = list(pool.map(opened.read, indices))
    expected = [sample(key).image for key in range(8)]
    assert contents == [expected[key] for key in indices]
    assert open_files() == before + 2
    del opened
    assert open_files() == before


def test_a_folder_that_is_not_complete_is_refused_unless_asked_for(tmp_path):
    folder = fill(tmp_path / "s", (3, 2, 1))
    shard_path(folder, 1).with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"1 are missing.*same latent-augment synthesize command"):
        open_shards(folder)
    assert open_shards(folder, complete=False).targets == [0, 1, 0, 1]
    assert open_shards(folder, complete=False).about(3)["plan"]["index"] == 5


def test_what_is_no_shard_of_the_folder_is_passed_over(tmp_path):
    folder = fill(tmp_path / "s", (3, 2))
    for name in ("shard-000002", "shard-0000001", "shard-1", "shard-00000１"):
        for suffix in (".tar", ".json"):
            shutil.copy(folder / f"shard-000000{suffix}", folder / f"{name}{suffix}")
    assert open_shards(folder).targets == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("zeros", [5, 6, 9, 12, 4000, 10_000])
def test_an_absurd_number_of_shards_takes_no_time(zeros, tmp_path):
    folder, start = fill(tmp_path / "s"), time.monotonic()
    facts = (folder / "synthesis.json").read_text()
    (folder / "synthesis.json").write_text(facts.replace(": 2,", f": 2{'0' * zeros},"))
    words = "199998 are missing" if zeros == 5 else r"1,000,000 shards|an integer|Exceeds the limit"
    with pytest.raises(UserError, match=words):
        open_shards(folder)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_where_there_are_no_shards_none_are_opened(place, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="expected shards"):
        open_shards(tmp_path / place)


SETTINGS = {"schema": 1, "classes": CLASSES, "shards": 2, "extension": "png"}


@pytest.mark.parametrize(
    "harm",
    [
        {"schema": 2}, {"classes": ["a", "a"]}, {"classes": [1]}, {"shards": True}, {"shards": -1},
        {"extension": "pkl"}, {"extension": ["png"]},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_wrong_are_refused(harm, tmp_path):
    (tmp_path / "synthesis.json").write_text(json.dumps(SETTINGS))
    assert read_settings(tmp_path) == ShardManifest(1, CLASSES, 2, "png")
    (tmp_path / "synthesis.json").write_text(json.dumps(SETTINGS | harm))
    with pytest.raises(UserError, match=r"synthesis\.json"):
        read_settings(tmp_path)


def harmed_rows(rows: list[list[int]]) -> dict[str, list[list[int]]]:
    (key, label, offset, size), second = rows[0], rows[1]
    return {
        "keys that repeat": [rows[0], [key, *second[1:]]],
        "keys that decrease": [[7, *rows[0][1:]], second],
        "a key beyond 64 bits": [rows[0], [2**63, *second[1:]]],
        "a label of no class": [[key, 2, offset, size]],
        "a label below 0": [[key, -1, offset, size]],
        "an offset below 0": [[key, label, -512, size]],
        "an image past the end": [[key, label, 10**6, size]],
        "an image of gigabytes": [[key, label, offset, 2**40]],
        "an image over the end of integers": [[key, label, offset, 2**63 - 1]],
        "an offset at the end of integers": [[key, label, 2**63 - 1, size]],
        "images that overlap": [rows[0], [1, 1, offset + 1, size]],
        "images out of order": [[0, 0, *second[2:]], [1, 1, offset, size]],
        "rows of three": [[key, label, offset]],
        "rows of five": [[*rows[0], 0]],
        "rows of two and six": [rows[0][:2], [*rows[0][2:], *second]],
        "a float": [[key, label, offset, float(size)]],
        "a bool": [[False, label, offset, size]],
    }


@pytest.mark.parametrize("harm", harmed_rows([[0] * 4] * 2))
def test_a_record_that_cannot_be_is_refused(harm, tmp_path):
    path = shard_path(fill(tmp_path / "s"), 0)
    rows = read_table(path, 2)[0].samples
    rewrite(path, samples=harmed_rows(rows)[harm])
    with pytest.raises(UserError, match="record"):
        read_table(path, 2)
    with pytest.raises(UserError, match="shard-000000"):
        open_shards(path.parent)
    assert "record" in str(verify_shard(path, 2, "png"))


def test_a_label_is_checked_by_the_number_of_classes(shards):
    path = shard_path(shards, 0)
    with pytest.raises(UserError, match="labels of no class"):
        read_table(path, 1)
    assert verify_shard(path, 1, "png")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
numbers = st.integers(-1, 9000) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30])
records = st.fixed_dictionaries(
    {"schema": st.just(1), "bytes": st.sampled_from([0, 1, 2**63]) | st.none()}
    | {"sha256": st.text(max_size=4), "samples": st.lists(st.lists(numbers, max_size=5)) | values},
)


@quickly
@given(content=st.binary(max_size=60) | values.map(json.dumps).map(str.encode))
def test_arbitrary_settings_do_no_harm(content, shards, tmp_path):
    (tmp_path / "synthesis.json").write_bytes(content)
    with suppress(UserError):
        open_shards(tmp_path)


@quickly
@given(
    classes=st.lists(st.text(max_size=4), max_size=4) | values,
    shards=st.integers(-1, 4) | numbers | values,
    extension=st.sampled_from(["jpg", "png", "", "tar"]) | values,
)
def test_settings_near_to_right_do_no_harm(classes, shards, extension, tmp_path):
    if not (tmp_path / "s").exists():
        fill(tmp_path / "s")
    facts = {"schema": 1, "classes": classes, "shards": shards, "extension": extension}
    (tmp_path / "s" / "synthesis.json").write_text(json.dumps(facts))
    sane(tmp_path / "s")


@quickly
@given(content=st.binary(max_size=60) | values.map(json.dumps).map(str.encode))
def test_an_arbitrary_record_does_no_harm(content, tmp_path):
    if not (tmp_path / "s").exists():
        fill(tmp_path / "s")
    shard_path(tmp_path / "s", 0).with_suffix(".json").write_bytes(content)
    sane(tmp_path / "s")


@quickly
@given(
    record=records,
    rows=st.lists(st.tuples(numbers, st.integers(0, 2), numbers, numbers), max_size=3),
    plausible=st.booleans(),
)
def test_a_record_near_to_right_does_no_harm(record, rows, plausible, tmp_path):
    if not (tmp_path / "s").exists():
        fill(tmp_path / "s")
    path = shard_path(tmp_path / "s", 0)
    if plausible:
        record |= {"bytes": path.stat().st_size, "samples": [list(row) for row in rows]}
    path.with_suffix(".json").write_text(json.dumps(record))
    sane(tmp_path / "s")


@quickly
@given(content=st.binary(max_size=3000), start=st.integers(0, 3000))
def test_arbitrary_bytes_in_a_tar_do_no_harm(content, start, tmp_path):
    """With a record that is of them."""
    path = shard_path(tmp_path / "s", 0)
    if not path.exists():
        fill(tmp_path / "s")
        (tmp_path / "honest").write_bytes(path.read_bytes())
    honest = (tmp_path / "honest").read_bytes()
    put(path, honest[:start] + content + honest[start + len(content) :])
    sane(tmp_path / "s")
