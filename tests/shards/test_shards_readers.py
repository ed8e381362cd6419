"""Shards by other readers, and exported as a folder of images."""

import gc
import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import snapshot
from PIL import Image
from shard_folders import (
    CLASSES,
    ODD,
    expected,
    fill,
    picture,
    plan,
    same,
    sample,
    tars,
)
from torch.utils.data import DataLoader

import augment.shards.dataset
import augment.shards.export
from augment import UserError
from augment.core.errors import AugmentWarning
from augment.shards.dataset import open_shards, write_shard
from augment.shards.export import export_folder, to_webdataset
from augment.shards.format import (
    shard_path,
    write_info,
)
from augment.sources import Folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 3 and 2 PNG images, not to be damaged."""
    return fill(tmp_path_factory.mktemp("shards") / "folder")


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 4, 3 and 2 JPEG images of 32 pixels, not to be damaged."""
    return fill(tmp_path_factory.mktemp("jpegs") / "folder", (4, 3, 2), "jpg", size=32)


# --- other readers


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
    assert set(files) == {"metadata.jsonl", "README.md", ".origins.json", *names}
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
    (tmp_path / "out" / "ant" / "00000002.png").write_bytes(b"damaged")
    (tmp_path / "out" / "bee" / "00000003.png").unlink()
    export_folder(shards, tmp_path / "out")
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("calls", range(7))
def test_an_interrupted_export_goes_on(calls, shards, tmp_path, monkeypatch):
    """It is interrupted before file number `calls`: the card, five images, then the metadata."""
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
