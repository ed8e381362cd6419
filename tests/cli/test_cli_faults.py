"""Faults of users beside those of test_cli.py: each is one sentence, and nothing is written."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import paint, snapshot
from safetensors.torch import save_file

from augment import cli
from augment.commands import COMMANDS
from augment.diffusion.backbones.tiny import WEIGHTS

COUNTS = {"ant": 2, "bee": 1}
INVERT = "invert --images images --bank made --steps 1"
SYNTHESIZE = "synthesize --bank bank --out made --steps 1 --per_class 1"
NEAREST = f"{SYNTHESIZE} --members 2 --nearest"
TRAIN = "train fit --data.train images --data.test held --data.channels 1 --trainer.max_steps 1"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Return the command in this process: (exit code, standard output, standard error)."""

    def run(line: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["latent-augment", *shlex.split(line)])
        capsys.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a place with images and a bank of the embedded backbone."""
    root = tmp_path_factory.mktemp("template")
    paint(root / "images", COUNTS, size=28)
    paint(root / "held", COUNTS, size=28, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["latent-augment", *INVERT.replace("made", "bank").split()])
        cli.main()
    return root


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the template and make it the working directory."""
    place = shutil.copytree(template, tmp_path / "place")
    monkeypatch.chdir(place)
    return place


def test_alpha_may_be_infinite_as_the_library_has_it(run, place):
    assert run(f"{SYNTHESIZE} --alpha inf")[0] == 0


@pytest.mark.parametrize("line", ["--help", *(f"{command} --help" for command in COMMANDS)])
def test_help_is_given_for_every_command(run, line):
    code, out, err = run(line)
    assert (code, err) == (0, "")
    assert "usage: latent-augment" in out


