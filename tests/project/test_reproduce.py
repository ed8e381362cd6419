"""Reproductions: the one without a backbone in full; a quick one resumes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "reproduce"


def reproduce(name, out):
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), "--quick", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((out / "claims.json").read_text())["claims"]


def test_the_paths_of_the_rules_are_the_published_ones(tmp_path):
    claims = reproduce("paths", tmp_path)
    assert len(claims) == 4 and all(claim["verdict"] == "holds" for claim in claims)
    assert (tmp_path / "table.csv").exists() and (tmp_path / "paths.png").exists()


@pytest.mark.slow
def test_a_reproduction_resumes(tmp_path):
    began = time.perf_counter()
    claims = reproduce("independent", tmp_path)
    first = time.perf_counter() - began
    assert claims[0]["verdict"] == claims[1]["verdict"] == "holds"
    (tmp_path / "table.csv").unlink()
    began = time.perf_counter()
    assert reproduce("independent", tmp_path) == claims
    assert time.perf_counter() - began < 0.8 * first
    assert (tmp_path / "table.csv").exists()
