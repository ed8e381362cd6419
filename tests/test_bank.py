"""The bank: complete or refused, resumable to the same bytes, and never of the wrong model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import COUNTS, paint, snapshot
from safetensors.torch import load_file

import augment.bank
from augment import BankMismatch, ImageRejected, LatentBank, SyntheticDataset, UserError
from augment.bank import fill_bank
from augment.diffusion.gaussian import GaussianBackbone
from augment.diffusion.process import Flow
from augment.files import sha256
from augment.inversion import inverted, inverter
from augment.sources import Folder

STEPS = 4


@pytest.fixture
def copy(bank: LatentBank, tmp_path: Path) -> Path:
    """A bank to harm."""
    return shutil.copytree(bank.path, tmp_path / "copy")


def chunks(path: Path) -> dict[str, bytes]:
    return {name: content for name, content in snapshot(path).items() if "chunk" in name}


def test_a_bank_holds_every_image_of_every_class(bank, pictures):
    source = Folder(pictures)
    assert bank.classes == list(COUNTS) == source.classes
    assert {name: list(ids) for name, ids in bank.members.items()} == source.ids
    for name, count in COUNTS.items():
        assert bank.latents(name).shape == (count, 1, 8, 8)
        assert bank.latents(name).dtype == torch.float32
        assert bank.prompt(name) == ""


def test_latents_are_those_of_their_images_in_half_precision(bank, gaussian, pictures):
    source = Folder(pictures)
    for name, ids in source.ids.items():
        images = torch.stack([source.load(i, 1, 8) for i in ids])
        seeds = [int(sha256(source.read(i))[:8], 16) for i in ids]  # its noise is the file's own
        run = inverter("forward_start", steps=STEPS)
        expected = inverted(run, gaussian, images, seeds=seeds)["latents"]
        torch.testing.assert_close(bank.latents(name), expected.half().float())


def test_the_manifest_names_every_image_and_digests_every_file(bank, pictures):
    manifest = json.loads((bank.path / "manifest.json").read_bytes())
    assert manifest["schema"] == 1
    assert manifest["latent_shape"] == [1, 8, 8]
    assert manifest["fingerprint"]["inversion"] == {
        "method": "forward_start", "steps": 4, "start": 0.04, "guidance": 1,
    }  # fmt: skip
    named = [chunk for record in manifest["classes"] for chunk in record["chunks"]]
    for chunk in named:
        content = (bank.path / chunk["file"]).read_bytes()
        assert (len(content), sha256(content)) == (chunk["bytes"], chunk["sha256"])
        tensors = load_file(bank.path / chunk["file"])
        assert tensors["latents"].dtype == torch.float16
        norms = tensors["latents"].float().flatten(1).norm(dim=1)
        torch.testing.assert_close(tensors["norms"], norms, rtol=1e-3, atol=0)
        for image in chunk["images"]:
            assert image["sha256"] == sha256((pictures / image["id"]).read_bytes())
    assert set(snapshot(bank.path)) == {
        "manifest.json", *(f"{n:04d}" for n in range(3)), *(chunk["file"] for chunk in named)
    }  # fmt: skip


def test_an_opened_bank_is_the_one_that_was_filled(bank):
    again = LatentBank.open(bank.path)
    assert again == bank
    assert again == LatentBank.open(str(bank.path))


def test_prompts_are_kept_by_class(tmp_path, gaussian, pictures):
    filled = fill_bank(tmp_path / "b", gaussian, Folder(pictures), {"bee": "a bee"}, steps=1)
    assert [filled.prompt(name) for name in COUNTS] == ["", "a bee", ""]


def test_filling_a_full_bank_again_changes_nothing(copy, gaussian, pictures, monkeypatch):
    before = snapshot(copy)
    monkeypatch.setattr(augment.bank, "inverted", None)  # it would be an error to call it
    fill_bank(copy, gaussian, Folder(pictures), steps=STEPS)
    assert snapshot(copy) == before


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_the_size_of_a_chunk_changes_no_latent(
    bank, chunk, tmp_path, gaussian, pictures, monkeypatch
):
    monkeypatch.setattr(augment.bank, "CHUNK", chunk)
    other = fill_bank(tmp_path / "b", gaussian, Folder(pictures), steps=STEPS)
    assert len(chunks(other.path)) == sum(-(-count // chunk) for count in COUNTS.values())
    for name in COUNTS:
        torch.testing.assert_close(other.latents(name), bank.latents(name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("calls", range(5))
def test_an_interrupted_bank_is_refused_until_the_same_command_completes_it(
    calls, tmp_path, gaussian, pictures, monkeypatch
):
    """The power goes off before chunk number `calls` of the five there are (2, 2 and 1)."""
    monkeypatch.setattr(augment.bank, "CHUNK", 2)
    whole = fill_bank(tmp_path / "whole", gaussian, Folder(pictures), steps=STEPS)
    made = 0

    def invert_until_interrupted(*args):
        nonlocal made
        if made == calls:
            raise KeyboardInterrupt
        made += 1
        return inverted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(augment.bank, "inverted", invert_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill_bank(tmp_path / "part", gaussian, Folder(pictures), steps=STEPS)
    assert len(chunks(tmp_path / "part")) == calls
    with pytest.raises(UserError, match="run the same latent-augment invert command again"):
        LatentBank.open(tmp_path / "part")
    early = {
        name: (tmp_path / "part" / name).stat().st_mtime_ns for name in chunks(tmp_path / "part")
    }
    fill_bank(tmp_path / "part", gaussian, Folder(pictures), steps=STEPS)
    assert chunks(tmp_path / "part") == chunks(whole.path)
    assert LatentBank.open(tmp_path / "part").members == whole.members
    for name, written in early.items():
        assert (tmp_path / "part" / name).stat().st_mtime_ns == written, "made a second time"


OTHERS = {
    "steps": ({"steps": 5}, {}),
    "guidance": ({"guidance": 2.0}, {}),
    "mean": ({}, {"mean": 0.2}),
    "std": ({}, {"std": 0.2}),
    "process": ({}, {"process": Flow()}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_bank_of_other_settings_is_not_touched(other, copy, pictures):
    settings, model = OTHERS[other]
    backbone = GaussianBackbone(**{"mean": 0.1, "latent_shape": (1, 8, 8)} | model)
    before = snapshot(copy)
    with pytest.raises(BankMismatch, match="rebuild"):
        fill_bank(copy, backbone, Folder(pictures), **{"steps": STEPS} | settings)
    assert snapshot(copy) == before


@pytest.mark.parametrize("other", [name for name, (_, model) in OTHERS.items() if model])
def test_a_bank_of_another_backbone_is_refused_by_the_dataset(other, bank):
    model = {"mean": 0.1, "latent_shape": (1, 8, 8)} | OTHERS[other][1]
    with pytest.raises(BankMismatch, match=str(bank.path)):
        SyntheticDataset(bank, GaussianBackbone(**model))


def more(root: Path) -> None:
    shutil.copy(root / "ant" / "0.png", root / "ant" / "9.png")


def fewer(root: Path) -> None:
    (root / "bee" / "0.png").unlink()


def renamed(root: Path) -> None:
    (root / "bee").rename(root / "wasp")


def repainted(root: Path) -> None:
    shutil.copy(root / "ant" / "1.png", root / "ant" / "0.png")


@pytest.mark.parametrize("change", [more, fewer, renamed, repainted])
def test_a_bank_of_other_images_is_not_touched(change, copy, tmp_path, gaussian, pictures):
    changed = shutil.copytree(pictures, tmp_path / "changed")
    change(changed)
    before = snapshot(copy)
    with pytest.raises(UserError, match="other"):
        fill_bank(copy, gaussian, Folder(changed), steps=STEPS)
    assert snapshot(copy) == before


def test_a_bank_of_other_prompts_is_not_touched(copy, gaussian, pictures):
    with pytest.raises(UserError, match="prompts"):
        fill_bank(copy, gaussian, Folder(pictures), {"bee": "a bee"}, steps=STEPS)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
def test_a_harmed_chunk_is_refused_by_name_and_the_others_still_open(harm, copy):
    harm(copy / "0001" / "chunk-0000.safetensors")
    opened = LatentBank.open(copy)
    with pytest.raises(UserError, match=r"0001/chunk-0000\.safetensors"):
        opened.latents("bee")
    assert opened.latents("ant").isfinite().all()


class NotFinite(GaussianBackbone):
    def network(self, latent, timestep, condition):
        output = super().network(latent, timestep, condition).clone()
        output[-1, 0, 0, 0] = torch.inf
        return output


def test_a_latent_that_is_not_finite_is_refused_by_its_image(tmp_path, pictures):
    backbone = NotFinite(latent_shape=(1, 8, 8))
    with pytest.raises(UserError, match=r"ant/2\.png"):
        fill_bank(tmp_path / "b", backbone, Folder(pictures), steps=STEPS)
    assert not chunks(tmp_path / "b")


def test_a_latent_too_large_for_half_precision_is_refused_by_its_image(tmp_path, pictures):
    backbone = GaussianBackbone(mean=-1e6, latent_shape=(1, 8, 8))
    with pytest.raises(UserError, match=r"ant/0\.png"):
        fill_bank(tmp_path / "b", backbone, Folder(pictures), steps=1)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"not an image"])
def test_a_corrupt_image_stops_the_job_before_anything_is_written(content, tmp_path, gaussian):
    root = paint(tmp_path / "images")
    (root / "cat" / "0.png").write_bytes(content)
    with pytest.raises(ImageRejected, match=r"cat/0\.png"):
        fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1)
    assert not (tmp_path / "b").exists()


BAD_SETTINGS = {
    "unknown inversion": ({"inversion": "edict"}, "ddim"),
    "no steps": ({"steps": 0}, "1 solver step"),
    "no batch": ({"batch_size": 0}, "batch"),
    "prompt of no class": ({"prompts": {"wasp": "a wasp"}}, "wasp"),
}


@pytest.mark.parametrize("fault", BAD_SETTINGS)
def test_bad_settings_leave_no_half_made_bank(fault, tmp_path, gaussian, pictures):
    settings, words = BAD_SETTINGS[fault]
    with pytest.raises(UserError) as caught:
        fill_bank(tmp_path / "b", gaussian, Folder(pictures), **{"steps": 1} | settings)
    assert words in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_a_bank_cannot_take_the_place_of_a_file(tmp_path, gaussian, pictures):
    (tmp_path / "b").write_text("mine")
    with pytest.raises(UserError, match=str(tmp_path / "b")):
        fill_bank(tmp_path / "b", gaussian, Folder(pictures), steps=1)
    assert (tmp_path / "b").read_text() == "mine"


GARBAGE = ["", "{", "[]", "3", "null", '"bank"', "{}", '{"schema": 0}', '{"schema": 2}']
INCOMPLETE = ['{"schema": 1}', '{"schema": 1, "fingerprint": {}, "classes": [{}]}']


@pytest.mark.parametrize("content", GARBAGE + INCOMPLETE)
def test_a_manifest_that_is_garbage_is_refused(content, tmp_path, gaussian, pictures):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path)):
        LatentBank.open(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        fill_bank(tmp_path, gaussian, Folder(pictures), steps=STEPS)
    assert (tmp_path / "manifest.json").read_text() == content


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_where_there_is_no_bank_none_is_opened(place, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="expected a bank"):
        LatentBank.open(tmp_path / place)


def test_a_subset_shows_the_kept_images_under_the_same_labels(bank):
    part = bank.subset(lambda image_id: not image_id.endswith("1.png"))
    assert part.classes == bank.classes
    assert part.members["bee"] == ("bee/0.png", "bee/2.png", "bee/3.png")
    assert torch.equal(part.latents("bee"), bank.latents("bee")[[0, 2, 3]])
    assert part.subset(lambda image_id: True) == part
    with pytest.raises(UserError, match="'cat'"):
        bank.subset(lambda image_id: not image_id.startswith("cat"))


def test_an_unknown_class_is_answered_with_the_right_ones(bank):
    for ask in (bank.latents, bank.prompt):
        with pytest.raises(UserError, match=", ".join(COUNTS)):
            ask("wasp")
