r"""N-way K-shot episodes, each with synthetic images of its own.

A task draws N classes, K support and Q query images of each. A frozen network turns images into
features; a head, fitted to the supports alone, answers the queries. The same head is then fitted
to supports and images that were synthesised from the supports' latents, and the *gain* is what it
answers better, task by task. No query reaches a centroid: a plan's members are supports, and a rule
that asks for the bank's mean (``lol``) gets the mean of the episode's supports.

The weights of all samples of a task are scaled to sum to N·K, a synthetic one weighing
``synthetic_weight`` times a real one; so synthetic copies of the supports change no head, and a
gain is never a matter of weaker regularisation. Over n tasks the mean accuracy is reported ±
:math:`1.96\,s/\sqrt n`. Tasks share classes and images: this is what other tasks of the same novel
classes would give, not other classes. Left open: a prompt that names a class gives the diffusion
model more than the supports do; invert without one for a fair 1-shot.
"""

import dataclasses
import errno
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from augment.bank.bank import LatentBank
from augment.bank.format import DIGITS
from augment.centroid.rule import Rule
from augment.core.errors import AugmentWarning, UserError
from augment.core.files import check_folder, locked, model_digest, remember, write_bytes
from augment.core.progress import Progress
from augment.core.registry import make
from augment.diffusion import find_device, load_backbone
from augment.diffusion.backbone import Backbone
from augment.diffusion.sampling import Sampling
from augment.networks import feature_network, usual_form
from augment.plan.mixing import Mixing
from augment.plan.plan import Plan
from augment.plan.planner import Planner
from augment.sources import Source, as_source
from augment.sources.images import prepare
from augment.sources.subsets import Selection
from augment.synthesis.synthesizer import Synthesizer
from augment.training.checks import at_least, expect
from augment.training.data.identity import check_run
from augment.training.episodes.features import Network, embed, finite
from augment.training.episodes.protocol import OTHER, Episode, Episodes
from augment.training.models.heads import HEADS, Head
from augment.training.models.metrics import normal_interval

_RESULTS, _FEATURES = "results.csv", "features.safetensors"
_MADE_BY = (
    *("rule", "solver", "steps", "guidance", "seed", "alpha", "members", "noise", "per_class"),
    "synthetic_weight",
)
"""Settings that the results depend on only with a bank."""

