"""Trainings of days: a stopped one resumes to the same weights; their files are loaded."""

import argparse
import csv
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import paint
from safetensors.torch import load_file, save, save_file
from torch import nn

from augment import BankMismatch, Plan, Sampling, Synthesizer, UserError, load_backbone, sample
from augment.bank.fill import fill_bank
from augment.diffusion.backbones.resnet12 import normalised
from augment.diffusion.conditions import Referred
from augment.diffusion.process import Flow, VariancePreserving
from augment.sources import Folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
STEPS = 7


@pytest.fixture
def scripts(monkeypatch):
    """Make the scripts importable; restore the handlers of signals afterwards."""
    monkeypatch.syspath_prepend(SCRIPTS)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def small_run(folder: Path, stop: int | None = None):
    """Return a run of a linear layer that is sent SIGTERM before the step ``stop``."""
    import long_run

    class Run(long_run.LongRun):
        def __init__(self) -> None:
            torch.manual_seed(0)
            self.layer = nn.Linear(3, 1)
            self.adam = torch.optim.Adam(self.layer.parameters(), 0.1)
            super().__init__(folder, STEPS, 5, layer=self.layer, adam=self.adam)

        def loss(self):
            if self.step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            points = torch.randn(5, 3, generator=torch.Generator().manual_seed(self.step))
            return (self.layer(points) - points.sum(1, keepdim=True)).square().mean()

        def update(self, loss):
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()

        def write(self):
            (folder / "written").write_text(str(self.step))

    folder.mkdir(exist_ok=True)
    return Run()


def test_a_stopped_run_resumes_to_the_same_weights(scripts, tmp_path, monkeypatch):
    import long_run

    monkeypatch.setattr(long_run, "LOG_EVERY", 1)
    whole = small_run(tmp_path / "whole")
    whole.train()
    first = small_run(tmp_path / "parts", stop=2)
    with pytest.raises(SystemExit, match="stopped at step 3; the same command resumes"):
        first.train()
    assert (tmp_path / "parts" / "written").read_text() == "3"
    lines = (tmp_path / "parts" / "log.csv").read_text()
    (tmp_path / "parts" / "log.csv").write_text(lines + "4,20,1,1,9,9\n")  # lost with its step
    second = small_run(tmp_path / "parts")
    assert second.step == 3
    second.train()
    assert torch.equal(second.layer.weight, whole.layer.weight)
    rows = [
        [line.split(",")[i] for i in (0, 1, 4)]
        for line in (tmp_path / "parts" / "log.csv").read_text().splitlines()
    ]
    assert rows[0] == ["step", "images", "loss"]
    assert [int(row[0]) for row in rows[1:]] == list(range(1, STEPS + 1))
    assert rows[4][2] != "9"
    assert second.core_hours > first.core_hours > 0


def test_the_split_is_of_a_hundred_classes(scripts):
    import cifar_fs

    parts = [cifar_fs.classes_of(part) for part in cifar_fs.PARTS]
    assert [len(part) for part in parts] == [64, 16, 20]
    assert len({name for part in parts for name in part}) == 100
    assert set(parts[0].values()) == set(cifar_fs.SUPERCLASSES)


