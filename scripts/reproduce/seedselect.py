"""SeedSelect: refining latents through the sampler, from noise and from centroids.

    python scripts/reproduce/seedselect.py --quick
    python scripts/reproduce/seedselect.py

Samuel et al., *Generating images of rare concepts using pre-trained diffusion models*, arXiv
2304.14530: after 30 steps at 0.1 noise becomes an image of the class. The same authors, arXiv
2306.08687: a centroid takes 5 steps at 0.05, and so does a place on a path of NAO between two
images of the class; here an inner place at random. Measured are the loss, the cosine distance to
the mean feature of the class, and whether the class is kept, by step. The judge is the network of
the loss, though its means are over other images. So pixels judge too, without a network: the class
of the nearest other image, and the distance to the nearest one of the own class. Variety is the
mean distance of two images of a class in pixels, which one common goal reduces.

Loss and images are those of the best latent up to a step, which is the result. Memory is the peak
of one step in a process of its own, less what was there before.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from claims import once, options, record, sized
from judge import (
    FeatureJudge,
    ci95,
    gain,
    load_all,
    mean,
    open_judge,
    pictures,
)
from matplotlib.figure import Figure
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from tqdm import tqdm
from works import Interval

import augment.synthesis.refine
from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.centroid.walks import walk
from augment.core.rng import normal, rng
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.sampling import ResolvedSampling, Sampling
from augment.diffusion.solver import sample
from augment.plan.mixing import Mixing
from augment.plan.plan import Plan
from augment.plan.planner import Planner
from augment.sources import Source
from augment.sources.images import sheet
from augment.synthesis.refine import SeedSelect
from augment.synthesis.synthesizer import Synthesizer

STARTS = {
    "noise": (30, 0.1, (0, 2, 5, 10, 15, 20, 30)),
    "fade/chm": (5, 0.05, (0, 1, 2, 3, 5)),
    "nao/chm": (5, 0.05, (0, 1, 2, 3, 5)),
    "nao path": (5, 0.05, (0, 1, 2, 3, 5)),
}
"""Starting points: steps, learning rate, and the steps to measure at."""
MEMBERS = 5
PLACES = 11  # on a path, both ends included
MEMORY_STEPS = (4, 16)
MEMORY_BATCH = 16


def refined(synthesizer: Synthesizer, start: str, each: int) -> dict[str, Tensor]:
    """Refine ``each`` latents a class; return losses, images by step, and seconds a latent."""
    steps, lr, looks = STARTS[start]
    mixing = Mixing(alpha=1.0, members=2 if start == "nao path" else MEMBERS)
    planner = Planner(synthesizer.bank.members, mixing)
    plans = [planner(0, index) for index in range(each * len(synthesizer.bank.classes))]
    latents = [start_of(synthesizer, start, plan) for plan in plans]
    goals = [synthesizer.goal(plan) for plan in plans]
    refine = replace(synthesizer.refine, steps=steps, lr=lr)  # type: ignore[type-var]
    way = [torch.stack(latents)]
    hook = register_optimizer_step_post_hook(lambda *step: way.append(_latents(*step)))
    how = replace(synthesizer.resolved, batch_size=len(plans))
    begun = time.perf_counter()
    raw = refine(synthesizer.backbone, way[0], goals, None, how).losses
    spent = (time.perf_counter() - begun) / len(plans)
    hook.remove()
    losses, best = raw.cummin(1)  # what would come out if it ended there
    latents, rows = torch.stack(way), torch.arange(len(plans))
    images = [
        sample(synthesizer.backbone, latents[best[:, k], rows], None, **vars(how)) for k in looks
    ]
    return {
        "losses": losses, "images": torch.stack(images, 1), "seconds": torch.tensor(spent),
        "tipped": (raw[:, -1] > raw[:, 0]).double(),
    }  # fmt: skip


def start_of(synthesizer: Synthesizer, start: str, plan: Plan) -> Tensor:
    """Return the latent that a plan begins with: noise, a place on a path, or a centroid."""
    if start == "noise":
        return normal(rng(0, "noise", plan.index), *synthesizer.backbone.latent_shape)
    if start == "nao path":
        place = int(rng(0, "order", plan.index).integers(1, PLACES - 1))
        return walk(*synthesizer.points(plan)[0], PLACES, "nao")[place]
    return synthesizer.centroid(plan)


def _latents(optimiser: torch.optim.Optimizer, *_: object) -> Tensor:
    """Copy an optimiser's parameter."""
    return optimiser.param_groups[0]["params"][0].detach().clone()


