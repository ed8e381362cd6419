"""Files are read as a viewer shows them, and what is not read is said."""

import io
import json
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from conftest import paint
from PIL import Image, ImageCms, PngImagePlugin

from augment import UserError, cli, fill_bank
from augment.commands import split_names
from augment.config import quote_names
from augment.core.errors import AugmentWarning, ImageRejected
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.networks.frozen import normalise
from augment.shards.dataset import Flaw, decode
from augment.shards.verify import inspect
from augment.sources import FewShot, Folder, Items, ListFile, Slice, Source, decoding, images
from augment.sources.decoding import open_image
from augment.sources.images import decode_image, fit, prepare, to_channels
from augment.synthesis.filters.degenerate import statistics
from augment.training.data.module import ImageData
from augment.training.data.transforms import Augmentation, evaluation

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "odd": (17, 99, 200)}


def written(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corner(content: bytes, background: str = "white") -> tuple[int, ...]:
    return open_image(content, background).convert("RGB").getpixel((0, 0))


@pytest.mark.parametrize("colour", COLOURS)
def test_grey_is_the_same_grey_everywhere(colour):
    image = Image.new("RGB", (16, 16), COLOURS[colour])
    grey = image.convert("L").getpixel((0, 0)) / 255
    tensor = torch.tensor(COLOURS[colour]).view(3, 1, 1).expand(3, 16, 16) / 255
    seen = {
        "bank": decode_image(written(image), 1, 16),
        "test": evaluation(1, 16)(image),
        "training": Augmentation().fixed(1, 16)(image) / 255,
        "training on synthetic": Augmentation().fixed(1, 16)(tensor) / 255,
        "synthetic": prepare(tensor[None], 1, 16),
        "network": normalise(tensor[None], 1, None, [0.0], [1.0]),
        "filter": statistics(tensor[None])[0, 4],
        "any": to_channels(tensor, 1),
    }
    for name, value in seen.items():
        assert (value - grey).abs().max() <= 0.51 / 255, name
    torch.testing.assert_close(seen["bank"], seen["test"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 700, 900), (1, 901, 333), (3, 20, 30)])
def test_a_large_image_is_resized_in_strips_to_the_same_bits(shape, monkeypatch):
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    whole = prepare(pixels[None] / 255, shape[0], 64)[0]
    monkeypatch.setattr(images, "STRIP", 40_000)
    assert torch.equal(fit(pixels, 64), whole)


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG"])
def test_every_format_that_pillow_reads_is_read(kind, tmp_path):
    ramp = Image.linear_gradient("L").convert("RGB")
    expected = decode_image(written(ramp), 3, 32)
    assert (decode_image(written(ramp, kind), 3, 32) - expected).abs().max() < 0.05
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / f"0.{kind.lower()}"
    path.write_bytes(written(ramp, kind))
    assert Folder(tmp_path).ids == {"a": [f"a/{path.name}"]}


def test_the_first_picture_of_an_animated_gif_is_read():
    frames = [Image.new("L", (9, 9), value) for value in (200, 0)]
    content = written(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert corner(content) == (200, 200, 200)


def transparent(mode: str) -> tuple[Image.Image, dict]:
    """An image whose left half is transparent, with another colour beneath."""
    image = Image.new("RGBA", (8, 8), (200, 30, 30, 255))
    image.paste((0, 255, 0, 0), (0, 0, 4, 8))
    if mode == "RGBA":
        return image, {}
    if mode == "LA":
        return image.convert("LA"), {}
    if mode == "P":
        indices = Image.new("P", (8, 8), 1)
        indices.putpalette([255, 0, 255, 200, 30, 30] + [0] * 762)
        indices.paste(0, (0, 0, 4, 8))
        return indices, {"transparency": 0}
    if mode == "I;16":
        levels = np.full((8, 8), 40_000, np.uint16)
        levels[:, :4] = 7
        return Image.fromarray(levels), {"transparency": 7}
    grey = Image.new("L", (8, 8), 90)
    grey.paste(3, (0, 0, 4, 8))
    return grey, {"transparency": 3}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "I;16"])
