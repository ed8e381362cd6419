"""No damaged byte of a shard is read in silence, and no hostile tar does harm."""

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import snapshot
from PIL import Image
from shard_folders import fill, picture, plan, put, rewrite, sane

from augment import UserError
from augment.core.errors import AugmentWarning, Damaged
from augment.shards.dataset import encode, open_shards, verify_shard
from augment.shards.export import export_folder, to_webdataset
from augment.shards.format import (
    read_table,
    shard_path,
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 3 and 2 PNG images, not to be damaged."""
    return fill(tmp_path_factory.mktemp("shards") / "folder")


# --- damage


@pytest.mark.parametrize("lying", [False, True])
def test_every_truncation_is_found(lying, tmp_path):
    """Also if the record is of the truncated tar."""
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    content = path.read_bytes()
    assert verify_shard(path, 2, "png") is None
    for size in range(0, len(content), 512):
        put(path, content[:size]) if lying else path.write_bytes(content[:size])
        assert verify_shard(path, 2, "png")
        if not lying:
            with pytest.raises(UserError, match=r"shard-000000\.tar.*of \d+ bytes"):
                open_shards(tmp_path / "s")
        sane(tmp_path / "s")


def test_a_shard_that_shrinks_while_it_is_open_is_refused(tmp_path):
    opened = open_shards(fill(tmp_path / "s"))
    os.truncate(shard_path(tmp_path / "s", 1), 520)
    assert opened[2][1] == 0
    for ask in (opened.__getitem__, opened.read, opened.about):
        with pytest.raises(UserError, match=r"image 3 in .*shard-000001\.tar, got an early end"):
            ask(3)


def test_every_flipped_bit_is_found(tmp_path):
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    content = path.read_bytes()
    for place in range(0, len(content), 11):
        path.write_bytes(flipped(content, place))
        assert verify_shard(path, 2, "png"), place
    path.write_bytes(content)
    assert verify_shard(path, 2, "png") is None


def test_a_flipped_bit_in_a_header_or_label_is_found_with_a_record_of_it(tmp_path):
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    content = path.read_bytes()
    for block in (0, 2, 3, 4):  # image header, label header, label, JSON header
        for place in range(0, 512, 7):
            put(path, flipped(content, 512 * block + place))
            assert verify_shard(path, 2, "png"), (block, place)
            if block == 4:
                with pytest.raises(UserError, match=r"got something else where 00000000\.json"):
                    open_shards(path.parent).about(0)


def test_no_flipped_bit_of_a_tar_is_read_otherwise_in_silence(tmp_path):
    """What is read is the same, or is refused."""
    path = shard_path(fill(tmp_path / "s", (2,), "jpg"), 0)
    content, opened = path.read_bytes(), open_shards(tmp_path / "s")

    def answers() -> list[object]:
        found: list[object] = []
        for index in (0, 1):
            for ask in (opened.read, opened.about):
                try:
                    found.append(ask(index))
                except UserError as error:
                    assert "shard-000000.tar" in str(error)
                    found.append(None)
        return found

    honest, bits = answers(), random.Random(0).sample(range(8 * len(content)), 3000)
    refused = 0
    with path.open("r+b", buffering=0) as file:
        for place, bit in (divmod(number, 8) for number in bits):
            os.pwrite(file.fileno(), bytes([content[place] ^ 1 << bit]), place)
            found = answers()
            os.pwrite(file.fileno(), content[place : place + 1], place)
            refused += None in found
            assert all(x in (None, y) for x, y in zip(found, honest, strict=True)), (place, bit)
    assert refused > 300


@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_another_number_in_a_record_is_not_read_in_silence(place, tmp_path):
    """Key, label, offset and size: each is known by the digest of what it leads to."""
    folder = fill(tmp_path / "s", (2,))
    rows = read_table(shard_path(folder, 0), 2)[0].samples
    rows[1][place] += -1 if place in (1, 3) else 1
    rewrite(shard_path(folder, 0), samples=rows)
    opened = open_shards(folder)
    with pytest.raises(UserError, match="shard-000000"):
        opened[1], opened.about(1)
    assert opened[0][1] == 0


def without_digests(folder: Path) -> Path:
    """The folder as older versions wrote it."""
    for path in folder.glob("shard-*.json"):
        record = json.loads(path.read_bytes()) | {"schema": 1}
        path.write_text(json.dumps({k: record[k] for k in record if k not in ("crc32", "digest")}))
    return folder


def test_shards_without_digests_are_read_with_one_warning(tmp_path):
    folder = without_digests(fill(tmp_path / "s"))
    with pytest.warns(AugmentWarning, match="older version wrote without") as message:
        opened = open_shards(folder)
    assert len(message) == 1
    assert [label for _, label in opened] == [0, 1, 0, 1, 0]
    assert opened.plan(3) == plan(3)
    assert [verify_shard(shard_path(folder, number), 2, "png") for number in (0, 1)] == [None] * 2


@pytest.mark.parametrize("digests", ["", "0" * 16, "x" * 48, "0" * 47 + "é", 3, None, [0, 0, 0]])
def test_digests_of_another_form_are_refused(digests, tmp_path):
    folder = fill(tmp_path / "s")
    rewrite(shard_path(folder, 0), crc32=digests)
    with pytest.raises(Damaged, match=r"samples of another form|crc32"):
        open_shards(folder)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


# --- hostility

Members = list[tuple[tarfile.TarInfo, bytes]]


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def replaced(members: Members, place: int, *new: tuple[tarfile.TarInfo, bytes]) -> Members:
    return [*members[:place], *new, *members[place + 1 :]]


def of_type(kind: bytes) -> Callable[[Members], Members]:
    """The first image is a link, a device or the like."""
    name = "00000000.png"
    return lambda members: replaced(members, 0, member(name, b"", kind, "/etc/passwd"))


def with_more(*names: str, content: bytes = b"x") -> Callable[[Members], Members]:
    return lambda members: [*members, *(member(name, content) for name in names)]


def in_front(*names: str, content: bytes = b"x") -> Callable[[Members], Members]:
    return lambda members: [*(member(name, content) for name in names), *members]


def with_pax(**headers: str) -> Callable[[Members], Members]:
    def harm(members: Members) -> Members:
        members[0][0].pax_headers = {name.replace("_", "."): v for name, v in headers.items()}
        return members

    return harm


def with_content(place: int, content: bytes) -> Callable[[Members], Members]:
    return lambda members: replaced(members, place, member(members[place][0].name, content))


def png(width: int, height: int) -> bytes:
    """The beginning of a huge image."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    chunks = chunk(b"IHDR", ihdr), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def white(size: int) -> bytes:
    """A few kilobytes that decode to more pixels than an image of ours may have."""
    buffer = io.BytesIO()
    Image.new("1", (size, size), 1).save(buffer, "PNG")
    return buffer.getvalue()


class Boom:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def pickles(members: Members) -> Members:
    """What webdataset's own decoders would run, in both samples and behind."""
    bomb = pickle.dumps(Boom("executed"))
    suffixes = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "mp")
    bombs = [member(f"0000000{key}.{suffix}", bomb) for suffix in suffixes for key in (0, 1)]
    return [*members[:3], *bombs[::2], *members[3:], *bombs[1::2]]


