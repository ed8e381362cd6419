"""The datasets in loops of others: kinds of images, timm, Hugging Face, workers, slices."""

import numpy as np
import pytest
import torch
from conftest import COUNTS, dataset_with
from PIL import Image
from timm.data import create_loader
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from transformers import ViTImageProcessor

from augment import MixedDataset, UserError, open_shards, write_shards
from augment.core.errors import AugmentWarning
from augment.diffusion import backbone
from augment.sources.kinds import KINDS, as_kind
from augment.synthesis import dataset as module


@pytest.fixture
def make(bank, gaussian):
    def build(**options):
        return dataset_with(bank, gaussian, **{"per_class": 4, "steps": 4, **options})

    return build


def float_of(image):
    return v2.functional.to_dtype(v2.functional.to_image(image), torch.float32, scale=True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_may_come_as_any_kind(make, pictures, kind):
    plain, other = make()[5][0], make(as_=kind)[5][0]
    assert isinstance(other, Image.Image) == (kind == "pil")
    if kind == "uint8":
        assert other.dtype == torch.uint8
    assert (float_of(other).mean(0) - plain[0]).abs().max() < 0.51 / 255
    real = ImageFolder(str(pictures))
    mixed = MixedDataset(real, make(), as_=kind)
    given, expected = mixed[0][0], as_kind(real[0][0], kind)
    assert type(given) is type(expected) and np.array_equal(np.array(given), np.array(expected))
    assert type(mixed[len(real)][0]) is type(given)


def test_shards_give_the_same_kinds(make, tmp_path):
    data = make()
    write_shards(data.synthesizer, data.planner, 2, tmp_path, extension="png")
    pixels, plain, pil = (open_shards(tmp_path, as_=kind) for kind in ("uint8", "float", "pil"))
    assert torch.equal(pixels[0][0] / 255, plain[0][0])
    assert pil[0][0].mode == "RGB"
    assert [label for _, label in pil[1:3]] == plain.targets[1:3]
    assert repr(plain) == "Shards(6 images of 3 classes, 1 shards, as_='float')"


def test_an_unknown_kind_is_refused(make):
    with pytest.raises(UserError, match=r"expected a kind of image .*float, uint8, pil, got 'jpg'"):
        make(as_="jpg")


def loader_of(data):
    size, on = (3, 8, 8), torch.device("cpu")
    return create_loader(data, size, 4, is_training=False, num_workers=0, device=on)


def test_timm_gets_pil_images_and_says_so_where_floats_would_be_black(make, pictures):
    with pytest.raises(UserError, match=r"takes pixels of 0 to 255 .* pass as_='pil'"):
        next(iter(loader_of(make())))
    images, labels = next(iter(loader_of(make(as_="pil"))))
    assert images.std() > 0.1 and labels.tolist() == [0, 1, 2, 0]
    mixed = MixedDataset(ImageFolder(str(pictures)), make(), as_="pil")
    batches = [batch for batch, _ in loader_of(mixed)]
    assert sum(map(len, batches)) == sum(COUNTS.values()) + 12
    assert all(image.std() > 0.1 for batch in batches for image in batch)


def test_an_image_processor_does_not_rescale_twice(pictures):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})

    def transform(image):
        return processor(image, return_tensors="pt").pixel_values[0]

    real = ImageFolder(str(pictures))
    with pytest.raises(UserError, match=r"takes pixels of 0 to 255 .* pass as_='pil'"):
        MixedDataset(real, [], transform=transform, as_="float")[0]
    assert MixedDataset(real, [], transform=transform, as_="pil")[0][0].std() > 0.1


def test_a_transform_of_floats_is_left_alone(make):
    steps = [v2.RandomResizedCrop(8, scale=(0.2, 0.3)), v2.Normalize([0.5], [0.2])]
    data = make(transform=v2.Compose(steps))
    assert all(torch.isfinite(image).all() for image, _ in data[:6])
    for other in (torch.mean, torch.std, lambda image: (image > 0.5).byte()):
        make(transform=other)[0]
    flat = make(transform=lambda image: image * 0 + image.mean() if image.std() < 1 else image)
    with pytest.raises(UserError):  # of noise it leaves nothing either
        flat[0]


