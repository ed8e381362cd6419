"""A configuration by its name, and what one from somebody else may do: run nothing."""

import sys
from pathlib import Path

import pytest
import yaml
from conftest import call, paint

from augment.config import CONFIGS, find_config
from augment.training.sweep import _run_child

CANARY = "touch canary; echo a command ran"
PIPE = "torch.utils.data.datapipes.map"
SHELL = {
    "class_path": f"{PIPE}.callable.MapperMapDataPipe",
    "init_args": {
        "datapipe": {
            "class_path": f"{PIPE}.utils.SequenceWrapperMapDataPipe",
            "init_args": {"sequence": [CANARY]},
        },
        "fn": "os.system",
    },
}
SUBPROCESS = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"
STARTED = {"entrypoint": "touch", "args": ["canary"], "env": {}, "local_rank_id": 0}
STARTED |= {"stdout": None, "stderr": None}


def source(dataset: object) -> dict:
    return {"class_path": "Items", "init_args": {"dataset": dataset}}


def folder(transform: object) -> dict:
    return {"class_path": "Folder", "init_args": {"root": "images", "transform": transform}}


HOSTILE = {
    "a function in a torch class": (source(SHELL), "MapperMapDataPipe"),
    "a torch class by its bare name": (
        source(SHELL | {"class_path": "MapperMapDataPipe"}), "MapperMapDataPipe",
    ),
    "a torch class that starts a process": (
        source({"class_path": SUBPROCESS, "init_args": STARTED}), "SubprocessHandler",
    ),
    "a class of the standard library": (
        source({"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "canary"]}}),
        "subprocess.Popen",
    ),
    "a class of ours that opens files": (
        source(
            {
                "class_path": "augment.shards.dataset.Reader",
                "init_args": {"file": "f", "mode": "w"},
            }
        ),
        "augment.shards.dataset.Reader",
    ),
    "a function": (folder("os.system"), "os.system"),
    "a function of ours": (
        folder("augment.sources.images.save_image"),
        "augment.sources.images.save_image",
    ),
    "a function of torchvision": (
        folder("torchvision.datasets.utils.download_url"), "download_url",
    ),
    "a module of the working directory": (folder("mine_to_run.transform"), "mine_to_run"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    paint(tmp_path / "images", {"Bag": 2, "Coat": 2}, size=32)
    (tmp_path / "mine_to_run.py").write_text(
        "from pathlib import Path\nPath('canary').touch()\n\n"
        "def transform(image):\n    return image\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("more", [(), ("--help",)], ids=["run", "help"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_configuration_runs_nothing(what, more, place, monkeypatch, capsys):
    images, name = HOSTILE[what]
    Path("run.yaml").write_text(yaml.safe_dump({"images": images, "bank": "bank"}))
    code, _, output = call(monkeypatch, capsys, "invert", "--config", "run.yaml", *more)
    assert code == 2 and output.startswith("latent-augment: expected a configuration of classes of")
    assert name in output and "--allow" in output and output.count("\n") == 1
    assert not Path("canary").exists() and not Path("bank").exists() and not Path("f").exists()


@pytest.mark.parametrize("command", ["smooth", "train fit"])
def test_no_command_runs_anything(command, place, monkeypatch, capsys):
    images = source(SHELL)
    settings = {"smooth": {"images": images, "out": "x"}, "train fit": {"data": {"train": images}}}
    Path("run.yaml").write_text(yaml.safe_dump(settings[command]))
    code, _, output = call(monkeypatch, capsys, *command.split(), "--config", "run.yaml")
    assert code == 2 and "MapperMapDataPipe; only if you trust the file, pass --allow" in output
    assert not Path("canary").exists()


def test_a_callback_of_anybody_is_refused(place, monkeypatch, capsys):
    settings = {
        "data": {"train": "images", "channels": 1},
        "trainer": {"callbacks": [{"class_path": "mine_to_run.transform"}]},
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    code, _, output = call(monkeypatch, capsys, "train", "fit", "--config", "run.yaml")
    assert code == 2 and "got mine_to_run.transform" in output and not Path("canary").exists()


def test_what_the_user_allows_is_taken(place, monkeypatch, capsys):
    (place / "mine_to_allow.py").write_text("def transform(image):\n    return image\n")
    images = folder("mine_to_allow.transform")
    Path("run.yaml").write_text(yaml.safe_dump({"images": images, "bank": "bank", "steps": 1}))
    words = ("invert", "--config", "run.yaml")
    assert call(monkeypatch, capsys, *words)[0] == 2
    assert call(monkeypatch, capsys, *words, "--allow", "mine_to_allow")[0] == 0
    code, _, output = call(monkeypatch, capsys, *words, "--allow")
    assert code == 2 and "the name of a module after --allow" in output


@pytest.mark.slow
def test_a_sweep_hands_on_what_is_allowed(place, monkeypatch, capsys):
    settings = {
        "data": {"train": folder("mine_to_sweep.transform"), "test": "images", "channels": 1},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }
    (place / "mine_to_sweep.py").write_text("def transform(image):\n    return image\n")
    monkeypatch.setenv("PYTHONPATH", f"{place}:{Path(__file__).parents[2]}")
    Path("run.yaml").write_text(yaml.safe_dump(settings))
    words = ("sweep", "run.yaml", "--out", "out", "--seeds", "2")
    code, _, output = call(monkeypatch, capsys, *words)
    assert code == 2 and "mine_to_sweep.transform; only if you trust" in output
    assert call(monkeypatch, capsys, *words, "--allow=mine_to_sweep")[0] == 0
    assert "mine_to_sweep" not in sys.modules


@pytest.mark.parametrize("words", [("--config", "smooth_tiny"), ("--config=smooth_tiny",)])
def test_a_configuration_of_the_package_is_found_by_its_name(words, place, monkeypatch, capsys):
    code, _, output = call(monkeypatch, capsys, "smooth", *words, "--images", "none", "--steps=1")
    assert code == 2 and "got none, which is not there" in output, "its folder is of the file"
    _, output, _ = call(monkeypatch, capsys, "train", "fit", "-c", "demo", "--print_config")
    asked = yaml.safe_load((CONFIGS / "demo.yaml").read_text())["model"]["network"]
    assert yaml.safe_load(output)["model"]["network"] == asked


def test_a_file_goes_before_a_configuration_of_its_name(place):
    assert Path(find_config("demo")) == CONFIGS / "demo.yaml"
    Path("demo").write_text("model: {}")
    assert find_config("demo") == "demo"
    assert find_config("other/demo.yaml") == "other/demo.yaml"


@pytest.mark.parametrize("words", ["synthesize --config", "train fit --config", "sweep --out x"])
def test_an_unknown_configuration_lists_those_of_the_package(words, place, monkeypatch, capsys):
    code, _, output = call(monkeypatch, capsys, *words.split(), *(
        ["--recipe", "few_shot_fusion"] if "sweep" in words else ["few_shot_fusion"]
    ))  # fmt: skip
    assert code == 2 and output.count("\n") == 1 and "Traceback" not in output
    assert "few_shot_dafusion" in output and "got few_shot_fusion" in output
    assert all(path.stem in output for path in CONFIGS.glob("*.yaml"))


def test_a_sweep_imports_nothing_of_the_current_folder(place):
    for name in ("augment", "training", "torch"):
        (place / name).mkdir()
        (place / name / "__init__.py").write_text("raise SystemExit('imported by accident')")
    assert _run_child(["--version"], place / "log.txt") == 0
    assert (place / "log.txt").read_text().startswith("latent-augment ")
