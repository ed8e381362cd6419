"""What goes wrong on real disks: each fault is listed, repaired, or one clear sentence."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COUNTS, amend, paint, snapshot
from PIL import Image, PngImagePlugin

from augment import BankMismatch, UserError
from augment.bank.bank import LatentBank
from augment.bank.fill import InversionJob, fill_bank
from augment.bank.merge import merge, split
from augment.bank.verify import discard
from augment.cli import main
from augment.core.errors import AugmentWarning
from augment.core.files import locked, write_bytes
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.inversion import inverter
from augment.jobs.job import planning_device, run
from augment.shards.verify import verify
from augment.sources import Folder

RAMP = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (16, 1))
UPRIGHT = {1: RAMP, 3: RAMP[::-1, ::-1], 6: RAMP.T[::-1], 8: RAMP.T[:, ::-1]}


def rotated(path: Path) -> None:
    """A ramp stored a quarter turn off, with the note that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(RAMP).copy()).save(path, exif=exif)


def cmyk(path: Path) -> None:
    Image.fromarray(RAMP).convert("RGB").convert("CMYK").save(path, "JPEG", quality=100)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)


def palette(path: Path) -> None:
    Image.fromarray(RAMP).convert("P").save(path)


def transparent(path: Path) -> None:
    Image.fromarray(RAMP).convert("RGBA").save(path)


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))


def animated(path: Path) -> None:
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def enormous(path: Path) -> None:
    """A header of 50 000 × 50 000 pixels, and nothing to fill them with."""
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        size = (50_000).to_bytes(4, "big")
        PngImagePlugin.putchunk(file, b"IHDR", size, size, b"\x08\x00\x00\x00\x00")
        PngImagePlugin.putchunk(file, b"IDAT", b"\x78\x9c\x03\x00\x00\x00\x00\x01")
        PngImagePlugin.putchunk(file, b"IEND")


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_strip(path: Path) -> None:
    """A kilobyte that, enlarged, would be gigabytes."""
    Image.new("L", (60_000, 4)).save(path)


def odd_exif(path: Path) -> None:
    """A note on orientation whose tags end in the middle."""
    content = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0"
    Image.fromarray(RAMP).save(path, "JPEG", exif=content)


def a_dead_link(path: Path) -> None:
    path.symlink_to("nothing.png")


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("paint_it", [cmyk, sixteen_bits, palette, transparent, rotated])
def test_unusual_images_are_read_as_what_they_show(paint_it, tmp_path):
    backbone = GaussianBackbone(latent_shape=(1, 16, 16))
    paint(tmp_path / "images", {"ant": 1}, size=16)
    paint_it(tmp_path / "images" / "ant" / "odd.png")
    bank = fill_bank(
        tmp_path / "b", backbone, Folder(tmp_path / "images"), steps=1, stored=["clean"]
    )
    assert bank.members["ant"] == ("ant/0.png", "ant/odd.png")
    shown = backbone.decode(bank.clean("ant")[1:])[0, 0]
    assert (shown - torch.from_numpy(RAMP / np.float32(255))).abs().max() < 0.03


REASONS = {
    zero_bytes: "empty",
    truncated: "truncated",
    corrupt: "",
    animated: "animation",
    enormous: "pixels",
    a_folder: "Not a regular file",
    a_pipe: "Not a regular file",
    a_strip: "strip",
    a_dead_link: "No such file",
    a_loop: "links",
}


@pytest.mark.parametrize("paint_it", REASONS)
def test_images_of_no_use_are_left_out_with_the_reason(paint_it, tmp_path, gaussian):
    paint(tmp_path / "images", {"ant": 19})
    paint_it(tmp_path / "images" / "ant" / "odd.png")
    source = Folder(tmp_path / "images")
    bank = fill_bank(tmp_path / "b", gaussian, source, steps=1)
    before = snapshot(tmp_path / "b")
    fill_bank(tmp_path / "b", gaussian, source, steps=1)
    assert snapshot(tmp_path / "b") == before, "it is not tried again as long as it is the same"
    assert len(bank.members["ant"]) == 19
    (line,) = (tmp_path / "b" / "rejects.jsonl").read_text().splitlines()
    reject = json.loads(line)
    assert reject["id"] == "ant/odd.png"
    assert REASONS[paint_it] in reject["reason"] and reject["reason"]
    assert verify(tmp_path / "b") == []


