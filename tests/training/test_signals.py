"""SIGTERM (Slurm, docker stop, timeout) ends every job with 143 and a sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import call, paint
from safetensors.torch import save_file

from augment.bank.fill import InversionJob
from augment.core.errors import UserError
from augment.core.files import locked
from augment.shards.write import ShardJob
from augment.training.episodes.evaluate import TaskEvaluator
from augment.training.models.classifier import Classifier
from augment.training.smooth.regulariser import SmoothDiffusion
from augment.training.sweep import assign

TRAIN = (
    "train fit --data.train images --data.test test --data.channels 1 --data.batch_size 4 "
    "--data.steps_per_epoch 2 --trainer.max_steps 6 --trainer.accelerator cpu"
)
JOBS = {
    "invert": ("invert images --bank made --steps 1", InversionJob, "work"),
    "synthesize": (
        "synthesize bank --out made --per-class 2 --shard-size 2 --steps 1", ShardJob, "work",
    ),
    "train": (f"{TRAIN} --trainer.default_root_dir made", Classifier, "training_step"),
    "smooth": (
        "smooth images --out made --steps 3 --accumulate 1 --device cpu --rank 1",
        *(SmoothDiffusion, "training_step"),
    ),
    "episodes": (
        "episodes --images images --network test_resnet --weights net.safetensors --out made "
        "--n-way 2 --n-query 1 --n-tasks 3 --channels 1 --resolution 32",
        *(TaskEvaluator, "__call__"),
    ),
}  # fmt: skip
"""Of each job its command, and what it calls again and again."""


@pytest.fixture(autouse=True)
def default_signals():
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    for seed, name in enumerate(("images", "test")):
        paint(tmp_path / name, {"Bag": 3, "Coat": 3}, size=32, seed=seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("job", JOBS)
def test_a_job_ends_with_143_and_a_sentence_and_goes_on_later(job, place, monkeypatch, capsys):
    line, kind, name = JOBS[job]
    inner, calls = getattr(kind, name), []

    def asked_to_end(self, *args):
        calls.append(args)
        if len(calls) == 2 or job == "invert":  # which has one unit of work
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *args)

    if job == "synthesize":
        assert call(monkeypatch, capsys, *JOBS["invert"][0].replace("made", "bank").split())[0] == 0
    if job == "episodes":
        network = timm.create_model("test_resnet", in_chans=1, num_classes=2)
        save_file(network.state_dict(), place / "net.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, asked_to_end)
        code, _, err = call(patch, capsys, *line.split())
    assert code == 143
    assert err.endswith("latent-augment: terminated; run the same command again to go on\n")
    assert "Traceback" not in err
    assert call(monkeypatch, capsys, *line.split())[0] == 0


def write_recipe(steps: int) -> str:
    """Write a recipe of training; return the command of its sweep."""
    words, recipe = TRAIN.replace("max_steps 6", f"max_steps {steps}").split()[2:], {}
    words[words.index("--data.steps_per_epoch") + 1] = "50"
    for key, value in zip(words[::2], words[1::2], strict=True):
        assign(recipe, key.removeprefix("--"), yaml.safe_load(value))
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return "sweep recipe.yaml --out made --seeds 2"


def test_a_sweep_has_its_folder_to_itself(place, monkeypatch, capsys):
    with locked(Path("made")):
        code, _, err = call(monkeypatch, capsys, *write_recipe(2).split())
    assert code == 2 and "another run is at work" in err


@pytest.mark.parametrize("job", ["train", "smooth"])
def test_a_training_has_its_folder_to_itself_and_sweeps_it(job, place, monkeypatch, capsys):
    line, (kept, old) = JOBS[job][0], (Path("made/mine.tmp"), Path("made/checkpoints"))
    old = old / ".last.ckpt.123.0123abcd.tmp"
    old.parent.mkdir(parents=True)
    for path in (kept, old):
        path.touch()
    with locked(Path("made")):
        code, _, err = call(monkeypatch, capsys, *line.split())
    assert code == 2 and "another run is at work" in err and old.exists()
    assert call(monkeypatch, capsys, *line.split())[0] == 0
    assert kept.exists() and not old.exists()


def test_a_lock_ends_with_its_run_and_not_with_the_processes_that_the_run_forked(tmp_path):
    with locked(tmp_path):
        (ready, begun), (end, ended) = os.pipe(), os.pipe()
        child = os.fork()
        if not child:
            os.close(ended)
            os.write(begun, b"1")
            os.read(end, 1)  # until the parent closes its side
            os._exit(0)
        os.read(ready, 1)
    with locked(tmp_path):
        os.close(ended)
    assert os.waitpid(child, 0)[1] == 0
    for handle in (ready, begun, end):
        os.close(handle)


def process(line: str) -> subprocess.Popen:
    path = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "augment.cli", *line.split()],
        env={**os.environ, **path}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(condition, seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def held(folder: Path) -> bool:
    """Whether a run is at work in a folder."""
    try:
        with locked(folder):
            return False
    except UserError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_ends_takes_its_run_with_it_and_goes_on_later(number, place):
    last = Path("made/seed-0/checkpoints/last.ckpt")
    sweep = process(write_recipe(1000))
    wait_for(last.exists)
    os.kill(sweep.pid, number)
    err = sweep.communicate(timeout=100)[1]
    assert sweep.returncode == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert number == signal.SIGKILL or "run the same command again" in err
    wait_for(lambda: not held(last.parent.parent), 30)
    assert torch.load(last, weights_only=True)["global_step"] < 1000
    stamp = last.stat().st_mtime_ns
    time.sleep(2)
    assert last.stat().st_mtime_ns == stamp, "the run goes on without the sweep"
    with process(write_recipe(1000)) as again:
        assert again.wait(600) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 1000
    assert Path("made/summary.csv").exists()


@pytest.mark.slow
def test_ranks_of_a_training_end_together(place):
    line = f"{TRAIN} --trainer.default_root_dir made --trainer.strategy ddp --trainer.devices 2"
    run = process(line.replace("max_steps 6", "max_steps 100000"))
    wait_for(Path("made/checkpoints/last.ckpt").exists)
    run.terminate()
    err = run.communicate(timeout=400)[1]
    assert run.returncode == 143 and "terminated; run the same command again" in err
    wait_for(lambda: not held(Path("made")), 10)
