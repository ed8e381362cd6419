"""Where a configuration is, what it may name, and that names in it are text.

A YAML file can name any class that an option takes (``class_path``), with its arguments, and any
function; so whoever wrote the file would decide what runs here. Therefore a file may name classes
of the modules in `MODULES` and of those that the user passes with ``--allow``, and the functions in
`CALLABLES`.
"""

import inspect
import re
from pathlib import Path
from typing import Any

import yaml

from augment.core.errors import UserError

MODULES = (
    *("augment", "torch.nn", "torch.optim", "torch.utils.data"),
    *("torchvision.datasets", "torchvision.transforms", "timm.data", "timm.layers"),
    *("pytorch_lightning.callbacks", "pytorch_lightning.loggers"),
)
"""Modules whose classes may be named. Not all of torch: some of its classes start processes."""

DENIED = (
    *("augment.cli", "augment.commands", "augment.core.files", "augment.explore"),
    *("augment.jobs.ray", "augment.replay.store", "augment.shards.dataset.Reader"),
    *(
        "augment.training.cli",
        "augment.training.demo",
        "augment.training.lightning",
        "augment.training.sweep",
    ),
    *("torch.utils.data.datapipes", "timm.data.readers"),
)
"""Parts of `MODULES` whose classes start processes, or open files to write."""

CALLABLES = (
    "torch.utils.data._utils.collate.default_collate",
    "torchvision.datasets.folder.default_loader",
    "torchvision.datasets.folder.pil_loader",
)
"""Functions that may be named, by where they are defined."""

TEXTS = ("prompts", "classes", "class_names")
"""Options whose values hold class names or texts, and never numbers."""

CONFIGS = Path(__file__).parent / "configs"
"""The configurations that come with the package."""

allowed: list[str] = []
"""Modules that the user named with ``--allow``."""


def take_allowed(args: list[str]) -> list[str]:
    """Return a command's arguments without ``--allow MODULE``, which may stand anywhere.

    Raises:
        UserError: there is no name of a module after it.
    """
    allowed.clear()
    remaining, rest = [], iter(args)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name != "--allow":
            remaining.append(argument)
            continue
        value = value if equals else next(rest, "")
        if not re.fullmatch(r"\w+(\.\w+)*", value):
            raise UserError(
                f"expected the name of a module after --allow, got {value!r}; such as --allow "
                "my_data"
            )
        allowed.append(value)
    return remaining


def find_config(name: str) -> str:
    """Return the path of a configuration: a file, or one of `CONFIGS` by its name without suffix.

    Anything but a bare name, such as a path or YAML, is returned unchanged.

    Raises:
        UserError: there is neither a file nor a configuration of that name.

    >>> Path(find_config("demo")).name
    'demo.yaml'
    """
    if not re.fullmatch(r"[\w-]+", name) or Path(name).is_file():
        return name
    shipped = {path.stem: path for path in CONFIGS.glob("*.yaml")}
    if name not in shipped:
        raise UserError(
            f"expected a configuration, a file or one of {', '.join(sorted(shipped))}, got {name}; "
            "correct the name or give the path of a file"
        )
    return str(shipped[name])


def find_configs(args: list[str]) -> list[str]:
    """Return a command's arguments with the path of every ``--config``; see `find_config`."""
    found, last = [], ""
    for argument in args:
        option, equals, value = argument.partition("=")
        if equals and option == "--config":
            argument = f"{option}={find_config(value)}"
        elif last in ("--config", "-c"):
            argument = find_config(argument)
        found.append(argument)
        last = argument
    return found


def guard_imports() -> None:
    """Let jsonargparse import nothing else for a value, neither to parse nor to show help."""
    import jsonargparse._util as util
    from jsonargparse import set_parsing_settings

    set_parsing_settings(
        import_path_denylist=["*", *DENIED],
        import_path_allowlist=[*MODULES, *allowed],
        validate_subclass_spec_in_any=True,
    )
    if util.canonical_import_paths is not canonical_import_paths:
        ORIGINAL.append(util.canonical_import_paths)
        util.canonical_import_paths = canonical_import_paths


ORIGINAL: list[Any] = []


def canonical_import_paths(obj: Any) -> set[str]:
    """Return where an imported object is defined; a function that may not be named is refused."""
    from jsonargparse._common import ImportDenied

    paths = ORIGINAL[0](obj)
    for path in () if inspect.isclass(obj) else paths:
        by_user = any(path == name or path.startswith(f"{name}.") for name in allowed)
        if not by_user and path not in CALLABLES:
            raise ImportDenied(f"Importing '{path}' is not allowed")
    return paths


def refused(message: str) -> str | None:
    """Return the sentence for a name that `guard_imports` refused, if a message names one."""
    match = re.search(r"Importing '(\S+)' is not allowed", message)
    return match and (
        f"expected a configuration of classes of {', '.join(MODULES)}, got {match[1]}; only if "
        f"you trust the file, pass --allow {match[1].rpartition('.')[0]}"
    )


def keep_names(args: list[str]) -> list[str]:
    """Let class names in options and configurations be text, whatever YAML would make of them."""
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")
    if load.__module__ != __name__:
        set_loader("yaml", lambda text: load(quote_names(text)), (yaml.YAMLError, ValueError))
    words, option = [], ""
    for argument in args:
        name, equals, value = argument.partition("=")
        if equals and name.startswith("--"):
            argument = f"{name}={quote_names(value, name.rpartition('.')[2].lstrip('-'))}"
        elif option:
            argument = quote_names(argument, option)
        words.append(argument)
        named = argument.startswith("--") and not equals
        option = argument.rpartition(".")[2].lstrip("-") if named else ""
    return words


def quote_names(text: str, option: str = "") -> str:
    r"""Quote the names in YAML: every key, and all below an option of `TEXTS`.

    YAML reads 010 as a number, and no as false.

    >>> quote_names("{010: bag, 8: no, b: hat}", "prompts")
    '{"010": bag, "8": "no", b: hat}\n'

    Args:
        text: YAML; unless it is a list or mapping, it is returned unchanged.
        option: the option whose value it is.
    """
    try:
        node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError):
        return text
    if not isinstance(node, yaml.CollectionNode) or not _quote(node, option in TEXTS):
        return text
    return yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True, width=1_000_000)


def _quote(node: Any, inside: bool) -> bool:
    """Quote the keys in a YAML node, and its values too if inside; return whether any changed."""
    pairs = [item if isinstance(item, tuple) else (None, item) for item in node.value]
    changed = False
    for key, value in pairs:
        last = str(key.value).rpartition(".")[2] if key else ""
        scalars = [key] if key else []
        if isinstance(value.value, list):
            changed |= _quote(value, inside or last in TEXTS)
        elif inside:
            scalars.append(value)
        for scalar in scalars:
            if isinstance(scalar.value, str) and not scalar.tag.endswith((":str", ":merge")):
                scalar.tag, scalar.style, changed = "tag:yaml.org,2002:str", '"', True
    return changed
