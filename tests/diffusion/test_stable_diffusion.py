"""The diffusers backbones against diffusers' own pipelines, on small models with random weights."""

import json
import warnings

import diffusers
import pytest
import torch
from checkpoints import PROMPT, check_batches, dit, sd3, sdxl, stable_diffusion
from safetensors.torch import load_file, save_file

from augment import UserError, invert, load_backbone, sample
from augment.bank.fill import fill_bank
from augment.core.errors import PrecisionWarning
from augment.diffusion import Backbone
from augment.sources import Folder

MAKERS = {"stable-diffusion": stable_diffusion, "sdxl": sdxl, "sd3": sd3, "dit": dit}
STEPS, GUIDANCE = 5, 7.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline folder of each kind."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def backbones(folders):
    return {name: load_backbone(folder, device="cpu") for name, folder in folders.items()}


def noise(backbone, count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *backbone.latent_shape, generator=generator)


def pipeline(folder, **parts):
    """diffusers' own, without a progress bar."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_images(backbone, pipe, prompt=PROMPT, **options):
    latents = noise(backbone)
    ours = sample(backbone, latents, prompt, "ddim", STEPS, GUIDANCE)
    theirs = pipe(
        [prompt] * len(latents), latents=latents, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, height=backbone.resolution, width=backbone.resolution,
        output_type="pt", **options,
    ).images  # fmt: skip
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_stable_diffusion_samples_what_diffusers_samples(prediction, spacing, tmp_path):
    folder = stable_diffusion(tmp_path, prediction_type=prediction)
    clean_end = spacing == "trailing"
    backbone = load_backbone(folder, device="cpu", spacing=spacing, clean_end=clean_end)
    pipe = pipeline(folder, safety_checker=None)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing=spacing, set_alpha_to_one=clean_end
    )
    assert backbone.process.offset == (0 if spacing == "trailing" else 1)
    assert_same_images(backbone, pipe)


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl_samples_what_diffusers_samples(zeros, tmp_path):
    folder = sdxl(tmp_path, zeros=zeros)
    backbone = load_backbone(folder, device="cpu", spacing="leading")
    assert_same_images(backbone, pipeline(folder))


def test_the_mean_and_deviation_of_an_autoencoders_latents_are_honoured(tmp_path):
    folder = sdxl(tmp_path)
    config = folder / "vae" / "config.json"
    known = {"latents_mean": [0.5, -0.5, 0.25, 0], "latents_std": [2, 0.5, 1, 1.5]}
    config.write_text(json.dumps(json.loads(config.read_text()) | known))
    backbone = load_backbone(folder, device="cpu", spacing="leading")
    assert_same_images(backbone, pipeline(folder))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    means = backbone.pipe.vae.encode(2 * images - 1).latent_dist.mean
    mean, std = (torch.tensor(known[k])[:, None, None] for k in ("latents_mean", "latents_std"))
    torch.testing.assert_close(backbone.encode(images), (means - mean) * 4.0 / std)


@pytest.mark.parametrize("t5", [True, False])
def test_sd3_samples_what_diffusers_samples(t5, folders):
    folder, parts = folders["sd3"], {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    options = {"t5": t5, "spacing": "linspace", "max_sequence_length": 40}
    backbone = load_backbone(folder, device="cpu", **options)
    assert_same_images(backbone, pipeline(folder, **parts), max_sequence_length=40)


def test_dit_samples_what_diffusers_samples(folders):
    backbone = load_backbone(folders["dit"], device="cpu", spacing="leading")
    ours = sample(backbone, noise(backbone), "goldfish", "ddim", STEPS, GUIDANCE)
    theirs = pipeline(folders["dit"])(
        [1, 1], GUIDANCE, torch.Generator().manual_seed(0), STEPS, output_type="pt"
    )
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs.images, rtol=0, atol=1e-4)


def test_dit_takes_names_numbers_and_nothing(backbones):
    labels = backbones["dit"].condition(["Tinca tinca", "great white shark", "7", ""])["labels"]
    assert labels.tolist() == [0, 2, 7, 1000]
    with pytest.raises(UserError, match=r"number below 1000.*'unicorn'.*goldfish"):
        backbones["dit"].condition(["unicorn"])


def test_dit_has_no_text_for_null_text_to_optimise(backbones, pictures, tmp_path):
    backbone, message = backbones["dit"], "takes text for NullText, got dit; take another"
    with pytest.raises(UserError, match=message):
        invert(backbone, torch.zeros(1, 3, 32, 32), "1", "null_text", 2)
    prompts = dict.fromkeys(Folder(pictures).ids, "1")
    with pytest.raises(UserError, match=message):
        fill_bank(tmp_path / "bank", backbone, Folder(pictures), prompts, "null_text", steps=2)
    assert not (tmp_path / "bank").exists()


def test_conditions_are_diffusers_own(backbones):
    for name in ("stable-diffusion", "sdxl", "sd3"):
        backbone = backbones[name]
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        if name == "sd3":
            options |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": 77}
        text, free, *pooled = backbone.pipe.encode_prompt(PROMPT, **options)
        ours = backbone.condition([PROMPT, ""])
        torch.testing.assert_close(ours["text"], torch.cat([text, free]), rtol=0, atol=1e-5)
        if pooled:
            torch.testing.assert_close(ours["pooled"], torch.cat(pooled), rtol=0, atol=1e-5)
    assert backbones["sdxl"].condition(["a"])["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


@pytest.mark.parametrize("name", MAKERS)
def test_a_prompt_has_the_same_rows_and_answer_in_every_batch(name, backbones):
    backbone = backbones[name]
    prompts = ["1", "", "goldfish"] if name == "dit" else [PROMPT, "", "a dog"]
    latents = noise(backbone, 3)
    mixed, together = check_batches(backbone, prompts, latents)
    last = backbone.condition(prompts[-1:])
    assert not torch.allclose(together[:1], backbone.network(latents[:1], 500, last))
    assert {key: value.shape[0] for key, value in backbone.condition([]).items()} == dict.fromkeys(
        mixed, 0
    )


@pytest.mark.parametrize("name", MAKERS)
def test_a_checkpoint_is_a_backbone_and_its_recipe_makes_it_again(name, backbones):
    backbone = backbones[name]
    assert isinstance(backbone, Backbone)
    assert backbone.fingerprint["name"] == name
    again = load_backbone(**backbone.recipe, device="cpu")
    assert again.fingerprint == backbone.fingerprint


@pytest.mark.parametrize("name", ["stable-diffusion", "sdxl", "sd3"])
def test_the_network_is_differentiable_in_the_text(name, folders):
    backbone = load_backbone(folders[name], device="cpu")
    latents = noise(backbone)
    with torch.inference_mode():  # as a caller may have it when a prompt is first seen
        backbone.condition([PROMPT])
    condition = backbone.condition([PROMPT] * 2)
    text = condition["text"].clone().requires_grad_()
    backbone.network(latents, 300, condition | {"text": text}).square().sum().backward()
    assert text.grad is not None and text.grad.isfinite().all() and text.grad.abs().max() > 0


def test_the_codec_is_diffusers_posterior_mean_and_decoder(backbones):
    for backbone in backbones.values():
        images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        config, clean = backbone.pipe.vae.config, backbone.encode(images)
        mean = backbone.pipe.vae.encode(2 * images - 1).latent_dist.mean
        shift = config.shift_factor or 0
        torch.testing.assert_close(clean, (mean - shift) * config.scaling_factor)
        decoded = backbone.pipe.vae.decode(mean).sample / 2 + 0.5
        torch.testing.assert_close(backbone.decode(clean), decoded.clamp(0, 1))
        assert backbone.encode(images[:0]).shape == (0, *backbone.latent_shape)


def test_the_codec_works_in_slices(backbones, monkeypatch):
    backbone = backbones["stable-diffusion"]
    clean = noise(backbone, 5)
    whole = backbone.decode(clean)
    monkeypatch.setattr("augment.diffusion.checkpoints.codec.PIXELS", 2 * 32**2)
    torch.testing.assert_close(backbone.decode(clean), whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(backbone.encode(whole)[:2], backbone.encode(whole[:2]))


def test_an_autoencoder_that_overflows_in_half_goes_on_in_float32(tmp_path):
    folder = stable_diffusion(tmp_path / "loud")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = {key: value.half().float() for key, value in load_file(path).items()}
    weights["decoder.conv_in.weight"] *= 2**17
    save_file(weights, path, {"format": "pt"})
    exact = load_backbone(folder, device="cpu")
    narrow = load_backbone(folder, device="cpu", dtype=torch.float16)
    clean = 10 * noise(exact)
    with pytest.warns(PrecisionWarning, match=r"overflowed in torch.float16"):
        images = narrow.decode(clean)
    torch.testing.assert_close(images, exact.decode(clean), rtol=0, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        narrow.decode(clean)
    assert narrow.network(clean, 10, narrow.condition(["a", "b"])).isfinite().all()
    with pytest.raises(UserError, match="overflow in what goes into the autoencoder"):
        exact.decode(clean / 0)
    weights["decoder.conv_in.weight"][:] = torch.nan
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"got overflow in float32"):
        load_backbone(folder, device="cpu").decode(clean)


def test_sdxls_autoencoder_is_upcast_from_float16_alone(folders):
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        backbone = load_backbone(folders["sdxl"], device="cpu", dtype=dtype)
        assert backbone.pipe.vae.dtype == expected and backbone.pipe.unet.dtype == dtype


def test_a_tiny_autoencoder_decodes_and_does_not_encode(folders, backbones, tmp_path):
    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), upsampling_scaling_factor=2,
    )  # fmt: skip
    tiny.save_pretrained(tmp_path)
    plain = backbones["stable-diffusion"]
    backbone = load_backbone(folders["stable-diffusion"], device="cpu", tiny_vae=tmp_path)
    clean = noise(backbone)
    expected = (tiny.decode(clean).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(backbone.decode(clean), expected, rtol=0, atol=1e-5)
    images = plain.decode(clean)
    torch.testing.assert_close(backbone.encode(images), plain.encode(images))
    assert backbone.fingerprint == plain.fingerprint  # banks hold latents
    assert backbone.recipe["tiny_vae"] == str(tmp_path)


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def lora_file(path, style):
    """Rank 2, for one attention's query and output, as three ways of saving write it."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for layer, old in (("to_q", "to_q"), ("to_out.0", "to_out")):
        for name, new, shape in (("down", "lora_A", (2, 32)), ("up", "lora_B", (32, 2))):
            key = f"unet.{LAYER}.{layer}.{new}.weight"
            if style != "peft":
                key = f"{LAYER}.processor.{old}_lora.{name}.weight"
            if style == "prefixed":
                key = "unet." + key
            state[key] = torch.randn(shape, generator=generator)
    save_file(state, path)
    return path, [*state.values()]


