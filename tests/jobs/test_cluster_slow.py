"""Ray may lose workers, nodes and the driver; the files are those of an undisturbed run."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import snapshot

from augment.core.errors import AugmentWarning, UserError
from augment.core.files import replacing, write_bytes, write_json
from augment.jobs.job import run
from augment.jobs.ray import MAX_DEATHS, ray_pool

pytestmark = pytest.mark.slow
MARK = "AUGMENT_TEST_CLUSTER"
NODE = {"num_cpus": 1, "num_gpus": 1}


@dataclass(frozen=True)
class Squares:
    """Unit n writes n², and a line to a log that is not part of the job's folder."""

    path: Path
    fault: str = ""
    count: int = 12
    nap: float = 0.05
    title = "squares"

    def plan(self) -> list[int]:
        return [2] * self.count

    def committed(self, unit: int) -> int:
        record = self.path / f"{unit}.json"
        return record.stat().st_size if record.exists() else 0

    def start(self) -> Callable[[int], None]:
        return self.work

    def work(self, unit: int) -> None:
        with self.log.open("a") as log:
            log.write(f"{unit} {os.getpid()}\n")
        with replacing(self.path / f"{unit}.txt") as file:
            file.write(f"{unit**2} of {os.environ.get('WORLD_SIZE', 1)}".encode())
            time.sleep(self.nap)
            if unit >= 5 and self.fault == "nodes":
                wait_for(lambda: len(self.workers()) >= (3 if unit < 20 else 4))
            if unit == 5 and self.fault == "error":
                raise UserError("expected anything but a 5, got it; count on")
            dies = self.fault == "kill" or (self.fault == "kill once" and self.units()[5] == 1)
            if unit == 5 and dies:
                os.kill(os.getpid(), signal.SIGKILL)
        write_json(self.path / f"{unit}.json", {"unit": unit})

    def finish(self) -> None:
        write_bytes(self.path / "done.txt", b"done")

    @property
    def log(self) -> Path:
        return self.path.with_suffix(".log")

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def units(self) -> Counter[int]:
        """How often each unit was begun."""
        return Counter(int(line.split()[0]) for line in self.lines())

    def workers(self) -> set[str]:
        return {line.split()[1] for line in self.lines()}


def undisturbed(job: Squares) -> dict[str, bytes]:
    """The files of the same job done here."""
    other = replace(job, path=job.path.with_name("undisturbed"), fault="", nap=0.0)
    assert run(other)
    return snapshot(other.path)


def wait_for(event: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def marked(value: str) -> dict[int, str]:
    """The processes below one that had ``MARK=value`` in its environment, with their names."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={value}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def bury(value: str) -> None:
    """Wait until all that works is gone; Ray's agents outlive a killed raylet for a minute."""
    wait_for(lambda: all("Agent" in name for name in marked(value).values()), 90)
    for process in marked(value):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Three nodes with a GPU each, in name, on this machine; they think they are torchrun's."""
    from ray import cloudpickle
    from ray.cluster_utils import Cluster

    # a test module cannot be imported where the workers are
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, mark := str(tmp_path_factory.mktemp("cluster")))
        with patch.context() as ranks:
            ranks.setenv("WORLD_SIZE", "2")
            ranks.setenv("RANK", "1")
            head = NODE | {"_system_config": soon}
            cluster = Cluster(initialize_head=True, head_node_args=head)
            for _ in range(2):
                cluster.add_node(**NODE)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield cluster
        cluster.shutdown()
        bury(mark)
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_a_pool_writes_what_one_process_writes(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = Squares(Path("out"))
    assert run(job, "ray")
    assert snapshot(job.path) == undisturbed(job)
    assert set(job.units().values()) == {1}


def test_a_killed_worker_costs_its_unit(cluster: Any, tmp_path: Path) -> None:
    job = Squares(tmp_path / "out", "kill once")
    with pytest.warns(AugmentWarning, match="a worker died at unit 5"):
        assert run(job, "ray")
    assert snapshot(job.path) == undisturbed(job)
    assert job.units() == dict.fromkeys(range(12), 1) | {5: 2}


def test_a_unit_that_kills_its_workers_stops_the_job(cluster: Any, tmp_path: Path) -> None:
    job = Squares(tmp_path / "out", "kill")
    with (
        pytest.warns(AugmentWarning, match="unit 5"),
        pytest.raises(UserError, match=rf"expected unit 5 .* got {MAX_DEATHS} dead"),
    ):
        run(job, "ray")
    assert job.units() == dict.fromkeys(range(12), 1) | {5: MAX_DEATHS}
    assert sum(map(bool, map(job.committed, range(12)))) == 11


def test_an_error_in_a_unit_reaches_the_driver(cluster: Any, tmp_path: Path) -> None:
    import ray

    job = Squares(tmp_path / "out", "error")
    ray.init(log_to_driver=False)
    with pytest.raises(UserError, match=r"^expected anything but a 5, got it; count on$") as error:
        run(job, "ray")
    assert type(error.value) is UserError
    assert ray.is_initialized()  # it was ours, not the job's
    wait_for(lambda: ray.available_resources().get("GPU") == 3)
    ray.shutdown()
    assert run(replace(job, fault=""), "ray")
    assert snapshot(job.path) == undisturbed(job)


def test_a_folder_that_a_node_does_not_see_is_refused(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected .*/missing on every node"):
        list(ray_pool(Squares(tmp_path / "missing"), [0, 1]))


@pytest.mark.filterwarnings("ignore:a worker died")  # if it was amid a unit
def test_nodes_may_leave_and_join(cluster: Any, tmp_path: Path) -> None:
    job = Squares(tmp_path / "out", "nodes", count=30, nap=0.3)
    job.path.mkdir()
    changed = False
    for _ in ray_pool(job, range(30)):
        if not changed and len(job.workers()) == 3:
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
            cluster.add_node(**NODE)
            changed = True
    assert len(job.workers()) == 4
    assert sum(job.units().values()) <= 30 + 1
    assert all(map(job.committed, range(30)))
    assert run(job)
    assert snapshot(job.path) == undisturbed(job)


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_driver_leaves_units_and_no_worker(tmp_path: Path, sign: signal.Signals) -> None:
    job = Squares(tmp_path / "out", count=40, nap=1.0)
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests, tests.parent)))
    environment = os.environ | {MARK: str(tmp_path), "PYTHONPATH": paths}
    environment.pop("RAY_ADDRESS", None)
    driver = subprocess.Popen(
        (sys.executable, __file__, str(job.path)), env=environment, start_new_session=True
    )
    wait_for(lambda: len(job.units()) >= 6)
    if sign == signal.SIGINT:
        os.killpg(driver.pid, sign)  # as from a terminal
    else:
        driver.send_signal(sign)
    assert driver.wait(120)
    bury(str(tmp_path))
    assert 4 <= sum(map(bool, map(job.committed, range(40)))) < 40
    assert run(replace(job, nap=0.0))
    assert snapshot(job.path) == undisturbed(job)
    assert sum(job.units().values()) <= 40 + len(os.sched_getaffinity(0))


def test_without_ray_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'latent-augment\[ray\]'"):
        run(Squares(tmp_path / "out"), "ray")


def test_without_a_cluster_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**options: Any) -> None:
        raise ConnectionError(f"no answer from {options['address']}")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError, match=r"at 10\.0\.0\.1:6379, got no answer .* unset RAY_ADDRESS"):
        run(Squares(tmp_path / "out"), "ray")


if __name__ == "__main__":
    run(Squares(Path(sys.argv[1]), count=40, nap=1.0), "ray")