def test_transparent_pixels_show_the_background(mode):
    image, options = transparent(mode)
    content = written(image, **options)
    assert corner(content) == (255, 255, 255)
    assert corner(content, "#102030") == (16, 32, 48)
    opaque = open_image(content).convert("RGB").getpixel((6, 0))
    assert opaque == {"LA": (81,) * 3, "L": (90,) * 3, "I;16": (156,) * 3}.get(mode, (200, 30, 30))


def test_items_and_folders_have_the_background_they_are_given(tmp_path):
    image, _ = transparent("RGBA")
    items = Items([(image, 0)])
    assert items[0][0].getpixel((0, 0)) == (255, 255, 255)
    some = FewShot(Items([(image, 0)]), 1)
    for colour, pixel in (("#000000", (0, 0, 0)), ("#ffffff", (255, 255, 255))):
        some.background = colour
        read = some.read("0/000000")
        assert len(read) == some.size("0/000000")
        assert Image.open(io.BytesIO(read)).getpixel((0, 0)) == pixel
        assert some.open("0/000000").getpixel((0, 0)) == pixel
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.png")
    black = Slice(Folder(tmp_path, background="black"))
    assert black.background == "#000000" and black[0][0].getpixel((0, 0)) == (0, 0, 0)
    black.background = "#0000ff"
    assert black.load("a/0.png", 3, 8)[:, 0, 0].tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="expected a colour such as white"):
        Folder(tmp_path, background="nothing")


def wide_profile(gamma: float = 2.2) -> bytes:
    """An ICC profile with the primaries of Adobe RGB."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    primaries = (
        (0.60974, 0.31111, 0.01947),
        (0.20528, 0.62567, 0.06087),
        (0.14919, 0.06322, 0.74457),
    )
    tags = {
        f"{band}XYZ".encode(): b"XYZ \0\0\0\0" + b"".join(map(number, xyz))
        for band, xyz in zip("rgb", primaries, strict=True)
    }
    white = b"".join(map(number, (0.9642, 1.0, 0.8249)))
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + white
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 4) + b"own\0" + bytes(81)
    table, body = b"", b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    size = struct.pack(">I", 132 + len(table) + len(body))
    head = size + b"lcms\x02\x40\0\0mntrRGB XYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    head = (head + b"acsp" + bytes(28) + white).ljust(128, b"\0")
    return head + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colours_of_a_wide_profile_become_those_of_srgb(kind):
    content = written(Image.new("RGB", (16, 16), (60, 200, 60)), kind, icc_profile=wide_profile())
    assert np.abs(np.array(corner(content)) - (0, 201, 37)).max() <= 6
    assert open_image(content).info == {"converted": "a colour profile"}


def test_an_ordinary_profile_of_srgb_changes_nothing():
    ramp = Image.linear_gradient("L").convert("RGB").rotate(30)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for odd in (profile, b"no profile", b""):
        shown = open_image(written(ramp, icc_profile=odd))
        assert shown.tobytes() == ramp.tobytes() and not shown.info


def chunked(content: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG file with one more chunk behind its header."""
    check = struct.pack(">I", zlib.crc32(kind + data))
    return content[:33] + struct.pack(">I", len(data)) + kind + data + check + content[33:]


def test_the_gamma_of_a_png_file_counts_unless_it_is_that_of_srgb():
    plain = written(Image.new("RGB", (8, 8), (64, 128, 255)))
    for gamma, expected in ((45455, (64, 128, 255)), (100_000, (137, 188, 255))):
        content = chunked(plain, b"gAMA", struct.pack(">I", gamma))
        assert corner(content) == expected
        assert corner(chunked(content, b"sRGB", b"\0")) == (64, 128, 255)


