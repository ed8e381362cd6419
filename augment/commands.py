"""The sub-commands of ``latent-augment``.

A command is a function. Its options are its parameters or, if there are many, the fields of the
settings that it takes; their help is the Args of that docstring, and the lines of Examples are
printed below the help. It prints what it did and returns a record of it for ``--json``. To add one,
write it and name it in `COMMANDS`. Only what ``--help`` needs is imported here, heavy modules are
imported by the functions. The shell's side stands apart in `augment.cli`, which knows no command:
both in one file would be twice as long as any other.
"""

import csv
import json
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from augment.core.errors import NotAsExpected, UserError

if TYPE_CHECKING:  # the types of options, which jsonargparse imports when it shows or parses them
    import augment.bank.fill
    import augment.report.check
    import augment.shards.format
    import augment.synthesis.between
    from augment.bank.bank import LatentBank
    from augment.jobs.job import Job
    from augment.shards.write import ShardJob
    from augment.sources import Source
if TYPE_CHECKING is True:  # jsonargparse passes this by: training imports Lightning, for seconds
    import augment.training.adapt.settings
    import augment.training.episodes.evaluate
    import augment.training.smooth.settings

Record = dict[str, Any]
"""What a command did, as JSON."""


def invert(settings: "augment.bank.fill.InvertSettings") -> Record:
    """Invert labelled images into a bank of latents.

    Examples:
        latent-augment invert photos --bank mine/bank
        latent-augment invert photos --bank mine/bank --backbone sd15
        latent-augment invert photos --bank mine/bank --backbone sd15 --prompt 'a {name}, a bird'
        latent-augment invert photos --bank mine/bank --dry-run
    """
    from augment.bank.fill import InversionJob

    job = InversionJob.of(settings)
    if settings.backbone == "auto":
        assert job.backbone is not None
        name = job.backbone.recipe["name_or_path"]
        print(f"backbone: {name}, which is embedded; --backbone names another")
    if line := job.chosen():
        print(line)
    unfinished = work(job, settings.executor, settings.dry_run)
    return unfinished or summarize_bank(Path(settings.bank))


def synthesize(settings: "augment.shards.format.ShardSettings") -> Record:
    """Synthesize images from random centroids of a bank's latents, as webdataset shards.

    Examples:
        latent-augment synthesize mine/bank --out mine/synthetic --per-class 100
        latent-augment synthesize mine/bank --out mine/tail --fill-to 300 --members 8
        latent-augment synthesize mine/bank --out mine/clean --filters degenerate --candidates 4
    """
    from augment.shards.write import ShardJob

    job = ShardJob.of(settings)
    if line := job.chosen():
        print(line)
    return work(job, settings.executor, settings.dry_run) or summarize_shards(job)


def summarize_shards(job: "ShardJob") -> Record:
    """Print what was made, what was rejected, and how many images a centroid mixes."""
    tally = job.tally
    some = range(min(tally.wanted, 1000))
    plans = [job.planner(0, index, job.labels[index]) for index in some]
    count = fmean(plan.effective_count for plan in plans)
    members = fmean(len(plan.members) for plan in plans)
    print(
        f"{job.path}: {tally.written} of {tally.wanted} images of {len(job.planner.images)} "
        f"classes in {tally.shards} {'shard' if tally.shards == 1 else 'shards'}; "
        f"each mixes {count:.1f} of {round(members, 1):g} members on average (effective count)"
    )
    print("".join(line + "\n" for line in tally.refused_lines()), end="")
    grey = " --data.channels 1" if job.synthesizer.backbone.channels == 1 else ""
    print(
        f"next: latent-augment train fit --data.train {images_of(job.synthesizer.bank)} "
        f"--data.test TEST_IMAGES{grey} --data.synthetic {shlex.quote(str(job.path))} "
        "--trainer.max-epochs 20"
    )
    return {
        "complete": True, "shards": str(job.path), "written": tally.written,
        "wanted": tally.wanted, "effective_count": count, "refused": tally.refused,
        "lacking": job.lacking,
    }  # fmt: skip


