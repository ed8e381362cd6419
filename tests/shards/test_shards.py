"""Shards: the same bytes, the same images by every reader, and no harm from a hostile tar."""

import gc
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

import augment.shards.dataset
import augment.shards.export
from augment import Plan, UserError
from augment.core.errors import AugmentWarning, Damaged
from augment.core.schema import as_object, write
from augment.shards.dataset import Sample, Shards, encode, open_shards, verify_shard, write_shard
from augment.shards.export import export_folder, to_webdataset
from augment.shards.format import (
    ShardManifest,
    read_settings,
    read_table,
    shard_path,
    write_info,
)
from augment.sources import Folder

CLASSES = ["ant", "bee"]
ODD = "a#b ?%20 {0..3} ü"
quickly = settings(
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def picture(key: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    """Values that 8 bits can hold, and smooth enough for JPEG."""
    rows = torch.arange(size).reshape(1, size, 1) * 3.0
    columns = torch.arange(size) * torch.arange(1.0, channels + 1).reshape(-1, 1, 1)
    return (40.0 + 9 * key + rows + columns) / 255


def plan(key: int) -> Plan:
    name = CLASSES[key % 2]
    return Plan(key % 2, name, (f"{name}/ü.png", "b.png"), (0.25, 0.75), 0.0, 0, 0, key)


def sample(key: int, extension: str = "png", channels: int = 3, size: int = 8) -> Sample:
    image = encode(picture(key, channels, size), extension)
    return Sample(key, image, key % 2, {"plan": asdict(plan(key)), "steps": 4})


def fill(folder: Path, counts=(3, 2), extension: str = "png", channels: int = 3, size: int = 8):
    """A folder of shards of so many samples each."""
    folder.mkdir(parents=True)
    facts = {"schema": 1, "classes": CLASSES, "shards": len(counts), "extension": extension}
    (folder / "synthesis.json").write_text(json.dumps(facts))
    first = 0
    for number, count in enumerate(counts):
        samples = [sample(key, extension, channels, size) for key in range(first, first + count)]
        write_shard(shard_path(folder, number), samples, extension, dropped={"dark": {"ant": 2}})
        first += count
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 3 and 2 PNG images, not to be harmed."""
    return fill(tmp_path_factory.mktemp("shards") / "folder")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 4, 3 and 2 JPEG images of 32 pixels, not to be harmed."""
    return fill(tmp_path_factory.mktemp("jpegs") / "folder", (4, 3, 2), "jpg", size=32)


def tars(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def same(image: Image.Image, expected: torch.Tensor) -> bool:
    """Whether a PIL image of another reader has the pixels that ours gave."""
    return image.tobytes() == augment.shards.dataset.to_pil(expected).convert(image.mode).tobytes()


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
    monkeypatch.setattr(augment.shards.dataset, "LARGEST", 10)
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


def rewrite(path: Path, **changes: object) -> None:
    """Change a shard's record."""
    record = path.with_suffix(".json")
    facts = json.loads(record.read_bytes()) | changes
    write(record, {key: facts[key] for key in facts if key != "digest"}, indent=None)


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


def sane(folder: Path, extension: str = "png") -> None:
    """All that can be asked of a folder gives an answer or a `UserError`, nothing else."""
    with suppress(UserError):
        opened = open_shards(folder, complete=False)
        for index in range(len(opened)):
            for ask in (opened.__getitem__, opened.about, opened.plan, opened.metadata):
                with suppress(UserError):
                    ask(index)
    reason = verify_shard(shard_path(folder, 0), len(CLASSES), extension)
    assert reason is None or reason.strip()


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


# --- damage


@pytest.mark.parametrize("lying", [False, True])
def test_every_truncation_is_found(lying, tmp_path):
    """Also if the record is of the truncated tar."""
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    content = path.read_bytes()
    assert verify_shard(path, 2, "png") is None
    for size in range(0, len(content), 512):
        put(path, content[:size]) if lying else path.write_bytes(content[:size])
        assert verify_shard(path, 2, "png")
        if not lying:
            with pytest.raises(UserError, match=r"shard-000000\.tar.*of \d+ bytes"):
                open_shards(tmp_path / "s")
        sane(tmp_path / "s")


def test_a_shard_that_shrinks_while_it_is_open_is_refused(tmp_path):
    opened = open_shards(fill(tmp_path / "s"))
    os.truncate(shard_path(tmp_path / "s", 1), 520)
    assert opened[2][1] == 0
    for ask in (opened.__getitem__, opened.read, opened.about):
        with pytest.raises(UserError, match=r"image 3 in .*shard-000001\.tar, got an early end"):
            ask(3)


def test_every_flipped_bit_is_found(tmp_path):
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    content = path.read_bytes()
    for place in range(0, len(content), 11):
        path.write_bytes(flipped(content, place))
        assert verify_shard(path, 2, "png"), place
    path.write_bytes(content)
    assert verify_shard(path, 2, "png") is None


def test_a_flipped_bit_in_a_header_or_label_is_found_with_a_record_of_it(tmp_path):
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    content = path.read_bytes()
    for block in (0, 2, 3, 4):  # image header, label header, label, JSON header
        for place in range(0, 512, 7):
            put(path, flipped(content, 512 * block + place))
            assert verify_shard(path, 2, "png"), (block, place)
            if block == 4:
                with pytest.raises(UserError, match=r"got something else where 00000000\.json"):
                    open_shards(path.parent).about(0)


def test_no_flipped_bit_of_a_tar_is_read_otherwise_in_silence(tmp_path):
    """What is read is the same, or is refused."""
    path = shard_path(fill(tmp_path / "s", (2,), "jpg"), 0)
    content, opened = path.read_bytes(), open_shards(tmp_path / "s")

    def answers() -> list[object]:
        found: list[object] = []
        for index in (0, 1):
            for ask in (opened.read, opened.about):
                try:
                    found.append(ask(index))
                except UserError as error:
                    assert "shard-000000.tar" in str(error)
                    found.append(None)
        return found

    honest, bits = answers(), random.Random(0).sample(range(8 * len(content)), 3000)
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for place, bit in (divmod(number, 8) for number in bits):
            os.pwrite(file.fileno(), bytes([content[place] ^ 1 << bit]), place)
            found = answers()
            os.pwrite(file.fileno(), content[place : place + 1], place)
            refused += None in found
            assert all(x in (None, y) for x, y in zip(found, honest, strict=True)), (place, bit)
    assert refused > 300


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_another_number_in_a_record_is_not_read_in_silence(place, tmp_path):
    """Key, label, offset and size: each is known by the digest of what it leads to."""
    folder = fill(tmp_path / "s", (2,))
    rows = read_table(shard_path(folder, 0), 2)[0].samples
    rows[1][place] += -1 if place in (1, 3) else 1
    rewrite(shard_path(folder, 0), samples=rows)
    opened = open_shards(folder)
    with pytest.raises(UserError, match="shard-000000"):
        opened[1], opened.about(1)
    assert opened[0][1] == 0


def without_digests(folder: Path) -> Path:
    """The folder as older versions wrote it."""
    for path in folder.glob("shard-*.json"):
        record = json.loads(path.read_bytes()) | {"schema": 1}
        path.write_text(json.dumps({k: record[k] for k in record if k not in ("crc32", "digest")}))
    return folder


def test_shards_without_digests_are_read_with_one_warning(tmp_path):
    folder = without_digests(fill(tmp_path / "s"))
    with pytest.warns(AugmentWarning, match="older version wrote without") as told:
        opened = open_shards(folder)
    assert len(told) == 1
    assert [label for _, label in opened] == [0, 1, 0, 1, 0]
    assert opened.plan(3) == plan(3)
    assert [verify_shard(shard_path(folder, number), 2, "png") for number in (0, 1)] == [None] * 2


@pytest.mark.parametrize("digests", ["", "0" * 16, "x" * 48, "0" * 47 + "é", 3, None, [0, 0, 0]])
def test_digests_of_another_form_are_refused(digests, tmp_path):
    folder = fill(tmp_path / "s")
    rewrite(shard_path(folder, 0), crc32=digests)
    with pytest.raises(Damaged, match=r"samples of another form|crc32"):
        open_shards(folder)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def put(path: Path, content: bytes, **changes: object) -> None:
    """Replace a tar and make its record fit."""
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    rewrite(path, bytes=len(content), sha256=digest, **changes)


# --- hostility

Members = list[tuple[tarfile.TarInfo, bytes]]


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def replaced(members: Members, place: int, *new: tuple[tarfile.TarInfo, bytes]) -> Members:
    return [*members[:place], *new, *members[place + 1 :]]


def of_type(kind: bytes) -> Callable[[Members], Members]:
    """The first image is a link, a device or the like."""
    name = "00000000.png"
    return lambda members: replaced(members, 0, member(name, b"", kind, "/etc/passwd"))


def with_more(*names: str, content: bytes = b"x") -> Callable[[Members], Members]:
    return lambda members: [*members, *(member(name, content) for name in names)]


def in_front(*names: str, content: bytes = b"x") -> Callable[[Members], Members]:
    return lambda members: [*(member(name, content) for name in names), *members]


def with_pax(**headers: str) -> Callable[[Members], Members]:
    def harm(members: Members) -> Members:
        members[0][0].pax_headers = {name.replace("_", "."): v for name, v in headers.items()}
        return members

    return harm


def with_content(place: int, content: bytes) -> Callable[[Members], Members]:
    return lambda members: replaced(members, place, member(members[place][0].name, content))


def png(width: int, height: int) -> bytes:
    """The beginning of a huge image."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    chunks = chunk(b"IHDR", ihdr), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def white(size: int) -> bytes:
    """A few kilobytes that decode to more pixels than an image of ours may have."""
    buffer = io.BytesIO()
    Image.new("1", (size, size), 1).save(buffer, "PNG")
    return buffer.getvalue()


class Boom:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickles(members: Members) -> Members:
    """What webdataset's own decoders would run, in both samples and behind."""
    bomb = pickle.dumps(Boom("executed"))
    suffixes = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "mp")
    bombs = [member(f"0000000{key}.{suffix}", bomb) for suffix in suffixes for key in (0, 1)]
    return [*members[:3], *bombs[::2], *members[3:], *bombs[1::2]]


def fixed(header: bytearray) -> bytes:
    """A header with its checksum put right."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def sparse(content: bytes) -> bytes:
    """The first image is an old GNU sparse file of 8 GB, of which 512 bytes are stored."""
    head = bytearray(content[:512])
    head[156:157] = tarfile.GNUTYPE_SPARSE
    head[257:265] = b"ustar  \0"
    head[386:410] = b"%011o\0%011o\0" % (0, 512)
    head[483:495] = b"%011o\0" % (8**11 - 1)
    return fixed(head) + content[512:]


def of_size(field: bytes) -> Callable[[bytes], bytes]:
    def harm(content: bytes) -> bytes:
        head = bytearray(content[:512])
        head[124:136] = field
        return fixed(head) + content[512:]

    return harm


def many(content: bytes) -> bytes:
    info, _ = member("00000009.png")
    return content[:-1024] + info.tobuf(tarfile.USTAR_FORMAT) * 100_000 + bytes(1024)


LISTS: dict[str, Callable[[Members], Members]] = {
    "..": with_more("../../00000002.png"),
    "absolute": in_front("/00000002.png"),
    "symlink": of_type(tarfile.SYMTYPE),
    "hard link": of_type(tarfile.LNKTYPE),
    "character device": of_type(tarfile.CHRTYPE),
    "block device": of_type(tarfile.BLKTYPE),
    "fifo": of_type(tarfile.FIFOTYPE),
    "folder": of_type(tarfile.DIRTYPE),
    "unknown type": of_type(b"Z"),
    "pax sparse": with_pax(
        GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize=str(10**12)
    ),
    "pax size": with_pax(size=str(2**62)),
    "pax path": with_pax(path="../../x.png"),
    "pickles": pickles,
    "more members": with_more("00000002.png", "00000002.cls", "00000002.json"),
    "members in front": in_front("0.cls", "0.json"),
    "duplicates": lambda members: members * 2,
    "duplicate member": lambda members: [*members, members[0]],
    "fewer members": lambda members: members[:-1],
    "other order": lambda members: [members[0], members[2], members[1], *members[3:]],
    "samples mixed up": lambda members: members[3:] + members[:3],
    "nothing": lambda members: [],
    "other name": lambda members: replaced(members, 0, member("x.png", members[0][1])),
    "hidden": with_more("__meta__"),
    "empty image": with_content(0, b""),
    "no image": with_content(0, b"GIF89a" + bytes(50)),
    "image of another format": with_content(0, encode(picture(0), "jpg")),
    "bomb": with_content(0, png(50_000, 50_000)),
    "readable bomb": with_content(0, white(9000)),
    "truncated image": with_content(0, encode(picture(0), "png")[:-30]),
    "pickle as label": with_content(1, pickle.dumps(Boom("executed"))),
    "another label": with_content(1, b"1"),
    "a label in other digits": with_content(1, "٠".encode()),
    "a label with a blank": with_content(1, b"0\n"),
    "pickle as JSON": with_content(2, pickle.dumps(Boom("executed"))),
    "deep JSON": with_content(2, b"[" * 100_000),
    "deep object": with_content(2, b'{"plan":' * 100_000 + b"1" + b"}" * 100_000),
    "JSON that is no object": with_content(2, b"3"),
    "JSON of long integers": with_content(2, b'{"plan": ' + b"9" * 5000 + b"}"),
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "GNU sparse": sparse,
    "absurd size": of_size(b"7" * 11 + b"\0"),
    "size of 70 bits": of_size(b"\x80\0\0" + b"\xff" * 9),
    "negative size": of_size(b"\xff" * 12),
    "size with a sign": of_size(b"-0000000001\0"),
    "size that is none": of_size(b"12_4 abcdef\0"),
    "many members": many,
    "gzip": gzip.compress,
    "zeros": lambda content: bytes(len(content)),
    "more zeros": lambda content: content + bytes(10240),
    "one block at the end": lambda content: content[:-512],
    "padding in use": lambda content: content[:-1025] + b"x" + content[-1024:],
    "nothing at all": lambda content: b"",
}


def harm_list(path: Path, harm: Callable[[Members], Members]) -> None:
    """Write another tar, and its record as whoever made it would: with the true offsets."""
    with tarfile.open(path) as tar:
        old = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in harm(old):
            tar.addfile(info, io.BytesIO(content))
    content, found = buffer.getvalue()[: tar.offset - 1024] + bytes(1024), {}
    with suppress(tarfile.TarError, ValueError), tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = {info.name: [info.offset_data, min(info.size, 2**26)] for info in tar}
    rows = read_table(path, 2)[0].samples
    rows = [[*row[:2], *found.get(f"{row[0]:08d}.png", row[2:])] for row in rows]
    put(path, content, samples=sorted(rows))


def test_the_hostile_tars_differ_from_an_honest_one_by_the_harm_alone(tmp_path):
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    before = path.read_bytes()
    harm_list(path, lambda members: members)
    assert path.read_bytes() == before
    assert verify_shard(path, 2, "png") is None


def test_the_pickles_would_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Boom("executed")))
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("harm", [*LISTS, *BYTES])
def test_a_hostile_tar_is_told_and_does_no_harm(harm, tmp_path, monkeypatch):
    """Its record has the right digest."""
    monkeypatch.chdir(tmp_path)
    folder = fill(tmp_path / "s", (2,))
    path = shard_path(folder, 0)
    if harm in LISTS:
        harm_list(path, LISTS[harm])
    else:
        put(path, BYTES[harm](path.read_bytes()))
    before, start = snapshot(tmp_path), time.monotonic()
    assert verify_shard(path, 2, "png")
    sane(folder)
    with suppress(UserError):
        for image, label in to_webdataset(folder):
            assert image.shape == (3, 8, 8)
            assert label in (0, 1)
    with suppress(UserError):
        export_folder(folder, tmp_path / "out")
    after = {name: x for name, x in snapshot(tmp_path).items() if name.split("/")[0] != "out"}
    assert after == before, "something was executed or extracted"
    assert time.monotonic() - start < 5


def test_a_hole_of_a_petabyte_is_not_read(tmp_path):
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    size = 2**43
    os.truncate(path, size)
    rewrite(path, bytes=size)
    start = time.monotonic()
    assert verify_shard(path, 2, "png") == "its record is not of its samples"
    assert open_shards(tmp_path / "s").targets == [0, 1]
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir])
def test_a_tar_that_is_no_file_is_refused(kind, tmp_path):
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    path.unlink()
    kind(path)
    assert verify_shard(path, 2, "png") == "no tar"
    with pytest.raises(UserError, match="no tar"):
        open_shards(tmp_path / "s")


# --- other readers


def expected(folder: Path) -> list[tuple[torch.Tensor, int]]:
    return list(open_shards(folder))


def agree(found: list[tuple[Image.Image, int]], folder: Path) -> None:
    """Another reader gives the same images and labels, in the same order."""
    ours = expected(folder)
    assert [label for _, label in found] == [label for _, label in ours]
    assert all(same(image, x) for (image, _), (x, _) in zip(found, ours, strict=True))


@pytest.fixture
def collected():
    """Files that webdataset forgets to close go before the next test."""
    yield
    gc.collect()


careless = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@careless
@pytest.mark.usefixtures("collected")
def test_webdataset_reads_the_same(jpegs):
    import webdataset as wds

    stream = wds.WebDataset(tars(jpegs), shardshuffle=False)
    found = list(stream.decode("pil").to_tuple("jpg", "cls", "json"))
    agree([(image, label) for image, label, _ in found], jpegs)
    assert [about["plan"]["index"] for _, _, about in found] == list(range(9))


def test_datasets_of_hugging_face_reads_the_same(jpegs, tmp_path):
    import datasets

    found = datasets.load_dataset(
        "webdataset", data_files=tars(jpegs), cache_dir=str(tmp_path), split="train"
    )
    agree([(row["jpg"], row["cls"]) for row in found], jpegs)
    assert [row["json"]["plan"]["index"] for row in found] == list(range(9))


@careless
@pytest.mark.usefixtures("collected")
def test_timm_reads_the_same(jpegs):
    from timm.data import create_dataset

    found = create_dataset(
        "wds/", root=str(jpegs), split="shard-{000000..000002}.tar|9", is_training=False
    )
    assert len(found) == 9
    agree(list(found), jpegs)


@careless
@pytest.mark.usefixtures("collected")
def test_timm_finds_what_it_wants_to_know(jpegs, tmp_path):
    from timm.data import create_dataset

    folder = shutil.copytree(jpegs, tmp_path / "s")
    write_info(folder, [4, 3, 2])
    for split, count in (("train", 9), ("shard-{000000..000002}.tar|9", 9)):
        found = create_dataset("wds/", root=str(folder), split=split, is_training=False)
        assert len(found) == count
        agree(list(found), jpegs)


def test_our_pipeline_streams_the_same_in_order(jpegs):
    found = list(to_webdataset(jpegs))
    assert [label for _, label in found] == [label for _, label in expected(jpegs)]
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(found, expected(jpegs), strict=True))
    assert next(iter(to_webdataset(jpegs, 0, torch.mean, str)))[1] == "0"


@pytest.mark.parametrize("shuffle", [0, 4])
def test_workers_share_the_stream_whatever_the_folder_is_called(shuffle, tmp_path):
    folder = fill(tmp_path / ODD, (3, 2, 2))
    loader = DataLoader(to_webdataset(folder, shuffle), batch_size=None, num_workers=2)
    brightness = sorted(image.mean().item() for image, _ in loader)
    assert brightness == [picture(key).mean().item() for key in range(7)]


def test_more_workers_and_nodes_than_shards_do_no_harm(tmp_path, monkeypatch):
    folder = fill(tmp_path / "s", (3,))
    loader = DataLoader(to_webdataset(folder), batch_size=None, num_workers=2)
    assert len(list(loader)) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    lengths = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        lengths.append(len(list(to_webdataset(folder))))
    assert lengths == [3, 0]


def test_a_shuffled_stream_is_in_another_order(tmp_path):
    folder = fill(tmp_path / "s", (8, 8))
    orders = {tuple(x.mean().item() for x, _ in to_webdataset(folder, 16)) for _ in range(4)}
    assert len(orders) > 1
    assert len({tuple(sorted(order)) for order in orders}) == 1


# --- exporting


def test_an_export_is_read_by_torchvision_and_datasets(jpegs, tmp_path):
    import datasets
    from torchvision.datasets import ImageFolder

    export_folder(jpegs, tmp_path / "out")
    opened = open_shards(jpegs)
    found = ImageFolder(str(tmp_path / "out"))
    assert found.classes == CLASSES
    order = sorted(range(9), key=lambda index: (index % 2, index))
    assert found.targets == [index % 2 for index in order]
    assert all(same(x, opened[i][0]) for (x, _), i in zip(found, order, strict=True))

    rows = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "c"), split="train"
    )
    by_index = {row["index"]: row for row in rows}
    assert len(rows) == len(by_index) == 9
    for index, row in by_index.items():
        assert same(row["image"], opened[index][0])
        assert (row["label"], row["class_name"]) == (index % 2, CLASSES[index % 2])
        assert tuple(row["weights"]) == plan(index).weights
        assert tuple(row["members"]) == plan(index).members


def test_a_class_without_an_image_keeps_its_folder_and_the_others_their_numbers(tmp_path):
    from torchvision.datasets import ImageFolder

    folder, classes = fill(tmp_path / "s", (3, 2)), ["aaa", "ant", "bee"]
    facts = json.loads((folder / "synthesis.json").read_bytes())
    (folder / "synthesis.json").write_text(json.dumps(facts | {"classes": classes}))
    samples = [sample(key)._replace(label=1 + key % 2) for key in range(5)]
    write_shard(shard_path(folder, 0), samples[:3], "png")
    write_shard(shard_path(folder, 1), samples[3:], "png")
    for _ in range(2):
        with pytest.warns(AugmentWarning, match="none of 'aaa', whose .*allow_empty=True"):
            export_folder(folder, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="aaa"):
        ImageFolder(str(tmp_path / "out"))
    theirs = ImageFolder(str(tmp_path / "out"), allow_empty=True)
    ours = Folder(tmp_path / "out")
    assert theirs.classes == ours.classes == classes
    assert theirs.targets == ours.targets == [1, 1, 1, 2, 2]
    (tmp_path / "out" / ".origins.json").unlink()
    with pytest.raises(UserError, match="aaa, got none"):
        Folder(tmp_path / "out")


def test_shards_without_an_image_are_not_exported(tmp_path):
    with pytest.raises(UserError, match=r"expected images to export .* got none"):
        export_folder(fill(tmp_path / "s", (0,)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_holds_the_files_and_the_plans(shards, tmp_path):
    export_folder(shards, tmp_path / "out")
    names = [f"{CLASSES[key % 2]}/{key:08d}.png" for key in range(5)]
    files = {name: x for name, x in snapshot(tmp_path / "out").items() if name not in CLASSES}
    assert set(files) == {"metadata.jsonl", ".origins.json", *names}
    lines = [json.loads(line) for line in files["metadata.jsonl"].splitlines()]
    assert [line["file_name"] for line in lines] == names
    for key, line in enumerate(lines):
        assert files[names[key]] == sample(key).image
        assert json.loads(plan(key).to_json()).items() <= line.items()


def test_no_plan_changes_where_an_export_writes(tmp_path):
    folder = fill(tmp_path / "s", (3,))
    plans = [{"plan": {"file_name": "../../x.png", "label": 9, "seed": 1}}, {"plan": 3}, {}]
    samples = [sample(key)._replace(about=about) for key, about in enumerate(plans)]
    write_shard(shard_path(folder, 0), samples, "png")
    export_folder(folder, tmp_path / "out")
    lines = (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"file_name": "ant/00000000.png", "label": 0, "class_name": "ant", "seed": 1},
        {"file_name": "bee/00000001.png", "label": 1, "class_name": "bee"},
        {"file_name": "ant/00000002.png", "label": 0, "class_name": "ant"},
    ]
    opened = open_shards(folder)
    for index in range(3):
        with pytest.raises(UserError, match="plan"):
            opened.plan(index)


def test_an_export_that_was_harmed_is_mended(shards, tmp_path):
    export_folder(shards, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    (tmp_path / "out" / "ant" / "00000002.png").write_bytes(b"harmed")
    (tmp_path / "out" / "bee" / "00000003.png").unlink()
    export_folder(shards, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("calls", range(6))
def test_an_interrupted_export_goes_on(calls, shards, tmp_path, monkeypatch):
    """It is interrupted before image number `calls`; the last of them is beside the metadata."""
    out, write = tmp_path / "out", augment.shards.export.write_bytes
    export_folder(shards, tmp_path / "whole")

    def write_until_interrupted(path, content, sync=True):
        nonlocal calls
        if not calls:
            raise KeyboardInterrupt
        calls -= 1
        write(path, content)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(augment.shards.export, "write_bytes", write_until_interrupted)
        export_folder(shards, out)
    assert (out / "metadata.jsonl").exists() == (snapshot(out) == snapshot(tmp_path / "whole"))
    early = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (out / ".x.1.0123abcd.tmp").touch()  # of a kill
    export_folder(shards, out)
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == written for path, written in early.items())


def test_an_export_that_was_killed_at_once_goes_on(shards, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "..metadata.jsonl.123.ab.tmp").touch()
    export_folder(shards, tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*.png"))) == 5


def test_an_export_does_not_touch_what_is_not_its_own(shards, tmp_path):
    for place in ("file", "other", "mine"):
        (tmp_path / place).mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("mine")
    (tmp_path / "mine" / ".diary.tmp").write_text("mine")
    (tmp_path / "plain").write_text("mine")
    export_folder(fill(tmp_path / "s", (4,)), tmp_path / "export")
    for place in ("mine", "export", "s", "plain"):
        before = snapshot(tmp_path)
        with pytest.raises(UserError, match="choose another place"):
            export_folder(shards, tmp_path / place)
        assert snapshot(tmp_path) == before


UNSAFE = ["", ".", "..", ".git", "a/b", "/etc", "../x", "a\0b", "\ud800", "ü" * 128]


@pytest.mark.parametrize("name", UNSAFE, ids=ascii)
def test_a_class_name_that_is_no_folder_is_refused_before_anything_is_written(name, tmp_path):
    folder = fill(tmp_path / "s")
    facts = json.loads((folder / "synthesis.json").read_bytes()) | {"classes": ["ant", name]}
    (folder / "synthesis.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="open_shards"):
        export_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert open_shards(folder).classes == ["ant", name]


@pytest.mark.parametrize("name", ["a b", "ü", "a.b", "#?%", "[x]", "x" * 255])
def test_a_class_name_that_is_odd_is_exported(name, tmp_path):
    from torchvision.datasets import ImageFolder

    folder = fill(tmp_path / "s")
    facts = json.loads((folder / "synthesis.json").read_bytes()) | {"classes": ["ant", name]}
    (folder / "synthesis.json").write_text(json.dumps(facts))
    export_folder(folder, tmp_path / "out")
    assert sorted(ImageFolder(str(tmp_path / "out")).classes) == sorted(["ant", name])


def test_two_images_of_one_key_are_not_exported_over_each_other(tmp_path):
    folder = fill(tmp_path / "s")
    write_shard(shard_path(folder, 1), [sample(0)], "png")
    with pytest.raises(UserError, match="some twice"):
        export_folder(folder, tmp_path / "out")


def test_webdataset_and_torchvision_are_imported_when_they_are_needed():
    import subprocess
    import sys

    code = (
        "import sys, augment.shards.dataset; "
        "sys.exit(any(m in sys.modules for m in ('webdataset', 'torchvision', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
