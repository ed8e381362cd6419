"""The bank: complete or refused, resumable to the same bytes, and never of the wrong model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import COUNTS, amend, paint, snapshot
from safetensors.torch import load_file

import augment.bank.fill
from augment import BankMismatch, ImageRejected, LatentBank, SyntheticDataset, UserError
from augment.bank.fill import InvertSettings, fill_bank
from augment.core.files import sha256
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.diffusion.process import Flow
from augment.diffusion.solver import sample
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


def test_the_records_name_every_image_and_digest_every_file(bank, pictures):
    manifest = json.loads((bank.path / "manifest.json").read_bytes())
    assert manifest["schema"] == 3
    assert manifest["latent_shape"] == [1, 8, 8]
    assert manifest["fingerprint"]["inversion"] == {
        "method": "forward_start", "solver": "fireflow", "steps": 4, "start": 0.04, "guidance": 1,
    }  # fmt: skip
    assert manifest["source"] == str(pictures)
    files = {"manifest.json"}
    for known in manifest["classes"]:
        (planned,) = known["chunks"]
        stem = f"{known['folder']}/chunk-0000"
        record = json.loads((bank.path / f"{stem}.json").read_bytes())
        assert [image["id"] for image in record["images"]] == planned["ids"]
        content = (bank.path / f"{stem}.safetensors").read_bytes()
        kept = {"bytes": len(content), "sha256": sha256(content)}
        assert record["files"]["latents"] == {**kept, "holds": ["errors", "latents", "norms"]}
        tensors = load_file(bank.path / f"{stem}.safetensors")
        assert tensors["latents"].dtype == torch.float16
        norms = tensors["latents"].float().flatten(1).norm(dim=1)
        torch.testing.assert_close(tensors["norms"], norms)
        for image in record["images"]:
            content = (pictures / image["id"]).read_bytes()
            assert (image["bytes"], image["sha256"]) == (len(content), sha256(content))
            assert image["side"] == 8
        means = tensors["latents"].float().mean((0, 2, 3)).tolist()
        assert record["statistics"]["channel_means"] == means
        files |= {known["folder"], f"{stem}.json", f"{stem}.safetensors"}
    assert set(snapshot(bank.path)) == files


def test_what_is_kept_beside_latents(bank, tmp_path, gaussian, pictures):
    source = Folder(pictures)
    images = torch.stack([source.load(i, 1, 8) for i in source.ids["bee"]])
    back = sample(gaussian, bank.latents("bee"), steps=STEPS)
    errors = (back - images).square().flatten(1).mean(1)
    torch.testing.assert_close(bank.errors("bee"), errors, rtol=1e-3, atol=1e-7)
    with pytest.raises(UserError, match="keeps clean"):
        bank.clean("bee")
    other = fill_bank(tmp_path / "b", gaussian, source, steps=STEPS, stored=["clean"])
    torch.testing.assert_close(other.clean("bee"), gaussian.encode(images).half().float())
    assert torch.equal(other.latents("bee"), bank.latents("bee"))
    with pytest.raises(UserError, match="keeps errors"):
        other.errors("bee")
    with pytest.raises(BankMismatch, match="kept"):
        fill_bank(tmp_path / "b", gaussian, source, steps=STEPS)
    with pytest.raises(UserError, match="errors or clean"):
        fill_bank(tmp_path / "c", gaussian, source, steps=STEPS, stored=["everything"])


def test_an_opened_bank_is_the_one_that_was_filled(bank):
    again = LatentBank.open(bank.path)
    assert again == bank
    assert again == LatentBank.open(str(bank.path))


def test_prompts_are_kept_by_class(tmp_path, gaussian, pictures):
    filled = fill_bank(tmp_path / "b", gaussian, Folder(pictures), {"bee": "a bee"}, steps=1)
    assert [filled.prompt(name) for name in COUNTS] == ["", "a bee", ""]


def test_filling_a_full_bank_again_changes_nothing(copy, gaussian, pictures, monkeypatch):
    before = snapshot(copy)
    monkeypatch.setattr(augment.bank.fill, "inverted", None)  # it would be an error to call it
    fill_bank(copy, gaussian, Folder(pictures), steps=STEPS)
    assert snapshot(copy) == before


@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_the_size_of_a_chunk_changes_no_latent(
    bank, chunk, tmp_path, gaussian, pictures, monkeypatch
):
    monkeypatch.setattr(augment.bank.fill, "CHUNK", chunk)
    other = fill_bank(tmp_path / "b", gaussian, Folder(pictures), steps=STEPS)
    parts = {1: 8, 2: 6, 256: 3}[chunk]  # a unit may end within a class
    assert len([name for name in chunks(other.path) if name.endswith(".safetensors")]) == parts
    for name in COUNTS:
        torch.testing.assert_close(other.latents(name), bank.latents(name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("calls", range(4))
def test_an_interrupted_bank_is_refused_until_the_same_command_completes_it(
    calls, tmp_path, gaussian, pictures, monkeypatch
):
    """The power goes off before unit number `calls` of the four there are, of two images each."""
    monkeypatch.setattr(augment.bank.fill, "CHUNK", 2)
    whole = fill_bank(tmp_path / "whole", gaussian, Folder(pictures), steps=STEPS)
    made = 0

    def invert_until_interrupted(*args):
        nonlocal made
        if made == calls:
            raise KeyboardInterrupt
        made += 1
        return inverted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(augment.bank.fill, "inverted", invert_until_interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill_bank(tmp_path / "part", gaussian, Folder(pictures), steps=STEPS)
    done = [name for name in chunks(tmp_path / "part") if name.endswith(".json")]
    assert len(done) == [0, 1, 3, 4][calls]
    with pytest.raises(UserError, match="run the command that made it again"):
        LatentBank.open(tmp_path / "part")
    early = {
        name: (tmp_path / "part" / name).stat().st_mtime_ns for name in chunks(tmp_path / "part")
    }
    fill_bank(tmp_path / "part", gaussian, Folder(pictures), steps=STEPS)
    assert snapshot(tmp_path / "part") == snapshot(whole.path)
    assert LatentBank.open(tmp_path / "part").members == whole.members
    for name, written in early.items():
        assert (tmp_path / "part" / name).stat().st_mtime_ns == written, "made a second time"


def test_a_folder_of_images_is_not_taken_for_a_bank_without_manifest(pictures):
    with pytest.raises(UserError, match="got a folder of images; make a bank of them with"):
        LatentBank.open(pictures)


def test_a_bank_that_does_not_say_its_backbone_asks_for_it(copy, pictures):
    amend(copy / "manifest.json", lambda manifest: manifest.update(recipe={}))
    settings = InvertSettings(images=str(pictures), bank=str(copy))
    with pytest.raises(UserError, match=r"got auto; name it with --backbone"):
        settings.model(settings.source())


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
    with pytest.raises(BankMismatch, match="make another bank"):
        fill_bank(copy, backbone, Folder(pictures), **{"steps": STEPS} | settings)
    assert snapshot(copy) == before


@pytest.mark.parametrize("other", [name for name, (_, model) in OTHERS.items() if model])
def test_a_bank_of_another_backbone_is_refused_by_the_dataset(other, bank):
    model = {"mean": 0.1, "latent_shape": (1, 8, 8)} | OTHERS[other][1]
    with pytest.raises(BankMismatch, match=str(bank.path)):
        SyntheticDataset(bank, GaussianBackbone(**model))


def fewer(root: Path) -> None:
    (root / "bee" / "0.png").unlink()


def renamed(root: Path) -> None:
    (root / "bee").rename(root / "wasp")


def repainted(root: Path) -> None:
    shutil.copy(root / "ant" / "1.png", root / "ant" / "0.png")


@pytest.mark.parametrize("change", [fewer, renamed, repainted])
def test_a_bank_of_other_images_is_not_touched(change, copy, tmp_path, gaussian, pictures):
    changed = shutil.copytree(pictures, tmp_path / "changed")
    change(changed)
    before = snapshot(copy)
    with pytest.raises(UserError, match="other"):
        fill_bank(copy, gaussian, Folder(changed), steps=STEPS)
    assert snapshot(copy) == before


def test_images_that_are_added_are_appended(copy, bank, tmp_path, gaussian, pictures, monkeypatch):
    grown = shutil.copytree(pictures, tmp_path / "grown")
    paint(grown, {"bat": 2}, seed=1)  # between ant and bee
    shutil.copy(grown / "bat" / "1.png", grown / "ant" / "01.png")
    before = snapshot(copy)
    after = fill_bank(copy, gaussian, Folder(grown), steps=STEPS)
    assert after.classes == ["ant", "bat", "bee", "cat"]
    assert after.members["ant"] == ("ant/0.png", "ant/1.png", "ant/2.png", "ant/01.png")
    for name in COUNTS:
        assert torch.equal(after.latents(name)[: COUNTS[name]], bank.latents(name))
    whole = fill_bank(tmp_path / "whole", gaussian, Folder(grown), steps=STEPS)
    order = [after.members["ant"].index(i) for i in whole.members["ant"]]
    torch.testing.assert_close(
        after.latents("ant")[order], whole.latents("ant"), rtol=1e-3, atol=1e-3
    )
    now = snapshot(copy)
    assert {name: now[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    monkeypatch.setattr(augment.bank.fill, "inverted", None)  # it would be an error to call it
    fill_bank(copy, gaussian, Folder(grown), steps=STEPS)
    assert snapshot(copy) == now


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
    with pytest.raises(UserError, match=r"cat/0\.png"):  # the last of the batch
        fill_bank(tmp_path / "b", backbone, Folder(pictures), steps=STEPS, max_rejects=0)
    assert not chunks(tmp_path / "b")


def test_a_latent_too_large_for_half_precision_is_refused_by_its_image(tmp_path, pictures):
    backbone = GaussianBackbone(mean=-1e6, latent_shape=(1, 8, 8))
    with pytest.raises(UserError, match=r"ant/0\.png"):
        fill_bank(tmp_path / "b", backbone, Folder(pictures), steps=1)


BROKEN = [b"", b"\x89PNG\r\n\x1a\n", b"not an image"]


@pytest.mark.parametrize("content", BROKEN)
def test_too_many_corrupt_images_stop_the_job_and_a_mended_one_lets_it_go_on(
    content, tmp_path, gaussian
):
    root = paint(tmp_path / "images")
    whole = fill_bank(tmp_path / "whole", gaussian, Folder(root), steps=1)
    good = (root / "cat" / "0.png").read_bytes()
    (root / "cat" / "0.png").write_bytes(content)
    with pytest.raises(ImageRejected, match=r"cat/0\.png"):
        fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1, max_rejects=0)
    assert not chunks(tmp_path / "b")
    (root / "cat" / "0.png").write_bytes(good)
    fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1)
    assert snapshot(tmp_path / "b") == snapshot(whole.path)


@pytest.mark.parametrize("content", BROKEN)
def test_a_few_corrupt_images_are_left_out_and_listed_until_they_are_mended(
    content, tmp_path, gaussian
):
    root = paint(tmp_path / "images")
    good = (root / "bee" / "1.png").read_bytes()
    (root / "bee" / "1.png").write_bytes(content)
    filled = fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1, max_rejects=0.2)
    assert filled.members["bee"] == ("bee/0.png", "bee/2.png", "bee/3.png")
    assert len(filled.latents("bee")) == 3
    (line,) = (tmp_path / "b" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "bee/1.png" and json.loads(line)["reason"]
    before = snapshot(tmp_path / "b")
    fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1, max_rejects=0.2)
    assert snapshot(tmp_path / "b") == before
    (root / "bee" / "1.png").write_bytes(good)
    repaired = fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1, max_rejects=0.2)
    assert repaired.members["bee"] == ("bee/0.png", "bee/2.png", "bee/3.png", "bee/1.png")
    assert repaired.latents("bee").isfinite().all()


def test_images_that_go_before_they_were_inverted_are_forgotten(tmp_path, gaussian, monkeypatch):
    root = paint(tmp_path / "images", {"ant": 3, "bee": 4})
    monkeypatch.setattr(augment.bank.fill, "CHUNK", 3)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(augment.bank.fill, "inverted", stop)
        fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1)
    (root / "bee" / "1.png").unlink()
    filled = fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1)
    assert sorted(filled.members["bee"]) == ["bee/0.png", "bee/2.png", "bee/3.png"]
    assert len(filled.members["ant"]) == 3


def test_a_class_without_a_single_image_is_named(tmp_path, gaussian):
    root = paint(tmp_path / "images")
    (root / "cat" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="'cat'"):
        fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1, max_rejects=0.5)
    shutil.rmtree(root / "cat")
    filled = fill_bank(tmp_path / "b", gaussian, Folder(root), steps=1, max_rejects=0.5)
    assert filled.classes == ["ant", "bee"]


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


GARBAGE = ["", "{", "[]", "3", "null", '"bank"', "{}", '{"schema": 1}', '{"schema": 3}']
INCOMPLETE = ['{"schema": 2}', '{"schema": 2, "fingerprint": {}, "classes": [{}]}']


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
