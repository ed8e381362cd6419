"""Finding checkpoints, telling them apart, and what is said when there is none."""

import json
import logging
import os
import shutil
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from checkpoints import (
    PROMPT,
    UNET,
    Hub,
    dit,
    flux2,
    original_transformer,
    save_clip,
    sd3,
    single_file,
    stable_diffusion,
    z_image,
)
from conftest import call
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import load_file, save_file

from augment import (
    LatentBank,
    Planner,
    Synthesizer,
    SyntheticDataset,
    UserError,
    load_backbone,
    sample,
)
from augment.bank.fill import fill_bank
from augment.diffusion import BACKBONES, local_recipe
from augment.diffusion.checkpoints.find import guess_config
from augment.diffusion.checkpoints.hub import HUB, offline
from augment.networks.timm import read_weights
from augment.report.gallery import Gallery
from augment.report.provenance import Provenance
from augment.shards.write import write_shards
from augment.sources import Folder
from augment.synthesis.filters import make_filter

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("pipeline") / "sd")


@pytest.fixture
def copy(folder, tmp_path):
    """A folder to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub with one model, one of another kind, one of pickles, and one behind a licence."""
    other = shutil.copytree(folder, tmp_path / "other")
    rename(other, "StableDiffusionInpaintPipeline")
    pickled = shutil.copytree(folder, tmp_path / "pickled")
    (pickled / "unet" / WEIGHTS).rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    hub = Hub(
        {
            "me/model": folder,
            "me/other": other,
            "me/pickled": pickled,
            "me/empty": tmp_path / "empty",
            "me/gated": (401, "GatedRepo"),
            "me/gone": (404, "RepoNotFound"),
        }
    )
    with hub.used(monkeypatch, tmp_path / "cache"):
        yield hub


def rename(folder, kind):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": kind}))


def load(source, **options):
    return load_backbone(source, device="cpu", **options)


def said(source, **options):
    """The sentence that a checkpoint is refused with."""
    with pytest.raises(UserError) as caught:
        load(source, **options)
    message = str(caught.value)
    assert message.startswith("expected ") and ", got " in message and "\n" not in message
    return message


def test_fingerprints_are_of_the_weights_and_not_of_the_run(folder, copy):
    plain = load(folder)
    assert load(copy).fingerprint == plain.fingerprint
    assert load(folder, dtype=torch.bfloat16).fingerprint == plain.fingerprint
    assert set(plain.fingerprint) == {"name", "weights", "process", "resolution"}
    changes = {"spacing": "linspace"}, {"resolution": 16}, {"clean_end": False}
    seen = [plain.fingerprint, *(load(folder, **change).fingerprint for change in changes)]
    for part, name in (("unet", WEIGHTS), ("vae", WEIGHTS), ("text_encoder", "model.safetensors")):
        path = copy / part / name
        state = load_file(path)
        key = sorted(state)[-1]
        state[key] = state[key] + 1e-3
        save_file(state, path, {"format": "pt"})
        seen.append(load(copy).fingerprint)
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": 0.5}))
    seen.append(load(copy).fingerprint)
    assert all(one != other for n, one in enumerate(seen) for other in seen[:n])


def test_a_recipe_is_json_and_keeps_what_is_not_the_default(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    backbone = load(folder.name, spacing="trailing", resolution=16, dtype=torch.bfloat16)
    assert backbone.recipe == {"name_or_path": str(folder), "resolution": 16}
    assert json.loads(json.dumps(backbone.recipe)) == backbone.recipe
    assert load("tiny").recipe == {"name_or_path": "tiny"}


def test_a_resolution_of_ones_own_is_worked_in(folder):
    backbone = load(folder, resolution=48)
    assert backbone.resolution == 48 and backbone.latent_shape == (4, 24, 24)
    latents = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(0))
    assert sample(backbone, latents, steps=2).shape == (1, 3, 48, 48)