@pytest.fixture
def run(scripts, tmp_path, monkeypatch):
    """Return a run of tiny-cifar with three images of each class, and features of them."""
    import train_tiny_cifar as script

    monkeypatch.setitem(script.UNET, "block_out_channels", (16, 32, 32))
    monkeypatch.setitem(script.UNET, "attention_head_dim", 16)
    names = script.classes_of("base")
    labels = torch.arange(len(names)).repeat_interleave(3)
    images = torch.rand(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(script, "load_part", lambda root, part: (images, labels))
    features = nn.functional.normalize(torch.rand(len(labels), script.FEATURES), dim=1)
    save_file({"base": features}, tmp_path / "features.safetensors")
    args = argparse.Namespace(
        **{"run": tmp_path, "features": tmp_path / "features.safetensors", "steps": 2, "batch": 16},
        **{"lr": 1e-3, "seed": 0, "images": tmp_path, "per_class": 1},
        **{"start": None, "bf16": False},
    )
    return script.Run(args, script.Data(tmp_path, args.features, "cpu"))


def test_a_class_is_described_by_other_images_of_it(run):
    rows = torch.arange(0, len(run.data.labels), 5)
    run.data.features = nn.functional.one_hot(torch.arange(len(run.data.labels))).float()
    mixed = run.data.describe(rows, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.sum(1), torch.ones(len(rows)))
    own = run.data.labels[rows][:, None] == run.data.labels
    assert not mixed[~own].any()
    assert not mixed[torch.arange(len(rows)), rows].any()
    assert (mixed > 0).sum(1).unique().tolist() == [1, 2]


@pytest.fixture
def described(run):
    """Return the run's weights as a backbone that takes references, and its ResNet-12's file."""
    from train_resnet12 import resnet12

    torch.nn.init.normal_(run.network.unet.conv_out.weight)
    torch.nn.init.normal_(run.network.feature.weight)
    run.average.load_state_dict(run.network.state_dict())
    run.train()
    file, config = run.folder / "weights.safetensors", {"width": 32, "classes": ["a", "b"]}
    save_file(resnet12(3, 2, 32).state_dict(), file, {"config": json.dumps(config)})
    weights = run.folder / "ema.safetensors"
    return load_backbone(weights, device="cpu", reference=file), file


def test_the_averaged_weights_are_a_flow_with_prompts_and_features(run, described):
    backbone, file = described
    assert backbone.process == Flow()
    assert backbone.latent_shape == (12, 16, 16)
    assert backbone.prompts[:2] == ("", "aquatic_mammals") and "wolf" in backbone.prompts
    z = torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(1))
    none = torch.zeros(2, run.average.feature.in_features)
    prompts = torch.tensor([backbone.prompts.index(name) for name in ("wolf", "fish")])
    times = torch.full((2,), 300.0)
    features = torch.rand(2, none.shape[1], generator=torch.Generator().manual_seed(2))
    features = nn.functional.normalize(features, dim=1)
    scaled = (features - run.data.mean) / run.data.deviation
    bare = backbone.condition(["wolf", "fish"])
    with torch.no_grad():
        for condition, more in ((bare, none), (bare | {"reference": features}, scaled)):
            answer = backbone.network(z, 300.0, condition)
            expected = run.average(z, times, prompts, more)
            assert (answer - expected).norm() < 0.02 * expected.norm()
        plain = backbone.network(z, 300.0, bare)
        assert (answer - plain).norm() > 0.1 * plain.norm(), "features change the answer"
        again = load_backbone(backbone.save(run.folder / "again"), device="cpu", reference=file)
        assert torch.equal(again.network(z, 300.0, bare | {"reference": features}), answer)
        without = load_backbone(run.folder / "ema.safetensors", device="cpu")
        words = without.condition(["wolf", "fish"])
        assert words.keys() == {"text"} and torch.equal(without.network(z, 300.0, words), plain)


def test_a_run_may_begin_with_the_weights_of_another(run, described):
    import train_tiny_cifar as script

    args = argparse.Namespace(**vars(run.args) | {"start": run.folder / "ema.safetensors"})
    args.run = run.folder / "next"
    args.run.mkdir()
    other = script.Run(args, run.data)
    z = torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(1))
    inputs = z, torch.full((2,), 300.0), torch.tensor([1, 30]), run.data.features[:2]
    with torch.no_grad():
        expected, answer = run.average(*inputs), other.network(*inputs)
        assert (answer - expected).norm() < 0.02 * expected.norm()
        assert torch.equal(other.average(*inputs), answer)
    save_file({"class_embedding.weight": torch.zeros(85, 4)}, args.start)
    args.run = run.folder / "other"
    args.run.mkdir()
    with pytest.raises(UserError, match="with other tensors; give the ema"):
        script.Run(args, run.data)


def test_a_bank_keeps_references_and_a_plan_mixes_them(run, described, tmp_path):
    """As in training: the projection of the weighted mean of features of length 1."""
    from train_resnet12 import load_network

    backbone, file = described
    source = Folder(paint(tmp_path / "photos", {"wolf": 3, "new": 3}, 32))
    bank = fill_bank(tmp_path / "bank", backbone, source, {}, "noise", stored=())
    trunk = load_network(file)[:-1]
    images = torch.stack([source.load(i, 3, 32) for i in bank.members["new"]])
    rows = nn.functional.normalize(trunk(normalised(images)), dim=1)
    torch.testing.assert_close(bank.references("new"), rows, rtol=1e-3, atol=1e-4)
    weights = (0.6, 0.3, 0.1)
    label, members = bank.classes.index("new"), bank.members["new"]
    plan = Plan(label, "new", members, weights, 0.0, 0, 0, 0, (), 1.0)
    made = Synthesizer(backbone, bank, sampling=Sampling(steps=2, guidance=2.0))
    given = Referred("", (torch.tensor(weights) @ bank.references("new"))[None])
    latents, level = made.mix([plan]).centroids, made.level(plan)
    expected = sample(backbone, latents, given, "fireflow", 2, 2.0, level=level)
    torch.testing.assert_close(made.images([plan]), expected, rtol=0, atol=1e-5)
    plain = sample(backbone, latents, "", "fireflow", 2, level=level)
    assert (plain - expected).abs().max() > 1e-3
    with pytest.raises(BankMismatch, match="made with reference = None, got"):
        bank.check(load_backbone(run.folder / "ema.safetensors", device="cpu"))
    bank.check(load_backbone(**bank.recipe, device="cpu"))


