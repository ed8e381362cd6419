"""The lock of a folder: nothing gets in beside a run, and no live file is swept."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from augment import UserError
from augment.core.files import locked, write_bytes
from augment.jobs.job import run

FORK = multiprocessing.get_context("fork")
HALF = ".shard-000001.tar.1.0123abcd.tmp"


def alone(folder: Path) -> bool:
    """Whether a run that wants the folder for itself gets in."""
    try:
        with locked(folder):
            return True
    except UserError:
        return False


def test_a_sweep_beside_others_gives_nothing_up(tmp_path):
    with locked(tmp_path, shared=True) as first:
        with locked(tmp_path, shared=True) as second:
            (tmp_path / HALF).write_text("at work")
            for lock in (first, second, first):
                lock.sweep()
                assert not alone(tmp_path)
        assert not alone(tmp_path)
        with locked(tmp_path, shared=True) as third:
            third.sweep()
        assert (tmp_path / HALF).exists(), "it may be the first's"
        assert not alone(tmp_path)
    assert alone(tmp_path)


def test_a_rank_that_comes_first_sweeps_what_was_there_before(tmp_path):
    (tmp_path / HALF).write_text("of a writer that was killed")
    with locked(tmp_path, shared=True) as first, locked(tmp_path, shared=True) as second:
        (tmp_path / HALF.replace("0123", "4567")).write_text("at work")
        second.sweep()
        assert (tmp_path / HALF).exists()
        first.sweep()
        assert [path.name for path in tmp_path.iterdir()] == [HALF.replace("0123", "4567")]


class Slow:
    """A job of two units; a unit writes a file on a disk that takes its time."""

    title = "slow"

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds

    def plan(self) -> list[int]:
        return [1, 1]

    def committed(self, unit: int) -> int:
        return int((self.path / f"{unit}.json").exists())

    def start(self):
        return self.work

    def work(self, unit: int) -> None:
        synchronise = os.fsync

        def slowly(handle: int) -> None:
            time.sleep(self.seconds)
            synchronise(handle)

        os.fsync = slowly
        write_bytes(self.path / f"{unit}.json", b"{}")

    def finish(self) -> None:
        pass


def start(path: Path, rank: int, seconds: float):
    """A rank in a process of its own."""
    process = FORK.Process(target=run, args=(Slow(path, seconds), "local", (rank, 2)))
    process.start()
    return process


def test_two_ranks_on_a_slow_disk(tmp_path):
    """One is done long before the other, comes again, and others try to get in meanwhile."""
    slow = start(tmp_path, 1, 1.5)
    while not list(tmp_path.glob(".1.json.*.tmp")):
        time.sleep(0.01)
    for _ in range(2):
        quick = start(tmp_path, 0, 0)
        quick.join()
        assert quick.exitcode == 0 and (tmp_path / "0.json").exists()
        assert list(tmp_path.glob(".1.json.*.tmp")), "a live file was swept"
        assert not alone(tmp_path)
    slow.join()
    assert slow.exitcode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json"]
    assert alone(tmp_path)


def test_what_a_killed_rank_left_is_swept_by_the_last(tmp_path):
    slow = start(tmp_path, 1, 60)
    while not list(tmp_path.glob(".1.json.*.tmp")):
        time.sleep(0.01)
    with locked(tmp_path, shared=True):
        slow.kill()
        slow.join()
        again = start(tmp_path, 1, 0)
        again.join()
        assert again.exitcode == 0
    assert run(Slow(tmp_path, 0), ranks=(0, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_folder_that_is_held_alone_is_refused(shared, tmp_path, monkeypatch):
    monkeypatch.setattr("augment.core.files.PATIENCE_S", 0.2)
    with (
        locked(tmp_path),
        pytest.raises(UserError, match="another run"),
        locked(tmp_path, shared=shared),
    ):
        pass
    assert alone(tmp_path)
