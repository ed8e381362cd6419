"""Data, classifier and the demo's arithmetic."""

import math
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import dataset_with, paint

from augment import Planner, ReplayPool, Sampling, Synthesizer, SyntheticDataset, UserError
from augment.bank.fill import fill_bank
from augment.cli import main
from augment.core.schema import write
from augment.shards.dataset import write_shard
from augment.shards.export import export_folder
from augment.shards.format import ShardManifest
from augment.shards.write import write_shards
from augment.sources import FewShot, Folder
from augment.training.data.draws import SyntheticMix
from augment.training.data.module import ImageData, ReuseLogger
from augment.training.data.transforms import Augmentation, evaluation
from augment.training.demo import BASE, ROWS, TWICE, demo_trainer, summarise
from augment.training.models.classifier import Classifier
from augment.training.models.metrics import interval


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    for seed, name in enumerate(("real", "synthetic", "test")):
        paint(root / name, {"Bag": 3, "Coat": 4}, size=28, seed=seed)
    return root


def few(folders, **options):
    paths = {name: str(folders / name) for name in ("test", "synthetic")}
    small = {"channels": 1, "batch_size": 8, "steps_per_epoch": 3}
    return ImageData(str(folders / "real"), **(paths | small | options))


def classifier(data, **options):
    return Classifier(data.counts, channels=1, **options)


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_a_few_steps_change_the_weights_and_the_accuracy_is_counted(folders, mixup):
    torch.manual_seed(0)
    data, trainer = few(folders), demo_trainer(3)
    model = classifier(data, mixup=mixup)
    before = model.network[0].weight.clone()
    trainer.fit(model, data)
    assert trainer.global_step == 3
    assert not torch.equal(before, model.network[0].weight)
    measured = trainer.test(model, data, verbose=False)[0]
    images, labels = next(iter(data.test_dataloader()))
    hits = (model.eval()(images).argmax(1) == labels).float()
    assert measured["test/accuracy"] == pytest.approx(hits.mean().item())
    by_class = [hits[labels == k].mean().item() for k in range(2)]
    assert measured["test/balanced_accuracy"] == pytest.approx(sum(by_class) / 2)
    assert measured["test/few"] == pytest.approx(sum(by_class) / 2)


@pytest.fixture(scope="module")
def synthetic_bank(folders, tiny):
    return fill_bank(folders / "bank", tiny, Folder(folders / "real"), steps=1)


def test_shards_are_mixed_in_as_a_folder_of_them_is(folders, tiny, synthetic_bank):
    synthesizer = Synthesizer(tiny, synthetic_bank, sampling=Sampling(steps=1))
    planner = Planner(synthetic_bank.members)
    write_shards(synthesizer, planner, 4, folders / "shards", extension="png")
    export_folder(folders / "shards", folders / "exported")
    plain = Augmentation(crop=None, flip=False)
    drawn = []
    for name in ("shards", "exported"):
        data = few(folders, synthetic=str(folders / name), augment=plain, mix=SyntheticMix(1.0))
        items = [item for batch in data.train_dataloader() for item in zip(*batch, strict=True)]
        assert all(fake for _, _, fake in items)
        drawn.append({(int(label), image.numpy().tobytes()) for image, label, _ in items})
    assert len(drawn[0]) > 4
    everything = few(folders, synthetic=str(folders / "exported"), augment=plain).synthetic
    form = evaluation(1, 32)
    known = {(label, form(image).numpy().tobytes()) for image, label in everything}
    assert drawn[0] | drawn[1] <= known


def test_shards_without_an_image_are_not_trained_on_in_silence(folders, tmp_path):
    write_shard(tmp_path / "shard-000000.tar", [], "png")
    settings = ShardManifest(2, Folder(folders / "real").classes, 1, "png")
    write(tmp_path / "synthesis.json", settings)
    with pytest.raises(UserError, match=r"expected synthetic images in .*, got none"):
        ImageData(str(folders / "real"), synthetic=str(tmp_path))


def test_on_the_fly_images_come_from_the_training_images_of_the_bank(folders, tiny, synthetic_bank):
    few_shots = FewShot(folders / "real", 2, seed=1)
    data = ImageData(
        few_shots, synthetic=dataset_with(synthetic_bank, tiny, steps=1, per_class=3),
        channels=1, batch_size=4, steps_per_epoch=2, mix=SyntheticMix(0.5),
    )  # fmt: skip
    members = {i for index in range(6) for i in data.synthetic.plan(index).members}
    assert members == {i for ids in few_shots.ids.values() for i in ids}
    other = paint(folders / "elsewhere", {"Bag": 1, "Coat": 9}, seed=9)
    (other / "Bag" / "0.png").rename(other / "Bag" / "other.png")
    with pytest.raises(UserError, match=r"got 4 others of the same names, such as Coat/0\.png"):
        ImageData(str(other), synthetic=SyntheticDataset(synthetic_bank, tiny), channels=1)