def test_a_variant_is_taken_where_there_is_one(copy):
    plain = load(copy).fingerprint
    unet = copy / "unet" / WEIGHTS
    state = {key: value.half() for key, value in load_file(unet).items()}
    save_file(state, unet.with_name("diffusion_pytorch_model.fp16.safetensors"), {"format": "pt"})
    assert load(copy).fingerprint == plain != load(copy, variant="fp16").fingerprint
    unet.unlink()
    assert load(copy, variant="fp16").pipe.unet.dtype == torch.float32
    assert "safetensors weights in" in said(copy)
    assert "variant" in said(copy, variant="fp8")


def test_a_single_file_is_the_folder_it_was_made_from(folder, tmp_path):
    path = single_file(folder, tmp_path / "model.safetensors")
    one, other = load(path, config=folder), load(folder)
    latents = torch.randn(2, *one.latent_shape, generator=torch.Generator().manual_seed(0))
    images = [sample(b, latents, PROMPT, steps=3, guidance=3) for b in (one, other)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-6)
    assert one.fingerprint["name"] == other.fingerprint["name"]
    assert one.fingerprint["weights"] != other.fingerprint["weights"]
    assert load_backbone(**one.recipe, device="cpu").fingerprint == one.fingerprint


HEADERS = {
    "sd15": {"input_blocks.0.0.weight": (8, 4), "cond_stage_model.transformer.x": (1,)},
    "sdxl": {"input_blocks.0.0.weight": (8, 4), "conditioner.embedders.1.model.x": (1,)},
    "sd3": {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (1,), "pos_embed": (1, 36864)},
    "sd35-medium": {
        "joint_blocks.0.context_block.adaLN_modulation.1.bias": (1,),
        "pos_embed": (1, 147456),
    },
    "sd35-large": {
        "joint_blocks.0.context_block.adaLN_modulation.1.bias": (1,),
        "joint_blocks.37.x_block.mlp.fc1.weight": (1,),
    },
    "flux1-dev": {"double_blocks.0.img_mod.lin.weight": (1,), "guidance_in.in_layer.weight": (1,)},
}


def header(path, shapes):
    own = ("input_blocks", "joint_blocks", "pos_embed", "double_blocks", "guidance_in")
    names = {key: f"model.diffusion_model.{key}" if key.startswith(own) else key for key in shapes}
    save_file({names[key]: torch.zeros(shape) for key, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("name", HEADERS)
def test_a_single_file_is_known_by_its_header(name, tmp_path):
    assert guess_config(header(tmp_path / "m.safetensors", HEADERS[name])) == name


def test_single_files_of_unknown_or_several_models_are_refused(tmp_path):
    path, unet = tmp_path / "m.safetensors", "input_blocks.0.0.weight"
    header(path, {"odd": (1,)})
    assert "1 other tensors" in said(path)
    header(path, {unet: (8, 9), "cond_stage_model.transformer.x": (1,)})  # inpainting
    assert "known text-to-image model" in said(path)
    header(path, {unet: (8, 4), "cond_stage_model.model.x": (1,)})
    assert "config='sd21'" in said(path)
    path.write_bytes(b"not weights")
    assert "m.safetensors" in said(path)
    assert "not there" in said(tmp_path / "nowhere.safetensors")


LACKING = {
    "sd3": "final_layer.linear.bias",
    "z-image": "cap_embedder.1.bias",
    "flux2": "img_in.weight",
}
NETWORKS = {
    "sd3": (sd3, {}),
    "z-image": (z_image, {"resolution": 32}),
    "flux2": (flux2, {"resolution": 32}),
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_the_network_alone_takes_the_rest_from_its_config(name, prefix, tmp_path):
    make, options = NETWORKS[name]
    folder = make(tmp_path / "folder")
    weights = folder / "transformer" / WEIGHTS
    state = {prefix + key: value for key, value in original_transformer(name, weights).items()}
    weights.rename(tmp_path / "kept.safetensors")
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    one = load(path, config=folder, **options)
    (tmp_path / "kept.safetensors").rename(weights)
    whole = load(folder, **options)
    latents = torch.randn(1, *one.latent_shape, generator=torch.Generator().manual_seed(0))
    images = [sample(b, latents, PROMPT, steps=2, guidance=3) for b in (one, whole)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-6)
    encoder = folder / "text_encoder" / "model.safetensors"
    save_file({k: v + 1 for k, v in load_file(encoder).items()}, encoder, {"format": "pt"})
    assert load(path, config=folder, **options).fingerprint != one.fingerprint
    lacking = f"{prefix}{LACKING[name]}"
    save_file({key: value for key, value in state.items() if key != lacking}, path)
    message = said(path, config=folder, **options)
    assert "got none of" in message or "whole checkpoint" in message
    encoder.unlink()
    save_file(state, path)
    assert "safetensors weights in" in said(path, config=folder, **options)


def test_what_a_file_has_not_comes_from_the_hub(hub, tmp_path):
    folder = z_image(tmp_path / "z")
    hub.repositories["me/z"] = folder
    path = tmp_path / "m.safetensors"
    save_file(original_transformer("z-image", folder / "transformer" / WEIGHTS), path)
    options = {"config": "me/z", "resolution": 32}
    backbone = load(path, **options)
    assert not any("transformer" in path and "safetensors" in path for path in hub.asked)
    assert any("text_encoder" in path and "safetensors" in path for path in hub.asked)
    hub.asked.clear()
    again = load(path, local_files_only=True, **options)
    assert again.fingerprint == backbone.fingerprint and hub.asked == []


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("double_blocks.0.img_mod.lin.weight", "black-forest-labs/FLUX.1-schnell"),
        ("double_stream_modulation_img.lin.weight", "flux2-klein"),
        ("cap_embedder.1.weight", "z-image"),
    ],
)
def test_a_file_that_may_be_of_several_models_asks_for_its_config(key, config, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({key: torch.zeros(1)}, path)
    assert f"config={config!r}" in said(path)


def test_a_quantised_file_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"cap_embedder.1.weight": torch.zeros(1).to(torch.float8_e4m3fn)}, path)
    assert "quantised ones (F8_E4M3)" in said(path)