def images_of(bank: "LatentBank") -> str:
    """Return the folder of a bank's images for a command, or IMAGES if the bank has a part."""
    source, known = Path(bank.manifest.source), sum(map(len, bank.members.values()))
    known += sum(len(chunk.rejects) for chunks in bank.chunks.values() for chunk in chunks)
    folders = [source / name for name in bank.classes]
    there = all(folder.is_dir() for folder in folders)
    if not there or sum(1 for folder in folders for _ in folder.iterdir()) > known:
        return "IMAGES"
    here = Path.cwd()
    return shlex.quote(str(source.relative_to(here) if source.is_relative_to(here) else source))


def train(args: list[str]) -> dict[str, float] | None:
    """Train a classifier with Lightning: train fit --config YAML; see train --help."""
    from augment.training.cli import main

    return main(args).measured


def sweep(
    recipe: str,
    out: str,
    seeds: int = 5,
    vary: dict[str, list[Any]] | None = None,
    given: dict[str, Any] | None = None,
) -> None:
    """Train and test with several seeds and values of settings; print means and 95 % intervals.

    The table has each combination's gain over the first one, paired by seed.

    Args:
        recipe: configuration of latent-augment train, a file or a name that comes with the
            package, in which everything that draws gets the run's seed: so FewShot draws other
            images.
        out: folder for the runs and the tables runs.csv and summary.csv; finished runs are not
            repeated, and an interrupted one is resumed.
        seeds: number of seeds: 0, 1, and so on.
        vary: values of settings to try, each with each, as YAML such as
            '{data.train.init_args.shots: [1, 2, 4]}'.
        given: settings that replace the configuration's, as YAML such as
            '{trainer.max_epochs: 10}'.
    """
    from augment.training.sweep import sweep

    sweep(recipe, out, seeds, vary, given)


def episodes(settings: "augment.training.episodes.evaluate.EpisodeSettings") -> None:
    """Evaluate N-way K-shot episodes, with and without synthetic images of their supports."""
    from augment.training.episodes.evaluate import run_episodes

    run_episodes(settings)


def adapt(settings: "augment.training.adapt.settings.AdaptSettings") -> Record:
    """Fit a backbone to the classes of images, by low-rank weights and tokens.

    Examples:
        latent-augment adapt photos --out runs/adapted
        latent-augment adapt photos --out runs/adapted --backbone sd15 --preset datadream
    """
    from augment.training.adapt.run import adapt_backbone

    place = adapt_backbone(settings)
    options = {**(settings.backbone_options or {}), "adapter": str(place)}
    words = ["--backbone", settings.model, "--backbone-options"]
    advice = shlex.join([*words, json.dumps(options, ensure_ascii=False)])
    print(f"{place}: adapted; use it with latent-augment invert IMAGES --bank BANK {advice}")
    return {"written": str(place), "options": advice}


def smooth(settings: "augment.training.smooth.settings.SmoothSettings") -> Record:
    """Train a backbone so that equal steps of noise are equal steps of image (Smooth Diffusion).

    Examples:
        latent-augment smooth --config smooth_tiny
    """
    from augment.training.smooth.run import smooth_backbone

    place = smooth_backbone(settings)
    option, value = "--backbone", str(place)
    if settings.rank:
        option, value = "--backbone-options", json.dumps({"lora": value}, ensure_ascii=False)
    advice = f"{option} {shlex.quote(value)}"
    print(f"{place}: written; load it with {advice}")
    return {"written": str(place), "options": advice}