def test_a_grey_profile_is_that_of_grey_images_alone():
    content = written(Image.new("L", (8, 8), 90), icc_profile=wide_profile())
    assert corner(content) == (90, 90, 90)


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(decoding, "WARNED", set())


RAMP = np.arange(64).reshape(8, 8)


@pytest.mark.usefixtures("unwarned")
def test_twelve_bits_in_sixteen_and_masks_are_said_once(tmp_path):
    paint(tmp_path, {"a": 1})
    Image.fromarray((RAMP * 65).astype(np.uint16)).save(tmp_path / "a" / "deep.png")
    Image.fromarray((RAMP % 2).astype(np.uint8)).save(tmp_path / "a" / "mask.png")
    source = Folder(tmp_path)
    with pytest.warns(AugmentWarning, match=r"a/deep.png .*below 4096"):
        source.open("a/deep.png")
    with pytest.warns(AugmentWarning, match=r"a/mask.png of 0 and 1 alone"):
        source.open("a/mask.png")
    source.open("a/mask.png"), source.open("a/deep.png")


@pytest.mark.usefixtures("unwarned")
def test_twelve_bits_of_colour_are_said_too():
    rows = b"".join(b"\0" + struct.pack(">24H", *range(i, i + 24)) for i in range(0, 3200, 400))
    header = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    header += struct.pack(">I", zlib.crc32(header[12:]))
    content = chunked(header + b"\0\0\0\0IEND\xaeB`\x82", b"IDAT", zlib.compress(rows))
    with pytest.warns(AugmentWarning, match="below 4096"):
        open_image(content)


def test_images_of_32_bits_are_refused():
    for pixels in (RAMP.astype(np.float32), RAMP.astype(np.int32)):
        with pytest.raises(ImageRejected, match="whose white is unknown"):
            open_image(written(Image.fromarray(pixels), "TIFF"))


def test_a_broken_tag_beside_the_orientation_does_not_hide_the_picture():
    tags = b"II*\0" + struct.pack("<IH", 8, 2) + struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    tags += struct.pack("<HHII", 0x11A, 10, 1, 38) + struct.pack("<Iii", 0, -1, 0)
    content = written(Image.new("RGB", (40, 20)), "JPEG", exif=b"Exif\0\0" + tags)
    assert open_image(content).size == (20, 40)


def test_long_texts_and_profiles_of_a_png_file_do_not_hide_the_picture():
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "x" * 2**21, zip=True)
    green = Image.new("RGB", (8, 8), (60, 200, 60))
    assert corner(written(green, pnginfo=info)) == (60, 200, 60)
    profile = wide_profile() + bytes(2**21)
    long = struct.pack(">I", len(profile)) + profile[4:]
    assert np.abs(np.array(corner(written(green, icc_profile=long))) - (0, 201, 37)).max() <= 2


def progressive(size: int, scans: int) -> bytes:
    content = written(Image.new("L", (size, size)), "JPEG", progressive=True)
    last = content.rfind(b"\xff\xda")
    return content[:-2] + content[last:-2] * scans + b"\xff\xd9"


def test_pixels_are_bounded_and_a_large_jpeg_file_is_read_at_reduced_size(monkeypatch):
    grey = Image.linear_gradient("L")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 20_000)
    with pytest.raises(ImageRejected, match=r"256 × 256 pixels, more than 20,000; set LATENT_"):
        open_image(written(grey))
    assert open_image(written(grey, "JPEG")).size == (128, 128)
    with pytest.raises(ImageRejected, match=r"a JPEG file of 3\d\d scans"):
        open_image(progressive(64, 300))
    with pytest.raises(Flaw, match="a JPEG file of"):
        decode(progressive(64, 300), "jpg")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100_000)
    assert open_image(written(grey)).size == (256, 256)
    assert open_image(progressive(64, 300)).size == (64, 64)


