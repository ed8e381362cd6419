"""Trainings of days on one core that can be stopped at any time and resume."""

import argparse
import copy
import csv
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

SAVE_EVERY, LOG_EVERY = 600.0, 100  # seconds, steps
HEADER = "step,images,hours,core_hours,loss,images_per_s\n"


def options(doc: str, **defaults: object) -> argparse.ArgumentParser:
    """Return a parser with an option for each default; the seed is 0."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, value in {**defaults, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    return parser


def half_precision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy a state in float16, except for whole numbers."""
    floats = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    return {k: v.contiguous() for k, v in floats.items()}


class LongRun:
    """The checkpoint, the clocks and the loop.

    A subclass defines `loss`, `update` and `write`. What a step draws must be a function of its
    number, so that a stopped run ends with the same weights as one that was not stopped.

    Args:
        folder: where ``last.pt`` and ``log.csv`` are.
        steps: number in all.
        batch: images a step.
        parts: objects with a ``state_dict``, by name.
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
        """Return the step, wall hours and CPU hours."""
        return {"step": self.step, "hours": self.hours, "core_hours": self.core_hours}

    def loss(self) -> Tensor:
        """Draw the step's batch and measure the loss."""
        raise NotImplementedError

    def update(self, loss: Tensor) -> None:
        """Make a step of the optimiser."""
        raise NotImplementedError

    def write(self) -> None:
        """Write the result beside the checkpoint."""
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
        done = [line for line in lines if int(line.split(",")[0]) <= self.step]
        log.write_text("".join([HEADER, *done]))
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
            sys.exit(f"stopped at step {self.step}; the same command resumes")

    def log(self, path: Path, losses: list[float], bar: tqdm) -> None:
        """Add a line to the log, and show loss and pace."""
        mean, pace = sum(losses) / len(losses), bar.format_dict["rate"] or 0.0
        hours = f"{self.hours:.4f}", f"{self.core_hours:.4f}"
        row = self.step, self.step * self.batch, *hours, f"{mean:.5f}", f"{pace * self.batch:.1f}"
        with path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{pace * self.batch:.0f}")


class DenoiserRun(LongRun):
    """A training of a denoising network, with a running average of its weights.

    A subclass defines `loss`, `write`, `rate` and `decay`.
    """

    def __init__(self, args: argparse.Namespace, network: nn.Module) -> None:
        self.args, self.network = args, network
        self.average = copy.deepcopy(network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True
        )
        parts = {"network": network, "average": self.average, "optimizer": self.optimizer}
        super().__init__(args.run, args.steps, args.batch, **parts)

    def rate(self) -> float:
        """Return the learning rate of the step."""
        raise NotImplementedError

    def decay(self) -> float:
        """Return the weight of the old average in the new one."""
        raise NotImplementedError

    def update(self, loss: Tensor) -> None:
        """Make one step of the optimiser, and one of the running average."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = self.rate()
        self.optimizer.step()
        with torch.no_grad():
            pairs = [list(net.parameters()) for net in (self.average, self.network)]
            torch._foreach_lerp_(*pairs, 1 - self.decay())
