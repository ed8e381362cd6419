"""Classifier filter: does a trained network see the class that the image was made for?"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from augment.core.errors import UserError
from augment.networks import timm_network
from augment.networks.timm import check_names, network_of, read_weights
from augment.synthesis.filters.reference import Reference, Scores


@dataclass(frozen=True)
class Classifier:
    r"""A network's confidence in the label, against its strongest rival.

    With logits z and the label y the score is the softmax of the two,
    :math:`1 / (1 + \exp(\max_{k ≠ y} z_k - z_y))`. It is above ½ if and only if the label is the
    network's answer, for any number of classes; of 1000 classes the softmax over all stays far
    below ½ for right answers too, the more so for networks that were trained with label smoothing
    or mixup. For two classes they are the same.

    Args:
        model: a network of timm; by default that of a checkpoint, or resnet50.
        weights: a checkpoint of latent-augment train (``.ckpt``), which is refused for a bank of
            other classes; or a ``.safetensors`` file or another state dict; empty takes timm's
            pretrained ones, which fit banks of the same classes in the same order.
        minimum: keep images of this score, in [0, 1], and above.
    """

    model: str | None = None
    weights: str = ""
    minimum: float | None = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", network_of(self.model, self.weights, "resnet50"))

    def prepare(self, reference: Reference) -> Scores:
        """See `augment.synthesis.filters.Filter`.

        Raises:
            UserError: see `timm_network`; or the bank has one class only.
        """
        if len(reference.classes) < 2:
            raise UserError("expected 2 classes to tell apart, got one; take the filter prototype")
        classes = len(reference.classes)
        if self.weights:
            names = read_weights(self.weights).settings.get("class_names")
            check_names(names, reference.classes, self.weights)
        network = timm_network(self.model or "", self.weights, classes, reference.device)

        def scores(images: Tensor, labels: Sequence[int]) -> Tensor:
            logits, column = network(images), torch.tensor(labels)[:, None]
            rival = logits.scatter(1, column, -torch.inf).amax(1)
            return (logits.gather(1, column)[:, 0] - rival).sigmoid().float()

        return scores