def test_a_single_file_without_its_parts_is_refused(folder, tmp_path):
    path = header(tmp_path / "m.safetensors", HEADERS["sd15"])
    assert "whole checkpoint" in said(path, config=folder)
    assert "config" in said(folder, config=folder)


def test_the_hub_is_asked_for_the_index_first_and_the_cache_then(hub, folder):
    backbone = load("me/model")
    assert backbone.fingerprint == load(folder).fingerprint
    assert backbone.recipe == {"name_or_path": "me/model"}
    hub.repositories.clear()
    hub.asked.clear()
    again = load("me/model", local_files_only=True)
    assert again.fingerprint == backbone.fingerprint and hub.asked == []


def test_a_cache_of_some_files_is_said_without_a_network(hub):
    said_so = "'me/model', of which files are missing on this machine"
    hf_hub_download("me/model", "model_index.json")
    assert said_so in said("me/model", local_files_only=True)
    load("me/model")
    for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/unet/*.safetensors"):
        path.unlink()
    assert said_so in said("me/model", local_files_only=True)
    load("me/model")
    for path in Path(constants.HF_HUB_CACHE).rglob("snapshots/*/vae"):
        shutil.rmtree(path)
    with offline():
        assert said_so in said("me/model")


@pytest.mark.filterwarnings("ignore:expected images of about 32")
def test_a_bank_asks_the_hub_only_for_what_is_named(hub, pictures, tmp_path, monkeypatch, capsys):
    path = tmp_path / "bank"
    fill_bank(path, load("me/model"), Folder(pictures), steps=2)
    assert LatentBank.open(path).recipe == {"name_or_path": "me/model", "local_files_only": True}
    load_backbone(**LatentBank.open(path).recipe, device="cpu")  # from the cache
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.asked.clear()
    shards = ["synthesize", str(path), "--per-class", "1", "--out", str(tmp_path / "shards")]
    report = ["report", str(path), "--rules", "fix/0", "--out", str(tmp_path / "report.html")]
    for command in (report, shards):
        code, _, error = call(monkeypatch, capsys, *command, "--device", "cpu")
        assert code == 2 and "--backbone" in error
    with pytest.raises(UserError, match="not on this machine"):
        SyntheticDataset(LatentBank.open(path))
    assert hub.asked == []
    code, *_ = call(monkeypatch, capsys, *shards, "--device", "cpu", "--backbone", "me/model")
    assert code == 0 and "model_index.json" in " ".join(hub.asked)


