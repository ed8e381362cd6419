"""What commands share: where work is done, what is told of it, options that need care."""

import csv
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from augment.core.errors import UserError
from augment.sources.source import warn_of_copies

Record = dict[str, Any]
"""What came of a command, for ``--json``."""


def work(job: Any, executor: str, dry_run: bool) -> Record | None:
    """Do a job, or this process's share of it; what to say if it is not all done now."""
    from augment.jobs.job import estimate, run, stripe

    if dry_run:
        told = estimate(job)
        print(told)
        return {"complete": False, "estimate": told.splitlines()}
    rank, world = stripe() if executor == "local" else (0, 1)
    complete = run(job, executor, (rank, world))
    if not complete and world == 1:
        raise UserError(
            f"expected all units of the job in {job.path}, got some that workers finished and that "
            "are not there; choose a folder that all machines share"
        )
    if complete:
        return None
    print(f"{job.path}: the share of rank {rank} of {world} is done; others are not yet")
    return {"complete": False, "rank": rank, "world": world}


def tell_of_bank(path: Path) -> Record:
    """What is in a bank, and what the bias of its latents would do."""
    from augment.bank.bank import LatentBank
    from augment.measure.health import findings

    bank = LatentBank.open(path)
    count = sum(map(len, bank.members.values()))
    print(f"{path}: {count} latents of {len(bank.classes)} classes")
    rejects = sum(chunk.rejected for chunks in bank.chunks.values() for chunk in chunks)
    if rejects:
        print(f"{rejects} images are left out: see {path / 'rejects.jsonl'}")
    digests = ((i, name, d) for name in bank.classes for i, d in bank.digests(name).items())
    warn_of_copies(digests, "inverted")
    worst = max(bank.classes, key=bank.largest_mean)
    health = bank.health(worst)
    print(f"\nclass {worst}, whose channel means are largest:")
    print("\n".join(map(str, findings([health], bank.inverted_by))))
    place, out = shlex.quote(str(path)), shlex.quote(str(path.with_name("synthetic")))
    print(f"\nnext: latent-augment synthesize {place} --out {out}")
    return {
        "complete": True, "bank": str(path), "latents": count, "classes": len(bank.classes),
        "rejects": rejects, "most_biased": worst, "bias": health.statistics.largest[0],
        "biased": health.statistics.biased,
    }  # fmt: skip


def recipe_of(bank: Any, backbone: str | None = None) -> dict[str, Any]:
    """What makes a bank's backbone again, or another one with its options."""
    from augment.diffusion import local_recipe

    recipe = bank.recipe
    if backbone:
        recipe = local_recipe({**bank.manifest.recipe, "name_or_path": backbone}, named=True)
    place = Path(recipe["name_or_path"])
    if place.is_absolute() and not place.exists():
        raise UserError(
            f"expected the backbone that made the bank at {place}, got nothing there; say where it "
            "is with --backbone"
        )
    return recipe


def listed(text: str, known: Callable[[str], bool]) -> list[str]:
    """Split a text at its commas, but for those of names that are known or in double quotes.

    >>> listed('red, big,cat,"a,b"', ["red, big", "cat", "a", "a,b"].__contains__)
    ['red, big', 'cat', 'a,b']
    """
    parts, found = next(csv.reader([text]), []), []
    while parts:
        sizes = range(len(parts), 0, -1)
        size = next((n for n in sizes if known(",".join(parts[:n]))), 0)
        found.append(",".join(parts[:size]) if size else parts[0].strip())
        parts = parts[size or 1 :]
    return found