def test_all_files_of_a_folder_are_taken_or_counted(tmp_path):
    root = paint(tmp_path / "photos", {"ant": 2, "bee": 1})
    (root / "ant" / "a.heic").touch()
    (root / "ant" / "notes").touch()
    paint(root / "bee", {"night": 3})
    paint(root / "bee" / "night", {"late": 1})
    for name in ("metadata.jsonl", "b.png", "ant/.hidden.png", "ant/.DS_Store"):
        (root / name).touch()
    with pytest.warns(AugmentWarning) as caught:
        source = Folder(root)
    assert str(caught[0].message).startswith(
        f"{root}: 3 images taken, 8 files passed over: 4 in sub-folders, 1 "
    )
    reasons = {"heic": 1, "without a suffix": 1, "in sub-folders": 4}
    assert +source.passed == {**reasons, "outside a class folder": 1, "hidden": 1}
    with pytest.warns(AugmentWarning, match="4 files passed over"):
        nested = Folder(root, nested=True)
    assert nested.ids["bee"][:2] == ["bee/0.png", "bee/night/0.png"] and len(nested) == 7


def test_a_message_about_a_folder_leads_on(tmp_path):
    paint(tmp_path / "data" / "train", {"ant": 1, "bee": 1})
    with pytest.raises(UserError, match=r"2 in sub-folders; give .*train in place of .*'ant'"):
        Folder(tmp_path / "data")
    assert Folder(tmp_path / "data" / "train").classes == ["ant", "bee"]
    assert Folder(tmp_path / "data", nested=True).counts == [2]
    (tmp_path / "far" / "ant").mkdir(parents=True)
    (tmp_path / "far" / "ant" / "0.png").symlink_to(tmp_path / "data/train/ant/0.png")
    with pytest.raises(UserError, match=r"1 links out of the folder; .*links: true"):
        Folder(tmp_path / "far")
    assert Folder(tmp_path / "far", links=True).counts == [1]
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "0.png").touch()
    with pytest.raises(UserError, match="got 1 file passed over: 1 outside a class folder; use"):
        Folder(tmp_path / "flat")


CAFE, LONG_CAFE = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_names_that_look_alike_are_one_class_or_quoted(tmp_path):
    train, test = (paint(tmp_path / n, {"ant": 2, n: 2}) for n in (CAFE, LONG_CAFE))
    data = ImageData(str(train), test=str(test))
    assert data.classes == data.held_out["test"].classes == ["ant", CAFE]
    with pytest.raises(UserError, match=r"'cafe\\u0301'.*'caf\\xe9'|'caf\\xe9'.*'cafe\\u0301'"):
        Folder(paint(tmp_path / "both", {CAFE: 1, LONG_CAFE: 1}))
    cyrillic = paint(tmp_path / "third", {"ant": 1, "c\u0430fé": 1})
    with pytest.raises(UserError, match=r"c\\u0430f\\xe9.* new, .*caf\\xe9.* missing"):
        ImageData(str(train), test=str(cyrillic))


def test_an_old_bank_keeps_its_names_in_another_unicode_form(tmp_path):
    backbone, root = GaussianBackbone(latent_shape=(1, 8, 8)), paint(tmp_path / "i", {CAFE: 2})
    source = Source()
    source.root, source.ids = root, {LONG_CAFE: Folder(root).ids[CAFE]}
    fill_bank(tmp_path / "b", backbone, source, {CAFE: "coffee"}, steps=1)
    paint(root, {CAFE: 3})
    bank = fill_bank(tmp_path / "b", backbone, Folder(root), {LONG_CAFE: "coffee"}, steps=1)
    assert bank.classes == [LONG_CAFE] and len(bank.members[LONG_CAFE]) == 3


def test_held_out_images_may_lack_a_class_and_are_labelled_by_name(tmp_path):
    train = paint(tmp_path / "train", {"ant": 2, "bee": 2, "cat": 2})
    test = paint(tmp_path / "test", {"cat": 3, "ant": 1})
    with pytest.warns(AugmentWarning, match="test images of 3 classes, got none of 1: bee"):
        data = ImageData(str(train), test=str(test))
    assert data.held_out["test"].targets == [0, 2, 2, 2]