def demo(out: str | None = None, full: bool = False, seeds: int | None = None) -> None:
    """Do the whole job on embedded images: 5 labelled images a class to a better classifier.

    Args:
        out: folder for everything the demo makes, by default runs/demo or, with --full,
            runs/demo-full; an interrupted demo is resumed.
        full: run every row of the table with more seeds, which takes longer.
        seeds: number of seeds; by default 3, or 5 with --full.

    Examples:
        latent-augment demo
        latent-augment demo --full
    """
    if seeds is not None and seeds < 2:
        raise UserError(f"expected at least 2 seeds for an interval, got {seeds}; give more")
    words = "5 labelled images a class to a better classifier, in minutes"
    print(f"{words}; loading torch and Lightning", flush=True)
    from augment.training.demo import run_demo

    run_demo(out, full, seeds)


def evaluate(
    path: str,
    real: "Source | str | None" = None,
    network: str | None = None,
    weights: str = "",
    channels: int | None = None,
    resolution: int | None = None,
    bootstrap: int = 100,
    backbone: str | None = None,
    out: str | None = None,
    device: str | None = None,
) -> Record:
    """Measure the health of a bank, or the quality of synthetic images.

    Args:
        path: folder of a bank, whose latents are compared with white noise; or folder of shards or
            of images by class, which are compared with real ones.
        real: real images to compare synthetic ones with, a folder or another source as for invert;
            of a bank, the images that it was made of, to sample 16 a class back.
        network: network whose features are compared: fashion (embedded: grey clothes), clip,
            inception (that of torch-fidelity), or one of timm such as resnet50; by default that of
            the checkpoint.
        weights: weights of the network: a .safetensors file, a state dict, or a checkpoint of
            latent-augment train; by default those published with the network.
        channels: channels of the images, 1 or 3; by default those of the first synthetic image.
        resolution: side that images are resized to, in pixels; by default that of the first
            synthetic image.
        bootstrap: number of resamples for the intervals of FID and KID; 0 leaves the intervals
            out.
        backbone: diffusion model of a bank, if it is not where it was.
        out: folder to write evaluation.json, classes.csv and a plot to.
        device: device such as cuda or cpu; by default the GPU if there is one.

    Examples:
        latent-augment evaluate mine/bank --real photos
        latent-augment evaluate mine/synthetic --real photos --network resnet50 --out mine/good
    """
    from augment.bank.bank import LatentBank
    from augment.diffusion import find_device, load_backbone
    from augment.networks import feature_network
    from augment.report import evaluate as study
    from augment.shards.dataset import open_images
    from augment.sources import as_source

    source = None if real is None else as_source(real)
    if out and source is not None:
        source.keep_out(Path(out))
    if (Path(path) / "manifest.json").exists():
        bank = LatentBank.open(path)
        made_by = bank.recipe_with(backbone)
        model = None if source is None else load_backbone(**made_by, device=device)
        found = study.evaluate_bank(bank, model, source)
    elif source is None:
        raise UserError(
            f"expected --real, the reference images to compare those of {path} with, got none; "
            "pass a folder of real images (only a bank needs none)"
        )
    elif not (network or weights):
        raise UserError(
            "expected --network, whose features are compared, or --weights of one, got neither; "
            "pass --network lite0 or resnet50 for photographs, fashion for grey clothes"
        )
    else:
        fake = open_images(path)
        first = study.form_of(fake)
        judge = feature_network(network or "", weights, find_device(device))
        form = (channels or first[0], resolution or first[1])
        found = study.evaluate_images(fake, source, judge, form, bootstrap)
    print(found)
    if out:
        found.write(out)
        print(f"\n{out}: evaluation.json, classes.csv, evaluation.png")
    return found.record()


