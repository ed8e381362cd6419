"""Image files at the border: every kind PIL reads, upright; and what cannot be read is refused."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from augment.core.errors import ImageRejected
from augment.sources import Source
from augment.sources.images import prepare, save_image

RAMP = np.linspace(0, 1, 32 * 32).reshape(32, 32)
MODES = {
    "L": (RAMP * 255).round().astype(np.uint8),
    "RGB": np.repeat((RAMP * 255).round().astype(np.uint8)[..., None], 3, 2),
    "I;16": (RAMP * 65535).round().astype(np.uint16),
}


def load_image(path, channels, resolution):
    source = Source()
    source.root = path.parent
    return source.load(path.name, channels, resolution)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_ramp_is_read_alike_from_any_mode(mode, channels, tmp_path):
    Image.fromarray(MODES[mode]).save(tmp_path / "ramp.png")
    image = load_image(tmp_path / "ramp.png", channels, 32)
    assert image.dtype == torch.float32
    expected = torch.from_numpy(RAMP).float().expand(channels, -1, -1)
    torch.testing.assert_close(image, expected, rtol=0, atol=1.1 / 255)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_an_image_of_any_mode_has_the_channels_asked_for(mode, tmp_path):
    kind = "jpeg" if mode == "CMYK" else "png"
    Image.fromarray(MODES["RGB"]).convert(mode).save(tmp_path / f"image.{kind}")
    for channels in (1, 3):
        image = load_image(tmp_path / f"image.{kind}", channels, 16)
        assert image.shape == (channels, 16, 16)
        assert image.min() >= 0
        assert image.max() <= 1
        assert image[:, 12:].mean() > image[:, :4].mean() + 0.4, "the ramp goes down the image"


def test_a_photograph_is_turned_upright(tmp_path):
    tags = Image.Exif()
    tags[274] = 6  # turn by 90° to see it upright
    Image.fromarray(MODES["L"]).save(tmp_path / "turned.jpg", exif=tags, quality=100)
    image = load_image(tmp_path / "turned.jpg", 1, 32)
    expected = torch.from_numpy(RAMP).float().rot90(-1)[None]
    torch.testing.assert_close(image, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (100, 40), (33, 200), (1, 1)])
def test_a_prepared_image_is_the_centre_of_the_picture_in_the_size_asked_for(size):
    height, width = size
    across = (torch.arange(width) + 0.5) / width
    image = prepare(across.expand(2, 1, height, width), channels=3, resolution=32)
    assert image.shape == (2, 3, 32, 32)
    torch.testing.assert_close(image, image.flip(-1).neg() + 1, rtol=0, atol=1e-4)


def test_a_saved_image_is_read_back_within_half_a_grey_level(tmp_path):
    for channels in (1, 3):
        image = torch.rand(channels, 32, 32, generator=torch.Generator().manual_seed(0))
        save_image(image, tmp_path / "made" / "image.png")
        back = load_image(tmp_path / "made" / "image.png", channels, 32)
        torch.testing.assert_close(back, image, rtol=0, atol=0.51 / 255)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["image.png"]


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_a_damaged_file_is_read_or_refused_by_name_and_nothing_else(kind, tmp_path):
    rng, path = random.Random(0), tmp_path / "image.png"
    buffer = io.BytesIO()
    Image.fromarray(MODES["RGB"]).save(buffer, kind)
    refused = 0
    for _ in range(300):
        content = bytearray(buffer.getvalue())
        del content[rng.choice([len(content), rng.randrange(len(content))]) :]
        for _ in range(min(3, len(content))):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
        try:
            assert load_image(path, 1, 32).isfinite().all()
        except ImageRejected as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 100
    for missing in (tmp_path / "none.png", tmp_path):
        with pytest.raises(ImageRejected, match=str(missing)):
            load_image(missing, 1, 32)
