"""The walk between two real images: by exact models, and as a command."""

import pytest
import torch
from conftest import call
from PIL import Image

from augment import UserError, walk
from augment.inversion import inverted, inverter
from augment.measure.reconstruction import reconstruction
from augment.sources.fashion import write_fashion
from augment.sources.images import fit, pixels_of
from augment.synthesis.between import WalkSettings, between, open_end


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Return two coats' files."""
    root = write_fashion(tmp_path_factory.mktemp("coats"), "shots", [0, 1])
    return sorted((root / "Coat").glob("*.png"))


def pixels(path):
    return fit(pixels_of(open_end(path), 1), 32)


@pytest.fixture(scope="module")
def coats(ends):
    return torch.stack([pixels(path) for path in ends])


def psnr(images, others):
    return reconstruction(images, others)["psnr"]


def test_clean_latents_of_a_linear_codec_are_mixed_like_pixels(tiny, coats):
    made = between(tiny, coats, inversion=inverter("noise"), name="lerp", count=5, level=0)
    share = torch.linspace(0, 1, 5)[:, None, None, None]
    torch.testing.assert_close(made, (1 - share) * coats[0] + share * coats[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [0.3, 1.0])
def test_noised_latents_are_mixed_and_denoised(gaussian, level):
    """The exact model carries z at a level to μ + s(z − αμ)/√(α²s² + σ²)."""
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 4 + 0.4
    run = inverter("noise", steps=100)
    made = between(gaussian, images, inversion=run, name="lerp", count=3, level=level)
    again = between(gaussian, images, inversion=run, name="lerp", count=3, level=level, seed=1)
    assert not torch.equal(made, again)
    alpha, sigma = gaussian.process.alpha_sigma(level)
    scale = gaussian.std / (alpha**2 * gaussian.std**2 + sigma**2) ** 0.5
    # the ends' own noise, by the law backwards; inside only, as decoding clamps
    latents = alpha * gaussian.mean + (2 * made[[0, -1]] - 1 - gaussian.mean) / scale
    middle = gaussian.mean + scale * (latents.mean(0) - alpha * gaussian.mean)
    expected = ((middle + 1) / 2).clamp(0, 1)
    inside = ((made > 0) & (made < 1)).all(0)
    assert inside.sum() > 10
    torch.testing.assert_close(made[1][inside], expected[inside], rtol=0, atol=2e-3)


def test_an_exact_inversion_walks_between_the_images(gaussian):
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 4 + 0.4
    made = between(gaussian, images, inversion=inverter("fireflow", steps=60), name="slerp")
    latents = walk(*gaussian.transport(2 * images - 1), 11, "slerp")
    alpha, sigma = gaussian.process.alpha_sigma(1.0)
    spread = (alpha**2 * gaussian.std**2 + sigma**2) ** 0.5 / gaussian.std
    clean = gaussian.mean + (latents - alpha * gaussian.mean) / spread
    torch.testing.assert_close(made, (clean + 1) / 2, rtol=0, atol=2e-3)


def test_one_series_of_embeddings_brings_both_images_back(tiny, coats):
    """Guidance without embeddings spoils the ends, and the series that both share repairs them."""
    null = inverter("null_text", steps=5, inner=5, shared=True)
    made = {
        run.guidance: between(tiny, coats, ("top", "top"), run, count=2, guidance=5.0)
        for run in (inverter("ddim", steps=5), null)
    }
    spoilt, repaired = (psnr(coats, images).mean() for images in made.values())
    assert spoilt + 0.5 < repaired
    assert len(inverted(null, tiny, coats, "top", 5.0)["nulls"]) == 1


def test_prompts_are_mixed_on_the_way(tiny, coats):
    run = inverter("fireflow", steps=3)
    one, other, both, back = (
        between(tiny, coats, words, run, count=3)
        for words in (("top", "top"), ("bag", "bag"), ("top", "bag"), ("bag", "top"))
    )
    # a latent depends on the prompt that it was inverted with, an end on its own prompt
    torch.testing.assert_close(both[0], one[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(both[-1], other[-1], rtol=0, atol=1e-4)
    assert not torch.allclose(both[1], one[1], atol=1e-3)
    assert not torch.allclose(both[1], back[1], atol=1e-3)


def test_the_command_writes_the_images(monkeypatch, capsys, tmp_path, tiny, ends, coats):
    args = [ends[0], "--to", ends[1], "--steps", 3, "--between", 2, "--out", tmp_path / "w"]
    code, out, _ = call(monkeypatch, capsys, "walk", *args, "--inversion", "ddim")
    assert code == 0 and "4 images" in out and "dB" in out
    files = sorted(path.name for path in (tmp_path / "w").iterdir())
    assert files == ["0.png", "1.png", "2.png", "3.png", "walk.png"]
    made = between(tiny, coats, inversion=inverter("ddim", steps=3), count=4)
    for number, image in enumerate(made):
        again = pixels(tmp_path / "w" / f"{number}.png")
        torch.testing.assert_close(again, image, rtol=0, atol=0.5 / 255 + 1e-6)
    with Image.open(tmp_path / "w" / "walk.png") as page:
        assert page.width > 6 * 128


def test_null_text_fits_one_series_to_both_images():
    assert WalkSettings(image="", to="").run == inverter("null_text", steps=50, shared=True)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ((), "take another inversion"),  # null-text without a prompt
        (("--path", "slurp"), "expected a walk out of lerp"),
        (("--between", "-1"), "0 or more images"),
        (("--inversion", "noise", "--level", "1.5"), "level in"),
        (("--inversion", "fireflow", "--level", "0"), "level in"),
        (("--prompt", "top", "--to-prompt", "cat"), "'cat'"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    monkeypatch, capsys, tmp_path, ends, options, part
):
    place = tmp_path / "w"
    code, _, told = call(
        monkeypatch, capsys, "walk", ends[0], "--to", ends[1], "--out", place, *options
    )
    assert code == 2 and part in told and told.count("\n") == 1
    assert not place.exists()


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match=r"a\.png"):
        open_end(tmp_path / "a.png")
    with pytest.raises(UserError, match="an image at"):
        open_end(tmp_path / "b.png")