class Odd(GaussianBackbone):
    """Gives one image, the darkest, a latent of no use."""

    def __init__(self, value: float) -> None:
        super().__init__(latent_shape=(1, 8, 8))
        self.value = value

    def network(self, latent, timestep, condition):
        output = super().network(latent, timestep, condition).clone()
        return torch.where(self.dark.view(-1, 1, 1, 1), self.value * torch.ones(()), output)

    def encode(self, images):
        clean = super().encode(images)
        self.dark = images.flatten(1).mean(1) < 0.05
        return clean


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "NaN"), (float("inf"), "NaN")])
def test_latents_that_are_not_finite_are_left_out(value, reason, tmp_path):
    paint(tmp_path / "images", {"ant": 19})
    Image.new("L", (8, 8)).save(tmp_path / "images" / "ant" / "dark.png")
    bank = fill_bank(tmp_path / "b", Odd(value), Folder(tmp_path / "images"), steps=2, stored=[])
    assert len(bank.members["ant"]) == 19 and bank.latents("ant").isfinite().all()
    assert reason in (tmp_path / "b" / "rejects.jsonl").read_text()


class NoWayBack(GaussianBackbone):
    """Decodes dark images to what is no number, as a VAE in half precision may."""

    def decode(self, clean):
        images = super().decode(clean)
        return torch.where(images.mean((1, 2, 3), keepdim=True) < 0.25, torch.nan, images)


def test_latents_that_give_no_image_back_are_left_out(tmp_path):
    paint(tmp_path / "images", {"ant": 19})
    Image.new("L", (8, 8), 1).save(tmp_path / "images" / "ant" / "dark.png")
    backbone, source = NoWayBack(latent_shape=(1, 8, 8)), Folder(tmp_path / "images")
    bank = fill_bank(tmp_path / "b", backbone, source, steps=2)
    assert len(bank.members["ant"]) == 19 and bank.errors("ant").isfinite().all()
    assert "no image back" in (tmp_path / "b" / "rejects.jsonl").read_text()


def test_constant_latents_are_left_out(tmp_path, gaussian):
    paint(tmp_path / "images", {"ant": 19})
    Image.new("L", (8, 8)).save(tmp_path / "images" / "ant" / "dark.png")
    source = Folder(tmp_path / "images")
    bank = fill_bank(tmp_path / "b", gaussian, source, inversion="ddim", steps=2)
    assert len(bank.members["ant"]) == 19
    assert "constant" in (tmp_path / "b" / "rejects.jsonl").read_text()


