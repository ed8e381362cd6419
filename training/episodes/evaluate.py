r"""N-way K-shot episodes, each with synthetic images of its own.

A task draws N classes, K support and Q query images of each. A frozen network turns images into
features; a head, fitted to the supports alone, answers the queries. The same head is then fitted
to supports and images that were synthesised from the supports' latents, and the *gain* is what it
answers better, task by task. No query reaches a centroid: a plan's members are supports, and a rule
that asks for the bank's mean (``lol``) gets the mean of the episode's supports.

The weights of all samples of a task are scaled to sum to N·K, a synthetic one weighing
``synthetic_weight`` times a real one; so synthetic copies of the supports change no head, and a
gain is never a matter of weaker regularisation. Over n tasks the mean accuracy is told ±
:math:`1.96\,s/\sqrt n`. Tasks share classes and images: this is what other tasks of the same novel
classes would give, not other classes. Left open: a prompt that names a class tells the diffusion
model more than the supports do; invert without for a fair 1-shot.
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
from tqdm import tqdm

from augment.bank.bank import LatentBank
from augment.bank.format import DIGITS
from augment.centroid.rule import Rule
from augment.core.errors import AugmentWarning, UserError
from augment.core.files import check_folder, locked, model_digest, remember, write_bytes
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
from training.data.identity import check_run
from training.episodes.features import Network, embed, finite
from training.episodes.protocol import OTHER, Episode, Episodes
from training.models.heads import Head, make_head
from training.models.metrics import normal_interval

RESULTS, FEATURES = "results.csv", "features.safetensors"
HEADER = "task,real,synthetic,gain\n"


@dataclass(frozen=True)
class Synthesis:
    """What is synthesised within an episode.

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
        """The plans of a task's images, of all its classes in turn; its number is their epoch."""
        planner = Planner(dict(zip(episode.classes, episode.support, strict=True)), self.mixing)
        return [planner(task, index) for index in range(self.per_class * len(episode.classes))]

    def __call__(
        self, task: int, episode: Episode
    ) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """A task's images, synthesised together, and their labels."""
        members = dict(zip(episode.classes, episode.support, strict=True))
        view = dataclasses.replace(self.bank, members=members)  # of the supports, and no query
        plans = self.plans(task, episode)
        rule = Rule.parse(self.mixing.rule)
        images = Synthesizer(self.backbone, view, rule, self.sampling).images(plans)
        return images, torch.tensor([plan.label for plan in plans])


