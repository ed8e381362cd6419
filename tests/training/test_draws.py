"""Draws: balance, budgets, schedules, ranks, and where a training goes on."""

import itertools

import numpy as np
import pytest

from augment import UserError
from augment.training.data.draws import SAMPLERS, MixedBatchSampler, SyntheticMix

COUNTS = (40, 25, 10, 5)
REAL = [label for label, count in enumerate(COUNTS) for _ in range(count)]
FAKE = [label for _ in range(30) for label in range(4)]  # 30 a class, as shards have them


def draws(mix=None, **options):
    return MixedBatchSampler(
        REAL, options.pop("synthetic", FAKE), 4, mix or SyntheticMix(), **options
    )


def labels(rows):
    return np.array([*REAL, *FAKE])[rows]


def test_an_epoch_without_synthetic_images_has_every_image_once():
    one = draws(SyntheticMix(share=0), batch_size=16)
    assert len(one) == 5 == len(list(one))
    assert sorted(one.rows(0)) == sorted(one.rows(3)) == list(range(80))
    assert list(one.rows(0)) != list(one.rows(3))
    longer = draws(SyntheticMix(share=0), batch_size=16, steps=12).rows(0)
    assert sorted(longer[:80]) == sorted(longer[80:160]) == list(range(80))


def test_a_shorter_last_batch_is_filled_up():
    one = draws(SyntheticMix(share=0), batch_size=30)
    assert [len(batch) for batch in one] == [30, 30, 30]
    assert set(one.rows(0)) == set(range(80))


@pytest.mark.parametrize(
    ("sampler", "power"), [("instance", 1), ("square_root", 0.5), ("class", 0)]
)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_classes_come_as_the_sampler_says_however_many_are_synthetic(sampler, power, share):
    one = draws(SyntheticMix(share=share), sampler=sampler, batch_size=100, steps=400)
    rows = one.rows(0)
    law = np.array(COUNTS, float) ** power
    shares = np.bincount(labels(rows), minlength=4) / len(rows)
    assert shares == pytest.approx(law / law.sum(), abs=0.01)
    assert (rows >= len(REAL)).mean() == pytest.approx(share, abs=0.01)
    for part in (rows[rows < 80], rows[rows >= 80]):
        if len(part):
            within = np.bincount(part)[np.unique(part)]
            assert within.max() < 6 * within.min() * max(COUNTS) / min(COUNTS)


def test_the_progressive_sampler_goes_from_instances_to_classes():
    one = draws(
        SyntheticMix(share=0), sampler="progressive", batch_size=100, steps=400, epochs=lambda: 5
    )
    shares = [np.bincount(labels(one.rows(epoch)), minlength=4) / 40000 for epoch in range(5)]
    assert shares[0] == pytest.approx(np.array(COUNTS) / 80, abs=0.01)
    assert shares[2] == pytest.approx((np.array(COUNTS) / 80 + 0.25) / 2, abs=0.01)
    assert shares[4] == pytest.approx(np.full(4, 0.25), abs=0.01)


@pytest.mark.parametrize(
    ("mix", "budget"),
    [
        (SyntheticMix(fill_to=30), [0, 5, 20, 25]),
        (SyntheticMix(fill_to=100), [30, 30, 30, 30]),  # there are no more
        (SyntheticMix(per_real=0.5), [20, 12, 5, 2]),
        (SyntheticMix(per_real=2, tail_only=20), [0, 0, 20, 10]),
        (SyntheticMix(fill_to=20, tail_only=10), [0, 0, 0, 15]),
    ],
)
def test_budgets_by_count(mix, budget):
    one = draws(mix, batch_size=8)
    rows = one.rows(0)
    fakes = np.unique(rows[rows >= 80])
    assert np.bincount(labels(fakes), minlength=4).tolist() == budget
    assert set(range(80)) <= set(rows)
    assert len(one) == -(-(80 + sum(budget)) // 8)


def test_a_share_keeps_to_classes_that_have_synthetic_images():
    one = draws(SyntheticMix(share=1.0, tail_only=20), batch_size=100, steps=20)
    rows = one.rows(0)
    assert {int(c) for c in labels(rows[rows < 80])} == {0, 1}
    assert {int(c) for c in labels(rows[rows >= 80])} == {2, 3}
    missing = draws(SyntheticMix(share=1.0), synthetic=[1] * 5, batch_size=100).rows(0)
    assert ((missing >= 80) == (labels(np.minimum(missing, 79)) == 1))[missing < 80].all()


def test_the_schedule_warms_up_and_ends_with_real_images():
    mix = SyntheticMix(share=0.4, warm_up=3, real_only=2)
    one = draws(mix, batch_size=100, steps=100, epochs=lambda: 8)
    shares = [(one.rows(epoch) >= 80).mean() for epoch in range(8)]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0, 0], abs=0.015)
    count = draws(SyntheticMix(fill_to=30, warm_up=1, real_only=1), batch_size=8, epochs=lambda: 3)
    sizes = [len(set(count.rows(epoch)) - set(range(80))) for epoch in range(3)]
    assert sizes == [sum((0, 2, 10, 12)), 50, 0]  # Python rounds half to even
    assert len({len(count.rows(epoch)) for epoch in range(3)}) == 1, "steps stay as they are"


def test_a_pool_is_mixed_by_share_alone():
    one = draws(SyntheticMix(share=0.5), synthetic=16, batch_size=100, steps=100)
    rows = one.rows(0)
    assert (rows >= 80).mean() == pytest.approx(0.5, abs=0.02)
    assert set(rows[rows >= 80]) == set(range(80, 96))
    for mix in (SyntheticMix(fill_to=3), SyntheticMix(per_real=1), SyntheticMix(tail_only=20)):
        with pytest.raises(UserError, match="pool"):
            draws(mix, synthetic=16)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "mix", [SyntheticMix(share=0.3), SyntheticMix(fill_to=30)], ids=("share", "count")
)
def test_ranks_share_the_batches_of_one_process(sampler, mix):
    def batches(size, rank, world):
        one = draws(mix, sampler=sampler, batch_size=size)
        one.share(rank, world)
        return list(one)

    whole, parts = batches(12, 0, 1), [batches(6, rank, 2) for rank in (0, 1)]
    assert len(whole) == len(parts[0]) == len(parts[1])
    for batch, *pair in zip(whole, *parts, strict=True):
        assert sorted(itertools.chain(*pair)) == sorted(batch)


def test_it_goes_on_at_the_batch_that_the_training_has_reached():
    done = 0
    one = draws(batch_size=8, done=lambda: done)
    epochs = []
    for epoch in range(3):
        done = epoch * len(one)
        epochs += list(one)
    for done in (0, 3, len(one) - 1, len(one), 2 * len(one) + 4):
        rest = epochs[done : (done // len(one) + 1) * len(one)]
        assert list(one) == rest


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: SyntheticMix(share=1.5), "share"),
        (lambda: SyntheticMix(fill_to=3, per_real=1), "both"),
        (lambda: SyntheticMix(warm_up=-1), "warm_up ≥ 0, got -1"),
        (lambda: draws(sampler="classes"), "instance, square_root"),
        (lambda: MixedBatchSampler([]), "real images"),
        (lambda: draws(batch_size=0), "batch_size ≥ 1, got 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(wrong, words):
    with pytest.raises(UserError, match=words):
        wrong()
