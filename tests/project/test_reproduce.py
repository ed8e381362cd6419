"""Reproductions: every script at a toy size, the rule of a claim, and RESULTS.md as written."""

import argparse
import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "reproduce"
sys.path.append(str(SCRIPTS))

import claims  # noqa: E402
from works import CLAIMS, WORKS, Claim, Interval, exact  # noqa: E402

HEAVY = (
    *("smooth_diffusion", "seedselect", "inversions", "walks", "seeds", "independent", "istd"),
    *("interpolation", "reconstruction", "sheets", "texts", "shots", "training_map"),
)  # ten seconds of one core or more, each


FLOW = {"independent": {"fig5"}, "training_map": {"st-tuning"}}
"""Claims that a flow decides, by script."""


def reproduce(monkeypatch, name, out, *more):
    argv = [f"{name}.py", "--toy", "--out", str(out), *more]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    return json.loads((out / "record.json").read_text())


def check(monkeypatch, name, out, expected, *more):
    record = reproduce(monkeypatch, name, out, *more)
    assert all(record["claims"].get(key) for key in expected)
    for figure in record["figures"]:
        assert (out / f"{figure}.png").exists()
    again = reproduce(monkeypatch, name, out, *more)
    assert again["claims"] == record["claims"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in HEAVY))
        for name in dict.fromkeys(claim.script for claim in CLAIMS.values())
        if name != "training_map"
    ],
)
def test_every_script_runs_at_a_toy_size_and_decides_its_claims(monkeypatch, tmp_path, name):
    own = {key for key, claim in CLAIMS.items() if claim.script == name and claim.measured}
    check(monkeypatch, name, tmp_path, own - FLOW.get(name, set()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_flow_decides_figure_5_and_its_training_the_map(monkeypatch, tmp_path):
    import train_tiny

    clean = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    data = train_tiny.Data(clean, torch.ones(8).long(), train_tiny.PROMPTS, 1.0, 1.0, mirror=False)
    args = argparse.Namespace(
        **{"run": tmp_path, "out": tmp_path / "flow.safetensors", "start": None, "keep": True},
        **{"zero_snr": False, "flow": True, "bf16": False},
        **{"steps": 3, "batch": 8, "lr": 1e-3, "seed": 0},
    )
    train_tiny.Run(args, data).train()
    for name, expected in FLOW.items():
        check(monkeypatch, name, tmp_path / name, expected, "--backbone", str(args.out))


def test_what_needs_no_sampling_holds(monkeypatch, tmp_path):
    found = reproduce(monkeypatch, "paths", tmp_path)["claims"]
    for key in ("fig2-lin", "fig2-fix", "fig2-slerp", "fig2-nin"):
        assert CLAIMS[key].verdict(claims.intervals(key, found)) == "holds"


def test_the_rule_of_a_claim():
    claim = Claim("paths", "LK", "Fig. 0", "it is so", "a number", above=0, below=1)
    for verdict, *intervals in (
        ("holds", Interval(0.1, 0.2, 0.3), exact(0.5)),
        ("within noise", Interval(-0.1, 0.2, 0.3)),
        ("within noise", Interval(0.5, 0.8, 1.1), exact(0.5)),
        ("does not hold", Interval(0.1, 0.2, 0.3), Interval(-0.3, -0.2, -0.1)),
        ("does not hold", exact(2)),
        ("cannot be decided here", exact(math.nan)),
        ("cannot be decided here",),
    ):
        assert claim.verdict(dict(enumerate(intervals))) == verdict
    other = Claim("paths", "LK", "Fig. 0", "it is so", "", undecided="no model of it")
    assert other.verdict({"": exact(1)}) == "cannot be decided here"


def test_every_claim_has_a_work_a_script_and_bounds_or_a_reason():
    for claim in CLAIMS.values():
        assert claim.work in WORKS and (SCRIPTS / f"{claim.script}.py").exists()
        bounded = claim.above > -math.inf or claim.below < math.inf
        assert (claim.measured and bounded) or claim.undecided


def test_results_are_what_the_commands_wrote():
    text = (ROOT / "RESULTS.md").read_text("utf-8")
    assert claims.rewritten(text) == text, "run python scripts/reproduce/claims.py"
    for name, record in claims.read_records().items():
        assert f"scripts/reproduce/{name.split('-')[0]}.py" in record["command"]
        for figure in record["figures"]:
            assert (ROOT / "docs" / f"{figure}.png").exists()
    prose = [line for line in text.split("\n") if not line.startswith(("|", "!["))]
    assert max(map(len, prose)) <= 100
