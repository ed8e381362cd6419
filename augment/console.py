"""How the command behaves in a shell: examples, silence, JSON, bars only where somebody looks.

Exit codes: 0 done, 2 a mistake of the user's or something found wrong, 130 interrupted, 143
terminated.
"""

import contextlib
import io
import sys
from collections.abc import Iterator
from functools import partialmethod

EXAMPLES = {
    "invert": (
        "latent-augment invert photos --bank mine/bank",
        "latent-augment invert photos --bank mine/bank --backbone sd15 "
        "--prompt 'a photo of a {name}'",
        "latent-augment invert photos --bank mine/bank --dry-run",
    ),
    "synthesize": (
        "latent-augment synthesize mine/bank --out mine/synthetic --per-class 100",
        "latent-augment synthesize mine/bank --out mine/tail --fill-to 300 --members 8",
        "latent-augment synthesize mine/bank --out mine/clean --filters degenerate --candidates 4",
    ),
    "evaluate": (
        "latent-augment evaluate mine/bank --real photos",
        "latent-augment evaluate mine/synthetic --real photos --network resnet50 --out mine/good",
    ),
    "report": ("latent-augment report mine/bank --shards mine/synthetic --out report.html",),
    "explore": ("latent-augment explore mine/bank",),
    "smooth": ("latent-augment smooth --config configs/smooth_tiny.yaml",),
    "inspect": ("latent-augment inspect mine/bank",),
    "verify": (
        "latent-augment verify mine/synthetic",
        "latent-augment verify mine/synthetic --discard",
    ),
    "merge": ("latent-augment merge --banks one/bank,other/bank --out both/bank",),
    "split": ("latent-augment split mine/bank --classes ant,bee --out some/bank",),
    "export": ("latent-augment export mine/synthetic --out mine/folder",),
    "demo": ("latent-augment demo", "latent-augment demo --full"),
}
"""What may be typed, by command."""


def overview(summaries: dict[str, str]) -> str:
    """What ``latent-augment --help`` says.

    Args:
        summaries: a sentence for each command.
    """
    width = max(map(len, summaries))
    lines = [f"  {name:{width}}  {told}" for name, told in summaries.items()]
    return "\n".join(
        [
            "usage: latent-augment [--quiet | --json] COMMAND [OPTIONS]",
            "",
            "A handful of labelled images, mixed as diffusion latents, into a better classifier.",
            "",
            *lines,
            "",
            "For a start, images in photos/CLASS/*.jpg:",
            "  latent-augment invert photos --bank mine/bank",
            "  latent-augment synthesize mine/bank --out mine/synthetic --per-class 100",
            "  latent-augment train fit --data.train photos --data.test photos-test \\",
            "      --data.synthetic mine/synthetic --trainer.max_epochs 20",
            "",
            "  COMMAND --help    options and examples; --config FILE takes them from YAML",
            "  --allow MODULE    let a --config name classes of MODULE; see docs/training.md",
            "  --quiet           nothing but complaints",
            "  --json            what came of it, as one line of JSON",
            "Exit codes: 0 done, 2 a mistake or something found wrong, 130 interrupted,",
            "143 terminated.",
        ]
    )


def examples(command: str) -> str:
    """What may be typed, below a command's help."""
    lines = EXAMPLES.get(command, ())
    return "\n".join(["", "examples:", *(f"  {line}" for line in lines)]) if lines else ""


@contextlib.contextmanager
def silence(quiet: bool) -> Iterator[None]:
    """Keep prose from the screen, and progress bars from where no terminal is.

    Args:
        quiet: of both.
    """
    from tqdm import tqdm

    bars = tqdm.__init__
    if quiet or not sys.stderr.isatty():
        tqdm.__init__ = partialmethod(bars, disable=True)  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
            yield
    finally:
        tqdm.__init__ = bars  # type: ignore[method-assign]
