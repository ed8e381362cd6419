"""Imports point one way, and heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import augment

ROOT = Path(__file__).parents[2]
LAYERS = (
    {"augment.core"},
    {"augment.centroid", "augment.diffusion", "augment.plan", "augment.jobs", "augment.sources"},
    {"augment.inversion", "augment.networks", "augment.measure"},
    {"augment.bank"},
    {"augment.synthesis"},
    {"augment.shards", "augment.replay"},
    {"augment.report", "augment.explore", "augment.training"},
    {"augment.cli", "augment.commands", "augment.config", "augment.training.sweep"},
)
HOMES = {
    "pytorch_lightning": "augment.training",
    "timm": ("augment.training", "augment.networks"),
    "torchmetrics": ("augment.training", "augment.networks", "augment.measure"),
    "diffusers": "augment.diffusion",
    "transformers": ("augment.diffusion", "augment.networks"),
    "peft": ("augment.diffusion", "augment.training"),
    "webdataset": "augment.shards.export",
    "ray": "augment.jobs.ray",
    "gradio": "augment.explore",
    "jsonargparse": ("augment.cli", "augment.config", "augment.training.sweep"),
}


def modules():
    """Yield (module name, source) of the package."""
    for path in sorted([*ROOT.glob("augment/**/*.py"), *ROOT.glob("training/**/*.py")]):
        yield named(path.with_suffix("")).removesuffix(".__init__"), path.read_text()


def named(path):
    """Return the name of the module at a path; ``augment/training`` links to ``training``."""
    name = ".".join(path.relative_to(ROOT).parts)
    return name if name.startswith("augment") else f"augment.{name}"


def imports(source):
    """Yield every module that a source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def layer(name):
    """Return the level of a module, by the longest entry of `LAYERS` that it is in."""
    found = [
        (len(room), level)
        for level, rooms in enumerate(LAYERS)
        for room in rooms
        if name == room or name.startswith(room + ".")
    ]
    return max(found)[1] if found else None


def faults(name, source):
    """Yield the faults of a module's imports."""
    here = layer(name)
    for imported in imports(source):
        there, top = layer(imported), imported.split(".")[0]
        if top in ("tests", "scripts"):
            yield f"{name} imports {imported}"
        if there is not None and here is not None and there > here:
            yield f"{name} imports {imported}, a layer above it"
        if top in HOMES and not name.startswith(HOMES[top]):
            yield f"{name} imports {imported}, which belongs to {HOMES[top]}"


@pytest.mark.parametrize(("name", "source"), modules(), ids=lambda value: value[:40])
def test_imports_point_down_the_layers(name, source):
    assert list(faults(name, source)) == []


def test_every_module_has_a_layer():
    assert [n for n, _ in modules() if layer(n) is None and n != "augment"] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("scripts/**/*.py")), ids=lambda path: path.stem)
def test_names_that_scripts_import_exist(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "augment":
            module = import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_the_pure_core_knows_torch_alone():
    for name, source in modules():
        if name.startswith(("augment.centroid", "augment.diffusion.process")):
            tops = {imported.split(".")[0] for imported in imports(source)}
            allowed = {"augment", "torch", "jaxtyping", "math", "bisect", "collections"}
            assert tops <= allowed | {"dataclasses", "functools", "typing"}, name


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("augment.centroid.norms", "from augment.bank import bank"),
        ("augment.bank.bank", "def f():\n    import augment.training.data.module"),
        ("augment.bank.bank", "from augment.synthesis.synthesizer import Synthesizer"),
        ("augment.bank.bank", "import pytorch_lightning"),
        ("augment.training.data.module", "from scripts import train_tiny"),
    ],
)
def test_the_check_can_fail(name, source):
    assert list(faults(name, source)) != []


def imported(code, names):
    """Return which of some modules are loaded by code."""
    code = f"import sys\n{code}\nprint(*sorted(set(sys.modules) & set({names.split()})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_augment_is_light():
    heavy = "diffusers pytorch_lightning timm torchvision torchmetrics transformers jsonargparse"
    assert (
        imported("from augment import *; import augment.commands", heavy + " webdataset ray") == ""
    )


def test_the_command_is_there_before_torch():
    assert imported("import augment, augment.cli", "torch numpy tqdm") == ""


def public_packages():
    """The modules that ``make docs`` shows."""
    return [page.stem for page in ROOT.glob("docs/reference/*.rst")]


def test_every_folder_says_what_is_public_and_the_docs_show_that():
    for path in [*ROOT.glob("augment/**/__init__.py"), *ROOT.glob("training/**/__init__.py")]:
        name = named(path.parent)
        module = import_module(name)
        assert [word for word in module.__all__ if not hasattr(module, word)] == [], name
        assert bool(module.__all__) == (name in public_packages()), name


def test_public_names_are_where_the_table_says():
    homes = augment._HOMES
    assert homes and set(homes) == set(augment.__all__)
    for name, home in homes.items():
        assert getattr(augment, name) is getattr(import_module(f"augment.{home}"), name)
    with pytest.raises(AttributeError, match="nonsense"):
        augment.nonsense  # noqa: B018


def test_every_bar_is_also_a_plain_line_of_progress():
    """Without a terminal a bar of tqdm's own would say nothing; the pool's generator hides all."""
    places = [*ROOT.glob("augment/**/*.py"), *ROOT.glob("training/**/*.py")]
    uses = {str(p.relative_to(ROOT)) for p in places if "import tqdm" in p.read_text()}
    own = {"augment/core/progress.py", "augment/replay/pool.py"}
    assert {place for place in uses if not place.startswith("augment/training/")} == own
