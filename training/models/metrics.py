"""Accuracy of long tails: overall, by class, by many, medium and few shots, and calibration.

The groups go by the real training images of a class, however many synthetic ones are added. A
group's accuracy is the mean of its classes', as in Kang et al.'s code (arXiv 1910.09217).
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from augment.core.files import write_table
from augment.training.checks import expect

_MANY, _FEW = 100, 20
_BINS = 15
_MAX_CLASSES = 2000  # whose confusion is written down: more would be a file of 10 MB
_UNIT = 2**24
"""Confidences are added up as integers, in 1/_UNIT, so that their sum does not depend on order."""

_T95 = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, by degrees of freedom."""


def student_t(freedom: int) -> float:
    """Return Student's t at 97.5 %; beyond the table by the expansion of Fisher (1926)."""
    if freedom < len(_T95):
        return _T95[freedom]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def interval(values: list[float]) -> float:
    """Return half the 95 % interval of a mean over seeds, by Student's t."""
    return student_t(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def normal_interval(values: Sequence[float]) -> float:
    """Return half the 95 % interval of a mean over many episodes, 1.96·s/√n.

    >>> round(normal_interval([0.0, 1.0] * 200), 4)
    0.0491
    """
    return 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def shot_groups(counts: Sequence[int]) -> dict[str, list[int]]:
    """Return the classes of many (> 100), medium (20…100) and few (< 20) real training images.

    >>> shot_groups([101, 100, 20, 19])
    {'many': [0], 'medium': [1, 2], 'few': [3]}
    """
    groups: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for label, count in enumerate(counts):
        groups["many" if count > _MANY else "few" if count < _FEW else "medium"].append(label)
    return groups


def recalls(confusion: Int[Tensor, "k k"]) -> Float[Tensor, "k"]:
    """Return the accuracy of each class, float64 on the CPU; NaN where it was not tested."""
    confusion = confusion.cpu()
    return confusion.diag().double() / confusion.sum(1)


class LongTailMetrics(Metric):
    r"""The figures of a test set, the same however it is cut into batches or ranks.

    `compute` gives shares in [0, 1]:

    - ``accuracy``, and ``balanced_accuracy``: the mean over the classes that occur in the test;
    - ``many``, ``medium``, ``few``: the mean over a group's classes that occur, if any does;
    - ``ece``: the calibration error of the top class in 15 bins of equal width, Σ_b |hits_b −
      confidence_b| / n; Guo et al., *On calibration of modern neural networks*, arXiv 1706.04599,
      eq. 3.

    Args:
        num_classes: number of classes.
        counts: real training images of each class.
        options: of torchmetrics' ``Metric``.

    Raises:
        UserError: counts of another number of classes.
    """

    full_state_update = False
    higher_is_better = None
    is_differentiable = False
    matrix: Tensor
    bins: Tensor  # images, hits, and the sum of confidences in 1/_UNIT

    def __init__(self, num_classes: int, counts: Iterable[int], **options: Any) -> None:
        super().__init__(**options)
        self.num_classes, self.counts = num_classes, [int(count) for count in counts]
        expect(
            len(self.counts) == num_classes, f"counts of {num_classes} classes", len(self.counts)
        )
        matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", matrix, dist_reduce_fx="sum")
        self.add_state("bins", torch.zeros(3, _BINS, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "n k"], labels: Int[Tensor, "n"]) -> None:
        """Count a batch; the softmax of the logits is the confidence."""
        confidence, guess = logits.float().softmax(-1).nan_to_num().max(-1)
        places = labels.long() * self.num_classes + guess
        self.matrix.view(-1).index_add_(0, places, torch.ones_like(places))
        place = ((confidence * _BINS).ceil().long() - 1).clamp(0, _BINS - 1)
        added = (torch.ones_like(guess), guess == labels, (confidence * _UNIT).round())
        self.bins = self.bins.index_add(1, place, torch.stack([row.long() for row in added]))

    def compute(self) -> dict[str, float]:
        """Return the figures, over all ranks."""
        accuracies, tested = recalls(self.matrix), self.matrix.cpu().sum(1) > 0
        images, hits, confidence = self.bins.cpu().double()
        figures = {
            "accuracy": (self.matrix.diag().sum().double().cpu() / self.matrix.sum().cpu()).item(),
            "balanced_accuracy": accuracies[tested].mean().item(),
            "ece": ((hits - confidence / _UNIT).abs().sum() / images.sum()).item(),
        }
        for group, labels in shot_groups(self.counts).items():
            occurring = [label for label in labels if tested[label]]
            if occurring:
                figures[group] = accuracies[occurring].mean().item()
        return figures

    @property
    def confusion(self) -> Int[Tensor, "k k"]:
        """Images by truth and guess, over all ranks: every rank has to ask."""
        with self.sync_context(self.dist_sync_fn):
            return self.matrix.clone()


def write_tables(
    folder: Path, classes: Sequence[str], counts: Sequence[int], confusion: Int[Tensor, "k k"]
) -> None:
    """Write ``per_class.csv`` and ``confusion.csv``, each whole or not at all.

    The one has a row a class: its real training images, its test images, the accuracy (empty where
    there are none) and the shot group. The other has a row a true class and a column a guess; it
    is left out where there are more than 2000 classes.

    Args:
        folder: made if needed.
        classes: their names.
        counts: real training images of each class.
        confusion: of `LongTailMetrics`.
    """
    groups = {label: group for group, labels in shot_groups(counts).items() for label in labels}
    tested, accuracies = confusion.sum(1).tolist(), recalls(confusion).tolist()
    rows: list[Sequence[object]] = [("class", "label", "real", "tested", "accuracy", "group")]
    for label, (name, real) in enumerate(zip(classes, counts, strict=True)):
        accuracy = f"{accuracies[label]:.6f}" if tested[label] else ""
        rows.append((name, label, int(real), tested[label], accuracy, groups[label]))
    write_table(folder / "per_class.csv", rows)
    if len(classes) <= _MAX_CLASSES:
        table = zip(classes, confusion.tolist(), strict=True)
        body = [(name, *numbers) for name, numbers in table]
        write_table(folder / "confusion.csv", [("truth", *classes), *body])