def test_the_test_bed_prints_gains_and_what_synthetic_images_are_like(
    run, described, tmp_path, monkeypatch, capsys
):
    import test_bed as bed

    short = [replace(learner, steps=2) for learner in bed.LEARNERS[:2]]
    fresh = bed.Row("fresh", bed.Mixing(level=1.0), references=True, guidance=2.0, per_class=2)
    rows = [bed.Row(bed.BASE), fresh, replace(fresh, name="half", kept=0.5, share=0.3)]
    monkeypatch.setattr(bed, "LEARNERS", short)
    monkeypatch.setattr(bed, "ROWS", [*rows, bed.Row(bed.TWICE, times=2)])
    monkeypatch.setattr(bed, "POOL", 4)
    monkeypatch.setattr(bed, "TESTED", 2)
    photos = paint(tmp_path / "photos", dict.fromkeys(bed.classes_of("novel"), 6), 32)
    options = ["--shots", "2", "--seeds", "2", "--solver-steps", "1", "--jobs", "1"]
    weights = ["--weights", run.folder / "ema.safetensors", "--trunk", described[1]]
    words = [photos, *weights, *options, "--out", tmp_path / "bed"]
    monkeypatch.setattr(sys, "argv", ["test_bed.py", *map(str, words)])
    bed.main()
    printed = capsys.readouterr().out
    assert printed.count("| twice the shots ") == 2 and "above half of twice" in printed
    causes = next(
        line for line in printed.splitlines() if line.startswith("| fresh") and "±" not in line
    )
    assert len(causes.split("|")) == 9
    made = sorted((tmp_path / "bed").rglob("runs/*.json"))
    assert len(made) == 2 * 4 * 2
    before = {path: path.stat().st_mtime_ns for path in made}
    bed.main()
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in made} == before, "finished runs are read"
    words[words.index("--solver-steps") + 1] = "2"
    monkeypatch.setattr(sys, "argv", ["test_bed.py", *map(str, words)])
    with pytest.raises(UserError, match="solver_steps"):
        bed.main()


def test_the_long_tailed_test_bed_fills_up_the_tail(run, described, tmp_path, monkeypatch, capsys):
    import long_tail_bed as tail
    import test_bed as bed

    monkeypatch.setattr(tail, "LARGEST", 4)
    monkeypatch.setattr(tail, "IMBALANCE", 4.0)
    monkeypatch.setattr(tail, "FEW", 2)
    monkeypatch.setattr(tail, "MANY", 3)
    monkeypatch.setattr(tail, "FILLINGS", tail.FILLINGS[1:])
    for module in (bed, tail):
        monkeypatch.setattr(module, "TESTED", 2)
    photos = paint(tmp_path / "photos", dict.fromkeys(bed.classes_of("novel"), 6), 32)
    weights = ["--weights", run.folder / "ema.safetensors", "--trunk", described[1]]
    sizes = ["--seeds", "2", "--steps", "2", "--fill-to", "2"]
    words = [photos, *weights, *sizes, "--out", tmp_path / "bed"]
    monkeypatch.setattr(sys, "argv", ["long_tail_bed.py", *map(str, words)])
    tail.main()
    printed = capsys.readouterr().out
    assert printed.count("samples by references") == 2 and printed.count("| nothing") == 2
    images = load_file(next(tmp_path.rglob("tail/centroids*/images.safetensors")))
    counts = tail.LongTail(bed.Folder(photos), 4.0, 0, 4).counts
    missing = [max(0, 2 - count) for count in counts]
    assert sum(missing) and images["labels"].bincount(minlength=len(counts)).tolist() == missing
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("tail-runs/*.json")}
    assert len(made) == 3 * 2 * 2
    tail.main()
    assert capsys.readouterr().out == printed
    assert {path: path.stat().st_mtime_ns for path in made} == made, "finished runs are read"


def test_a_network_for_references_that_does_not_fit_is_refused(run, described):
    from train_resnet12 import resnet12

    _, file = described
    weights = run.folder / "ema.safetensors"
    with pytest.raises(UserError, match="expected weights that learned from features"):
        load_backbone("tiny", device="cpu", reference=file)
    with pytest.raises(UserError, match=r"ResNet-12 whose features .*ema\.safetensors: "):
        load_backbone(weights, device="cpu", reference=weights)
    config = json.dumps({"width": 4, "classes": ["a"]})
    save_file(resnet12(3, 1, 4).state_dict(), file, {"config": config})
    with pytest.raises(UserError, match="40 features instead of 320"):
        load_backbone(weights, device="cpu", reference=file)


