"""Captions and contexts: read, refused in one sentence, put into prompts."""

import json

import pytest
from conftest import paint

from augment import UserError
from augment.core.errors import AugmentWarning
from augment.sources import Folder
from augment.sources.captions import captions_of, read_contexts, with_context


@pytest.fixture
def photos(tmp_path):
    return Folder(paint(tmp_path / "photos", {"ant": 2, "bee": 1}))


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


def of(source, *leave):
    return [{"file_name": i, "text": f"seen: {i}"} for i, _ in source.samples if i not in leave]


def test_captions_of_a_metadata_file(photos, tmp_path):
    captions = captions_of(photos, lines(tmp_path / "metadata.jsonl", *of(photos)))
    assert captions == {i: f"seen: {i}" for i, _ in photos.samples}


def test_captions_beside_images(photos):
    for image_id, _ in photos.samples:
        (photos.root / image_id).with_suffix(".txt").write_text("été,\n on snow\n", "utf-8")
    again = Folder(photos.root)  # without a warning: the texts belong to images
    assert set(captions_of(again, "txt").values()) == {"été,  on snow"}
    (photos.root / "ant" / "notes.txt").write_text("a text of no image")
    with pytest.warns(AugmentWarning, match="1 file passed over: 1 txt"):
        Folder(photos.root)


def test_captions_of_some_images_are_refused(photos, tmp_path):
    some = lines(tmp_path / "metadata.jsonl", *of(photos, "ant/0.png", "bee/0.png"))
    with pytest.raises(UserError, match=r"each of 3 images, got none of 2, such as 'ant/0.png'; "):
        captions_of(photos, some)
    (photos.root / "ant" / "0.txt").write_text(" \n")
    (photos.root / "ant" / "1.txt").write_text("an ant")
    with pytest.raises(UserError, match="got none of 2"):  # an empty one is none
        captions_of(photos, "txt")


def test_contexts_of_a_text_file_or_a_column(tmp_path):
    text = tmp_path / "contexts.txt"
    text.write_text("\ufeffon  a beach\r\n\n  at dusk \n", encoding="utf-8")
    assert read_contexts(str(text)) == ("on a beach", "at dusk")
    table = lines(
        tmp_path / "m.jsonl", {"text": "a", "place": "on snow"}, {"text": "b", "place": ""}
    )
    assert read_contexts(table) == ("a", "b")
    assert read_contexts(f"{table}:place") == ("on snow",)


BAD = {
    "empty": (b" \n\n", "got an empty file"),
    "not UTF-8": (b"caf\xe9\n", "no UTF-8 text"),
    "no column": (b'{"text": "a"}\n{"text": 3}\n', "text.: …} in every line .* in line 2"),
    "missing": (None, "No such file"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_contexts_are_refused_in_one_sentence(fault, tmp_path):
    content, words = BAD[fault]
    path = tmp_path / ("contexts.jsonl" if fault == "no column" else "contexts.txt")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_contexts(str(path))
    assert "; " in str(caught.value) and "\n" not in str(caught.value)


def test_a_context_stands_where_a_prompt_says():
    assert with_context("an owl, {context}", "") == "an owl"
    assert with_context("", "on snow") == "on snow" and with_context("an owl", "") == "an owl"
