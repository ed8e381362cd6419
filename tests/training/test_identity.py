"""Which images a training is of is known by their content, not by name, place or settings."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import call, paint
from PIL import Image
from torch.utils.data import Subset

from augment import Sampling, SyntheticDataset, UserError
from augment.bank.fill import fill_bank
from augment.core.errors import AugmentWarning
from augment.shards.write import write_shards
from augment.sources import Folder
from augment.training.data.draws import SyntheticMix
from augment.training.data.identity import digests_of
from augment.training.data.module import ImageData
from augment.training.sweep import check_finished

TRAIN = (
    "train fit --data.train real --data.test test --data.channels 1 --data.batch_size 4 "
    "--data.steps_per_epoch 2 --trainer.max_steps 2 --trainer.accelerator cpu "
    "--trainer.default_root_dir run"
)
COUNTS = {"Bag": 3, "Coat": 3}


@pytest.fixture
def place(tmp_path, monkeypatch):
    for seed, name in enumerate(("real", "test")):
        paint(tmp_path / name, COUNTS, size=32, seed=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shards(tiny, root: Path, out: Path, per_class: int = 3) -> str:
    bank = fill_bank(root.with_name("bank"), tiny, Folder(root), steps=1)
    fly = SyntheticDataset(bank, tiny, sampling=Sampling(steps=1), per_class=per_class)
    write_shards(fly.synthesizer, fly.planner, per_class, out, extension="png")
    return str(out)


def exchange(root: Path) -> None:
    """Exchange two classes."""
    (root / "Bag").rename(root / "kept")
    (root / "Coat").rename(root / "Bag")
    (root / "kept").rename(root / "Coat")


def repaint(root: Path) -> None:
    """Paint another image in the place of one, in as many bytes or not."""
    paint(root, {"Bag": 1}, size=32, seed=9)


@pytest.mark.parametrize("part", ["real", "test"])
@pytest.mark.parametrize("change", [exchange, repaint])
def test_a_finished_run_of_other_images_is_refused(part, change, place, monkeypatch, capsys):
    assert call(monkeypatch, capsys, *TRAIN.split())[0] == 0
    assert call(monkeypatch, capsys, *TRAIN.split())[0] == 0  # the same images
    before = Path("run/test.json").read_bytes()
    change(place / part)
    code, _, err = call(monkeypatch, capsys, *TRAIN.split())
    name = {"real": "training", "test": "test"}[part]
    assert code == 2 and f"expected the {name} images that the run in run began with (SHA" in err
    assert Path("run/test.json").read_bytes() == before


def test_a_run_of_other_shards_is_refused(place, tiny, monkeypatch, capsys):
    words = [*TRAIN.split(), "--data.synthetic", shards(tiny, place / "real", place / "shards")]
    assert call(monkeypatch, capsys, *words)[0] == 0
    shutil.rmtree(place / "shards")
    shards(tiny, place / "real", place / "shards", per_class=4)
    code, _, err = call(monkeypatch, capsys, *words)
    assert code == 2 and "the synthetic images that the run in run began with" in err


def test_files_are_read_once_until_they_change(place):
    source, known = Folder(place / "real"), {}
    first = digests_of(source, known)
    assert first == {i: source.digest(i)[:16] for i, _ in source.samples}
    source.read = None  # type: ignore[method-assign]
    assert digests_of(source, json.loads(json.dumps(known))) == first
    repaint(place / "real")
    fresh = Folder(place / "real")
    assert [i for i, d in digests_of(fresh, known).items() if d != first[i]] == ["Bag/0.png"]


def test_an_image_in_two_classes_or_in_training_and_test_is_reported(place):
    shutil.copy("real/Bag/0.png", "real/Coat/same.png")
    with pytest.warns(AugmentWarning, match=r"Coat/same\.png of class Coat, which is Bag/0\.png"):
        ImageData("real", test="test", channels=1).setup("fit")
    Path("real/Coat/same.png").unlink()
    shutil.copy("real/Bag/0.png", "test/Bag/other.png")
    with pytest.warns(AugmentWarning, match=r"got 1 of 7 that are, such as Bag/other\.png, which"):
        ImageData("real", test="test", channels=1).setup("fit")


@pytest.mark.parametrize("how", ["shards", "fly"])
def test_strangers_of_the_same_name_are_reported(how, place, tiny):
    fakes = shards(tiny, place / "real", place / "shards")
    fly = SyntheticDataset(place / "bank", tiny, sampling=Sampling(steps=1), per_class=3)
    paint(place / "real", COUNTS, size=32, seed=5)
    if how == "fly":
        with pytest.raises(UserError, match="got 6 others of the same names"):
            ImageData("real", synthetic=fly, channels=1)
    else:
        with pytest.warns(AugmentWarning, match=r"got 6 of 6 images.*by their content"):
            ImageData("real", synthetic=fakes, channels=1).setup("fit")


def test_a_renamed_image_is_no_stranger_and_one_of_another_class_is_reported(place, tiny):
    fakes = shards(tiny, place / "real", place / "shards")
    fly = SyntheticDataset(place / "bank", tiny, sampling=Sampling(steps=1), per_class=3)
    Path("real/Bag/0.png").rename("real/Bag/renamed.png")
    ImageData("real", synthetic=fakes, channels=1).setup("fit")
    data = ImageData("real", synthetic=fly, channels=1)
    assert {i for row in range(6) for i in data.synthetic.plan(row).members} >= {"Bag/0.png"}
    Path("real/Bag/renamed.png").rename("real/Coat/0000.png")
    with pytest.warns(AugmentWarning, match=r"Bag/0\.png as Bag, which is trained on as Coat"):
        ImageData("real", synthetic=fakes, channels=1).setup("fit")


def test_synthetic_images_that_look_different_are_reported(place, tiny):
    fakes = shards(tiny, place / "real", place / "shards")
    for path in place.glob("real/*/*.png"):
        pixels = np.asarray(Image.open(path).resize((96, 96)).convert("RGB")).copy()
        pixels[..., 0] //= 2
        Image.fromarray(pixels).save(path)
    with pytest.warns(AugmentWarning) as err:
        ImageData("real", synthetic=fakes, channels=3, resolution=96).setup("fit")
    words = [str(warning.message) for warning in err]
    assert any("got grey ones" in text for text in words)
    assert any("at least 96 pixels a side" in text and "got 32" in text for text in words)


def test_fewer_synthetic_images_than_the_mix_asks_for_are_reported(place, tiny):
    fakes = shards(tiny, place / "real", place / "shards")
    with pytest.warns(AugmentWarning, match="expected 7 synthetic images of class Bag, got 3"):
        ImageData("real", synthetic=fakes, mix=SyntheticMix(fill_to=10), channels=1).setup("fit")
    ImageData("real", synthetic=fakes, mix=SyntheticMix(fill_to=6), channels=1).setup("fit")
    few = SyntheticDataset(place / "bank", tiny, sampling=Sampling(steps=1), per_class={"Bag": 2})
    with pytest.warns(AugmentWarning, match="some synthetic images of class Coat, got 0"):
        ImageData("real", synthetic=few, channels=1).setup("fit")
    none = Subset(few, [])
    none.targets = []  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="synthetic images to train with, got none"):
        ImageData("real", synthetic=none, channels=1).setup("fit")


def test_a_finished_run_of_a_sweep_is_of_the_same_images(place):
    """A sweep does not start it again, so it looks at the images itself."""
    config = {"data": {"train": "real", "test": "test", "channels": 1}}
    ImageData("real", test="test", channels=1).check_images(place / "images.json")
    check_finished(config, place)
    exchange(place / "test")
    with pytest.raises(UserError, match="expected the test images that the run in"):
        check_finished(config, place)


def test_an_inverted_image_of_two_classes_is_reported(place, monkeypatch, capsys):
    shutil.copy("real/Bag/0.png", "real/Coat/same.png")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        code, _, err = call(monkeypatch, capsys, "invert", "real", "--bank", "bank", "--steps", "1")
    assert code == 0 and "warning: expected every inverted image in one class, got Coat" in err


def test_a_smoothing_of_other_images_is_refused(place, monkeypatch, capsys):
    line = "smooth real --out run --steps 1 --accumulate 1 --rank 1 --device cpu"
    assert call(monkeypatch, capsys, *line.split())[0] == 0
    repaint(place / "real")
    code, _, err = call(monkeypatch, capsys, *line.split())
    assert code == 2 and "expected the training images that the run in run began with" in err


def test_episodes_of_other_images_are_refused(place, tiny, monkeypatch, capsys):
    line = (
        "episodes --images real --network fashion --out run --n-way 2 --n-query 1 --n-tasks 3 "
        "--device cpu"
    )
    assert call(monkeypatch, capsys, *line.split())[0] == 0
    shorter = line.replace("--n-tasks 3", "--n-tasks 2")
    assert call(monkeypatch, capsys, *shorter.split())[0] == 0
    fill_bank(place / "bank", tiny, Folder(place / "real"), steps=1)
    paint(place / "real", COUNTS, size=32, seed=9)
    code, _, err = call(monkeypatch, capsys, *line.split())
    assert code == 2 and "expected the episode images that the run in run began with" in err
    other = f"{line.replace('--out run', '--out other')} --bank bank --noise 0.5"
    code, _, err = call(monkeypatch, capsys, *other.split())
    assert code == 2 and "the bank to be of the images of the episodes, got another" in err
