"""How the command behaves in a shell."""

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import call

from augment.cli import documented
from augment.commands import COMMANDS


@pytest.mark.parametrize("args", [("--help",), ("-h",)])
def test_the_overview_has_every_command_and_a_start(monkeypatch, capsys, args):
    code, out, _ = call(monkeypatch, capsys, *args)
    assert code == 0 and all(f"\n  {name} " in out for name in COMMANDS)
    assert "latent-augment invert photos --bank mine/bank" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_of_their_command(name):
    summary, examples = documented(COMMANDS[name])
    assert summary.endswith((".", "--help."))
    assert all(x.split()[:2] == ["latent-augment", name] for x in examples.splitlines())


def test_examples_stand_below_the_help(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "verify", "--help")
    assert code == 0 and out.endswith("\n  latent-augment verify mine/synthetic --discard\n")


def test_the_first_option_needs_no_name(monkeypatch, capsys, bank):
    named = call(monkeypatch, capsys, "inspect", "--path", bank.path)
    assert call(monkeypatch, capsys, "inspect", bank.path) == named and named[0] == 0


def test_json_is_one_line_and_quiet_is_none(monkeypatch, capsys, bank):
    code, out, err = call(monkeypatch, capsys, "--json", "verify", bank.path)
    assert code == 0 and out.count("\n") == 1 and not err
    assert json.loads(out) == {"path": str(bank.path), "findings": 0}
    record = json.loads(call(monkeypatch, capsys, "evaluate", bank.path, "--json")[1])
    assert {row["class"] for row in record["classes"]} == set(bank.classes)
    assert call(monkeypatch, capsys, "--quiet", "inspect", bank.path) == (0, "", "")


def test_a_mistake_is_reported_though_silent(monkeypatch, capsys, tmp_path):
    code, out, err = call(monkeypatch, capsys, "--quiet", "inspect", tmp_path)
    assert code == 2 and not out and err.startswith("latent-augment: expected a bank")


BARS = """
import sys
from augment.cli import main
try:
    main()
except SystemExit:
    pass
print("torch" in sys.modules)
from tqdm import tqdm
print(tqdm([]).disable)
"""


@pytest.mark.parametrize(
    ("words", "terminal", "disabled"),
    [(["--help"], True, False), (["--help"], False, True), (["--help", "--quiet"], True, True)],
)
def test_bars_are_shown_on_a_terminal_only_and_never_if_quiet(words, terminal, disabled):
    leader, follower = os.openpty()
    with os.fdopen(leader), os.fdopen(follower, "w") as screen:
        done = subprocess.run(
            [sys.executable, "-c", BARS, *words], stdout=subprocess.PIPE, text=True, check=True,
            stderr=screen if terminal else subprocess.DEVNULL,
            env={k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"},
        )  # fmt: skip
    assert done.stdout.splitlines()[-1] == str(disabled)


@pytest.mark.parametrize("words", [["--help"], ["inspect", "--help"], ["sweep", "--help"]])
def test_help_is_quick_for_it_imports_no_torch(words):
    command = [sys.executable, "-c", BARS, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage: latent-augment" in done.stdout
    assert done.stdout.splitlines()[-2] == "False"


@pytest.mark.parametrize("words", [["--help"], ["inspect", "--help"]])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    line = [sys.executable, "-m", "augment.cli", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, **pipes) as process:
        process.stdout.close()  # as head does
        assert process.stderr.read() == b"" and process.wait() == 128 + signal.SIGPIPE
