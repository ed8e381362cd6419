"""Plans to images: the one place where bank, rule and backbone meet.

A centroid is computed sample by sample in float32, so it is the same to the last bit in any batch.
The network then works on batches; its images are the same to the last bit for the same batch
layout on the same device, and within 1e-4 otherwise, but for refined ones
(`augment.synthesis.refine`).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.bank.format import read_original
from augment.centroid.rule import Rule
from augment.core.errors import AugmentWarning, BiasWarning, ImageRejected, UserError, lookup
from augment.core.rng import normal, rng
from augment.diffusion.backbone import Backbone, check_batch, check_interval
from augment.diffusion.solver import SOLVERS, check_steps, sample
from augment.inversion import INVERTERS
from augment.measure import LatentStatistics, bias_warning, latent_statistics
from augment.plan.plan import Plan
from augment.sources import Source, place_of
from augment.sources.images import decode_image
from augment.synthesis.refine import Goal, SeedSelect, check_sampling

PROFILES = ("exact", "fast")
"""Solvers by what they are for: to undo the bank's inversion, or to be quick."""


def solver_of(bank: LatentBank, solver: str, steps: int | None) -> tuple[str, int]:
    """The solver that a name or profile means for a bank, and its steps.

    Raises:
        UserError: an unknown solver, or no steps.
    """
    method, usual = bank.inversion["method"], bank.inversion["steps"]
    if solver == "fast":
        solver, usual = "fireflow", 10
    elif solver == "exact":
        solver = lookup(INVERTERS, method, "inversion").solver
    if solver not in SOLVERS:
        lookup(dict.fromkeys([*PROFILES, *SOLVERS]), solver, "solver")
    count: int = usual if steps is None else steps
    check_steps(count)
    return solver, count


