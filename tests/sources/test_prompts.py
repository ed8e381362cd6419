"""Names of class folders, and the prompts made of them."""

import re

import pytest

from augment.core.errors import UserError
from augment.sources.prompts import class_name, class_prompts, imagenet_names

PHOTO = "a photo of a {name}"


def test_the_names_are_those_of_a_thousand_wordnet_ids_in_label_order():
    names = imagenet_names()
    assert len(names) == 1000
    assert list(names) == sorted(names)
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in names)
    assert (next(iter(names)), names["n01440764"]) == ("n01440764", "tench")
    assert list(names.items())[-1] == ("n15075141", "toilet tissue")


def test_the_label_order_is_the_classifiers():
    info = pytest.importorskip("timm.data").ImageNetInfo("imagenet-1k")
    assert list(imagenet_names()) == info.label_names()
    same = sum(
        name.casefold() in info.label_name_to_description(wnid).casefold()
        for wnid, name in imagenet_names().items()
    )
    assert same > 900  # the others have a word more


def test_names_are_words_and_each_is_another():
    names = imagenet_names().values()
    assert len({name.casefold() for name in names}) == 1000
    for name in names:
        assert re.fullmatch(r"[A-Za-z][A-Za-z' -]*[a-zA-Z]", name), name


@pytest.mark.parametrize(
    ("wnid", "name"),
    [
        ("n02012849", "crane bird"),
        ("n03126707", "construction crane"),
        ("n03710637", "maillot"),
        ("n03710721", "one-piece bathing suit"),
        ("n03773504", "missile"),
        ("n04008634", "projectile"),
        ("n04355933", "sunglass lens"),
        ("n04356056", "sunglasses"),
        ("n02113186", "Cardigan Welsh corgi"),
        ("n02963159", "cardigan"),
        ("n01608432", "kite bird"),
        ("n02105412", "kelpie dog"),
        ("n04389033", "army tank"),
        ("n03825788", "baby bottle nipple"),
    ],
)
def test_names_that_were_two_things_say_which(wnid, name):
    assert class_name(wnid) == name


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("200.Common_Yellowthroat", "Common Yellowthroat"),
        ("n02085620-Chihuahua", "Chihuahua"),
        ("n02086646-Blenheim_spaniel", "Blenheim spaniel"),
        ("007_golden-retriever", "golden retriever"),
        ("T-shirt", "T shirt"),
        ("apple_pie", "apple pie"),
        ("3-wheeler", "3 wheeler"),
        ("Boeing_737-800", "Boeing 737 800"),
        ("AM General Hummer SUV 2000", "AM General Hummer SUV 2000"),
        ("Käse_Brötchen", "Käse Brötchen"),
        ("001.東京タワー", "東京タワー"),
        ("007", "007"),
        ("3", "3"),
        ("001.", "001."),
        ("__", "__"),
        ("n123", "n123"),
    ],
)
def test_other_folders_are_their_words(folder, name):
    assert class_name(folder) == name


def test_a_wordnet_id_without_a_name_is_no_name():
    with pytest.raises(UserError, match=r"^expected a WordNet id of ImageNet-1k, got n00000001"):
        class_name("n00000001")
    prompts = class_prompts(["n00000001"], PHOTO, {"n00000001": "wug"})
    assert prompts == {"n00000001": "a photo of a wug"}


def test_prompts_keep_the_order_of_the_classes_and_take_single_names():
    classes = ["n01530575", "001.Black_footed_Albatross", "n01440764"]
    prompts = class_prompts(classes, "{name}, seen outdoors", {"n01440764": "green tench"})
    assert list(prompts.items()) == [
        ("n01530575", "brambling, seen outdoors"),
        ("001.Black_footed_Albatross", "Black footed Albatross, seen outdoors"),
        ("n01440764", "green tench, seen outdoors"),
    ]
    assert class_prompts([], PHOTO) == {}


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("owl", "an owl"),
        ("tench", "a tench"),
        ("Appenzeller dog", "an Appenzeller dog"),
        ("hourglass", "an hourglass"),
        ("house finch", "a house finch"),
        ("umbrella", "an umbrella"),
        ("unicycle", "a unicycle"),
        ("unimproved road", "an unimproved road"),
        ("European gallinule", "a European gallinule"),
        ("one-piece bathing suit", "a one-piece bathing suit"),
        ("onesie", "an onesie"),  # by its letters; a rule, not a dictionary
        ("{name}", "a {name}"),
    ],
)
def test_the_article_before_the_name_is_by_its_sound(name, phrase):
    for template in ("a photo of a {name}", "a photo of an {name}"):
        assert class_prompts(["c"], template, {"c": name})["c"] == f"a photo of {phrase}"
    said = class_prompts(["c"], "A {name}", {"c": name})["c"]
    assert said == phrase[0].upper() + phrase[1:]


def test_no_other_word_is_changed():
    prompts = class_prompts(["c"], "a big {name}, banana {name}: a cat", {"c": "owl"})
    assert prompts["c"] == "a big owl, banana owl: a cat"


def test_braces_and_the_folder_in_a_template():
    template = "{{a {name}}} in {folder}, {{name}}"
    assert class_prompts(["01_owl"], template) == {"01_owl": "{an owl} in 01_owl, {name}"}
    assert class_prompts(["c"], PHOTO, {"c": "{x} {"}) == {"c": "a photo of a {x} {"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a photo", r"expected {name} in a template, got 'a photo'; write"),
        ("", r"expected {name} in a template, got ''; write"),
        ("{folder}", r"expected {name} in a template"),
        ("{{name}}", r"expected {name} in a template"),
        ("{name} {wnid}", r"got one of 'wnid'"),
        ("{name} {}", r"got one of ''"),
        ("{name.upper}", r"got one of 'name.upper'"),
        ("{name!r}", r"got one of 'name'"),
        ("{name:>9}", r"got one of 'name'"),
        ("{name", r"expected a template such as"),
        ("{name}}", r"expected a template such as"),
    ],
)
def test_a_wrong_template_is_refused_in_one_sentence(template, message):
    with pytest.raises(UserError, match=message) as caught:
        class_prompts(["c"], template)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_of_no_class_is_refused():
    with pytest.raises(UserError, match=r"expected names for classes out of a, b, got one for 'd'"):
        class_prompts(["a", "b"], PHOTO, {"d": "dog"})


def test_the_file_carries_its_origin():
    from augment.sources.prompts import _NAMES

    assert _NAMES.read_text(encoding="utf-8").startswith("# The 1000 classes of ImageNet-1k")
    licence = _NAMES.with_suffix(".LICENSE").read_text(encoding="utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in licence
