"""The work of the explorer, without a page: images of choices, thumbnails, walks.

A `Choice` is everything that one image depends on. It holds a plan as the planner makes it, so what
is found by hand can be made again and exported like any other synthetic image.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from threading import RLock

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.bank.format import read_original
from augment.centroid import Rule, walk
from augment.centroid.prior import nominal_norm
from augment.core.errors import ImageRejected, UserError
from augment.core.files import check_folder
from augment.diffusion.backbone import Backbone, Recipe
from augment.diffusion.sampling import ResolvedSampling, Sampling
from augment.plan.mixing import Mixing
from augment.plan.plan import Plan
from augment.plan.planner import Planner
from augment.report import provenance
from augment.sources import Source
from augment.sources.images import decode_image, reduce, to_pil
from augment.synthesis.synthesizer import Synthesizer, resolve

MAX_MEMBERS = 5  # more sliders would be unusable
CACHED = 32  # images in memory
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class Choice:
    """Everything that an image depends on, beside bank and backbone.

    Args:
        plan: members, weights, share of noise, seed.
        rule: name of the rule.
        sampling: how the centroid is sampled.
        alpha: concentration that the plan was drawn with; None if its weights were set by hand.
        prompt: replaces the prompt of the plan's class, if it is not empty.
    """

    plan: Plan
    rule: str
    sampling: ResolvedSampling
    alpha: float | None = None
    prompt: str = ""

    @property
    def prompts(self) -> dict[str, str] | None:
        """The prompt by its class, as `Synthesizer` takes it; None if it is the bank's."""
        return {self.plan.class_name: self.prompt} if self.prompt else None


@dataclass(frozen=True)
class Facts:
    """Measurements of a centroid.

    Args:
        norm: ‖ẑ‖/√D, near 1 for white noise.
        bias: the largest absolute channel mean.
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
    recipe: Recipe
    source: Path | Source | None = None
    out: Path | None = None
    _lock: RLock = field(default_factory=RLock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.bank.check(self.backbone)
        if self.bank.holds_clean:
            raise UserError(
                "expected a bank of inverted latents to explore, got one of clean latents; invert "
                "with another inversion than noise"
            )
        if self.out is not None:
            check_folder(self.out)
        self._made = lru_cache(CACHED)(self._make)
        self._synthesizer = lru_cache(CACHED)(self._make_synthesizer)
        self.real = lru_cache(4096)(self._real)

    @property
    def guided(self) -> bool:
        """Whether there are prompts to guide by."""
        return any(map(self.bank.prompt, self.bank.classes))

    def sampling(
        self, solver: str = "exact", steps: int | None = None, guidance: float | None = None
    ) -> ResolvedSampling:
        """Resolve a solver or profile for the bank; see `augment.diffusion.sampling.Sampling`."""
        return resolve(self.bank, Sampling(solver=solver, steps=steps, guidance=guidance))

    @property
    def quick(self) -> str:
        """The solver to begin with: ``fast`` where it is of the kind that undoes the inversion."""
        return "fast" if self.sampling().solver == self.sampling("fast").solver else "exact"

    def start(self, class_name: str, count: int = 3) -> Plan:
        """Return equal parts of the first images of a class."""
        members = self.bank.members[class_name][:count]
        label = self.bank.classes.index(class_name)
        return Plan.equal(label, class_name, members, label)

    def draw(self, plan: Plan, alpha: float, again: int = 0) -> Plan:
        """Draw as many members of the class, and weights, as ``synthesize`` does.

        Args:
            plan: says which class, how many members, the noise and the seed.
            alpha: concentration of the weights.
            again: number of the draw of the class.
        """
        mixing = Mixing(seed=plan.seed, alpha=alpha, members=len(plan.members), noise=plan.noise)
        planner = Planner(self.bank.members, mixing)
        return planner(0, plan.label + again * len(self.bank.classes), plan.label)

    def image(self, choice: Choice) -> Float[Tensor, "c h w"]:
        """Return the image of a choice, on the CPU; the last ones are cached.

        Raises:
            UserError: see `Synthesizer`.
        """
        with self._lock:
            return self._made(replace(choice, alpha=None))

    def _make(self, choice: Choice) -> Tensor:
        return self._synthesizer_of(choice).images([choice.plan])[0].cpu()

    def _synthesizer_of(self, choice: Choice) -> Synthesizer:
        made = self._synthesizer(choice.rule, choice.sampling)
        return replace(made, prompts=choice.prompts) if choice.prompt else made

    def _make_synthesizer(self, rule: str, sampling: ResolvedSampling) -> Synthesizer:
        return Synthesizer(self.backbone, self.bank, Rule.parse(rule), sampling)

    def facts(self, choice: Choice) -> Facts:
        """Measure the centroid of a choice."""
        with self._lock:
            mixture = self._synthesizer(choice.rule, choice.sampling).mix([choice.plan])
        centroid, average = mixture.centroids[0], mixture.averages[0]
        norm = centroid.norm().item() / nominal_norm(centroid.numel())
        bias = centroid.mean((-2, -1)).abs().max().item()
        return Facts(norm, bias, average.abs().max().item())

    def prompt(self, choice: Choice) -> str:
        """Return the prompt that a choice is sampled with; empty without."""
        return self._synthesizer_of(choice).text(choice.plan)

    def python(self, choice: Choice) -> str:
        """Return lines of Python that make the image of a choice."""
        plan = f"Plan.from_json({choice.plan.to_json()!r})"
        return provenance.python(
            self.bank, plan, choice.rule, choice.sampling, self.recipe, choice.prompts
        )

    def command(self, choice: Choice) -> str | None:
        """Return the command that makes the image among others; None for what was set by hand.

        The image is the one of the plan's index: ``shards[index]``.
        """
        plan, sampling = choice.plan, choice.sampling
        again = plan.index // len(self.bank.classes)
        by_hand = choice.alpha is None or plan != self.draw(plan, choice.alpha, again)
        if by_hand or choice.prompt:
            return None
        name = self.recipe["name_or_path"]
        options = {
            "bank": str(self.bank.path.absolute()),
            "out": "centroids",
            "per_class": again + 1,
            "rule": choice.rule,
            "alpha": choice.alpha,
            "seed": plan.seed,
            "members": len(plan.members),
            "noise": plan.noise,
            "solver": sampling.solver,
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "extension": "png",
            "backbone": None if name == self.bank.recipe["name_or_path"] else name,
            "device": self.recipe.get("device"),
        }
        return provenance.command("synthesize", options, " \\\n    ")

    def _real(self, class_name: str, image_id: str) -> Image.Image | None:
        """Return a small picture of a real image; None if its file is gone or has changed."""
        root = Path(self.bank.manifest.source) if self.source is None else self.source
        try:
            # whatever an id says, only an image that the bank was made from is ever shown
            content = read_original(root, image_id, self.bank.digests(class_name)[image_id])
            form = self.backbone.channels, self.backbone.resolution
            return thumbnail(decode_image(content, *form, self.bank.background))
        except ImageRejected:
            return None

    def thumbnail(self, class_name: str, image_id: str) -> Image.Image:
        """Return a small picture of a member: the real image, or its latent's if that is gone."""
        known = self.real(class_name, image_id)
        if known is None:
            plan = replace(self.start(class_name), members=(image_id,), weights=(1.0,))
            known = thumbnail(self.image(Choice(plan, "lin/0", self.sampling())))
        return known

    def walk(
        self, ends: Sequence[tuple[str, str]], name: str, count: int, sampling: ResolvedSampling
    ) -> tuple[Float[Tensor, "t c h w"], list[float]]:
        """Return the images of a walk, on the CPU, and ‖z‖/√D of its latents.

        Each latent is sampled with the prompt of the nearer end.

        Args:
            ends: class and image id of both.
            name: name of the walk, a key of `augment.centroid.WALKS`.
            count: number of latents, both ends among them.
            sampling: how they are sampled.
        """
        (home, first), (away, last) = ends
        both = Plan(0, home, (first, last), (0.5, 0.5), 0.0, 0, 0, 0, (home, away))
        places = [i / max(count - 1, 1) for i in range(count)]
        plans = [
            replace(both, class_name=home if place < 0.5 else away, weights=(1 - place, place))
            for place in places
        ]
        with self._lock:
            points = self.bank.gather([both])[0][0]
            latents = walk(points[0], points[1], count, name)
            images = self._synthesizer("lin/0", sampling).sample(latents, plans)
        norms = latents.flatten(1).norm(dim=1) / nominal_norm(latents[0].numel())
        return images.cpu(), norms.tolist()


