"""The demo: 5 labelled images a class to a better classifier, and what each way of mixing gains.

Per seed it draws the shots from the embedded images, synthesises from their latents, and trains the
same network for the same number of optimiser steps on each row's images. Every row but *real only*
has the classical augmentation. The yardstick is the gain from twice the real shots. Everything is
a folder that ``invert``, ``synthesize`` and ``train`` read and write too, and every stage resumes
where an interrupted demo stopped. Rows are measured in a process per seed, or per thread of PyTorch
if these are fewer: networks as small as these gain little from a second thread.
"""

import math
import os
import signal
import statistics
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing import active_children, get_context
from pathlib import Path
from threading import RLock

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from augment.bank.bank import LatentBank
from augment.bank.fill import fill_bank
from augment.centroid import Rule
from augment.centroid.residuals import mix
from augment.core.errors import BiasWarning, UserError
from augment.core.files import JsonObject, read_json, remember, write_json
from augment.core.progress import EVERY, Progress
from augment.diffusion import Backbone, load_backbone
from augment.diffusion.sampling import Sampling
from augment.diffusion.solver import sample
from augment.plan.mixing import Mixing
from augment.plan.planner import Planner
from augment.shards.write import write_shards
from augment.sources import Folder
from augment.sources.fashion import few_shots, write_fashion
from augment.sources.images import save_image, sheet
from augment.synthesis.synthesizer import Synthesizer
from augment.training.data.draws import SyntheticMix
from augment.training.data.module import Evaluated, ImageData
from augment.training.data.transforms import Augmentation, evaluation
from augment.training.lightning import silence_lightning
from augment.training.models.classifier import Classifier
from augment.training.models.metrics import interval

