"""One row of a benchmark: two ways to do one thing, timed in turn.

Times of a shared machine drift, so the two sides alternate, in changing order, in one process, and
the ratio is the median of the ratios of neighbours. A side that takes less than `TURN` is called
several times a turn, so that the clock's own cost does not count.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

TURN = 0.01
"""Seconds that a turn takes at least."""
ROUNDS = 3
"""Rounds that are timed however long they take."""

MEASURES: dict[str, Callable[[float, float], float]] = {
    "speed": lambda ours, theirs: theirs / ours,
    "time": lambda ours, theirs: ours / theirs,
    "extra": lambda ours, theirs: ours - theirs,
    "seconds": lambda ours, theirs: ours,
}
"""What a bar is about; of ``speed`` the bar is the least, of the others the most."""


@dataclass(frozen=True)
class Duel:
    """A paired comparison.

    Args:
        name: what is timed.
        ours: does it our way.
        theirs: does it as a user would without us.
        opponent: what ``theirs`` is.
        quality: says, after the timing, how good both results are.
        count: of units in a call.
        unit: what is counted, in the singular.
        bar: what is promised: a key of `MEASURES` and the limit; None where nothing is.
        theirs_count: of units in their call; as many as in ours by default.
        once: the side, ``ours`` or ``theirs``, that is too slow to be called more than once.
        threads: of this row; those of the run by default.
        clock: seconds; of the wall by default.
    """

    name: str
    ours: Callable[[], object]
    theirs: Callable[[], object]
    opponent: str
    quality: Callable[[], str]
    count: float = 1
    unit: str = "image"
    bar: tuple[str, float] | None = None
    theirs_count: float | None = None
    once: str = ""
    threads: int | None = None
    clock: Callable[[], float] = time.perf_counter


class Kept:
    """A side whose last result is kept, so that its quality costs no further call.

    Args:
        call: the side.
    """

    found: Any

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def __call__(self) -> None:
        """Do it."""
        self.found = self.call()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: list[float]) -> Spread:
    """Median and quartiles of one value or more."""
    marks = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    return Spread(*torch.tensor(values, dtype=torch.float64).quantile(marks).tolist())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def turn(duel: Duel, call: Callable[[], object], calls: int, device: str) -> float:
    """Seconds a call, of some in a row."""
    settle(device)
    start = duel.clock()
    for _ in range(calls):
        call()
    settle(device)
    return (duel.clock() - start) / calls


def settle(device: str) -> None:
    """Wait until a GPU has done all that it was asked for."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def calls_a_turn(duel: Duel, call: Callable[[], object], device: str) -> int:
    """Warm a side up; how many of its calls fill a turn."""
    taken = turn(duel, call, 1, device)
    if taken < 10 * TURN:  # the first call is slower than those after it
        taken = turn(duel, call, 1, device)
    return max(1, math.ceil(TURN / max(taken, 1e-6)))


def seconds(duel: Duel, args: argparse.Namespace) -> dict[str, list[float]]:
    """The seconds of a unit, side by side and round by round.

    At most ``args.repeats`` rounds; once there are `ROUNDS`, none begins after ``args.seconds``.
    A side that is called once has one value.
    """
    sides = {"ours": (duel.ours, duel.count)}
    sides["theirs"] = duel.theirs, duel.theirs_count or duel.count
    many = [who for who in sides if who != duel.once]
    calls = {who: calls_a_turn(duel, sides[who][0], args.device) for who in many}
    times: dict[str, list[float]] = {who: [] for who in sides}
    if duel.once:
        call, count = sides[duel.once]
        times[duel.once].append(turn(duel, call, 1, args.device) / count)
    begun = time.perf_counter()
    for number in range(args.repeats):
        if number >= ROUNDS and time.perf_counter() - begun > args.seconds:
            break
        for who in many if number % 2 else reversed(many):
            call, count = sides[who]
            times[who].append(turn(duel, call, calls[who], args.device) / count)
    return times


def fought(duel: Duel, args: argparse.Namespace) -> dict[str, Any]:
    """Time a row, and what is to be kept of it."""
    count = duel.threads or args.threads
    with threads(count):
        times = seconds(duel, args)
        quality = duel.quality()
    rounds = max(map(len, times.values()))
    mine, yours = (values * (rounds // len(values)) for values in times.values())
    row: dict[str, Any] = {"name": duel.name, "unit": duel.unit, "opponent": duel.opponent}
    for who, values in times.items():
        row[who] = {**asdict(spread(values)), "rounds": values}
    row["ratio"] = asdict(spread(list(map(MEASURES["speed"], mine, yours))))
    row |= {"quality": quality, "threads": count, "bar": None}
    if duel.bar:
        measure, limit = duel.bar
        found = spread(list(map(MEASURES[measure], mine, yours))).median
        held = found >= limit if measure == "speed" else found <= limit
        row["bar"] = {"measure": measure, "limit": limit, "found": found, "held": held}
    return row