@pytest.mark.parametrize("style", ["peft", "prefixed", "bare"])
def test_a_lora_is_its_product_added_to_the_weights(style, folders, tmp_path):
    path, (down, up, out_down, out_up) = lora_file(tmp_path / "lora.safetensors", style)
    folder, backbone = folders["stable-diffusion"], None
    backbone = load_backbone(folder, device="cpu", lora=path, lora_scale=0.5)
    expected = load_backbone(folder, device="cpu")
    state = expected.pipe.unet.get_submodule(LAYER)
    with torch.no_grad():
        state.to_qkv.weight[:32] += 0.5 * up @ down
        state.to_out[0].weight += 0.5 * out_up @ out_down
    latents, condition = noise(backbone), backbone.condition([PROMPT, ""])
    answers = [b.network(latents, 700, condition) for b in (backbone, expected)]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-5)
    plain = load_backbone(folder, device="cpu")
    assert (plain.network(latents, 700, condition) - answers[0]).abs().max() > 1e-3
    assert load_backbone(**backbone.recipe, device="cpu").fingerprint == backbone.fingerprint
    seen = {b.fingerprint.get("lora") for b in (backbone, plain)}
    seen.add(load_backbone(folder, device="cpu", lora=path).fingerprint["lora"])
    assert len(seen) == 3