NAMES = {
    "unicode": "Käfer-虫-🐞",
    "spaces": " a bee ",
    "hash": "a#b",
    "percent": "100%25 bee",
    "newline": "two\nlines",
    "question": "what?",
    "quotes": 'it\'s "a" bee',
    "brace": "{0..9}",
    "backslash": "a\\b",
    "long": "x" * 240,
    "dash": "-rf",
    "no UTF-8": os.fsdecode(b"caf\xe9"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_only_names(name, tmp_path, gaussian):
    paint(tmp_path / "images", {NAMES[name]: 2, "plain": 2})
    odd = tmp_path / "images" / "plain" / f"{NAMES[name]}.png"
    (tmp_path / "images" / "plain" / "1.png").rename(odd)
    source = Folder(tmp_path / "images")
    bank = fill_bank(tmp_path / "b", gaussian, source, steps=1)
    assert set(bank.classes) == {NAMES[name], "plain"}
    assert bank.members["plain"][-1 if name != "dash" else 0] in source.ids["plain"]
    assert bank.latents(NAMES[name]).shape == (2, 1, 8, 8)
    assert verify(tmp_path / "b", tmp_path / "images") == []
    before = snapshot(tmp_path / "b")
    fill_bank(tmp_path / "b", gaussian, source, steps=1)
    assert snapshot(tmp_path / "b") == before


def test_commands_print_names_that_are_not_utf_8(tmp_path, monkeypatch, tiny):
    odd = os.fsdecode(b"caf\xe9")
    paint(tmp_path / "images", {odd: 3, "bee": 2}, size=28)
    bank = tmp_path / "b"
    fill_bank(bank, tiny, Folder(tmp_path / "images"), steps=1)
    for line in (
        ("inspect", bank),
        ("verify", bank, "--images", tmp_path / "images"),
        ("evaluate", bank, "--out", tmp_path / "evaluation"),
        ("split", bank, "--classes", odd, "--out", tmp_path / "s"),
    ):
        with (tmp_path / "out").open("w", encoding="utf-8") as strict, monkeypatch.context() as m:
            m.setattr(sys, "stdout", strict)
            m.setattr(sys, "argv", ["latent-augment", *map(str, line)])
            main()
        assert "caf" in (tmp_path / "out").read_text() or line[0] == "verify"


def test_names_that_differ_in_case_or_folder_alone_are_different(tmp_path, gaussian):
    paint(tmp_path / "images", {"ant": 2, "Ant": 2, "bee": 2})
    (tmp_path / "images" / "bee" / "1.png").rename(tmp_path / "images" / "bee" / "0.PNG")
    bank = fill_bank(tmp_path / "b", gaussian, Folder(tmp_path / "images"), steps=1)
    assert bank.classes == ["Ant", "ant", "bee"]
    assert bank.members["bee"] == ("bee/0.PNG", "bee/0.png")
    assert not torch.equal(bank.latents("ant"), bank.latents("Ant"))


def test_links_out_of_the_root_are_passed_over_unless_asked_for(tmp_path):
    paint(tmp_path / "images", {"ant": 2})
    paint(tmp_path / "elsewhere", {"bee": 2})
    (tmp_path / "images" / "ant" / "out.png").symlink_to(tmp_path / "elsewhere" / "bee" / "0.png")
    (tmp_path / "images" / "ant" / "in.png").symlink_to("0.png")
    (tmp_path / "images" / "bee").symlink_to(tmp_path / "elsewhere" / "bee")
    (tmp_path / "images" / "ant" / "back").symlink_to("..")
    with pytest.warns(AugmentWarning, match="2 links"):
        source = Folder(tmp_path / "images")
    assert source.ids == {"ant": ["ant/0.png", "ant/1.png", "ant/in.png"]}
    followed = Folder(tmp_path / "images", links=True)
    assert followed.classes == ["ant", "bee"] and "ant/out.png" in followed.ids["ant"]


@pytest.fixture
def copy(bank: LatentBank, tmp_path: Path) -> Path:
    return shutil.copytree(bank.path, tmp_path / "copy")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["chunk-0000.safetensors", "chunk-0000.json"])
@pytest.mark.parametrize("harm", [cut, empty, flip, Path.unlink])
def test_a_harmed_chunk_is_found_and_only_its_unit_is_made_again(
    harm, name, tmp_path, gaussian, pictures, monkeypatch
):
    monkeypatch.setattr("augment.bank.fill.CHUNK", 4)  # ant and a bee; three bees and the cat
    path = fill_bank(tmp_path / "b", gaussian, Folder(pictures), steps=4).path
    whole, written = snapshot(path), (path / "0000" / "chunk-0000.safetensors").stat().st_mtime_ns
    harm(path / "0002" / name)
    findings = verify(path)
    assert len(findings) >= 1 and all("0002" in finding.what for finding in findings)
    discard(findings)
    fill_bank(path, gaussian, Folder(pictures), steps=4)
    assert snapshot(path) == whole
    assert verify(path, pictures) == []
    assert (path / "0000" / "chunk-0000.safetensors").stat().st_mtime_ns == written


def test_every_way_to_cut_a_chunk_is_noticed_before_it_is_mapped(copy):
    path = copy / "0001" / "chunk-0000.safetensors"
    content = path.read_bytes()
    for size in range(0, len(content), 64):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="bytes instead of"):
            LatentBank.open(copy).latents("bee")
    path.write_bytes(content)
    opened = LatentBank.open(copy)
    assert opened.latents("bee").isfinite().all()
    path.write_bytes(content[:100])  # after its digest was checked once
    with pytest.raises(UserError, match="another size"):
        opened.latents("bee")


