"""What the explorer does, without a page: choices to images, thumbnails, walks.

A `Choice` is all that one image depends on. It holds a plan as the planner makes it; so what is
found by hand can be made again, written to shards and told apart like any other synthetic image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.bank.format import read_original
from augment.centroid import Rule, walk
from augment.centroid.prior import nominal_norm
from augment.core.errors import ImageRejected, UserError
from augment.core.files import check_folder
from augment.diffusion.backbone import Backbone
from augment.diffusion.sampling import Sampling
from augment.diffusion.solver import sample
from augment.inversion import INVERTERS
from augment.plan.mixing import Mixing
from augment.plan.plan import Plan
from augment.plan.planner import Planner
from augment.shards.write import reduce
from augment.sources import Source
from augment.sources.images import decode_image, to_pil
from augment.synthesis.synthesizer import Synthesizer, resolve

MOST = 5
"""Members that are mixed at most: more sliders than that nobody moves."""
KEPT = 32  # images that are kept in memory
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class Choice:
    """All that an image depends on, beside bank and backbone.

    Args:
        plan: members, weights, share of noise, seed.
        rule, solver, steps, guidance: see `Synthesizer`; the solver by its own name.
        alpha: what the plan was thrown with; None if its weights were set by hand.
    """

    plan: Plan
    rule: str
    solver: str
    steps: int
    guidance: float
    alpha: float | None = None


@dataclass(frozen=True)
class Facts:
    """What a centroid is like.

    Args:
        norm: ‖ẑ‖/√D, near 1 for white noise.
        bias: the largest |channel mean|.
        average: that of the plain average of the members.
    """

    norm: float
    bias: float
    average: float


@dataclass
class Explorer:
    """A bank and its backbone, ready to make images of choices; threads may share it.

    Args:
        bank: the latents.
        backbone: the model they were inverted with.
        recipe: the arguments of `load_backbone` that made it, for the lines to copy.
        source: the bank's real images, a folder or a source; by default where they were.
        out: folder that chosen images may be exported to, if any.
    """

    bank: LatentBank
    backbone: Backbone
    recipe: dict[str, Any]
    source: Path | Source | None = None
    out: Path | None = None
    _lock: RLock = field(default_factory=RLock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.bank.check(self.backbone)
        if self.out is not None:
            check_folder(self.out)
        self._made = lru_cache(KEPT)(self._make)
        self._synthesizers = lru_cache(KEPT)(self._synthesizer)
        self.real = lru_cache(4096)(self._real)

    @property
    def guided(self) -> bool:
        """Whether there are prompts to guide by."""
        return any(map(self.bank.prompt, self.bank.classes))

    def usual(self, solver: str = "exact") -> tuple[str, int, float]:
        """The solver that a name or profile means, its steps, and the bank's guidance."""
        usual = resolve(self.bank, Sampling(solver=solver))
        return usual.solver, usual.steps, usual.guidance

    @property
    def quick(self) -> str:
        """The solver to begin with: ``fast`` where it is of the kind that undoes the inversion."""
        return "fast" if self.usual()[0] == self.usual("fast")[0] else "exact"

    def start(self, class_name: str, count: int = 3) -> Plan:
        """Equal parts of the first images of a class."""
        members = self.bank.members[class_name][:count]
        label = self.bank.classes.index(class_name)
        parts = (1 / len(members),) * len(members)
        return Plan(label, class_name, members, parts, 0.0, 0, 0, label)

    def draw(self, plan: Plan, alpha: float, again: int = 0) -> Plan:
        """As many members of the class, and weights, as ``synthesize`` throws them.

        Args:
            plan: what says how many, the noise and the seed.
            alpha: concentration of the weights.
            again: the how-manieth throw of the class.
        """
        count = len(plan.members)
        planner = Planner(
            self.bank.members, Mixing(seed=plan.seed, alpha=alpha, members=count, noise=plan.noise)
        )
        return planner(0, plan.label + again * len(self.bank.classes), plan.label)

    def image(self, choice: Choice) -> Float[Tensor, "c h w"]:
        """The image of a choice, on the CPU; the last ones are remembered.

        Raises:
            UserError: see `Synthesizer`.
        """
        with self._lock:
            return self._made(replace(choice, alpha=None))

    def _make(self, choice: Choice) -> Tensor:
        return self._synthesizer_of(choice).images([choice.plan])[0].cpu()

    def _synthesizer_of(self, choice: Choice) -> Synthesizer:
        return self._synthesizers(choice.rule, choice.solver, choice.steps, choice.guidance)

    def _synthesizer(self, rule: str, solver: str, steps: int, guidance: float) -> Synthesizer:
        return Synthesizer(
            self.backbone,
            self.bank,
            Rule.parse(rule),
            Sampling(solver=solver, steps=steps, guidance=guidance),
        )

    def facts(self, choice: Choice) -> Facts:
        """What the centroid of a choice is like."""
        with self._lock:
            made = self._synthesizer_of(choice)
            centroid = made.centroid(choice.plan)
            points, weights = made.points(choice.plan)
        means, average = centroid.mean((-2, -1)), weights @ points.mean((-2, -1))
        norm = centroid.norm().item() / nominal_norm(centroid.numel())
        return Facts(norm, means.abs().max().item(), average.abs().max().item())

    def _real(self, class_name: str, image_id: str) -> Image.Image | None:
        """A small picture of a real image; None if the file is not there, or is another one."""
        root = Path(self.bank.manifest.source) if self.source is None else self.source
        try:
            # whatever an id says, only an image that the bank was made from is ever shown
            content = read_original(root, image_id, self.bank.digests(class_name)[image_id])
            form = self.backbone.channels, self.backbone.resolution
            image = decode_image(content, *form, self.bank.background)
        except ImageRejected:
            return None
        return to_pil(reduce(image[None], THUMBNAIL)[0])

    def thumbnail(self, class_name: str, image_id: str) -> Image.Image:
        """A small picture of a member: the real image or, where that is gone, its latent's."""
        known = self.real(class_name, image_id)
        if known is None:
            plan = replace(self.start(class_name), members=(image_id,), weights=(1.0,))
            image = self.image(Choice(plan, "lin/0", *self.usual()))
            known = to_pil(reduce(image[None], THUMBNAIL)[0])
        return known

    def walk(
        self,
        ends: Sequence[tuple[str, str]],
        name: str,
        count: int,
        solver: str,
        steps: int,
        guidance: float,
    ) -> tuple[Float[Tensor, "t c h w"], list[float]]:
        """The images of a walk, on the CPU, and ‖z‖/√D of its latents.

        Each latent is sampled with the prompt of the nearer end.

        Args:
            ends: class and image id of both.
            name: of the walk, a key of `augment.centroid.WALKS`.
            count: latents, both ends among them.
            solver: by its own name.
            steps: of it.
            guidance: see `Synthesizer`.
        """
        (home, first), (away, last) = ends
        both = Plan(0, home, (first, last), (0.5, 0.5), 0.0, 0, 0, 0, (home, away))
        places = [i / max(count - 1, 1) for i in range(count)]
        with self._lock:
            points = self.bank.gather([both])[0][0]
            latents = walk(points[0], points[1], count, name)
            made = self._synthesizer("lin/0", solver, steps, guidance)
            prompts = [made.prompt(home if place < 0.5 else away) for place in places]
            plans = [replace(both, weights=(1 - place, place)) for place in places]
            method = INVERTERS[self.bank.inversion["method"]]
            images = sample(
                self.backbone, latents, prompts, solver, steps, guidance,
                negative=prompts if method.negative == "prompt" else None,
                nulls=torch.stack([made.null(p) for p in plans]) if made.has_nulls else None,
            )  # fmt: skip
        norms = latents.flatten(1).norm(dim=1) / nominal_norm(latents[0].numel())
        return images.cpu(), norms.tolist()


def reweighted(plan: Plan, weights: Sequence[float]) -> Plan:
    """A plan with weights that were set by hand, of any sum; equal ones if all are 0.

    >>> plan = Plan(0, "ant", ("a", "b"), (0.5, 0.5), 0.0, 0, 0, 0)
    >>> reweighted(plan, [3, 1]).weights
    (0.75, 0.25)
    """
    total = sum(weights)
    shares = [weight / total if total > 0 else 1 / len(weights) for weight in weights]
    return replace(plan, weights=tuple(shares))


def toggled(plan: Plan, image_id: str) -> Plan:
    """A plan with one member more, of an equal share, or without it.

    Raises:
        UserError: there would be none, or more than `MOST`.
    """
    parts = dict(zip(plan.members, plan.weights, strict=True))
    if image_id in parts:
        del parts[image_id]
    else:
        parts = {i: w * len(parts) / (len(parts) + 1) for i, w in parts.items()}
        parts[image_id] = 1 / (len(parts) + 1)
    if not 1 <= len(parts) <= MOST:
        raise UserError(
            f"expected 1 to {MOST} members, got {len(parts)}; take another one "
            + ("in first" if not parts else "out first")
        )
    return reweighted(replace(plan, members=tuple(parts)), list(parts.values()))
