"""Run a command and write what its main thread did: ``python sampled.py OUT COMMAND …``.

A thread looks a thousand times a second at the stack of the main thread, and adds up its CPU time
by what it is doing; see `place`.
"""

import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType

PERIOD = 0.001
"""Seconds between looks."""
MODEL = (
    *("torch/nn/", "torch/autograd/", "torch/optim/", "torch/_tensor.py"),
    *("diffusers/models/", "diffusers/schedulers/", "transformers/models/"),
    *("augment/diffusion/solver.py", "augment/diffusion/process.py"),
)
"""Files of networks, gradients, solvers and codecs."""
LOADING = ("torchvision/transforms/", "torch/utils/data/")
"""Files that prepare images, by modules of `MODEL` too."""


def place(frame: FrameType | None) -> str:
    """Return what a thread is doing by its stack: imports, model, or a function."""
    own, foreign, model, loading = "", "", False, False
    while frame is not None:  # from the innermost call outwards
        path = frame.f_code.co_filename
        if path.startswith("<frozen importlib"):
            return "imports"
        _, installed, short = path.rpartition("site-packages/")
        model |= any(part in path for part in MODEL)
        loading |= any(part in path for part in LOADING)
        if installed and not own:
            foreign = short.partition("/")[0]
        elif not own and ("/augment/" in path or "/training/" in path):
            own = f"{Path(path).stem}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    if model and not loading:
        return "model"
    return " → ".join(part for part in (own, foreign) if part) or "start"


def sampled(arguments: list[str], out: str) -> None:
    """Run a command, and write the CPU seconds of its main thread by `place`."""
    found: Counter[str] = Counter()
    main, ended = threading.main_thread().ident or 0, threading.Event()
    clock = time.pthread_getcpuclockid(main)

    def look() -> None:
        last = time.clock_gettime(clock)
        while not ended.wait(PERIOD):
            now, frame = time.clock_gettime(clock), sys._current_frames().get(main)
            found[place(frame)] += now - last
            last = now

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    sys.setswitchinterval(PERIOD / 10)  # or looks come when a function of torch begins
    sys.argv = ["latent-augment", *arguments]
    try:
        from augment.cli import main as command

        command()
    finally:
        ended.set()
        watcher.join()
        Path(out).write_text(json.dumps({"cpu": time.process_time(), "places": dict(found)}))


if __name__ == "__main__":
    sampled(sys.argv[2:], sys.argv[1])
