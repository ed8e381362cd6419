"""Kills a job again and again: ``python crashes.py {calls,times} JOB FOLDER``, JOB out of `JOBS`.

A process of its own, which forks the victims from what it has imported once, so that a kill costs
milliseconds. ``calls`` kills one victim at each of its calls to the file system, from the first to
the last, and lets another finish the job. ``times`` kills victims at random times, one after the
other on the same folder, until fifty are dead. It prints a JSON line of what it saw, and ends with
an error if a finished folder is not, byte for byte, what an undisturbed run made.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import paint, snapshot
from tqdm import tqdm

import augment.bank.fill
import augment.shards.write
from augment import LatentBank, Planner, Sampling, Synthesizer
from augment.bank.fill import InversionJob, fill_bank
from augment.bank.merge import merge as merge_banks
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.shards.write import ShardJob, write_shards
from augment.sources import Folder

KILLS, PER_CLASS = int(os.environ.get("KILLS", "50")), 30
BACKBONE = GaussianBackbone(mean=0.1, latent_shape=(1, 8, 8))


def invert(root: Path, out: Path) -> None:
    """Fill a bank of 120 images in units of about 8, with classes of several chunks."""
    fill_bank(out, BACKBONE, Folder(root / "images"), steps=2, inversion="ddim")


def synthesize(root: Path, out: Path) -> None:
    """Write shards of an existing bank."""
    bank = LatentBank.open(root / "bank")
    synthesizer = Synthesizer(BACKBONE, bank, sampling=Sampling(steps=2, batch_size=4))
    write_shards(synthesizer, Planner(bank.members), PER_CLASS, out, shard_size=6)


def merge(root: Path, out: Path) -> None:
    """Merge two existing banks."""
    merge_banks([root / "bank", root / "other"], out)


JOBS = {"invert": invert, "synthesize": synthesize, "merge": merge}


def prepare(root: Path) -> None:
    """Make the images, two of them broken, and a bank of them."""
    paint(root / "images", {"ant": 50, "bee": 3, "cat": 47, "dog": 20})
    (root / "images" / "ant" / "7.png").write_bytes(b"")
    (root / "images" / "cat" / "9.png").write_bytes(b"not an image")
    invert(root, root / "bank")
    paint(root / "more", {"ant": 4, "eel": 21})
    for name in ("ant", "eel"):  # ids are names, which may not be there twice
        for path in list((root / "more" / name).iterdir()):
            path.rename(path.with_name(f"more-{path.name}"))
    fill_bank(root / "other", BACKBONE, Folder(root / "more"), steps=2, inversion="ddim")


def fork(work: Callable[[], None]) -> int:
    """Start a victim; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
        work()
        code = 0
    finally:
        os._exit(code)


def wait(child: int) -> bool:
    """Return whether a victim ended alive; one that failed by itself is an error."""
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "a run failed"
    return os.WIFEXITED(status)


def counted(log: Path) -> None:
    """Log every unit that is begun."""
    for kind in (InversionJob, ShardJob):
        inner = kind.work

        def outer(self, loaded, unit, inner=inner):
            with log.open("a") as file:
                file.write(f"{unit}\n")
            inner(self, loaded, unit)

        kind.work = outer


def calls(job: Callable[[], None], out: Path, whole: dict[str, bytes]) -> dict[str, int]:
    """Kill at every call that touches the folder."""
    kills = 0
    while True:
        shutil.rmtree(out, ignore_errors=True)
        left = [kills]

        def count(event: str, args: tuple, left: list[int] = left) -> None:
            calls = ("open", "os.rename", "os.mkdir", "os.remove", "os.listdir", "os.scandir")
            if event in calls and str(out) in str(args[0]):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        def victim(count: Callable = count) -> None:
            sys.addaudithook(count)
            job()

        alive = wait(fork(victim))
        assert alive or wait(fork(job)), "nobody kills the second run"
        assert snapshot(out) == whole, f"other bytes after a kill at call {kills}"
        if alive:
            return {"kills": kills}
        kills += 1


def times(job: Callable[[], None], out: Path, whole: dict[str, bytes]) -> dict[str, int]:
    """Kill at random times."""
    rng, log = random.Random(0), out.with_suffix(".log")
    began = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    assert wait(fork(job))
    longest = time.perf_counter() - began
    kills, folders, extra = 0, 0, 0
    while kills < KILLS:
        shutil.rmtree(out)
        log.write_text("")
        dead, folders = 0, folders + 1
        while True:

            def victim() -> None:
                counted(log)
                job()

            child = fork(victim)
            if kills < KILLS:
                time.sleep(rng.uniform(0, longest / 4))  # several a folder
                os.kill(child, signal.SIGKILL)  # it may have ended: then it is a zombie
            alive = wait(child)
            dead, kills = dead + (not alive), kills + (not alive)
            if alive:
                break
        assert snapshot(out) == whole, f"other bytes after {dead} kills"
        units = log.read_text().split()  # none of a merge, which has no units
        redone = len(units) - len(set(units))
        assert redone <= dead, f"{redone} units were done again after {dead} kills"
        extra += redone
    return {"kills": kills, "folders": folders, "redone": extra}


def main() -> None:
    """Run one of the two on one of the jobs."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # not one that forks share, and that dies locked with a victim
    how, which, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    augment.bank.fill.CHUNK = 8
    if how == "calls":  # shorter jobs, for each is done once for each of its calls
        augment.bank.fill.CHUNK, globals()["PER_CLASS"] = 60, 3
    prepare(root)
    out = root / "out"
    assert wait(fork(lambda: JOBS[which](root, out)))
    whole = snapshot(out)
    assert not [name for name in whole if name.endswith(".tmp")]
    job = {"calls": calls, "times": times}[how]
    print(json.dumps({**job(lambda: JOBS[which](root, out), out, whole), "files": len(whole)}))


if __name__ == "__main__":
    main()
