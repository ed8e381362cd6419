"""Every configuration loads, builds and takes two steps on miniature data of the right shape."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import yaml
from PIL import Image

from augment import fill_bank
from augment.cli import main
from augment.sources import Folder
from augment.training.sweep import assign

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
OTHERS = ("episodes", "seedselect", "smooth")
TRAINED = [path for path in CONFIGS if not path.stem.startswith(OTHERS)]
WORDNET = ("n01440764", "n01443537", "n01484850")


def photographs(root: Path, counts: dict[str, int], size=(48, 40), suffix="JPEG") -> Path:
    """Class folders of colour noise."""
    generator = np.random.default_rng(len(str(root)))
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}_{number}.{suffix}", format="JPEG")
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny) -> Path:
    """A folder with all that the configurations read, and ImageNet-LT's lists in their format."""
    work = tmp_path_factory.mktemp("work")
    imagenet = work / "data" / "imagenet"
    counts = dict(zip(WORDNET, (8, 5, 3), strict=True))
    photographs(imagenet / "train", counts)
    photographs(imagenet / "val", dict.fromkeys(WORDNET, 1))
    lists = {"train": [], "val": [], "test": []}
    for label, (name, count) in enumerate(counts.items()):
        lists["val"].append(f"train/{name}/{name}_0.JPEG {label}")
        lists["train"] += [f"train/{name}/{name}_{i}.JPEG {label}" for i in range(1, count)]
        lists["test"].append(f"val/{name}/{name}_0.JPEG {label}")
    for split, lines in lists.items():
        (imagenet / f"ImageNet_LT_{split}.txt").write_text("\n".join(lines) + "\n")
    for name in ("caltech101", "cub"):
        folders = work / "data" / name
        for part, count in (("train", 6), ("val", 2), ("test", 2)):
            photographs(folders / part, {"ant": count, "bee": count}, suffix="jpg")
        source = Folder(folders / "train")
        fill_bank(work / "runs" / name / "bank", tiny, source, inversion="noise", steps=4)
    for name in ("photos", "photos-test"):
        photographs(work / name, {"ant": 6, "bee": 6}, suffix="jpg")
    source = Folder(work / "photos")
    fill_bank(work / "runs" / "photos" / "bank", tiny, source, steps=4)
    fill_bank(work / "runs" / "recipe" / "bank", tiny, source, inversion="noise", steps=4)
    demo = work / "runs" / "demo"
    for part in ("seed-0/real-5", "seed-0/synthetic/fade-chm", "test"):
        photographs(demo / part, {"Bag": 3, "Coat": 3}, suffix="jpg")
    return work


class Cifar(torch.utils.data.Dataset):
    """What torchvision's CIFAR gives, without the download."""

    __module__ = "torchvision.datasets"  # where a configuration may take classes from

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        self.classes, self.train = ["cat", "dog", "frog"], train
        self.targets = [label for label in range(3) for _ in range(600 if train else 4)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        pixels = np.full((32, 32, 3), index % 256, np.uint8)
        pixels[0, 0, :2] = index // 256, self.train  # no image is there twice
        return Image.fromarray(pixels), self.targets[index]


def run(monkeypatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["latent-augment", *args])
    main()


def in_miniature(config: dict) -> dict:
    """The same, of few small steps; the weights cannot be downloaded here."""
    short = {"max_steps": 2, "max_epochs": -1, "accelerator": "cpu", "precision": None}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    for key, value in (short | quiet).items():
        assign(config, f"trainer.{key}", value)
    for key, value in {"batch_size": 4, "steps_per_epoch": 2, "workers": 0}.items():
        assign(config, f"data.{key}", value)
    config["model"].pop("pretrained", None)
    if "FewShot" in str(config["data"]["train"]):
        config["data"]["resolution"] = 64
        options = config["data"]["synthetic"]["init_args"]
        options |= {"sampling": options["sampling"] | {"steps": 4}, "per_class": 2}
    return config


LARGE = ("imagenet_lt_resnet50", "imagenet_lt_clip_vitb16")
CASES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LARGE else [])
    for path in TRAINED
]


@pytest.mark.filterwarnings("ignore:expected synthetic images (in colour|of at least)")
@pytest.mark.parametrize("path", CASES)
def test_a_config_trains(path, work, monkeypatch, tmp_path):
    text = path.read_text()
    assert text.startswith("# expected: ")
    monkeypatch.chdir(work)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Cifar)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Cifar)
    config = in_miniature(yaml.safe_load(text))
    assign(config, "trainer.default_root_dir", str(tmp_path / "run"))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    run(monkeypatch, "train", "fit", "--config", str(tmp_path / "small.yaml"))
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 2
    measured = json.loads((tmp_path / "run" / "test.json").read_text())
    assert 0 <= measured["test/accuracy"] <= 1
    assert (tmp_path / "run" / "per_class.csv").exists()


def test_two_stages_and_tau_as_the_comments_say(work, monkeypatch, tmp_path):
    """cRT, LWS and τ from the checkpoint of a first stage; an unknown key is an error."""
    monkeypatch.chdir(work)
    resnet10 = CONFIGS[0].parent / "imagenet_lt_resnet10.yaml"
    config = in_miniature(yaml.safe_load(resnet10.read_text()))
    config["data"]["resolution"] = 64
    first, small = tmp_path / "first", tmp_path / "small.yaml"
    small.write_text(yaml.safe_dump(config))
    fit, folder = ["train", "fit", "--config", str(small)], "--trainer.default_root_dir"
    run(monkeypatch, *fit, folder, str(first))
    last = str(first / "checkpoints/last.ckpt")

    def state(run: Path) -> dict[str, torch.Tensor]:
        return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]

    before = state(first)
    for tune, learnt in (("head", {"weight", "bias"}), ("scale", {"scales"})):
        second = [f"--model.tune={tune}", "--data.sampler=class", f"--model.start={last}"]
        run(monkeypatch, *fit, folder, str(tmp_path / tune), *second)
        after = state(tmp_path / tune)
        other = {k for k in after if k not in before or not torch.equal(after[k], before[k])}
        assert {name.removeprefix("network.fc.") for name in other} == learnt
    test = ["train", "test", "--config", str(small), "--model.tau=val", f"--ckpt_path={last}"]
    run(monkeypatch, *test, folder, str(first))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *fit, folder, str(first), "--model.tua=1")
    assert stop.value.code == 2
