"""One lost file is not a lost bank; damage is what was read and is wrong, and nothing else."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import COUNTS, amend, paint, snapshot

import augment.bank.fill
from augment import BankMismatch, LatentBank, UserError
from augment.bank.fill import fill_bank
from augment.bank.format import read_manifest
from augment.bank.merge import merge, split
from augment.bank.verify import discard
from augment.core.errors import AugmentWarning, Damaged
from augment.core.files import write_json
from augment.core.schema import read
from augment.shards.verify import inspect, repair, verify
from augment.sources import Folder

RECORDS = ("manifest.json", "0001/chunk-0000.json")


@pytest.fixture
def copy(bank: LatentBank, tmp_path: Path) -> Path:
    return shutil.copytree(bank.path, tmp_path / "copy")


@pytest.fixture(scope="module")
def grown(tmp_path_factory, gaussian):
    """A bank that grew twice, with an image that was left out, and one that was made good."""
    root = paint(tmp_path_factory.mktemp("grown") / "images", {"bee": 5, "dog": 4, "fly": 3})
    good = (root / "dog" / "1.png").read_bytes()
    for name in ("dog/1.png", "dog/2.png", "fly/0.png"):
        (root / name).write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment.bank.fill, "CHUNK", 3)
        options = {"steps": 1, "max_rejects": 0.5}
        path = root.with_name("bank")
        fill_bank(path, gaussian, Folder(root), **options)
        paint(root, {"ant": 4, "cat": 2, "elk": 1}, seed=1)
        (root / "dog" / "1.png").write_bytes(good)
        fill_bank(path, gaussian, Folder(root), **options)
        paint(root, {"ant": 5, "gnu": 2}, seed=2)
        shutil.copy(root / "bee" / "0.png", root / "bee" / "9.png")
        paint(root, {"ant": 4}, seed=1)  # as they were
        fill_bank(path, gaussian, Folder(root), **options)
    assert LatentBank.open(path).classes == ["ant", "bee", "cat", "dog", "elk", "fly", "gnu"]
    return path, root


def lose(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    os.truncate(path, 2**40)


HARMS = (lose, flip, cut, blank, pipe, device, sparse)


@pytest.mark.parametrize("harm", HARMS)
def test_a_manifest_is_made_again_byte_for_byte(harm, grown, tmp_path, gaussian):
    path = shutil.copytree(grown[0], tmp_path / "bank")
    whole = snapshot(path)
    assert "as it was written" in repair(path)
    assert snapshot(path) == whole
    harm(path / "manifest.json")
    for use in (
        LatentBank.open,
        verify,
        inspect,
        lambda p: fill_bank(p, gaussian, Folder(grown[1])),
    ):
        with pytest.raises(UserError, match="verify --repair"):
            use(path)
    assert "records of 7 classes" in repair(path)
    assert snapshot(path) == whole
    assert verify(path) == []


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_record_is_found_discarded_and_made_again(harm, copy, bank, gaussian, pictures):
    harm(copy / "0001" / "chunk-0000.json")
    with pytest.raises(UserError):
        LatentBank.open(copy)
    discard(verify(copy))
    fill_bank(copy, gaussian, Folder(pictures), steps=4)
    assert snapshot(copy) == snapshot(bank.path)


def test_a_harmed_record_is_made_again_by_the_same_command_at_once(copy, bank, gaussian, pictures):
    flip(copy / "0001" / "chunk-0000.json")
    fill_bank(copy, gaussian, Folder(pictures), steps=4)
    assert snapshot(copy) == snapshot(bank.path)


def test_the_manifest_and_a_record_are_lost(copy, bank, gaussian, pictures):
    flip(copy / "0001" / "chunk-0000.json")
    lose(copy / "manifest.json")
    assert "2 records of 2 classes" in repair(copy)
    assert any("not of this bank" in finding.what for finding in verify(copy))
    again = fill_bank(copy, gaussian, Folder(pictures), steps=4)
    assert again.members == bank.members and verify(copy) == []


def test_records_of_two_banks_make_no_manifest(copy, tmp_path, gaussian, pictures):
    other = fill_bank(tmp_path / "other", gaussian, Folder(pictures), steps=3).path
    shutil.copytree(other / "0002", copy / "0002", dirs_exist_ok=True)
    (copy / "manifest.json").unlink()
    with pytest.raises(BankMismatch, match="steps"):
        repair(copy)
    shutil.rmtree(copy)
    copy.mkdir()
    with pytest.raises(UserError, match="got none"):
        repair(copy)


@pytest.mark.parametrize("name", RECORDS)
def test_no_bit_of_a_record_changes_unseen(name, copy):
    """A sample of them: `test_schema` looks at every one of a smaller record."""
    content = (copy / name).read_bytes()
    for place in range(0, 8 * len(content), 97):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        (copy / name).write_bytes(damaged)
        with pytest.raises(Damaged):
            LatentBank.open(copy)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_no_bit_at_all_of_a_record_changes_unseen(name, copy):
    content = (copy / name).read_bytes()
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        (copy / name).write_bytes(damaged)
        with pytest.raises(Damaged):
            LatentBank.open(copy)


@pytest.mark.parametrize("name", ["EACCES", "EMFILE", "EIO"])
@pytest.mark.parametrize("file", [*RECORDS, "0001/chunk-0000.safetensors"])
def test_what_cannot_be_read_now_is_not_damage(
    name, file, copy, bank, gaussian, pictures, monkeypatch
):
    number = getattr(errno, name)
    opened = os.open

    def failing(path, *args, **options):
        if Path(path) == copy / file:
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing)
        if file == "manifest.json":
            with pytest.raises(UserError, match="nothing is known to be wrong") as caught:
                verify(copy)
            assert not isinstance(caught.value, Damaged)
            with pytest.raises(UserError, match=os.strerror(number)):
                repair(copy)
        else:
            (finding,) = verify(copy)
            assert os.strerror(number) in finding.what and finding.record is None
            discard([finding])
        if file.endswith(".json"):
            with pytest.raises(UserError, match=os.strerror(number)):
                fill_bank(copy, gaussian, Folder(pictures), steps=4)
        with pytest.raises(UserError, match=os.strerror(number)) as caught:
            LatentBank.open(copy).latents("bee")
        assert "--discard" not in str(caught.value)
    assert snapshot(copy) == snapshot(bank.path)


def test_too_many_open_files_leave_no_image_out(tmp_path, gaussian, pictures, monkeypatch):
    def read(self, image_id):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="Too many open files"):
        patch.setattr(Folder, "read", read)
        fill_bank(tmp_path / "b", gaussian, Folder(pictures), steps=1, max_rejects=1)
    assert len(fill_bank(tmp_path / "b", gaussian, Folder(pictures), steps=1).members["ant"]) == 3


def test_an_image_that_cannot_be_read_now_is_not_called_changed(
    copy, gaussian, pictures, monkeypatch
):
    whole, read = snapshot(copy), Folder.read

    def failing(self, image_id):
        if image_id == "bee/1.png":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return read(self, image_id)

    monkeypatch.setattr(Folder, "read", failing)
    with pytest.raises(UserError, match=r"Permission denied.*nothing is known to be wrong"):
        fill_bank(copy, gaussian, Folder(pictures), steps=4)
    assert snapshot(copy) == whole


def test_vectors_are_not_waited_for_in_a_pipe(bank, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"readable \.safetensors file of features"):
        bank.features(tmp_path / "pipe")


def test_stale_chunks_are_never_taken_for_others(tmp_path, gaussian, pictures):
    """They were left by other settings, under the name of a chunk that is to come."""
    root = shutil.copytree(pictures, tmp_path / "images")
    other = fill_bank(tmp_path / "other", gaussian, Folder(root), steps=3).path
    shutil.rmtree(root / "cat")
    path = fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1).path
    shutil.copytree(other / "0002", path / "0002")
    shutil.copytree(pictures / "cat", root / "cat")
    grown = fill_bank(path, gaussian, Folder(root), steps=1)
    whole = fill_bank(tmp_path / "whole", gaussian, Folder(root), steps=1)
    assert (grown.latents("cat") == whole.latents("cat")).all() and verify(path) == []
    shutil.copy(other / "0001" / "chunk-0000.json", path / "0001" / "chunk-0000.json")
    with pytest.raises(Damaged, match="another chunk"):
        LatentBank.open(path)


def as_of_schema_2(path: Path) -> None:
    """Write the records of a bank as older versions did."""
    for file in path.rglob("*.json"):
        record = json.loads(file.read_bytes())
        del record["digest"]
        for key in ("home", "settings") + (("schema",) if file.name != "manifest.json" else ()):
            record.pop(key, None)
        for reject in record.get("rejects", []):
            del reject["place"]
        if file.name == "manifest.json":
            record["schema"] = 2
        write_json(file, record)


def test_a_bank_of_schema_2_is_read_goes_on_and_becomes_schema_3(copy, bank, gaussian, tmp_path):
    as_of_schema_2(copy)
    old = LatentBank.open(copy)
    assert old.digest == bank.digest and old.members == bank.members
    with pytest.warns(AugmentWarning, match="3 of an older version"):
        assert verify(copy) == []
    root = shutil.copytree(bank.manifest.source, tmp_path / "images")
    paint(root, {"dog": 2})
    grown = fill_bank(copy, gaussian, Folder(root), steps=4)
    assert grown.manifest.schema == 3 and len(grown.members["dog"]) == 2
    assert (grown.latents("bee") == bank.latents("bee")).all()
    made = merge([copy], tmp_path / "merged").path
    assert verify(made) == []
    before = snapshot(made)
    (made / "manifest.json").unlink()
    repair(made)
    assert snapshot(made) == before
    as_of_schema_2(made)
    (made / "manifest.json").unlink()
    with pytest.raises(UserError, match="older versions do not say"):
        repair(made)


def test_a_newer_bank_is_neither_read_nor_repaired(copy, gaussian, pictures):
    for name in RECORDS:
        path = shutil.copytree(copy, copy.with_name(name.replace("/", "-")))
        amend(path / name, lambda record: record.update(schema=4))
        before = snapshot(path)
        for use in (LatentBank.open, lambda p: fill_bank(p, gaussian, Folder(pictures), steps=4)):
            with pytest.raises(UserError, match="schema 4 of another version"):
                use(path)
        if name == "manifest.json":
            with pytest.raises(UserError, match="schema 4"):
                repair(path)
        else:
            assert [finding.record for finding in verify(path)] == [None]
        assert snapshot(path) == before


def test_a_split_goes_on_and_a_finished_one_is_left_as_it_is(copy, tmp_path):
    whole = snapshot(split(copy, ["cat", "ant"], tmp_path / "whole").path)
    part = split(copy, ["cat", "ant"], tmp_path / "part").path
    (part / "0001" / "chunk-0000.json").unlink()
    (part / "0001" / "chunk-0000.safetensors").write_bytes(b"half")
    split(copy, ["cat", "ant"], part)
    assert snapshot(part) == whole
    with pytest.raises(UserError, match="in use"):
        split(copy, ["ant", "cat"], part)
    (tmp_path / "older").mkdir()
    shutil.copytree(part / "0000", tmp_path / "older" / "0000")  # an older version's, interrupted
    with pytest.raises(UserError, match="in use"):
        split(copy, ["ant"], tmp_path / "older")


def test_only_images_below_the_folder_are_read(copy, pictures, tmp_path):
    from augment.bank.format import read_original
    from augment.core.errors import ImageRejected
    from augment.core.files import sha256

    (tmp_path / "secret").write_bytes(b"mine")
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images" / "pipe")
    for name in ("../secret", str(tmp_path / "secret"), "a/../../secret", "pipe", "none", "a\0b"):
        with pytest.raises(ImageRejected):
            read_original(tmp_path / "images", name, sha256(b"mine"))
    assert read_original(tmp_path, "secret", sha256(b"mine")) == b"mine"


def test_every_record_is_read_as_what_was_written(copy):
    from augment.bank.format import ChunkRecord, Manifest

    manifest = read_manifest(copy)
    assert manifest == read(Manifest, copy / "manifest.json") and manifest.schema == 3
    assert [len(c.chunks[0].ids) for c in manifest.classes] == list(COUNTS.values())
    record = read(ChunkRecord, copy / "0001" / "chunk-0000.json")
    assert record.home is not None and record.home.name == "bee" and record.home.label == 1
    assert record.settings == manifest.settings
