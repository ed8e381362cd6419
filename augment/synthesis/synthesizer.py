"""Plans to images: the one place where bank, rule and backbone meet.

A centroid is mixed in float32 and is the same to the last bit in any batch: only plans of equally
many members share a call of the rule, without padding. The network then works on batches; its
images are the same to the last bit for the same batch layout on the same device, and within 1e-4
otherwise, but for refined ones (`augment.synthesis.refine`).
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.bank.format import read_original
from augment.centroid.rule import Rule
from augment.core.errors import AugmentWarning, BiasWarning, ImageRejected, UserError, lookup
from augment.core.rng import normal, rng
from augment.diffusion.backbone import REFERENCE, Backbone
from augment.diffusion.checkpoints.heads import IMAGE_HEADS
from augment.diffusion.conditions import Given, Referred, Schedule, Words, embed, mix, rows_of
from augment.diffusion.process import level_number
from augment.diffusion.sampling import ResolvedSampling, Sampling
from augment.diffusion.solver import check_images, sample
from augment.inversion import INVERTERS
from augment.measure.bias import bias_warning
from augment.measure.latents import ChannelMeans
from augment.plan.mixing import REFERENCE_RULES, Mixing
from augment.plan.plan import Plan
from augment.plan.planner import Planner
from augment.sources import Source, place_of
from augment.sources.captions import read_contexts, with_context
from augment.sources.decoding import warn_once
from augment.sources.images import decode_image
from augment.synthesis.filters.reference import Reference
from augment.synthesis.refine import Goal, Refined, SeedSelect, check_sampling

MAX_POINTS = 2**24
"""Numbers of the latents that are mixed in one call."""

MAX_NULLS = 2**30
"""Bytes of null-text embeddings after which those of another class replace the oldest."""

DEFAULT_LEVEL = 0.5
"""Where clean latents are noised to by default: there they gain most (RESULTS.md, levels)."""


def resolve(bank: LatentBank, sampling: Sampling | None = None) -> ResolvedSampling:
    """Fill in what a sampling leaves to the inversion of a bank."""
    made = bank.inversion
    undo = lookup(INVERTERS, made["method"], "inversion").solver
    return (sampling or Sampling()).resolve(undo, made["steps"], bank.guidance)


def planner_of(bank: LatentBank, mixing: Mixing | None = None, classes: int = 1) -> Planner:
    """Return the planner of a bank's images.

    Args:
        bank: the latents.
        mixing: what is mixed.
        classes: how many classes a centroid mixes.

    Raises:
        UserError: see `Planner`; a file of vectors that does not fit the bank, or of no contexts;
            or another level than that of its latents.
    """
    mixing = mixing or Mixing()
    if mixing.levels != (levels := _levels(bank, mixing.levels)):
        mixing = replace(mixing, level=levels)
    require_references(bank, mixing.reference_rule)
    features = None if mixing.nearest is None else bank.features(mixing.nearest)
    contexts = () if mixing.contexts is None else read_contexts(mixing.contexts)
    return Planner(bank.members, mixing, classes, features, contexts)


def require_references(bank: LatentBank, rule: str | None) -> None:
    """Refuse a rule for references where the bank has none, or weights of image heads."""
    made_by = bank.manifest.fingerprint.backbone.get(REFERENCE, "")
    if rule not in (None, "lin") and made_by.startswith(IMAGE_HEADS):
        raise UserError(
            f"expected reference_rule lin for the bank {bank.path}, whose references are weights "
            f"of image heads, got {rule!r}; leave it out"
        )
    if rule is not None and not bank.holds_references:
        raise UserError(
            f"expected no rule for references with the bank {bank.path}, which has none, got "
            f"{rule!r}; leave reference_rule out, or invert with a backbone that takes references"
        )


def _levels(bank: LatentBank, asked: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Return the levels that plans may have; None if all latents are at the noisiest."""
    if bank.holds_clean:
        return asked or (DEFAULT_LEVEL,)
    own, steps = 1.0 if bank.level is None else bank.level, bank.inversion["steps"]
    other = next((level for level in asked or () if abs(level - own) * steps > 1), None)
    if other is not None:
        raise UserError(
            f"expected the level {own:.3g} of the bank's latents, got {other:.3g}; leave level "
            "out, or invert with --inversion noise, whose latents take any level"
        )
    return None if bank.level is None else (own,)