def test_notes_that_cannot_be_read_do_no_more_than_leave_an_image_out(tmp_path, gaussian):
    paint(tmp_path / "images", {"ant": 19})
    odd_exif(tmp_path / "images" / "ant" / "odd.png")
    bank = fill_bank(tmp_path / "b", gaussian, Folder(tmp_path / "images"), steps=1)
    assert 19 <= len(bank.members["ant"]) <= 20


def test_what_was_read_stays_when_the_file_is_cut(copy):
    opened = LatentBank.open(copy)
    errors, near = opened.errors("bee"), opened.to("cpu")
    kept, path = errors.clone(), copy / "0001" / "chunk-0000.safetensors"
    expected = opened.latents("bee")
    os.truncate(path, 0)
    assert torch.equal(errors, kept)
    assert torch.equal(near.latents("bee"), expected)


def drop_an_image(record: dict) -> None:
    del record["images"][0]


def swap_two(record: dict) -> None:
    record["images"].reverse()


@pytest.mark.parametrize("harm", [drop_an_image, swap_two])
def test_a_record_that_is_not_of_its_images_is_refused(harm, copy, gaussian, pictures, bank):
    path = copy / "0001" / "chunk-0000.json"
    record = json.loads(path.read_text())
    harm(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match="commit record"):
        LatentBank.open(copy)
    assert any("commit record" in finding.what for finding in verify(copy))
    fill_bank(copy, gaussian, Folder(pictures), steps=4)
    assert snapshot(copy) == snapshot(bank.path)


def test_a_file_of_another_chunk_is_refused(copy):
    """Its record says so too; but it has fewer rows than images were planned."""
    for suffix in ("safetensors", "json"):
        shutil.copy(copy / "0000" / f"chunk-0000.{suffix}", copy / "0001" / f"chunk-0000.{suffix}")
    with pytest.raises(UserError, match="commit record"):
        LatentBank.open(copy)
    shutil.rmtree(copy / "0001")
    shutil.copytree(copy / "0000", copy / "0001")
    with pytest.raises(UserError, match="another chunk"):
        LatentBank.open(copy).latents("ant")


def test_a_mended_image_is_there_once_whatever_was_killed(tmp_path, gaussian, monkeypatch):
    root = paint(tmp_path / "images", {"ant": 3, "bee": 3})
    good = (root / "ant" / "1.png").read_bytes()
    (root / "ant" / "1.png").write_bytes(bytes(len(good)))  # of the same size
    options = {"steps": 1, "max_rejects": 0.5}
    bank = fill_bank(tmp_path / "b", gaussian, Folder(root), **options)
    assert bank.members["ant"] == ("ant/0.png", "ant/2.png")
    (tmp_path / "b" / "0001" / "chunk-0000.json").unlink()  # as if killed between two chunks
    (root / "ant" / "1.png").write_bytes(good)
    bank = fill_bank(tmp_path / "b", gaussian, Folder(root), **options)
    assert sorted(bank.members["ant"]) == ["ant/0.png", "ant/1.png", "ant/2.png"]
    assert not (tmp_path / "b" / "rejects.jsonl").exists()
    flip(tmp_path / "b" / "0000" / "chunk-0000.safetensors")
    discard(verify(tmp_path / "b"))
    bank = fill_bank(tmp_path / "b", gaussian, Folder(root), **options)
    assert sorted(bank.members["ant"]) == ["ant/0.png", "ant/1.png", "ant/2.png"]
    assert verify(tmp_path / "b", root) == []