@pytest.mark.parametrize("place", ["train", "test"])
def test_bad_images_are_found_before_the_first_step_by_the_rule_of_invert(tmp_path, place):
    for name in ("train", "test"):
        paint(tmp_path / name, {"ant": 10, "bee": 10}, size=16)
    bad = tmp_path / place / "ant" / "3.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    sources = {"train": str(tmp_path / "train"), "test": str(tmp_path / "test")}
    with pytest.warns(AugmentWarning, match=r"got 1 that cannot be read .*ant/3\.png \("):
        data = ImageData(**sources)
    assert (data.real if place == "train" else data.held_out["test"]).counts == [9, 10]
    with pytest.raises(
        ImageRejected, match=r"no more than 0.0% of 20 .* got 1, such as ant/3\.png"
    ):
        ImageData(**sources, max_rejects=0.0)
    backbone = GaussianBackbone(latent_shape=(1, 8, 8))
    with pytest.raises(ImageRejected, match=r"no more than 0.0% of 20 images .* ant/3\.png"):
        source = Folder(tmp_path / place)
        fill_bank(tmp_path / "b", backbone, source, steps=1, max_rejects=0.0)


def test_one_of_a_few_images_may_be_bad(tmp_path):
    """5 % of 8 images are none, but one bad file is no reason to stop."""
    paint(tmp_path, {"ant": 4, "bee": 4})
    (tmp_path / "ant" / "0.png").write_bytes(b"")
    with pytest.warns(AugmentWarning, match="got 1 that cannot be read"):
        assert ImageData(str(tmp_path)).counts == [3, 4]
    (tmp_path / "bee" / "0.png").write_bytes(b"")
    with pytest.raises(ImageRejected, match=r"no more than 5.0% of 8 .* got 2"):
        ImageData(str(tmp_path))


def test_a_truncated_jpeg_file_is_found_at_an_eighth_of_its_size(tmp_path):
    paint(tmp_path, {"ant": 19})
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "ant" / "x.jpg").write_bytes(written(Image.fromarray(noise), "JPEG")[:-500])
    with pytest.warns(AugmentWarning, match=r"ant/x\.jpg .*truncated"):
        assert Folder(tmp_path).readable(0.05, "test").counts == [19]


def test_a_repaired_image_is_no_longer_counted_as_left_out(tmp_path):
    root, backbone = paint(tmp_path / "i", {"ant": 20}), GaussianBackbone(latent_shape=(1, 8, 8))
    good = (root / "ant" / "0.png").read_bytes()
    (root / "ant" / "0.png").write_bytes(b"x")
    bank = fill_bank(tmp_path / "b", backbone, Folder(root), steps=1)
    (chunk,) = bank.chunks["ant"]
    assert len(chunk.rejects) == 1 and chunk.rejects[0].id == "ant/0.png"
    assert "1 images left out" in inspect(tmp_path / "b")
    (root / "ant" / "0.png").write_bytes(good)
    bank = fill_bank(tmp_path / "b", backbone, Folder(root), steps=1)
    assert not any(chunk.rejects for chunk in bank.chunks["ant"])
    assert "0 images left out" in inspect(tmp_path / "b")


@pytest.mark.usefixtures("unwarned")
def test_a_bank_of_before_goes_on_and_says_where_colours_differ(tmp_path, monkeypatch):
    root, backbone = paint(tmp_path / "i", {"ant": 2}), GaussianBackbone(latent_shape=(1, 8, 8))
    with monkeypatch.context() as patch:
        patch.setattr("augment.bank.fill.preprocessing", lambda _: images.FITTING)
        fill_bank(tmp_path / "b", backbone, Folder(root), steps=1)
    paint(root, {"ant": 3})
    fill_bank(tmp_path / "b", backbone, Folder(root), steps=1)
    transparent("RGBA")[0].save(root / "ant" / "9.png")
    with pytest.warns(AugmentWarning, match=r"older version, got ant/9\.png with transparency"):
        bank = fill_bank(tmp_path / "b", backbone, Folder(root), steps=1)
    assert bank.fingerprint["preprocessing"] == images.FITTING and bank.background == "white"
    with pytest.raises(UserError, match="preprocessing = sRGB on #000000"):
        fill_bank(tmp_path / "b", backbone, Folder(root, background="black"), steps=1)
    black = fill_bank(tmp_path / "c", backbone, Folder(root, background="black"), steps=1)
    assert black.background == "#000000"