def thumbnail(image: Float[Tensor, "c h w"]) -> Image.Image:
    """Return a small picture of an image."""
    return to_pil(reduce(image[None], THUMBNAIL)[0])


def settings(choice: Choice) -> dict[str, object]:
    """Return everything that a choice says, flat, for JSON."""
    how = asdict(choice)
    del how["plan"]
    return choice.plan.facts | how.pop("sampling") | how


def reweighted(plan: Plan, weights: Sequence[float]) -> Plan:
    """Return a plan with other weights, scaled to sum 1; equal ones if all are 0.

    >>> plan = Plan(0, "ant", ("a", "b"), (0.5, 0.5), 0.0, 0, 0, 0)
    >>> reweighted(plan, [3, 1]).weights
    (0.75, 0.25)
    """
    total = float(sum(weights))
    shares = [weight / total if total > 0 else 1 / len(weights) for weight in weights]
    return replace(plan, weights=tuple(shares))


def toggled(plan: Plan, image_id: str, class_name: str) -> Plan:
    """Return a plan with one member more, of an equal share, or without it.

    Args:
        plan: the plan.
        image_id: id of the member.
        class_name: the member's class, which need not be the plan's.

    Raises:
        UserError: there would be no member, or more than `MAX_MEMBERS`.
    """
    chosen = zip(plan.member_classes, plan.members, strict=True)
    parts = dict(zip(chosen, plan.weights, strict=True))
    if (class_name, image_id) in parts:
        del parts[class_name, image_id]
    else:
        parts = {i: w * len(parts) / (len(parts) + 1) for i, w in parts.items()}
        parts[class_name, image_id] = 1 / (len(parts) + 1)
    if not 1 <= len(parts) <= MAX_MEMBERS:
        raise UserError(
            f"expected 1 to {MAX_MEMBERS} members, got {len(parts)}; take another one "
            + ("in first" if not parts else "out first")
        )
    classes, members = zip(*parts, strict=True)
    classes = () if set(classes) == {plan.class_name} else classes
    return reweighted(replace(plan, members=members, classes=classes), list(parts.values()))