@pytest.mark.filterwarnings("ignore:expected images of about 32")
def test_a_report_does_not_download_what_shards_name(hub, tiny, pictures, tmp_path, capsys):
    save_clip(tmp_path / "clip")
    hub.repositories["me/clip"] = tmp_path / "clip"
    fill_bank(tmp_path / "bank", tiny, Folder(pictures), steps=2)
    bank = LatentBank.open(tmp_path / "bank")
    judges = {"clip": make_filter("clip", model="me/clip", to="images", minimum=None)}
    made, shards = Synthesizer(tiny, bank, source=pictures), tmp_path / "shards"
    write_shards(made, Planner(bank.members), 1, shards, filters=judges)
    assert hub.asked
    gallery = Gallery(Provenance.of(bank, shards), tiny, ["fix/0"], pictures)
    hub.asked.clear()
    assert list(gallery._scorers(made)) == ["clip"]
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert gallery._scorers(made) == {} and "without scores of clip" in capsys.readouterr().out
    assert hub.asked == []


def test_a_strangers_lora_is_not_downloaded_with_a_backbone_that_is_named(hub, tmp_path):
    recipe = {"name_or_path": "tiny", "lora": "me/lora"}
    for named in (False, True):
        with pytest.raises(UserError, match="not on this machine"):
            load_backbone(**local_recipe(recipe, named), device="cpu")
    assert hub.asked == []
    assert local_recipe({"name_or_path": "tiny"}) == {"name_or_path": "tiny"}
    assert local_recipe({"name_or_path": "a/b", "local_files_only": True}, named=True) == {
        "name_or_path": "a/b"
    }


