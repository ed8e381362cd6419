"""The datasets: the generator of an item depend on (seed, epoch, index) and on nothing else."""

import dataclasses
import itertools
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import COUNTS, dataset_with, planner_with, settings_of, snapshot
from torch.utils.data import DataLoader, Dataset, TensorDataset

from augment import (
    MixedDataset,
    Mixing,
    Plan,
    Planner,
    Rule,
    Sampling,
    SyntheticDataset,
    UserError,
)
from augment.bank.fill import fill_bank
from augment.core.errors import AugmentWarning
from augment.core.rng import normal, rng
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.diffusion.process import VariancePreserving
from augment.shards.dataset import Shards
from augment.shards.write import write_shards
from augment.sources import Folder
from augment.synthesis.filters import make_filter
from augment.synthesis.synthesizer import Synthesizer

PLANNERS = {
    "plain": {},
    "near vertices": {"alpha": 1e-3},
    "vertices": {"alpha": 0.0},
    "centres": {"alpha": math.inf},
    "pairs": {"members": 2},
    "more than there are": {"members": 99},
    "noisy": {"noise": 0.3},
    "another seed": {"seed": 7},
}
CHOICES = {
    "two classes": {"classes": 2, "noise": 0.3},
    "neighbours": {"members": 3, "nearest": "latent"},
    "neighbours of three classes": {"members": 2, "nearest": "latent", "classes": 3},
    "an alpha a member": {"members": 1, "classes": 2, "alpha": (3.0, 1.0)},
}
every_planner = pytest.mark.parametrize("options", PLANNERS.values(), ids=PLANNERS)
every_choice = pytest.mark.parametrize(
    "options", [*PLANNERS.values(), *CHOICES.values()], ids=[*PLANNERS, *CHOICES]
)


@pytest.fixture
def make(bank, gaussian):
    """Synthetic datasets of the shared bank, of few steps and images."""
    return lambda **options: dataset_with(bank, gaussian, **{"steps": 3, "per_class": 4} | options)


class Insides(Dataset[tuple[str, torch.Tensor]]):
    """What a synthetic dataset decided of each item, without sampling it."""

    def __init__(self, synthetic: SyntheticDataset) -> None:
        self.synthetic = synthetic

    def __len__(self) -> int:
        return len(self.synthetic)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        plan = self.synthetic.plan(index)
        return plan.to_json(), self.synthetic.synthesizer.centroid(plan)


def same(ours, theirs) -> bool:
    return all(
        plan == other and torch.equal(centroid, copy)
        for (plan, centroid), (other, copy) in zip(ours, theirs, strict=True)
    )


