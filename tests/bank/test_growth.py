"""What grows with banks and shards: what is kept of each image, and how often files are read."""

import gc
import importlib
import json
import pickle
import shutil
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import amend
from hypothesis import example, given
from hypothesis import strategies as st

import augment.bank.chunking
import augment.core.schema
from augment import LatentBank, Mixing, Planner, UserError, open_shards
from augment.bank.fill import InversionJob
from augment.bank.format import Chunk, Members, pack, unpack
from augment.core.errors import EnlargedWarning
from augment.core.files import sha256
from augment.inversion import inverter
from augment.jobs.job import run
from augment.plan.plan import Plan
from augment.plan.planner import distances, round_robin
from augment.sources import Folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
COUNTS = [300] * 10
KEPT = 60
"""Bytes of an image that an open bank may keep: its id, as text, and its share of the rest."""


@pytest.fixture(scope="module")
def large():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        return importlib.import_module("benchmarks.large")


@pytest.fixture(scope="module")
def root(large, tmp_path_factory):
    """A bank of 3000 images of ten classes, in 21 chunks."""
    folder = tmp_path_factory.mktemp("large") / "bank"
    large.bank_of(folder, COUNTS)
    return folder


@pytest.fixture
def reads(monkeypatch):
    """How often each file is read as JSON."""
    seen: Counter[Path] = Counter()
    whole = augment.core.schema.read_file

    def counted(path, *words):
        content = whole(path, *words)
        seen[path] += 1
        return content

    monkeypatch.setattr(augment.core.schema, "read_file", counted)
    return seen


def kept(call):
    """Bytes that what a function gives keeps in memory."""
    call()
    unpack.cache_clear()
    gc.collect()
    tracemalloc.start()
    try:
        result = call()
        unpack.cache_clear()
        gc.collect()
        return tracemalloc.get_traced_memory()[0], result
    finally:
        tracemalloc.stop()


def test_an_open_bank_keeps_little_more_than_the_names_of_its_images(root):
    size, bank = kept(lambda: LatentBank.open(root))
    assert sum(map(len, bank.members.values())) == 3000
    assert size / 3000 < KEPT
    assert not any(known.chunks for known in bank.manifest.classes)


def test_no_use_of_a_bank_makes_it_keep_more(root):
    def used():
        bank = LatentBank.open(root)
        bank.gather([Planner(bank.members, Mixing(members=8))(0, index) for index in range(20)])
        for name in bank.classes:
            bank.digests(name), bank.latents(name), bank.largest_mean(name)
        assert bank.digest == bank.digest and len(bank.subset(lambda i: i[-6] == "0").members) == 10
        return bank

    assert kept(used)[0] / 3000 < KEPT + 10


def test_no_image_of_an_open_bank_is_an_object(root):
    """A garbage collection looks at all there are, and forked workers copy them."""
    gc.collect()
    before = len(gc.get_objects())
    bank = LatentBank.open(root)
    gc.collect()
    assert len(gc.get_objects()) - before < 300
    assert bank.classes


def test_each_record_is_read_once_to_open_a_bank_and_once_to_find_it_full(large, root, reads):
    LatentBank.open(root)
    assert set(reads.values()) == {1} and len(reads) == 22
    reads.clear()
    assert run(large.job(root, COUNTS))
    assert set(reads.values()) == {1} and len(reads) == 22


def test_a_resumed_job_reads_each_record_once_and_none_that_it_wrote(
    gaussian, monkeypatch, pictures, reads, tmp_path
):
    """Also where one image is rejected, which is counted with those of the other units."""
    root = shutil.copytree(pictures, tmp_path / "images")
    broken = next((root / "bee").iterdir())
    broken.write_bytes(b"broken")
    monkeypatch.setattr("augment.bank.fill.CHUNK", 2)

    def job():
        method = inverter("ddim", steps=1)
        return InversionJob(tmp_path / "b", Folder(root), gaussian, method, max_rejects=0.5)

    assert run(job())
    records = sorted((tmp_path / "b").glob("*/*.json"))
    assert len(records) > 3 and not set(reads) & set(records)
    lost = [path for path in records if path.parent.name == "0001"]
    for path in lost:
        path.unlink()
    reads.clear()
    assert run(job())
    assert {path: reads[path] for path in records} == {path: path not in lost for path in records}
    assert broken.name in (tmp_path / "b" / "rejects.jsonl").read_text()


