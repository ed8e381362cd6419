"""LoRA and tokens as other programs write them: images equal those that diffusers makes of them."""

import json

import diffusers
import pytest
import torch
from checkpoints import sd3, sdxl, stable_diffusion
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from augment import UserError, load_backbone, sample

LORA = "pytorch_lora_weights.safetensors"
KINDS = {
    "sd15": (stable_diffusion, {"spacing": "leading", "clean_end": False}),
    "sdxl": (sdxl, {"spacing": "leading"}),
    "sd3": (sd3, {"spacing": "linspace", "max_sequence_length": 256}),
}
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TEXT_LAYERS = [f"text_model.encoder.layers.0.self_attn.{end}" for end in ("v_proj", "out_proj")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, (make, _) in KINDS.items()}


@pytest.fixture(scope="module")
def loras(folders, tmp_path_factory):
    """A LoRA of network and text encoders a kind, saved as diffusers' scripts do."""
    return {kind: scripts_lora(kind, folders[kind], tmp_path_factory.mktemp("l")) for kind in KINDS}


def pipeline(kind, folder):
    parts = NO_T5 if kind == "sd3" else {}
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(kind, folder, **options):
    return load_backbone(folder, device="cpu", **KINDS[kind][1], **options)


def scripts_lora(kind, folder, place):
    """Do what ``train_dreambooth_lora*.py`` do at their ends; rank 4, alpha 8."""
    pipe, layers, modules = pipeline(kind, folder), {}, {}
    torch.manual_seed(0)
    for name in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        module = getattr(pipe, name, None)
        if module is None:
            continue
        ends = ["q_proj", "v_proj"] if name.startswith("text") else ["to_q", "to_out.0"]
        config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=ends)
        inject_adapter_in_model(config, module)
        state = get_peft_model_state_dict(module)
        state = state if kind == "sd3" else convert_state_dict_to_diffusers(state)
        layers[f"{name}_lora_layers"], modules[name] = state, module
    pipe.save_lora_weights(place, **layers, **_collate_lora_metadata(modules))
    return place