def test_the_report_judges_the_samples_of_every_file(run, monkeypatch):
    import train_resnet12
    import train_tiny_cifar as script

    run.train()
    judge = train_resnet12.resnet12(3, 64, 2)
    run.args.report = run.folder / "weights.safetensors"
    config = json.dumps({"width": 2, "classes": list(script.classes_of("base"))})
    run.args.report.write_bytes(save(judge.state_dict(), {"config": config}))
    monkeypatch.setattr(script, "HELD_OUT", 2)
    script.report(run.args)
    with (run.folder / "report.csv").open(newline="") as file:
        real, *rows = csv.DictReader(file)
    assert real["weights"] == "real" and float(real["fid"]) > 0
    assert [(row["weights"], row["images"]) for row in rows] == 2 * [("ema", "32")]
    assert [row["guidance"] for row in rows] == ["1.0", "2.0"]
    for row in rows:
        assert 0 <= float(row["accuracy"]) < 0.2, "nothing was learnt"
        assert float(row["fid"]) > 0
        assert (run.folder / f"ema-{float(row['guidance']):g}.png").stat().st_size > 10_000


def test_the_steps_of_a_batch_are_spread_over_all_levels(run):
    asked = []
    run.network.forward = lambda z, times, *rest: asked.append(times) or z
    run.loss()
    run.loss()
    assert torch.equal(*asked), "a step's batch is a function of its number"
    assert asked[0].min() < 150 and asked[0].max() > 850


@pytest.mark.parametrize("end", ["", "zero_snr", "flow"])
def test_the_trained_process_is_in_the_weights(scripts, tmp_path, end):
    import train_tiny as script

    clean = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    data = script.Data(clean, torch.ones(8).long(), script.PROMPTS, 1.0, 1.0, mirror=False)
    args = argparse.Namespace(
        **{"run": tmp_path, "out": tmp_path / "out.safetensors", "start": None, "keep": True},
        **{"zero_snr": end == "zero_snr", "flow": end == "flow"},
        **{"steps": 3, "batch": 8, "lr": 1e-3, "seed": 0, "bf16": False},
    )
    run = script.Run(args, data)
    assert (run.amounts[-1, 0] == 0) == bool(end), "nothing of the clean latent is left at the end"
    run.train()
    backbone = load_backbone(args.out, device="cpu")
    vp = VariancePreserving("v", zero_terminal_snr=end == "zero_snr")
    assert backbone.process == (Flow() if end == "flow" else vp)
    assert backbone.prompts == script.PROMPTS
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == [f"step-{step:06}.safetensors" for step in (0, 1, 2)]
    first = load_file(tmp_path / kept[0])
    torch.manual_seed(0)
    untrained = script.build_network(run.unet).state_dict()
    assert all(torch.equal(first[key], value.half()) for key, value in untrained.items())


def test_the_features_of_a_trained_network_are_tried_on_episodes(
    scripts, tmp_path, monkeypatch, capsys
):
    import train_resnet12 as script
    from cifar_fs import PARTS, classes_of

    counts = {name: 4 if part == "base" else 20 for part in PARTS for name in classes_of(part)}
    paint(tmp_path / "images", counts, 32)
    monkeypatch.setattr(script, "HELD_OUT", 2)
    given = [tmp_path / "images", "--run", tmp_path / "run", "--width", 2, "--epochs", 1]
    given += ["--episodes", 2, "--batch", 16]
    monkeypatch.setattr(sys, "argv", ["train_resnet12.py", *map(str, given)])
    script.main()
    said = capsys.readouterr().out
    lines = [line.split(":")[0] for line in said.splitlines()]
    assert lines[:2] == ["held out images of base classes", "seen images of base classes"]
    assert len(lines) == 10
    assert all(part in said for part in ("validation, 5-way 1-shot", "novel, 5-way 5-shot"))
    log = (tmp_path / "run" / "log.csv").read_text()
    assert len(log.splitlines()) == 1, "8 steps are not a line"
    features = load_file(tmp_path / "run" / "features.safetensors")
    assert {part: len(rows) for part, rows in features.items()} == {
        **{"base": 64 * 4, "validation": 16 * 20, "novel": 20 * 20}
    }
    torch.testing.assert_close(features["novel"].norm(dim=1), torch.ones(400))
    network = script.load_network(tmp_path / "run" / "weights.safetensors")
    images, _ = script.load_part(tmp_path / "images", "novel")
    again = nn.functional.normalize(network[:-1](normalised(images)), dim=1)
    torch.testing.assert_close(again, features["novel"], rtol=0, atol=1e-2)
