"""What is mixed: the settings of the random choices."""

import math
from dataclasses import dataclass

from augment.centroid.rule import Rule
from augment.core.errors import UserError
from augment.plan.weights import concentrations


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

    Raises:
        UserError: an unknown rule, or a value out of its range.
    """

    rule: str = "fade/chm"
    alpha: float | str | tuple[float, ...] = 1.0
    members: int | None = None
    noise: float = 0.0
    seed: int = 0
    nearest: str | None = None

    def __post_init__(self) -> None:
        Rule.parse(self.rule)
        if not 0 <= self.noise < 1:
            raise UserError(f"expected noise in [0, 1), got {self.noise}; 0 is none")
        if self.members is not None and self.members < 1:
            raise UserError(f"expected members ≥ 1, got {self.members}; leave it out to mix all")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"expected a seed ≥ 0, got {self.seed}; the largest is 2^63 - 1")
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
        if isinstance(self.alpha, (int, float)):
            return float(self.alpha)
        numbers = self.alpha.split(",") if isinstance(self.alpha, str) else self.alpha
        try:
            alphas = [float(number) for number in numbers]
        except ValueError:
            raise UserError(
                f"expected a number, inf or numbers such as 10,1,1 for alpha, got {self.alpha!r}"
            ) from None
        return alphas[0] if isinstance(self.alpha, str) and len(alphas) == 1 else tuple(alphas)

    @property
    def alpha_json(self) -> float | str | list[float]:
        """Alpha as strict JSON has it: an infinite one is ``inf``."""
        alphas = self.concentration
        if isinstance(alphas, tuple):
            return list(alphas)
        return "inf" if alphas == math.inf else alphas
