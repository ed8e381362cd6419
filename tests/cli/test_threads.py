"""The command limits how long idle OpenMP threads spin, and leaves a user's own setting alone."""

import os
import subprocess
import sys

import pytest
import torch

GNU = "libgomp" in torch.__config__.parallel_info() or "OpenMP" in torch.__config__.show()


@pytest.mark.skipif(not GNU, reason="this torch is built without OpenMP")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")],
)
def test_the_limit_is_set_before_openmp_is_loaded(given, spins, tmp_path):
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "augment.cli", "inspect", str(tmp_path)],
        env=keep | given | {"OMP_DISPLAY_ENV": "VERBOSE", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    shown = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    if not shown:
        pytest.skip("this OpenMP is not GNU's")
    assert f"'{spins}'" in shown[0]