@every_choice
def test_plans_and_centroids_are_the_same_bits_in_any_order_and_history(make, options):
    first = list(Insides(make(**options)))
    other = Insides(make(**options, batch_size=1, steps=5))
    order = list(range(len(other)))
    random.Random(0).shuffle(order)
    for index in order[:3]:
        other.synthetic[index]
    shuffled = {index: other[index] for index in order}
    assert same(first, [shuffled[index] for index in range(len(other))])


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("workers", [0, 2])
def test_plans_and_centroids_are_the_same_bits_in_any_worker_and_batch(make, batch_size, workers):
    insides = Insides(make(noise=0.2))
    loader = DataLoader(
        insides,
        batch_size,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    loaded = [(p, c) for plans, centroids in loader for p, c in zip(plans, centroids, strict=True)]
    assert same(list(insides), loaded)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_nearly_the_same_in_any_worker_and_batch(make, workers):
    synthetic = make()
    context = "fork" if workers else None
    loader = DataLoader(synthetic, 5, num_workers=workers, multiprocessing_context=context)
    images, labels = (torch.cat(part) for part in zip(*loader, strict=True))
    singly = torch.stack([synthetic[index][0] for index in range(len(synthetic))])
    torch.testing.assert_close(images, singly, rtol=0, atol=1e-4)
    assert labels.tolist() == synthetic.targets


def test_an_item_is_an_image_and_a_label(make):
    synthetic = make()
    for index in (0, 4, -1):
        image, label = synthetic[index]
        assert image.shape == (1, 8, 8)
        assert image.dtype == torch.float32
        assert image.min() >= 0
        assert image.max() <= 1
        assert type(label) is int
        assert label == synthetic.targets[index]
    assert torch.equal(synthetic[-1][0], synthetic[len(synthetic) - 1][0])


def test_it_has_what_torchvision_datasets_have(make):
    synthetic = make(per_class=5)
    assert synthetic.classes == list(COUNTS)
    assert synthetic.class_to_idx == {"ant": 0, "bee": 1, "cat": 2}
    assert len(synthetic) == 15
    assert [synthetic.targets.count(label) for label in range(3)] == [5, 5, 5]
    for beyond in (15, -16):
        with pytest.raises(IndexError):
            synthetic[beyond]
    assert len(list(synthetic)) == 15


def test_transforms_are_applied_to_image_and_label(make):
    plain = make()
    changed = make(transform=lambda image: 1 - image, target_transform=lambda label: f"#{label}")
    image, label = changed[4]
    assert torch.equal(image, 1 - plain[4][0])
    assert label == "#1"


def test_the_bank_may_be_given_by_its_path(make, bank, gaussian):
    by_path = SyntheticDataset(str(bank.path), gaussian, sampling=Sampling(steps=3), per_class=4)
    assert same(list(Insides(by_path)), list(Insides(make())))


def test_an_epoch_throws_its_own_dice_and_can_be_had_again(make):
    synthetic = make()
    first = list(Insides(synthetic))
    synthetic.set_epoch(1)
    second = list(Insides(synthetic))
    changed = [plan != other for (plan, _), (other, _) in zip(first, second, strict=True)]
    assert all(changed)
    moved = [
        not torch.equal(one, other) for (_, one), (_, other) in zip(first, second, strict=True)
    ]
    assert moved == [label != 2 for label in synthetic.targets], "class 2 has one image only"
    synthetic.set_epoch(0)
    assert same(list(Insides(synthetic)), first)


def test_another_seed_throws_other_dice(make):
    ours, theirs = make(seed=0), make(seed=1)
    assert all(ours.plan(i).weights != theirs.plan(i).weights for i in (0, 1, 3, 4))


@every_choice
def test_a_plan_is_its_json_and_makes_its_image_again(make, options):
    synthetic = make(**options)
    for index in (1, 8):
        plan = synthetic.plan(index)
        line = plan.to_json()
        assert "\n" not in line
        read = Plan.from_json(line)
        assert read == plan
        fresh = make(**options)
        assert torch.equal(fresh.synthesizer.images([read])[0], synthetic[index][0])


BAD_PLANS = ["", "{", "[]", "3", "null", "{}", '{"label": 0}', '{"members": [], "weights": []}']


@pytest.mark.parametrize("line", BAD_PLANS)
def test_a_line_that_is_no_plan_is_refused(line):
    with pytest.raises(UserError, match="expected a plan"):
        Plan.from_json(line)


ODD_PLANS = {
    "of an unknown image": {"members": ("bee/99.png", "bee/0.png")},
    "of another class's images": {"members": ("ant/0.png", "ant/1.png")},
    "of an unknown class": {"class_name": "wasp"},
    "of fewer weights than members": {"weights": (1.0,)},
    "of fewer classes than members": {"classes": ("bee",)},
    "of images of each other's classes": {"classes": ("ant", "ant")},
    "of nobody": {"members": (), "weights": ()},
}


@pytest.mark.parametrize("odd", ODD_PLANS)
def test_a_plan_that_the_bank_cannot_follow_is_refused(make, odd):
    synthetic = make(members=2)
    plan = dataclasses.replace(synthetic.plan(1), **ODD_PLANS[odd])
    with pytest.raises(UserError):
        synthetic.synthesizer.centroid(plan)


@every_planner
def test_a_plan_is_on_the_simplex_and_within_its_class(bank, options):
    planner = planner_with(bank.members, **options)
    for epoch, index in itertools.product(range(2), range(12)):
        plan = planner(epoch, index)
        ids = bank.members[plan.class_name]
        assert plan.label == index % 3 == list(COUNTS).index(plan.class_name)
        assert len(plan.members) == min(planner.mixing.members or 99, len(ids)) == len(plan.weights)
        assert set(plan.members) <= set(ids)
        assert len(set(plan.members)) == len(plan.members)
        assert min(plan.weights) >= 0
        assert sum(plan.weights) == pytest.approx(1)
        assert (plan.noise, plan.seed) == (planner.mixing.noise, planner.mixing.seed)
        assert (plan.epoch, plan.index) == (epoch, index)


def test_drawn_members_are_each_drawn_equally_often(bank):
    planner = Planner(bank.members, Mixing(members=2))
    drawn = [image for n in range(600) for image in planner(0, 3 * n + 1).members]
    assert all(drawn.count(image) == pytest.approx(300, abs=60) for image in bank.members["bee"])


BAD_PARAMETERS = {
    "negative alpha": {"alpha": -0.1},
    "alpha not a number": {"alpha": math.nan},
    "all noise": {"noise": 1.0},
    "negative noise": {"noise": -0.1},
    "noise not a number": {"noise": math.nan},
    "no members": {"members": 0},
    "negative seed": {"seed": -1},
    "no images": {"per_class": 0},
    "unknown rule": {"rule": "fix/hat"},
    "unknown solver": {"solver": "heun"},
    "no steps": {"steps": 0},
    "no batch": {"batch_size": 0},
}


@pytest.mark.parametrize("fault", BAD_PARAMETERS)
def test_a_parameter_out_of_its_range_is_refused_when_the_dataset_is_made(make, fault):
    with pytest.raises(UserError):
        make(**BAD_PARAMETERS[fault])


def test_a_class_of_one_image_gives_it_back_and_noise_makes_it_another(make, bank, gaussian):
    plain, noisy, noisier = (make(noise=noise) for noise in (0.0, 0.2, 0.5))
    index = 2
    assert plain.plan(index).weights == (1.0,)
    latent = bank.latents("cat")[0]
    torch.testing.assert_close(plain.synthesizer.centroid(plain.plan(index)), latent)
    image = plain[index][0]
    distance = [(other[index][0] - image).abs().mean() for other in (noisy, noisier)]
    assert 0.01 < distance[0] < distance[1]
    assert not torch.equal(noisy[index][0], noisy[index + 3][0]), "each has noise of its own"


def test_noise_is_one_more_point_to_mix(make):
    plain, noisy = make(rule="lin/0"), make(rule="lin/0", noise=0.25)
    plan = noisy.plan(1)
    assert plan.weights == plain.plan(1).weights
    fresh = normal(rng(plan.seed, "noise", plan.epoch, plan.index), 1, 8, 8)
    mixed = plain.synthesizer.centroid(plain.plan(1))
    expected = 0.75 * mixed + 0.25 * fresh
    torch.testing.assert_close(noisy.synthesizer.centroid(plan), expected)


@pytest.mark.parametrize("rule", ["lin/0", "fix/0", "nin/chm"])
def test_the_rule_decides_the_centroid(make, rule):
    synthetic = make(rule=rule, alpha=math.inf)
    plan = synthetic.plan(1)
    points = synthetic.synthesizer.bank.latents("bee")
    expected = points.mean(0)
    if rule == "fix/0":
        expected = expected * 8 / expected.norm()
    if rule == "nin/chm":
        mean = points.mean((-2, -1), keepdim=True)
        residuals = points - mean
        average = residuals.mean(0)
        length = residuals.flatten(1).norm(dim=1).mean()
        expected = mean.mean(0) + average * length / average.norm()
    torch.testing.assert_close(synthetic.synthesizer.centroid(plan), expected)


def parts(real=40, synthetic=30):
    """Two datasets whose images say where they come from."""
    return (
        TensorDataset(torch.arange(real), torch.zeros(real)),
        TensorDataset(torch.arange(synthetic), torch.ones(synthetic)),
    )


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_share_of_synthetic_draws_is_the_one_asked_for(share):
    mixed = MixedDataset(*parts(), share, length=4000)
    drawn = mixed.__getitems__(range(4000))
    found = sum(origin.item() for _, origin in drawn) / 4000
    assert found == pytest.approx(share, abs=0.03 if 0 < share < 1 else 0)
    for origin, size in ((0, 40), (1, 30)):
        rows = {row.item() for row, where in drawn if where == origin}
        assert len(rows) in (0, size), "every item of a part has its turn"


def test_draws_depend_on_seed_epoch_and_index_alone():
    mixed, again = (MixedDataset(*parts(), 0.5, length=200) for _ in range(2))
    draws = [mixed.draw(index) for index in range(200)]
    order = list(range(200))
    random.Random(0).shuffle(order)
    shuffled = {index: again.draw(index) for index in order}
    assert [shuffled[index] for index in range(200)] == draws
    again.set_epoch(1)
    assert [again.draw(index) for index in range(200)] != draws
    again.set_epoch(0)
    assert [again.draw(index) for index in range(200)] == draws
    assert [MixedDataset(*parts(), 0.5, 200, seed=1).draw(i) for i in range(200)] != draws


def test_a_batch_of_draws_is_the_draws_one_by_one(make):
    real = TensorDataset(torch.rand(9, 1, 8, 8), torch.arange(9))
    mixed = MixedDataset(real, make(), 0.5, length=16)
    batch = mixed.__getitems__(range(16))
    assert {part for part, _ in map(mixed.draw, range(16))} == {0, 1}
    for index, (image, label) in enumerate(batch):
        alone, its_label = mixed[index]
        torch.testing.assert_close(image, alone, rtol=0, atol=1e-4)
        assert label == its_label


def test_an_end_of_the_share_needs_no_other_part():
    real, synthetic = parts(synthetic=0)
    assert all(part == 0 for part, _ in map(MixedDataset(real, synthetic, 0.0, 50).draw, range(50)))
    real, synthetic = parts(real=0)
    assert all(part == 1 for part, _ in map(MixedDataset(real, synthetic, 1.0, 50).draw, range(50)))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_out_of_its_range_is_refused(share):
    with pytest.raises(UserError, match="p_synthetic"):
        MixedDataset(*parts(), share, 10)


def test_a_mixed_dataset_ends_after_its_length():
    mixed = MixedDataset(*parts(), 0.5, length=6)
    assert len(mixed) == 6
    assert len(list(itertools.islice(mixed, 20))) == 6


def test_an_epoch_of_a_mixed_dataset_reaches_its_synthetic_part(make):
    synthetic = make()
    mixed = MixedDataset(parts()[0], synthetic, 0.5, length=6)
    mixed.set_epoch(3)
    assert synthetic.epoch == 3


@pytest.fixture
def write(bank, gaussian):
    """Synthesise two images a class as shards of four, with few steps."""

    def write(out: Path, planner=None, per_class: int = 2, **options) -> Shards:
        options = {"steps": 3, "batch_size": 4, "shard_size": 4, "extension": "png"} | options
        mixing, sampling, output = settings_of(options)
        synthesizer = Synthesizer(gaussian, bank, Rule.parse(mixing.rule), sampling)
        planner = planner_with(bank.members, **planner or {})
        return write_shards(synthesizer, planner, per_class, out, **output)

    return write


def test_shards_hold_the_images_of_their_plans(write, bank, gaussian, tmp_path):
    shards = write(tmp_path / "out")
    plans = [shards.plan(index) for index in range(len(shards))]
    assert plans == [Planner(bank.members)(0, index) for index in range(6)]
    assert shards.classes == bank.classes
    images = Synthesizer(gaussian, bank, sampling=Sampling(steps=3)).images(plans)
    for plan, image, (stored, label) in zip(plans, images, shards, strict=True):
        assert label == plan.label
        torch.testing.assert_close(stored, image, rtol=0, atol=0.6 / 255)
    about = shards.about(0)
    assert about["rule"] == "fade/chm" and about["backbone"] == gaussian.fingerprint


def test_classes_may_have_numbers_of_their_own(write, bank, gaussian, tmp_path):
    counts = dict(zip(bank.classes, (0, 3, 1), strict=True))
    shards = write(tmp_path / "out", per_class=counts)
    assert shards.targets == [1, 2, 1, 1]
    fly = SyntheticDataset(bank, gaussian, sampling=Sampling(steps=3), per_class=counts)
    assert fly.targets == shards.targets == [label for _, label in fly]
    assert [fly.plan(index) for index in range(4)] == [shards.plan(index) for index in range(4)]


def test_interrupted_shards_go_on_to_the_same_bytes(write, tmp_path, monkeypatch):
    write(tmp_path / "whole")
    whole = snapshot(tmp_path / "whole")
    for name in ("shard-000001.tar", "shard-000001.json"):
        part = shutil.copytree(tmp_path / "whole", tmp_path / name)
        (part / name).unlink()
        write(part)
        assert snapshot(part) == whole
    monkeypatch.setattr(Synthesizer, "images", None)  # it would be an error to call it
    write(tmp_path / "whole")


OTHERS = {
    "steps": {"steps": 4},
    "rule": {"rule": "fix/0"},
    "solver": {"solver": "midpoint"},
    "guidance": {"guidance": 2.0},
    "per class": {"per_class": 3},
    "shard size": {"shard_size": 3},
    "format": {"extension": "jpg"},
    "quality": {"quality": 90},
    "pixels": {"pixels": 4},
    "candidates": {"candidates": 2},
    "filters": {"filters": {"degenerate": make_filter("degenerate")}},
    "batch": {"batch_size": 3},
    "seed": {"planner": {"seed": 1}},
    "alpha": {"planner": {"alpha": 0.5}},
    "members": {"planner": {"members": 1}},
    "noise": {"planner": {"noise": 0.1}},
}


def test_guidance_without_prompts_is_told_of(bank, gaussian):
    with pytest.warns(AugmentWarning, match="guidance does nothing"):
        Synthesizer(gaussian, bank, sampling=Sampling(guidance=2.0))


def test_steps_that_begin_at_another_level_are_refused(tmp_path, pictures):
    process = VariancePreserving(spacing="leading", offset=1)
    backbone = GaussianBackbone(latent_shape=(1, 8, 8), process=process)
    leading = fill_bank(tmp_path / "bank", backbone, Folder(pictures), steps=4)
    assert Synthesizer(backbone, leading).resolved.steps == 4
    with pytest.raises(UserError, match="take 4 steps"):
        Synthesizer(backbone, leading, sampling=Sampling(steps=10))


@pytest.mark.filterwarnings("ignore:expected prompts to guide by")
@pytest.mark.parametrize("other", OTHERS)
def test_a_folder_of_other_settings_is_not_touched(write, other, tmp_path):
    write(tmp_path / "out")
    before = snapshot(tmp_path / "out")
    with pytest.raises(UserError, match="new folder"):
        write(tmp_path / "out", **OTHERS[other])
    assert snapshot(tmp_path / "out") == before


def test_a_folder_of_infinite_alpha_goes_on_too(write, tmp_path):
    planner = {"alpha": math.inf}
    write(tmp_path / "out", planner)
    before = snapshot(tmp_path)
    write(tmp_path / "out", planner)
    assert snapshot(tmp_path) == before


def test_a_folder_in_use_is_not_touched(write, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match="new one"):
        write(tmp_path)
    with pytest.raises(UserError, match=r"mine\.txt"):
        write(tmp_path / "mine.txt")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "fault",
    [
        {"per_class": 0},
        {"batch_size": 0},
        {"batch_size": -1},
        {"shard_size": 0},
        {"quality": 0},
        {"quality": 101},
        {"pixels": 0},
        {"candidates": 0},
        {"extension": "gif"},
    ],
    ids=str,
)
def test_a_bad_number_leaves_no_half_made_folder(write, fault, tmp_path):
    with pytest.raises(UserError):
        write(tmp_path / "out", **fault)
    assert not (tmp_path / "out").exists()
