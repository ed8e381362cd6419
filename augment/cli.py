"""The command ``latent-augment``: from what is typed to a call of one of `augment.commands`.

Exit codes: 0 done, 2 a mistake or something found wrong, 130 interrupted, 143 terminated. torch and
everything that needs it are imported after `main` has set up signals and the environment.
"""

import errno
import io
import json
import os
import pkgutil
import re
import select
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from inspect import cleandoc, isclass, signature
from itertools import pairwise
from textwrap import dedent, indent
from typing import Any, NoReturn

from augment import __version__
from augment.commands import COMMANDS
from augment.config import (
    TEXTS,
    find_configs,
    guard_imports,
    keep_names,
    refused,
    take_allowed,
)
from augment.core.errors import AugmentWarning, NotAsExpected, Terminated, UserError
from augment.core.registry import Dashed

OVERVIEW = """usage: latent-augment [--quiet | --json] COMMAND [OPTIONS]

A handful of labelled images, mixed as diffusion latents, into a better classifier.

{commands}

For a start, images in photos/CLASS/*.jpg:
  latent-augment invert photos --bank mine/bank
  latent-augment synthesize mine/bank --out mine/synthetic --per-class 100
  latent-augment train fit --data.train photos --data.test photos-test \\
      --data.synthetic mine/synthetic --trainer.max-epochs 20

  COMMAND --help    list the options with examples
  --config FILE     read options from YAML, or from one that comes with the package, by its name
  --allow MODULE    let a --config file name classes of MODULE; see docs/training.md
  --quiet           print warnings and errors only
  --json            print the result as one line of JSON
  --version         print the version
Exit codes: 0 done, 2 a mistake or something found wrong, 130 interrupted,
143 terminated."""
"""What ``latent-augment --help`` prints."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk without room for the user's files."""

show_python_warning = warnings.showwarning


def spell(args: list[str]) -> list[str]:
    """Spell options with underscores; names of classes below an option keep their dashes.

    >>> spell(["--per-class=a-b", "fade/chm-x", "--data.mix.fill-to", "--prompts.T-shirt"])
    ['--per_class=a-b', 'fade/chm-x', '--data.mix.fill_to', '--prompts.T-shirt']
    """

    def underscored(option: str) -> str:
        head, dot, rest = option.partition(".")
        head = head.replace("-", "_")
        return head + dot + (rest if head in (*TEXTS, "words") else rest and underscored(rest))

    words = []
    for argument in args:
        name, equals, value = argument.partition("=")
        named = name.startswith("--")
        words.append(f"--{underscored(name[2:])}{equals}{value}" if named else argument)
    return words


def switched(args: list[str], switches: Collection[str]) -> list[str]:
    """Give a switch without a value the value true.

    >>> switched(["--dry_run", "--clean", "false"], ["dry_run", "clean"])
    ['--dry_run=true', '--clean', 'false']
    """
    bare = {f"--{name}" for name in switches}
    return [
        f"{word}=true" if word in bare and following not in ("true", "false") else word
        for word, following in pairwise([*args, ""])
    ]


def run(args: list[str]) -> Any:
    """Run a command and return its record.

    Raises:
        UserError: there is no such command, or it reports a mistake.
    """
    name, *args = args or ["--help"]
    if name == "--version":
        print(f"latent-augment {__version__}")
        return __version__
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {key:{width}}  {documented(command)[0]}" for key, command in COMMANDS.items())
        print(OVERVIEW.format(commands="\n".join(lines)))
        return None
    if name not in COMMANDS:
        raise UserError(
            f"expected a command, {', '.join(COMMANDS)}, got {name}; see latent-augment --help"
        )
    guard_imports()
    args, command = keep_names(find_configs(spell(args))), COMMANDS[name]
    if name == "train":  # Lightning parses the rest
        return command(args)
    settings = command.__annotations__.get("settings")  # where its class is, as text
    if not settings:
        return command(**parse(command, command, args))
    target = pkgutil.resolve_name(settings)
    return command(target(**parse(command, target, args)))