def test_an_adapter_of_the_hub_is_downloaded_once(hub, folder, tmp_path):
    (tmp_path / "made").mkdir()
    row = torch.randn(32, generator=torch.Generator().manual_seed(0))
    save_file({"<toy>": row}, tmp_path / "made" / "learned_embeds.safetensors")
    (tmp_path / "made" / "big.bin").write_bytes(b"not asked for")
    hub.repositories["me/adapter"] = tmp_path / "made"
    with pytest.raises(UserError, match="not on this machine"):
        load(folder, adapter="me/adapter", local_files_only=True)
    assert hub.asked == []
    ours, local = load(folder, adapter="me/adapter"), load(folder, adapter=tmp_path / "made")
    assert ours.fingerprint == local.fingerprint and "tokens" in ours.fingerprint
    assert not any(path.endswith("big.bin") for path in hub.asked)
    hub.asked.clear()
    recipe = local_recipe(ours.recipe)
    assert recipe["adapter"] == "me/adapter" and recipe["local_files_only"]
    assert load_backbone(**recipe, device="cpu").fingerprint == local.fingerprint
    assert load("tiny", local_files_only=True).fingerprint and hub.asked == []
    assert "got neither" in said(folder, adapter="me/empty")
    assert "does not have" in said(folder, adapter="me/gone")
    assert "licence" in said("tiny", adapter="me/gated")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("me/gated", "licence; accept it at https://huggingface.co/me/gated"),
        ("me/gone", "does not have"),
        ("me/empty", "no model_index.json"),
        ("me/other", "StableDiffusionInpaintPipeline"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_sentence(hub, name, words):
    assert words in said(name)
    assert not any(path.endswith("safetensors") for path in hub.asked)


def test_pickles_are_not_taken(hub, copy):
    assert "safetensors" in said("me/pickled")
    assert not any(path.endswith(".bin") for path in hub.asked)
    (copy / "unet" / WEIGHTS).rename(copy / "unet" / "diffusion_pytorch_model.bin")
    assert "diffusion_pytorch_model.bin, a pickle" in said(copy)


def test_what_is_not_in_the_cache_is_said_to_be_missing(hub, tmp_path):
    assert "could not be reached" in said("me/model", local_files_only=True)
    path = header(tmp_path / "m.safetensors", HEADERS["sd15"])
    assert "could not be reached" in said(path, config="me/model", local_files_only=True)
    assert hub.asked == []


@pytest.mark.parametrize("lost", [f"unet/{WEIGHTS}", "text_encoder/model.safetensors"])
def test_a_cache_that_lacks_files_is_said_to(lost, hub):
    load("me/model")
    hub.asked.clear()
    (path,) = Path(constants.HF_HUB_CACHE).glob(f"*/snapshots/*/{lost}")
    path.unlink()
    message = said("me/model", local_files_only=True)
    assert "of which files are missing on this machine" in message and hub.asked == []
    assert load("me/model").fingerprint  # which fetches it again


def test_no_deprecated_name_is_used(folder, tmp_path, monkeypatch, caplog):
    """Whatever diffusers and transformers warn of or log on the way is heard here."""
    for module in ("checkpoint", "codec", "lora", "tokens"):
        place = f"augment.diffusion.checkpoints.{module}.quiet"
        monkeypatch.setattr(place, nullcontext, raising=False)
    for name in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    path = single_file(folder, tmp_path / "m.safetensors")
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error", DeprecationWarning)
        warnings.simplefilter("error", FutureWarning)
        z = z_image(tmp_path / "z")
        net = original_transformer("z-image", z / "transformer" / WEIGHTS)
        save_file(net, tmp_path / "z.safetensors")
        alone = load(tmp_path / "z.safetensors", config=z, resolution=32)
        others = load(folder), load(path, config=str(folder)), load(sd3(tmp_path / "3"))
        for backbone in (*others, alone):
            latents = torch.zeros(1, *backbone.latent_shape)
            sample(backbone, latents, PROMPT, "ddim", 1, 2.0)
            backbone.save(tmp_path / backbone.fingerprint["name"])
    assert [text for text in caplog.messages if "deprecat" in text.lower()] == []


@pytest.mark.slow  # the hub's client tries again for half a minute
def test_no_network_is_said(hub):
    hub.shutdown()
    hub.server_close()
    assert "could not be reached" in said("me/model")


def test_a_folder_that_is_no_checkpoint_is_refused(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in said(tmp_path / "empty")
    rename(copy, "SanaPipeline")
    assert "'SanaPipeline'" in said(copy)
    (copy / "model_index.json").write_text("{")
    assert "model_index.json" in said(copy)


def test_a_damaged_checkpoint_is_refused(copy):
    path = copy / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    assert "whole checkpoint" in said(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1, 0.2]},
    ],
)
def test_a_schedule_that_is_not_ours_is_refused(changes, copy):
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert "schedule" in said(copy)


def test_a_prompt_that_would_be_cut_off_is_refused_with_its_length(folder, tmp_path):
    backbone = load(folder)
    assert backbone.condition(["a " * 75])["text"].shape == (1, 77, 32)
    with pytest.raises(UserError, match=r"at most 75 tokens, got 76 in 'a a a"):
        backbone.condition(["a " * 76])
    with pytest.raises(UserError, match=r"at most 19 tokens, got 41.*max_sequence_length"):
        load(sd3(tmp_path), t5=True, max_sequence_length=20).condition(["a" * 40])


def test_what_is_not_there_or_does_not_fit_is_refused(folder, tmp_path):
    assert "multiple of 2, got 33; this model's own is 32" in said(folder, resolution=33)
    assert "multiple of 4" in said(sd3(tmp_path / "sd3", t5=False), resolution=34)
    assert "expected text_encoder_3 in" in said(tmp_path / "sd3", t5=True)
    names = said(folder, colour="red")
    assert "'colour'" in names and "lora_scale" in names and "spacing" in names
    assert "'t5'" in said(folder, t5=True)
    assert "'resolution'" in said(dit(tmp_path / "dit"), resolution=64)
    assert "'resolution'" in said("tiny", resolution=64)
    assert "sd35-large" in said("sd42") and list(BACKBONES) == ["tiny", "tiny-cifar", *HUB]


def test_a_variant_that_is_there_alone_or_not_at_all_is_hinted_at(copy):
    assert "got none of any variant; leave variant out" in said(copy, variant="fp16")
    for path in copy.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    assert "variant 'fp16'; load them with variant='fp16'" in said(copy)
    assert "load them with variant='fp16'" in said(copy, variant="bf16")
    assert load(copy, variant="fp16").resolution == 32


