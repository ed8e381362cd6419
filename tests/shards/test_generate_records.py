"""Records of jobs: hostile, lost, damaged, or of an older version."""

import json
import os
import random
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from conftest import COUNTS, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_folders import small_job

from augment import (
    LatentBank,
    Planner,
    Synthesizer,
    UserError,
    open_shards,
)
from augment.core.errors import AugmentWarning, Damaged
from augment.core.files import sha256
from augment.core.schema import sealed
from augment.diffusion.sampling import Sampling
from augment.jobs.job import run
from augment.plan.mixing import Mixing
from augment.shards.format import Output, repair_settings, shard_path
from augment.shards.verify import inspect, verify
from augment.shards.write import ShardJob, write_shards
from augment.synthesis.filters import Reference

QUIET = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Dark:
    """Scores by darkness; keeps what is darker than the median of what the plans give."""

    minimum: float | None = -0.5

    def prepare(self, reference: Reference):
        assert reference.classes == list(COUNTS)
        assert [len(reference.real(label)) for label in range(3)] == list(COUNTS.values())
        return lambda images, labels: -images.flatten(1).mean(1)


@pytest.fixture
def make(bank, gaussian, tmp_path):
    return partial(small_job, tmp_path, bank, gaussian)


@pytest.fixture(scope="module")
def hostile(bank, tmp_path_factory) -> Path:
    return shutil.copytree(bank.path, tmp_path_factory.mktemp("hostile") / "bank")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e40, 1e40) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


def read_all(path: Path) -> None:
    """Everything that reads a bank's records gives an answer or one of our errors."""
    for read in (
        lambda: [LatentBank.open(path).largest_mean(name) for name in COUNTS],
        lambda: inspect(path),
        lambda: verify(path),
    ):
        try:
            read()
        except UserError as error:
            assert "expected" in str(error)


@QUIET
@given(st.sampled_from(["manifest.json", "0001/chunk-0000.json"]), st.binary(max_size=200))
def test_arbitrary_bytes_for_a_record_are_one_of_our_errors(hostile, name, content):
    before = (hostile / name).read_bytes()
    (hostile / name).write_bytes(content)
    try:
        read_all(hostile)
    finally:
        (hostile / name).write_bytes(before)


