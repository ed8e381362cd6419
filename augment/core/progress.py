"""Progress of long work: a bar on a terminal, and a plain line a minute elsewhere.

In a log file a bar is noise, and an hour of silence looks like a hang. So where standard error is
no terminal the command sets the environment variable `EVERY`. Then the bars of this package draw
nothing, and a thread prints a line that often, of all work that is under way. Work that takes less
says nothing.
"""

import os
import sys
import threading
import time
from typing import Any
from weakref import WeakValueDictionary

from tqdm import tqdm

EVERY = "LATENT_AUGMENT_PROGRESS"
"""The variable: seconds between two lines. Without it there are bars."""


class Progress(tqdm):
    """A bar of tqdm, or what the plain lines say of this work; arguments as for tqdm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.plain = EVERY in os.environ and not kwargs.get("disable")
        if self.plain:
            kwargs["disable"] = False  # whatever the environment says of bars
        super().__init__(*args, **kwargs)
        if self.plain:
            _bars[id(self)] = self
            if len(_bars) == 1:
                _ends.append(threading.Event())
                threading.Thread(target=_print_lines, args=(_ends[-1],), daemon=True).start()

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar."""
        if not self.plain:
            super().display(msg, pos)

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Remove the bar from the screen."""
        if not self.plain:
            super().clear(*args, **kwargs)

    def close(self) -> None:
        """Remove the bar, or leave its last state."""
        if self.plain:
            self.sp = None  # nothing was drawn
            _bars.pop(id(self), None)
            while _ends and not _bars:
                _ends.pop().set()
        super().close()

    def words(self) -> str:
        """Describe the work, such as ``invert: 512 of 3,000 images, 5 min, 24 min left``."""
        name, now, seconds = self.desc.removesuffix(": "), int(self.n), time.time() - self.start_t
        text = f"{name or 'progress'}: {now:,}" + (f" of {self.total:,.0f}" if self.total else "")
        text += f" {self.unit}s" if self.unit != "it" else ""
        text += f", {in_words(seconds)}"
        if self.total and now > self.initial:
            left = seconds * (self.total - now) / (now - self.initial)
            text += f", {in_words(max(left, 0))} left"
        return text + (f", {self.postfix}" if self.postfix else "")


# The work that is under way, outermost first. What an error ended is forgotten with its bar.
_bars: WeakValueDictionary[int, Progress] = WeakValueDictionary()
_ends: list[threading.Event] = []  # what ends the thread that prints the lines, if there is one


def _print_lines(ended: threading.Event) -> None:
    """Print a line now and then, as long as there is work."""
    while not ended.wait(float(os.environ.get(EVERY) or 60)):
        if text := "; ".join(bar.words() for bar in [*_bars.values()]):
            print(text, file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """Return a duration in one or two units.

    >>> in_words(59), in_words(600), in_words(3 * 3600 + 120), in_words(30 * 3600)
    ('59 s', '10 min', '3 h 2 min', '1 d 6 h')
    """
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