def judged(
    images: Tensor, judge: FeatureJudge, real: tuple[Tensor, Tensor], classes: int
) -> dict[str, Tensor]:
    """Assess images (n, looks, C, R, R) of the classes in turn: (n, looks); variety (k, looks).

    Args:
        images: the images.
        judge: a network.
        real: pixels and labels of other real images.
        classes: their number k.
    """
    flat, labels = images.flatten(0, 1), torch.arange(len(images)) % classes
    rows = labels.repeat_interleave(images.shape[1])
    seen = judge.assess(flat, rows)
    pixels, real_labels = real
    far = torch.cdist(flat.flatten(1), pixels) / pixels.shape[1] ** 0.5
    own = far.masked_fill(real_labels[None] != rows[:, None], torch.inf).amin(1)
    nearest = (real_labels[far.argmin(1)] == rows).double()
    found = {"distance": seen["distance"], "kept": seen["kept"], "pixels": nearest, "near": own}
    groups = images.flatten(2).unflatten(0, (-1, classes)).permute(1, 2, 0, 3)
    pairs = torch.cdist(groups, groups) / groups.shape[-1] ** 0.5
    count = groups.shape[2]
    variety = pairs.sum((-2, -1)) / max(count * (count - 1), 1)
    unflat = {key: value.unflatten(0, images.shape[:2]) for key, value in found.items()}
    return {**unflat, "variety": variety}


def memory(job: tuple[str, str, int, bool]) -> float:
    """Measure the MB of one refinement step, in a process of its own.

    Args:
        job: the backbone's name, the bank's path, solver steps, and whether layers are recomputed.
    """
    from benchmarks.growth import memory as resident

    name, path, steps, again = job
    torch.set_num_threads(1)
    if not again:
        plain: Callable = lambda run, *given, use_reentrant: run(*given)  # noqa: E731
        augment.synthesis.refine.checkpoint = plain  # type: ignore[assignment]
    backbone = load_backbone(name, device="cpu")
    made = Synthesizer(
        backbone, LatentBank.open(path), sampling=Sampling(solver="ddim"), refine=SeedSelect(1)
    )
    sampling = ResolvedSampling(solver="ddim", steps=steps)
    goal = made.goal(Planner(made.bank.members)(0, 0))
    latents = normal(rng(0, "noise"), MEMORY_BATCH, *backbone.latent_shape)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    SeedSelect(1)(backbone, latents, [goal] * MEMORY_BATCH, None, sampling)
    return resident("VmHWM") - before


def peaks(args: argparse.Namespace, bank: LatentBank) -> dict[str, Tensor]:
    """Measure MB by solver steps, with layers recomputed and with all kept."""
    found = {}
    spawn = multiprocessing.get_context("spawn")
    for again in (True, False):
        jobs = [(args.backbone, str(bank.path), steps, again) for steps in MEMORY_STEPS]
        with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
            values = list(tqdm(pool.map(memory, jobs), "memory", len(jobs)))
        found["again" if again else "kept"] = torch.tensor(values)
    return found