def report(
    bank: str,
    shards: str | None = None,
    out: str = "report.html",
    rules: str = "lin/0,fix/0,fix/chm,fade/chm",
    classes: int = 50,
    images: "Source | str | None" = None,
    pool: str | None = None,
    backbone: str | None = None,
    network: str | None = None,
    device: str | None = None,
) -> Record:
    """Write an HTML report of a bank: its classes, its health, and what each rule makes of it.

    Args:
        bank: folder of the bank.
        shards: folder of synthetic images made with the bank, finished or not.
        out: HTML file to write, which needs no other file and no network.
        rules: rules whose centroids are compared, separated by commas; '' makes no images, and so
            needs no backbone.
        classes: number of classes to make images of, from the most biased to the least.
        images: real images of the bank, a folder or another source as for invert; by default they
            are looked for where the bank was made.
        pool: file of a replay pool, to report its throughput and reuse.
        backbone: diffusion model; by default the one that made the bank.
        network: network whose features say how diverse the synthetic images of each class are, and
            how far from the real ones, such as fashion, lite0 or resnet50; by default none.
        device: device such as cuda or cpu; by default the GPU if there is one.

    Examples:
        latent-augment report mine/bank --shards mine/synthetic --out report.html
        latent-augment report mine/bank --shards mine/synthetic --network lite0
    """
    options = {key: value for key, value in locals().items() if key != "device"}
    from augment.bank.bank import LatentBank
    from augment.centroid import Rule
    from augment.diffusion import find_device, load_backbone
    from augment.networks import feature_network
    from augment.report import write_report
    from augment.report.provenance import command

    opened, names = LatentBank.open(bank), [name for name in rules.split(",") if name]
    for name in names:
        Rule.parse(name)  # what can be refused is refused before gigabytes are loaded
    model = load_backbone(**opened.recipe_with(backbone), device=device) if names else None
    judge = feature_network(network, "", find_device(device)) if network else None
    place = images if images is None or isinstance(images, str) else str(images.root)
    typed = command("report", options | {"images": place})
    write_report(opened, out, shards, model, names, classes, images, pool, typed, judge)
    print(f"{out}: written; open it in a browser")
    return {"report": out}


def check(settings: "augment.report.check.CheckSettings") -> Record:
    """Check that a model works here as it should, and how fast; three pictures are included.

    Examples:
        latent-augment check
        latent-augment check --backbone sd15 --out centroids.png
    """
    from augment.report.check import run_check

    record = run_check(settings, lambda line: print(line, flush=True))
    if not record["as_expected"]:
        raise NotAsExpected(
            f"expected every line of {settings.backbone} as expected, got others; each says why, "
            "and docs/backbones.md what to look at",
            record,
        )
    return record


def inspect(path: str) -> Record:
    """Describe what a bank or a folder of shards holds.

    Args:
        path: folder of a bank or of shards.

    Examples:
        latent-augment inspect mine/bank
    """
    from augment.shards.verify import inspect

    text = inspect(path)
    print(text)
    return {"path": path, "lines": text.splitlines()}


def verify(
    path: str,
    images: "Source | str | None" = None,
    discard: bool = False,
    repair: bool = False,
) -> Record:
    """Compare every file of a bank or of shards with what was recorded when it was written.

    Args:
        path: folder of a bank or of shards.
        images: real images of a bank, to be compared too: a folder, or a source as for invert.
        discard: delete damaged files; the command that wrote them makes them again.
        repair: write a lost or damaged manifest.json or synthesis.json again from the records.

    Examples:
        latent-augment verify mine/synthetic
        latent-augment verify mine/synthetic --discard
    """
    from augment.bank import verify as bank_verify
    from augment.core.files import locked
    from augment.shards import verify as shards_verify

    with locked(Path(path)) if discard or repair else nullcontext():  # not beside a job
        if repair:
            print(shards_verify.repair(Path(path)))
        findings = shards_verify.verify(path, images)
        for finding in findings:
            print(finding.what)
        if discard:
            bank_verify.discard(findings)
    if findings:
        damaged = sum(finding.record is not None for finding in findings)
        advice = "; take it out with --discard" if damaged else ""
        if discard:
            advice = ", taken out; run the command that made it again"
        raise NotAsExpected(
            f"expected {path} as it was written, got {len(findings)} findings, {damaged} of them "
            f"damage that can be made again{advice}",
            {"path": path, "findings": len(findings), "what": [f.what for f in findings]},
        )
    print(f"{path}: every file is as it was written")
    return {"path": path, "findings": 0}