def test_gaps_between_labels_are_said(tmp_path):
    paint(tmp_path, {"a": 3})
    (tmp_path / "list.txt").write_text("a/0.png 1\na/1.png 12\n")
    with pytest.warns(AugmentWarning, match=r"11 labels below 12 .*\(0, 2, 3, 4, 5, 6 …\)"):
        ListFile(tmp_path, tmp_path / "list.txt")
    with pytest.warns(AugmentWarning, match=r"1 labels below 2 .*\(0\)"):
        Items([(Image.new("L", (4, 4)), label) for label in (1, 2)])


NAMES = {
    "keys": ("{010: bag, no: top}", "", {"010": "bag", "no": "top"}),
    "values of prompts": ("{a: 010, b: yes}", "prompts", {"a": "010", "b": "yes"}),
    "a list of classes": ("[010, no, 1e3, ~, a]", "classes", ["010", "no", "1e3", "~", "a"]),
    "a configuration": (
        "data.train: {init_args: {classes: [010, no], links: yes}}\nclasses: null\nsteps: 010\n",
        "",
        {
            "data.train": {"init_args": {"classes": ["010", "no"], "links": True}},
            "classes": None,
            "steps": 8,
        },
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_class_names_in_yaml_are_text(case):
    import yaml

    text, option, expected = NAMES[case]
    assert yaml.safe_load(quote_names(text, option)) == expected
    for plain in ("ant,bee", "010", "[a", "{x: 1}"):
        assert quote_names(plain, "steps") == plain


def run(monkeypatch, capsys, *args) -> str:
    monkeypatch.setattr("sys.argv", ["latent-augment", *map(str, args)])
    cli.main()
    return capsys.readouterr().out


def test_names_of_numbers_booleans_commas_and_blanks_survive_the_command(
    tmp_path, monkeypatch, capsys
):
    root = paint(tmp_path / "my photos", {"8": 2, "010": 2, "no": 2, "red, big": 2}, size=32)
    bank = tmp_path / "my bank" / "bank"
    given = ("--errors", "false", "--steps", 2, "--backbone", "tiny")
    (tmp_path / "c.yaml").write_text("prompts: {010: bag, no: top}\n")
    output = run(
        monkeypatch, capsys, "invert", root, "--bank", bank, "--config", tmp_path / "c.yaml", *given
    )
    known = {
        k["name"]: k["prompt"] for k in json.loads((bank / "manifest.json").read_text())["classes"]
    }
    assert known == {"8": "", "010": "bag", "no": "top", "red, big": ""}
    assert (
        f"next: latent-augment synthesize '{bank}' --out '{bank.with_name('synthetic')}'" in output
    )
    part, rest = tmp_path / "a, b", tmp_path / "rest"
    run(monkeypatch, capsys, "split", bank, "--classes", "red, big, 010", "--out", part)
    run(monkeypatch, capsys, "split", bank, "--classes", "8,no", "--out", rest)
    run(monkeypatch, capsys, "merge", "--banks", f"{part},{rest}", "--out", tmp_path / "all")
    names = [k["name"] for k in json.loads((tmp_path / "all/manifest.json").read_text())["classes"]]
    assert names == ["red, big", "010", "8", "no"]


def test_an_unknown_name_is_split_at_its_commas():
    assert split_names("ant, bee,fly", ["ant", "bee"].__contains__) == ["ant", "bee", "fly"]