def images_of(pipe, backbone, prompt):
    """Return our images and those of diffusers' pipeline."""
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = pipe(
        [prompt] * 2, latents=latents, num_inference_steps=2, guidance_scale=2.0, output_type="pt",
        height=backbone.resolution, width=backbone.resolution,
    ).images  # fmt: skip
    return sample(backbone, latents, prompt, "ddim", 2, 2.0), theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_of_diffusers_scripts_makes_the_same_images(kind, folders, loras):
    folder, place = folders[kind], loras[kind]
    backbone, pipe = load(kind, folder, adapter=place), pipeline(kind, folder)
    before, _ = images_of(pipe, load(kind, folder), "a cat")
    pipe.load_lora_weights(str(place))
    ours, theirs = images_of(pipe, backbone, "a cat")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - before).abs().max() > 1e-2
    parts = {key.split(".")[0] for key in load_file(place / LORA)}
    assert len(parts) == 2 + (kind != "sd15")


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_kohya_file_with_text_encoders_is_its_products_added_to_the_weights(
    kind, folders, tmp_path
):
    folder, path = folders[kind], tmp_path / "kohya.safetensors"
    pipe, state = pipeline(kind, folder), {}
    encoders = {"lora_te_": pipe.text_encoder}
    if kind == "sdxl":
        encoders = {"lora_te1_": pipe.text_encoder, "lora_te2_": pipe.text_encoder_2}
    layers = {f"lora_unet_{LAYER}": pipe.unet.get_submodule(LAYER)}
    for start, encoder in encoders.items():
        for layer in TEXT_LAYERS:
            place = layer if hasattr(encoder, "text_model") else layer.removeprefix("text_model.")
            layers[start + layer] = encoder.get_submodule(place)
    generator = torch.Generator().manual_seed(0)
    for alpha, (name, layer) in enumerate(layers.items(), 1):
        rows, columns = layer.weight.shape
        key = name.replace(".", "_")
        state[f"{key}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
        state[f"{key}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / 4
        state[f"{key}.alpha"] = torch.tensor(float(alpha))
        down, up = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
        layer.weight.data += alpha / 4 * up @ down
    save_file(state, path)
    ours, theirs = images_of(pipe, load(kind, folder, lora=path), "a cat")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_both_layouts_of_a_text_encoder_are_the_same(kind, folders, loras, tmp_path):
    """Since transformers 5.6 CLIPTextModel has no part text_model, and its files no such key."""
    folder, place = folders[kind], loras[kind]
    with safe_open(place / LORA, "pt") as file:
        header = file.metadata()
    state = load_file(place / LORA)
    bare = {key.replace(".text_model.", "."): value for key, value in state.items()}
    wrapped = {
        key.replace(".encoder.", ".text_model.encoder.") if key[:4] == "text" else key: value
        for key, value in bare.items()
    }
    assert bare.keys() != wrapped.keys()
    found = []
    for number, layout in enumerate((bare, wrapped)):
        save_file(layout, tmp_path / f"{number}.safetensors", header)
        backbone = load(kind, folder, lora=tmp_path / f"{number}.safetensors")
        found.append(backbone.condition(["a cat"]))
    plain = load(kind, folder).condition(["a cat"])
    expected = load(kind, folder, lora=place).condition(["a cat"])
    for key in expected:
        assert torch.equal(found[0][key], expected[key])
        assert torch.equal(found[1][key], expected[key])
    assert not torch.allclose(plain["text"], expected["text"])


def vectors(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[-1]))


def test_a_token_of_automatic1111_is_called_as_its_file(folders, tmp_path):
    path = tmp_path / "toy.safetensors"
    save_file({"emb_params": vectors(2, 32)}, path)
    backbone, pipe = load("sd15", folders["sd15"], adapter=path), pipeline("sd15", folders["sd15"])
    pipe.load_textual_inversion(str(path), token="toy")
    ours, theirs = images_of(pipe, backbone, "a toy on a mat")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    again = load_backbone(**backbone.recipe, device="cpu")
    assert again.fingerprint == backbone.fingerprint
    renamed = path.rename(tmp_path / "doll.safetensors")
    other = load("sd15", folders["sd15"], adapter=renamed)
    assert other.fingerprint["tokens"] != backbone.fingerprint["tokens"]


def test_a_file_for_both_encoders_of_sdxl_makes_the_same_images(folders, tmp_path):
    path, state = tmp_path / "toy.safetensors", {"clip_l": vectors(2, 32), "clip_g": vectors(2, 24)}
    save_file(state, path)
    pipe = pipeline("sdxl", folders["sdxl"])
    for key, number in (("clip_l", ""), ("clip_g", "_2")):
        parts = {name: getattr(pipe, name + number) for name in ("text_encoder", "tokenizer")}
        pipe.load_textual_inversion(state[key], token="toy", **parts)
    backbone = load("sdxl", folders["sdxl"], adapter=path)
    ours, theirs = images_of(pipe, backbone, "a toy on a mat")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_sd3_reads_all_vectors_of_a_token(folders, tmp_path):
    one, two = {"clip_l": vectors(2, 32), "clip_g": vectors(2, 24)}, tmp_path / "two"
    save_file(one, tmp_path / "toy.safetensors")
    two.mkdir()
    for file, key in (("learned_embeds", "clip_l"), ("learned_embeds_2", "clip_g")):
        rows = {name: row.clone() for name, row in zip(("<p>", "<q>"), one[key], strict=True)}
        save_file(rows, two / f"{file}.safetensors")
    ours = load("sd3", folders["sd3"], adapter=tmp_path / "toy.safetensors")
    apart = load("sd3", folders["sd3"], adapter=two)
    for key, found in ours.condition(["a toy"]).items():
        assert torch.equal(found, apart.condition(["a <p> <q>"])[key])
    with pytest.raises(UserError, match=r"at most 75 tokens, got 76 in 'a a"):
        ours.condition(["a " * 74 + "toy"])


def test_what_does_not_fit_the_model_is_one_sentence(folders, loras, tmp_path):
    def written(name, state):
        save_file(state, tmp_path / name)
        return tmp_path / name

    (tmp_path / "x.pt").write_bytes(b"no")
    cases = (
        ("sd15", written("one.safetensors", {"clip_g": vectors(24)}), "for text_encoder_2"),
        ("sd15", written("toy.safetensors", {"emb_params": vectors(8)}), "32 finite numbers for"),
        ("sd15", written("ca.safetensors", {"emb_params": vectors(32)}), "'ca', which is in the"),
        ("sd15", loras["sd15"] / LORA, "low-rank weights as lora"),
        ("sd15", tmp_path / "x.pt", "a pickle"),
        ("tiny", written("two.safetensors", {"clip_g": vectors(24)}), "of text_encoder_2"),
        ("sd15", loras["sdxl"], "a LoRA for this model"),
        ("sd15", loras["sd3"], "a LoRA for this model"),
    )
    for kind, adapter, message in cases:
        with pytest.raises(UserError, match=message):
            load_backbone(folders.get(kind, kind), device="cpu", adapter=adapter)


def test_tokens_that_the_prompts_name_must_be_there(folders, loras, tmp_path):
    record = {"weights": "", "prompts": {"Bag": "a <bag>"}, "images": [], "tokens": ["<bag>"]}
    (tmp_path / "adapter.json").write_text(json.dumps(record))
    save_file(load_file(loras["sd15"] / LORA), tmp_path / LORA)
    with pytest.raises(UserError, match=r"a vector of '<bag>', which the prompts of .* got none"):
        load("sd15", folders["sd15"], adapter=tmp_path)
    save_file({"<bag>": vectors(32)}, tmp_path / "learned_embeds.safetensors")
    assert load("sd15", folders["sd15"], adapter=tmp_path).adapted_prompts == {"Bag": "a <bag>"}