@dataclass(frozen=True)
class Evaluation:
    """Measures a task; a pure function of its number and episode.

    Args:
        head: what is fitted.
        vectors: the features of every image that occurs.
        network: what makes features of synthetic ones.
        synthesis: what makes those; None is real only.
        form: channels and resolution that the network gets.
        weight: of a synthetic sample; of a real one it is 1.
    """

    head: Head
    vectors: dict[str, Tensor]
    network: Network
    synthesis: Callable[[int, Episode], tuple[Tensor, Tensor]] | None
    form: tuple[int, int]
    weight: float

    def __call__(self, task: int, episode: Episode) -> tuple[float, float | None]:
        """Accuracy with real supports only, and with synthetic images too."""
        support, labels = self.of(episode.support)
        query, truth = self.of(episode.query)
        count = len(labels)
        weights = torch.ones(count, dtype=torch.float64)

        def accuracy(support: Tensor, labels: Tensor, weights: Tensor) -> float:
            scaled = weights * (count / weights.sum())
            hits = self.head(support, labels, scaled, query) == truth
            return round(hits.double().mean().item(), 6)

        real = accuracy(support, labels, weights)
        if self.synthesis is None:
            return real, None
        images, more = self.synthesis(task, episode)
        rows = finite(self.network(prepare(images, *self.form))).double()
        shares = torch.full((len(more),), self.weight, dtype=torch.float64)
        pairs = ((support, rows), (labels, more), (weights, shares))
        return real, accuracy(*map(torch.cat, pairs))

    def of(self, rows: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
        """The features of the images of each class, float64, and their labels."""
        features = torch.stack([self.vectors[i] for ids in rows for i in ids]).double()
        return features, torch.tensor([label for label, ids in enumerate(rows) for _ in ids])


Row = tuple[float, float | None]


def line_of(task: int, row: Row) -> str:
    """A row of the table."""
    real, fake = row
    told = ["", ""] if fake is None else [str(fake), str(round(fake - real, 6))]
    return ",".join([str(task), str(real), *told]) + "\n"


def read_rows(path: Path) -> list[Row]:
    """The rows that an interrupted run finished, up to the first that is not as it was written."""
    try:
        header, *lines = path.read_text("utf-8", "replace").splitlines(keepends=True) or [""]
    except FileNotFoundError:
        return []
    rows: list[Row] = []
    for task, line in enumerate(lines if header == HEADER else []):
        try:
            real, fake = line.split(",")[1:3]
            row = float(real), float(fake) if fake else None
        except ValueError:
            break
        if line != line_of(task, row):
            break
        rows.append(row)
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the table."""
    text = HEADER + "".join(line_of(task, row) for task, row in enumerate(rows))
    write_bytes(path, text.encode(), sync=False)


def summary(shape: str, rows: Sequence[Row]) -> str:
    """The result in one sentence."""

    def told(values: Sequence[float], form: str = "") -> str:
        return f"{100 * statistics.mean(values):{form}.1f} ± {100 * normal_interval(values):.1f}"

    real, pairs = [row[0] for row in rows], [(a, b) for a, b in rows if b is not None]
    text = f"{shape}, {len(rows)} episodes: {told(real)} % real only"
    if pairs:
        text += f", {told([b for _, b in pairs])} % with synthetic"
        text += f", paired gain {told([b - a for a, b in pairs], '+')}"
    return text


def frozen(
    path: Path, source: Source, shape: tuple[int, int, int], n_tasks: int, seed: int
) -> Episodes:
    """The episodes of a file, which is made if it is missing.

    Raises:
        UserError: it holds others, or fewer; see `Episodes` too.
    """
    if not path.exists():
        Episodes(source, *shape, n_tasks, seed).write(path)
    found = Episodes.read(path, source)
    if (found.n_way, found.n_shot, found.n_query) != shape or len(found) < n_tasks:
        raise UserError(
            f"expected {n_tasks} tasks of (n_way, n_shot, n_query) = {shape}, got {len(found)} of "
            f"{(found.n_way, found.n_shot, found.n_query)} in {path}; ask for these, or {OTHER}"
        )
    return found


def open_bank(path: str, episodes: Sequence[Episode], noise: float, members: int) -> LatentBank:
    """A bank that holds every support.

    Raises:
        UserError: it does not.
    """
    bank = LatentBank.open(path)
    known = {name: set(ids) for name, ids in bank.members.items()}
    for episode in episodes:
        for name, ids in zip(episode.classes, episode.support, strict=True):
            missing = [i for i in ids if i not in known.get(name, ())]
            if missing:
                raise UserError(
                    f"expected a latent of every support image in {path}, got none of "
                    f"{missing[0]} in class {name!r}; invert the images of the episodes"
                )
    if members == 1 and not noise:
        warnings.warn(
            "expected noise > 0 where a centroid mixes 1 support, got 0: it is that support again, "
            "and nothing new is made; set noise, such as 0.5",
            AugmentWarning,
            stacklevel=3,
        )
    return bank


def check_supports(bank: LatentBank, digests: dict[str, str]) -> None:
    """Refuse a bank of other images that have the names of those of the episodes.

    Raises:
        UserError: one of them differs by its content.
    """
    for name in bank.classes:
        for image_id, digest in bank.digests(name).items():
            if digests.get(image_id, digest[:DIGITS]) != digest[:DIGITS]:
                raise UserError(
                    "expected the bank to be of the images of the episodes, got another "
                    f"{image_id} by its content; invert the images of the episodes"
                )


def run_episodes(
    images: Source | str,
    network: str | None = None,
    out: str = "runs/episodes",
    weights: str = "",
    episodes: str | None = None,
    n_way: int = 5,
    n_shot: int = 1,
    n_query: int = 15,
    n_tasks: int = 600,
    seed: int = 0,
    bank: str | None = None,
    rule: str = "fade/chm",
    alpha: float = 1.0,
    members: int | None = None,
    noise: float = 0.0,
    per_class: int = 10,
    synthetic_weight: float = 1.0,
    solver: str = "exact",
    steps: int | None = None,
    guidance: float | None = None,
    head: str = "logistic",
    head_options: dict[str, Any] | None = None,
    channels: int | None = None,
    resolution: int | None = None,
    device: str | None = None,
) -> None:
    """Evaluate N-way K-shot episodes, with and without synthetic images of their supports.

    Args:
        images: folder of the novel classes, one sub-folder each, or a source.
        network: whose features heads are fitted to: of timm, or fashion (embedded: grey clothes),
            clip or inception; by default that of a checkpoint.
        out: folder for episodes.json, features.safetensors and results.csv (a row a task); an
            interrupted run goes on, and one of more n_tasks too if there are episodes for it.
        weights: .safetensors, a state dict, or a checkpoint of latent-augment train; by default
            those that the network is known with.
        episodes: file of frozen episodes, made if it is missing; by default out/episodes.json.
        n_way: classes of a task.
        n_shot: support images of each.
        n_query: query images of each.
        n_tasks: how many tasks.
        seed: of all dice.
        bank: folder of the bank of latents, of the supports at least; without one real only.
        rule: norm rule and mean split, such as fade/chm.
        alpha: concentration of the Dirichlet weights.
        members: how many supports a centroid mixes; by default all of the class.
        noise: share of fresh noise, in [0, 1); with n_shot 1 only this makes anything new.
        per_class: synthetic images of each class of a task.
        synthetic_weight: of a synthetic image; a real one weighs 1.
        solver: exact, fast, or ddim, euler, dpm++, midpoint, fireflow.
        steps: solver steps; by default those of the bank, or 10 with fast.
        guidance: scale of classifier-free guidance; by default as the bank was inverted.
        head: logistic or prototype.
        head_options: of the head, as YAML such as '{metric: euclid}' or '{c: 10}'.
        channels: of the images that the network gets.
        resolution: of the images that the network gets, real and synthetic.
        device: such as cuda or cpu; by default the GPU if there is one.

    Raises:
        UserError: a setting, the images, the bank, the weights or the episodes do not fit.
    """
    source, fitted = as_source(images), make_head(head, **(head_options or {}))
    if n_tasks < 2:
        raise UserError(f"expected at least 2 tasks for an interval, got {n_tasks}; ask for more")
    if per_class < 1 or not 0 <= synthetic_weight < math.inf:
        raise UserError(
            f"expected per_class ≥ 1 and synthetic_weight ≥ 0, got {per_class} and "
            f"{synthetic_weight}; leave out the bank for real images only"
        )
    root, shape = Path(out), (n_way, n_shot, n_query)
    check_folder(root)
    with locked(root) as lock:
        lock.sweep()
        path = Path(episodes) if episodes else root / "episodes.json"
        found = frozen(path, source, shape, n_tasks, seed)
        tasks = found.tasks[:n_tasks]
        opened = open_bank(bank, tasks, noise, min(members or n_shot, n_shot)) if bank else None
        sampling = Sampling(solver=solver, steps=steps, guidance=guidance)
        mixing = Mixing(rule=rule, seed=seed, alpha=alpha, members=members, noise=noise)
        making = {"rule": rule, "solver": solver, "steps": steps, "guidance": guidance}
        making |= {"seed": seed, "alpha": str(alpha), "members": members, "noise": noise}
        making |= {"per_class": per_class, "synthetic_weight": synthetic_weight}
        making["bank"] = opened and opened.digest
        if not (network or weights):
            raise UserError("expected a network, such as fashion or resnet50, or weights; got none")
        settings = {"images": str(source.root), "episodes": found.digest}
        settings |= {"network": model_digest(network or "") or network}
        settings |= {"weights": digest_of(weights)}
        usual = usual_form(network or "", weights)
        form = (channels or usual[0], resolution or usual[1])
        settings |= {"form": list(form)}
        settings |= {"head": repr(fitted), **(making if opened else {"bank": None})}
        begun = any((root / name).exists() for name in (RESULTS, FEATURES))
        remember(root / "settings.json", settings, "--out", begun)
        used = Selection(source)
        asked = {i for task in found.tasks for i in task.images}
        used.ids = {name: [i for i in ids if i in asked] for name, ids in source.ids.items()}
        digests = check_run(root, used, begun, "episode")
        if opened:
            check_supports(opened, digests)
        rows = read_rows(root / RESULTS)
        if len(rows) < n_tasks:
            model = load_backbone(**{**opened.recipe, "device": device}) if opened else None
            where = model.device if model else find_device(device)
            eyes = feature_network(network or "", weights, where)
            ids = sorted({i for task in tasks for i in task.images})
            vectors = embed(root / FEATURES, source, ids, eyes, *form)
            synthesis = (
                Synthesis(opened, model, mixing, sampling, per_class) if opened and model else None
            )
            evaluate = Evaluation(fitted, vectors, eyes, synthesis, form, synthetic_weight)
            evaluate_rest(root / RESULTS, evaluate, tasks, rows)
    print(summary(f"{n_way}-way {n_shot}-shot", rows[:n_tasks]))
    print(f"{root / RESULTS}: a row a task")


def evaluate_rest(
    path: Path, evaluate: Evaluation, tasks: Sequence[Episode], rows: list[Row]
) -> None:
    """Measure the tasks that have no row yet, and write each down when it is done."""
    first = len(rows)
    bar = tqdm(total=len(tasks), initial=first, desc="episodes", unit="task")
    with bar, warnings.catch_warnings():
        for number in range(first, len(tasks)):
            rows.append(evaluate(number, tasks[number]))
            if number == first:  # told once
                warnings.simplefilter("ignore", AugmentWarning)
            write_rows(path, rows)
            bar.set_postfix_str(f"{100 * statistics.mean(row[0] for row in rows):.1f} % real only")
            bar.update()


def digest_of(weights: str) -> str:
    """Return the SHA-256 of a file of weights, or of CLIP's folder; empty if none is given.

    Raises:
        UserError: it cannot be read.
    """
    try:
        found = model_digest(weights) if weights else ""
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no file of weights and no folder of a model")
        return found
    except OSError as error:
        raise UserError(
            f"expected weights at {weights}, got {error.strerror or error}; check the path"
        ) from None
