"""Jobs and what they make: shards that anybody may remake, filters, ranks, banks merged."""

import pickle
import re
import shutil
import warnings
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from conftest import COUNTS, amend, planner_with, snapshot
from shard_folders import small_job

from augment import (
    BankMismatch,
    LatentBank,
    Planner,
    Synthesizer,
    SyntheticDataset,
    UserError,
    open_shards,
)
from augment.bank.fill import InversionJob, fill_bank
from augment.bank.merge import merge, split
from augment.core.errors import AugmentWarning
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.diffusion.sampling import Sampling
from augment.inversion import inverter
from augment.jobs.job import estimate, run, stripe
from augment.plan.mixing import Mixing
from augment.shards.verify import count_shards, inspect, verify
from augment.shards.write import ShardJob, write_shards
from augment.sources import Folder
from augment.synthesis.filters import Reference


@dataclass(frozen=True)
class Dark:
    """Scores by darkness; keeps what is darker than the median of what the plans give."""

    minimum: float | None = -0.5

    def prepare(self, reference: Reference):
        assert reference.classes == list(COUNTS)
        assert [len(reference.real(label)) for label in range(3)] == list(COUNTS.values())
        return lambda images, labels: -images.flatten(1).mean(1)


@dataclass(frozen=True)
class Never:
    """Keeps nothing; what it says is not even a number."""

    minimum: float | None = 0.0

    def prepare(self, reference: Reference):
        return lambda images, labels: torch.full((len(images),), torch.nan)


@pytest.fixture
def make(bank, gaussian, tmp_path):
    return partial(small_job, tmp_path, bank, gaussian)


def test_anybody_may_remake_any_shard(make, tmp_path):
    assert run(make())
    whole = snapshot(tmp_path / "out")
    for number in (2, 0):
        job = pickle.loads(pickle.dumps(make("other")))
        job.path.mkdir(exist_ok=True)
        job.plan()
        job.start()(number)
        name = f"shard-{number:06d}.tar"
        assert (job.path / name).read_bytes() == whole[name]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_a_job_in_any_order(make, world, tmp_path):
    assert run(make("whole"))
    done = [run(make(), ranks=(rank, world)) for rank in reversed(range(world))]
    assert done == [False] * (world - 1) + [True]
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def test_ranks_share_a_bank_too(tmp_path, gaussian, pictures, monkeypatch):
    monkeypatch.setattr("augment.bank.fill.CHUNK", 2)
    whole = fill_bank(tmp_path / "whole", gaussian, Folder(pictures), steps=2)
    for rank in (2, 0, 1):
        method = inverter("forward_start", steps=2)
        job = InversionJob(tmp_path / "part", Folder(pictures), gaussian, method)
        assert run(job, ranks=(rank, 3)) == (rank == 1)
    assert snapshot(tmp_path / "part") == snapshot(whole.path)


def test_a_job_sent_elsewhere_loads_its_backbone_by_its_recipe(tiny, tmp_path):
    from augment.sources.fashion import write_fashion

    source = Folder(write_fashion(tmp_path / "images", "shots", [0]))
    method = inverter("forward_start", steps=1)
    job = InversionJob(tmp_path / "bank", source, tiny, method, where={"device": "cpu"})
    job.path.mkdir()
    job.plan()
    sent = pickle.loads(pickle.dumps(job))
    assert sent.backbone is None
    sent.start()(0)
    bank = LatentBank.open(tmp_path / "bank")
    here = fill_bank(tmp_path / "here", tiny, source, steps=1)
    assert torch.equal(bank.latents("Bag"), here.latents("Bag"))
    shards = ShardJob(tmp_path / "s", Synthesizer(tiny, bank), Planner(bank.members), 1)
    assert pickle.loads(pickle.dumps(shards)).synthesizer.backbone is None
    assert shards.synthesizer.backbone is tiny


