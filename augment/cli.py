"""The command ``latent-augment``: what is typed becomes a call of one of `augment.commands`.

They, and torch with them, are imported when `main` is there to tell of an interruption.
"""

import errno
import json
import os
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from io import TextIOWrapper
from typing import Any

from augment.console import examples, overview, silence
from augment.core.errors import AugmentWarning, Terminated, UserError
from augment.imports import guard_imports, refused, take_allowed

SWITCHES = ("full", "dry_run", "clean", "links", "nested", "discard", "repair")
"""Options that may be given without a value, for true."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk without room for a user."""


def underscored(argument: str) -> str:
    """``--per-class=3`` as ``--per_class=3``: options may be spelled either way."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    if name in SWITCHES and not equals:  # jsonargparse wants a value
        return f"--{name}=true"
    return f"--{name}{equals}{value}"


def as_texts(args: list[str]) -> list[str]:
    """Let class names in options and configurations be text, whatever YAML would make of them."""
    import yaml
    from jsonargparse import get_loader, set_loader

    from augment.sources.prompts import quoted

    load = get_loader("yaml")
    if load.__module__ != __name__:
        set_loader("yaml", lambda text: load(quoted(text)), (yaml.YAMLError, ValueError))
    args, last = list(args), ""
    for place, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        if equals and name.startswith("--"):
            args[place] = f"{name}={quoted(value, name.rpartition('.')[2].lstrip('-'))}"
        elif last:
            args[place] = quoted(argument, last)
        last = "" if equals else argument.rpartition(".")[2].lstrip("-")
        last = last if argument.startswith("--") else ""
    return args


def run(args: list[str]) -> Any:
    """Dispatch, and give what came of it; the commands of `training` are imported when asked for.

    What follows a command without a name is its first option's value.
    """
    from augment.commands import COMMANDS

    if args[:1] in (["-h"], ["--help"]):
        print(overview({name: (f.__doc__ or "").splitlines()[0] for name, f in COMMANDS.items()}))
        return None
    guard_imports()
    args = as_texts(args)
    if args[:1] == ["train"]:
        from training.cli import main as lightning

        return lightning(args[1:]).found
    from jsonargparse import auto_cli

    commands: Any = COMMANDS
    if args[:1] == ["sweep"]:
        from training.sweep import sweep

        commands = {**COMMANDS, "sweep": sweep}
    elif args[:1] == ["episodes"]:
        from training.episodes.evaluate import run_episodes

        commands = {**COMMANDS, "episodes": run_episodes}
    args = [underscored(argument) for argument in args]
    if len(args) > 1 and args[0] in commands and not args[1].startswith("-"):
        args[1:1] = [f"--{next(iter(signature(commands[args[0]]).parameters))}"]
    for place in range(len(args) - 1, 0, -1):  # a switch may be given a value
        if args[place] in ("true", "false") and args[place - 1].endswith("=true"):
            args[place - 1 : place + 1] = [args[place - 1].replace("=true", f"={args[place]}")]
    try:
        return auto_cli(
            commands, args=args, as_positional=False, prog="latent-augment", exit_on_error=False
        )
    except SystemExit:
        if {"-h", "--help"} & set(args):
            print(examples(args[0]))
        raise


@contextmanager
def unwrapped() -> Iterator[None]:
    """Tell what a source or another part complains of, which jsonargparse wraps."""
    try:
        yield
    except ValueError as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


SHOW = warnings.showwarning
"""How Python tells of warnings."""


def show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Ours are one line, as errors are."""
    if issubclass(category, AugmentWarning):
        print(f"latent-augment: warning: {message}", file=sys.stderr)
    else:
        SHOW(message, category, *where)


def limit_spinning() -> None:
    """Let idle OpenMP threads sleep after a short spin; must run before torch is imported.

    By default GNU OpenMP's idle threads spin for milliseconds. On a machine where other programs
    run, they take the cores from the thread they wait for (BENCHMARKS.md, neighbours). The limit
    of 1000 spins applies unless the user set GOMP_SPINCOUNT or OMP_WAIT_POLICY.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def terminate(*_: Any) -> None:
    """End the work like an interrupt; ``timeout`` sends the signal twice, so only the first counts.

    Raises:
        Terminated: always.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def main() -> None:
    """Entry point. A user's mistake ends with one sentence and exit code 2, SIGTERM with 143."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    limit_spinning()
    warnings.showwarning = show_warning
    if isinstance(sys.stdout, TextIOWrapper):  # names of files may not be in its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    given = sys.argv[1:]
    args = [argument for argument in given if argument not in ("--quiet", "--json")]
    silent = len(args) < len(given)
    try:
        args = take_allowed(args)
        with unwrapped(), silence(silent):
            found = run(args)
        if "--json" in given:
            print(json.dumps(found))
    except UserError as error:
        print(f"latent-augment: {error}", file=sys.stderr)
        sys.exit(2)
    except ArgumentError as error:
        told = " ".join(str(error).split())
        print(f"latent-augment: {refused(told) or f'{told}; see --help'}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of another package, such as one that writes logs
        if error.errno not in FULL:
            raise
        place = f" at {error.filename}" if error.filename else ""
        print(
            f"latent-augment: expected room to write{place}, got {error.strerror}; make room, and "
            "run the same command again: nothing that was finished is lost",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt as stop:
        ended, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        print(f"latent-augment: {ended}; run the same command again to go on", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