def test_a_lora_that_is_none_or_of_another_model_is_refused(folders, tmp_path):
    folder = folders["stable-diffusion"]
    path, _ = lora_file(tmp_path / "pytorch_lora_weights.safetensors", "peft")
    assert "lora" in load_backbone(folder, device="cpu", lora=tmp_path).fingerprint
    state = {key.replace("down_blocks.0", "down_blocks.7"): v for key, v in load_file(path).items()}
    save_file(state, path)
    with pytest.raises(UserError, match="LoRA for this model"):
        load_backbone(folder, device="cpu", lora=path)
    save_file({"odd": torch.ones(1)}, path)
    with pytest.raises(UserError, match="pytorch_lora_weights"):
        load_backbone(folder, device="cpu", lora=path)
    with pytest.raises(UserError, match="nowhere"):
        load_backbone(folder, device="cpu", lora=tmp_path / "nowhere")


def attention(net, width=0):
    """Low-rank weights of every attention layer, as if trained on a text that is wider."""
    layers = [name for name, part in net.named_modules() if isinstance(part, torch.nn.Linear)]
    state = {}
    for name in (n for n in layers if ".attn" in n and "qkv" not in n and "to_kv" not in n):
        rows, columns = net.get_submodule(name).weight.shape
        columns += width * name.endswith(("attn2.to_k", "attn2.to_v"))
        state[f"unet.{name}.lora_A.weight"] = torch.randn(4, columns)
        state[f"unet.{name}.lora_B.weight"] = torch.randn(rows, 4)
    return state


