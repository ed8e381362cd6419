"""Measures of pictures and latents one by one: reconstruction, smoothness, relations."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from augment import UserError
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.measure.reconstruction import load_lpips, reconstruction
from augment.measure.relations import approach, assignment, offset_response, top_correlations
from augment.measure.smoothness import interp_score, istd, walks


def pictures(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_are_scikit_images(channels):
    a = pictures(0, 3, channels, 24, 20)
    b = (a + 0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    found = reconstruction(a, b)
    for row in range(3):
        x, y = (v[row].double().numpy() for v in (a, b))
        assert found["mse"][row] == pytest.approx(((x - y) ** 2).mean(), rel=1e-9)
        assert found["psnr"][row] == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        expected = structural_similarity(x, y, data_range=1, channel_axis=0, **options)
        assert found["ssim"][row] == pytest.approx(expected, abs=0.02)  # borders differ


def test_an_image_that_comes_back_whole():
    a = pictures(0, 2, 1, 16, 16)
    found = reconstruction(a, a)
    assert found["mse"].max() == 0 and found["psnr"].min() == 120
    torch.testing.assert_close(found["ssim"], torch.ones(2).double())
    assert reconstruction(a[..., :8], a[..., :8])["ssim"].isnan().all()


def test_lpips_says_what_it_lacks(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchmetrics.functional.image.lpips._LPIPS", refuse)
    with pytest.raises(UserError, match="leave LPIPS out"):
        load_lpips()


def test_istd_of_worked_walks():
    a, b = pictures(0, 4, 1, 8, 8), pictures(1, 4, 1, 8, 8)
    place = torch.linspace(0, 1, 11).view(1, -1, 1, 1, 1)
    assert istd(torch.lerp(a[:, None], b[:, None], place)) == pytest.approx(0, abs=1e-6)
    jump = torch.zeros(1, 11, 1, 2, 2)
    jump[:, 5:] = 1  # one distance of 2, nine of 0
    assert istd(jump) == pytest.approx(2 * math.sqrt(0.1 * 0.9))


def test_istd_of_an_affine_model_is_nothing(gaussian):
    found = walks(gaussian, ["", ""], name="lerp", steps=3)
    assert found.shape[:2] == (2, 11)
    assert torch.equal(found, walks(gaussian, ["", ""], name="lerp", steps=3))
    inside = walks(gaussian, ["", ""], name="lerp", steps=3, mean=torch.zeros(1))
    assert torch.equal(found, inside)
    bends = walks(gaussian, ["", ""], name="slice", steps=3)
    assert istd(found) < 0.1 * istd(bends)


def test_the_score_of_a_walk_of_worked_features():
    images = torch.tensor([[1.0, 0], [0, 2.0], [-3.0, 0]])
    assert interp_score(images, torch.tensor([1.0, 0])) == pytest.approx(100 / 3)


def test_top_correlations_by_numpy():
    x = pictures(0, 50, 2, 8, 12)
    found = top_correlations(x, count=5, patch=8)
    assert found.shape == (2,)
    for number, part in enumerate((x[..., :8], x[..., 8:])):
        matrix = np.corrcoef(part.flatten(1).double().numpy(), rowvar=False)
        upper = np.sort(np.abs(matrix[np.triu_indices(len(matrix), 1)]))[::-1]
        assert found[number] == pytest.approx(upper[:5].mean())


def test_images_correlate_and_noise_does_not():
    noise = torch.randn(400, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(noise[..., :4, :4], (8, 8))
    white, blurred = top_correlations(noise).mean(), top_correlations(smooth).mean()
    assert white < 0.25 and blurred == pytest.approx(1)
    with pytest.raises(UserError, match="at least 3 tensors"):
        top_correlations(noise[:2])


def test_halves_find_each_other():
    a = pictures(0, 40, 3, 4, 4)
    assert assignment(a, a + 0.01).all() and not assignment(a, a.roll(1, 0)).any()
    half = torch.cat([a[:20], a[20:].roll(1, 0)])
    assert assignment(a, half).tolist() == [True] * 20 + [False] * 20
    bright = a + torch.linspace(0, 9, 40).view(-1, 1, 1, 1)
    assert not assignment(a, bright + 20)[1:].any() and assignment(a, a + 20, centred=True).all()


def test_the_way_from_noise_to_latent_passes_where_it_should():
    noise, latent = pictures(0, 5, 1, 4, 4), pictures(1, 5, 1, 4, 4)
    ways = torch.stack([torch.lerp(noise, latent, t) for t in (0.0, 0.5, 1.0)])
    distance, places = approach(ways, noise, latent, count=3)
    assert places.tolist() == [0, 0.5, 1]
    assert distance.diagonal().max() < 1e-6
    whole = (noise - latent).flatten(1).norm(dim=1).mean().item()
    assert distance[0, 2] == pytest.approx(whole) and distance[1, 0] == pytest.approx(whole / 2)


def test_an_offset_of_a_channel_is_carried_as_the_gaussian_model_says():
    backbone = GaussianBackbone(mean=0.1, std=0.2)
    noises = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    alpha, sigma = backbone.process.alpha_sigma(1.0)
    late = offset_response(backbone, noises, (0.3, 0.5), "T", "fireflow", 50)
    early = offset_response(backbone, noises, (0.3, 0.5), "0", "fireflow", 50)
    expected = 0.2 / (alpha**2 * 0.2**2 + sigma**2) ** 0.5
    ratio = late.inside / early.inside
    torch.testing.assert_close(ratio, torch.full_like(ratio, expected), rtol=0.01, atol=0)
    assert (early.inside[1] / early.inside[0]).tolist() == pytest.approx([5 / 3] * 3, rel=0.01)
    assert max(late.outside.max(), early.outside.max()) < 1e-4
    assert late.images.shape == (3, 4, 16, 16)
    changed = late.images[2] - late.images[0]
    assert changed[0, :4].max() < -0.05 and changed[1, :4].min() > 0.05
    assert changed[2:].abs().max() < 1e-4