@dataclass
class Synthesizer:
    """Makes the images of plans.

    Args:
        backbone: the model the bank was inverted with.
        bank: the latents.
        rule: how they are mixed, such as ``fade/chm``.
        solver: see `augment.sample`; or a profile: ``exact``, the solver that undoes the bank's
            inversion, or ``fast``, FireFlow in 10.
        steps: solver steps; by default those of the bank, or 10 with ``fast``.
        guidance: by default as the bank was inverted.
        interval, batch_size: see `augment.sample`.
        prompts: of classes that are to be sampled with another prompt than they were inverted with.
        refine: what brings centroids nearer to their class before they are sampled, if anything.
        source: the bank's real images, which ``refine`` and filters compare with: their folder, or
            a data set; by default where they were.

    Raises:
        BankMismatch: the bank is of another backbone.
        UserError: an unknown rule or solver, or no steps, or too few to refine through.
    """

    backbone: Backbone
    bank: LatentBank
    rule: Rule | str = "fade/chm"
    solver: str = "exact"
    steps: int | None = None
    guidance: float | None = None
    batch_size: int = 64
    interval: tuple[float, float] = (0.0, 1.0)
    prompts: dict[str, str] | None = None
    refine: SeedSelect | None = None
    source: Source | str | Path | Any | None = None
    _goals: dict[str, Goal] = field(default_factory=dict, init=False, repr=False)
    _nulls: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _statistics: dict[str, LatentStatistics] = field(default_factory=dict, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self.rule, self.source = Rule.parse(str(self.rule)), place_of(self.source)
        self.bank.check(self.backbone)
        self.solver, self.steps = solver_of(self.bank, self.solver, self.steps)
        if self.guidance is None:
            self.guidance = float(self.bank.inversion["guidance"])
        if self.guidance != 1 and not any(map(self.prompt, self.bank.classes)):
            warnings.warn(
                f"expected prompts to guide by, got guidance {self.guidance} and a bank without; "
                "guidance does nothing",
                AugmentWarning,
                stacklevel=3,
            )
        check_batch(self.batch_size)
        check_interval(self.interval)
        self.interval = self.interval[0], self.interval[1]  # of JSON it is a list
        top, start = (
            self.backbone.process.levels(steps)[-1]
            for steps in (self.bank.inversion["steps"], self.steps)
        )
        if top != start:
            raise UserError(
                f"expected to sample from the level {top:.3g} where the bank's latents are, got "
                f"{self.steps} steps, which begin at {start:.3g} with this spacing; take "
                f"{self.bank.inversion['steps']} steps, or invert with spacing trailing"
            )
        for name in self.prompts or {}:
            lookup(self.bank.chunks, name, "class to prompt")
        if self.refine:
            check_sampling(self.steps)
            self.refine = self.refine.of(self.backbone)

    def points(self, plan: Plan) -> tuple[Float[Tensor, "k c h w"], Float[Tensor, " k"]]:
        """What a plan mixes, its share of fresh noise among it, and the weights.

        Raises:
            UserError: the bank lacks one of the plan's images, or its lists differ in length.
        """
        gathered, shares = self.bank.gather([plan])
        points, weights = gathered[0], shares[0]
        if plan.noise:
            fresh = normal(rng(plan.seed, "noise", plan.epoch, plan.index), *points.shape[1:])
            points = torch.cat([points, fresh[None].to(points)])
            weights = torch.cat([weights * (1 - plan.noise), weights.new_tensor([plan.noise])])
        return points, weights

    def centroid(self, plan: Plan) -> Float[Tensor, "c h w"]:
        """The latent of a plan.

        Raises:
            UserError: see `points`; or the rule is for another number of them.
        """
        return self._mix(plan)[0]

    def _mix(self, plan: Plan) -> tuple[Float[Tensor, "c h w"], Float[Tensor, " c"]]:
        """A plan's centroid, and the channel means of the plain average."""
        points, weights = self.points(plan)
        centroid = self.rule(points[None], weights[None], self.mu)[0]  # type: ignore[operator]
        return centroid, weights @ points.mean((-2, -1))

    @cached_property
    def mu(self) -> Float[Tensor, "c h w"] | None:
        """The mean of all latents of the bank, for rules that want it (``lol``)."""
        if self.rule.mean != "mu":  # type: ignore[union-attr]
            return None
        total = sum(self.bank.latents(name).double().sum(0) for name in self.bank.classes)
        count = sum(map(len, self.bank.members.values()))
        return (total / count).float().to(self.bank.device)  # type: ignore[union-attr]

    def images(self, plans: Sequence[Plan]) -> Float[Tensor, "n c h w"]:
        """The images of plans, float32 in [0, 1] on the backbone's device.

        Raises:
            UserError: see `points` and, to refine, `goal`.
        """
        return self.made(plans)[0]

    def made(
        self, plans: Sequence[Plan]
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n _"] | None]:
        """See `images`; and the losses of `augment.synthesis.refine.Refined`, if there are."""
        mixed = [self._mix(plan) for plan in plans]
        centroids = torch.stack([centroid for centroid, _ in mixed])
        self._warn_of_bias(plans, centroids, torch.stack([average for _, average in mixed]))
        own = [self.bank.prompt(plan.class_name) for plan in plans]
        away = INVERTERS[self.bank.inversion["method"]].negative
        how: dict[str, Any] = {
            "prompts": [self.prompt(plan.class_name) for plan in plans],
            **{key: getattr(self, key) for key in ("solver", "steps", "guidance", "batch_size")},
            "interval": self.interval,
            "negative": own if away == "prompt" else None,
            "nulls": torch.stack([self.null(p) for p in plans]) if self.has_nulls else None,
        }
        losses = None
        if self.refine:
            goals = [self.goal(plan) for plan in plans]
            centroids, losses = self.refine(self.backbone, centroids, goals, **how)
        return sample(self.backbone, centroids, **how), losses

    def goal(self, plan: Plan) -> Goal:
        """What a plan's centroid is refined for: the means of its class's real images.

        Raises:
            UserError: the plan mixes classes, or see `real` and `SeedSelect.see`.
        """
        name = plan.class_name
        if set(plan.member_classes) != {name}:
            raise UserError(
                f"expected plans of one class each to refine, got one that mixes {name!r} with "
                "others; leave refine out"
            )
        if name not in self._goals:
            self._goals[name] = self.refine.goal(self.backbone, self.real(name))  # type: ignore[union-attr]
        return self._goals[name]

    def real(self, class_name: str) -> Float[Tensor, "n c r r"]:
        """The real images of a class that the bank shows, in the backbone's format.

        Raises:
            UserError: they are no longer where they were.
        """
        root: Any = Path(self.bank.manifest.source) if self.source is None else self.source
        where = root.root if isinstance(root, Source) else root
        channels, side = self.backbone.channels, self.backbone.resolution
        known = self.bank.digests(class_name)
        images = torch.empty(len(known), channels, side, side)
        for row, (image_id, digest) in enumerate(known.items()):
            try:
                content = read_original(root, image_id, digest)
                images[row] = decode_image(content, channels, side, self.bank.background)
            except ImageRejected as error:
                raise UserError(
                    f"expected the real images of the bank in {where}, to compare with, got "
                    f"{error} for {image_id}; say where they are with --images, a folder or the "
                    "data set that was inverted"
                ) from None
        return images

    @property
    def has_nulls(self) -> bool:
        """Whether sampling points away from embeddings that the bank keeps."""
        return (
            self.guidance != 1
            and INVERTERS[self.bank.inversion["method"]].negative == "null_embeddings"
        )

    def prompt(self, class_name: str) -> str:
        """What a class is sampled with."""
        return (self.prompts or {}).get(class_name, self.bank.prompt(class_name))

    def check(self, plans: Sequence[Plan]) -> None:
        """Find out, before any is made, whether images of these plans can be.

        Raises:
            UserError: a prompt that the backbone does not take, a rule that does not fit, a
                file of the bank that is harmed, or, to refine, no network or real images.
        """
        self.backbone.condition([self.prompt(plan.class_name) for plan in plans])
        if self.refine:
            self.refine.see(self.backbone)
            self.real(plans[0].class_name)
        for plan in plans:
            self.centroid(plan)
            if self.has_nulls:
                self.null(plan)

    def null(self, plan: Plan) -> Float[Tensor, "steps ..."]:
        """The null-text embeddings of a plan: its members', mixed by its weights.

        Mokady et al., arXiv 2211.09794, interpolate them linearly too. Fresh noise has the empty
        prompt's.

        Raises:
            UserError: the bank was not inverted with null_text.
        """
        parts = []
        for name, image_id in zip(plan.member_classes, plan.members, strict=True):
            if name not in self._nulls:
                self._nulls[name] = self.bank.null_embeddings(name)
            nulls, owner = self._nulls[name]
            parts.append(nulls[owner[self.bank.members[name].index(image_id)]])
        rows = torch.stack(parts).float()
        mixed = torch.einsum("k,k...->...", torch.tensor(plan.weights), rows)
        if plan.noise:
            empty = self.backbone.condition([""])["text"].float().cpu()
            mixed = (1 - plan.noise) * mixed + plan.noise * empty
        return mixed

    def _warn_of_bias(
        self,
        plans: Sequence[Plan],
        centroids: Float[Tensor, "n c h w"],
        averages: Float[Tensor, "n c"],
    ) -> None:
        """Tell, of the first class it happens to and once, that the rule enlarges its bias."""
        rows: dict[str, list[int]] = {}
        for row, plan in enumerate(plans):
            if not plan.classes and not self._warned:
                rows.setdefault(plan.class_name, []).append(row)
        for name, mine in rows.items():
            if name not in self._statistics:
                self._statistics[name] = latent_statistics(self.bank.latents(name))
            means = centroids[mine].mean((-2, -1))
            told = bias_warning(self._statistics[name], means, averages[mine], str(self.rule))
            if told:
                self._warned = True
                return warnings.warn(f"class {name!r}: {told}", BiasWarning, stacklevel=3)
        return None
