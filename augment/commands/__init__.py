"""The sub-commands of ``latent-augment``. EXTEND.

A command is a function whose arguments are the options (jsonargparse) and whose docstring is the
help; it gives a record of what came of it, for ``--json``. Heavy modules are imported when it runs,
so that ``--help`` is quick. A new one is a function in a file here, an entry in `COMMANDS`, and an
example in `augment.console`.
"""

from typing import Any

from augment.commands.jobs import invert, synthesize
from augment.commands.keeping import export, inspect, merge, split, verify
from augment.commands.learning import demo, episodes, smooth, sweep, train
from augment.commands.looking import evaluate, explore, report

COMMANDS: dict[str, Any] = {
    "invert": invert,
    "synthesize": synthesize,
    "train": train,
    "sweep": sweep,
    "episodes": episodes,
    "smooth": smooth,
    "demo": demo,
    "evaluate": evaluate,
    "report": report,
    "inspect": inspect,
    "verify": verify,
    "merge": merge,
    "split": split,
    "export": export,
    "explore": explore,
}
