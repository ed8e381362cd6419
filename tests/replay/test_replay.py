"""The replay pool: draws are whole images of the dataset, whatever happens to its generator."""

import contextlib
import copy
import gc
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import dataset_with, paint
from torch.utils.data import DataLoader
from tqdm import tqdm

from augment import MixedDataset, Mixing, Sampling, SyntheticDataset, UserError, fill_bank
from augment.core.errors import AugmentWarning
from augment.replay import store as slots
from augment.replay.pool import ReplayPool
from augment.sources import Folder


class Flat:
    """Images of one value each: its number modulo 251; they come 5 at a time, after a pause."""

    classes = ("even", "odd")

    def __init__(self, count: int = 40, size: int = 16, pause: float = 0.01) -> None:
        self.count, self.size, self.pause, self.epoch = count, size, pause, 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def image(self, number: int) -> torch.Tensor:
        return torch.full((3, self.size, self.size), number % 251 / 255)

    def __getitems__(self, rows: list[int]) -> list[tuple[torch.Tensor, int]]:
        for _ in tqdm(rows, "bar of the generator"):
            time.sleep(self.pause / len(rows))
        return [(self.image(self.epoch * self.count + row), row % 2) for row in rows]


class Stops(Flat):
    """It stops at a number, by an error or by sleeping."""

    def __init__(self, how: str, at: int) -> None:
        super().__init__()
        self.how, self.at = how, at

    def image(self, number: int) -> torch.Tensor:
        if number >= self.at and self.how == "sleeps":
            time.sleep(1000)
        if number >= self.at:
            raise RuntimeError("no more paint")
        return super().image(number)


class Soft(Flat):
    """Labels that are tensors."""

    def __getitems__(self, rows):
        images = super().__getitems__(rows)
        return [
            (image, torch.tensor([row, torch.get_num_threads()]))
            for row, (image, _) in zip(rows, images, strict=True)
        ]


def value(image: torch.Tensor) -> int:
    """The number of a flat image modulo 251, which no torn one has."""
    (found,) = (255 * image).unique().tolist()
    return round(found)


def generator(pool: ReplayPool) -> BaseProcess:
    return pool._stop.peek()[2][1]


def generators() -> int:
    return sum(child.name == "replay pool" for child in multiprocessing.active_children())


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return True


def nameless_files() -> list[str]:
    """List the files without a name that this process has open, as a pool's is."""
    found = []
    for place in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the folder itself is closed again
            found += [target for target in [str(place.readlink())] if target.endswith("(deleted)")]
    return found


