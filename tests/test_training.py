"""Data, classifier and the demo's arithmetic."""

import math
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import paint

from augment import Planner, ReplayPool, Synthesizer, SyntheticDataset, UserError
from augment.cli import main
from augment.export import export_folder
from augment.fill import fill_bank
from augment.generate import write_shards
from augment.sources import Folder
from training.classifier import Classifier
from training.data import FewShotData, FolderDataset, ReuseLogger
from training.demo import BASE, ROWS, TWICE, interval, quiet_trainer, summarise

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    for seed, name in enumerate(("real", "synthetic", "test")):
        paint(root / name, {"Bag": 3, "Coat": 4}, size=28, seed=seed)
    return root


def few(folders, **options):
    paths = {name: str(folders / name) for name in ("real", "test", "synthetic")}
    return FewShotData(**(paths | {"batch_size": 8, "steps_per_epoch": 3} | options))


def test_a_folder_is_a_dataset(folders):
    data = FolderDataset(folders / "real")
    assert len(data) == 7
    assert data.classes == ["Bag", "Coat"]
    assert data.targets == [label for _, label in data]
    assert data[0][0].shape == (1, 32, 32)


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_a_few_steps_change_the_weights_and_the_accuracy_is_counted(folders, mixup):
    torch.manual_seed(0)
    data, trainer = few(folders), quiet_trainer(3)
    model = Classifier(data.num_classes, mixup=mixup)
    before = model.network[0].weight.clone()
    trainer.fit(model, data)
    assert trainer.global_step == 3
    assert not torch.equal(before, model.network[0].weight)
    measured = trainer.test(model, data, verbose=False)[0]
    images, labels = next(iter(data.test_dataloader()))
    hits = (model.eval()(images).argmax(1) == labels).float()
    assert measured["accuracy"] == pytest.approx(hits.mean().item())
    assert measured["accuracy/class_1"] == pytest.approx(hits[labels == 1].mean().item())


@pytest.fixture(scope="module")
def synthetic_bank(folders, tiny):
    return fill_bank(folders / "bank", tiny, Folder(folders / "real"), steps=1)


def test_shards_are_mixed_in_as_a_folder_of_them_is(folders, tiny, synthetic_bank):
    synthesizer = Synthesizer(tiny, synthetic_bank, steps=1)
    planner = Planner(synthetic_bank.members)
    write_shards(synthesizer, planner, 4, folders / "shards", extension="png")
    export_folder(folders / "shards", folders / "exported")
    pairs = [
        few(folders, synthetic=str(folders / name), augment=False, p_synthetic=1.0).train
        for name in ("shards", "exported")
    ]
    drawn = []
    for data in pairs:
        images = [data[index] for index in range(24)]
        drawn.append({(label, image.numpy().tobytes()) for image, label in images})
        assert all(image.shape == (1, 32, 32) for image, _ in images)
    everything = few(folders, synthetic=str(folders / "exported"), augment=False).train.parts[1]
    known = {(label, image.numpy().tobytes()) for image, label in everything}
    assert drawn[0] <= known and drawn[1] <= known and len(drawn[0]) > 4


def test_how_a_pool_is_reused_is_logged(folders, tiny, synthetic_bank):
    synthetic = SyntheticDataset(synthetic_bank, tiny, per_class=2, steps=1, batch_size=2)
    with ReplayPool(synthetic, 4) as pool:
        data = few(folders)
        data.train.parts = (data.real, pool)
        trainer = quiet_trainer(3)
        trainer.callbacks.append(ReuseLogger(pool))
        trainer.fit(Classifier(data.num_classes), data)
    assert trainer.logged_metrics["pool/made"] >= 2
    assert trainer.logged_metrics["pool/draws"] > 0
    assert trainer.logged_metrics["pool/reuse"] == pytest.approx(
        (trainer.logged_metrics["pool/draws"] / trainer.logged_metrics["pool/made"]).item()
    )


def test_the_same_seed_trains_the_same_classifier(folders):
    def train():
        torch.manual_seed(1)
        data, trainer = few(folders), quiet_trainer(3)
        model = Classifier(data.num_classes)
        trainer.fit(model, data)
        return model.network[0].weight

    assert torch.equal(train(), train())


def test_a_network_of_timm_is_built_by_its_name():
    logits = Classifier(3, network="resnet10t", channels=1)(torch.rand(2, 1, 32, 32))
    assert logits.shape == (2, 3)
    with pytest.raises(UserError, match="timm"):
        Classifier(3, network="resnet99")


def test_folders_of_other_classes_are_refused(folders, tmp_path):
    other = paint(tmp_path / "other", {"Bag": 1, "Dress": 1})
    for part in ("test", "synthetic"):
        with pytest.raises(UserError, match=f"{part} folder"):
            few(folders, **{part: str(other)})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_a_config_trains(config, folders, monkeypatch, tmp_path):
    assert config.read_text().startswith("# expected:")
    assert {"model", "data", "trainer"} <= yaml.safe_load(config.read_text()).keys()
    overrides = [f"--data.{name}={folders / name}" for name in ("real", "test", "synthetic")]
    few_steps = ["--trainer.max_steps=2", "--data.batch_size=4", "--trainer.accelerator=cpu"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    quiet += [f"--trainer.default_root_dir={tmp_path}"]
    args = ["train", "fit", "--config", str(config), *overrides, *few_steps, *quiet]
    monkeypatch.setattr(sys, "argv", ["latent-augment", *args])
    main()
    assert list(tmp_path.rglob("*.ckpt"))


def test_a_bad_training_folder_is_one_sentence(monkeypatch, capsys, folders):
    args = ["train", "fit", "--data.real=nowhere", f"--data.test={folders / 'test'}"]
    monkeypatch.setattr(sys, "argv", ["latent-augment", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert told.startswith("latent-augment: expected")
    assert "nowhere" in told


def test_the_interval_is_students():
    assert interval([0.6, 0.7, 0.8]) == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert interval([0.5, 0.5]) == 0


def test_gains_are_paired_and_shared_out_against_twice_the_shots():
    name = "real + centroids fade/chm"
    table = {BASE: [0.5, 0.7], name: [0.52, 0.74], TWICE: [0.56, 0.76]}
    records = {record["row"]: record for record in summarise(table)}
    assert list(records) == [row.name for row in ROWS if row.name in table]
    ours = records[name]
    assert ours["accuracy"] == pytest.approx(0.63)
    assert ours["gain"] == pytest.approx(0.03)
    assert ours["gain_ci95"] == pytest.approx(12.71 * 0.01, rel=1e-3)
    assert ours["share_of_twice"] == pytest.approx(0.5)
    assert (ours["shots"], records[TWICE]["shots"], ours["seeds"]) == (5, 10, 2)
