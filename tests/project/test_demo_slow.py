"""The demo and a stranger's first hour, by a wheel that is installed alone, in empty folders."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        args, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds nothing but the unpacked wheel of the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "build", "-o", str(folder), cwd=ROOT)
    assert built.returncode == 0, built.stderr
    wheel = next(folder.glob("*.whl"))
    made = [str(wheel), str(next(folder.glob("*.tar.gz")))]
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *made, cwd=folder)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target")
    done = run(*pip, str(folder / "site"), str(wheel), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_the_wheel_has_every_file_of_the_package(site: Path) -> None:
    files = {
        str(Path(folder, name).relative_to(ROOT))
        for folder, _, names in os.walk(ROOT / "augment", followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }
    with zipfile.ZipFile(next(site.parent.glob("*.whl"))) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == files
    assert {"augment/training/sweep.py", "augment/configs/demo.yaml"} <= packed


def test_the_first_hour_of_a_stranger(site: Path, tmp_path: Path) -> None:
    """Odd photographs, the commands of README, and the loops of the docs, run by the wheel."""
    script = ROOT / "tests" / "slow" / "first_hour.sh"
    pages = [ROOT / "README.md", *ROOT.glob("docs/your-loop.md")]
    done = run(
        *("bash", str(script), str(site), *map(str, pages)), cwd=tmp_path, PYTHON=sys.executable
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    assert (tmp_path / "mine" / "run" / "test.json").exists()


def interrupt(*command: str, cwd: Path, **env: str) -> None:
    """Press Ctrl-C once the first row is measured, and see that nothing goes on."""
    pipe = subprocess.PIPE
    begun = subprocess.Popen(
        command, cwd=cwd, env=os.environ | env, stdout=pipe, stderr=pipe, start_new_session=True
    )
    end = time.monotonic() + 300
    while not (found := [*cwd.glob("runs/demo/seed-*/accuracy/*.json")]):
        assert begun.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    os.killpg(begun.pid, signal.SIGINT)
    _, said = begun.communicate(timeout=30)  # until no process holds the pipes
    assert begun.returncode == 130
    assert said.decode().splitlines()[-1].startswith("latent-augment: interrupted")
    assert b"Traceback" not in said and b"SIGTERM" not in said
    assert len(found) < 12


def test_the_demo_of_the_wheel_prints_its_table_and_resumes(site: Path, tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(site)}
    where = run(
        sys.executable, "-c", "import augment; print(augment.__file__)", cwd=tmp_path, **env
    )
    assert where.stdout.startswith(str(site))
    command = (sys.executable, "-m", "augment.cli", "demo", "--seeds", "2")
    interrupt(*command, cwd=tmp_path, **env)
    first = run(*command, cwd=tmp_path, **env)
    assert first.returncode == 0, first.stderr[-2000:]
    records = json.loads((tmp_path / "runs/demo/results.json").read_text())
    rows = {record["row"]: record for record in records}
    names = ("real only", "real + classical augmentation", "real, twice the shots")
    assert rows.keys() >= {
        *names,
        *(f"real + centroids {r}" for r in ("fix/0", "fix/chm", "fade/chm")),
    }
    assert all(0.3 < record["accuracy"] < 1 and record["seeds"] == 2 for record in records)
    assert (
        rows["real, twice the shots"]["accuracy"]
        > rows["real + classical augmentation"]["accuracy"]
    )
    assert all(row in first.stdout for row in rows)
    assert (tmp_path / "runs/demo/sheet.png").stat().st_size > 10_000
    again = run(*command, cwd=tmp_path, **env)
    assert again.stdout == first.stdout, "a finished demo prints the same table at once"
    other = run(*command[:-1], "3", cwd=tmp_path, **env)
    assert other.returncode == 2 and "choose another --out" in other.stderr
