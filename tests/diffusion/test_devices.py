"""What a GPU asks of the code: no waiting for the host in the loop, no float64, and diffusers too.

There is no GPU here: a dispatch mode notes the operations that would wait for one or fail on it.
"""

import pytest
import torch
from checkpoints import PROMPT, dit, flux, flux2, lightningdit, sd3, sdxl, stable_diffusion, z_image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from augment import UserError, load_backbone, sample
from augment.diffusion.backbone import attempt, denoiser
from augment.diffusion.solver import SOLVERS, check_images
from augment.inversion import INVERTERS, inverted, inverter

MAKERS = {
    "stable-diffusion": (stable_diffusion, {}),
    "sdxl": (sdxl, {}),
    "sd3": (sd3, {"max_sequence_length": 40}),
    "dit": (dit, {}),
    "lightningdit": (lightningdit, {}),
    "z-image": (z_image, {"resolution": 32}),
    "flux": (flux, {"resolution": 32, "max_sequence_length": 40}),
    "flux2-klein": (flux2, {"resolution": 32, "shift_steps": 4, "max_sequence_length": 60}),
}
WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2"}
"""Operations whose result the host has to know."""
GUIDANCE = 3.0


class Watch(TorchDispatchMode):
    """Counts operations that wait for a GPU or copy to it, and float64 tensors that it has."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if name in WAITS or name == "lift_fresh":  # the latter makes a tensor of the host's numbers
            self.found.append(name)
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.found += ["float64" for tensor in tensors if tensor.dtype == torch.float64]
        return made


@pytest.fixture(scope="module", params=[*MAKERS, "tiny"])
def backbone(request, tmp_path_factory):
    if request.param == "tiny":
        return load_backbone("tiny", device="cpu")
    make, options = MAKERS[request.param]
    return load_backbone(make(tmp_path_factory.mktemp("m") / "m"), device="cpu", **options)


def prompt_of(backbone):
    return {"dit": "1", "lightningdit": "1", "tiny": "top"}.get(
        backbone.fingerprint["name"], PROMPT
    )


def noise(backbone, count=2):
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))


def test_the_watch_sees_what_it_is_for():
    with Watch() as watch:
        torch.ones(2).sum().item()
        torch.as_tensor(3.0)
        torch.ones(2).double()
    assert {*watch.found} == {"_local_scalar_dense", "lift_fresh", "float64"}


def test_the_loops_neither_wait_for_a_gpu_nor_need_float64(backbone):
    latents, levels = noise(backbone), backbone.process.levels(2)
    denoise = denoiser(backbone, [prompt_of(backbone)] * 2, GUIDANCE)
    runs = [lambda run=run: run(denoise, latents, levels[::-1]) for run in SOLVERS.values()]
    runs += [
        lambda name=name: inverter(name, steps=2)(denoise, latents)
        for name in ("ddim", "published_ddim", "midpoint", "fireflow", "fixed_point")
    ]
    with torch.no_grad():
        for run in runs:
            run()  # fills caches: the schedule, places of tokens, lengths of prompts
            with Watch() as watch:
                run()
            # diffusers computes places of tokens in float64 but on MPS
            own = [name for name in watch.found if name != "float64" or not transformer(backbone)]
            assert own == []


def test_nothing_between_images_and_images_needs_float64(backbone):
    """MPS has none; schedules have it, on the CPU."""
    if transformer(backbone):
        pytest.skip("diffusers computes places of tokens in float64 but on MPS")
    side, prompt = backbone.resolution, prompt_of(backbone)
    images = torch.rand(1, backbone.channels, side, side)
    text = "text" in backbone.condition([prompt])

    def there_and_back():
        for name in INVERTERS:
            if name == "null_text" and not text:
                continue
            options = {"inner": 1} if name == "null_text" else {}
            run = inverter(name, steps=1, **options)
            made = inverted(run, backbone, images, prompt, GUIDANCE if options else 1.0)
            sample(backbone, made["latents"], prompt, steps=1, guidance=GUIDANCE)

    there_and_back()  # fills caches
    with Watch() as watch:
        there_and_back()
    assert "float64" not in watch.found


def test_images_that_are_no_pictures_are_refused():
    backbone = load_backbone("tiny", device="cpu", dtype=torch.bfloat16)
    latents = torch.zeros(2, *backbone.latent_shape)
    latents[0, 0] = -100.0  # black
    images = sample(backbone, latents, level=0.0)
    assert not images[0].any()
    torch.testing.assert_close(check_images(backbone, images), images, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"got only black ones, in torch.bfloat16 on cpu; take"):
        check_images(backbone, images[:1])
    assert not check_images(load_backbone("tiny", device="cpu"), images[:1]).any()
    latents[1] = torch.nan
    with pytest.raises(UserError, match=r"got some that are not, in torch.bfloat16"):
        check_images(backbone, sample(backbone, latents, level=0.0))


def transformer(backbone):
    return backbone.fingerprint["name"] in ("z-image", "flux", "flux2-klein")


def test_both_halves_of_guidance_are_one_call(backbone):
    rows, network = [], backbone.network
    denoise = denoiser(backbone, [prompt_of(backbone)] * 2, GUIDANCE)
    try:
        backbone.network = lambda latent, *others: (
            rows.append(len(latent)) or network(latent, *others)
        )
        with torch.no_grad():
            SOLVERS["ddim"](denoise, noise(backbone), backbone.process.levels(3)[::-1])
    finally:
        del backbone.network
    assert rows == [4, 4, 4]


def test_diffusers_own_pipeline_makes_our_pictures(backbone):
    if backbone.fingerprint["name"] == "tiny":
        pytest.skip("it has no pipeline")
    latents, prompts = noise(backbone), [prompt_of(backbone)] * 2
    theirs = backbone.sample_by_diffusers(latents, prompts, 4, GUIDANCE)
    if backbone.fingerprint["name"] in ("dit", "lightningdit"):
        assert theirs is None
        return
    ours = sample(backbone, latents, prompts, "ddim", 4, GUIDANCE)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)
    again = sample(backbone, latents, prompts, "ddim", 4, GUIDANCE)
    assert torch.equal(again, ours), "the pipeline's parts are ours again"


def test_a_batch_that_mps_has_no_memory_for_is_halved():
    def run(rows, tick):
        raise RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)")

    assert attempt(run, slice(0, 2), lambda: None) is None
    with pytest.raises(RuntimeError, match="another"):
        attempt(lambda *_: (_ for _ in ()).throw(RuntimeError("another")), slice(0, 1), print)


def test_a_bank_is_not_mixed_where_there_is_no_float64(bank):
    with pytest.raises(UserError, match="centroids are mixed on the CPU"):
        bank.to("mps")


@pytest.mark.parametrize("name", ["cuda:99", "mps:9", "nowhere"])
def test_a_device_that_is_not_there_is_one_sentence(name):
    with pytest.raises(UserError, match="expected a device that is there"):
        load_backbone("tiny", device=name)
