"""Do the units of a job on a Ray cluster: a pool of actors, any of which may die at any time.

The driver assigns the units; commit records alone say what is done. An actor loads the job once and
does one unit at a time; a unit whose actor, worker or node died goes to another one. If the driver
is killed its actors die, and the same command resumes the job.

All nodes need the same environment, with this package and the job's class installed, and a file
system in common that holds the job's folder under the same path.
"""

import logging
import os
import socket
import textwrap
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from augment.core.errors import AugmentWarning, UserError

MAX_DEATHS = 3
"""Actors that may die of a unit before the job fails."""

PACKAGES = Path(__file__).parents[2]
"""The folder that this package is imported from."""

POLL_S = 5.0
"""Seconds after which the driver looks for new nodes if no unit was finished."""


class Worker:
    """A process of the pool, with a GPU or a CPU of its own."""

    def __init__(self, folder: str, threads: int | None) -> None:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)  # the driver's; a worker would wait for its peers
        with suppress(OSError):
            os.chdir(folder)  # the driver's, if it exists, since paths may be relative
        if threads:
            torch.set_num_threads(threads)

    def start(self, job: Any) -> None:
        """Load what the job needs."""
        if not job.path.is_dir():
            raise UserError(
                f"expected {job.path} on every node, got none on {socket.gethostname()}; choose a "
                "folder of a file system that all nodes share, and give its absolute path"
            )
        self.work = job.start()

    def do(self, unit: int) -> None:
        """Do a unit and commit it."""
        self.work(unit)


@contextmanager
def _connected() -> Iterator[Any]:
    """Connect to the caller's Ray cluster, the one at ``RAY_ADDRESS``, or a new one here."""
    try:
        import ray
    except ImportError:
        raise UserError(
            "expected the package ray for the executor ray, got none; "
            "run pip install 'latent-augment[ray]'"
        ) from None
    ours = not ray.is_initialized()
    if ours:
        address = os.environ.get("RAY_ADDRESS") or "local"
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            with chdir(PACKAGES):  # Ray puts the current folder on its workers' path
                ray.init(
                    address=address,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
        except ConnectionError as error:
            raise UserError(
                f"expected a Ray cluster at {address}, got {error}; start it with ray start, or "
                "unset RAY_ADDRESS to use this machine alone"
            ) from None
    try:
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _death_of(call: Any) -> Exception | None:
    """Return what a worker died of at a finished call, or None; raise what its code raised."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        ray.get(call)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        return error
    return None


def handle_worker_death(death: Exception, unit: int | None, times: int, limit: int) -> None:
    """Warn that a worker died; raise once the limit is reached."""
    task = "loading the job" if unit is None else f"unit {unit}"
    cause = textwrap.shorten(str(death).strip().rpartition("\n")[2], 160)
    if times >= limit:
        raise UserError(
            f"expected {task} to be done by a worker, got {times} dead in turn: {cause}; see Ray's "
            "logs, and run the same command again: nothing that was finished is lost"
        ) from death
    warnings.warn(
        AugmentWarning(f"a worker died at {task}, another takes over: {cause}"), stacklevel=3
    )


def ray_pool(job: Any, units: Sequence[int]) -> Iterator[int]:
    """Do the units on a pool of Ray actors; an executor of `augment.jobs.job`.

    There is an actor for each GPU of the cluster, or for each CPU if it has no GPU when the job
    begins, and more as nodes join; without any it waits. Actors print to Ray's logs.

    Args:
        job: an `augment.jobs.job.Job`.
        units: to do, in this order.

    Raises:
        UserError: Ray is missing, a unit cannot be done, or workers die again and again.
        Exception: whatever a unit raised, as it is.
    """
    with _connected() as ray:
        kind = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
        need = {"num_gpus": 1, "num_cpus": 0} if kind == "GPU" else {"num_cpus": 1}
        create_actor = ray.remote(max_restarts=0, max_task_retries=0, **need)(Worker).remote
        shared, left, deaths = ray.put(job), deque(units), Counter[int | None]()
        # the call of each worker, with its unit, or None while it loads the job: one that waits for
        # a node which is gone holds no unit
        busy: dict[Any, tuple[Any, int | None]] = {}
        try:
            while (doing := sum(unit is not None for _, unit in busy.values())) or left:
                size = max(1, int(ray.cluster_resources().get(kind, 0)))
                for _ in range(min(size, doing + len(left)) - len(busy)):
                    worker = create_actor(str(Path.cwd()), 1 if kind == "CPU" else None)
                    busy[worker.start.remote(shared)] = worker, None
                for call in ray.wait(list(busy), timeout=POLL_S)[0]:
                    worker, unit = busy[call]
                    death = _death_of(call)
                    del busy[call]
                    if death or not left:
                        ray.kill(worker)
                    else:
                        task = left.popleft()
                        busy[worker.do.remote(task)] = worker, task
                    if death and (unit is None or not job.committed(unit)):
                        deaths[unit] += 1
                        limit = MAX_DEATHS * (size if unit is None else 1)
                        handle_worker_death(death, unit, deaths[unit], limit)
                        left.extend([] if unit is None else [unit])
                    elif unit is None:
                        deaths[unit] = 0
                    else:
                        yield unit
        finally:
            for worker, _ in busy.values():
                ray.kill(worker)