def test_a_class_that_is_removed_leaves_nothing_to_the_next(tmp_path, gaussian):
    root = paint(tmp_path / "images", {"ant": 3, "dog": 1})
    (root / "dog" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="'dog'"):
        fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1, max_rejects=0.5)
    shutil.rmtree(root / "dog")
    fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1)
    paint(root, {"elk": 2})
    bank = fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1)
    assert len(bank.members["elk"]) == 2 and verify(tmp_path / "b") == []


def test_nothing_of_the_users_is_swept_away(tmp_path, gaussian, pictures):
    home = tmp_path / "home"
    home.mkdir()
    for name in (".draft.tmp", ".note.1.tmp", ".x.1.0123abcd.tmpx"):
        (home / name).write_text("mine")
    before = snapshot(home)
    with pytest.raises(UserError, match="in use"):
        fill_bank(home, gaussian, Folder(pictures), steps=1)
    assert snapshot(home) == before


def test_what_a_killed_rank_left_does_not_keep_others_out(tmp_path, gaussian, pictures):
    place = tmp_path / "b"
    place.mkdir()
    (place / ".manifest.json.123.0123abcd.tmp").write_text("half")
    method = inverter("forward_start", steps=4)
    for rank in (0, 1):
        run(InversionJob(place, Folder(pictures), gaussian, method), ranks=(rank, 2))
    assert verify(place) == []
    with locked(place, shared=True), locked(place, shared=True) as lock:
        (place / ".x.1.0123abcd.tmp").write_text("at work")
        lock.sweep()
        assert (place / ".x.1.0123abcd.tmp").exists()


