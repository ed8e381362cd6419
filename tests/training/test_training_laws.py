"""Laws of the training beside test_training.py: draws, rates, augmentation, intervals."""

import itertools
import math
import os
import signal
import sys
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import paint
from PIL import Image

from augment import UserError, cli
from augment.core.rng import rng
from augment.sources.images import to_pil
from augment.training import demo
from augment.training.data.draws import SyntheticMix
from augment.training.data.module import ImageData
from augment.training.data.transforms import Augmentation
from augment.training.models.classifier import Classifier
from augment.training.models.metrics import interval
from augment.training.models.networks import build_network

PLAIN = Augmentation(crop=None, flip=False)
COUNTS = {"ant": 5, "bee": 4, "cat": 3}
CONFIG = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of noise, real and test, and synthetic ones that are all black."""
    root = tmp_path_factory.mktemp("data")
    paint(root / "real", COUNTS, size=32)
    paint(root / "test", COUNTS, size=32, seed=1)
    for path in paint(root / "synthetic", COUNTS, size=32).rglob("*.png"):
        Image.new("L", (32, 32)).save(path)
    return root


@pytest.fixture
def data(root: Path):
    small = {"channels": 1, "batch_size": 8, "steps_per_epoch": 3, "test": str(root / "test")}
    return lambda **options: ImageData(str(root / "real"), **small | options)


def trainer(steps: int) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def fit(
    model: pl.LightningModule, data: pl.LightningDataModule, steps: int = 3
) -> dict[str, float]:
    """Train, then test."""
    lightning = trainer(steps)
    lightning.fit(model, data)
    assert lightning.global_step == steps
    return dict(lightning.test(model, data, verbose=False)[0])


@pytest.mark.parametrize("network", ["small_cnn", "test_resnet"])
@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_three_steps_move_every_weight_and_give_accuracies(data, network, mixup):
    torch.manual_seed(0)
    model = Classifier([5, 4, 3], network=network, channels=1, mixup=mixup)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    result = fit(model, data())
    for name, weight in model.named_parameters():
        assert weight.isfinite().all()
        assert not torch.equal(weight, before[name]), name
    assert {"test/accuracy", "test/balanced_accuracy", "test/few", "test/ece"} == set(result)
    assert all(0 <= value <= 1 for value in result.values())


def test_black_and_white_are_learnt(tmp_path):
    for part, first in (("train", 0), ("test", 4)):
        for name, grey in (("black", 20), ("white", 235)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(first, first + 4):
                Image.new("L", (32, 32), grey + number).save(folder / f"{number}.png")
    torch.manual_seed(0)
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    images = ImageData(train, test=test, channels=1, batch_size=8, steps_per_epoch=10)
    assert fit(Classifier([4, 4], channels=1), images, steps=30)["test/accuracy"] == 1


def test_the_learning_rate_falls_to_zero_at_the_last_step(data):
    rates = []

    class Watched(Classifier):
        def on_train_batch_end(self, *args):
            rates.append(self.optimizers().param_groups[0]["lr"])

    fit(Watched(list(COUNTS.values()), channels=1, lr=0.1), data(), steps=6)
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * k / 6)) for k in range(1, 7)])


def test_every_epoch_of_a_training_has_draws_of_its_own(data):
    sums = []

    class Watched(Classifier):
        def training_step(self, batch, batch_idx):
            sums.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

    fit(Watched(list(COUNTS.values()), channels=1), data(augment=PLAIN), steps=9)
    epochs = [sums[first : first + 3] for first in (0, 3, 6)]
    assert all(one != other for one, other in itertools.combinations(epochs, 2))


def test_a_training_without_an_end_is_refused(data):
    endless = pl.Trainer(
        max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="max_steps"):
        endless.fit(Classifier([5, 4, 3], channels=1), data())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 28, 64])
def test_the_small_network_takes_images_of_any_size(channels, size):
    network = build_network("small_cnn", channels, 7)
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 7)


def test_synthetic_images_are_drawn_by_their_share(root, data):
    def share_of_black(share=0.25, **options):
        one = data(augment=PLAIN, batch_size=300, mix=SyntheticMix(share), **options)
        images = torch.cat([images for images, _, _ in one.train_dataloader()])
        return (images.flatten(1).sum(1) == 0).float().mean().item()

    black = str(root / "synthetic")
    assert share_of_black() == 0
    assert share_of_black(0.9) == 0, "without synthetic images there are none to draw"
    assert share_of_black(0.25, synthetic=black) == pytest.approx(0.25, abs=0.05)
    assert share_of_black(1.0, synthetic=black) == 1


def test_shifts_and_mirror_images():
    torch.manual_seed(0)
    image = torch.zeros(1, 32, 32)
    image[0, 12:20, 8:12] = 1.0
    image[0, 12, 12:20] = 0.5  # tells left from right
    for flip in (False, True):
        classical = Augmentation(flip=flip)
        fixed, random = classical.fixed(1, 32), classical.random(32)
        columns, mirrored = set(), 0
        generators = [rng(0, "augment", 0, place) for place in range(60)]
        made = random([fixed(image)] * 60, generators)
        assert made.shape == (60, *image.shape)
        again = random([fixed(image)], [rng(0, "augment", 0, 59)])[0]
        assert torch.equal(made[59], again), "an image's generators are its own"
        for changed in made:
            assert changed.sum() == pytest.approx(32 + 8 * 127 / 255), "it is shifted, not cut"
            full = [c for c in range(32) if (changed[0, :, c] == 1).any()]
            half = [c for c in range(32) if ((changed[0, :, c] - 0.5).abs() < 0.01).any()]
            mirrored += full[0] > half[0]
            columns.add(full[0])
        assert len(columns) > 5
        assert (10 < mirrored < 50) if flip else (mirrored == 0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augment",
    [
        Augmentation(crop="resized", jitter=0.4),
        Augmentation(crop=None, rotation=15),
        Augmentation(randaugment=2),
    ],
)
@pytest.mark.parametrize("mode", ["L", "RGB", "tensor"])
def test_any_image_becomes_the_networks(channels, augment, mode):
    wide = torch.rand(3, 40, 57)
    image = wide if mode == "tensor" else to_pil(wide if mode == "RGB" else wide[:1])
    generators = [rng(0, "augment", 0, place) for place in range(3)]
    for made in augment.random(32)([augment.fixed(channels, 32)(image)] * 3, generators):
        assert made.shape == (channels, 32, 32) and made.dtype == torch.float32
        assert 0 <= made.min() <= made.max() <= 1


def student_t_mass(t: float, freedom: int) -> float:
    """The mass of Student's law between -t and t, by quadrature."""
    x = np.linspace(-t, t, 200_001)
    log_constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = np.exp(log_constant) / math.sqrt(freedom * math.pi)
    return float(np.trapezoid(density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x))


