"""Sources: list files, any data set, some images of another; what banks and commands take."""

import pickle
import sys
import warnings
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import paint
from PIL import Image
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from augment import UserError, cli, fill_bank, sources
from augment.core.errors import AugmentWarning, ImageRejected
from augment.sources import (
    FewShot,
    Folder,
    ImageNetLT,
    INaturalist18,
    Items,
    ListFile,
    LongTail,
    Slice,
)
from augment.sources.decoding import open_image
from augment.sources.source import choose_backbone

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets
    import torchvision

FISH, BIRD = "n01440764", "n01514668"


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """ImageNet-1k and the lists of ImageNet-LT in miniature."""
    root = paint(tmp_path / "imagenet", {f"train/{FISH}": 3, f"train/{BIRD}": 2, f"val/{BIRD}": 1})
    fish, bird = f"train/{FISH}/%d.png 0\n", f"train/{BIRD}/0.png 1\n"
    (root / "ImageNet_LT_train.txt").write_text(fish % 0 + bird + fish % 2)
    (root / "ImageNet_LT_val.txt").write_text(fish % 1)
    (root / "ImageNet_LT_test.txt").write_text(f"val/{BIRD}/0.png 1\r\n")
    return root


def test_splits_of_imagenet_lt_agree_about_classes(imagenet):
    train, val, test = (ImageNetLT(imagenet, split) for split in ("train", "val", "test"))
    assert train.ids[FISH] == [f"train/{FISH}/0.png", f"train/{FISH}/2.png"]
    assert (train.counts, train.targets) == ([2, 1], [0, 0, 1])
    assert train.classes == val.classes == test.classes == [FISH, BIRD]
    assert (val.counts, test.counts, test[0][1]) == ([1, 0], [0, 1], 1)
    (imagenet / "ImageNet_LT_test.txt").rename(imagenet / "val" / "ImageNet_LT_test.txt")
    with pytest.warns(AugmentWarning, match=r"1 labels below 1 without an image \(0\)"):
        alone = ImageNetLT(imagenet, "test", lists=imagenet / "val", target_transform=str)
    assert (alone.classes, alone[0][1]) == (["0", BIRD], "1")  # no train list, no fish
    source = listed(imagenet, f"train/{FISH}/0.png 0\ntrain/{FISH}/9.png 0\n")
    with pytest.raises(ImageRejected, match=r"9\.png"):  # which was not looked for before
        source[1]


def listed(root: Path, text: str, **options) -> ListFile:
    (root / "list.txt").write_text(text)
    return ListFile(root, root / "list.txt", **options)


