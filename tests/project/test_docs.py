"""README and docs: commands and code run, options exist, links have a target.

Blocks marked ``bash`` and ``python`` are run, page by page, in a folder with `photos`; a ``yaml``
block that begins with the name of a file is that file. Commands marked ``console`` need a GPU, a
download or a cluster, so only their options are checked; ``sh`` is installation.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from augment import cli
from augment.sources.fashion import few_shots, write_fashion

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMES = [page.name for page in PAGES]


def blocks(page, *languages):
    return [(kind, text) for kind, text in BLOCK.findall(page.read_text()) if kind in languages]


def commands(text):
    """Return the commands of a block, also those behind a launcher."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    starts = [
        (words, words.index("latent-augment")) for words in found if "latent-augment" in words
    ]
    return [words[at + 1 :] for words, at in starts]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_have_a_target(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for target in re.findall(r"\(([^)\s]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target[0]).read_text() if target[0] else page.read_text()
        heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
        assert target[1] in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_scripts_and_configs_exist(page):
    for name in re.findall(
        r"`(?:python )?((?:scripts|configs|augment|training)/[\w/.]+)`", page.read_text()
    ):
        assert (ROOT / name.rstrip(".")).exists(), name


def exists(module, name):
    """Whether a module has a name, or a module below it of that name."""
    return hasattr(importlib.import_module(module), name) or bool(
        importlib.util.find_spec(f"{module}.{name}")
    )


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_imported_names_exist(page):
    for _, text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    assert exists(node.module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_of_commands_exist(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for _, text in blocks(page, "console", "bash"):
        for words in commands(text):
            if words[0] == "train":
                continue  # bash blocks run; the others' configs have tests of their own
            with suppress(SystemExit):
                cli.run([*words, "--help"])
            options = set(re.findall(r"--([\w-]+)", capsys.readouterr().out))
            given = {re.split("[=.]", word[2:])[0] for word in words if word.startswith("--")}
            assert given <= options, (words, given - options)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Write three classes of five JPEGs of odd sizes, in colour, and two to test on."""
    root = tmp_path_factory.mktemp("docs")
    some = write_fashion(root / "embedded", "shots", few_shots(0, 7))
    sizes = torch.randint(40, 130, (7, 2), generator=torch.Generator().manual_seed(0)).tolist()
    for name in ("Sandal", "Coat", "Bag"):
        for number, path in enumerate(sorted((some / name).glob("*.png"))):
            folder = root / ("photos" if number < 5 else "photos-test") / name
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.open(path).convert("RGB").resize(sizes[number])
            picture.save(folder / f"IMG_{number:04d}.jpg")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_run(page, photos, tmp_path):
    for name in ("photos", "photos-test"):
        (tmp_path / name).symlink_to(photos / name)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for _, text in blocks(page, "yaml"):
        if match := re.match(r"# (\S+)\n", text):
            assert yaml.safe_load(text)
            (tmp_path / match[1]).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / match[1]).write_text(text)
    for kind, text in blocks(page, "bash", "python"):
        command = ["bash", "-euc", text] if kind == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, (text, done.stdout[-2000:], done.stderr[-4000:])
        assert "Traceback" not in done.stderr


def test_the_notebook_is_the_page_and_was_run():
    notebook = json.loads((ROOT / "docs" / "quick-start.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = ["".join(cell["source"]).removeprefix("%%bash\n") for cell in cells]
    page = ROOT / "docs" / "quick-start.md"
    assert code == [text.rstrip() for _, text in blocks(page, "bash", "python")]
    kinds = [{output["output_type"] for output in cell["outputs"]} for cell in cells]
    assert all(kinds) and "error" not in set().union(*kinds)