_HEADER = "task,real,synthetic,gain\n"


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings:
    """The options of ``latent-augment episodes``.

    Args:
        images: folder of the novel classes, one sub-folder each, or a source.
        network: whose features heads are fitted to: of timm, or fashion (embedded: grey clothes),
            clip or inception; by default that of a checkpoint.
        out: folder for episodes.json, features.safetensors and results.csv (a row a task); an
            interrupted run is resumed, and one of more n_tasks too if there are episodes for it.
        weights: .safetensors, a state dict, or a checkpoint of latent-augment train; by default
            those that the network is known with.
        episodes: file of frozen episodes, made if it is missing; by default out/episodes.json.
        n_way: number of classes of a task.
        n_shot: number of support images of each class.
        n_query: number of query images of each class.
        n_tasks: number of tasks.
        seed: seed of all random draws.
        bank: folder of the bank of latents, of the supports at least; without one real only.
        rule: norm rule and mean split, such as fade/chm.
        alpha: concentration of the Dirichlet weights.
        members: number of supports that a centroid mixes; by default all of the class.
        noise: share of fresh noise, in [0, 1); with n_shot 1 only this makes anything new.
        per_class: synthetic images of each class of a task.
        synthetic_weight: weight of a synthetic image; a real one weighs 1.
        solver: exact, fast, or ddim, dpm++, midpoint, fireflow.
        steps: solver steps; by default those of the bank, or 10 with fast.
        guidance: scale of classifier-free guidance; by default as the bank was inverted.
        head: logistic or prototype.
        head_options: options of the head, as YAML such as '{metric: euclid}' or '{c: 10}'.
        channels: channels of the images that the network gets.
        resolution: resolution of the images that the network gets, real and synthetic.
        device: device such as cuda or cpu; by default the GPU if there is one.

    Raises:
        UserError: a number is out of its range, or there is no network.
    """

    images: Source | str
    network: str | None = None
    out: str = "runs/episodes"
    weights: str = ""
    episodes: str | None = None
    n_way: int = 5
    n_shot: int = 1
    n_query: int = 15
    n_tasks: int = 600
    seed: int = 0
    bank: str | None = None
    rule: str = "fade/chm"
    alpha: float = 1.0
    members: int | None = None
    noise: float = 0.0
    per_class: int = 10
    synthetic_weight: float = 1.0
    solver: str = "exact"
    steps: int | None = None
    guidance: float | None = None
    head: str = "logistic"
    head_options: dict[str, Any] | None = None
    channels: int | None = None
    resolution: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        expect(self.n_tasks >= 2, "at least 2 tasks for an interval", self.n_tasks)
        at_least(1, per_class=self.per_class)
        weight = self.synthetic_weight
        expect(0 <= weight < math.inf, "synthetic_weight ≥ 0, and finite", weight)
        assert self.mixing and self.sampling  # which refuse wrong settings
        if not (self.network or self.weights):
            raise UserError("expected a network, such as fashion or resnet50, or weights; got none")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The numbers of classes, and of support and query images of each."""
        return self.n_way, self.n_shot, self.n_query

    @property
    def mixing(self) -> Mixing:
        """What is mixed."""
        return Mixing(
            rule=self.rule, seed=self.seed, alpha=self.alpha, members=self.members, noise=self.noise
        )

    @property
    def sampling(self) -> Sampling:
        """How a centroid becomes an image."""
        return Sampling(solver=self.solver, steps=self.steps, guidance=self.guidance)


@dataclass(frozen=True)
class EpisodeSynthesizer:
    """Synthesise the images of an episode from the latents of its supports.

    Args:
        bank: the latents of all supports at least.
        backbone: the model it was inverted with.
        mixing: what is mixed.
        sampling: how a centroid becomes an image.
        per_class: images of each class.
    """

    bank: LatentBank
    backbone: Backbone
    mixing: Mixing
    sampling: Sampling
    per_class: int

    def plans(self, task: int, episode: Episode) -> list[Plan]:
        """Return the plans of a task's images, class by class in turn; its number is the epoch."""
        planner = Planner(episode.supports, self.mixing)
        return [planner(task, index) for index in range(self.per_class * len(episode.classes))]

    def __call__(
        self, task: int, episode: Episode
    ) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """Return a task's images, synthesised together, and their labels."""
        view = dataclasses.replace(self.bank, members=episode.supports)  # and no query
        plans = self.plans(task, episode)
        rule = Rule.parse(self.mixing.rule)
        references = self.mixing.reference_rule
        made = Synthesizer(self.backbone, view, rule, self.sampling, reference_rule=references)
        images = made.images(plans)
        return images, torch.tensor([plan.label for plan in plans])


Row = tuple[float, float | None]
"""A task's accuracy with real supports only, and with synthetic images too."""


