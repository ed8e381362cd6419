"""Jobs that are killed, at any moment, or shared by several processes: the bytes are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import paint, snapshot

pytestmark = pytest.mark.slow
HERE = Path(__file__).parents[1]
ALONE = {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("job", ["invert", "synthesize", "merge"])
@pytest.mark.parametrize("how", ["calls", "times"])
def test_a_job_that_is_killed_again_and_again_ends_with_the_same_bytes(how, job, tmp_path):
    """All that is looked at is in crashes.py, which fails if bytes differ or work is wasted."""
    command = [sys.executable, str(HERE / "crashes.py"), how, job, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **ALONE}, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["kills"] >= (50 if how == "times" else 20)


@pytest.mark.parametrize("job", ["steps", "epochs", "both", "smooth", "sweep"])
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_weights(job, tmp_path):
    """All that is looked at is in kills.py; more than these few kills take long."""
    command = [sys.executable, str(HERE / "kills.py"), job, "4", str(tmp_path)]
    environment = {**os.environ, **ALONE, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["kills"] == 4


def latent_augment(ranks: int, line: str, cwd: Path) -> None:
    """A command in so many processes of torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    subprocess.run(
        [sys.executable, *launch, "-m", "augment.cli", *line.split()],
        cwd=cwd,
        env={**os.environ, **ALONE, "PYTHONPATH": str(HERE.parent)},
        check=True,
        capture_output=True,
        timeout=300,
    )


def test_two_ranks_make_what_one_makes(tmp_path):
    paint(tmp_path / "images", {"ant": 200, "bee": 150, "cat": 200}, size=32)
    for ranks in (1, 2):
        bank = f"invert --images images --bank bank-{ranks} --steps 1"
        latent_augment(ranks, bank, tmp_path)
        shards = f"--out shards-{ranks} --per-class 12 --shard-size 10 --steps 1 --members 3"
        latent_augment(ranks, f"synthesize --bank bank-1 {shards}", tmp_path)
    for what, count in (("bank", 3 + 1 + 2 * 5), ("shards", 2 + 2 * 4)):
        one, two = snapshot(tmp_path / f"{what}-1"), snapshot(tmp_path / f"{what}-2")
        assert one == two
        assert len(one) == count