def test_a_lora_whose_shapes_do_not_fit_is_refused_as_diffusers_refuses_it(folders, tmp_path):
    folder, path = folders["stable-diffusion"], tmp_path / "other.safetensors"
    net = load_backbone(folder, device="cpu").trainable()
    save_file(attention(net), path)
    assert "lora" in load_backbone(folder, device="cpu", lora=path).fingerprint
    save_file(attention(net, width=16), path)
    with pytest.raises(UserError, match=r"LoRA for this model, got .*attn2"):
        load_backbone(folder, device="cpu", lora=path)
    some = attention(net)
    zero = {key: torch.zeros_like(value) for key, value in some.items()}
    save_file(zero, path)
    with pytest.raises(UserError, match="0 of its 32 layers change"):
        load_backbone(folder, device="cpu", lora=path)
    one = next(iter(some))
    save_file({**some, one: torch.full_like(some[one], torch.nan)}, path)
    with pytest.raises(UserError, match="finite and whole"):
        load_backbone(folder, device="cpu", lora=path)
    with pytest.raises(UserError, match=r"lora_scale of .* as float, got nan"):
        load_backbone(folder, device="cpu", lora=path, lora_scale=float("nan"))


ODD = {
    "DoRA of kohya": ("lora_unet_a.dora_scale", (32, 1)),
    "LoKr": ("lora_unet_a.lokr_w1", (4, 4)),
    "LoHa": ("lora_unet_a.hada_w1_a", (4, 4)),
    "Tucker": ("lora_unet_a.lora_mid.weight", (4, 4, 3, 3)),
    "a bias": (f"unet.{LAYER}.to_q.lora_B.bias", (32,)),
}


@pytest.mark.parametrize("kind", ODD)
def test_weights_of_another_kind_in_a_lora_are_refused_by_name(kind, folders, tmp_path):
    path, _ = lora_file(tmp_path / "mixed.safetensors", "peft")
    key, shape = ODD[kind]
    save_file(load_file(path) | {key: torch.ones(shape)}, path)
    for model in (folders["stable-diffusion"], "tiny"):
        with pytest.raises(UserError, match=f"LoRA for this model.*{key}"):
            load_backbone(model, device="cpu", lora=path)