def parse(
    command: Callable[..., Any], target: Callable[..., Any], args: list[str]
) -> dict[str, Any]:
    """Return the values of a command's options by name.

    Args:
        command: the function, whose docstring is the help.
        target: the class or function whose parameters are the options; the first required one may
            be typed without its name.
        args: what is typed after the name of the command.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser

    options = signature(target).parameters
    args = switched(args, [key for key, option in options.items() if option.default is False])
    if args and not args[0].startswith("-"):
        required = (key for key, option in options.items() if option.default is option.empty)
        args.insert(0, f"--{next(required, next(iter(options)))}")
    summary, examples = documented(command)
    prog = f"latent-augment {command.__name__}"

    class Parser(Dashed, ArgumentParser): ...

    parser = Parser(prog=prog, description=summary, exit_on_error=False)
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="YAML file of options, or the name of one that comes with the package.",
    )
    add: Any = parser.add_class_arguments if isclass(target) else parser.add_function_arguments
    own = vars(target).get("__annotations__", options).keys()
    for others in (options.keys() - own, own):  # what a class inherits follows
        add(target, as_group=False, sub_configs=True, skip={*others})
    try:
        values = parser.instantiate(parser.parse_args(args))
    except SystemExit:
        if {"-h", "--help"} & {*args} and examples:
            print(f"\nexamples:\n{indent(dedent(examples), '  ')}")
        raise
    return {key: value for key, value in vars(values).items() if key != "config"}


def documented(command: Callable[..., Any]) -> tuple[str, str]:
    """Return the first line of a command's docstring, and its examples."""
    text = cleandoc(command.__doc__ or "")
    return text.splitlines()[0], text.partition("Examples:\n")[2]


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the `UserError` of a source or another part, which jsonargparse wraps."""
    try:
        yield
    except ValueError as error:
        cause: BaseException | None = error
        while cause and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


def show_warning(message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Print a warning of ours in one line, as errors are, and others as Python does."""
    if issubclass(category, AugmentWarning):
        print(f"latent-augment: warning: {message}", file=sys.stderr)
    else:
        show_python_warning(message, category, *where)


def limit_spinning() -> None:
    """Let idle OpenMP threads sleep after a short spin; must run before torch is imported.

    By default GNU OpenMP's idle threads spin for milliseconds. On a machine where other programs
    run, they take the cores from the thread they wait for (BENCHMARKS.md, neighbours). The limit
    of 1000 spins applies unless the user set GOMP_SPINCOUNT or OMP_WAIT_POLICY.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def terminate(*_: object) -> None:
    """End the work like an interrupt; ``timeout`` sends the signal twice, so only the first counts.

    Raises:
        Terminated: always.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def main() -> None:
    """Run what is typed; a mistake ends with one sentence and exit code 2, SIGTERM with 143."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    limit_spinning()
    warnings.showwarning = show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may not be in its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    typed = sys.argv[1:]
    args = [argument for argument in typed if argument not in ("--quiet", "--json")]
    silent = len(args) < len(typed)
    if silent or not sys.stderr.isatty():
        if not silent and "TQDM_DISABLE" not in os.environ:
            os.environ.setdefault("LATENT_AUGMENT_PROGRESS", "60")  # see augment.core.progress
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    try:
        args = take_allowed(args)
        with unwrapped(), redirect_stdout(io.StringIO()) if silent else nullcontext():
            record = run(args)
        if "--json" in typed:
            print(json.dumps(record))
        sys.stdout.flush()
    except BrokenPipeError:
        if not unread(sys.stdout.fileno()):  # it was a pipe between processes
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        if isinstance(error, NotAsExpected) and "--json" in typed:
            print(json.dumps(error.record))
        fail(str(error))
    except ArgumentError as error:
        message = " ".join(str(error).split())
        fail(refused(message) or f"{plainer(message)}; see --help")
    except OSError as error:  # of another package, such as one that writes logs
        if error.errno not in DISK_FULL:
            raise
        place = f" at {error.filename}" if error.filename else ""
        fail(
            f"expected room to write{place}, got {error.strerror}; make room, and run the same "
            "command again: nothing that was finished is lost"
        )
    except KeyboardInterrupt as stop:
        ended, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        fail(f"{ended}; run the same command again to go on", code)


def plainer(message: str) -> str:
    """Say what is wrong with a value, where jsonargparse lists types of Python.

    >>> plainer('Parser key "lr": ' + "Expected a <class 'float'>. Got value: x")
    'expected a number for --lr, got x'
    """
    known = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}
    kinds = re.findall(r"Expected an? <class '(\w+)'>", message)
    found = re.match(r'Parser key "([\w.]+)": .*(?:Given|Got) value: (.*)$', message)
    words = " or ".join(dict.fromkeys(known[kind] for kind in kinds if kind in known))
    if not found or not words or not {*kinds} <= {*known, "NoneType"}:
        return message.rstrip(".")
    return f"expected {words} for --{found[1].replace('_', '-')}, got {found[2]}"


def unread(descriptor: int) -> bool:
    """Tell whether nobody reads a pipe any more, as after ``| head``."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def fail(message: str, code: int = 2) -> NoReturn:
    """Print a sentence to standard error, and exit."""
    print(f"latent-augment: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