def others(source: Source, backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Return pixels and labels of real images."""
    labels = [label for label, name in enumerate(source.classes) for _ in source.ids[name]]
    return load_all(source, backbone).flatten(1), torch.tensor(labels)


def draw(found: dict[str, dict[str, Tensor]], mega: dict[str, Tensor], path: Path) -> None:
    """Draw loss, distance and memory."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for start, cell in found.items():
        steps, lr, looks = STARTS[start]
        for axes, values, at in (
            (left, cell["losses"], range(steps + 1)), (middle, cell["distance"], looks)
        ):  # fmt: skip
            lows, centre, highs = zip(*map(mean, values.T), strict=True)
            low, high = ([max(x, 1e-3) for x in ends] for ends in (lows, highs))
            axes.plot(at, centre, "o-", ms=3, label=f"{start}, {steps} at {lr}")
            axes.fill_between(at, low, high, alpha=0.2)
    left.set(title="loss", xlabel="step", yscale="log")
    middle.set(title="cosine distance to the class's mean", xlabel="step", yscale="log")
    left.legend()
    for key, name in (("kept", "all layers kept"), ("again", "layers recomputed")):
        right.plot(MEMORY_STEPS, mega[key], "o-", label=name)
    right.set(title=f"memory of a batch of {MEMORY_BATCH}, MB", xlabel="solver steps", yscale="log")
    right.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Refine, sample, measure, draw, judge."""
    args = options("SeedSelect: arXiv 2304.14530.", "seedselect").parse_args()
    each, steps = sized(args, (1, 3), (1, 5), (4, 20))
    backbone = load_backbone(args.backbone)
    source, reference = pictures(args, 8)
    judge, real = open_judge(args, backbone, reference), others(reference, backbone)
    tag = f"{backbone.fingerprint['weights'][:8]}-{steps}"
    bank = fill_bank(
        args.out / f"bank-{tag}", backbone, source, None, "ddim", steps=steps, stored=()
    )
    found, rows, strips = {}, [], {}
    for start in tqdm(STARTS, "starts"):
        rule = start if "/" in start else "fade/chm"  # noise and paths have no centroid
        synthesizer = Synthesizer(
            backbone, bank, Rule.parse(rule), refine=SeedSelect(network=args.network)
        )
        made = once(
            args.out / f"{start.replace('/', '-').replace(' ', '-')}-{tag}-{each}.safetensors",
            lambda s=synthesizer, b=start: refined(s, b, each),
        )
        cell = found[start] = made | judged(made["images"], judge, real, len(bank.classes))
        looks = STARTS[start][2]
        for number in (0, len(looks) - 1):
            at, take = looks[number], lambda key, n=number, c=cell: c[key][:, n]
            rows.append({
                "from": start, "step": at, "loss": ci95(cell["losses"][:, at]),
                "distance": ci95(take("distance")), "class kept, %": ci95(take("kept"), 100),
                "by pixels, %": ci95(take("pixels"), 100), "nearest real": ci95(take("near")),
                "variety": ci95(take("variety")) if each > 1 else "",
                "s a sample": f"{cell['seconds'].item():.2g}" if at else "",
            })  # fmt: skip
        strips |= {
            f"{start}, {at}": list(made["images"][: len(bank.classes), looks.index(at)])
            for at in (looks[0], looks[2], looks[-1])
        }
    mega = once(args.out / f"memory-{tag}.safetensors", lambda: peaks(args, bank))
    sheet(strips, [name[:10] for name in bank.classes]).save(args.out / "images.png")
    draw(found, mega, args.out / "seedselect.png")
    title = f"{each} a class, DDIM {steps}; the best latent up to a step; variety is by class"
    captions = {"seedselect": "Before and after refining"}
    record(args, title, rows, decide(found, mega), **captions)


def decide(
    found: dict[str, dict[str, Tensor]], mega: dict[str, Tensor]
) -> dict[str, dict[str, Interval]]:
    """Return what decides the claims."""
    noise = found["noise"]
    kept, again = mega["kept"], mega["again"]
    growth = ((again[-1] - again[0]) / (kept[-1] - kept[0])).item()
    return {
        "ss-loss": {name: gain(x["losses"][:, 0], x["losses"][:, -1]) for name, x in found.items()},
        "ss-class": {
            what: gain(noise[key][:, -1], noise[key][:, 0])
            for key, what in (("kept", "network"), ("pixels", "pixels"))
        },
        "ss-five": {
            name: gain(noise["losses"][:, -1], found[name]["losses"][:, -1])
            for name in list(found)[1:]
        },
        "ss-path": {
            "": gain(found["nao path"]["losses"][:, -1], found["nao/chm"]["losses"][:, -1])
        },
        "ss-memory": {"": Interval(growth, growth, growth)},
    }


if __name__ == "__main__":
    main()