SHOTS = 5
_SAMPLING = Sampling(solver="fast")
"""Latents of ``forward_start`` give as good images in 10 steps as in its 25 (RESULTS.md)."""
_MEMORY = 2**25  # bytes of the test images, which every row is tested on
_SHEET_RULES = ("lin/0", "fix/0", "nin/0", "vp/0", "fix/chm", "nin/chm", "fade/chm")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        name: as printed.
        rule: how the synthetic images are mixed; ``pixels`` mixes the images themselves.
        alpha: of their weights, by default the demo's; 0 mixes nothing.
        twice: train on twice the shots.
        augment: classical augmentation.
        mixup: α of mixup.
        short: part of the short demo.
    """

    name: str
    rule: str | None = None
    alpha: float | None = None
    twice: bool = False
    augment: bool = True
    mixup: float = 0.0
    short: bool = True


BASE = "real + classical augmentation"
TWICE = "real, twice the shots"
ROWS = (
    Row("real only", augment=False),
    Row(BASE),
    Row("real + mixup", mixup=1.0, short=False),
    Row("real + pixel mixing", rule="pixels", short=False),
    Row("real + centroids lin/0", rule="lin/0", short=False),
    Row("real + centroids fix/0", rule="fix/0"),
    Row("real + centroids fix/chm", rule="fix/chm"),
    Row("real + centroids nin/chm", rule="nin/chm", short=False),
    Row("real + centroids fade/chm", rule="fade/chm"),
    Row("real + centroids fade/lp", rule="fade/lp", short=False),
    Row("real + centroids slerp/chm", rule="slerp/chm", short=False),
    Row("real + centroids nao/chm", rule="nao/chm", short=False),
    Row("real + single latents fix/chm", rule="fix/chm", alpha=0.0, short=False),
    Row(TWICE, twice=True),
)


@dataclass(frozen=True)
class Settings:
    """Settings of a demo; by default of the short one."""

    seeds: int = 3
    rows: tuple[str, ...] = tuple(row.name for row in ROWS if row.short)
    per_class: int = 10  # as good as 30 and 200: RESULTS.md
    train_steps: int = 200
    alpha: float = 1.0
    p_synthetic: float = 0.25


FULL = Settings(seeds=5, rows=tuple(row.name for row in ROWS), per_class=25)
"""Every row, and more seeds."""


def run_demo(out: str | None, full: bool, seeds: int | None) -> None:
    """Run the demo; see the command's help."""
    settings = FULL if full else Settings()
    if seeds is not None:
        settings = replace(settings, seeds=seeds)
    root = Path(out or ("runs/demo-full" if full else "runs/demo"))
    backbone = load_backbone("tiny")
    remember(root / "settings.json", {**asdict(settings), **backbone.fingerprint}, "--out")
    drawn = {n for seed in range(settings.seeds) for n in few_shots(seed, SHOTS)}
    write_fashion(root / "images", "shots", sorted(drawn))
    tests = Folder(write_fashion(root / "test", "test"))
    say(f"inverting {10 * len(drawn)} images of Fashion-MNIST into {root}/bank")
    bank = fill_bank(root / "bank", backbone, Folder(root / "images"), stored=())
    say(f"drawing what each rule makes of the latents: {root}/sheet.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasWarning)  # some rules are there to show it
        _write_sheet(root, backbone, bank)
    rows = [row for row in ROWS if row.name in settings.rows]
    say(
        f"{len(rows)} rows × {settings.seeds} seeds: each synthesizes if it has to, trains "
        f"{settings.train_steps} steps, and is tested on {len(tests)} images"
    )
    for seed in range(settings.seeds):
        for count in (SHOTS, 2 * SHOTS):
            write_fashion(_real(root, seed, count), "shots", few_shots(seed, count))
    jobs = [(row, seed) for seed in range(settings.seeds) for row in rows]
    found = run_all(root, settings, jobs)
    accuracies = {row.name: [found[row, seed] for seed in range(settings.seeds)] for row in rows}
    records = list(summarise(accuracies))
    write_json(root / "results.json", records)
    _report(root, records)


def say(line: str) -> None:
    """Print at once what is being done."""
    print(line, flush=True)


def run_all(
    root: Path, settings: Settings, jobs: list[tuple[Row, int]]
) -> dict[tuple[Row, int], float]:
    """Return the test accuracy of each row and seed; an interrupt ends the processes too."""
    paths = {job: _done(root, *job) for job in jobs}
    found = {job: read_json(path, "an accuracy") for job, path in paths.items() if path.exists()}
    left = [job for job in jobs if job not in found]
    if not left:
        return found
    threads = torch.get_num_threads()
    count = min(threads, settings.seeds, len(left))
    set_up = {"initializer": _begin, "initargs": (threads // count,)}
    handler = signal.getsignal(signal.SIGINT)
    with (
        Progress(total=len(jobs), initial=len(found), desc="rows × seeds", unit="run") as bar,
        ProcessPoolExecutor(count, get_context("spawn"), **set_up) as pool,
    ):
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the processes inherit it
            runs = {pool.submit(run_row, root, settings, *job): job for job in left}
            signal.signal(signal.SIGINT, handler)
            for run in as_completed(runs):
                found[runs[run]] = run.result()
                bar.update()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.kill()  # Lightning holds SIGTERM up; what is written appears whole
            if not isinstance(error, BrokenProcessPool):
                raise
            raise UserError(
                f"expected {count} processes to measure the rows, got the end of one, perhaps for "
                "want of memory; run the same command with OMP_NUM_THREADS=1, which takes one"
            ) from None
    return found


def _begin(threads: int) -> None:
    """Set up a process of `run_all`."""
    torch.set_num_threads(threads)
    os.environ[EVERY] = "1e6"  # seconds: the only bar is that of the process that waits
    Progress.set_lock(RLock())  # tqdm's own is a semaphore, which a killed process would leave
    warnings.simplefilter("ignore", BiasWarning)


@cache
def _opened(root: Path) -> tuple[Backbone, LatentBank, DataLoader[tuple[torch.Tensor, int]]]:
    """Open what all rows of a process read: backbone, bank and test images."""
    tests = Evaluated(Folder(root / "test"), evaluation(1, 32), _MEMORY)
    bank = LatentBank.open(root / "bank")
    return load_backbone("tiny"), bank, DataLoader(tests, batch_size=128)


def _real(root: Path, seed: int, count: int) -> Path:
    """Return the folder of a seed's real images."""
    return root / f"seed-{seed}" / f"real-{count}"


def _done(root: Path, row: Row, seed: int) -> Path:
    """Return the file of a row's accuracy."""
    name = row.name.replace(" ", "-").replace("/", "-").replace("-+-", "-")
    return root / f"seed-{seed}" / "accuracy" / f"{name}.json"


def run_row(root: Path, settings: Settings, row: Row, seed: int) -> float:
    """Measure the test accuracy of a row and seed, and write it to its file."""
    folder, done = root / f"seed-{seed}", _done(root, row, seed)
    backbone, bank, tests = _opened(root)
    out, fake = folder / "synthetic" / done.stem, None
    if row.rule:
        alpha = settings.alpha if row.alpha is None else row.alpha
        mixing = Mixing(seed=seed, alpha=alpha)
        fake, planner = str(out), Planner(_of_shots(bank, seed).members, mixing)
        if row.rule == "pixels":
            _write_pixel_mixes(planner, Folder(_real(root, seed, SHOTS)), settings.per_class, out)
        else:
            synthesizer = Synthesizer(backbone, bank, Rule.parse(row.rule), _SAMPLING)
            write_shards(synthesizer, planner, settings.per_class, out, extension="png")
    torch.manual_seed(seed)
    data = ImageData(
        str(_real(root, seed, SHOTS * (2 if row.twice else 1))),
        synthetic=fake, mix=SyntheticMix(settings.p_synthetic),
        augment=Augmentation() if row.augment else Augmentation(crop=None, flip=False),
        channels=1, steps_per_epoch=settings.train_steps, seed=seed,
    )  # fmt: skip
    model = Classifier(data.counts, channels=1, mixup=row.mixup, seed=seed)
    trainer = demo_trainer(settings.train_steps)
    trainer.fit(model, data)
    accuracy = trainer.test(model, tests, verbose=False)[0]["test/accuracy"]
    trainer.save_checkpoint(folder / "checkpoints" / f"{done.stem}.ckpt", weights_only=True)
    write_json(done, accuracy)
    return accuracy


def demo_trainer(steps: int) -> pl.Trainer:
    """Return a Lightning trainer that leaves the terminal to the demo's own bar."""
    silence_lightning()
    return pl.Trainer(
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip


def _of_shots(bank: LatentBank, seed: int) -> LatentBank:
    """Return the bank of the shots of a seed."""
    shots = {f"{number:03d}.png" for number in few_shots(seed, SHOTS)}
    return bank.subset(lambda image_id: Path(image_id).name in shots)


def _write_pixel_mixes(planner: Planner, source: Folder, per_class: int, out: Path) -> None:
    """Apply the plans that the centroids follow to the pixels."""
    for index in range(per_class * len(planner.images)):
        plan = planner(0, index)
        images = torch.stack([source.load(i, 1, 32) for i in plan.members]).flatten(1)
        mixed = mix(images[None], torch.tensor(plan.weights).float()[None])
        save_image(mixed.view(1, 32, 32), out / plan.class_name / f"{index:06d}.png")


def _write_sheet(root: Path, backbone: Backbone, bank: LatentBank) -> None:
    """Draw real images, their latents sampled back, and a centroid by each rule."""
    if (root / "sheet.png").exists():
        return
    bank = _of_shots(bank, 0)
    planner = Planner(bank.members, Mixing(alpha=math.inf))
    plans = [planner(0, label) for label in range(len(bank.classes))]
    source = Folder(root / "images")
    real = [source.load(plan.members[0], 1, 32) for plan in plans]
    latents = torch.stack([bank.latents(name)[0] for name in bank.classes])
    columns = {"real": real, "sampled back": sample(backbone, latents)}
    for rule in Progress(_SHEET_RULES, "sheet", delay=2, leave=False):
        columns[rule] = Synthesizer(backbone, bank, Rule.parse(rule), _SAMPLING).images(plans)
    rows = {
        name: [images[row] for images in columns.values()] for row, name in enumerate(bank.classes)
    }
    sheet(rows, list(columns)).save(root / "sheet.png")


def summarise(accuracies: dict[str, list[float]]) -> Iterator[JsonObject]:
    """Yield a record a row; gains are paired with the classical row, seed by seed."""
    room = statistics.mean(accuracies[TWICE]) - statistics.mean(accuracies[BASE])
    for row in ROWS:
        if row.name not in accuracies:
            continue
        values = accuracies[row.name]
        gains = [a - b for a, b in zip(values, accuracies[BASE], strict=True)]
        yield {
            "row": row.name,
            "accuracy": statistics.mean(values),
            "ci95": interval(values),
            "seeds": len(values),
            "shots": SHOTS * (2 if row.twice else 1),
            "gain": statistics.mean(gains),
            "gain_ci95": interval(gains),
            "share_of_twice": statistics.mean(gains) / room if room else None,
            "values": values,
        }


def _report(root: Path, records: list[JsonObject]) -> None:
    """Print the table and where everything is."""
    print(f"\n{SHOTS} labelled images a class, {records[0]['seeds']} seeds, ± 95 % (Student's t)\n")
    heads = ("row", 29), ("accuracy", 13), ("gain over classical", 19), ("of twice the shots", 18)
    print("| " + " | ".join(f"{name:{width}}" for name, width in heads) + " |")
    print("|" + "|".join("-" * (width + 2) for _, width in heads) + "|")
    for r in records:
        base = r["row"] in ("real only", BASE)
        gain = f"{100 * r['gain']:+.1f} ± {100 * r['gain_ci95']:.1f}" if r["row"] != BASE else ""
        share = f"{100 * r['share_of_twice']:.0f} %" if not base and r["share_of_twice"] else ""
        accuracy = f"{100 * r['accuracy']:.1f} ± {100 * r['ci95']:.1f} %"
        print(f"| {r['row']:29} | {accuracy:13} | {gain:19} | {share:18} |")
    print(f"""
pictures     {root}/sheet.png
bank         {root}/bank
synthetic    {root}/seed-0/synthetic
checkpoints  {root}/seed-0/checkpoints
table        {root}/results.json

The same on your own images, in folders DIR/class/*.png|jpg (the embedded backbone knows clothes,
grey, 32 × 32):

  latent-augment invert --images DIR --bank runs/mine/bank
  latent-augment synthesize --bank runs/mine/bank --out runs/mine/synthetic --per-class 100
  latent-augment train fit --data.train DIR --data.test TESTDIR --data.channels 1 \\
      --data.synthetic runs/mine/synthetic --trainer.max-steps 600""")