def test_an_error_of_a_transform_says_what_it_got(make):
    with pytest.raises(TypeError) as raised:
        make(as_="pil", transform=v2.Normalize([0.5], [0.5]))[0]
    assert "the transform got RGB images of PIL; as_=" in raised.value.__notes__[0]


@pytest.mark.parametrize("mixed", [False, True])
def test_an_epoch_reaches_workers_that_stay(make, mixed):
    data = make()
    data = MixedDataset(make(), data, 0.5, 8) if mixed else data
    loader = DataLoader(data, 4, num_workers=1, persistent_workers=True)
    seen = []
    for epoch in (0, 1, 0):
        data.set_epoch(epoch)
        seen.append(torch.cat([images for images, _ in loader]))
        expected = torch.stack([image for image, _ in data[:]])
        torch.testing.assert_close(seen[-1], expected, rtol=0, atol=1e-5)
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_a_mixed_dataset_has_all_of_both_and_its_labels(make, pictures):
    real, synthetic = ImageFolder(str(pictures)), make()
    both = MixedDataset(real, synthetic, as_="uint8")
    assert len(both) == len(real) + len(synthetic) and both.classes == list(COUNTS)
    assert both.targets == [label for _, label in both[:]] == real.targets + synthetic.targets
    drawn = MixedDataset(real, synthetic, 0.5, 30, as_="uint8")
    assert drawn.targets == [label for _, label in drawn[:]]
    real.classes = ["bee", "ant", "cat"]
    with pytest.raises(UserError, match="of the classes bee, ant, cat, got ant, bee, cat"):
        MixedDataset(real, synthetic)
    with pytest.raises(UserError, match="expected p_synthetic with a length"):
        MixedDataset(real, synthetic, length=5)


def test_images_one_by_one_are_warned_of(make, monkeypatch):
    monkeypatch.setattr(module, "SINGLES", 3)
    joined = DataLoader(ConcatDataset([make(), make()]), 4)
    with pytest.warns(AugmentWarning, match="asked for one by one, which takes several times"):
        next(iter(joined))
    for _ in DataLoader(MixedDataset(make(), make()), 4):
        pass


def test_slices_are_datasets_and_reprs_are_short(make, bank):
    data = make()
    part = data[2:11:4]
    assert len(part) == 3
    for (image, label), index in zip(part, (2, 6, 10), strict=True):
        torch.testing.assert_close(image, data[index][0], rtol=0, atol=1e-6)
        assert label == data.targets[index]
    assert repr(data) == "SyntheticDataset(12 images of 3 classes, fade/chm, as_='float', epoch 0)"
    assert repr(bank) == f"LatentBank({str(bank.path)!r}, 8 latents of 3 classes, 1×8×8)"
    assert len(repr(MixedDataset(data, data, 0.5, 9))) < 120


def test_no_bar_is_shown_in_a_loop(make, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(backbone, "Progress", spy(backbone.Progress, shown))
    data = make()
    data[0]
    data.synthesizer.images([data.plan(0)])
    assert shown == [True, False]


def spy(kind, shown):
    def bar(*args, **more):
        shown.append(more.get("disable", False))
        return kind(*args, **more)

    return bar


def test_a_float_image_beyond_its_range_is_cut_off_and_does_not_wrap():
    image = torch.tensor([1.004, -0.004, 1.0, 0.5]).view(1, 2, 2)
    assert as_kind(image, "uint8").flatten().tolist() == [255, 0, 255, 128]


def test_what_is_no_image_is_refused():
    with pytest.raises(UserError, match=r"expected an image, PIL or a tensor \(C, H, W\), got int"):
        as_kind(3, "pil")
