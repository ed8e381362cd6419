"""Kills trainings again and again: ``python kills.py JOB COUNT FOLDER``.

Jobs are training by max_steps (``steps``), max_epochs (``epochs``) or ``both``, ``smooth``,
``sweep``.

Victims are forked from what was imported once, and get SIGKILL, SIGTERM or SIGINT at a random time,
one after the other in the same folder, at most four a folder; then one is left to finish. A JSON
line says how many were killed, and in how many folders the result differs from an undisturbed one:
weights, optimiser and test of a training, adapters of a smoothing, tables of a sweep.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytorch_lightning  # noqa: F401, here for the victims
import timm  # noqa: F401
import torch
import torchvision  # noqa: F401
import yaml
from conftest import paint
from tqdm import tqdm

import augment.training.adapt.run
import augment.training.sweep
from augment import cli

SIGNALS = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
LARGEST = 4  # kills a folder
DATA = {"train": "images", "test": "test", "channels": 1, "batch_size": 8, "steps_per_epoch": 4}
QUICK = {"accelerator": "cpu", "enable_model_summary": False}
LIMITS = {
    "steps": {"max_steps": 40},
    "epochs": {"max_epochs": 10},
    "both": {"max_steps": 40, "max_epochs": 1000},
    "sweep": {"max_steps": 40},
}


def command(job: str, out: Path) -> list[str]:
    """Return the arguments of a job."""
    if job == "smooth":
        numbers = ("--steps", "45", "--batch-size", "2", "--accumulate", "1", "--rank", "2")
        return ["smooth", "images", "--out", str(out), *numbers, "--device", "cpu"]
    if job == "sweep":
        return ["sweep", "sweep.yaml", "--out", str(out), "--seeds", "2"]
    return ["train", "fit", "--config", f"{job}.yaml", "--trainer.default_root_dir", str(out)]


def start(job: str, out: Path, log: Path) -> int:
    """Fork a victim; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["latent-augment", "--quiet", *command(job, out)]
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def weights(path: Path) -> str:
    """Return the SHA-256 of a checkpoint's weights and of its optimiser's state."""
    state = torch.load(path, weights_only=True)
    digest = hashlib.sha256(str(state["global_step"]).encode())
    for name, tensor in sorted(state["state_dict"].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    moments = [sorted(one["state"].items()) for one in state["optimizer_states"]]
    digest.update(repr(moments).encode())
    return digest.hexdigest()


def result(job: str, out: Path) -> list[str]:
    """Return what a finished job has to have in common with an undisturbed one."""
    if job == "smooth":
        adapters = (out / "pytorch_lora_weights.safetensors").read_bytes()
        return [hashlib.sha256(adapters).hexdigest()]
    if job == "sweep":
        tables = [(out / name).read_text() for name in ("runs.csv", "summary.csv")]
        return tables + [weights(out / f"seed-{n}/checkpoints/last.ckpt") for n in (0, 1)]
    return [weights(out / "checkpoints/last.ckpt"), (out / "test.json").read_text()]


def finish(child: int) -> int:
    """Wait for a victim; return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Kill as often as asked; fail if a result differs, or a victim ended in another way."""
    job, count, root = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # not one that forks share
    augment.training.adapt.run.SAVE_STEPS = 10
    root.mkdir(parents=True, exist_ok=True)
    os.chdir(root)
    for seed, name in enumerate(("images", "test")):
        paint(root / name, {"Bag": 8, "Coat": 5}, size=32, seed=seed)
    if job in LIMITS:
        recipe = {"data": DATA, "trainer": QUICK | LIMITS[job], "model": {"mixup": 1.0}}
        Path(f"{job}.yaml").write_text(yaml.safe_dump(recipe))
    log, rng, codes = root / "log.txt", random.Random(0), Counter[int]()
    begun = time.monotonic()
    assert finish(start(job, root / "whole", log)) == 0, log.read_text()[-2000:]
    longest, whole = time.monotonic() - begun, result(job, root / "whole")
    kills = folders = differing = left = 0
    while kills < count:
        out, dead, folders = root / "cut", 0, folders + 1
        shutil.rmtree(out, ignore_errors=True)
        while True:
            child, number = start(job, out, log), rng.choice(list(SIGNALS))
            if dead < LARGEST and kills < count:
                time.sleep(rng.uniform(0.05, 0.9) * longest)
                os.kill(child, number)  # one that ended is a zombie
            codes[code := finish(child)] += 1
            if code == 0:
                break
            assert code == SIGNALS[number], (code, number, log.read_text()[-3000:])
            dead, kills = dead + 1, kills + 1
        differing += result(job, out) != whole
        print(
            f"{kills} kills, {folders} folders, {differing} differing", file=sys.stderr, flush=True
        )
        left += len([path for path in out.rglob("*.tmp")])
    seen = {"job": job, "kills": kills, "folders": folders, "differing": differing, "left": left}
    seen |= {"codes": dict(codes), "tracebacks": log.read_text().count("Traceback")}
    print(json.dumps(seen))
    assert not differing and not left


if __name__ == "__main__":
    main()