RANKS = {
    "none": ({}, (0, 1)),
    "torchrun": ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
    "an array": (
        {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "5",
         "SLURM_ARRAY_TASK_STEP": "2"}, (2, 3),
    ),
    "a rank beyond": ({"RANK": "4", "WORLD_SIZE": "4"}, None),
    "no rank": ({"WORLD_SIZE": "4"}, None),
    "a word": ({"RANK": "first", "WORLD_SIZE": "4"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_ranks_are_read_from_the_environment(name, monkeypatch):
    env, expected = RANKS[name]
    for key in ("RANK", "WORLD_SIZE", *(f"SLURM_ARRAY_TASK_{k}" for k in ("ID", "COUNT", "MIN"))):
        monkeypatch.delenv(key, raising=False)
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    if expected:
        assert stripe() == expected
        return
    with pytest.raises(UserError, match="WORLD_SIZE"):
        stripe()


def test_an_estimate_is_of_what_is_left_and_keeps_what_it_made(make, tmp_path):
    text = estimate(make())
    assert text.startswith("3 units, 24 images; 3 units, 24 images to do\nunit 0 is made and kept")
    assert "the other 14 images" in text
    assert run(make())
    assert estimate(make()) == "3 units, 24 images; 0 units, 0 images to do"


def test_refused_images_are_drawn_again_and_those_kept_pass(make, tmp_path):
    assert run(make("one", filters={"dark": Dark()}))
    assert run(make("many", filters={"dark": Dark()}, candidates=8))
    one, many = open_shards(tmp_path / "one"), open_shards(tmp_path / "many")
    assert 0 < len(one) < 24 and len(one) < len(many)
    for shards, tries in ((one, 1), (many, 8)):
        epochs = set()
        for index, (image, label) in enumerate(shards):
            about = shards.about(index)
            assert -about["scores"]["dark"] == pytest.approx(image.mean().item(), abs=0.003)
            assert about["scores"]["dark"] >= -0.5
            assert shards.plan(index).label == label
            epochs.add(shards.plan(index).epoch)
        assert epochs <= set(range(tries))
        assert tries == 1 or len(epochs) > 1
        tally = count_shards(shards.paths[0].parent)
        assert (tally.written, tally.wanted) == (len(shards), 24)
        refused = tally.refused["dark"].total()
        assert refused == 24 - len(one) if tries == 1 else refused > 24 - len(many)
        assert "filter dark refused" in inspect(shards.paths[0].parent)
    firsts = {one.plan(i).index for i in range(len(one))}
    kept = {p.index for i in range(len(many)) if (p := many.plan(i)).epoch == 0}
    assert firsts == kept, "what passed at once is not drawn again"


def test_a_filter_without_a_minimum_scores_only_and_one_that_fails_all_leaves_none(make, tmp_path):
    assert run(make("scored", filters={"dark": Dark(None), "never": Never(None)}))
    scored = open_shards(tmp_path / "scored")
    assert len(scored) == 24 and {"dark", "never"} == scored.about(0)["scores"].keys()
    assert scored.about(0)["scores"]["never"] is None, "JSON has no word for what is no number"
    for _ in range(2):  # also where nothing is left to do
        with pytest.raises(UserError, match=r"expected 24 .* got none: filters refused 48"):
            run(make("none", filters={"never": Never()}, candidates=2))
    assert len(open_shards(tmp_path / "none")) == 0
    assert count_shards(tmp_path / "none").refused["never"].total() == 48
    assert verify(tmp_path / "none") == [] == verify(tmp_path / "scored")


@dataclass(frozen=True)
class NoAnt:
    """Refuse every image of the first class, and the first image of the second."""

    minimum: float | None = 0.0

    def prepare(self, reference: Reference):
        seen: list[int] = []

        def score(images, labels):
            values = [-1.0 if k == 0 or (k == 1 and 1 not in seen) else 1.0 for k in labels]
            seen.extend(labels)
            return torch.tensor(values)

        return score


def test_fewer_images_than_were_asked_for_are_said_by_class(make, tmp_path):
    for _ in range(2):
        with pytest.warns(AugmentWarning, match=r"got 'ant' 0 of 8, 'bee' 7 of 8; allow more --c"):
            assert run(make(filters={"one": NoAnt()}))
    opened = open_shards(tmp_path / "out")
    assert [opened.targets.count(label) for label in range(3)] == [0, 7, 8]
    assert count_shards(tmp_path / "out").by_class(opened.classes)["ant"] == (0, 0)


@pytest.mark.parametrize(
    ("options", "words", "found"),
    [
        (
            {},
            r"ones: 'cat' \(1 real\);.* noise 0.3.* class of one, .* or invert",
            r"got 'cat' 8, of which 1 differ;",
        ),
        ({"noise": 0.3}, "", ""),
        ({"alpha": 1e-6}, r"'ant' \(3 real\), 'bee' \(4 real\), 'cat'", "'ant' 8, of which 3"),
        ({"alpha": 0.02}, r"'ant' \(3 real\), 'bee' \(4 real\), 'cat'.* or mix more", ""),
        ({"members": 1}, r"'ant' \(3 real\), 'bee' \(4 real\), 'cat'", "'ant' 8, of which 3"),
    ],
    ids=str,
)
def test_copies_are_said_before_and_after(options, words, found, bank, gaussian, tmp_path):
    planner = planner_with(bank.members, **options)
    job = ShardJob(
        tmp_path / "out", Synthesizer(gaussian, bank, sampling=Sampling(steps=2)), planner, 8
    )
    with warnings.catch_warnings(record=True) as message:
        warnings.simplefilter("always")
        assert run(job)
    before = [str(w.message) for w in message if "nearly copies" in str(w.message)]
    after = [str(w.message) for w in message if "different images" in str(w.message)]
    assert len(before) == bool(words) and all(re.search(words, text) for text in before)
    assert bool(after) == ("cat" in before[0] if before else False)
    assert all(re.search(found, text) for text in after)


def test_classes_that_get_no_images_are_not_told_as_copies(bank, gaussian, tmp_path):
    counts = {"ant": 2, "bee": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        synthesizer = Synthesizer(gaussian, bank, sampling=Sampling(steps=2))
        write_shards(synthesizer, Planner(bank.members), counts, tmp_path / "out")


def test_a_dataset_on_the_fly_says_that_it_gives_copies(bank, gaussian):
    with pytest.warns(AugmentWarning, match=r"single real ones: 'cat' \(1 real\)"):
        SyntheticDataset(bank, gaussian)


def test_filters_ask_for_the_real_images_where_they_are(make, bank, pictures, tmp_path):
    moved = shutil.copytree(pictures, tmp_path / "moved")
    shutil.copytree(bank.path, tmp_path / "bank")
    gone = {"source": str(tmp_path / "gone")}
    amend(tmp_path / "bank" / "manifest.json", lambda record: record.update(gone))
    job = make(filters={"dark": Dark()})
    job.synthesizer.bank = LatentBank.open(tmp_path / "bank")
    with pytest.raises(UserError, match="--images"):
        run(job)
    job = make("found", filters={"dark": Dark()}, source=moved)
    assert run(job)


def test_images_that_changed_are_not_compared_with(make, pictures, tmp_path):
    moved = shutil.copytree(pictures, tmp_path / "moved")
    shutil.copy(moved / "ant" / "1.png", moved / "ant" / "0.png")
    with pytest.raises(UserError, match=r"another image for ant/0\.png"):
        run(make(filters={"dark": Dark()}, source=moved))


def test_a_shard_of_another_place_or_job_is_made_again(make, tmp_path):
    assert run(make())
    whole = snapshot(tmp_path / "out")
    for suffix in ("tar", "json"):
        shutil.copy(tmp_path / "out" / f"shard-000001.{suffix}",
                    tmp_path / "out" / f"shard-000000.{suffix}")  # fmt: skip
    with pytest.raises(UserError, match="of another shard"):
        open_shards(tmp_path / "out")
    assert len(verify(tmp_path / "out")) == 1
    assert run(make())
    assert snapshot(tmp_path / "out") == whole
    assert run(make("other", alpha=0.5))
    for suffix in ("tar", "json"):
        shutil.copy(tmp_path / "other" / f"shard-000000.{suffix}", tmp_path / "out")
    assert run(make())
    assert snapshot(tmp_path / "out") == whole


def test_a_bank_with_other_content_is_another_job(make, bank, gaussian, pictures, tmp_path):
    assert run(make())
    other = shutil.copytree(pictures, tmp_path / "images")
    shutil.copy(other / "ant" / "1.png", other / "ant" / "0.png")
    job = make()
    job.synthesizer.bank = fill_bank(tmp_path / "bank", gaussian, Folder(other), steps=4)
    with pytest.raises(UserError, match=r"others \(images\)"):
        run(job)


def test_weights_of_a_filter_are_known_by_their_content(make, tmp_path):
    @dataclass(frozen=True)
    class Weighted(Dark):
        weights: str = ""

    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    assert run(make(filters={"dark": Weighted(None, str(tmp_path / "a"))}))
    assert run(make(filters={"dark": Weighted(None, str(tmp_path / "b"))}))
    with pytest.raises(UserError, match=r"others \(filters\)"):
        run(make(filters={"dark": Weighted(None, str(tmp_path / "c"))}))


def test_large_images_are_reduced(make, tmp_path):
    assert run(make(pixels=4))
    assert open_shards(tmp_path / "out")[0][0].shape == (1, 4, 4)


def test_banks_that_do_not_match_are_not_merged(bank, tmp_path, gaussian, pictures):
    fewer = shutil.copytree(pictures, tmp_path / "fewer")
    shutil.rmtree(fewer / "ant")
    for number, settings_ in enumerate(({"steps": 5}, {"stored": []}, {"inversion": "ddim"})):
        other = fill_bank(
            tmp_path / f"b{number}", gaussian, Folder(fewer), **{"steps": 4} | settings_
        )
        with pytest.raises(BankMismatch):
            merge([bank.path, other.path], tmp_path / "out")
    model = GaussianBackbone(mean=0.2, latent_shape=(1, 8, 8))
    other = fill_bank(tmp_path / "other", model, Folder(fewer), steps=4)
    with pytest.raises(BankMismatch, match="weights"):
        merge([bank.path, other.path], tmp_path / "out")
    prompted = fill_bank(tmp_path / "prompted", gaussian, Folder(fewer), {"bee": "a bee"}, steps=4)
    with pytest.raises(UserError, match="one prompt"):
        merge([bank.path, prompted.path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="wasp"):
        split(bank.path, ["wasp"], tmp_path / "out")
    with pytest.raises(UserError, match="in use"):
        split(bank.path, ["bee"], prompted.path)


def test_a_damaged_bank_is_not_copied(bank, tmp_path):
    copy = shutil.copytree(bank.path, tmp_path / "copy")
    content = bytearray((copy / "0001" / "chunk-0000.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "0001" / "chunk-0000.safetensors").write_bytes(content)
    assert split(copy, ["ant"], tmp_path / "ant").classes == ["ant"]
    with pytest.raises(UserError, match="verify"):
        split(copy, ["bee"], tmp_path / "bee")


def test_a_bank_in_memory_gives_what_one_on_disk_gives(bank, gaussian, monkeypatch):
    near, planner = bank.to("cpu"), Planner(bank.members, Mixing(members=3, noise=0.2))
    plans = [planner(0, index) for index in range(9)]
    points, weights = bank.gather(plans)
    assert points.shape == (9, 3, 1, 8, 8) and weights.shape == (9, 3)
    for b, plan in enumerate(plans):
        for k, image_id in enumerate(plan.members):
            row = bank.members[plan.class_name].index(image_id)
            assert torch.equal(points[b, k], bank.latents(plan.class_name)[row])
        assert (
            not points[b, len(plan.members) :].any() and not weights[b, len(plan.members) :].any()
        )
    monkeypatch.setattr(LatentBank, "_read", None)  # it would be an error to read from disk
    for mine, theirs in zip(near.gather(plans), (points, weights), strict=True):
        assert torch.equal(mine, theirs)
    assert near.gather([])[0].shape == (0, 0, 1, 8, 8)


def test_a_bank_too_large_for_memory_says_so(bank, monkeypatch):
    monkeypatch.setattr("augment.bank.bank._free_memory", lambda device: 10)
    with pytest.raises(UserError, match="from where it is read"):
        bank.to("cpu")
