"""Plain lines of progress, where there is no terminal for a bar."""

import subprocess
import sys
import time
from weakref import WeakValueDictionary

import pytest
from pytorch_lightning import Trainer
from pytorch_lightning.demos.boring_classes import BoringModel

from augment.core import progress
from augment.core.progress import EVERY, Progress
from augment.training.lightning import Lines


@pytest.fixture(autouse=True)
def no_other_work(monkeypatch):
    """Forget what commands of other tests left: the variable, and bars of runs that failed."""
    monkeypatch.delenv(EVERY, raising=False)
    monkeypatch.setattr(progress, "_bars", WeakValueDictionary())
    monkeypatch.setattr(progress, "_ends", [])


def test_a_line_says_how_far_the_work_is(monkeypatch):
    monkeypatch.setenv(EVERY, "3600")
    with Progress(total=3000, initial=500, desc="invert", unit="image") as bar:
        bar.start_t = time.time() - 300
        bar.update(500)
        assert bar.words() == "invert: 1,000 of 3,000 images, 5 min, 20 min left"
        bar.set_postfix_str("fade/chm")
        assert bar.words().endswith(" left, fade/chm")
        with Progress(desc="sample") as inner:
            assert inner.words() == "sample: 0, 0 s"
            assert [*progress._bars.values()] == [bar, inner]
        assert [*progress._bars.values()] == [bar]
    assert not progress._bars


def test_work_that_an_error_ended_is_forgotten(monkeypatch):
    monkeypatch.setenv(EVERY, "3600")
    bar = Progress(total=3, desc="broken")
    assert [*progress._bars.values()] == [bar] and not progress._ends[0].is_set()
    end = progress._ends[0]
    del bar
    assert not progress._bars and not progress._ends and end.is_set()


class Broken(BoringModel):
    """A module whose first step fails."""

    def training_step(self, batch, batch_idx):
        assert progress._bars, "its work is under way"
        raise ValueError("broken")


def test_a_training_that_fails_is_no_longer_under_way(monkeypatch, tmp_path):
    monkeypatch.setenv(EVERY, "3600")
    lines = Lines()
    trainer = Trainer(
        default_root_dir=tmp_path, max_steps=1, callbacks=[lines], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="broken"):
        trainer.fit(Broken())
    assert lines.bar is not None and not progress._bars


def test_bars_draw_nothing_where_there_are_lines(monkeypatch, capsys):
    assert [*Progress(range(3), "bar", leave=True, disable=False)] == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err
    monkeypatch.setenv(EVERY, "3600")
    with Progress(range(3), "lines", leave=True) as bar:
        Progress.write("between")
        assert [*bar] == [0, 1, 2]
    out, err = capsys.readouterr()
    assert (out, err) == ("between\n", "")


@pytest.mark.parametrize("disable", [True, False])
def test_lines_come_though_the_work_stands_still_unless_it_is_silent(disable):
    code = (
        "import time\nfrom augment.core.progress import Progress\n"
        f"with Progress(total=2, desc='runs', unit='run', disable={disable}):\n    time.sleep(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={EVERY: "0.2", "TQDM_DISABLE": "1", "PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert done.stdout == "" and set(lines) <= {"runs: 0 of 2 runs, 0 s", "runs: 0 of 2 runs, 1 s"}
    assert bool(lines) != disable
