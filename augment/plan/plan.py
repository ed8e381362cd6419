"""The plan of one synthetic image: every random choice, drawn once and written down.

After a plan only the noise is random, and it has a generator of its own per sample. So a plan makes
its image again, in any batch, on any worker, today or in a year.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from augment.core.errors import UserError, lookup
from augment.core.files import JsonObject
from augment.core.schema import build
from augment.plan.weights import effective_count


@dataclass(frozen=True)
class Plan:
    """One synthetic image, decided.

    Args:
        label: index of the class; of the home class, if several are mixed.
        class_name: its name.
        members: ids of the images whose latents are mixed.
        weights: their weights, on the simplex.
        noise: share of fresh Gaussian noise, in [0, 1): one more point to mix, of weight ``noise``.
        seed, epoch, index: what the random draws depend on.
        classes: the class of each member; empty if all are of ``class_name``.
        level: noise level to mix at, in (0, 1]: for a bank of clean latents the share of the
            solver's steps from there down; for others that of the bank's latents, as it has it.
            None is the bank's own, and not written to JSON.
        context: words that were drawn for the prompt; without any, it is not written to JSON.
    """

    label: int
    class_name: str
    members: tuple[str, ...]
    weights: tuple[float, ...]
    noise: float
    seed: int
    epoch: int
    index: int
    classes: tuple[str, ...] = ()
    level: float | None = None
    context: str = ""

    @classmethod
    def equal(cls, label: int, class_name: str, members: Sequence[str], index: int = 0) -> "Plan":
        """Mix members of one class in equal parts; of one member, that image alone."""
        shares = (1 / len(members),) * len(members)
        return cls(label, class_name, tuple(members), shares, 0.0, 0, 0, index)

    @property
    def member_classes(self) -> tuple[str, ...]:
        """The class of each member."""
        return self.classes or (self.class_name,) * len(self.members)

    @property
    def effective_count(self) -> float:
        """Number of members really mixed, fresh noise aside; see `augment.plan.weights`."""
        return effective_count(torch.tensor(self.weights, dtype=torch.float64)).item()

    def soft_label(self, class_names: Sequence[str]) -> Float[Tensor, " c"]:
        """Return the share of each class, float32, of sum 1: its members' weights added up.

        Fresh noise is of no class and takes nothing from any.

        Args:
            class_names: all classes, in label order.

        Raises:
            UserError: a member's class is not among them.
        """
        labels = {name: label for label, name in enumerate(class_names)}
        rows = [lookup(labels, name, "class") for name in self.member_classes]
        shares = torch.zeros(len(labels), dtype=torch.float64)
        return shares.index_add(0, torch.tensor(rows), shares.new_tensor(self.weights)).float()

    @property
    def facts(self) -> JsonObject:
        """The fields for JSON; those of no effect, which older versions lack, are left out."""
        facts = dataclasses.asdict(self)
        if self.level is None:
            del facts["level"]
        if not self.context:
            del facts["context"]
        return facts

    def to_json(self) -> str:
        """Return one line of JSON that `from_json` reads back without loss."""
        return json.dumps(self.facts, ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> "Plan":
        """Read the plan of a line of JSON.

        Raises:
            UserError: the line is not a plan.
        """
        try:
            plan = build(cls, json.loads(line))
            if not 0 < len(plan.members) == len(plan.weights) == len(plan.member_classes):
                raise ValueError("members, weights and classes of different numbers")
            if plan.level is not None and not 0 < plan.level <= 1:
                raise ValueError("a level outside (0, 1]")
            if not 0 <= plan.noise < 1:
                raise ValueError("noise outside [0, 1)")
            if min(plan.weights) < 0 or abs(sum(plan.weights) - 1) > 1e-6:
                raise ValueError("weights that are not at least 0 and 1 in all")
            return plan
        except (ValueError, RecursionError) as error:
            raise UserError(f"expected a plan as JSON, got {line[:60]!r} ({error})") from None