def merge(banks: str, out: str) -> Record:
    """Make one bank of several that were made with the same settings.

    Args:
        banks: folders of the banks, separated by commas.
        out: folder of the new bank.

    Examples:
        latent-augment merge --banks one/bank,other/bank --out both/bank
    """
    from augment.bank.merge import merge

    folders = split_names(banks, lambda place: Path(place).exists())
    return summarize_bank(merge(folders, out).path)


def split(bank: str, classes: str, out: str) -> Record:
    """Make a bank of some classes of another bank.

    Args:
        bank: folder of the bank.
        classes: names of classes, separated by commas, in the order of the new labels; a name may
            contain a comma.
        out: folder of the new bank.

    Examples:
        latent-augment split mine/bank --classes ant,bee --out some/bank
    """
    from augment.bank.bank import LatentBank
    from augment.bank.merge import split
    from augment.sources.prompts import nfc

    known = {nfc(name): name for name in LatentBank.open(bank).classes}
    names = [known.get(name, name) for name in split_names(nfc(classes), known.__contains__)]
    return summarize_bank(split(bank, names, out).path)


def export(
    shards: str,
    out: str,
    parquet: bool | None = None,
    model_licence: str | None = None,
    images_licence: str | None = None,
    push: str | None = None,
) -> Record:
    """Write the images of shards as a folder by class or as parquet, with a card; or publish them.

    Args:
        shards: folder of the shards.
        out: new folder for the images, out/CLASS/00000000.jpg and so on, metadata.jsonl and
            README.md.
        parquet: write out/data/*.parquet in place of image files; by default only if more than
            10,000 images are pushed.
        model_licence: licence of the diffusion model, such as openrail++; by default that of the
            shards, if known.
        images_licence: licence of the real images, such as mit or cc-by-4.0.
        push: dataset of the Hugging Face hub to upload to, owner/name; if new it is private.

    Examples:
        latent-augment export mine/synthetic --out mine/folder
        latent-augment export mine/synthetic --out mine/folder --images-licence mit --push me/mine
    """
    from augment.shards.dataset import open_shards
    from augment.shards.export import export_folder
    from augment.shards.publish import MAX_FILES, check_name, push_folder

    if push:
        check_name(push)
    if parquet is None:
        parquet = push is not None and len(open_shards(shards)) > MAX_FILES
    export_folder(shards, out, parquet, model_licence, images_licence, push)
    if not push:
        print(f"{out}: written")
        return {"folder": out}
    url = push_folder(out, push)
    print(f"{out}: written and uploaded to {url}, private if it is new")
    return {"folder": out, "dataset": url}


def walk(settings: "augment.synthesis.between.WalkSettings") -> Record:
    """Walk from one image to another through their latents, and write the images on the way.

    Examples:
        latent-augment walk cat.jpg --to dog.jpg --prompt 'a photo of a pet' --backbone sd15
        latent-augment walk boot.png --to bag.png --inversion fireflow
        latent-augment walk boot.png --to bag.png --inversion noise --level 0 --path lerp
    """
    from augment.synthesis.between import write_walk

    count, psnr = write_walk(settings)
    first, last = psnr.tolist()
    print(
        f"{settings.out}: {count} images and walk.png; the ends are {first:.1f} and {last:.1f} dB "
        "(PSNR) from the given images"
    )
    return {"folder": settings.out, "images": count, "psnr": [first, last]}


