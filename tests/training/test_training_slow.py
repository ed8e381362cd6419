"""Training by the command: killed at random, by two processes, and swept over seeds."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import paint

from augment import Sampling, SyntheticDataset, fill_bank, write_shards
from augment.sources import Folder

pytestmark = pytest.mark.slow
STEPS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny):
    root = tmp_path_factory.mktemp("commands")
    paint(root / "real", {"Bag": 6, "Coat": 4}, size=28)
    paint(root / "test", {"Bag": 3, "Coat": 2}, size=28, seed=1)
    bank = fill_bank(root / "bank", tiny, Folder(root / "real"), steps=1)
    fly = SyntheticDataset(bank, tiny, sampling=Sampling(steps=1), per_class=6)
    write_shards(fly.synthesizer, fly.planner, 6, root / "shards")
    return root


def config(root: Path, synthetic, **data) -> dict:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    paths = {"train": str(root / "real"), "test": str(root / "test"), "synthetic": synthetic}
    form = {"channels": 1, "batch_size": 4, "steps_per_epoch": 5, "mix": {"share": 0.5}}
    return {
        "model": {"mixup": 0.5},
        "data": {**paths, **form, **data},
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", **quiet},
        "checkpoint": {"every_n_train_steps": 1},
    }


def start(settings: dict, out: Path, *args: str) -> subprocess.Popen:
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "augment.cli", "train", "fit", "-c", str(out / "train.yaml")]
    with (out / "log.txt").open("a") as log:
        return subprocess.Popen(
            [*command, f"--trainer.default_root_dir={out}", *args],
            stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    state = torch.load(out / "checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == STEPS
    return state["state_dict"]


@pytest.mark.parametrize("how", ["fly", "shards"])
def test_killed_at_random_it_ends_with_the_same_weights(root, tmp_path, how):
    fly = {"bank": str(root / "bank"), "per_class": 6, "sampling": {"steps": 1}}
    fly = {"class_path": "augment.SyntheticDataset", "init_args": fly}
    settings = config(root, fly if how == "fly" else str(root / "shards"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(settings, whole).wait(300) == 0, (whole / "log.txt").read_text()[-2000:]
    generator, kills = random.Random(how), 0
    last = cut / "checkpoints/last.ckpt"
    while True:
        process = start(settings, cut)
        begun, wait = last.stat().st_mtime_ns if last.exists() else 0, generator.uniform(0, 0.4)
        while process.poll() is None:  # until it has made a step, and a little longer
            if kills < 4 and last.exists() and last.stat().st_mtime_ns != begun:
                time.sleep(wait)
                process.send_signal(signal.SIGKILL)
                kills += process.wait() == -signal.SIGKILL
            time.sleep(0.005)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, (cut / "log.txt").read_text()[-2000:]
    assert kills, "a test that killed nobody shows nothing"
    one, other = weights(whole), weights(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "test.json").read_bytes() == (cut / "test.json").read_bytes()


def losses(out: Path) -> list[float]:
    with (out / "metrics.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]


def test_two_processes_train_as_one_with_the_doubled_batch(root, tmp_path):
    settings = config(root, str(root / "shards"), resolution=160)
    settings["model"] = {"network": "test_vit", "optimizer": "sgd", "lr": 0.01}
    one, two = tmp_path / "one", tmp_path / "two"
    assert start(settings, one, "--data.batch_size=8").wait(300) == 0
    ddp = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    assert start(settings, two, *ddp).wait(300) == 0, (two / "log.txt").read_text()[-2000:]
    a, b = weights(one), weights(two)
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    assert len(losses(one)) == STEPS
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    measured = [json.loads((out / "test.json").read_text()) for out in (one, two)]
    assert measured[0] == pytest.approx(measured[1], abs=1e-4)


def test_ranks_do_not_wait_for_norms_that_one_of_them_had_no_image_for(root, tmp_path):
    settings = config(root, str(root / "shards"), mix={"share": 0.2}, val=str(root / "test"))
    settings["model"] = {"auxiliary_norms": True}
    process = start(settings, tmp_path, "--trainer.strategy=ddp", "--trainer.devices=2")
    try:
        assert process.wait(240) == 0, (tmp_path / "log.txt").read_text()[-2000:]
    finally:
        process.kill()
    assert "sync_dist" not in (tmp_path / "log.txt").read_text()


def test_a_sweep_prints_intervals_and_does_nothing_twice(root, tmp_path):
    file = tmp_path / "few.yaml"
    settings = config(root, None)
    settings["data"]["train"] = {
        "class_path": "FewShot",
        "init_args": {"source": str(root / "real"), "shots": 1, "seed": 0},
    }
    file.write_text(yaml.safe_dump(settings))
    vary = "{data.train.init_args.shots: [1, 3]}"
    command = [sys.executable, "-m", "augment.cli", "sweep", "--recipe", str(file)]
    command += ["--out", str(tmp_path / "out"), "--seeds", "2", "--vary", vary]
    lines = os.environ | {"LATENT_AUGMENT_PROGRESS": "0.2"}
    first = subprocess.run(command, capture_output=True, text=True, env=lines)
    assert first.returncode == 0, first.stderr[-2000:]
    assert re.search(r"^runs: 3 of 4 runs, .* left, shots 3$", first.stderr, re.MULTILINE)
    assert "2 seeds" in first.stdout and first.stdout.count("±") > 3
    with (tmp_path / "out/runs.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [(r["data.train.init_args.shots"], r["seed"]) for r in rows] == [
        ("1", "0"), ("1", "1"), ("3", "0"), ("3", "1"),
    ]  # fmt: skip
    begun = time.monotonic()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == first.stdout and time.monotonic() - begun < 40
    other = subprocess.run([*command, "--given", "{model.lr: 1}"], capture_output=True, text=True)
    assert other.returncode == 2 and "model.lr 1, got" in other.stderr