def trained_lora(folder, place, **config):
    """diffusers' own way from an adapter to a file, and its UNet with that fused."""
    from diffusers.training_utils import _collate_lora_metadata
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, fused = (pipeline(folder, safety_checker=None) for _ in range(2))
    given = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, **config}
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_v"], **given))
    with torch.no_grad():
        for key, value in pipe.unet.named_parameters():
            value += torch.rand_like(value) if "magnitude" in key else 0
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(place, state, **_collate_lora_metadata({"unet": pipe.unet}))
    fused.load_lora_weights(str(place))
    fused.fuse_lora()
    fused.unload_lora_weights()
    return fused.unet


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn1.to_q": 3}},
        {"use_dora": True},
    ],
    ids=["alpha", "rslora", "patterns", "dora"],
)
def test_a_lora_that_diffusers_saved_is_fused_as_diffusers_fuses_it(config, folders, tmp_path):
    torch.manual_seed(0)
    folder = folders["stable-diffusion"]
    theirs = trained_lora(folder, tmp_path, **config)
    ours = load_backbone(folder, device="cpu", lora=tmp_path)
    plain = load_backbone(folder, device="cpu").trainable().state_dict()
    found, expected = ours.trainable().state_dict(), theirs.state_dict()
    torch.testing.assert_close(dict(found), dict(expected))
    assert (found[f"{LAYER}.to_q.weight"] - plain[f"{LAYER}.to_q.weight"]).norm() > 1
    assert "alpha" in ours.fingerprint["lora"]


def test_a_lora_that_would_change_the_weights_otherwise_is_refused(folders, tmp_path):
    path, _ = lora_file(tmp_path / "mixed.safetensors", "peft")
    state = load_file(path)
    for config in ({"unet.init_lora_weights": "pissa"}, ["no", "settings"]):
        save_file(state, path, {"lora_adapter_metadata": json.dumps(config)})
        with pytest.raises(UserError, match=r"pissa|whole checkpoint"):
            load_backbone(folders["stable-diffusion"], device="cpu", lora=path)


def test_each_layers_alpha_of_a_kohya_file_is_its_own(folders, tmp_path):
    folder, path = folders["stable-diffusion"], tmp_path / "kohya.safetensors"
    net = load_backbone(folder, device="cpu").trainable()
    names = [key.removesuffix(".lora_A.weight")[5:] for key in attention(net) if "lora_A" in key]
    state, expected = {}, {}
    for alpha, name in enumerate(names, 1):
        rows, columns = net.get_submodule(name).weight.shape
        key, down, up = (
            f"lora_unet_{name.replace('.', '_')}",
            torch.randn(4, columns),
            torch.randn(rows, 4),
        )
        state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        state[f"{key}.alpha"] = torch.tensor(float(alpha))
        expected[name] = net.get_submodule(name).weight + alpha / 4 * up @ down
    save_file(state, path)
    found = load_backbone(folder, device="cpu", lora=path).trainable()
    for name, weight in expected.items():
        torch.testing.assert_close(found.get_submodule(name).weight, weight.detach())


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_a_compiled_network_answers_the_same(name, folders, backbones):
    compiled, plain = load_backbone(folders[name], device="cpu", compile=True), backbones[name]
    prompts = ["1", ""] if name == "dit" else [PROMPT, ""]
    condition = plain.condition(prompts)
    for timestep in (10, 900):
        answers = [b.network(noise(b), timestep, condition) for b in (compiled, plain)]
        torch.testing.assert_close(*answers, rtol=0, atol=1e-4)


def test_the_schedule_can_end_at_pure_noise(folders, tmp_path):
    folder = stable_diffusion(tmp_path, prediction_type="v_prediction")
    process = load_backbone(folder, device="cpu", zero_terminal_snr=True).process
    assert process.alpha_sigma(1.0) == (0, 1)
    rescaled = stable_diffusion(
        tmp_path / "own", prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    assert load_backbone(rescaled, device="cpu").process == process
    with pytest.raises(UserError, match="zero terminal SNR"):
        load_backbone(folders["stable-diffusion"], device="cpu", zero_terminal_snr=True)