def until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def warned(count: int = 1):
    """The warnings of a block, which end it; a bit later there are no more."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        yield seen
        until(lambda: len(seen) >= count)
        time.sleep(1.2)
    assert [warning.category for warning in seen] == [AugmentWarning] * count


@pytest.fixture(scope="module")
def flat():
    """A pool that is refilled all the time."""
    with ReplayPool(Flat(), 30, batch_size=5) as pool:
        yield pool


def test_draws_are_images_of_the_dataset_and_say_which(bank, gaussian):
    dataset = SyntheticDataset(
        bank, gaussian, Mixing(noise=0.3), Sampling(steps=3, batch_size=5), per_class=4
    )
    with ReplayPool(dataset, 7) as pool:
        assert pool.made >= 5, "one of each class, and a batch is whole"
        assert (pool.classes, pool.class_to_idx) == (dataset.classes, dataset.class_to_idx)
        until(lambda: pool.made > 40)
        records = [pool.record(slot) for slot in range(7)]
    assert len({(record.epoch, record.index) for record in records}) > 1
    for record in records:
        plan = pool.plan(record)
        assert (plan.epoch, plan.index) == (record.epoch, record.index)
        assert dataset.epoch == 0, "it is not touched"
        dataset.set_epoch(record.epoch)
        assert plan == dataset.plan(record.index)
        image, label = dataset[record.index]
        torch.testing.assert_close(record.image, image, rtol=0, atol=0.5 / 255 + 1e-4)
        assert torch.equal(record.image, (record.image * 255).round() / 255)
        assert (record.label, type(record.label)) == (label, int)
        dataset.set_epoch(0)


def test_images_come_in_order_epoch_by_epoch_and_replace_the_oldest(flat):
    until(lambda: flat.filled == 30)
    seen, start = set(), flat.made
    while flat.made < start + 90 or len(seen) <= 90:  # a busy machine lets us see fewer a round
        for slot in range(30):
            made = flat.made
            record = flat.record(slot)
            number = record.epoch * 40 + record.index
            assert value(record.image) == number % 251
            assert record.label == record.index % 2
            assert (number - slot) % 30 in (0, 1), "the next if this one is being written"
            assert made - 30 <= number <= flat.made
            seen.add((record.epoch, record.index))
    assert len(seen) > 90


def test_a_half_written_slot_is_skipped(flat):
    copied = copy.copy(flat)  # the test's own file
    copied.store = copy.copy(flat.store)
    slots = copied.store.slots = flat.store.slots.copy()
    whole = [value(flat_image) for flat_image, _ in (copied[i] for i in range(30))]
    for half in (slice(None, 300), slice(300, None), slice(None, 8)):
        slots[4, half], kept = slots[5, half], slots[4].copy()
        assert value(copied[4][0]) == whole[5]
        slots[4] = kept
    assert value(copied[4][0]) == whole[4]
    slots[:] = 0
    with pytest.raises(UserError, match="whole"):
        copied[4]


def test_a_pool_has_a_constant_length_and_ends(flat):
    assert len(flat) == 30 == len(list(flat))
    for beyond in (30, -31):
        with pytest.raises(IndexError):
            flat[beyond]
    assert isinstance(flat[-1][0], torch.Tensor)


def test_reuse_is_draws_by_images_made(flat):
    before = flat.draws
    flat[0], flat.record(0), flat.__getitems__([1, 2, 3])
    assert flat.draws == before + 4
    warned = flat.statistics()
    assert warned["draws"] == before + 4
    assert warned["reuse"] == pytest.approx(warned["draws"] / warned["made"], rel=0.1)
    assert 0 < warned["images_per_second"] <= 5 / 0.01
    assert warned["alive"] == 1.0


def test_no_draw_is_torn_by_a_fast_writer_nor_by_its_kill():
    with ReplayPool(Flat(size=200, pause=0.0), 3, batch_size=5) as pool:
        end, start = time.monotonic() + 1, pool.made
        while time.monotonic() < end:
            for slot in range(3):
                value(pool[slot][0])
        assert pool.made > start + 50
        with warned() as seen:
            os.kill(generator(pool).pid, signal.SIGKILL)
        assert "SIGKILL (out of memory?)" in str(seen[0].message)
        assert pool.statistics()["alive"] == 0.0
        made = pool.made
        assert len({value(pool[slot][0]) for slot in range(3)}) >= 2
        assert pool.made == made


def test_an_error_of_the_generator_ends_the_warm_up(capfd, tmp_path):
    others = generators()
    with pytest.raises(UserError, match="got RuntimeError: no more paint; see whether"):
        ReplayPool(Stops("raises", at=0), 30, tmp_path / "pool")
    assert generators() == others
    assert not list(tmp_path.iterdir())
    assert "in image" in capfd.readouterr().err, "its traceback"


def test_an_error_of_the_generator_is_told_once_and_draws_go_on():
    with warned() as seen, ReplayPool(Stops("raises", at=20), 30, batch_size=5, warm_up=20) as pool:
        until(lambda: pool.statistics()["alive"] == 0.0)
        assert {value(pool[slot][0]) for slot in range(30)} == set(range(20))
        until(lambda: seen)
    assert "RuntimeError: no more paint" in str(seen[0].message)


def test_no_draw_waits_for_a_generator_that_stalls_and_that_is_told_once():
    gc.collect()  # files that earlier tests left to the garbage collector
    before = len(nameless_files())
    pool = ReplayPool(Stops("sleeps", at=20), 30, batch_size=5, warm_up=20, stall_s=300)
    assert len(nameless_files()) > before
    assert pool.statistics()["alive"] == 1.0
    times = []
    with warned() as seen:
        pool.store.control["beat"] -= 300
        while not seen:
            start = time.perf_counter()
            pool[7]
            times.append(time.perf_counter() - start)
    assert sorted(times)[-1 - len(times) // 100] < 0.05
    assert "none for 300 s" in str(seen[0].message)
    assert pool.statistics()["alive"] == 0.0
    pid = generator(pool).pid
    assert not gone(pid)
    assert "deleted" in Path("/proc/self/maps").read_text()
    del pool
    gc.collect()
    until(lambda: gone(pid))
    until(lambda: len(nameless_files()) <= before)


def test_a_warm_up_wants_an_image_of_each_class_and_does_not_wait_for_ever():
    others = generators()
    with pytest.raises(UserError, match="none for 2 s"):
        ReplayPool(Stops("sleeps", at=1), 30, batch_size=1, stall_s=2)
    assert generators() == others


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_draw_from_the_same_pool_and_are_counted(flat, context):
    mixed = MixedDataset([(torch.zeros(3, 16, 16), 7)] * 9, flat, 0.5, length=60)
    synthetic = sum(mixed.draw(index)[0] for index in range(60))
    before = flat.draws
    loader = DataLoader(mixed, 6, num_workers=2, multiprocessing_context=context)
    drawn = [sample for images, labels in loader for sample in zip(images, labels, strict=True)]
    assert flat.draws == before + synthetic
    fake = [(value(image), label.item()) for image, label in drawn if label != 7]
    assert len(fake) == synthetic
    assert {label for _, label in fake} == {0, 1}
    assert flat.statistics()["alive"] == 1.0


def test_neither_a_forked_process_nor_an_interrupt_ends_the_pool(flat):
    pid = os.fork()
    if not pid:
        flat.close()
        os._exit(0)
    os.waitpid(pid, 0)
    os.kill(generator(flat).pid, signal.SIGINT)  # as Ctrl-C does, which is the trainer's to handle
    made = flat.made
    until(lambda: flat.made > made + 10)
    assert not gone(generator(flat).pid)


def test_the_generator_gives_way_to_the_trainer(flat):
    nice, pid = os.nice(0), generator(flat).pid
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(nice + 5, 19)


def test_transforms_are_applied_at_every_draw(flat):
    changed = copy.copy(flat)
    assert not vars(changed).keys() & {"dataset", "_stop"}, "what workers have no use for"
    changed.transform, changed.target_transform = torch.negative, str
    image, label = changed[3]
    assert image.max() <= 0
    assert label in ("0", "1")


def test_a_pool_on_disk_goes_on_where_it_was(tmp_path):
    path = tmp_path / "new" / "pool"
    with ReplayPool(Soft, 30, path, batch_size=5, warm_up=30, threads=2) as pool:
        record = pool.record(3)
        assert torch.equal(record.label, torch.tensor([record.index, 2]))
        assert record.image.shape == pool[3][0].shape
        with pytest.raises(UserError, match="ask that for the plan"):
            pool.plan(record)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slots, "PATIENCE_S", 0.2)
            with pytest.raises(UserError, match="another run draws from"):
                ReplayPool(Soft, 30, path)
    with pytest.raises(UserError, match="closed"):
        pool[0]
    made, width = pool.made, slots.PREFIX + pool.store.slot.itemsize
    with path.open("r+b") as file:  # as a kill leaves the slot that was to come
        file.seek(slots.CONTROL.itemsize + made % 30 * width + 100)
        file.write(b"half")
    with ReplayPool(Soft, 30, path, batch_size=1, warm_up=30) as pool:
        assert pool.draws == 1, "of the first run"
        until(lambda: pool.made > made)
        record = pool.record(made % 30)
        assert record.epoch * 40 + record.index == made
        assert 0 < pool.statistics()["images_per_second"] <= 100
    size = path.stat().st_size
    with pytest.raises(
        UserError,
        match=r"^expected a replay pool of capacity 20 at .*pool, got 30; choose another path",
    ):
        ReplayPool(Soft, 20, path)
    assert path.stat().st_size == size


@pytest.fixture
def store(tmp_path):
    """Make the file of a pool with a layout, or find it."""

    def store(**layout) -> slots.Store:
        found = slots.Store(*slots.named(tmp_path / "pool"))
        layout = {"capacity": 4, "form": [[3, 8, 8], "<i8", []], "classes": ["a"]} | layout
        try:
            found.control["ready"] = 0
            found.settle(layout)
            found.open()
        finally:
            slots.fcntl.flock(found.files[0], slots.fcntl.LOCK_UN)
        return found

    return store


OTHERS = {
    "capacity": {"capacity": 5},
    "shape": {"form": [[1, 8, 8], "<i8", []]},
    "labels": {"form": [[3, 8, 8], "<f4", [1]]},
    "classes": {"classes": ["b"]},
    "settings": {"steps": 3},
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_pool_is_refused_and_left_as_it_is(store, other, tmp_path):
    store().write(slots.Record(torch.ones(3, 8, 8), 1, 0, 0))
    assert store().read(0).label == 1
    with pytest.raises(UserError, match="choose another path"):
        store(**OTHERS[other])
    assert store().read(0).label == 1


HARMS = {
    "cut short": lambda content: content[:-9],
    "longer": lambda content: content + b"9",
    "of another kind": lambda content: b"9" + content,
    "of another layout": lambda content: content.replace(b'{"capacity', b'}"capacity'),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_file_is_refused_and_left_as_it_is(store, harm, tmp_path):
    store()
    path = tmp_path / "pool"
    path.write_bytes(HARMS[harm](path.read_bytes()))
    with pytest.raises(UserError, match="choose another path"):
        store()
    assert path.stat().st_size > 10_000


def test_a_file_that_was_never_finished_is_begun_again(store, tmp_path):
    (tmp_path / "pool").write_bytes(slots.MAGIC)
    assert store().read(0) is None


@pytest.mark.parametrize(
    "place", [lambda path: slots.named(path / "pool"), lambda _: slots.nameless()]
)
def test_no_room_is_told_before_anything_is_written(tmp_path, place):
    found = slots.Store(*place(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * slots.CONTROL.itemsize, hard))
    try:
        with pytest.raises(UserError, match=r"room for a replay pool of .* bytes in .*: File too"):
            found.settle({"capacity": 10**6, "form": [[3, 8, 8], "<i8", []]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not found.control["layout"].item()
    assert all(os.fstat(file).st_size == slots.CONTROL.itemsize for file in found.files)


def test_images_that_do_not_fit_are_refused(store):
    found = store()
    found.write(slots.Record(torch.tensor([-1.0, 2.0]).repeat(3, 8, 4), 1, 0, 0))
    assert found.read(0).image.unique().tolist() == [0, 1]
    for image, label in [
        (torch.ones(1, 8, 8), 1),
        (torch.ones(3, 8, 8), 1.5),
        (torch.ones(3, 8, 8), torch.ones(1, dtype=int)),
    ]:
        with pytest.raises(UserError, match="as the first"):
            found.write(slots.Record(image, label, 0, 1))
    assert found.control["made"] == 1
    for image in (torch.ones(3, 8, 8, dtype=torch.uint8), torch.ones(8, 8), "image"):
        with pytest.raises(UserError, match="give other transforms to the pool"):
            slots.form_of(image, 1)


@pytest.mark.parametrize("other", [{"rule": "lin/0"}, {"steps": 4}, {"seed": 1}, {"members": 1}])
def test_a_file_of_images_made_otherwise_is_told_apart(bank, gaussian, other):
    datasets = [
        dataset_with(bank, gaussian, **{"steps": 3} | options) for options in ({}, {}, other)
    ]
    first, second, third = (slots.layout_of(data, data[0], 4) for data in datasets)
    assert first == second != third


def test_a_file_of_another_bank_s_images_is_told_apart(bank, gaussian, tmp_path):
    """The ids of both are the same."""
    other = fill_bank(tmp_path / "bank", gaussian, Folder(paint(tmp_path / "x", seed=1)), steps=4)
    assert other.members == bank.members
    layouts = [
        slots.layout_of(data, data[0], 4)
        for data in (dataset_with(one, gaussian, steps=3) for one in (bank, other))
    ]
    assert layouts[0] != layouts[1]


def test_a_pool_may_have_fewer_items_than_classes_and_items_without_names(bank, gaussian):
    data = dataset_with(bank, gaussian, steps=3, per_class={bank.classes[-1]: 1})
    assert len(data) < len(bank.classes)
    assert slots.layout_of(data, data[0], 4)["length"] == 1
    plain = [(torch.rand(3, 8, 8), 0)] * 3
    assert slots.layout_of(plain, plain[0], 4)["classes"] == []


def test_images_out_of_range_are_refused():
    for values in ([0.0, 1.5], [-0.5, 1.0], [0.0, float("nan")]):
        with pytest.raises(UserError, match=r"images in \[0, 1\], got one from"):
            slots.layout_of(Flat(), (torch.tensor(values).repeat(3, 8, 4), 1), 4)


def test_a_pool_leaves_half_of_the_memory_to_others_and_goes_to_disk(monkeypatch):
    store = slots.Store(*slots.nameless())
    assert len(store.files) == 2
    monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result((1, 1, 0, 0, 2**21, *[0] * 5)))
    store.settle({"capacity": 4, "form": [[3, 8, 8], "<i8", []]})
    assert store.control["ready"] == 1
    store = slots.Store(*slots.nameless())
    store.settle({"capacity": 2000, "form": [[3, 8, 8], "<i8", []]})
    assert store.control["ready"] == 2
    assert store.open()
    assert store.slots.shape[0] == 2000
    assert os.fstat(store.files[1]).st_blocks * 512 >= os.fstat(store.files[1]).st_size
    assert [os.fstat(file).st_size < 10**6 + 10**5 for file in store.files] == [True, False]


def test_processes_whose_numbers_are_4096_apart_count_their_draws_apart(flat, monkeypatch):
    def draw():
        monkeypatch.setattr(os, "getpid", lambda: number + 4096)
        flat.__getitems__([0, 1, 2])

    flat.__getitems__([0])
    before, number = flat.store.control["draws"].copy(), os.getpid()
    other = multiprocessing.get_context("fork").Process(target=draw)
    other.start()
    other.join()
    flat.__getitems__([0, 1])
    added = flat.store.control["draws"] - before
    assert sorted(added[added > 0].tolist()) == [2, 3]


BAD = {
    "no room for two": {"capacity": 1},
    "more to wait for than there is room": {"warm_up": 31},
    "nothing to wait for": {"warm_up": 0},
    "no batch": {"batch_size": 0},
    "no threads": {"threads": 0},
    "no time": {"stall_s": 0},
    "not a time": {"stall_s": float("nan")},
    "a folder": {"path": "/tmp"},
    "nowhere": {"path": "/proc/pool"},
    "what cannot be pickled": {"dataset": lambda: Flat()},
}


NAMES = {"no room for two": "capacity 2", "more to wait for than there is room": "capacity 31"}
"""What the refusals of numbers say; by default the name of the parameter."""


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_is_refused_before_a_process_is_started(bad):
    others = generators()
    (name, value) = next(iter(BAD[bad].items()))
    said = NAMES.get(bad, f"{name} of" if isinstance(value, int | float) else "expected")
    with pytest.raises(UserError, match=said):
        ReplayPool(**{"dataset": Flat(), "capacity": 30} | BAD[bad])
    assert generators() == others


SCRIPT = """
    import os, signal, weakref
    weakref.finalize(signal, id, 0)  # as of any library: those run after multiprocessing's end now
    from test_replay import Flat, generator
    from augment.replay.pool import ReplayPool

    if __name__ == "__main__":
        pool = ReplayPool(Flat(), 30)
        pid = generator(pool).pid
        print(pid, flush=True)
        {then}
"""


@pytest.mark.parametrize("then", ["os.kill(pid, signal.SIGSTOP)", "signal.pause()"])
def test_nothing_outlives_the_trainer(tmp_path, then):
    """It ends by itself, with a generator that is stopped; or it is killed."""
    script, temporary = tmp_path / "script.py", tmp_path / "temporary"
    script.write_text(textwrap.dedent(SCRIPT.format(then=then)))
    temporary.mkdir()
    memory = set(Path("/dev/shm").iterdir())
    path = os.pathsep.join(path for path in sys.path if path)
    trainer = subprocess.Popen(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    pid = int(trainer.stdout.readline())
    if "pause" in then:
        assert not gone(pid)
        trainer.kill()
    _, complaints = trainer.communicate(timeout=60)
    until(lambda: gone(pid))
    assert not re.search("expected|Error|Warning|generator", complaints)
    assert set(Path("/dev/shm").iterdir()) <= memory
    assert not list(temporary.iterdir())