def explore(
    bank: str,
    out: str | None = None,
    images: "Source | str | None" = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    backbone: str | None = None,
    device: str | None = None,
) -> None:
    """Serve a page to mix a bank's latents by hand, compare rules, and walk between images.

    Args:
        bank: folder of the bank.
        out: folder that images chosen on the page are exported to: PNG files by class, and their
            plans in metadata.jsonl.
        images: real images of the bank, a folder or another source as for invert; by default they
            are looked for where the bank was made.
        host: address to serve at; by default only this machine can open the page.
        port: port to serve at.
        backbone: diffusion model; by default the one that made the bank.
        device: device such as cuda or cpu; by default the GPU if there is one.

    Examples:
        latent-augment explore mine/bank
    """
    from augment.bank.bank import LatentBank
    from augment.diffusion import load_backbone
    from augment.explore.server import require, serve
    from augment.explore.session import Explorer
    from augment.sources import place_of

    require()  # before gigabytes are loaded
    opened = LatentBank.open(bank)
    recipe: Record = opened.recipe_with(backbone) | ({"device": device} if device else {})
    folder = None if out is None else Path(out)
    explorer = Explorer(opened, load_backbone(**recipe), recipe, place_of(images), folder)
    page = serve(explorer, host, port)
    print(f"http://{host}:{port}: the explorer of {bank}; Ctrl-C ends it", flush=True)
    page.block_thread()


COMMANDS: dict[str, Callable[..., Any]] = {
    command.__name__: command
    for command in (
        *(invert, synthesize, train, sweep, episodes, adapt, smooth, demo, evaluate, report),
        *(check, inspect, verify, merge, split, export, walk, explore),
    )
}
"""The commands by name, in the order of ``latent-augment --help``."""


def work(job: "Job", executor: str, dry_run: bool) -> Record | None:
    """Do a job or this process's share of it; return a record if it is not finished."""
    from augment.jobs.job import estimate, run, stripe

    if dry_run:
        text = estimate(job)
        print(text)
        return {"complete": False, "estimate": text.splitlines()}
    rank, world = stripe() if executor == "local" else (0, 1)
    if run(job, executor, (rank, world)):
        return None
    if world == 1:
        raise UserError(
            f"expected all units of the job in {job.path}, got some that workers finished and that "
            "are not there; choose a folder that all machines share"
        )
    print(f"{job.path}: the share of rank {rank} of {world} is done; others are not yet")
    return {"complete": False, "rank": rank, "world": world}


def split_names(text: str, known: Callable[[str], bool]) -> list[str]:
    """Split a text at its commas, except in names that are known or in double quotes.

    >>> split_names('red, big,cat,"a,b"', ["red, big", "cat", "a", "a,b"].__contains__)
    ['red, big', 'cat', 'a,b']
    """
    parts, names = next(csv.reader([text]), []), []
    while parts:
        sizes = range(len(parts), 0, -1)
        size = next((n for n in sizes if known(",".join(parts[:n]))), 0)
        names.append(",".join(parts[:size]) if size else parts[0].strip())
        parts = parts[size or 1 :]
    return names


def summarize_bank(path: Path) -> Record:
    """Print what a bank holds, and what the bias of its latents would do to a mixture."""
    from augment.bank.bank import LatentBank
    from augment.measure.health import findings
    from augment.sources.source import warn_of_copies

    bank = LatentBank.open(path)
    count = sum(map(len, bank.members.values()))
    print(f"{path}: {count} latents of {len(bank.classes)} classes")
    rejects = sum(len(chunk.rejects) for chunks in bank.chunks.values() for chunk in chunks)
    if rejects:
        print(f"{rejects} images are left out: see {path / 'rejects.jsonl'}")
    digests = ((i, name, d) for name in bank.classes for i, d in bank.digests(name).items())
    warn_of_copies(digests, "inverted")
    print("".join(f"{finding}\n" for finding in bank.verdict()), end="")
    worst = max(bank.classes, key=bank.largest_mean)
    health = bank.health(worst)
    print(f"\nclass {worst}, whose channel means are largest:")
    print(*findings([health], bank.inverted_by, bank.holds_noise), sep="\n")
    place, out = shlex.quote(str(path)), shlex.quote(str(path.with_name("synthetic")))
    print(f"\nnext: latent-augment synthesize {place} --out {out}")
    return {
        "complete": True, "bank": str(path), "latents": count, "classes": len(bank.classes),
        "rejects": rejects, "most_biased": worst,
        "bias": health.statistics.largest[0], "biased": health.statistics.biased,
    }  # fmt: skip