@dataclass(frozen=True)
class TaskEvaluator:
    """Measure a task; a pure function of its number and episode.

    Args:
        head: what is fitted.
        vectors: the features of every image that occurs.
        network: what makes features of synthetic ones.
        synthesize: what makes those; None is real only.
        form: channels and resolution that the network gets.
        weight: of a synthetic sample; of a real one it is 1.
    """

    head: Head
    vectors: dict[str, Tensor]
    network: Network
    synthesize: Callable[[int, Episode], tuple[Tensor, Tensor]] | None
    form: tuple[int, int]
    weight: float

    def __call__(self, task: int, episode: Episode) -> Row:
        """Return the accuracies."""
        support, labels = self._features(episode.support)
        query, truth = self._features(episode.query)
        count = len(labels)
        weights = torch.ones(count, dtype=torch.float64)

        def accuracy(support: Tensor, labels: Tensor, weights: Tensor) -> float:
            scaled = weights * (count / weights.sum())
            hits = self.head(support, labels, scaled, query) == truth
            return round(hits.double().mean().item(), 6)

        real = accuracy(support, labels, weights)
        if self.synthesize is None:
            return real, None
        images, more = self.synthesize(task, episode)
        rows = finite(self.network(prepare(images, *self.form))).double()
        shares = torch.full((len(more),), self.weight, dtype=torch.float64)
        pairs = ((support, rows), (labels, more), (weights, shares))
        return real, accuracy(*map(torch.cat, pairs))

    def _features(self, rows: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Return the features of the images of each class, float64, and their labels."""
        features = torch.stack([self.vectors[i] for ids in rows for i in ids]).double()
        return features, torch.tensor([label for label, ids in enumerate(rows) for _ in ids])


def _line(task: int, row: Row) -> str:
    """Return a row of the table."""
    real, fake = row
    more = ["", ""] if fake is None else [str(fake), str(round(fake - real, 6))]
    return ",".join([str(task), str(real), *more]) + "\n"


def _read_rows(path: Path) -> list[Row]:
    """Read the rows that an interrupted run finished, up to the first that was not written so."""
    try:
        header, *lines = path.read_text("utf-8", "replace").splitlines(keepends=True) or [""]
    except FileNotFoundError:
        return []
    rows: list[Row] = []
    for task, line in enumerate(lines if header == _HEADER else []):
        try:
            real, fake = line.split(",")[1:3]
            row = float(real), float(fake) if fake else None
        except ValueError:
            break
        if line != _line(task, row):
            break
        rows.append(row)
    return rows


def summary(shape: str, rows: Sequence[Row]) -> str:
    """Return the result in one sentence."""

    def percent(values: Sequence[float], form: str = "") -> str:
        return f"{100 * statistics.mean(values):{form}.1f} ± {100 * normal_interval(values):.1f}"

    real, pairs = [row[0] for row in rows], [(a, b) for a, b in rows if b is not None]
    text = f"{shape}, {len(rows)} episodes: {percent(real)} % real only"
    if pairs:
        text += f", {percent([b for _, b in pairs])} % with synthetic"
        text += f", paired gain {percent([b - a for a, b in pairs], '+')}"
    return text


def _freeze(settings: EpisodeSettings, source: Source) -> Episodes:
    """Read the episodes of a file, which is made if it is missing; refuse others, or fewer."""
    path = Path(settings.episodes or Path(settings.out) / "episodes.json")
    shape, n_tasks = settings.shape, settings.n_tasks
    if not path.exists():
        Episodes.draw(source, *shape, n_tasks, settings.seed).write(path)
    frozen = Episodes.read(path, source)
    if frozen.shape != shape or len(frozen) < n_tasks:
        raise UserError(
            f"expected {n_tasks} tasks of (n_way, n_shot, n_query) = {shape}, got {len(frozen)} of "
            f"{frozen.shape} in {path}; ask for these, or {OTHER}"
        )
    return frozen


def _open_bank(settings: EpisodeSettings, episodes: Sequence[Episode]) -> LatentBank | None:
    """Open the bank, which has to hold every support."""
    if settings.bank is None:
        return None
    bank = LatentBank.open(settings.bank)
    stored = {name: set(ids) for name, ids in bank.members.items()}
    for episode in episodes:
        for name, ids in episode.supports.items():
            missing = [i for i in ids if i not in stored.get(name, ())]
            if missing:
                raise UserError(
                    f"expected a latent of every support image in {settings.bank}, got none of "
                    f"{missing[0]} in class {name!r}; invert the images of the episodes"
                )
    if min(settings.members or settings.n_shot, settings.n_shot) == 1 and not settings.noise:
        warnings.warn(
            "expected noise > 0 where a centroid mixes 1 support, got 0: it is that support again, "
            "and nothing new is made; set noise, such as 0.5",
            AugmentWarning,
            stacklevel=3,
        )
    return bank


def _check_supports(bank: LatentBank, digests: dict[str, str]) -> None:
    """Refuse a bank of other images that have the names of those of the episodes."""
    for name in bank.classes:
        for image_id, digest in bank.digests(name).items():
            if digests.get(image_id, digest[:DIGITS]) != digest[:DIGITS]:
                raise UserError(
                    "expected the bank to be of the images of the episodes, got another "
                    f"{image_id} by its content; invert the images of the episodes"
                )


def run_episodes(settings: EpisodeSettings) -> None:
    """Evaluate N-way K-shot episodes, with and without synthetic images of their supports.

    Raises:
        UserError: a setting, the images, the bank, the weights or the episodes do not fit.
    """
    s, root = settings, Path(settings.out)
    source, head = as_source(s.images), make(HEADS, s.head, s.head_options or {}, "head")
    check_folder(root)
    with locked(root) as lock:
        lock.sweep()
        frozen = _freeze(s, source)
        tasks = frozen.tasks[: s.n_tasks]
        bank = _open_bank(s, tasks)
        weights, usual = _digest_of(s.weights), usual_form(s.network or "", s.weights)
        form = (s.channels or usual[0], s.resolution or usual[1])
        record = {
            "images": str(source.root),
            "episodes": frozen.digest,
            "network": model_digest(s.network or "") or s.network,
            "weights": weights,
            "form": list(form),
            "head": repr(head),
            **(
                {**{key: getattr(s, key) for key in _MADE_BY}, "alpha": str(s.alpha)}
                if bank
                else {}
            ),
            "bank": bank and bank.digest,
        }
        begun = any((root / name).exists() for name in (_RESULTS, _FEATURES))
        remember(root / "settings.json", record, "--out", begun)
        used, asked = Selection(source), {i for task in frozen.tasks for i in task.images}
        used.ids = {name: [i for i in ids if i in asked] for name, ids in source.ids.items()}
        digests = check_run(root, begun, episode=used)["episode"]
        if bank:
            _check_supports(bank, digests)
        rows = _read_rows(root / _RESULTS)
        if len(rows) < s.n_tasks:
            backbone = load_backbone(**{**bank.recipe, "device": s.device}) if bank else None
            device = backbone.device if backbone else find_device(s.device)
            network = feature_network(s.network or "", s.weights, device)
            ids = sorted({i for task in tasks for i in task.images})
            vectors = embed(root / _FEATURES, source, ids, network, *form)
            synthesize = None
            if bank and backbone:
                how = s.mixing, s.sampling, s.per_class
                synthesize = EpisodeSynthesizer(bank, backbone, *how)
            evaluate = TaskEvaluator(head, vectors, network, synthesize, form, s.synthetic_weight)
            _evaluate_rest(root / _RESULTS, evaluate, tasks, rows)
    print(summary(f"{s.n_way}-way {s.n_shot}-shot", rows[: s.n_tasks]))
    print(f"{root / _RESULTS}: a row a task")


def _evaluate_rest(
    path: Path, evaluate: TaskEvaluator, tasks: Sequence[Episode], rows: list[Row]
) -> None:
    """Measure the tasks that have no row yet, and write each down when it is done."""
    first = len(rows)
    bar = Progress(total=len(tasks), initial=first, desc="episodes", unit="task")
    with bar, warnings.catch_warnings():
        for number in range(first, len(tasks)):
            rows.append(evaluate(number, tasks[number]))
            if number == first:  # warn once
                warnings.simplefilter("ignore", AugmentWarning)
            text = _HEADER + "".join(_line(task, row) for task, row in enumerate(rows))
            write_bytes(path, text.encode(), sync=False)
            bar.set_postfix_str(f"{100 * statistics.mean(row[0] for row in rows):.1f} % real only")
            bar.update()


def _digest_of(weights: str) -> str:
    """Return the SHA-256 of a file of weights, or of CLIP's folder; empty if none is given."""
    try:
        digest = model_digest(weights) if weights else ""
        if digest is None:
            raise FileNotFoundError(errno.ENOENT, "no file of weights and no folder of a model")
        return digest
    except OSError as error:
        raise UserError(
            f"expected weights at {weights}, got {error.strerror or error}; check the path"
        ) from None