def places(value, path=()):
    """The path of every value in a JSON record."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))


@QUIET
@given(st.data(), st.sampled_from(["manifest.json", "0001/chunk-0000.json"]))
def test_any_value_in_any_place_of_a_record_is_one_of_our_errors(hostile, data, name):
    before = (hostile / name).read_text()
    record = json.loads(before)
    *way, last = data.draw(st.sampled_from([place for place in places(record) if place]))
    inner = record
    for key in way:
        inner = inner[key]
    if data.draw(st.booleans()):
        inner[last] = data.draw(JSON)
    else:
        del inner[last]
    record.pop("digest", None)  # it is hostile, not damaged
    (hostile / name).write_bytes(sealed(record))
    try:
        read_all(hostile)
    finally:
        (hostile / name).write_text(before)


@QUIET
@given(st.data())
def test_any_value_in_any_place_of_a_shards_record_is_one_of_our_errors(drawn, data):
    path = drawn / "shard-000000.json"
    before = path.read_text()
    record = json.loads(before)
    *way, last = data.draw(st.sampled_from([place for place in places(record) if place]))
    inner = record
    for key in way:
        inner = inner[key]
    inner[last] = data.draw(JSON)
    path.write_text(json.dumps(record))
    try:
        for read in (inspect, verify, open_shards):
            try:
                read(drawn)
            except UserError as error:
                assert "expected" in str(error)
    finally:
        path.write_text(before)


@pytest.fixture(scope="module")
def drawn(bank, gaussian, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("drawn") / "shards"
    synthesizer = Synthesizer(gaussian, bank, sampling=Sampling(steps=2))
    write_shards(synthesizer, Planner(bank.members), 2, path, filters={"dark": Dark()})
    return path


def test_a_shard_is_the_same_whatever_its_neighbours_are(bank, gaussian, tmp_path):
    """Plans and images of a shard depend on its number, not on how many shards there are."""
    synthesizer = Synthesizer(gaussian, bank, sampling=Sampling(steps=2, batch_size=4))
    few = write_shards(synthesizer, Planner(bank.members), 4, tmp_path / "few", shard_size=6)
    many = write_shards(synthesizer, Planner(bank.members), 8, tmp_path / "many", shard_size=6)
    assert len(many) == 2 * len(few)
    for name in ("shard-000000.tar", "shard-000001.tar"):
        assert (tmp_path / "few" / name).read_bytes() == (tmp_path / "many" / name).read_bytes()


# --- a lost or damaged synthesis.json


@pytest.mark.parametrize("harm", [None, b"", b"{}", b"[]", "bit", "half"])
def test_lost_settings_are_made_again_from_the_shards(harm, make, tmp_path):
    """By the same command, whether the job was finished or not, and by repair."""
    assert run(make())
    whole, file = snapshot(tmp_path / "out"), tmp_path / "out" / "synthesis.json"
    content = whole["synthesis.json"]
    damaged = {"bit": bytes([content[0] ^ 1]) + content[1:], "half": content[: len(content) // 2]}

    def lose() -> None:
        file.unlink()
        if harm is not None:
            file.write_bytes(damaged.get(harm, harm))

    lose()
    with pytest.raises(UserError):
        open_shards(tmp_path / "out")
    assert "made again" in repair_settings(tmp_path / "out")
    assert snapshot(tmp_path / "out") == whole
    assert "as it was written" in repair_settings(tmp_path / "out")
    for number in (1, 2):
        lose()
        shard_path(tmp_path / "out", number).with_suffix(".json").unlink()
        assert run(make())
        assert snapshot(tmp_path / "out") == whole
    lose()
    with pytest.raises(UserError, match=r"others \(alpha\)"):
        run(make(alpha=0.5))
    lose()
    for number in (0, 1):
        shard_path(tmp_path / "out", number).with_suffix(".json").unlink()
    with pytest.raises(UserError, match="shard 0 or 1"):
        repair_settings(tmp_path / "out")
    with pytest.raises(UserError, match=r"--repair|folder in use|no JSON"):
        run(make())


@pytest.mark.parametrize("name", ["synthesis.json", "shard-000000.json"])
def test_no_flipped_bit_of_a_record_of_shards_is_read(name, make, tmp_path):
    assert run(make(shard_size=24))
    file, generator = tmp_path / "out" / name, random.Random(0)
    content = file.read_bytes()
    for bit in generator.sample(range(8 * len(content)), 400):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        with pytest.raises(Damaged):
            open_shards(tmp_path / "out")


def old(folder: Path) -> Path:
    """The folder as versions without digests wrote it."""
    settings = json.loads((folder / "synthesis.json").read_bytes()) | {"schema": 1, "members": None}
    del settings["digest"]
    (folder / "synthesis.json").write_text(json.dumps(settings))
    digest = sha256(json.dumps(settings, sort_keys=True).encode())
    for path in folder.glob("shard-*.json"):
        record = json.loads(path.read_bytes()) | {"schema": 1, "settings": digest}
        known = {key: record[key] for key in record if key not in ("digest", "crc32", "synthesis")}
        path.write_text(json.dumps(known))
    (folder / "_info.json").unlink()
    return folder


def test_a_job_of_an_older_version_goes_on(bank, gaussian, tmp_path):
    def job() -> ShardJob:
        made = Synthesizer(gaussian, bank, sampling=Sampling(steps=2))
        planner = Planner(bank.members, Mixing(noise=0.3))
        return ShardJob(tmp_path / "out", made, planner, 8, Output(shard_size=10))

    assert run(job())
    before = snapshot(old(tmp_path / "out"))
    shard_path(tmp_path / "out", 1).with_suffix(".json").unlink()
    assert run(job())
    after = snapshot(tmp_path / "out")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"shard-000001.json", "_info.json"}
    assert verify(tmp_path / "out") == []
    with pytest.warns(AugmentWarning, match="an older version"):
        assert len(open_shards(tmp_path / "out")) == 24


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_not_taken_for_damage(make, tmp_path):
    assert run(make())
    for suffix in (".tar", ".json"):
        path = shard_path(tmp_path / "out", 1).with_suffix(suffix)
        path.chmod(0)
        findings = verify(tmp_path / "out")
        assert len(findings) == 1
        assert findings[0].record is None
        with pytest.raises(UserError, match="nothing is known to be wrong"):
            open_shards(tmp_path / "out")[-1]
        path.chmod(0o644)


def test_a_disk_that_fails_is_not_taken_for_damage(make, monkeypatch, tmp_path):
    assert run(make())
    read = os.pread

    def fail(file: int, size: int, offset: int) -> bytes:
        if offset > 3000:
            raise OSError(5, "Input/output error")
        return read(file, size, offset)

    monkeypatch.setattr(os, "pread", fail)
    findings = verify(tmp_path / "out")
    assert {finding.record for finding in findings} == {None}
    assert all("Input/output error" in finding.what for finding in findings)
    with pytest.raises(UserError, match="nothing is known to be wrong"):
        open_shards(tmp_path / "out")[-1]
