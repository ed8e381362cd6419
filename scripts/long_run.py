"""A training of days on one core, which stops at any time and goes on from where it was."""

import csv
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

SAVE_EVERY, LOG_EVERY = 600.0, 100  # seconds, steps
HEADER = "step,images,hours,core_hours,loss,images_per_s\n"


def half_precision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy a state in float16, but for whole numbers."""
    floats = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    return {k: v.contiguous() for k, v in floats.items()}


class LongRun:
    """What a checkpoint holds, the clocks, and the loop.

    A subclass defines `loss`, `update` and `write`. What a step draws has to be a function of its
    number, so that a run that was stopped is the run that was not.

    Args:
        folder: where ``last.pt`` and ``log.csv`` are.
        steps: how many in all.
        batch: images a step.
        parts: what has a ``state_dict``, by name.
    """

    def __init__(self, folder: Path, steps: int, batch: int, **parts: Any) -> None:
        self.folder, self.steps, self.batch, self.parts = folder, steps, batch, parts
        self.step, self.hours, self.core_hours = 0, 0.0, 0.0
        self.checkpoint = folder / "last.pt"
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self.hours, self.core_hours = (state["clocks"][k] for k in self.clocks)

    @property
    def clocks(self) -> dict[str, Any]:
        """The step, and hours by the wall and of the core."""
        return {"step": self.step, "hours": self.hours, "core_hours": self.core_hours}

    def loss(self) -> Tensor:
        """Draw the step's batch and measure the loss."""
        raise NotImplementedError

    def update(self, loss: Tensor) -> None:
        """Make a step of the optimiser."""
        raise NotImplementedError

    def write(self) -> None:
        """Write what others read, beside the checkpoint."""
        raise NotImplementedError

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save({**state, "clocks": self.clocks}, temporary)
        temporary.replace(self.checkpoint)
        self.write()

    def train(self) -> None:
        """Train to the last step, or until SIGTERM or SIGINT, which exits."""
        halted: list[int] = []

        def halt(number: int, _: FrameType | None) -> None:
            halted.append(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, halt)
        log = self.folder / "log.csv"
        lines = log.read_text().splitlines(keepends=True)[1:] if log.exists() else []
        known = [line for line in lines if int(line.split(",")[0]) <= self.step]
        log.write_text("".join([HEADER, *known]))
        saved = wall = time.monotonic()
        core, losses = time.process_time(), []
        with tqdm(total=self.steps, initial=self.step, mininterval=10, unit="step") as bar:
            while self.step < self.steps and not halted:
                loss = self.loss()
                self.update(loss)
                self.step += 1
                losses.append(loss.item())
                bar.update()
                now, busy = time.monotonic(), time.process_time()
                self.hours += (now - wall) / 3600
                self.core_hours += (busy - core) / 3600
                wall, core = now, busy
                if self.step % LOG_EVERY == 0:
                    self.log(log, losses, bar)
                    losses = []
                if now - saved > SAVE_EVERY:
                    self.save()
                    saved = now
        self.save()
        if halted:
            sys.exit(f"stopped at step {self.step}; the same command goes on")

    def log(self, path: Path, losses: list[float], bar: tqdm) -> None:
        """Add a line, and show loss and pace."""
        mean, pace = sum(losses) / len(losses), bar.format_dict["rate"] or 0.0
        hours = f"{self.hours:.4f}", f"{self.core_hours:.4f}"
        row = self.step, self.step * self.batch, *hours, f"{mean:.5f}", f"{pace * self.batch:.1f}"
        with path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{pace * self.batch:.0f}")
