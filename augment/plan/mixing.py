"""What is mixed: the settings of the random choices."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from augment.centroid.rule import Rule
from augment.core.errors import UserError, lookup
from augment.plan.weights import concentrations

REFERENCE_RULES = {name: Rule(name, "0") for name in ("lin", "nin")}
"""Rules for references: the others know the norm of a latent, which a reference does not have."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What is mixed.

    Args:
        rule: norm rule and mean split, such as fade/chm or fix/0.
        alpha: concentration of the Dirichlet weights; 1 is uniform on the simplex, inf the centre.
            Or one for each member, such as 10,1,1 (with nearest, the first is the drawn image's).
        members: number of images of a class that a centroid mixes; by default all.
        noise: share of fresh noise, in [0, 1).
        seed: seed of all random draws.
        nearest: mix an image drawn at random with its nearest neighbours, members images in all: by
            the distance of latents (latent), or of the vectors by image id of a .safetensors file.
        level: noise level to mix at, in (0, 1], as a share of the solver's steps; or several such
            as 1,0.75,0.5,0.25, of which each image draws one. For a bank of clean latents
            (inversion noise); by default 0.5. The latents of others are at one level, the default.
        contexts: file of contexts, a line each, such as 'on a beach'; or a metadata.jsonl, whose
            column text is read, or file.jsonl:COLUMN. Each image draws one, whatever its class, for
            its prompt: behind a comma, or where that has {context}.
        reference_rule: how references of images are mixed, which a backbone with an IP-Adapter is
            conditioned on: lin, their weighted mean, or nin, that at the weighted mean of their
            norms. By default lin.
        translate: mix images of another class than the home class, drawn at random, under the home
            class's prompt (Diff-Mix); the label is level^translate of the home class, and theirs
            for the rest. In training alone, as labels are soft; 0.5 is Diff-Mix's.

    Raises:
        UserError: an unknown rule, or a value out of its range.
    """

    rule: str = "fade/chm"
    alpha: float | str | tuple[float, ...] = 1.0
    members: int | None = None
    noise: float = 0.0
    seed: int = 0
    nearest: str | None = None
    level: float | str | tuple[float, ...] | None = None
    contexts: str | None = None
    translate: float | None = None
    reference_rule: str | None = None

    def __post_init__(self) -> None:
        Rule.parse(self.rule)
        if self.reference_rule is not None:
            lookup(REFERENCE_RULES, self.reference_rule, "rule for references")
        if not 0 <= self.noise < 1:
            raise UserError(f"expected noise in [0, 1), got {self.noise}; 0 is none")
        if self.members is not None and self.members < 1:
            raise UserError(f"expected members ≥ 1, got {self.members}; leave it out to mix all")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"expected a seed ≥ 0, got {self.seed}; the largest is 2^63 - 1")
        if self.translate is not None and not 0 < self.translate < math.inf:
            raise UserError(f"expected translate above 0, got {self.translate}; 0.5 is usual")
        for level in self.levels or ():
            if not 0 < level <= 1:
                raise UserError(f"expected levels in (0, 1], got {level}; 1 is pure noise")
        alphas = self.concentration
        concentrations(alphas, max(len(alphas), 1) if isinstance(alphas, tuple) else 1)

    @property
    def concentration(self) -> float | tuple[float, ...]:
        """Alpha as a number, or as one for each member.

        Raises:
            UserError: a text that says neither.

        >>> Mixing(alpha="inf").concentration, Mixing(alpha="10,1,1").concentration
        (inf, (10.0, 1.0, 1.0))
        """
        alphas = _numbers(self.alpha, "a number, inf or numbers such as 10,1,1 for alpha")
        single = len(alphas) == 1 and isinstance(self.alpha, (int, float, str))
        return alphas[0] if single else alphas

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The levels of which each image draws one; None is the bank's own.

        Raises:
            UserError: a text that says none.

        >>> Mixing(level="1,0.5").levels
        (1.0, 0.5)
        """
        if self.level is None:
            return None
        return _numbers(self.level, "a number or numbers such as 1,0.75,0.5 for level")

    @property
    def alpha_json(self) -> float | str | list[float]:
        """Alpha as strict JSON has it: an infinite one is ``inf``."""
        alphas = self.concentration
        if isinstance(alphas, tuple):
            return list(alphas)
        return "inf" if alphas == math.inf else alphas


def _numbers(given: float | str | Sequence[float], wanted: str) -> tuple[float, ...]:
    """Return a number, several, or a text of some, as several."""
    numbers = [given] if isinstance(given, (int, float)) else given
    try:
        return tuple(map(float, given.split(",") if isinstance(given, str) else numbers))
    except (TypeError, ValueError):
        raise UserError(f"expected {wanted}, got {given!r}") from None
