"""The report of a test set beside torchmetrics, and its tables."""

import csv
import math

import pytest
import torch
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
)

from augment import UserError
from augment.training.models.metrics import (
    LongTailMetrics,
    interval,
    normal_interval,
    recalls,
    shot_groups,
    student_t,
    write_tables,
)

COUNTS = [500, 101, 100, 20, 19, 0]
K = len(COUNTS)


def draw(n=400, seed=0, classes=K):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    hint = 2 * torch.nn.functional.one_hot(labels, K)
    return torch.randn(n, K, generator=generator) * 2 + hint, labels


def report(*batches, **options):
    metric = LongTailMetrics(K, COUNTS, **options)
    for batch in batches:
        metric.update(*batch)
    return metric


def test_it_says_what_torchmetrics_says():
    logits, labels = draw()
    metric = report((logits, labels))
    figures = metric.compute()
    per_class = MulticlassAccuracy(K, average="none")(logits, labels)
    micro = MulticlassAccuracy(K, average="micro")(logits, labels)
    macro = MulticlassAccuracy(K, average="macro")(logits, labels)
    ece = MulticlassCalibrationError(K, n_bins=15)(logits.softmax(-1), labels)
    assert all(type(figure) is float for figure in figures.values())
    assert figures["accuracy"] == pytest.approx(micro.item())
    assert figures["balanced_accuracy"] == pytest.approx(macro.item())
    assert figures["ece"] == pytest.approx(ece.item(), abs=1e-6)
    assert figures["many"] == pytest.approx(per_class[:2].mean().item())
    assert figures["medium"] == pytest.approx(per_class[2:4].mean().item())
    assert figures["few"] == pytest.approx(per_class[4:].mean().item())
    assert torch.equal(metric.confusion, MulticlassConfusionMatrix(K)(logits, labels))
    torch.testing.assert_close(recalls(metric.confusion).float(), per_class)


def test_it_is_the_same_however_the_images_are_cut():
    logits, labels = draw()
    whole = report((logits, labels)).compute()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    pieces = report(*((logits[part], labels[part]) for part in order.split(7)))
    assert pieces.compute() == whole
    pieces.reset()
    pieces.update(logits, labels)
    assert pieces.compute() == whole


def test_ranks_add_up():
    one, other = draw(30), draw(50, seed=1)
    second = report(other)

    def gather(state, group=None):
        name = "matrix" if state.shape == second.matrix.shape else "bins"
        return [state, getattr(second, name)]

    ours = report(one, dist_sync_fn=gather, distributed_available_fn=lambda: True)
    both = report(one, other)
    assert ours.compute() == both.compute()
    assert torch.equal(ours.confusion, both.confusion)
    assert ours.matrix.sum() == 30


def test_classes_that_do_not_occur_are_left_out():
    figures = report(draw(classes=4)).compute()
    assert "few" not in figures and "medium" in figures
    metric = report(draw(classes=4))
    accuracies = recalls(metric.confusion)
    assert accuracies[4:].isnan().all()
    assert figures["balanced_accuracy"] == pytest.approx(
        recalls(metric.confusion)[:4].mean().item()
    )


def test_the_edges_of_confidence_and_a_diverged_network():
    sure = torch.full((2, K), -1e9)
    sure[:, 0] = 1e9
    assert report((sure, torch.tensor([0, 1]))).compute()["ece"] == pytest.approx(0.5)
    odds = math.log(9 * (K - 1))  # nine tenths: a bin below the sure ones
    likely = torch.tensor([[odds] + [0.0] * (K - 1)])
    pair = torch.cat([sure[:1], likely]), torch.tensor([1, 0])
    assert report(pair).compute()["ece"] == pytest.approx((1 + 0.1) / 2)
    lost = torch.full((3, K), math.nan)
    assert report((lost, torch.tensor([1, 2, 3]))).compute()["ece"] == pytest.approx(0)


def test_counts_of_other_classes_are_refused():
    with pytest.raises(UserError, match=r"^expected counts of 3 classes, got 2"):
        LongTailMetrics(3, [1, 2])


def test_the_groups_end_where_the_literature_ends_them():
    assert shot_groups([19, 20, 100, 101]) == {"many": [3], "medium": [1, 2], "few": [0]}
    assert shot_groups([5]) == {"many": [], "medium": [], "few": [0]}


def test_the_tables_are_read_back(tmp_path):
    logits, labels = draw(classes=5)
    metric = report((logits, labels))
    names = ["a, b", 'c"d', "é", "x", "y", "z"]
    write_tables(tmp_path / "out", names, COUNTS, metric.confusion)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "per_class.csv",
        "confusion.csv",
    }
    with (tmp_path / "out" / "per_class.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["class", "label", "real", "tested", "accuracy", "group"]
    assert [row["class"] for row in rows] == names
    assert [int(row["real"]) for row in rows] == COUNTS
    assert [row["group"] for row in rows] == ["many"] * 2 + ["medium"] * 2 + ["few"] * 2
    assert [int(row["tested"]) for row in rows] == labels.bincount(minlength=K).tolist()
    assert rows[5]["accuracy"] == ""
    for row, accuracy in zip(rows[:5], recalls(metric.confusion).tolist(), strict=False):
        assert float(row["accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    with (tmp_path / "out" / "confusion.csv").open(newline="", encoding="utf-8") as file:
        head, *body = csv.reader(file)
    assert head == ["truth", *names] and [row[0] for row in body] == names
    assert [[int(x) for x in row[1:]] for row in body] == metric.confusion.tolist()


def test_intervals():
    assert interval([0.6, 0.7, 0.8]) == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    values = [0.1 * (n % 7) for n in range(600)]
    assert normal_interval(values) == pytest.approx(interval(values), rel=3e-3)
    assert student_t(20) == pytest.approx(2.086, abs=1e-3)
