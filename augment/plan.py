"""Plans: every random choice of one synthetic image, thrown once and written down.

``Planner(...)(epoch, index)`` is a pure function of its arguments. After it no dice are left but
the noise, which has a generator of its own per sample; so a plan makes its image again, in any
batch, on any worker, today or in a year.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from augment.errors import UserError
from augment.seeds import rng
from augment.weights import dirichlet


@dataclass(frozen=True)
class Plan:
    """One synthetic image, decided.

    Args:
        label: index of the class.
        class_name: its name.
        members: ids of the images whose latents are mixed.
        weights: their weights, on the simplex.
        noise: share of fresh Gaussian noise, in [0, 1): one more point to mix, of weight ``noise``.
        seed, epoch, index: what the dice were thrown from.
    """

    label: int
    class_name: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    noise: float
    seed: int
    epoch: int
    index: int

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back without loss."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Plan":
        """The plan of a line of JSON.

        Raises:
            UserError: the line is not a plan.
        """
        try:
            record: dict[str, Any] = json.loads(line)
            members, weights = tuple(record.pop("members")), tuple(record.pop("weights"))
            return cls(members=members, weights=weights, **record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"expected a plan as JSON, got {line[:60]!r} ({error})") from None


@dataclass(frozen=True)
class Planner:
    """Throws the dice of every synthetic image.

    Neighbouring indices belong to different classes (index modulo the number of classes), so any
    run of indices is a balanced batch.

    Args:
        images: the image ids of each class, in label order.
        seed: the run's seed.
        alpha: concentration of the Dirichlet weights; see `augment.weights.dirichlet`.
        members: how many images a centroid mixes, drawn anew each time; None is all of the class.
        noise: share of fresh noise, in [0, 1).

    Raises:
        UserError: a parameter is out of its range.
    """

    images: dict[str, tuple[str, ...]]
    seed: int = 0
    alpha: float = 1.0
    members: int | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise UserError(f"expected alpha ≥ 0, got {self.alpha}; 1 is uniform on the simplex")
        if not 0 <= self.noise < 1:
            raise UserError(f"expected noise in [0, 1), got {self.noise}; 0 is none")
        if self.members is not None and self.members < 1:
            raise UserError(f"expected members ≥ 1, got {self.members}; leave it out to mix all")
        if self.seed < 0:
            raise UserError(f"expected a seed ≥ 0, got {self.seed}")

    def __call__(self, epoch: int, index: int) -> Plan:
        """The plan of one sample of one epoch."""
        dice = rng(self.seed, "plan", epoch, index)
        label = index % len(self.images)
        name, ids = list(self.images.items())[label]
        chosen = self._choose(dice, ids)
        weights = tuple(dirichlet(dice, self.alpha, len(chosen)).tolist())
        return Plan(label, name, chosen, weights, self.noise, self.seed, epoch, index)

    def _choose(self, dice: np.random.Generator, ids: tuple[str, ...]) -> tuple[str, ...]:
        if self.members is None or self.members >= len(ids):
            return ids
        return tuple(ids[i] for i in sorted(dice.permutation(len(ids))[: self.members]))
