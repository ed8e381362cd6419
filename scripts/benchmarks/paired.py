"""One row of a benchmark: two ways to do one thing, timed in turn.

Times of a shared machine drift, so the two sides alternate, in changing order, in one process, and
the ratio is the median of the ratios of neighbouring turns. A side that takes less than `TURN` is
called several times a turn, so that the cost of the clock itself does not count.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from augment.report.check.speed import synchronize

TURN = 0.01
"""Minimum length of a turn, seconds."""
ROUNDS = 3
"""Rounds that are timed however long they take."""

MEASURES: dict[str, Callable[[float, float], float]] = {
    "speed": lambda ours, theirs: theirs / ours,
    "time": lambda ours, theirs: ours / theirs,
    "extra": lambda ours, theirs: ours - theirs,
    "seconds": lambda ours, theirs: ours,
}
"""What a bar limits; it is a lower limit for ``speed``, an upper one for the others."""


@dataclass(frozen=True)
class Comparison:
    """A paired comparison of two callables.

    Args:
        name: what is timed.
        ours: does it with this package.
        theirs: does it as a user would without this package.
        baseline: name of what ``theirs`` runs.
        quality: called after the timing; describes how good both results are.
        count: units of work in a call.
        unit: name of a unit, in the singular.
        bar: a key of `MEASURES` and the promised limit; None promises nothing.
        theirs_count: units in a call of ``theirs``; None is ``count``.
        once: the side, ``ours`` or ``theirs``, that is too slow to be called more than once; or
            ``both``.
        threads: torch threads; None is the run's number.
        clock: seconds; wall time by default.
    """

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    baseline: str
    quality: Callable[[], str]
    count: float = 1
    unit: str = "image"
    bar: tuple[str, float] | None = None
    theirs_count: float | None = None
    once: str = ""
    threads: int | None = None
    clock: Callable[[], float] = time.perf_counter


class Keep:
    """A side that keeps its last result, so that measuring its quality costs no further call."""

    result: Any

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def __call__(self) -> None:
        """Call the side and keep what it returns."""
        self.result = self.call()


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    marks = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(marks).tolist()
    return dict(zip(("median", "low", "high"), found, strict=True))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set torch's number of threads, and restore it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def turn(pair: Comparison, call: Callable[[], object], calls: int, device: str) -> float:
    """Return the mean seconds of some calls in a row."""
    synchronize(device)
    start = pair.clock()
    for _ in range(calls):
        call()
    synchronize(device)
    return (pair.clock() - start) / calls


def calls_a_turn(pair: Comparison, call: Callable[[], object], device: str) -> int:
    """Warm a side up; return how many of its calls fill a turn."""
    taken = turn(pair, call, 1, device)
    if taken < 10 * TURN:  # the first call is slower than those after it
        taken = turn(pair, call, 1, device)
    return max(1, math.ceil(TURN / max(taken, 1e-6)))


def seconds(pair: Comparison, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of a unit, by side and round.

    At most ``args.repeats`` rounds; after `ROUNDS`, none begins later than ``args.seconds``. A side
    that is called once has one value.
    """
    sides = {"ours": (pair.ours, pair.count)}
    sides["theirs"] = pair.theirs, pair.theirs_count or pair.count
    many = [who for who in sides if pair.once not in (who, "both")]
    calls = {who: calls_a_turn(pair, sides[who][0], args.device) for who in many}
    times: dict[str, list[float]] = {who: [] for who in sides}
    for who in (who for who in sides if who not in many):
        call, count = sides[who]
        times[who].append(turn(pair, call, 1, args.device) / count)
    begun = time.perf_counter()
    for number in range(args.repeats if many else 0):
        if number >= ROUNDS and time.perf_counter() - begun > args.seconds:
            break
        for who in many if number % 2 else reversed(many):
            call, count = sides[who]
            times[who].append(turn(pair, call, calls[who], args.device) / count)
    return times


def timed(pair: Comparison, args: argparse.Namespace) -> dict[str, Any]:
    """Time a row; return its record."""
    count = pair.threads or args.threads
    with threads(count):
        times = seconds(pair, args)
        quality = pair.quality()
    rounds = max(map(len, times.values()))
    ours, theirs = (values * (rounds // len(values)) for values in times.values())
    row: dict[str, Any] = {"name": pair.name, "unit": pair.unit, "baseline": pair.baseline}
    for who, values in times.items():
        row[who] = {**spread(values), "rounds": values}
    row["ratio"] = spread(list(map(MEASURES["speed"], ours, theirs)))
    row |= {"quality": quality, "threads": count, "bar": None}
    if pair.bar:
        measure, limit = pair.bar
        found = spread(list(map(MEASURES[measure], ours, theirs)))["median"]
        held = found >= limit if measure == "speed" else found <= limit
        row["bar"] = {"measure": measure, "limit": limit, "found": found, "held": held}
    return row