def test_each_shard_is_read_once_to_open_it(large, tmp_path, reads):
    large.shards_of(tmp_path / "s", 3)
    reads.clear()
    opened = open_shards(tmp_path / "s")
    assert set(reads.values()) == {1} and len(reads) == 4
    assert len(opened) == 3000 and opened.starts == [0, 1000, 2000, 3000]
    assert opened.targets == [key % 1000 for key in range(3000)]
    large.shards_of(tmp_path / "more", 9)
    sizes = [kept(lambda name=name: open_shards(tmp_path / name))[0] for name in ("s", "more")]
    assert (sizes[1] - sizes[0]) / 6000 < 50  # a row of 40, and an eighth that a buffer may spare


def test_one_record_at_a_time_is_in_memory_when_a_bank_goes_on(large, root):
    job = large.job(root, COUNTS)
    job.plan()
    tracemalloc.start()
    try:
        job.plan()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (peak - kept) / 3000 < 450, "of which two manifests are 200"


def test_members_are_a_mapping_of_tuples_like_the_dictionary_they_stand_for(root):
    bank = LatentBank.open(root)
    plain = dict(bank.members.items())
    assert bank.members == plain and plain == bank.members and list(bank.members) == bank.classes
    assert all(type(ids) is tuple and len(ids) == 300 for ids in bank.members.values())
    assert "nobody" not in bank.members and bank.members.get("nobody") is None
    assert bank.members != bank.subset(lambda i: not i.endswith("00000.JPEG")).members
    assert repr(bank.members) == "Members of 10 classes"
    with pytest.raises(KeyError):
        bank.members["nobody"]
    assert pickle.loads(pickle.dumps(bank)) == bank
    assert Planner(bank.members, Mixing(members=5))(3, 4) == Planner(plain, Mixing(members=5))(3, 4)


@given(st.lists(st.text(), unique=True))
@example(["a\nb", "\0", '"', "\udce9"])
def test_ids_come_back_from_where_they_are_packed(ids):
    assert list(unpack(pack(ids))) == ids
    assert pack(ids).isascii()
    assert Members({"ant": (pack(ids), pack(ids[:1]))})["ant"] == (*ids, *ids[:1])


def test_the_digest_of_a_bank_is_what_shards_of_older_versions_say(root):
    bank = LatentBank.open(root)
    content = []
    for name, chunks in bank.chunks.items():
        records = [json.loads(c.stem.with_suffix(".json").read_bytes()) for c in chunks]
        files = [[r["files"].get(k) for k in ("latents", "nulls")] for r in records]
        ids = [[image["id"] for image in r["images"]] for r in records]
        content.append([name, "", ids, files])
    assert bank.digest == sha256(json.dumps(content).encode())


def test_a_record_that_is_another_than_when_the_bank_was_opened_is_refused(large, tmp_path):
    large.bank_of(tmp_path / "b", [3, 2])
    bank = LatentBank.open(tmp_path / "b")
    known = bank.digests("n00000000")
    assert known == {i: sha256(i.encode()) for i in bank.members["n00000000"]}
    path = tmp_path / "b" / "0000" / "chunk-0000.json"
    record = json.loads(path.read_text())
    for harm in (
        lambda r: r["images"].reverse(),
        lambda r: r["files"]["latents"].update(sha256="0" * 64),
        lambda r: r["images"].pop(),
        lambda r: r.pop("rejects"),
    ):
        other = json.loads(json.dumps(record))
        harm(other)
        path.write_text(json.dumps(other))
        with pytest.raises(UserError, match="commit record"):
            bank.digests("n00000000")
    path.unlink()
    with pytest.raises(UserError, match="commit record"):
        bank.digests("n00000000")
    assert bank.digests("n00000001") and len(bank.latents("n00000000")) == 3