NAMES = {
    "folders": ("a/x/1.png 0\na/y/1.png 1\n", ["x", "y"]),
    "paths with blanks": ("\ufeffa/the x/0.png\t0\n./a//y/1.png 1", ["the x", "y"]),
    "one folder for all": ("a/1.png 0\na/2.png 1\n", ["0", "1"]),
    "several folders": ("a/x/1.png 0\nb/x/2.png 0\na/z/1.png 0\na/y/1.png 1\n", ["0", "y"]),
    "labels without images": ("a/y/1.png 2\n", ["0", "1", "y"]),
    "folders of numbers": ("a/0/1.png 0\na/1/1.png 1\n", ["0", "1"]),
    "folders of other numbers": ("a/1/1.png 0\na/0/1.png 1\n", ["0", "1"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_labels_are_named_by_folders_that_tell_them_apart(tmp_path, case):
    text, names = NAMES[case]
    paint((tmp_path / text.lstrip("\ufeff").split("\n")[0][:-2]).parent, {"": 2})
    gaps = case == "labels without images"
    with pytest.warns(AugmentWarning, match="number the classes") if gaps else nullcontext():
        source = listed(tmp_path, text)
    assert (source.classes, len(source)) == (names, len(text.splitlines()))


def hugging_face() -> datasets.Dataset:
    features = {"picture": datasets.Image(), "what": datasets.ClassLabel(names=["a/b", "c"])}
    rows = {"picture": [Image.new("L", (9, 8), k) for k in (0, 99, 200)], "what": [1, 0, 1]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def cifar(root: Path) -> torchvision.datasets.CIFAR10:
    """CIFAR-10's own class on a test batch of three images."""
    (folder := root / "cifar-10-batches-py").mkdir()
    names, data = (
        ["airplane", "automobile", "bird"],
        np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8),
    )
    (folder / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": [2, 0, 2]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.MonkeyPatch.context() as patch:  # of its checksums
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
        return torchvision.datasets.CIFAR10(str(root), train=False)


def test_any_data_set_is_a_source(tmp_path):
    tensors = TensorDataset(torch.rand(3, 1, 8, 9), torch.tensor([1, 0, 1]))
    folder = torchvision.datasets.ImageFolder(str(paint(tmp_path / "two", {"ant": 2, "bee": 1})))
    array, whole = np.zeros((8, 9, 3), np.uint8), torchvision.transforms.ToTensor()
    shifted = torchvision.datasets.ImageFolder(folder.root, whole, lambda label: 1 - label)
    fake = torchvision.datasets.FakeData(3, (3, 8, 9), num_classes=1)
    kinds = {
        "CIFAR10": (cifar(tmp_path), ["airplane", "automobile", "bird"], [0, 2, 2], "RGB"),
        "ImageFolder": (folder, ["ant", "bee"], [0, 0, 1], "RGB"),
        "changed labels": (shifted, ["ant", "bee"], [0, 1, 1], "RGB"),
        "Subset": (Subset(folder, [2, 0]), ["ant", "bee"], [0, 1], "RGB"),
        "Concat": (ConcatDataset([folder, folder]), ["ant", "bee"], [0, 0, 0, 0, 1, 1], "RGB"),
        "FakeData": (fake, ["0"], [0, 0, 0], "RGB"),
        "tensors": (tensors, ["0", "1"], [0, 1, 1], "L"),
        "arrays": ([(array, 1), (array[..., 0], np.int64(0))], ["0", "1"], [0, 1], "L"),
        "deep": ([(Image.new("I;16", (9, 8), 257), 0)], ["0"], [0], "L"),
        "transparent": ([(Image.new("RGBA", (9, 8)), 0)], ["0"], [0], "RGB"),
        "Hugging Face": (hugging_face(), ["a/b", "c"], [0, 1, 1], "L"),
    }
    for name, (dataset, classes, targets, mode) in kinds.items():
        source = sources.as_source(dataset)
        assert (source.classes, source.targets) == (classes, targets), name
        assert source[0][0].mode == mode, name
        for image_id, label in source.samples:
            image, content = source.open(image_id), Items(dataset).read(image_id)
            assert image.tobytes() == open_image(content).tobytes(), name
            assert source.size(image_id) == len(content), name
            assert image_id.split("/")[0] == classes[label].replace("/", "_"), name


class Broken(list):
    targets = (0, 0)

    def __getitem__(self, index):
        raise KeyError("gone")


def test_an_item_that_cannot_be_read_is_a_rejected_image():
    source = Items(Broken([0, 0]))
    with pytest.raises(ImageRejected, match=r"0/000001 .*gone"):
        source[1]
    with pytest.raises(OSError, match="gone"):  # as of a file
        source.read("0/000001")
    assert source.size("0/000001") == 0


def many(*counts: int) -> Items:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Items(TensorDataset(torch.zeros(1).expand(len(labels), 1, 2, 2), labels))


def test_few_shots_are_nested_and_in_order():
    source = many(9, 7)
    draws = [FewShot(source, shots, seed=3) for shots in (1, 2, 5)]
    for fewer, more in pairwise(draws):
        assert all(set(fewer.ids[c]) < set(more.ids[c]) for c in source.classes)
    assert draws[-1].ids["0"] == sorted(draws[-1].ids["0"])
    assert not set(FewShot(source, 2, seed=3, skip=5).ids["1"]) & set(draws[-1].ids["1"])
    rng = np.random.default_rng(3)  # as DA-Fusion has it: one generator, class after class
    assert [sorted(rng.permutation(n)[:2]) for n in (9, 7)] == [
        [source.ids[c].index(i) for i in draws[1].ids[c]] for c in source.classes
    ]


def test_long_tails_have_the_published_profile_and_slices_hold_out(pictures):
    published = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]  # CIFAR-10-LT
    assert LongTail(many(*[5000] * 10), imbalance_factor=100).counts == published
    assert LongTail(many(8, 4), 4, largest=8).counts == [8, 2]
    train, held = Slice(FewShot(pictures, 1), last=1), Slice(many(5, 4), -1)
    assert (train.counts, held.counts) == ([1, 1, 1], [1, 1])
    assert Slice(many(5, 4), None, -1).counts == [4, 3]
    assert train.load("ant/0.png", 1, 8).shape == (1, 8, 8)
    assert train.read("ant/0.png") == (pictures / "ant/0.png").read_bytes()


GREY, OTHER = torch.zeros(1, 4, 4), hugging_face().add_column("other", [0, 1, 0])
FAULTS = {
    "no label": (lambda r: listed(r, "a.png\n"), "line 1"),
    "a fraction for a label": (lambda r: listed(r, "ant/0.png 0\nb.png 1.5\n"), "line 2"),
    "a negative label": (lambda r: listed(r, "a.png -1\n"), "line 1"),
    "a huge label": (lambda r: listed(r, f"a.png {10**8}\n"), "without gaps"),
    "an absolute path": (lambda r: listed(r, "/etc/a.png 0\n"), "below the root in line 1"),
    "a path that leads out": (lambda r: listed(r, "x/../../a.png 0\n"), "below the root"),
    "a path twice": (lambda r: listed(r, "a.png 0\n\n./a.png 1\n"), "line 3"),
    "no lines": (lambda r: listed(r, "\n \n"), "path label"),
    "another root": (lambda r: listed(r, "b.png 0\n"), "correct the root"),
    "bytes for a list": (lambda r: listed(r, "\0\1\2"), "line 1"),
    "too few names": (lambda r: listed(r, "a.png 1\n", classes=["x"]), "2 or more distinct names"),
    "no root": (lambda r: ListFile(r / "no", r / "list.txt"), "is no folder"),
    "no list": (lambda r: INaturalist18(r, "val"), "iNaturalist18_val.txt, which cannot be read"),
    "an unknown split": (lambda r: INaturalist18(r, "test"), "out of train, val, got 'test'"),
    "no data set": (lambda r: Items(7), "length"),
    "several splits": (lambda r: Items({"train": []}), "'train'"),
    "no items": (lambda r: Items([]), "labels 0"),
    "images alone": (lambda r: Items([GREY]), "wrap"),
    "fractions for labels": (lambda r: Items([(GREY, 0.5)]), "integer labels"),
    "negative labels": (lambda r: Items([(GREY, -1)]), "without a label"),
    "labels with gaps": (lambda r: Items([(GREY, 10**8)]), "without gaps"),
    "normalised images": (lambda r: Items([(GREY - 1, 0)]), "float in [0, 1]"),
    "four channels": (lambda r: Items([(torch.zeros(4, 4, 4), 0)]), "1 or 3 channels"),
    "white unknown": (lambda r: Items([(Image.new("F", (4, 4)), 0)]), "mode F"),
    "two columns": (lambda r: Items(OTHER.class_encode_column("other")), "got what, other of"),
    "more shots than images": (lambda r: FewShot(r, 2), "class 'cat', got 1"),
    "no shots": (lambda r: FewShot(r, 0), "1 or more shots"),
    "a negative seed": (lambda r: FewShot(r, 1, seed=-1), "seed"),
    "a factor below one": (lambda r: LongTail(r, 0.5), "imbalance factor of 1"),
    "an empty tail": (lambda r: LongTail(r, 100), "leaves every class an image"),
    "too long a tail": (lambda r: LongTail(r, 2, largest=4), "class 'ant', got 3"),
    "an empty slice": (lambda r: Slice(r, 1), "class 'cat', got none of its 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_reported_in_one_sentence(tmp_path, fault):
    make, words = FAULTS[fault]
    with pytest.raises(UserError, match=r"^expected .*, got .*$") as caught:
        make(paint(tmp_path))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_banks_are_filled_from_lists_and_items_and_go_on(imagenet, tiny, tmp_path, monkeypatch):
    items = Items(TensorDataset(torch.rand(3, 1, 32, 32), torch.tensor([0, 1, 1])))
    lists = Slice(listed(paint(tmp_path / "p", {"ant": 2}, 32), "ant/0.png 0\nant/1.png 0\n"))
    for name, source in {"items": items, "lists": lists}.items():
        bank = fill_bank(tmp_path / name, tiny, source, steps=1)
        assert {c: list(ids) for c, ids in bank.members.items()} == source.ids
        with monkeypatch.context() as patch:
            patch.setattr("augment.bank.fill.inverted", None)  # nothing is made again
            assert fill_bank(tmp_path / name, tiny, source, steps=1).members == bank.members


def test_the_command_takes_any_source(tmp_path, monkeypatch, capsys):
    def invert(*args):
        monkeypatch.setattr(sys, "argv", ["latent-augment", "invert", *map(str, args)])
        cli.main()

    root = paint(tmp_path / "images", size=32)
    config, bank = tmp_path / "invert.yaml", tmp_path / "bank"
    few = f"{{class_path: FewShot, init_args: {{source: {root}, shots: %d}}}}"
    nested = f"images: {{class_path: Slice, init_args: {{source: {few % 1}}}}}"
    config.write_text(f"{nested}\nbank: {bank}\nsteps: 1\n")
    invert("--config", config)
    assert f"{bank}: 3 latents of 3 classes" in capsys.readouterr().out
    short = ["--images", "FewShot", "--images.source", root, "--images.shots", 1, "--steps=1"]
    invert(*short, "--bank", tmp_path / "other")
    config.write_text(f"images: {few % 9}\nbank: {bank}\n")
    for args in (["--config", config], [*short, "--links", "--bank", bank]):
        with pytest.raises(SystemExit, match="2"):
            invert(*args)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "class 'ant', got 3" in error or "links with a folder" in error


def test_the_embedded_backbone_for_images_goes_by_their_colour(tmp_path):
    root = paint(tmp_path / "photos", {"a": 40}, size=8)
    source = Folder(root)
    assert choose_backbone("auto", source.examples()) == "tiny"
    assert choose_backbone("sd15", source.examples()) == "sd15"
    assert len(list(source.examples())) == 14 and len(list(source.examples(40))) == 40
    (root / "a" / "0.png").write_text("no image")
    assert len(list(source.examples())) == 13, "what cannot be read is left out"
    Image.new("RGB", (8, 8), "red").save(root / "a" / source.ids["a"][3].split("/")[1])
    assert choose_backbone("auto", source.examples()) == "tiny-cifar"
