"""Captions at inversion and contexts in sampling, from files to images and shards."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from checkpoints import stable_diffusion
from conftest import amend, call, paint, snapshot

from augment import LatentBank, Mixing, Plan, Planner, Synthesizer, UserError, load_backbone
from augment.bank.fill import fill_bank
from augment.report.evaluate import sampled_by
from augment.report.gallery import Gallery
from augment.report.provenance import Provenance, invert_command, synthesize_command
from augment.shards.dataset import open_shards
from augment.shards.format import read_settings
from augment.shards.write import write_shards
from augment.sources import Folder
from augment.synthesis.synthesizer import Undoing, planner_of

pytestmark = pytest.mark.filterwarnings("ignore:expected images of about 32")
CONTEXTS = tuple(f"context {number}" for number in range(10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, device="cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return Folder(paint(tmp_path_factory.mktemp("photos"), {"ant": 2, "bee": 2}))


@pytest.fixture(scope="module")
def sd_bank(backbone, photos, tmp_path_factory):
    return fill_bank(
        tmp_path_factory.mktemp("bank"), backbone, photos, None, "ddim", steps=1, stored=()
    )


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "contexts.txt"
    path.write_text("on a beach\nat dusk\non snow\n")
    return path


def test_a_context_is_drawn_beside_everything_else():
    images = {"ant": ("a", "b"), "bee": ("c",)}
    plain, drawn = Planner(images), Planner(images, contexts=CONTEXTS)
    plans = [drawn(0, index) for index in range(400)]
    assert [replace(plan, context="") for plan in plans] == [plain(0, i) for i in range(400)]
    for name in images:  # whatever the class
        counts = Counter(plan.context for plan in plans if plan.class_name == name)
        assert counts.keys() == set(CONTEXTS) and max(counts.values()) < 45
    assert plans[7] == Planner(images, contexts=CONTEXTS)(0, 7)  # a function of the place alone


def test_plans_without_a_context_keep_their_bytes():
    plan = Plan(0, "ant", ("a",), (1.0,), 0.0, 1, 2, 3)
    old = (
        '{"label": 0, "class_name": "ant", "members": ["a"], "weights": [1.0], "noise": 0.0, '
        '"seed": 1, "epoch": 2, "index": 3, "classes": []}'
    )
    assert plan.to_json() == old and Plan.from_json(old) == plan
    drawn = replace(plan, context="on snow")
    assert '"context": "on snow"' in drawn.to_json() and Plan.from_json(drawn.to_json()) == drawn


def test_the_context_is_in_the_prompt_of_its_image(sd_bank, backbone):
    name = "ant"
    plain = Plan.equal(0, name, sd_bank.members[name])
    plan = replace(plain, context="on snow")
    synthesizer = Synthesizer(backbone, sd_bank)
    assert synthesizer.text(plan) == "a photo of an ant, on snow"
    written = {name: "a photo of an ant, on snow"}
    expected = Synthesizer(backbone, sd_bank, prompts=written).images([plain])
    image = synthesizer.images([plan])
    torch.testing.assert_close(image, expected, rtol=0, atol=0)
    assert not torch.equal(image, synthesizer.images([plain]))
    placed = Synthesizer(backbone, sd_bank, prompts={name: "a photo of an ant, {context}"})
    torch.testing.assert_close(placed.images([plan]), expected, rtol=0, atol=0)


def test_contexts_beside_embeddings_are_refused(sd_bank, backbone):
    text = {"ant": backbone.condition(["an ant"])["text"]}
    plan = replace(Plan.equal(0, "ant", sd_bank.members["ant"]), context="on snow")
    with pytest.raises(UserError, match=r"prompts beside contexts, got Tensor for class 'ant'"):
        Synthesizer(backbone, sd_bank, prompts=text).images([plan])


def test_shards_keep_context_prompt_and_guidance(sd_bank, backbone, file, tmp_path):
    planner = planner_of(sd_bank, Mixing(contexts=str(file)))
    shards = write_shards(Synthesizer(backbone, sd_bank), planner, 2, tmp_path / "s")
    for row in range(len(shards)):
        plan, about = shards.plan(row), shards.about(row)
        assert plan == planner(0, row) and plan.context in file.read_text().splitlines()
        words = "an ant" if row % 2 == 0 else "a bee"
        assert about["prompt"] == f"a photo of {words}, {plan.context}"
        assert shards.metadata(row)["prompt"] == about["prompt"]
        assert about["guidance"] == 7.5
    assert len(read_settings(tmp_path / "s").contexts or "") == 64
    provenance = Provenance.of(sd_bank, tmp_path / "s")
    assert provenance.folder is not None
    assert "# contexts were drawn from a file" in synthesize_command(provenance, provenance.folder)
    assert ".plan(0)" in provenance.python(shards.plan(0), "fade/chm", 0)
    assert sampled_by(shards) == {"prompt": shards.about(0)["prompt"], "guidance": 7.5}
    gallery = Gallery(provenance, None, [], None)
    record = next(gallery._kept("ant")).record()
    assert record["context"] == shards.plan(0).context and "level" not in record
    assert (record["prompt"], record["guidance"]) == (shards.about(0)["prompt"], 7.5)
    file.write_text("elsewhere\n")
    other = planner_of(sd_bank, Mixing(contexts=str(file)))
    with pytest.raises(UserError, match=r"same settings, got images of others \(contexts\)"):
        write_shards(Synthesizer(backbone, sd_bank), other, 2, tmp_path / "s")


def test_a_context_that_is_too_long_is_refused_before_anything_is_written(
    sd_bank, backbone, tmp_path
):
    planner = Planner(sd_bank.members, contexts=("on snow",) * 200 + ("far " * 80,))
    with pytest.raises(UserError, match="at most 75 tokens"):
        write_shards(Synthesizer(backbone, sd_bank), planner, 1, tmp_path / "s")
    assert not (tmp_path / "s" / "synthesis.json").exists()


def test_the_command_takes_contexts_and_a_template(sd_bank, file, tmp_path, monkeypatch, capsys):
    shards = ("synthesize", sd_bank.path, "--per-class", 1, "--device", "cpu", "--out")
    more = ("--contexts", file, "--prompt", "{context}: {article} {name}")
    code, _, error = call(monkeypatch, capsys, *shards, tmp_path / "s", *more)
    assert code == 0, error
    made = open_shards(tmp_path / "s")
    assert made.about(0)["prompt"] == f"{made.plan(0).context}: an ant"
    file.write_bytes(b"\xff\xfe")
    for options, words in (
        (more[:2], "no UTF-8 text"),
        (more[2:], "no field but {name}"),
        (("--contexts", tmp_path / "no"), "No such file"),
    ):
        code, _, error = call(monkeypatch, capsys, *shards, tmp_path / "bad", *options)
        assert code == 2 and words in error and not (tmp_path / "bad").exists()


def test_contexts_beside_a_backbone_without_their_words_are_refused(bank, tiny, tmp_path, pictures):
    known = fill_bank(tmp_path / "b", tiny, Folder(pictures), steps=1, stored=())
    planner = Planner(known.members, contexts=("on snow",))
    with pytest.raises(
        UserError, match=r"a prompt out of those of tiny, such as .*, got 'on snow'"
    ):
        write_shards(Synthesizer(tiny, known), planner, 1, tmp_path / "s")
    assert not (tmp_path / "s" / "synthesis.json").exists()


@pytest.fixture
def captions(photos):
    return {image_id: f"an insect, {n} of all" for n, (image_id, _) in enumerate(photos.samples)}


def test_images_are_inverted_with_their_captions(backbone, photos, captions, sd_bank, tmp_path):
    options = {"stored": (), "captions": captions}
    bank = fill_bank(tmp_path / "b", backbone, photos, None, "ddim", steps=1, **options)
    records = [i for chunks in bank.chunks.values() for c in chunks for i in c.record.images]
    assert {image.id: image.caption for image in records} == captions
    assert bank.prompt("ant") == "a photo of an ant" and bank.guidance == 7.5
    lonely = dict.fromkeys(photos.ids, captions["ant/0.png"])
    same = fill_bank(tmp_path / "c", backbone, photos, lonely, "ddim", steps=1, stored=())
    assert torch.equal(bank.latents("ant")[0], same.latents("ant")[0])
    assert not torch.equal(bank.latents("ant"), sd_bank.latents("ant"))
    fill_bank(tmp_path / "b", backbone, photos, None, "ddim", steps=1, **options)  # it is resumed
    other = captions | {"bee/0.png": "a wasp"}
    with pytest.raises(UserError, match=r"captions that the bank .* of bee/0.png, got 'a wasp'"):
        fill_bank(
            tmp_path / "b", backbone, photos, None, "ddim", steps=1, stored=(), captions=other
        )
    with pytest.raises(UserError, match="captions"):
        fill_bank(tmp_path / "b", backbone, photos, None, "ddim", steps=1, stored=())
    assert "--captions" in invert_command(LatentBank.open(bank.path))


def test_images_are_sampled_back_with_their_captions(backbone, photos, captions, tmp_path):
    bank = fill_bank(tmp_path / "b", backbone, photos, None, "ddim", steps=2, captions=captions)
    plans = [
        Plan.equal(0, "ant", [image_id], row) for row, image_id in enumerate(photos.ids["ant"])
    ]
    undoing = Undoing(backbone, bank)
    assert undoing.text(plans[1]) == captions["ant/1.png"]
    real = torch.stack([photos.load(i, 3, 32) for i in photos.ids["ant"]])
    errors = (undoing.images(plans) - real).square().flatten(1).mean(1)
    torch.testing.assert_close(errors, bank.errors("ant"), rtol=1e-3, atol=0)
    plain = Synthesizer(backbone, bank, undoing.rule, undoing.sampling).images(plans)
    assert not torch.allclose(plain, undoing.images(plans), atol=1e-5)


def test_bad_captions_leave_no_bank(folder, photos, captions, tmp_path, monkeypatch, capsys):
    file, bank = tmp_path / "metadata.jsonl", tmp_path / "bank"
    invert = ("invert", "--images", photos.root, "--backbone", folder, "--device", "cpu")
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    for some, words in ((rows[:2], "got none of 2"), ([rows[0] | {"text": 1}], "in line 1")):
        file.write_text("\n".join(map(json.dumps, some)))
        code, _, error = call(monkeypatch, capsys, *invert, "--bank", bank, "--captions", file)
        assert code == 2 and words in error and not bank.exists()
    rows[3]["text"] = "far " * 80
    file.write_text("\n".join(map(json.dumps, rows)))
    code, _, error = call(monkeypatch, capsys, *invert, "--bank", bank, "--captions", file)
    assert code == 2 and "at most 75 tokens" in error and not bank.exists()


def test_records_without_captions_keep_their_bytes(sd_bank):
    assert not any(b"caption" in content for content in snapshot(sd_bank.path).values())
    amend(sd_bank.path / "manifest.json", lambda manifest: None)
    assert LatentBank.open(sd_bank.path).digest == sd_bank.digest