def test_an_image_that_is_there_twice_is_refused(large, tmp_path):
    def again(old, new):
        def change(record):
            text = json.dumps(record).replace(old, new)
            record.clear()
            record.update(json.loads(text))

        return change

    for bank, folder, new in (("b", "0001", "n00000000_00002"), ("c", "0000", "n00000000_00002")):
        large.bank_of(tmp_path / bank, [3, 2])
        name = f"n0000000{folder[-1]}"
        old = f"{name}/{name}_00001"
        for file in ("manifest.json", f"{folder}/chunk-0000.json"):
            amend(tmp_path / bank / file, again(old, f"n00000000/{new}"))
        with pytest.raises(UserError, match="some twice"):
            LatentBank.open(tmp_path / bank)


def test_members_that_a_view_does_not_show_are_refused(root):
    bank = LatentBank.open(root)
    name = bank.classes[4]
    hidden, shown = bank.members[name][280], bank.members[name][299]
    part = bank.subset(lambda image_id: image_id != hidden)
    assert part.gather([Plan.equal(4, name, [shown])])[0].shape[:2] == (1, 1)
    plans = [Plan.equal(4, name, [hidden, shown])]
    assert bank.gather(plans)[0].shape[:2] == (1, 2)
    with pytest.raises(UserError, match=hidden):
        part.gather(plans)
    with pytest.raises(UserError, match="nobody"):
        bank.gather([Plan.equal(4, "nobody", [shown])])


def test_the_rows_of_a_batch_are_those_of_its_classes(root):
    bank = LatentBank.open(root)
    plans = [Planner(bank.members, Mixing(members=5), classes=2)(0, index) for index in range(30)]
    points, _ = bank.gather(plans)
    for mine, plan in zip(points, plans, strict=True):
        for point, name, member in zip(mine, plan.classes, plan.members, strict=True):
            assert torch.equal(point, bank.latents(name)[bank.members[name].index(member)])


def test_enlarged_images_are_counted_over_all_records(large, root):
    job = large.job(root, COUNTS)
    assert job.backbone is not None
    job.backbone.resolution = 1000
    with pytest.warns(EnlargedWarning, match=r"got 3000 of 3000 .*n00000000_00000\.JPEG: 500"):
        run(job)


@pytest.mark.parametrize("width", [1, 7, 300_000])
def test_distances_do_not_depend_on_how_many_are_near(width):
    rows = torch.randn(9, width, generator=torch.Generator().manual_seed(0))
    assert torch.equal(distances(rows, rows[2]), (rows - rows[2]).double().norm(dim=1))
    assert distances(rows[:, :0], rows[0, :0]).tolist() == [0] * 9


def test_a_label_is_one_object_however_often_it_is_given():
    labels = round_robin({f"c{k}": 3 for k in range(1000)}, [f"c{k}" for k in range(1000)])
    assert labels == list(range(1000)) * 3
    assert len(set(map(id, labels))) == 1000 and {type(label) for label in labels} == {int}


def test_a_chunk_knows_what_its_record_says(root):
    bank = LatentBank.open(root)
    chunk = bank.chunks[bank.classes[0]][1]
    assert chunk.ids == [image.id for image in chunk.record.images]
    assert list(chunk.rows.values()) == list(range(44)) and chunk.rejects == ()
    assert chunk == Chunk.of(chunk.stem, chunk.record)
    assert np.allclose(chunk.means, bank.latents(bank.classes[0])[256:].mean((0, 2, 3)), atol=1e-3)


def test_the_suite_of_growth_goes_through(large):
    growth = importlib.import_module("benchmarks.growth")
    assert growth.long_tail(growth.IMAGENET_LT, 1000)[::999] == [1273, 5]
    assert growth.exponent({"size": 10, "seconds": 1.0}, {"size": 100, "seconds": 100.0}) == 2
    assert growth.exponent(None, {"size": 10, "seconds": 1.0}) is None