def test_what_belongs_to_other_places_is_refused(folder, tmp_path):
    assert "got 'main' with" in said(folder, revision="main")
    path = header(tmp_path / "m.safetensors", HEADERS["sd15"])
    assert "got 'fp16' with" in said(path, variant="fp16", config=folder)


def sharded(part, stem="diffusion_pytorch_model", other=None):
    """Split a part's weights in two files with an index, and name another file in that."""
    path = part / f"{stem}.safetensors"
    state = load_file(path)
    path.unlink()
    places = {}
    for number, keys in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        name = f"{stem}-0000{number}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, part / name, {"format": "pt"})
        places |= dict.fromkeys(keys, name)
    if other:
        places[sorted(state)[0]] = other
    record = {"metadata": {"total_size": 1}, "weight_map": places}
    (part / f"{stem}.safetensors.index.json").write_text(json.dumps(record))
    return state


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_index_that_names_a_pickle_is_refused_and_nothing_unpickled(part, copy, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", never)
    stem = "diffusion_pytorch_model" if part == "unet" else "model"
    torch.save({"conv_in.weight": torch.zeros(1)}, copy / part / "evil.bin")
    state = sharded(copy / part, stem, "evil.bin")
    assert "index of safetensors files beside it, got evil.bin" in said(copy)
    for other in ("../unet/config.json", "evil.safetensors"):  # another place, not there
        save_file(state, copy / part / f"{stem}.safetensors", {"format": "pt"})
        sharded(copy / part, stem, other)
        assert "index of safetensors files beside it" in said(copy)


def test_the_fingerprint_is_of_the_files_that_are_loaded(folder, copy):
    state = sharded(copy / "unet")
    plain = load(copy).fingerprint
    save_file(state, copy / "unet" / "model.safetensors")  # of no name that diffusers takes
    save_file(state, copy / "unet" / "diffusion_pytorch_model-00003-of-00003.safetensors")
    assert load(copy).fingerprint == plain != load(folder).fingerprint
    save_file(state, copy / "unet" / WEIGHTS, {"format": "pt"})
    assert "one set of weights" in said(copy)


def change(folder, part, name="config.json", **changes):
    path = folder / part / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


STRANGE = {
    "a module that the index names": (
        "",
        "model_index.json",
        {"unet": ["antigravity", "x"]},
        "unet",
    ),
    "a function": ("", "model_index.json", {"scheduler": ["os", "system"]}, "scheduler"),
    "another class": ("", "model_index.json", {"vae": ["diffusers", "UNet2DModel"]}, "vae"),
    "a tokenizer of its own": (
        "",
        "model_index.json",
        {"tokenizer": ["transformers", "AutoTokenizer"]},
        "tokenizer",
    ),
    "a number for a part": ("", "model_index.json", {"unet": 5}, "unet"),
    "no network": ("", "model_index.json", {"unet": None}, "unet"),
    "no text encoder": ("", "model_index.json", {"text_encoder": [None, None]}, "text_encoder"),
    "no size": ("unet", "config.json", {"sample_size": "huge"}, "sample_size"),
    "two sizes": ("unet", "config.json", {"sample_size": [16, 8]}, "sample_size"),
    "a giant": ("unet", "config.json", {"sample_size": 10**9}, "sample_size"),
    "a million layers": (
        "text_encoder",
        "config.json",
        {"num_hidden_layers": 10**6},
        "num_hidden_layers",
    ),
    "giant blocks": (
        "unet",
        "config.json",
        {"block_out_channels": [32, 10**7]},
        "block_out_channels",
    ),
    "no blocks": ("vae", "config.json", {"block_out_channels": []}, "whole checkpoint"),
    "quantised": (
        "unet",
        "config.json",
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        "quantised",
    ),
    "a scale of zero": ("vae", "config.json", {"scaling_factor": 0}, "scaling_factor 0"),
    "half a normalisation": ("vae", "config.json", {"latents_mean": [0, 0, 0, 0]}, "latents_mean"),
    "a distilled network": ("unet", "config.json", {"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
    "a prompt of no length": (
        "tokenizer",
        "tokenizer_config.json",
        {"model_max_length": "x"},
        "model_max_length",
    ),
    "β that is none": (
        "scheduler",
        "scheduler_config.json",
        {"beta_end": 1.5},
        "beta_end",
    ),
    "no steps": (
        "scheduler",
        "scheduler_config.json",
        {"num_train_timesteps": 0},
        "whole checkpoint",
    ),
    "endless steps": (
        "scheduler",
        "scheduler_config.json",
        {"num_train_timesteps": 10**12},
        "num_train",
    ),
    "continuous levels": (
        "scheduler",
        "scheduler_config.json",
        {"timestep_type": "continuous"},
        "continuous",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_checkpoint_is_refused_in_a_sentence(name, copy):
    part, file, changes, words = STRANGE[name]
    change(copy, part, file, **changes)
    if words == "continuous":
        index = json.loads((copy / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
        (copy / "model_index.json").write_text(json.dumps(index))
    assert words in said(copy)


def test_an_index_without_end_is_refused(copy):
    (copy / "model_index.json").write_text("[" * 200_000)
    assert "model_index.json" in said(copy)


def test_a_flow_of_other_levels_is_refused(tmp_path):
    assert "num_train_timesteps 500" in said(sd3(tmp_path / "a", num_train_timesteps=500))
    assert "shift above 0" in said(sd3(tmp_path / "b", shift=-1.0))


def test_a_pipe_in_a_checkpoint_is_not_opened(copy):
    (copy / "tokenizer" / "vocab.json").unlink(missing_ok=True)
    os.mkfifo(copy / "tokenizer" / "vocab.json")
    assert "vocab.json, a pipe" in said(copy)
    os.mkfifo(copy / "pipe.ckpt")
    with pytest.raises(UserError, match="no such file"):
        read_weights(str(copy / "pipe.ckpt"))


def test_a_network_of_nine_channels_is_refused_in_a_sentence(folder, copy):
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(**{**UNET, "in_channels": 9}).save_pretrained(copy / "unet")
    assert "network of 4 channels, as the autoencoder's, got unet of 9" in said(copy)
    tiny = diffusers_tiny(copy.parent / "taesd", latent_channels=16)
    assert "4 latent channels, as the model's, got 16" in said(folder, tiny_vae=tiny)


def diffusers_tiny(path, **changes):
    from diffusers import AutoencoderTiny

    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    counts = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**blocks, **counts, **changes).save_pretrained(path)
    return path


@pytest.mark.parametrize("key", ["v_pred", "modelspec"])
def test_a_single_file_that_says_v_is_not_taken_for_epsilon(key, folder, tmp_path):
    path = single_file(folder, tmp_path / "model.safetensors")
    state, about = load_file(path), {}
    if key == "v_pred":
        state |= {"v_pred": torch.zeros(1)}
    else:
        about = {"modelspec.prediction_type": "v"}
    save_file(state, path, about)
    with pytest.raises(UserError, match="predicts v"):
        guess_config(path)
    assert "prediction_type v_prediction, as" in said(path, config=folder)
    config = stable_diffusion(tmp_path / "v", prediction_type="v_prediction")
    assert load(path, config=config).process.prediction == "v"
    save_file(state | {"ztsnr": torch.zeros(1)}, path, about)
    assert "rescale_betas_zero_snr True, as" in said(path, config=config)
    save_file(state | {"edm_mean": torch.zeros(1)}, path, about)
    assert "edm_mean, of EDM" in said(path, config=config)


def test_an_sdxl_file_that_says_v_is_refused_as_well(tmp_path):
    path = header(tmp_path / "m.safetensors", HEADERS["sdxl"] | {"v_pred": (1,)})
    with pytest.raises(UserError, match="predicts v"):
        guess_config(path)


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_package_is_named_with_its_extra(package, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    message = said(folder)
    assert package in message and "pip install 'latent-augment[sd]'" in message


def test_peft_is_wanted_for_a_lora(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "expected peft" in said(folder, lora="x.safetensors")
