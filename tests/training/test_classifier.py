"""What a step's loss is: real and synthetic parts, their norms, re-weighting; and who evaluates."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import paint
from pytorch_lightning import Callback, Trainer
from torch.utils.data import Dataset

from augment import Sampling, SyntheticDataset, UserError, fill_bank, write_shards
from augment.core.errors import AugmentWarning
from augment.shards.export import export_folder
from augment.sources import FewShot, Folder
from augment.training import sweep
from augment.training.data.draws import SyntheticMix
from augment.training.data.module import ImageData
from augment.training.data.transforms import Augmentation
from augment.training.models.classifier import Classifier
from augment.training.models.finetune import AuxiliaryBatchNorm
from augment.training.models.losses import class_weights
from augment.training.sweep import seeded

COUNTS = [50, 10, 2]


def model(**options):
    torch.manual_seed(0)
    return Classifier(COUNTS, network=options.pop("network", "small_cnn"), **options)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.rand(8, 3, 32, 32, generator=generator), torch.arange(8) % 3
    return images, labels, torch.tensor([0, 1, 0, 0, 1, 0, 0, 1]).bool()


def costs(one, images, labels):
    return F.cross_entropy(one(images), labels, reduction="none")


def test_lambda_weighs_the_means_of_one_forward_pass(batch):
    images, labels, fake = batch
    one = model(real_weight=0.8).eval()
    order = torch.cat([(~fake).nonzero(), fake.nonzero()]).squeeze(1)
    each = costs(one, images[order], labels[order])
    expected = 0.8 * each[:5].mean() + 0.2 * each[5:].mean()
    torch.testing.assert_close(one.loss_of(images, labels, fake), expected)
    torch.testing.assert_close(
        one.loss_of(images, labels, torch.zeros(8).bool()), 0.8 * costs(one, images, labels).mean()
    )
    before = model(real_weight=0.8).network[1].running_mean
    one.train().loss_of(images, labels, fake)
    plain = model()
    plain.train().loss_of(images, labels, torch.zeros(8).bool())
    torch.testing.assert_close(one.network[1].running_mean, plain.network[1].running_mean)
    assert not torch.equal(one.network[1].running_mean, before)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
@pytest.mark.parametrize("options", [{"real_weight": 0.5}, {"auxiliary_norms": True}])
def test_any_number_of_synthetic_images_fits_a_batch(batch, count, options):
    """A lone image whose features are one pixel has no batch statistics."""
    images, labels, _ = batch
    one = model(network="resnet10", **options, mixup=0.3).train()
    one.loss_of(images, labels, torch.arange(8) < count).backward()
    missing = [name for name, p in one.named_parameters() if p.grad is None]
    assert missing == [], "ranks wait for the gradients of all"


def test_synthetic_images_have_norms_of_their_own(batch):
    images, labels, fake = batch
    one = model(auxiliary_norms=True).train()
    one.loss_of(images * (1 - 0.9 * fake.float())[:, None, None, None], labels, fake)
    norm = next(m for m in one.modules() if isinstance(m, AuxiliaryBatchNorm))
    alone = model().train()
    alone.loss_of(images[~fake], labels[~fake], fake[~fake])
    torch.testing.assert_close(norm.main.running_mean, alone.network[1].running_mean)
    assert not torch.allclose(norm.aux.running_mean, norm.main.running_mean)


def test_deferred_weights_keep_the_scale_of_the_loss(batch):
    images, labels, fake = batch
    one = model(reweight_from=0).eval()
    expected = F.cross_entropy(one(images), labels, class_weights(torch.tensor(COUNTS)))
    torch.testing.assert_close(one.loss_of(images, labels, fake), expected)
    later = model(reweight_from=1).eval()
    torch.testing.assert_close(
        later.loss_of(images, labels, fake), costs(later, images, labels).mean()
    )


def test_the_prior_counts_synthetic_images_that_join_by_count(tmp_path, tiny):
    paint(tmp_path / "real", {"Bag": 5, "Coat": 2}, size=28)
    bank = fill_bank(tmp_path / "bank", tiny, Folder(tmp_path / "real"), steps=1)
    fly = SyntheticDataset(bank, tiny, sampling=Sampling(steps=1), per_class={"Coat": 3})
    images, labels = torch.zeros(2, 1, 32, 32), torch.tensor([0, 1])
    for fakes, mix, drawn in (
        (None, SyntheticMix(), [5, 2]),
        (fly, SyntheticMix(share=0.5), [5, 2]),
        (fly, SyntheticMix(fill_to=4), [5, 4]),
        (fly, SyntheticMix(fill_to=4, real_only=1), [5, 2]),
    ):
        data = ImageData(str(tmp_path / "real"), synthetic=fakes, mix=mix, channels=1)
        model = Classifier(data.counts, channels=1, loss="balanced_softmax")
        assert data.counts == model.metrics.counts == [5, 2], "groups are of real images"
        model._trainer = Trainer(logger=False, enable_checkpointing=False, barebones=True)
        model._trainer.datamodule = data
        logits = model.eval()(images) + torch.tensor(drawn).log()
        expected = F.cross_entropy(logits, labels)
        torch.testing.assert_close(model.loss_of(images, labels, labels > 5), expected)


@pytest.mark.parametrize(
    "wrong",
    [{"reference_batch": 0}, {"tau": -1.0}, {"tau": float("nan")}, {"mixup": float("inf")},
     {"momentum": -1.0}, {"auxiliary_norms": True, "tune": "lora"}],
    ids=str,
)  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=f"expected .*{next(iter(wrong))}"):
        Classifier([5, 2], channels=1, **wrong)


@pytest.mark.parametrize(
    "wrong", [{"magnitude": 31}, {"magnitude": -1}, {"randaugment": -1}, {"rotation": -5.0},
              {"jitter": -1.0}], ids=str,
)  # fmt: skip
def test_augmentation_out_of_range_is_refused(wrong):
    with pytest.raises(UserError, match=f"expected {next(iter(wrong))}"):
        Augmentation(**wrong)


class Fakes(Dataset):
    """One synthetic image of each class."""

    classes = ("Bag", "Coat")

    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.zeros(1, 32, 32), index


@pytest.mark.parametrize("steps", [3, 4])
def test_the_last_epochs_are_real_whatever_is_accumulated(steps, tmp_path):
    """An epoch of 3 batches makes 2 steps of 2 batches each, the last of one."""
    paint(tmp_path / "real", {"Bag": 5, "Coat": 2}, size=28)
    data = ImageData(
        str(tmp_path / "real"), synthetic=Fakes([0, 1]), mix=SyntheticMix(share=1, real_only=4),
        channels=1, batch_size=2, steps_per_epoch=steps,
    )  # fmt: skip
    model, seen = Classifier(data.counts, channels=1), []

    class Count(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(0)

        def on_train_batch_start(self, trainer, pl_module, batch, index):
            seen[-1] += int(batch[2].sum()) if len(batch) > 2 else 0

    Trainer(
        max_steps=20, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        callbacks=[Count()], enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu",
    ).fit(model, data)  # fmt: skip
    assert seen == [2 * steps] * 6 + [0] * 4


@pytest.mark.parametrize("kind", [list, torch.tensor, np.array])
def test_targets_may_be_a_list_a_tensor_or_an_array(kind, tmp_path):
    paint(tmp_path / "real", {"Bag": 5, "Coat": 2}, size=28)
    data = ImageData(str(tmp_path / "real"), synthetic=Fakes(kind([0, 1])), channels=1)
    data.check_images(tmp_path / "images.json", False)


def test_real_images_are_no_synthetic_ones(tmp_path):
    for name, seed in (("real", 0), ("test", 1), ("made", 2)):
        paint(tmp_path / name, {"Bag": 3, "Coat": 2}, size=28, seed=seed)
    parts = [str(tmp_path / name) for name in ("real", "test", "made")]
    for synthetic in parts:
        data = ImageData(parts[0], test=parts[1], synthetic=synthetic)
        if synthetic == parts[0]:
            with pytest.warns(AugmentWarning, match="got 5 of the training images, such as Bag"):
                data.check_images(tmp_path / "images.json", False)
        elif synthetic == parts[1]:
            with pytest.raises(UserError, match="got 5 of the test images, such as Bag"):
                data.check_images(tmp_path / "images.json", False)
        else:
            data.check_images(tmp_path / "images.json", False)


def test_a_run_is_not_among_its_images(tmp_path):
    paint(tmp_path / "real", {"Bag": 3, "Coat": 2}, size=28)
    data = ImageData(FewShot(Folder(tmp_path / "real"), 2))
    data.keep_out(tmp_path / "run")
    for inside in ("real", "real/Bag/run"):
        with pytest.raises(UserError, match="expected a place beside the images"):
            data.keep_out(tmp_path / inside)


def test_a_source_that_changes_labels_is_refused(tmp_path):
    paint(tmp_path / "real", {"Bag": 5, "Coat": 2}, size=28)
    with pytest.raises(UserError, match="target_transform"):
        ImageData(Folder(tmp_path / "real", target_transform=lambda label: 1 - label))


def test_the_prior_follows_the_epochs_and_the_training_data(tmp_path, tiny):
    paint(tmp_path / "real", {"Bag": 5, "Coat": 2}, size=28)
    bank = fill_bank(tmp_path / "bank", tiny, Folder(tmp_path / "real"), steps=1)
    fly = SyntheticDataset(bank, tiny, sampling=Sampling(steps=1), per_class={"Coat": 3})
    model = Classifier([5, 2], channels=1, loss="balanced_softmax")
    for fakes, mix, drawn in (
        (fly, SyntheticMix(fill_to=5, real_only=1), [[5, 5], [5, 2]]),
        (None, SyntheticMix(), [[5, 2], [5, 2]]),
    ):
        seen = []

        class Counts(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                seen.append(pl_module._class_counts().tolist())  # noqa: B023

        data = ImageData(str(tmp_path / "real"), synthetic=fakes, mix=mix, channels=1, batch_size=4)
        Trainer(
            max_epochs=2, logger=False, enable_checkpointing=False, callbacks=[Counts()],
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        ).fit(model, data)  # fmt: skip
        assert seen == drawn


def test_origins_follow_an_export_and_strangers_are_reported(tmp_path, tiny):
    paint(tmp_path / "real", {"Bag": 4, "Coat": 3}, size=28)
    real = Folder(tmp_path / "real")
    bank = fill_bank(tmp_path / "bank", tiny, real, steps=1)
    fly = SyntheticDataset(bank, tiny, sampling=Sampling(steps=1), per_class=1)
    write_shards(fly.synthesizer, fly.planner, 1, tmp_path / "shards")
    export_folder(tmp_path / "shards", tmp_path / "exported")
    for name in ("shards", "exported"):
        fakes = str(tmp_path / name)
        with pytest.raises(UserError, match="no test image in the bank"):
            ImageData(real, test=real, synthetic=fakes, channels=1).setup("fit")
        ImageData(real, synthetic=fakes, channels=1).setup("fit")
        few = FewShot(real, 1)
        with pytest.warns(AugmentWarning, match="5 of 7 images"):
            ImageData(few, synthetic=fakes, channels=1).setup("fit")


@pytest.mark.parametrize("count", [9, 128, 255, 256, 257, 384, 513])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_evaluate_each_image_once_in_equal_numbers_of_batches(tmp_path, count, world):
    root = paint(tmp_path, {"Bag": 2, "Coat": 2}, size=32)
    data = ImageData(str(root), test=str(root), channels=1)
    source = data.held_out["test"]
    source.samples = [source.samples[i % 4] for i in range(count)]
    loaders = [data._loader("test", rank, world) for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    rows = [row for loader in loaders for batch in loader.batch_sampler for row in batch]
    assert sorted(rows) == list(range(count))


def test_a_sweep_tells_gains_over_its_first_row_by_seed(capsys):
    accuracies = {0.0: (0.5, 0.7), 0.25: (0.6, 0.84)}
    rows = [
        {"share": share, "seed": seed, "test/accuracy": value, "test/tail": 0.1}
        for share, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    plain, mixed = sweep._summarise(rows, ["share"])
    assert "test/gain" not in plain and mixed["test/gain"] == pytest.approx(0.12)
    assert mixed["test/gain ±"] == pytest.approx(12.7062 * 0.02, rel=1e-3)  # t of one degree
    sweep._print_table([plain, mixed], ["share"])
    printed = capsys.readouterr().out
    assert "| 0.25 | 72.0 ± " in printed and "| +12.0 ± 25.4 |" in printed
    assert "over the first row" in printed


def test_a_sweep_sets_every_seed():
    shots = {"class_path": "augment.sources.FewShot", "init_args": {"source": "x", "shots": 1}}
    config = {"data": {"train": shots, "more": [{"seed": 0}]}}
    made = seeded(config, 4)
    assert made["data"]["train"]["init_args"]["seed"] == 4 == made["data"]["more"][0]["seed"]
    assert "seed" not in shots["init_args"]