def test_a_copy_that_was_interrupted_goes_on(bank, tmp_path, monkeypatch):
    import augment.bank.merge

    whole = merge([bank.path], tmp_path / "whole").path
    write = augment.bank.merge.write
    for calls in range(4):  # of the manifest, and of three records
        left = [calls]

        def stop(*args, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            write(*args)

        part = tmp_path / f"part-{calls}"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(augment.bank.merge, "write", stop)
            merge([bank.path], part)
        if calls:
            with pytest.raises(UserError, match="lacks"):
                LatentBank.open(part)
            with pytest.raises(UserError, match="in use"):  # of another bank, nothing is left
                split(bank.path, ["ant"], part)
        merge([bank.path], part)
        merge([bank.path], part)
        assert snapshot(part) == snapshot(whole)
    with pytest.raises(UserError, match="in both"):
        merge([bank.path, bank.path], tmp_path / "twice")


def test_what_does_not_belong_to_a_bank_is_told_of(copy, tmp_path):
    shutil.copy(copy / "0000" / "chunk-0000.safetensors", copy / "0000" / "chunk-0001.safetensors")
    (copy / "mine.txt").write_text("mine")
    assert [finding.what for finding in verify(copy)] == [
        "0000/chunk-0001.safetensors: not of this bank", "mine.txt: not of this bank"
    ]  # fmt: skip
    assert LatentBank.open(copy).latents("ant").shape[0] == COUNTS["ant"]


def test_images_that_changed_since_are_told_of(bank, pictures, tmp_path):
    changed = shutil.copytree(pictures, tmp_path / "images")
    flip(changed / "ant" / "0.png")
    (changed / "bee" / "1.png").unlink()
    assert [finding.what for finding in verify(bank.path, changed)] == [
        "image ant/0.png: another image",
        "image bee/1.png: no such file",
    ]


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of 64 KiB, if this machine lets us mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_one_sentence_and_loses_nothing(small_disk, tmp_path):
    backbone = GaussianBackbone(latent_shape=(1, 32, 32))
    source = Folder(paint(tmp_path / "images", {"ant": 8, "bee": 8, "cat": 8}, size=32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("augment.bank.fill.CHUNK", 8)
        with pytest.raises(UserError, match="No space left"):
            fill_bank(small_disk / "b", backbone, source, steps=1)
        done = [p for p in snapshot(small_disk / "b") if p.endswith(".json")]
        assert len(done) >= 2  # the manifest and a chunk
        assert not [p for p in snapshot(small_disk / "b") if p.endswith(".tmp")]
        moved = shutil.copytree(small_disk / "b", tmp_path / "b")
        fill_bank(moved, backbone, source, steps=1)
        whole = fill_bank(tmp_path / "whole", backbone, source, steps=1)
    assert snapshot(moved) == snapshot(whole.path)


@pytest.mark.parametrize("error", ["ENOSPC", "EROFS", "EDQUOT", "EIO"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(error, tmp_path, monkeypatch):
    import errno

    number = getattr(errno, error)

    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    write_bytes(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=os.strerror(number)):
        write_bytes(tmp_path / "file", b"new")
    assert snapshot(tmp_path) == {"file": b"old"}


def test_a_place_that_cannot_be_written_to_is_one_sentence(gaussian, pictures):
    with pytest.raises(UserError, match="/proc/bank"):
        fill_bank("/proc/bank", gaussian, Folder(pictures), steps=1)


def test_of_two_runs_on_one_folder_the_second_is_refused(copy, gaussian, pictures):
    with locked(copy), pytest.raises(UserError, match="another run"):
        fill_bank(copy, gaussian, Folder(pictures), steps=4)
    fill_bank(copy, gaussian, Folder(pictures), steps=4)


def test_ranks_of_one_job_work_side_by_side(copy):
    with (
        locked(copy, shared=True),
        locked(copy, shared=True),
        pytest.raises(UserError, match="another run"),
        locked(copy),
    ):
        pass


def test_where_there_are_no_locks_a_run_goes_on(copy, gaussian, pictures, monkeypatch):
    def fail(*args: object) -> None:
        raise OSError("not on this file system")

    monkeypatch.setattr(fcntl, "flock", fail)
    fill_bank(copy, gaussian, Folder(pictures), steps=4)


def test_an_older_schema_is_named(copy):
    amend(copy / "manifest.json", lambda record: record.update(schema=1))
    with pytest.raises(UserError, match=r"schema 2 or 3.*got schema 1"):
        LatentBank.open(copy)


OTHERS: dict[str, Callable[[dict], None]] = {
    "weights": lambda m: m["fingerprint"]["backbone"].update(weights="0"),
    "resolution": lambda m: m["fingerprint"]["backbone"].update(resolution="512"),
    "name": lambda m: m["fingerprint"]["backbone"].update(name="sd15"),
    "solver": lambda m: m["fingerprint"]["inversion"].update(solver="ddim"),
    "steps": lambda m: m["fingerprint"]["inversion"].update(steps=99),
    "preprocessing": lambda m: m["fingerprint"].update(preprocessing="none"),
}


@pytest.mark.parametrize("field", OTHERS)
def test_a_bank_made_otherwise_is_refused_by_the_field_that_differs(
    field, copy, gaussian, pictures
):
    amend(copy / "manifest.json", OTHERS[field])
    with pytest.raises(BankMismatch, match=field):
        fill_bank(copy, gaussian, Folder(pictures), steps=4)


def test_a_job_that_lost_a_file_knows_it(copy, gaussian, pictures):
    source = Folder(pictures)
    job = InversionJob(
        copy, source, gaussian, __import__("augment").inversion.inverter("forward_start", steps=4)
    )
    assert job.plan() == [sum(COUNTS.values())]
    assert job.committed(0) > 0
    cut(copy / "0002" / "chunk-0000.safetensors")
    assert job.committed(0) == 0


def test_a_file_is_not_written_in_place_of_a_folder(tmp_path):
    with pytest.raises(UserError, match="got a folder there; name a file in it"):
        write_bytes(tmp_path, b"page")
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob(".*.tmp"))


def test_a_dry_run_is_on_the_device_of_the_work():
    assert planning_device("cuda:0", "ray") == "cpu"
    assert planning_device("cuda:0", "ray", dry_run=True) == "cuda:0"
