"""The benchmarks: each suite runs, and their arithmetic is right."""

import argparse
import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
FAST = ("centroids", "nao", "inversion", "sampling", "storage")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("benchmark")


@pytest.fixture
def paired(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("benchmarks.paired")


def check(suite, out):
    """Check that rows have times, ratio and quality, and that the environment is complete."""
    record = json.loads((out / f"{suite}.json").read_text())
    where, rows = record["environment"], record["rows"]
    assert record["suite"] == suite and where["quick"] and "--quick" in where["command"]
    assert where["torch"] == torch.__version__.partition("+")[0]
    assert all(where[key] for key in ("date", "cpu", "cores", "threads", "gpu", "python"))
    assert {"commit", "diffusers", "numpy", "pillow", "torchvision"} <= where.keys()
    table = (out / f"{suite}.md").read_text()
    assert where["command"] in table and "nothing was measured" in table
    assert rows and all(f"| {row['name']} |" in table for row in rows)
    for row in rows:
        if "largest" in row:  # the shares of a command
            assert row["cpu"] > row["rest"] > 0 and row["model"] > 0 and len(row["largest"]) == 5
            continue
        for times in (row["ours"], row["theirs"], row["ratio"]):
            assert 0 < times["low"] <= times["median"] <= times["high"]
        assert row["ours"]["rounds"] and row["theirs"]["rounds"]
        assert row["quality"] and row["baseline"] and row["threads"] > 0
        assert row["bar"] is None or row["bar"]["held"] in (True, False)
    return rows


@pytest.fixture
def swept():
    """Collect files that webdataset leaves open before the next test."""
    yield
    gc.collect()


@pytest.mark.usefixtures("swept")
@pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("suite", FAST)
def test_a_suite_runs(suite, benchmark, tmp_path, capsys):
    options = ("--quick", "--repeats", "1", "--threads", "1", "--device", "cpu")
    before = torch.get_num_threads()
    assert benchmark.main([suite, *options, "--out", str(tmp_path)]) == 0
    torch.set_num_threads(before)
    rows = check(suite, tmp_path)
    assert (tmp_path / f"{suite}.md").read_text() in capsys.readouterr().out
    if suite == "sampling":
        assert all(float(row["quality"].split()[-1]) < 1e-5 for row in rows)
    if suite == "storage":
        assert [row["quality"] for row in rows[:3]] == ["the same"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["training", "startup", "backbones", "neighbours", "hot"])
def test_a_long_suite_runs(suite, tmp_path):
    command = [sys.executable, str(SCRIPTS / "benchmark.py"), suite, "--quick", "--repeats", "1"]
    subprocess.run([*command, "--out", str(tmp_path)], check=True, capture_output=True)
    check(suite, tmp_path)


class Clock:
    """A clock that only calls advance."""

    def __init__(self):
        self.now, self.calls = 0.0, 0

    def __call__(self):
        return self.now

    def takes(self, seconds):
        def call():
            self.calls += 1
            self.now += seconds

        return call


def timed(paired, ours, theirs, **more):
    clock = Clock()
    args = argparse.Namespace(repeats=5, seconds=1e9, threads=1, device="cpu")
    sides = clock.takes(ours), clock.takes(theirs)
    return paired.timed(
        paired.Comparison("it", *sides, "they", lambda: "good", clock=clock, **more), args
    )


@pytest.mark.parametrize(
    ("bar", "found", "held"),
    [
        (("speed", 3.0), 3, True),
        (("speed", 3.1), 3, False),
        (("time", 0.3), 1 / 3, False),
        (("time", 0.4), 1 / 3, True),
        (("extra", -5.0), -4, False),
        (("extra", 0.3), -4, True),
        (("seconds", 1.9), 2, False),
    ],
)
def test_a_bar_is_held_or_not(paired, bar, found, held):
    row = timed(paired, 4, 12, count=2, bar=bar)
    assert row["ours"]["median"] == pytest.approx(2) and len(row["ours"]["rounds"]) == 5
    assert row["ratio"]["median"] == pytest.approx(3)
    assert row["bar"]["found"] == pytest.approx(found) and row["bar"]["held"] is held


def test_a_slow_side_is_called_once_and_a_quick_one_often(paired):
    clock = Clock()
    args = argparse.Namespace(repeats=4, seconds=1e9, threads=1, device="cpu")
    slow, quick = Clock(), clock.takes(paired.TURN / 10)
    row = paired.timed(
        paired.Comparison(
            "it", quick, slow.takes(1), "they", lambda: "good", count=8, theirs_count=1,
            once="theirs", clock=lambda: clock.now + slow.now,
        ),
        args,
    )  # fmt: skip
    assert slow.calls == 1 and len(row["theirs"]["rounds"]) == 1
    assert clock.calls == pytest.approx(2 + 4 * 10, abs=4)
    assert row["ratio"]["median"] == pytest.approx(8 * 10 / paired.TURN)


def test_the_side_that_begins_changes(paired):
    order = []
    args = argparse.Namespace(repeats=4, seconds=1e9, threads=1, device="cpu")
    clock = Clock()
    sides = [lambda who=who: order.append(who) or clock.takes(1)() for who in "ab"]
    paired.timed(paired.Comparison("it", *sides, "they", lambda: "good", clock=clock), args)
    assert "".join(order[-8:]) == "baabbaab"


def test_all_continues_after_a_suite_that_fails(benchmark, monkeypatch, capsys):
    ran = []

    def run(command, check):
        ran.append(command[2])
        return argparse.Namespace(returncode=int(command[2] == "nao"))

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    assert benchmark.main(["all", "--quick"]) == 1
    assert {*FAST, "training", "startup"} <= set(ran) and "backbones" not in ran
    assert capsys.readouterr().err == "failed: nao\n"
