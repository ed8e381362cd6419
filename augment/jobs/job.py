"""Jobs: long work in units, each finished if and only if its commit record exists.

A unit is a few hundred images: the chunks of a bank that are inverted together, or one shard. It
is a pure function of the job and its number, so any worker may do it, even twice; its files are
written whole, its commit record last. What is planned and not committed is left to do. So a job may
be killed at any moment, moved, and finished by other workers, which do not communicate. An executor
does the units:

``local``  in this process, or its share of them: unit i belongs to rank i mod world, under
           ``torchrun`` or in a Slurm array (`stripe`)
``ray``    by a pool of Ray actors (`augment.jobs.ray`)

To add one: a function (job, units) → the units as they are finished, and an entry in `EXECUTORS`.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from augment.core.errors import UserError, lookup
from augment.core.files import locked
from augment.core.progress import Progress
from augment.jobs.ray import ray_pool


@runtime_checkable
class Job(Protocol):
    """Work in units; picklable, since it may be sent to other machines.

    Attributes:
        path: folder that everything is written to; all workers must see it.
        title: of the progress bar.
    """

    path: Path
    title: str

    def plan(self) -> Sequence[int]:
        """Write the plan, unless it is there; return the number of images of each unit."""
        ...

    def committed(self, unit: int) -> int:
        """Return the bytes of a unit's files, its record among them; 0 if it is not finished."""
        ...

    def start(self) -> Callable[[int], None]:
        """Load what the work needs; return the function that does a unit and commits it."""
        ...

    def finish(self) -> None:
        """Finish when all units are committed; ranks may do this twice, or at the same time."""
        ...


Executor = Callable[[Job, Sequence[int]], Iterator[int]]


def local(job: Job, units: Sequence[int]) -> Iterator[int]:
    """Do the units in this process, one after the other."""
    work = job.start()
    for unit in units:
        work(unit)
        yield unit


EXECUTORS: dict[str, Executor] = {"local": local, "ray": ray_pool}
"""Executors by name."""


def stripe() -> tuple[int, int]:
    """Return (rank, world) of this process: of ``torchrun``, of a Slurm array, or (0, 1)."""
    env, slurm = os.environ, "SLURM_ARRAY_TASK_"
    try:
        if "WORLD_SIZE" in env:
            rank, world = int(env["RANK"]), int(env["WORLD_SIZE"])
        elif slurm + "COUNT" in env:
            first, step = int(env.get(slurm + "MIN", 0)), int(env.get(slurm + "STEP", 1))
            rank, world = (int(env[slurm + "ID"]) - first) // step, int(env[slurm + "COUNT"])
        else:
            return 0, 1
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            "expected RANK and WORLD_SIZE of torchrun, or SLURM_ARRAY_TASK_ID and _COUNT, got "
            f"{error} in the environment; set both or none"
        ) from None
    return rank, world


def planning_device(
    device: str | None, executor: str = "local", dry_run: bool = False
) -> str | None:
    """Return where this process loads the backbone of a job.

    That is a GPU of its own for a rank of ``torchrun``, and the CPU if other processes do the work.

    Args:
        device: the device that the user asked for, if any.
        executor: a key of `EXECUTORS`.
        dry_run: whether this process does a unit itself, to see how long it takes.
    """
    if executor != "local" and not dry_run:
        return "cpu"
    if device is None and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device


def run(job: Job, executor: str = "local", ranks: tuple[int, int] = (0, 1)) -> bool:
    """Do what is left of a job.

    Args:
        job: the work.
        executor: a key of `EXECUTORS`.
        ranks: (rank, world) of this process, which does the units of number rank modulo world.

    Returns:
        Whether all units, also those of other ranks, are committed.

    Raises:
        UserError: another run is at work in the job's folder, or a unit cannot be done.
    """
    execute, (rank, world) = lookup(EXECUTORS, executor, "executor"), ranks
    with locked(job.path, shared=world > 1) as lock:
        sizes = job.plan()
        lock.sweep()
        share = range(rank, len(sizes), world)
        todo = [unit for unit in share if not job.committed(unit)]
        total, left = (sum(sizes[unit] for unit in units) for units in (share, todo))
        title = job.title if world == 1 else f"{job.title}, rank {rank} of {world}"
        if todo:
            with Progress(
                total=total, initial=total - left, desc=title, unit="image", delay=2
            ) as bar:
                for unit in execute(job, todo):
                    bar.update(sizes[unit])
        checked = range(0) if todo else share  # a moment ago
        complete = all(job.committed(unit) for unit in range(len(sizes)) if unit not in checked)
        if complete:
            job.finish()
    if complete:
        with suppress(UserError), locked(job.path) as lock:  # unless others are still at work
            lock.sweep()
    return complete


def estimate(job: Job) -> str:
    """Do and commit the first unit that is left, and report what the others will take."""
    with locked(job.path):
        sizes = job.plan()
        todo = [unit for unit in range(len(sizes)) if not job.committed(unit)]
        left = sum(sizes[unit] for unit in todo)
        report = f"{len(sizes)} units, {sum(sizes)} images; {len(todo)} units, {left} images to do"
        if not todo:
            return report
        began = time.perf_counter()
        work = job.start()
        loaded = time.perf_counter()
        work(todo[0])
        seconds, size = time.perf_counter() - loaded, job.committed(todo[0])
        done = sizes[todo[0]]
        share = (left - done) / done
        return (
            f"{report}\nunit {todo[0]} is made and kept: {done} images in {seconds:.1f} s (and "
            f"{loaded - began:.1f} s to load), {size:,} bytes\nthe other {left - done} images will "
            f"take {share * seconds:,.0f} s on one such worker, and {share * size:,.0f} bytes"
        )
