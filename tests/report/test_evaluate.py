"""Evaluation of banks and of synthetic images, from Python and by the command."""

import csv
import json
import re
import shutil
import sys

import pytest
import torch
from PIL import Image

from augment import UserError
from augment.bank.fill import fill_bank
from augment.cli import main
from augment.diffusion import load_backbone
from augment.networks import feature_network
from augment.report.evaluate import evaluate_bank, evaluate_images, form_of
from augment.shards.dataset import open_images
from augment.sources import Folder
from augment.sources.fashion import write_fashion
from augment.sources.images import save_image

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judge():
    return feature_network("fashion", "", CPU)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return Folder(write_fashion(tmp_path_factory.mktemp("real"), "test", list(range(12))))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return Folder(write_fashion(tmp_path_factory.mktemp("other"), "test", list(range(100, 112))))


def value(found, name):
    return next(row["value"] for row in found.overall if row["measure"].startswith(name))


def test_real_images_are_good_and_copies_are_found_out(real, others, judge):
    fresh, same = (evaluate_images(x, real, judge, draws=20) for x in (others, real))
    assert value(same, "FID") == pytest.approx(0, abs=1e-6) and value(same, "copies") == 1
    assert value(fresh, "FID") > 1 and value(fresh, "copies") < 0.3
    assert value(fresh, "precision") > 0.6
    error = next(row["±"] for row in fresh.overall if row["measure"] == "KID")
    assert abs(value(fresh, "KID")) < 3 * error
    assert [row["class"] for row in fresh.classes] == list(real.classes)
    assert all(row["real"] == row["synthetic"] == 12 for row in fresh.classes)


def test_synthetic_images_that_repeat_each_other_are_counted(real, others, judge, tmp_path):
    """Of the first class all are the same image; of the second two are."""
    first, second = others.classes[:2]
    for name, copies in ((first, 4), (second, 2)):
        for row, image_id in enumerate(others.ids[name][:4]):
            (tmp_path / name).mkdir(exist_ok=True)
            source = others.ids[name][0] if row < copies else image_id
            shutil.copy(others.root / source, tmp_path / name / f"{row}.png")
    found = evaluate_images(Folder(tmp_path), real, judge, draws=0)
    shares = {row["class"]: row["alike"] for row in found.classes}
    assert shares[first] == 1 and 0.5 <= shares[second] < 1
    assert value(found, "alike") == pytest.approx((shares[first] + shares[second]) / 2)
    assert value(evaluate_images(others, real, judge, draws=0), "alike") < 0.3


def test_classes_without_synthetic_images_are_named(real, others, judge, tmp_path):
    for name in others.classes[:2]:
        shutil.copytree(others.root / name, tmp_path / name)
    found = evaluate_images(Folder(tmp_path), real, judge, draws=0)
    names = ", ".join(map(repr, real.classes[2:7]))
    assert f"; no synthetic images of 8 classes: {names} and 3 others\n" in str(found)
    assert "no synthetic images" not in str(evaluate_images(others, real, judge, draws=0))


def test_poor_images_are_seen_to_be_poor(real, others, judge, tmp_path):
    for number, name in enumerate(others.classes):
        for row, image_id in enumerate(others.ids[name]):
            image = others.load(image_id, 1, 32)
            save_image(0.1 * image, tmp_path / "dark" / name / f"{row}.png")
            wrong = others.classes[(number + 1) % 10]
            (tmp_path / "wrong" / wrong).mkdir(parents=True, exist_ok=True)
            shutil.copy(others.root / image_id, tmp_path / "wrong" / wrong / f"{row}.png")
    good, dark, wrong = (
        evaluate_images(x, real, judge, draws=0)
        for x in (others, Folder(tmp_path / "dark"), Folder(tmp_path / "wrong"))
    )
    assert value(dark, "FID") > 3 * value(good, "FID")
    assert value(dark, "coverage") < value(good, "coverage")
    assert value(wrong, "FID") == pytest.approx(value(good, "FID"), rel=1e-6)
    assert value(wrong, "class distance") > 2 * value(good, "class distance")


def test_the_form_is_that_of_the_images(tmp_path, real):
    assert form_of(real) == (1, 28)
    (tmp_path / "a").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "a" / "0.png")
    assert form_of(Folder(tmp_path)) == (3, 30)


def test_a_bank_is_measured_by_class(bank, gaussian):
    found = evaluate_bank(bank)
    assert [row["class"] for row in found.classes] == bank.classes
    assert all(row["latents"] == len(bank.members[row["class"]]) for row in found.classes)
    assert "norm sigmas" in str(found)


def test_images_of_a_bank_come_back_beside_what_the_codec_makes_of_them(tmp_path):
    backbone, root = load_backbone("tiny"), write_fashion(tmp_path / "some", "shots", [0, 1, 2])
    bank = fill_bank(
        tmp_path / "bank", backbone, Folder(root), None, "fireflow", steps=10, stored=()
    )
    rows = evaluate_bank(bank, backbone, Folder(root)).classes
    assert all(row["codec MSE"] < 1e-8 and row["codec SSIM"] > 0.9999 for row in rows)
    assert all(20 < row["back PSNR"] < 60 and 0.5 < row["back SSIM"] < 1 for row in rows)
    other = Folder(write_fashion(tmp_path / "other", "test", [40]))
    with pytest.raises(UserError, match=r"images that bank .* was made of, got none of class"):
        evaluate_bank(bank, backbone, other)


def test_the_command_writes_what_it_prints(real, others, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    line = f"evaluate --path {others.root} --real {real.root} --network fashion --out {out}"
    monkeypatch.setattr(sys, "argv", ["latent-augment", *line.split(), "--bootstrap", "5"])
    monkeypatch.setenv("LATENT_AUGMENT_PROGRESS", "0.001")  # as where there is no terminal
    main()
    printed, lines = capsys.readouterr()
    assert re.search(r"^synthetic: 0 of 120 images, 0 s$", lines, re.MULTILINE), lines
    assert "120 synthetic images against 120 real ones" in printed and "| FID " in printed
    record = json.loads((out / "evaluation.json").read_text())
    assert [row["measure"] for row in record["overall"]][:2] == ["FID", "KID"]
    with (out / "classes.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == list(real.classes)
    with Image.open(out / "evaluation.png") as picture:
        assert picture.size[0] > 800


def test_the_command_measures_a_bank(bank, tmp_path, monkeypatch, capsys):
    line = f"evaluate --path {bank.path} --out {tmp_path / 'out'}"
    monkeypatch.setattr(sys, "argv", ["latent-augment", *line.split()])
    main()
    assert "bias" in capsys.readouterr().out
    assert (tmp_path / "out" / "evaluation.png").exists()


def test_mistakes_are_told(real, tmp_path, judge, monkeypatch, capsys):
    def refused(line):
        monkeypatch.setattr(sys, "argv", ["latent-augment", "evaluate", *line.split()])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "expected --real" in refused(f"--path {real.root}")
    missing = f"--path {tmp_path / 'no'} --real {real.root} --network fashion"
    assert "no" in refused(missing)
    assert "a network of timm" in refused(f"--path {real.root} --real {real.root} --network nix")
    (tmp_path / "some" / "zebra").mkdir(parents=True)
    Image.new("L", (32, 32)).save(tmp_path / "some" / "zebra" / "0.png")
    with pytest.raises(UserError, match="'zebra'"):
        evaluate_images(open_images(tmp_path / "some"), real, judge)
