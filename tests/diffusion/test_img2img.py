"""Levels against diffusers' image-to-image pipelines: their strength s is our level s."""

import diffusers
import pytest
import torch
from checkpoints import PROMPT, sd3, stable_diffusion
from conftest import paint

from augment import Plan, Sampling, Synthesizer, load_backbone, sample
from augment.bank.fill import fill_bank
from augment.core.rng import normal, rng
from augment.diffusion.process import level_number
from augment.sources import Folder

STEPS, GUIDANCE = 5, 4.5


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Of each kind: our backbone, and diffusers' pipeline of the same folder."""
    root = tmp_path_factory.mktemp("pipelines")
    folder = stable_diffusion(root / "sd")
    options = {"safety_checker": None}
    pipe = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(str(folder), **options)
    made = {"sd": (load_backbone(folder, "cpu", spacing="leading", clean_end=False), pipe)}
    folder = sd3(root / "sd3", t5=False)
    options = {"text_encoder_3": None, "tokenizer_3": None}
    pipe = diffusers.StableDiffusion3Img2ImgPipeline.from_pretrained(str(folder), **options)
    made["sd3"] = (load_backbone(folder, "cpu", spacing="linspace"), pipe)
    for _, known in made.values():
        known.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("strength", [0.4, 0.8, 1.0])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_level_is_diffusers_strength(name, strength, pair):
    backbone, pipe = pair[name]
    clean = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    theirs = pipe(
        [PROMPT] * 2, image=clean, strength=strength, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(0), output_type="pt",
        **({"height": 32, "width": 32, "max_sequence_length": 77} if name == "sd3" else {}),
    ).images  # fmt: skip
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    level = backbone.process.levels(STEPS)[level_number(STEPS, strength)]
    alpha, sigma = backbone.process.alpha_sigma(level)
    latents = alpha * clean + sigma * noise
    ours = sample(backbone, latents, PROMPT, "ddim", STEPS, GUIDANCE, level=level)
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_embeddings_in_are_prompts_in_as_they_are_to_diffusers(name, pair):
    backbone, pipe = pair[name]
    clean = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    condition, free = backbone.condition([PROMPT]), backbone.condition([""])
    theirs_in = {"prompt_embeds": condition["text"], "negative_prompt_embeds": free["text"]}
    if name == "sd3":
        theirs_in |= {"pooled_prompt_embeds": condition["pooled"], "height": 32, "width": 32}
        theirs_in |= {"negative_pooled_prompt_embeds": free["pooled"]}
    theirs = pipe(
        image=clean, strength=0.6, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0), output_type="pt", **theirs_in,
    ).images  # fmt: skip
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    level = backbone.process.levels(STEPS)[3]
    alpha, sigma = backbone.process.alpha_sigma(level)
    latents = alpha * clean + sigma * noise
    ours = sample(backbone, latents, condition, "ddim", STEPS, GUIDANCE, level=level)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_bank_of_clean_latents_is_the_pipeline_with_the_plans_noise(pair, tmp_path):
    """From image files: the pipeline gets the encoded image, and draws the plan's noise."""
    backbone, pipe = pair["sd"]
    source = Folder(paint(tmp_path / "images", size=backbone.resolution))
    prompts = dict.fromkeys(source.ids, PROMPT)
    bank = fill_bank(tmp_path / "bank", backbone, source, prompts, "noise", steps=STEPS)
    plan = Plan(0, "ant", ("ant/1.png",), (1.0,), 0.0, 5, 2, 3, level=0.6)
    how = Sampling(solver="ddim", guidance=GUIDANCE)
    ours = Synthesizer(backbone, bank, sampling=how).images([plan])
    noise = normal(rng(5, "noise", 2, 3), *backbone.latent_shape)[None]
    draw = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "randn_tensor", lambda shape, **_: noise.view(shape))
        theirs = pipe(
            PROMPT, image=bank.latents("ant")[1:2], strength=0.6, num_inference_steps=STEPS,
            guidance_scale=GUIDANCE, output_type="pt",
        ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
