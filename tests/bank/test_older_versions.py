"""Banks and shards of older versions are read as what they were."""

import shutil
from pathlib import Path

import torch
from conftest import call

from augment import LatentBank, Rule, Sampling, Synthesizer, load_backbone, open_shards

OLDER = Path(__file__).parent / "older"


def test_a_bank_and_shards_without_levels_and_usage(tmp_path, monkeypatch, capsys):
    shutil.copytree(OLDER, tmp_path / "older")
    monkeypatch.chdir(tmp_path / "older")
    bank, shards = LatentBank.open("bank"), open_shards("shards")
    assert bank.level is None and bank.holds_noise
    assert [bank.prompt(name) for name in bank.classes] == ["bag", "top"]
    synthesizer = Synthesizer(load_backbone("tiny"), bank, Rule.parse("fade/chm"), Sampling())
    assert synthesizer.resolved.guidance == 1
    images = synthesizer.images([shards.plan(row) for row in range(4)])
    stored = torch.stack([shards[row][0] for row in range(4)])
    torch.testing.assert_close(images.cpu(), stored, atol=1.1 / 255, rtol=0)
    before = Path("shards/shard-000000.tar").read_bytes()
    again = ("synthesize", "bank", "--out", "shards", "--per-class", 2, "--extension", "png")
    for line in (again, ("verify", "shards"), ("verify", "bank"), ("inspect", "shards")):
        code, _, err = call(monkeypatch, capsys, *line)
        assert code == 0, err
    assert Path("shards/shard-000000.tar").read_bytes() == before