def test_kept_images_are_made_once_and_are_the_same_whoever_asks(tiny, synthetic_bank):
    options = {"per_class": 5, "steps": 1, "batch_size": 4, "keep": True}
    one = dataset_with(synthetic_bank, tiny, **options)
    images = [image for image, _ in one.__getitems__(range(10))]
    made = one.synthesizer.images
    one.synthesizer.images = None  # nothing is asked for again
    one.set_epoch(3)
    assert all(torch.equal(one[i][0], images[i]) for i in range(10))
    one.synthesizer.images = made
    other = dataset_with(synthetic_bank, tiny, **options)
    assert all(torch.equal(other[i][0], images[i]) for i in (7, 2, 9, 0))
    assert one.subset(lambda _: True).kept is one.kept, "the same images are not made again"
    some = one.subset(lambda image_id: not image_id.endswith("0.png"))
    assert some.kept == {} and not torch.equal(some[0][0], images[0])


def test_how_a_pool_is_reused_is_logged(folders, tiny, synthetic_bank):
    synthetic = SyntheticDataset(
        synthetic_bank, tiny, sampling=Sampling(steps=1, batch_size=2), per_class=2
    )
    with ReplayPool(synthetic, 4) as pool:
        data = few(folders, synthetic=pool, mix=SyntheticMix(0.5))
        trainer = demo_trainer(3)
        trainer.callbacks.append(ReuseLogger())
        trainer.fit(classifier(data), data)
    assert trainer.logged_metrics["pool/made"] >= 2
    assert trainer.logged_metrics["pool/draws"] > 0
    assert trainer.logged_metrics["pool/reuse"] == pytest.approx(
        (trainer.logged_metrics["pool/draws"] / trainer.logged_metrics["pool/made"]).item()
    )


def test_soft_labels_of_mixed_classes_are_batched_with_hard_ones(folders, tiny, synthetic_bank):
    mixed = SyntheticDataset(
        synthetic_bank, tiny, sampling=Sampling(steps=1), per_class=3, classes=2
    )
    data = few(folders, synthetic=mixed, mix=SyntheticMix(0.5))
    _, labels, fake = next(iter(data.train_dataloader()))
    assert labels.shape == (8, 2) and torch.allclose(labels.sum(1), torch.ones(8))
    assert ((labels.max(1).values == 1) == ~fake).all()
    trainer = demo_trainer(2)
    trainer.fit(classifier(data, loss="balanced_softmax", cutmix=1.0), data)
    assert trainer.global_step == 2


def test_the_same_seed_trains_the_same_classifier(folders):
    def train():
        torch.manual_seed(1)
        data, trainer = few(folders), demo_trainer(3)
        model = classifier(data)
        trainer.fit(model, data)
        return model.network[0].weight

    assert torch.equal(train(), train())


def test_folders_of_other_classes_are_refused(folders, tmp_path):
    other = paint(tmp_path / "other", {"Bag": 1, "Dress": 1})
    for part in ("test", "synthetic"):
        with pytest.raises(UserError, match=f"the {part} images"):
            few(folders, **{part: str(other)})


@pytest.mark.parametrize("how", ["fly", "pool", "shards"])
def test_a_held_out_image_in_the_bank_is_refused(folders, tiny, synthetic_bank, tmp_path, how):
    """Under another name, in another folder."""
    held_out = paint(tmp_path / "held-out", {"Bag": 2, "Coat": 2}, seed=7)
    stolen = (folders / "real" / "Coat" / "2.png").read_bytes()
    fly = SyntheticDataset(synthetic_bank, tiny, sampling=Sampling(steps=1), per_class=1)
    if how == "shards":
        write_shards(fly.synthesizer, fly.planner, 1, tmp_path / "shards")
    with ReplayPool(fly, 2) if how == "pool" else nullcontext() as pool:
        synthetic = {"fly": fly, "pool": pool, "shards": str(tmp_path / "shards")}[how]
        data = few(folders, synthetic=synthetic, test=None, val=str(held_out))
        data.setup("fit")
        (held_out / "Coat" / "1.png").write_bytes(stolen)
        with pytest.raises(UserError, match=r"no val image in the bank.*Coat/1\.png.*Coat/2\.png"):
            data.setup("fit")


def test_a_bad_training_folder_is_one_sentence(monkeypatch, capsys, folders):
    args = ["train", "fit", "--data.train=nowhere", f"--data.test={folders / 'test'}"]
    monkeypatch.setattr(sys, "argv", ["latent-augment", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert err.startswith("latent-augment: expected")
    assert "nowhere" in err


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