def fixed(header: bytearray) -> bytes:
    """A header with its checksum put right."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def sparse(content: bytes) -> bytes:
    """The first image is an old GNU sparse file of 8 GB, of which 512 bytes are stored."""
    head = bytearray(content[:512])
    head[156:157] = tarfile.GNUTYPE_SPARSE
    head[257:265] = b"ustar  \0"
    head[386:410] = b"%011o\0%011o\0" % (0, 512)
    head[483:495] = b"%011o\0" % (8**11 - 1)
    return fixed(head) + content[512:]


def of_size(field: bytes) -> Callable[[bytes], bytes]:
    def harm(content: bytes) -> bytes:
        head = bytearray(content[:512])
        head[124:136] = field
        return fixed(head) + content[512:]

    return harm


def many(content: bytes) -> bytes:
    info, _ = member("00000009.png")
    return content[:-1024] + info.tobuf(tarfile.USTAR_FORMAT) * 100_000 + bytes(1024)


LISTS: dict[str, Callable[[Members], Members]] = {
    "..": with_more("../../00000002.png"),
    "absolute": in_front("/00000002.png"),
    "symlink": of_type(tarfile.SYMTYPE),
    "hard link": of_type(tarfile.LNKTYPE),
    "character device": of_type(tarfile.CHRTYPE),
    "block device": of_type(tarfile.BLKTYPE),
    "fifo": of_type(tarfile.FIFOTYPE),
    "folder": of_type(tarfile.DIRTYPE),
    "unknown type": of_type(b"Z"),
    "pax sparse": with_pax(
        GNU_sparse_major="1", GNU_sparse_minor="0", GNU_sparse_realsize=str(10**12)
    ),
    "pax size": with_pax(size=str(2**62)),
    "pax path": with_pax(path="../../x.png"),
    "pickles": pickles,
    "more members": with_more("00000002.png", "00000002.cls", "00000002.json"),
    "members in front": in_front("0.cls", "0.json"),
    "duplicates": lambda members: members * 2,
    "duplicate member": lambda members: [*members, members[0]],
    "fewer members": lambda members: members[:-1],
    "other order": lambda members: [members[0], members[2], members[1], *members[3:]],
    "samples mixed up": lambda members: members[3:] + members[:3],
    "nothing": lambda members: [],
    "other name": lambda members: replaced(members, 0, member("x.png", members[0][1])),
    "hidden": with_more("__meta__"),
    "empty image": with_content(0, b""),
    "no image": with_content(0, b"GIF89a" + bytes(50)),
    "image of another format": with_content(0, encode(picture(0), "jpg")),
    "bomb": with_content(0, png(50_000, 50_000)),
    "readable bomb": with_content(0, white(9000)),
    "truncated image": with_content(0, encode(picture(0), "png")[:-30]),
    "pickle as label": with_content(1, pickle.dumps(Boom("executed"))),
    "another label": with_content(1, b"1"),
    "a label in other digits": with_content(1, "٠".encode()),
    "a label with a blank": with_content(1, b"0\n"),
    "pickle as JSON": with_content(2, pickle.dumps(Boom("executed"))),
    "deep JSON": with_content(2, b"[" * 100_000),
    "deep object": with_content(2, b'{"plan":' * 100_000 + b"1" + b"}" * 100_000),
    "JSON that is no object": with_content(2, b"3"),
    "JSON of long integers": with_content(2, b'{"plan": ' + b"9" * 5000 + b"}"),
}
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "GNU sparse": sparse,
    "absurd size": of_size(b"7" * 11 + b"\0"),
    "size of 70 bits": of_size(b"\x80\0\0" + b"\xff" * 9),
    "negative size": of_size(b"\xff" * 12),
    "size with a sign": of_size(b"-0000000001\0"),
    "size that is no number": of_size(b"12_4 abcdef\0"),
    "many members": many,
    "gzip": gzip.compress,
    "zeros": lambda content: bytes(len(content)),
    "more zeros": lambda content: content + bytes(10240),
    "one block at the end": lambda content: content[:-512],
    "padding in use": lambda content: content[:-1025] + b"x" + content[-1024:],
    "nothing at all": lambda content: b"",
}


def harm_list(path: Path, harm: Callable[[Members], Members]) -> None:
    """Write another tar, and its record as whoever made it would: with the true offsets."""
    with tarfile.open(path) as tar:
        old = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in harm(old):
            tar.addfile(info, io.BytesIO(content))
    content, found = buffer.getvalue()[: tar.offset - 1024] + bytes(1024), {}
    with suppress(tarfile.TarError, ValueError), tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = {info.name: [info.offset_data, min(info.size, 2**26)] for info in tar}
    rows = read_table(path, 2)[0].samples
    rows = [[*row[:2], *found.get(f"{row[0]:08d}.png", row[2:])] for row in rows]
    put(path, content, samples=sorted(rows))


def test_the_hostile_tars_differ_from_an_honest_one_by_the_harm_alone(tmp_path):
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    before = path.read_bytes()
    harm_list(path, lambda members: members)
    assert path.read_bytes() == before
    assert verify_shard(path, 2, "png") is None


def test_the_pickles_would_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Boom("executed")))
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("harm", [*LISTS, *BYTES])
def test_a_hostile_tar_is_told_and_does_no_harm(harm, tmp_path, monkeypatch):
    """Its record has the right digest."""
    monkeypatch.chdir(tmp_path)
    folder = fill(tmp_path / "s", (2,))
    path = shard_path(folder, 0)
    if harm in LISTS:
        harm_list(path, LISTS[harm])
    else:
        put(path, BYTES[harm](path.read_bytes()))
    before, start = snapshot(tmp_path), time.monotonic()
    assert verify_shard(path, 2, "png")
    sane(folder)
    with suppress(UserError):
        for image, label in to_webdataset(folder):
            assert image.shape == (3, 8, 8)
            assert label in (0, 1)
    with suppress(UserError):
        export_folder(folder, tmp_path / "out")
    after = {name: x for name, x in snapshot(tmp_path).items() if name.split("/")[0] != "out"}
    assert after == before, "something was executed or extracted"
    assert time.monotonic() - start < 5


def test_a_hole_of_a_petabyte_is_not_read(tmp_path):
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    size = 2**43
    os.truncate(path, size)
    rewrite(path, bytes=size)
    start = time.monotonic()
    assert verify_shard(path, 2, "png") == "its record is not of its samples"
    assert open_shards(tmp_path / "s").targets == [0, 1]
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("kind", [os.mkfifo, os.mkdir])
def test_a_tar_that_is_no_file_is_refused(kind, tmp_path):
    path = shard_path(fill(tmp_path / "s", (2,)), 0)
    path.unlink()
    kind(path)
    assert verify_shard(path, 2, "png") == "no tar"
    with pytest.raises(UserError, match="no tar"):
        open_shards(tmp_path / "s")