class Mixture(NamedTuple):
    """What is mixed of plans.

    Args:
        centroids: (n, C, H, W).
        averages: (n, C), channel means of the plain weighted averages.
        spreads: (n, C), standard deviations of the members' channel means; NaN of a single member.
    """

    centroids: Tensor
    averages: Tensor
    spreads: Tensor


@dataclass
class Synthesizer:
    """Makes the images of plans.

    Args:
        backbone: the model the bank was inverted with.
        bank: the latents.
        rule: how they are mixed.
        sampling: how a centroid becomes an image.
        prompts: of classes that are to be sampled with another prompt than they were inverted with;
            or embeddings or schedules, see `augment.diffusion.conditions`.
        refine: what brings centroids nearer to their class before they are sampled, if anything.
        source: the bank's real images, which ``refine`` and filters compare with: their folder, or
            a data set; by default where they were.
        blend: sample a plan of several classes with the embeddings of its members' prompts, mixed
            by its weights, instead of the home class's prompt.
        reference_rule: how a plan's references are mixed; see `Mixing`. By default ``lin``.

    Attributes:
        resolved: the sampling, with what it leaves to the bank.

    Raises:
        BankMismatch: the bank is of another backbone.
        UserError: steps that do not begin where the latents are, or too few to refine through.
    """

    backbone: Backbone
    bank: LatentBank
    rule: Rule = Rule()
    sampling: Sampling = Sampling()
    prompts: Mapping[str, Words] | None = None
    refine: SeedSelect | None = None
    source: Source | str | Path | Any | None = None
    blend: bool = False
    reference_rule: str | None = None
    resolved: ResolvedSampling = field(init=False)
    _goals: dict[str, Goal] = field(default_factory=dict, init=False, repr=False)
    _nulls: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)
    _means: dict[str, ChannelMeans] = field(default_factory=dict, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self.source = place_of(self.source)
        self.bank.check(self.backbone)
        self.resolved = resolve(self.bank, self.sampling)
        words = map(self.prompt, self.bank.classes)
        prompted = not all(isinstance(given, str) and not given for given in words)
        prompted |= self.bank.holds_references
        require_references(self.bank, self.reference_rule)
        if self.backbone.usage.template and not prompted:
            warn_once(
                f"prompts of {self.bank.path}",
                f"expected prompts for a text-to-image model, got the bank {self.bank.path} "
                "without, which samples far worse images; invert again with prompts, "
                f"such as {self.backbone.usage.template!r}",
            )
        if self.resolved.guidance != 1 and not prompted:
            warnings.warn(
                f"expected prompts to guide by, got guidance {self.resolved.guidance} and a bank "
                "without; guidance does nothing",
                AugmentWarning,
                stacklevel=3,
            )
        inverted, steps = self.bank.inversion["steps"], self.resolved.steps
        top, start = (self.backbone.process.levels(count)[-1] for count in (inverted, steps))
        if top != start and self.bank.holds_noise:
            raise UserError(
                f"expected to sample from the level {top:.3g} where the bank's latents are, got "
                f"{steps} steps, which begin at {start:.3g} with this spacing; take {inverted} "
                "steps, or invert with spacing trailing"
            )
        for name in self.prompts or {}:
            lookup(self.bank.chunks, name, "class to prompt")
        if self.refine:
            check_sampling(steps)
            self.refine = self.refine.of(self.backbone)

    def points(self, plan: Plan) -> tuple[Float[Tensor, "k c h w"], Float[Tensor, " k"]]:
        """Return what a plan mixes, its share of fresh noise among it, and the weights.

        Raises:
            UserError: the bank lacks one of the plan's images, or its lists differ in length.
        """
        points, weights = self._points([plan])
        return points[0], weights[0]

    def _points(
        self, plans: Sequence[Plan]
    ) -> tuple[Float[Tensor, "n k c h w"], Float[Tensor, "n k"]]:
        """Return `points` of plans of equally many."""
        points, weights = self.bank.gather(plans)
        if plans[0].noise:
            if self.bank.holds_clean:
                raise UserError(
                    f"expected no share of noise with a bank of clean latents, got "
                    f"{plans[0].noise}; say how much noise by the level"
                )
            shares = weights.new_tensor([[1 - plan.noise, plan.noise] for plan in plans])
            fresh = [_noise(plan, points.shape[2:]) for plan in plans]
            points = torch.cat([points, torch.stack(fresh)[:, None].to(points)], 1)
            weights = torch.cat([weights * shares[:, :1], shares[:, 1:]], 1)
        return points, weights

    def level(self, plan: Plan) -> float | None:
        """Return the noise level u of a plan's latent; None is the noisiest one.

        Raises:
            UserError: it is not that of the bank's latents, or none of the sampling's steps.
        """
        if self.bank.holds_clean:
            steps, strength = self.resolved.steps, plan.level or DEFAULT_LEVEL
            return self.backbone.process.levels(steps)[level_number(steps, strength)]
        own = self.bank.level
        if plan.level not in (None, own or 1.0):
            raise UserError(
                f"expected a plan at the level {own or 1.0:.3g} of the bank's latents, got "
                f"{plan.level:.3g}; use the bank that the plan was made for"
            )
        return own

    def _mixed(
        self, plans: Sequence[Plan], points: Tensor, weights: Tensor, level: float | None
    ) -> Float[Tensor, "n c h w"]:
        """Return the centroids of `points` at a level.

        Below the noisiest level a latent is α·clean + σ·noise: the clean ones are averaged, as no
        law holds for their norms, and the noise is mixed by the rule, which has its own.
        """
        if level is None:
            return self.rule(points, weights, self.mu)
        alpha, sigma = self.backbone.process.alpha_sigma(level)
        shares = weights.new_tensor([plan.weights for plan in plans])
        if self.bank.holds_clean:
            clean, noise = points, torch.stack([_noise(plan, points.shape[2:]) for plan in plans])
        else:
            clean, _ = self.bank.gather(plans, "clean")
            noises = (points[:, : clean.shape[1]] - alpha * clean) / sigma
            noises = torch.cat([noises, points[:, clean.shape[1] :]], 1)  # with fresh noise
            noise = self.rule(noises, weights, self.mu)
        mean = torch.einsum("nk,nkchw->nchw", shares, clean)
        return alpha * mean + sigma * noise.to(mean)

    def centroid(self, plan: Plan) -> Float[Tensor, "c h w"]:
        """Return the latent of a plan.

        Raises:
            UserError: see `points`; or the rule is for another number of them.
        """
        return self.mix([plan]).centroids[0]

    def mix(self, plans: Sequence[Plan]) -> Mixture:
        """Return the centroids of plans, those of equally many members in one call of the rule.

        Raises:
            UserError: see `centroid`.
        """
        if not plans:
            shape = self.backbone.latent_shape
            return Mixture(torch.empty(0, *shape), *torch.empty(2, 0, shape[0]))
        groups: dict[tuple[int, bool, float | None], list[int]] = {}
        for row, plan in enumerate(plans):
            key = len(plan.members), plan.noise > 0, self.level(plan)
            groups.setdefault(key, []).append(row)
        order, parts = [], []
        for (count, _, level), group in groups.items():
            size = max(MAX_POINTS // ((count + 1) * prod(self.backbone.latent_shape)), 1)
            for first in range(0, len(group), size):
                rows = group[first : first + size]
                some = [plans[row] for row in rows]
                points, weights = self._points(some)
                means = points.mean((-2, -1))
                averages = torch.einsum("nk,nkc->nc", weights, means)
                spreads = means[:, :count].std(1, correction=min(count - 1, 1))
                order += rows
                parts.append((self._mixed(some, points, weights, level), averages, spreads))
        back = torch.tensor(order).argsort()
        return Mixture(*(torch.cat(part)[back] for part in zip(*parts, strict=True)))

    @cached_property
    def mu(self) -> Float[Tensor, "c h w"] | None:
        """The mean of all latents of the bank, or of their noise, for rules with the split mu."""
        if self.rule.mean != "mu" or self.bank.holds_clean:
            return None

        def mean(read: Callable[[str], Tensor]) -> Tensor:
            totals = [read(name).double().sum(0) for name in self.bank.classes]
            return sum(totals[1:], totals[0]) / sum(map(len, self.bank.members.values()))

        found = mean(self.bank.latents)
        if self.bank.level is not None:
            alpha, sigma = self.backbone.process.alpha_sigma(self.bank.level)
            found = (found - alpha * mean(self.bank.clean)) / sigma
        return found.float().to(self.bank.device)

    def images(self, plans: Sequence[Plan]) -> Float[Tensor, "n c h w"]:
        """Make the images of plans, float32 in [0, 1] on the backbone's device.

        Raises:
            UserError: see `points` and, to refine, `goal`.
        """
        return self.made(plans)[0]

    def made(
        self, plans: Sequence[Plan]
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n _"] | None]:
        """Return `images`, and the losses of `augment.synthesis.refine.Refined`, if any."""
        mixture = self.mix(plans)
        if self.bank.holds_noise:
            self._warn_of_bias(plans, mixture)
        if not self.refine:
            return self.sample(mixture.centroids, plans), None

        def refined(latents: Tensor, some: Sequence[Plan], level: float | None) -> Refined:
            assert self.refine is not None
            prompts, negative = self._conditions(some)
            goals = [self.goal(plan) for plan in some]
            return self.refine(
                self.backbone, latents, goals, prompts, self.resolved, negative, level
            )

        latents, losses = self._each_level(refined, mixture.centroids, plans)
        return self.sample(latents, plans), losses

    def sample(
        self, latents: Float[Tensor, "n c h w"], plans: Sequence[Plan]
    ) -> Float[Tensor, "n channels height width"]:
        """Sample latents with the prompts, embeddings and levels of plans, one of each.

        Raises:
            UserError: see `augment.diffusion.solver.check_images`.
        """

        def sampled(latents: Tensor, some: Sequence[Plan], level: float | None) -> tuple[Tensor]:
            prompts, negative = self._conditions(some)
            how = vars(self.resolved) | {"negative": negative, "level": level}
            return (check_images(self.backbone, sample(self.backbone, latents, prompts, **how)),)

        return self._each_level(sampled, latents, plans)[0]

    def _each_level(
        self,
        run: Callable[[Tensor, Sequence[Plan], float | None], tuple[Tensor, ...]],
        latents: Tensor,
        plans: Sequence[Plan],
    ) -> tuple[Tensor, ...]:
        """Call ``run`` for the latents and plans of each level; return its rows in their order."""
        groups: dict[float | None, list[int]] = {}
        for row, plan in enumerate(plans):
            groups.setdefault(self.level(plan), []).append(row)
        if len(groups) < 2:
            return run(latents, plans, next(iter(groups), self.bank.level))
        parts = [
            run(latents[rows], [plans[row] for row in rows], level)
            for level, rows in groups.items()
        ]
        back = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
        return tuple(torch.cat(part)[back] for part in zip(*parts, strict=True))

    def _conditions(self, plans: Sequence[Plan]) -> tuple[list[Words], Given]:
        """Return the prompts of plans, beside their references, and what is guided away from."""
        references = [self.reference_of(plan) for plan in plans if self.bank.holds_references]

        def beside(words: list[Words]) -> list[Words]:
            pairs = zip(words, references, strict=True)
            return [Referred(w, r[None]) for w, r in pairs] if references else words

        away_from = INVERTERS[self.bank.inversion["method"]].negative
        negative: Given = None
        if away_from == "prompt":
            negative = beside([self.bank.prompt(plan.class_name) for plan in plans])
        elif self.has_nulls:
            nulls = torch.stack([self.null(plan) for plan in plans])
            levels = self.backbone.process.levels(self.bank.inversion["steps"])
            negative = Schedule.by_step(levels[: nulls.shape[1] + 1], nulls)
        return beside([self._words(plan) for plan in plans]), negative

    def reference_of(self, plan: Plan) -> Float[Tensor, "..."]:
        """Mix the references of a plan's members by its weights; fresh noise has none.

        Raises:
            UserError: the bank has none.
        """
        points, weights = self.bank.gather([plan], "references")
        rule = REFERENCE_RULES[self.reference_rule or "lin"]
        return rule(points.flatten(2)[:, :, None, None], weights).view(points.shape[2:])

    def _words(self, plan: Plan) -> Words:
        """Return what a plan is sampled with."""
        names = plan.member_classes
        if not self.blend or set(names) == {plan.class_name}:
            return self._in_context(self.prompt(plan.class_name), plan)
        words = [self._in_context(self.prompt(name), plan) for name in names]
        rows = embed(self.backbone, rows_of(words, len(names)))
        return mix(rows(1.0), torch.tensor([plan.weights]))

    def _in_context(self, words: Words, plan: Plan) -> Words:
        """Return a prompt with a plan's context.

        Raises:
            UserError: there is a context, and embeddings or a schedule in place of a prompt.
        """
        if isinstance(words, str):
            return with_context(words, plan.context)
        if plan.context:
            raise UserError(
                f"expected prompts beside contexts, got {type(words).__name__} for class "
                f"{plan.class_name!r}; leave contexts out, or put them into it"
            )
        return words

    def text(self, plan: Plan) -> str:
        """Return the prompt of a plan, for records; empty without, or if it is no text."""
        words = self.prompt(plan.class_name)
        return with_context(words, plan.context) if isinstance(words, str) else ""

    def goal(self, plan: Plan) -> Goal:
        """Return what a plan's centroid is refined for: the means of its class's real images.

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
            assert self.refine is not None
            self._goals[name] = self.refine.goal(self.backbone, self.real(name))
        return self._goals[name]

    def real(self, class_name: str, limit: int | None = None) -> Float[Tensor, "n c r r"]:
        """Read the real images of a class that the bank shows, in the backbone's format.

        Args:
            class_name: the class.
            limit: how many to read at most, spread over the class; all by default.

        Raises:
            UserError: they are no longer where they were.
        """
        root: Any = Path(self.bank.manifest.source) if self.source is None else self.source
        where = root.root if isinstance(root, Source) else root
        channels, side = self.backbone.channels, self.backbone.resolution
        digests = list(self.bank.digests(class_name).items())
        if limit is not None and len(digests) > limit:
            chosen = torch.linspace(0, len(digests) - 1, limit).long().tolist()
            digests = [digests[row] for row in chosen]
        images = torch.empty(len(digests), channels, side, side)
        for row, (image_id, digest) in enumerate(digests):
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
    def reference(self) -> Reference:
        """A new view of the bank for filters, which cache what they measure in it."""
        classes = self.bank.classes
        return Reference(
            classes=classes,
            prompts=[self.bank.prompt(name) for name in classes],
            real=lambda label, limit=None: self.real(classes[label], limit),
            device=self.backbone.device,
            counts=[len(ids) for ids in self.bank.members.values()],
        )

    @property
    def has_nulls(self) -> bool:
        """Whether sampling points away from embeddings that the bank keeps."""
        return (
            self.resolved.guidance != 1
            and INVERTERS[self.bank.inversion["method"]].negative == "null_embeddings"
        )

    def prompt(self, class_name: str) -> Words:
        """Return what a class is sampled with."""
        return (self.prompts or {}).get(class_name, self.bank.prompt(class_name))

    @property
    def texts(self) -> dict[str, str]:
        """Return the prompts that replace the bank's, for records.

        Raises:
            UserError: some are embeddings or schedules, which no record holds.
        """
        texts: dict[str, str] = {}
        for name, words in (self.prompts or {}).items():
            if not isinstance(words, str):
                raise UserError(
                    f"expected prompts as text where images are kept on disk, got "
                    f"{type(words).__name__} for class {name!r}; take SyntheticDataset or "
                    "Synthesizer for embeddings and schedules"
                )
            texts[name] = words
        return texts

    def check(self, plans: Sequence[Plan]) -> None:
        """Refuse plans whose images cannot be made, before any is.

        Raises:
            UserError: a prompt that the backbone does not take, a rule that does not fit, a
                file of the bank that is damaged, or, to refine, no network or real images.
        """
        for plan in plans:  # one by one: the prompts of 1000 classes fill a GPU
            embed(self.backbone, rows_of(self._conditions([plan])[0], 1))
        if self.refine:
            self.refine.see(self.backbone)
            self.real(plans[0].class_name)
        self.mix(plans)

    def null(self, plan: Plan) -> Float[Tensor, "steps ..."]:
        """Mix the null-text embeddings of a plan's members by its weights.

        Mokady et al., arXiv 2211.09794, interpolate them linearly too. Fresh noise has the empty
        prompt's.

        Raises:
            UserError: the bank was not inverted with null_text.
        """
        parts = []
        for name, image_id in zip(plan.member_classes, plan.members, strict=True):
            if name not in self._nulls:
                while sum(nulls.nbytes for nulls, _ in self._nulls.values()) > MAX_NULLS:
                    del self._nulls[next(iter(self._nulls))]
                self._nulls[name] = self.bank.null_embeddings(name)
            nulls, owner = self._nulls[name]
            parts.append(nulls[owner[self.bank.members[name].index(image_id)]])
        rows = torch.stack(parts).float()
        mixed = torch.einsum("k,k...->...", torch.tensor(plan.weights), rows)
        if plan.noise:
            empty = self.backbone.condition([""])["text"].float().cpu()
            mixed = (1 - plan.noise) * mixed + plan.noise * empty
        return mixed

    def _warn_of_bias(self, plans: Sequence[Plan], mixture: Mixture) -> None:
        """Warn once, of the first class whose bias the rule enlarges.

        The means are those of the bank's records; their error comes from the scatter of the first
        plan's members.
        """
        rows: dict[str, list[int]] = {}
        for row, plan in enumerate(plans):
            if not plan.classes and not self._warned:
                rows.setdefault(plan.class_name, []).append(row)
        for name, group in rows.items():
            if name not in self._means:
                members = len(plans[group[0]].members)
                self._means[name] = self._class_means(name, mixture.spreads[group[0]], members)
            means = mixture.centroids[group].mean((-2, -1))
            words = bias_warning(self._means[name], means, mixture.averages[group], str(self.rule))
            if words:
                self._warned = True
                return warnings.warn(f"class {name!r}: {words}", BiasWarning, stacklevel=4)
        return None

    def _class_means(self, name: str, spread: Float[Tensor, " c"], members: int) -> ChannelMeans:
        """Return the channel means of a class, and their errors by the scatter of some members."""
        count, (_, height, width) = len(self.bank.members[name]), self.backbone.latent_shape
        errors = spread.double() / count**0.5
        if members == 1:  # as of white noise
            errors = torch.full_like(errors, 1 / (height * width) ** 0.5)
        means = self.bank.channel_means(name)
        return ChannelMeans(members, tuple(means.tolist()), tuple(errors.tolist()))


def _noise(plan: Plan, shape: Sequence[int]) -> Tensor:
    """Draw the fresh noise of a plan."""
    return normal(rng(plan.seed, "noise", plan.epoch, plan.index), *shape)


class Undoing(Synthesizer):
    """Samples images of a bank back as they were inverted: with that guidance, and their captions.

    Args:
        backbone: the model the bank was inverted with.
        bank: the latents.
        batch_size: images a network call.
    """

    def __init__(self, backbone: Backbone, bank: LatentBank, batch_size: int = 64) -> None:
        how = Sampling(guidance=float(bank.inversion["guidance"]), batch_size=batch_size)
        self._captions: dict[str, dict[str, str]] = {}
        super().__init__(backbone, bank, Rule.parse("lin/0"), how)

    def text(self, plan: Plan) -> str:
        """Return the caption of a plan's first member, or else the prompt of its class."""
        name = plan.class_name
        if name not in self._captions:
            used = self.bank.inversion.get("captions")
            self._captions[name] = self.bank.captions(name) if used else {}
        return self._captions[name].get(plan.members[0], self.bank.prompt(name))

    def _words(self, plan: Plan) -> Words:
        return self.text(plan)