def test_an_interruption_says_how_to_go_on(run, place, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("augment.bank.fill.inverted", interrupt)
    code, out, err = run(INVERT)
    assert code == 130 and out.startswith("backbone: tiny,")
    assert err == "latent-augment: interrupted; run the same command again to go on\n"


def nothing(place: Path) -> None:
    """The place is fine; the command is not."""


def damage_a_chunk(place: Path) -> None:
    path = place / "bank" / "0000" / "chunk-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def damage_the_manifest(place: Path) -> None:
    (place / "bank" / "manifest.json").write_text("{")


def train_another_tiny(place: Path) -> None:
    content = bytearray(WEIGHTS.read_bytes())
    content[-1] ^= 1
    (place / "other.safetensors").write_bytes(content)


def write_other_weights(place: Path) -> None:
    (place / "other.safetensors").write_bytes(b"not weights")


def write_a_part(place: Path) -> None:
    vectors = {f"ant/{number}.png": torch.ones(3) for number in range(2)}
    save_file(vectors, place / "part.safetensors")


def put_a_file_in_the_way(place: Path) -> None:
    (place / "made").write_text("the user's")


def put_a_folder_in_the_way(place: Path) -> None:
    (place / "made").mkdir()
    (place / "made" / "mine.txt").write_text("the user's")


def rename_a_class(place: Path) -> None:
    shutil.copytree(place / "images", place / "renamed")
    (place / "renamed" / "bee").rename(place / "renamed" / "wasp")


@dataclass(frozen=True)
class Fault:
    """A command that must fail, in a place prepared for it, with these words."""

    line: str
    words: tuple[str, ...]
    prepare: Callable[[Path], None] = field(default=nothing)


FAULTS = {
    "missing weights": Fault(f"{INVERT} --backbone no.safetensors", ("no.safetensors",)),
    "odd weights": Fault(
        f"{INVERT} --backbone other.safetensors", ("other.safetensors",), write_other_weights
    ),
    "unknown device": Fault(f"{INVERT} --device banana", ("banana",)),
    "no inversion batch": Fault(f"{INVERT} --batch_size 0", ("batch",)),
    "prompt of no class": Fault(f"{INVERT} --prompts '{{wasp: top}}'", ("wasp", "ant")),
    "bank is a file": Fault(INVERT, ("made",), put_a_file_in_the_way),
    "bank of other weights": Fault(
        "invert --images images --bank bank --steps 1 --backbone other.safetensors",
        ("bank", "weights", "another bank"),
        train_another_tiny,
    ),
    "damaged chunk": Fault(SYNTHESIZE, ("bank/0000/chunk-0000.safetensors",), damage_a_chunk),
    "damaged manifest": Fault(SYNTHESIZE, ("bank", "manifest.json"), damage_the_manifest),
    "unknown split": Fault(f"{SYNTHESIZE} --rule fix/hat", ("chm", "'hat'")),
    "a blur of no width": Fault(f"{SYNTHESIZE} --rule fix/lp0", ("lp0", "lp2.0")),
    "a circle of one": Fault(f"{SYNTHESIZE} --rule circle", ("circle", "two", "members")),
    "no sampling steps": Fault(f"{SYNTHESIZE} --steps 0", ("1 solver step",)),
    "no sampling batch": Fault(f"{SYNTHESIZE} --batch_size 0", ("batch",)),
    "negative batch": Fault(f"{SYNTHESIZE} --batch_size=-1", ("batch",)),
    "negative alpha": Fault(f"{SYNTHESIZE} --alpha=-1", ("alpha",)),
    "alpha not a number": Fault(f"{SYNTHESIZE} --alpha=nan", ("alpha", "nan")),
    "alpha a word": Fault(f"{SYNTHESIZE} --alpha 1,many", ("alpha", "1,many")),
    "alphas for a class of one": Fault(f"{SYNTHESIZE} --alpha 2,1", ("alpha", "1", "'bee'", "2")),
    "a negative alpha of several": Fault(f"{SYNTHESIZE} --alpha=2,-1", ("alpha", "-1")),
    "neighbours of no number": Fault(f"{SYNTHESIZE} --nearest latent", ("members", "nearest")),
    "neighbours by no file": Fault(f"{NEAREST} no.safetensors", ("no.safetensors", "latent")),
    "neighbours by another file": Fault(
        f"{NEAREST} other.safetensors", ("other.safetensors",), write_other_weights
    ),
    "neighbours by a part": Fault(
        f"{NEAREST} part.safetensors", ("part.safetensors", "bee/0.png"), write_a_part
    ),
    "all noise": Fault(f"{SYNTHESIZE} --noise 1", ("noise",)),
    "negative seed": Fault(f"{SYNTHESIZE} --seed=-1", ("seed",)),
    "folder in use": Fault(SYNTHESIZE, ("made", "new"), put_a_folder_in_the_way),
    "out is a file": Fault(SYNTHESIZE, ("made",), put_a_file_in_the_way),
    "unknown option": Fault(f"{INVERT} --hat 3", ("--hat",)),
    "unknown command": Fault("hat", ("hat", "invert")),
    "missing option": Fault("invert --images images", ("bank",)),
    "not a number": Fault(f"{INVERT} --steps many", ("steps", "many")),
    "one seed for an interval": Fault("demo --out made --seeds 1", ("2 seeds",)),
    "train on a missing folder": Fault(
        TRAIN.replace("train images", "train no"), ("no", "not there")
    ),
    "train on other classes": Fault(
        TRAIN.replace("test held", "test renamed"), ("the test images", "wasp"), rename_a_class
    ),
    "train an unknown network": Fault(f"{TRAIN} --model.network hat", ("small_cnn", "'hat'")),
    "train by a share out of range": Fault(
        f"{TRAIN} --data.synthetic images --data.mix.share 2", ("share", "2.0")
    ),
    "train on two colours": Fault(f"{TRAIN} --data.channels 2", ("1 or 3 channels",)),
    "train on a sliver": Fault(f"{TRAIN} --data.crop 0", ("crop",)),
    "train with an option of another type": Fault(
        f"{TRAIN} --model.loss focal --model.loss_options {{gamma:x}}", ("gamma",)
    ),
    "train from no checkpoint": Fault(f"{TRAIN} --ckpt_path no.ckpt", ("no.ckpt", "checkpoint")),
    # not 1: once a process has made Optional[Union[float, int]], typing's cache turns 1 into 1.0
    "train on a part of an epoch": Fault(
        f"{TRAIN} --trainer.limit_train_batches 0.5", ("steps_per_epoch",)
    ),
    "train and keep several best weights": Fault(
        f"{TRAIN} --data.val held --checkpoint.monitor val/accuracy --checkpoint.save_top_k 3",
        ("save_top_k", "best.ckpt"),
    ),
    "train with temperature of no images": Fault(f"{TRAIN} --model.tau val", ("--data.val",)),
    "train with an impossible magnitude": Fault(
        f"{TRAIN} --data.augment.randaugment 2 --data.augment.magnitude 31", ("magnitude", "31")
    ),
    "train a head with auxiliary norms": Fault(
        f"{TRAIN} --model.auxiliary_norms true --model.tune head", ("auxiliary_norms",)
    ),
    "train among the images": Fault(
        f"{TRAIN} --trainer.default_root_dir images/run", ("beside the images",)
    ),
    "evaluate among the images": Fault(
        "evaluate images --real images --network fashion --out images/good", ("beside the images",)
    ),
    "train on few shots of fewer": Fault(
        f"{TRAIN} --data.train FewShot --data.train.source images --data.train.shots 99", ("99",)
    ),
    "test without weights": Fault(TRAIN.replace("fit", "test"), ("checkpoint", "--ckpt-path")),
    "validate without images": Fault(TRAIN.replace("fit", "validate"), ("val",)),
    "sweep a missing recipe": Fault("sweep --recipe no.yaml --out made", ("no.yaml",)),
    "episodes of no images": Fault("episodes --images no --network resnet18 --out made", ("no",)),
    "train by an unknown option": Fault(f"{TRAIN} --hat 3", ("--hat",)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_sentence_and_exit_code_two_and_writes_nothing(name, run, place):
    fault = FAULTS[name]
    fault.prepare(place)
    before = snapshot(place)
    code, out, err = run(fault.line)
    assert code == 2, err
    assert out == ""
    assert err.startswith("latent-augment: ")
    assert err.count("\n") == 1, err
    assert all(word in err for word in fault.words), err
    assert snapshot(place) == before


def test_the_full_demo_has_a_folder_of_its_own(run, place, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("augment.training.demo.write_fashion", stop)
    for line, folder in (("demo", "runs/demo"), ("demo --full", "runs/demo-full")):
        code, _, err = run(line)
        assert code == 130, err
        assert (place / folder / "settings.json").exists()


MISSING = "latent-augment: expected a folder of class folders, got images, which is not there; "
MISSING += "check the path\n"


@pytest.mark.parametrize("line", [INVERT, TRAIN])
def test_the_installed_command_gives_its_sentence_and_nothing_else(line, tmp_path):
    command = Path(sys.executable).with_name("latent-augment")
    done = subprocess.run(
        [command, *line.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", MISSING)
    assert not list(tmp_path.iterdir())