@pytest.mark.parametrize("count", [2, 3, 5, 8, 10, 11, 12, 15, 20, 30])
def test_an_interval_holds_95_percent_of_students_law(count):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count)).double()
    error = values.std().item() / math.sqrt(count)
    mass = student_t_mass(interval(values.tolist()) / error, count - 1)
    assert mass == pytest.approx(0.95, abs=1e-3)


def test_a_summary_without_a_gain_to_share_has_no_share():
    accuracies = {demo.TWICE: [0.6, 0.7], demo.BASE: [0.6, 0.7]}
    assert [record["share_of_twice"] for record in demo.summarise(accuracies)] == [None, None]


def test_the_rows_of_the_demo_are_named_once_and_the_full_demo_has_all_of_them():
    names = [row.name for row in demo.ROWS]
    assert len(set(names)) == len(names)
    assert set(demo.FULL.rows) == set(names)
    assert {demo.BASE, demo.TWICE} <= set(demo.Settings().rows) < set(names)


class Fatal(type(Path())):
    """A path that ends the process which reads it."""

    def __reduce__(self):
        return os._exit, (1,)


def test_the_demo_says_what_to_do_when_a_process_of_it_dies(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError, match=r"got the end of one.*OMP_NUM_THREADS=1"):
        demo.run_all(Fatal(tmp_path), demo.Settings(seeds=2), [(demo.ROWS[0], 0)])
    assert signal.getsignal(signal.SIGINT) == before and not active_children()


def test_the_config_of_the_demo_trains_by_the_command(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = (
        f"train fit --config {CONFIG} --data.train {root}/real --data.test {root}/test "
        f"--data.synthetic {root}/synthetic --trainer.max_steps 2 --trainer.accelerator cpu "
        "--data.steps_per_epoch 2 --trainer.enable_progress_bar false --trainer.log_every_n_steps 1"
    )
    for _ in range(2):  # the same command may be given again
        monkeypatch.setattr(sys, "argv", ["latent-augment", *line.split()])
        cli.main()
    assert "Traceback" not in capsys.readouterr().err
    top = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")}
    assert top <= {"runs"}, "everything is kept under runs/"
