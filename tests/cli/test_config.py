"""What a configuration from somebody else may do: name data sets and networks, run nothing."""

import sys
from pathlib import Path

import pytest
import yaml
from conftest import call, paint

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
