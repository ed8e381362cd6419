"""Exports with names of classes and a card, as parquet, and to a stand-in for the hub."""

import base64
import hashlib
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import call, paint, snapshot
from huggingface_hub import DatasetCard, constants
from shard_folders import fill, picture, plan, same, small_job

from augment import UserError
from augment.diffusion import BACKBONES
from augment.diffusion.checkpoints.licences import LICENCES, licence_of
from augment.jobs.job import run
from augment.shards.card import COLUMNS
from augment.shards.export import export_folder
from augment.shards.format import read_settings
from augment.shards.publish import push_folder

ROOT = Path(__file__).parents[2]
MIT = {"model_licence": "mit", "images_licence": "mit"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of 3 and 2 PNG images, not to be changed."""
    return fill(tmp_path_factory.mktemp("shards") / "folder", classes=["ant", "dev"])


def card(folder):
    return DatasetCard.load(folder / "README.md")


def load(*args, cache, **options):
    import datasets

    return datasets.load_dataset(*args, cache_dir=str(cache), split="train", **options)


# --- labels with names


@pytest.mark.parametrize("parquet", [False, True])
def test_synthetic_images_are_joined_to_real_ones(parquet, shards, tmp_path):
    """A class may be named like a split; the real images have columns of their own."""
    import datasets

    out, cache = tmp_path / "out", tmp_path / "cache"
    export_folder(shards, out, parquet)
    made = load(str(out), cache=cache)
    images = paint(tmp_path / "real", {"ant": 2, "dev": 1})
    real = load("imagefolder", data_dir=str(images), data_files={"train": "**"}, cache=cache)
    both = datasets.concatenate_datasets([real, made])
    assert both.features["label"].names == ["ant", "dev"]
    assert both["label"] == [0, 0, 1, 0, 1, 0, 1, 0]
    assert both["members"] == [None] * 3 + [list(plan(key).members) for key in range(5)]
    assert both["seed"][3:] == [0] * 5
    assert all(same(both[3 + key]["image"], picture(key)) for key in range(5))
    assert set(made.features) == {"image", *COLUMNS} - {"prompt", "guidance"}


def test_parquet_names_the_classes_without_its_card(shards, tmp_path):
    export_folder(shards, tmp_path / "out", parquet=True)
    files = sorted(str(path) for path in (tmp_path / "out" / "data").iterdir())
    assert [Path(file).name[:14] for file in files] == ["train-00000-of", "train-00001-of"]
    found = load("parquet", data_files=files, cache=tmp_path / "cache")
    assert found.features["label"].names == ["ant", "dev"]
    assert found[4]["image"].size == (8, 8)


def test_an_export_to_parquet_goes_on_and_is_not_mixed_with_files(shards, tmp_path):
    export_folder(shards, tmp_path / "out", parquet=True)
    before = snapshot(tmp_path / "out")
    next((tmp_path / "out" / "data").iterdir()).unlink()
    export_folder(shards, tmp_path / "out", parquet=True)
    assert snapshot(tmp_path / "out") == before
    export_folder(shards, tmp_path / "files")
    for place, parquet in (("out", False), ("files", True)):
        with pytest.raises(UserError, match="choose another place"):
            export_folder(shards, tmp_path / place, parquet)
    assert snapshot(tmp_path / "out") == before


def test_parquet_of_other_images_is_written_anew(tmp_path):
    """Nothing but the images differs, as after another rule."""
    for size in (8, 12):
        folder = fill(tmp_path / f"{size}", (2, 1), size=size)
        for name in ("out", f"alone-{size}"):
            export_folder(folder, tmp_path / name, parquet=True)
        alone = snapshot(tmp_path / f"alone-{size}" / "data")
        assert snapshot(tmp_path / "out" / "data") == alone


def test_plans_of_strangers_are_no_parquet(tmp_path):
    folder = fill(tmp_path / "s", (1,), about={"plan": {"seed": "x"}})
    with pytest.raises(UserError, match=r"expected plans as .* export without parquet") as caught:
        export_folder(folder, tmp_path / "out", parquet=True)
    assert "\n" not in str(caught.value)


# --- the card


def test_a_card_says_how_the_images_were_made_and_under_which_licences(tmp_path, bank, gaussian):
    job = small_job(tmp_path, bank, gaussian)
    run(job)
    out = tmp_path / "out"
    assert read_settings(out).licence is None  # of a backbone that no table names
    export_folder(out, tmp_path / "f", model_licence="openrail++", images_licence="cc-by-4.0")
    found = card(tmp_path / "f")
    assert found.data.license == ["cc-by-4.0", "openrail++"]
    assert found.data.task_categories == ["image-classification"]
    for line in (
        "| licence of the model | openrail++ |",
        "| licence of the real images | cc-by-4.0 |",
        "| rule | fade/chm |",
        "| fresh noise | 0.3 |",
        "| guidance | 1.0 |",
        "| seed | 0 |",
        f"| ant | 8 | {len(bank.members['ant'])} |",
    ):
        assert line in found.text, found.text
    assert 'load_dataset("path/to/this/folder", split="train")' in found.text


@pytest.mark.parametrize(
    ("model", "images", "license"),
    [
        ("mit", "mit", {"license": "mit"}),
        ("openrail++", "mit", {"license": ["mit", "openrail++"]}),
        (
            "stabilityai-ai-community",
            "mit",
            {"license": "other", "license_name": "mit-and-stabilityai-ai-community"},
        ),
        ("mit", None, {}),
        (None, "mit", {}),
    ],
)
def test_a_card_names_a_licence_if_both_are_known(model, images, license, shards, tmp_path):
    export_folder(shards, tmp_path, model_licence=model, images_licence=images)
    head = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert {key: head.get(key) for key in license} == license
    assert ("license" in head) == bool(license)
    assert head.get("license_link", "https://").startswith("https://")


def test_names_of_classes_do_not_break_a_card(tmp_path):
    names = ["no", "a|b: <i> 'ü' #1"]
    folder = fill(tmp_path / "s", classes=names)
    export_folder(folder, tmp_path / "out")
    found = card(tmp_path / "out")
    label = next(f for f in found.data.configs[0]["features"] if f["name"] == "label")
    assert label["dtype"]["class_label"]["names"] == dict(zip("01", names, strict=True))
    assert r"| a\|b: \<i> 'ü' #1 | 2 |" in found.text


def test_a_card_is_renewed_unless_it_was_edited(shards, tmp_path):
    export_folder(shards, tmp_path)
    export_folder(shards, tmp_path, **MIT)
    assert card(tmp_path).data.license == "mit"
    (tmp_path / "README.md").write_text("mine")
    export_folder(shards, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


# --- licences of models


def test_every_backbone_has_a_licence_that_the_page_names():
    assert LICENCES.keys() == BACKBONES.keys()
    page = (ROOT / "docs" / "licences.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for name, licence in LICENCES.items():
        assert any(f"`{name}`" in row and f"`{licence}`" in row for row in rows), name


def test_a_licence_is_known_by_name_and_repository_and_not_with_strange_weights():
    assert licence_of({"name_or_path": "stabilityai/stable-diffusion-xl-base-1.0"}) == "openrail++"
    for recipe in ({}, {"name_or_path": "/a/b"}, {"name_or_path": "sd15", "lora": "me/lora"}):
        assert licence_of(recipe) is None


def test_shards_name_the_licence_and_older_ones_go_on_without(tmp_path, bank, gaussian):
    manifest = replace(bank.manifest, recipe={"name_or_path": "sdxl"})
    known = replace(bank, manifest=manifest)
    run(small_job(tmp_path, bank, gaussian))  # as of a version that knows no licences
    before = snapshot(tmp_path / "out")
    run(small_job(tmp_path, known, gaussian))
    assert snapshot(tmp_path / "out") == before
    run(small_job(tmp_path, known, gaussian, "other"))
    assert read_settings(tmp_path / "other").licence == "openrail++"
    export_folder(tmp_path / "other", tmp_path / "f", images_licence="mit")
    assert card(tmp_path / "f").data.license == ["mit", "openrail++"]


# --- to the hub


class Hub(ThreadingHTTPServer):
    """The part of the Hugging Face hub that uploads use, on this machine."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Desk)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.created, self.commits, self.refuse = {}, [], 0, False
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Desk(BaseHTTPRequestHandler):
    """Answers one request to a `Hub`."""

    def log_message(self, *_):
        """Say nothing."""

    def do_POST(self):
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self.reply({"url": f"{hub.url}/datasets/me/mine"}, 409 if hub.files else 200)
        if self.path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            known = {path: {"oid": hub.files[path][0]} for path in paths if path in hub.files}
            usual = {"uploadMode": "regular", "shouldIgnore": False}
            files = [{"path": path, **usual, **known.get(path, {})} for path in paths]
            return self.reply({"files": files})
        assert "/api/datasets/me/mine/commit/main" in self.path, self.path
        if hub.refuse:
            return self.reply({"error": "No write token."}, 403)
        hub.commits += 1
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                hub.files[line["value"]["path"]] = (oid, content)
        url = f"{hub.url}/datasets/me/mine/commit/{'0' * 40}"
        return self.reply({"success": True, "commitOid": "0" * 40, "commitUrl": url})

    def do_GET(self):
        self.reply({"id": "me/mine", "sha": "0" * 40, "siblings": []})

    def reply(self, answer, status=200):
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    yield hub
    hub.shutdown()
    hub.server_close()


def test_an_export_is_pushed_once(shards, hub, tmp_path, monkeypatch, capsys):
    command = ("export", shards, "--out", tmp_path / "out", "--push", "me/mine")
    for missing, option in (("model", "--images-licence"), ("images", "--model-licence")):
        code, _, words = call(monkeypatch, capsys, *command, option, "mit")
        assert code == 2 and f"no licence of the {missing} (--{missing}-licence)" in words
        assert words.count("\n") == 1
    assert not (tmp_path / "out").exists() and not hub.created
    command += ("--images-licence", "mit", "--model-licence", "mit")
    hub.refuse = True
    code, _, words = call(monkeypatch, capsys, *command)
    assert code == 2 and "No write token" in words and "run the same command again" in words
    hub.refuse = False
    code, words, _ = call(monkeypatch, capsys, *command)
    assert code == 0 and f"uploaded to {hub.url}/datasets/me/mine" in words
    assert hub.created[0] == {
        "name": "mine", "organization": "me", "type": "dataset", "visibility": "private",
    }  # fmt: skip
    sent = {path: content for path, (_, content) in hub.files.items()}
    assert sent == {k: v for k, v in snapshot(tmp_path / "out").items() if v}
    assert 'load_dataset("me/mine", split="train")' in sent["README.md"].decode()
    assert call(monkeypatch, capsys, *command)[0] == 0
    assert hub.commits == 1


def test_many_images_are_pushed_as_parquet(shards, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("augment.shards.publish.MAX_FILES", 4)
    command = ("export", shards, "--out", tmp_path / "out", "--push", "me/mine")
    code, _, words = call(
        monkeypatch, capsys, *command, "--images-licence", "mit", "--model-licence", "mit"
    )
    assert code == 0, words
    names = {".origins.json", "README.md"}
    names |= {f"data/train-{number:05d}-of-00002.parquet" for number in range(2)}
    assert set(hub.files) == names


@pytest.mark.parametrize("name", ["mine", "a/b/c", "../x", ""])
def test_a_dataset_has_an_owner_and_a_name(name, tmp_path):
    with pytest.raises(UserError, match="owner/name"):
        push_folder(tmp_path, name)
