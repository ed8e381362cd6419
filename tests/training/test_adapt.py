"""Adaptation: its loss, what it changes and what not, and that diffusers reads the outcome."""

import json
import math
import re
import subprocess
import sys

import diffusers
import pytest
import torch
import torch.nn.functional as F
from checkpoints import dit, lightningdit, sd3, sdxl, stable_diffusion
from conftest import Cut, call, cut_short, paint
from safetensors.torch import load_file, save_file
from torch import nn

from augment import Sampling, SyntheticDataset, UserError, fill_bank, load_backbone, sample
from augment.core.errors import BankMismatch
from augment.diffusion.checkpoints.tokens import TokenRows, class_tokens
from augment.diffusion.process import PREDICTIONS, Flow, VariancePreserving
from augment.shards.format import read_settings
from augment.shards.write import write_shards
from augment.sources import Folder
from augment.training.adapt.data import NoisedImages
from augment.training.adapt.module import Adaptation, denoising_loss
from augment.training.adapt.recipe import PRESETS
from augment.training.adapt.run import adapt_backbone
from augment.training.adapt.settings import AdaptSettings
from augment.training.data.identity import check_apart, digests_of, origins

PROCESSES = {
    "epsilon": VariancePreserving("epsilon"),
    "v": VariancePreserving("v"),
    "flow": Flow(shift=3.0),
}
COUNTS = {"Bag": 3, "Ankle boot": 2}
QUICK = {"steps": 4, "batch_size": 2, "accumulate": 2, "rank": 2, "lr": 1e-2, "token_lr": 1e-2}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return Folder(paint(tmp_path_factory.mktemp("adapt"), COUNTS, size=28))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("sd"))


def adapt(source, out, backbone=None, **settings):
    """Adapt with `QUICK` settings, or others."""
    given = {"images": source, "out": str(out), **QUICK, **settings}
    return adapt_backbone(AdaptSettings(**given), backbone or fresh())


def fresh(name="tiny", **options):
    return load_backbone(name, "cpu", torch.float32, **options)


def copies(*modules):
    return [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]


def answers(backbones, prompts):
    latents = torch.randn(
        len(prompts), *backbones[0].latent_shape, generator=torch.Generator().manual_seed(3)
    )
    return [b.network(latents, 700, b.condition(prompts)) for b in backbones]


@pytest.mark.parametrize("name", PREDICTIONS)
def test_loss_and_gradient_of_a_linear_network_are_known(name):
    generator = torch.Generator().manual_seed(0)
    matrix = nn.Parameter(torch.randn(8, 8, generator=generator, dtype=torch.float64))
    clean, noise = torch.randn(2, 3, 2, 2, 2, generator=generator, dtype=torch.float64)
    levels, process = [0.1, 0.6, 1.0], PROCESSES[name]

    def network(latent, times):
        assert times.tolist() == pytest.approx([process.timestep(level) for level in levels])
        return (latent.flatten(1) @ matrix.T).view_as(latent)

    found = denoising_loss(process, network, clean, noise, levels)
    found.mean().backward()
    expected, gradient = [], torch.zeros_like(matrix)
    for z, e, level in zip(clean.flatten(1), noise.flatten(1), levels, strict=True):
        alpha, sigma = process.alpha_sigma(level)
        goal = {"epsilon": e, "v": alpha * e - sigma * z, "flow": e - z}[name]
        latent = alpha * z + sigma * e
        error = matrix.detach() @ latent - goal
        expected.append((error**2).sum() / 8)
        gradient += 2 / 8 / 3 * torch.outer(error, latent)
    torch.testing.assert_close(found.detach(), torch.stack(expected))
    torch.testing.assert_close(matrix.grad, gradient)


def test_new_rows_are_looked_up_behind_the_old_and_alone_get_a_gradient():
    table = nn.Embedding(5, 4)
    rows = TokenRows(table, torch.randn(2, 4), first=5, norm=0.5)
    numbers = torch.tensor([[0, 6, 4], [5, 5, 1]])
    found = rows(numbers)
    torch.testing.assert_close(found[0, 0], table.weight[0])
    torch.testing.assert_close(found[1, 0], rows.values()[0])
    torch.testing.assert_close(rows.values().norm(dim=1), torch.full((2,), 0.5))
    found.square().sum().backward()
    assert table.weight.grad is None
    loss = (found * torch.arange(4.0)).sum()
    (grad,) = torch.autograd.grad((rows(numbers) * torch.arange(4.0)).sum(), rows.rows)
    assert loss.isfinite() and grad.abs().sum() > 0
    torch.testing.assert_close((grad * rows.rows).sum(1), torch.zeros(2), atol=1e-6, rtol=0)


def test_a_class_has_a_token_of_its_own():
    names = ["Ankle boot", "ankle-boot", "ankle boot-1", "猫", "!", "n01440764"]
    tokens = class_tokens(names)
    assert [*tokens] == names and len({*tokens.values()}) == len(names)
    assert tokens["猫"] == "<猫>" and tokens["!"] == "<class>"
    assert class_tokens(["car 1", "car"]) == {"car 1": "<car-1>", "car": "<car>"}
    names = ["car", "car-1", "Car", "car 1", "CAR"]
    assert len({*class_tokens(names).values()}) == len(names)


@pytest.fixture(scope="module")
def adapted(images, tmp_path_factory):
    """A run of `QUICK` on `tiny`, and the backbone as it was left."""
    backbone, out = fresh(), tmp_path_factory.mktemp("adapted")
    return adapt(images, out, backbone, words={"Bag": "bag"}, drop=0.3), backbone


def test_tiny_learns_a_prompt_a_class_and_loads(adapted, images):
    place, trained = adapted
    again, plain = fresh(adapter=place), fresh()
    assert again.adapted_prompts == {"Bag": "<bag>", "Ankle boot": "<ankle-boot>"}
    ours, theirs = answers([again, trained], ["<bag>", "<ankle-boot>", "bag"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - answers([plain], ["bag", "", "bag"])[0]).abs().max() > 1e-3
    rows = load_file(place / "learned_embeds.safetensors")
    moved = rows["<bag>"] - plain.condition(["bag"])["text"][0]
    assert 0 < moved.abs().max() < 0.2  # four steps of 1e-2 from where it began
    for key in ("lora", "tokens", "adapted_to"):
        assert key in again.fingerprint and key not in plain.fingerprint
    assert load_backbone(**again.recipe, device="cpu").fingerprint == again.fingerprint
    weights, now = plain.unet.state_dict(), again.unet.state_dict()
    changed = {name for name in weights if (weights[name] != now[name]).any()}
    assert changed and all(".to_" in name for name in changed)


def test_a_bank_takes_the_prompts_and_is_of_this_adaptation_alone(adapted, images, tmp_path):
    backbone = fresh(adapter=adapted[0])
    bank = fill_bank(tmp_path / "bank", backbone, images, steps=1)
    assert bank.prompt("Ankle boot") == "<ankle-boot>"
    for other in (fresh(), fresh(lora=adapted[0])):
        with pytest.raises(BankMismatch):
            bank.check(other)
    bank.check(load_backbone(**bank.recipe, device="cpu"))
    more = Folder(paint(tmp_path / "more", {**COUNTS, "Coat": 1}, size=28))
    with pytest.raises(UserError, match=r"adapted to, got 'Coat'; adapt one to that class"):
        fill_bank(tmp_path / "other", backbone, more, steps=1)


def test_images_of_the_adaptation_are_not_tested_on(adapted, images, tmp_path):
    few = Folder(paint(tmp_path / "few", dict.fromkeys(COUNTS, 1), size=28, seed=5))
    backbone = fresh(adapter=adapted[0])
    bank = fill_bank(tmp_path / "bank", backbone, few, steps=1)
    fly = SyntheticDataset(bank, backbone, sampling=Sampling(steps=1), per_class=1)
    write_shards(fly.synthesizer, fly.planner, 1, tmp_path / "shards")
    held_out, own = digests_of(images, {}), digests_of(few, {})
    known = read_settings(tmp_path / "shards").origins
    assert {*own.values()} | {*held_out.values()} == known.keys()
    with pytest.raises(UserError, match="which is an image of the adaptation"):
        check_apart(origins(fly), held_out, "test")
    plain = fill_bank(tmp_path / "plain", fresh(), few, steps=1)
    fly = SyntheticDataset(plain, fresh(), sampling=Sampling(steps=1), per_class=1)
    check_apart(origins(fly), held_out, "test")


@pytest.mark.parametrize("schedule", ["plain", "datadream"])
def test_a_run_that_was_cut_short_ends_with_the_same_bits(schedule, images, tmp_path, monkeypatch):
    given = {"preset": schedule, "text_rank": 0, "tokens": True} if schedule != "plain" else {}
    given |= {"per": "run", "flip": True}
    whole = adapt(images, tmp_path / "whole", **given)
    seen = cut_short(monkeypatch, Adaptation, 6)
    with pytest.raises(Cut):
        adapt(images, tmp_path / "cut", **given)
    assert not (tmp_path / "cut" / "adapter.json").exists()
    place = adapt(images, tmp_path / "cut", **given)
    assert len(seen) == 6 + 4
    for name in ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors", "adapter.json"):
        assert (place / name).read_bytes() == (whole / name).read_bytes()
    with pytest.raises(UserError, match=r"of lr 0\.01, got 0\.02|of lr 0\.02, got 0\.01"):
        adapt(images, tmp_path / "cut", **given, lr=0.02)


def test_tokens_alone_change_their_rows_and_nothing_else(folder, images, tmp_path):
    backbone = fresh(folder)
    pipe = backbone.pipe
    words = pipe.tokenizer("a", add_special_tokens=False).input_ids
    table = pipe.text_encoder.get_input_embeddings().weight.clone()
    before = copies(backbone.trainable(), pipe.vae)
    encoder = {k: v for k, v in copies(pipe.text_encoder)[0].items() if "token_emb" not in k}
    backbone.trainable()
    own = {"Bag": "a", "Ankle boot": "a cat"}
    place = adapt(images, tmp_path, backbone, preset="da-fusion", rank=0, words=own, per="run")
    assert sorted(path.name for path in place.glob("*.safetensors")) == [
        "learned_embeds.safetensors"
    ]
    for old, new in zip(before, copies(backbone.trainable(), pipe.vae), strict=True):
        assert all(torch.equal(old[k], v) for k, v in new.items())
    now = pipe.text_encoder.state_dict()
    assert all(torch.equal(v, now[k]) for k, v in encoder.items())
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, table)
    rows = load_file(place / "learned_embeds.safetensors")
    assert [*rows] == ["<ankle-boot>", "<bag>"]
    assert 0 < (rows["<bag>"] - table[words[0]]).abs().max() < 0.2


def test_a_token_keeps_the_vocabularys_length(folder, images, tmp_path):
    backbone = fresh(folder)
    mean = backbone.pipe.text_encoder.get_input_embeddings().weight.norm(dim=1).mean()
    place = adapt(images, tmp_path, backbone, tokens=True, words=dict.fromkeys(COUNTS, "a cat"))
    for row in load_file(place / "learned_embeds.safetensors").values():
        torch.testing.assert_close(row.norm(), mean)


def in_diffusers(folder, place):
    """diffusers' pipeline of a folder, with what was adapted loaded by its own methods."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(str(place), weight_name="pytorch_lora_weights.safetensors")
    for number, file in enumerate(sorted(place.glob("learned_embeds*"))):
        parts = {} if not number else {
            "tokenizer": pipe.tokenizer_2, "text_encoder": pipe.text_encoder_2
        }  # fmt: skip
        vectors = [{token: row} for token, row in load_file(file).items()]
        pipe.load_textual_inversion(vectors, **parts)
    return pipe


@pytest.mark.parametrize("make", [stable_diffusion, sdxl])
def test_diffusers_makes_the_same_images_of_what_is_written(make, images, tmp_path):
    folder = make(tmp_path / "model")
    trained = fresh(folder, spacing="leading", clean_end=make is not stable_diffusion)
    words = dict.fromkeys(COUNTS, "a cat")
    place = adapt(images, tmp_path / "run", trained, tokens=True, text_rank=2, words=words)
    options = {"spacing": "leading", "clean_end": make is not stable_diffusion}
    again, plain = fresh(folder, adapter=place, **options), fresh(folder, **options)
    prompts = [again.adapted_prompts[name] for name in ("Bag", "Ankle boot")]
    assert prompts == ["a photo of a <bag>", "a photo of a <ankle-boot>"]
    ours, theirs = answers([again, trained], prompts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - answers([plain], prompts)[0]).abs().max() > 1e-3
    keys = load_file(place / "pytorch_lora_weights.safetensors")
    parts = {key.split(".")[0] for key in keys}
    assert parts == {"unet", *trained.encoders()}
    latents = torch.randn(2, *again.latent_shape, generator=torch.Generator().manual_seed(0))
    made = sample(again, latents, prompts, "ddim", 2, 2.0)
    pipe = in_diffusers(folder, place)
    expected = pipe(
        prompts, latents=latents, num_inference_steps=2, guidance_scale=2.0, output_type="pt",
        height=again.resolution, width=again.resolution,
    ).images  # fmt: skip
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)


def test_a_flow_model_learns_tokens_and_text_encoders_too(images, tmp_path):
    folder = sd3(tmp_path / "sd3")
    trained = fresh(folder)
    words = dict.fromkeys(COUNTS, "a cat")
    place = adapt(images, tmp_path / "run", trained, tokens=True, text_rank=2, words=words)
    prompts = ["a photo of a <bag>", ""]
    ours, theirs, plain = answers([fresh(folder, adapter=place), trained, fresh(folder)], prompts)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-3


@pytest.mark.parametrize("make", [dit, lightningdit])
def test_a_class_conditional_model_learns_a_row_a_class(make, images, tmp_path):
    folder = make(tmp_path / "model")
    trained, plain = fresh(folder), fresh(folder)
    place = adapt(images, tmp_path / "run", trained, words={"Bag": "goldfish"})
    again = fresh(folder, adapter=place)
    assert again.adapted_prompts == {"Bag": "<bag>", "Ankle boot": "<ankle-boot>"}
    prompts = ["<bag>", "<ankle-boot>", "goldfish", ""]
    ours, theirs = answers([again, trained], prompts)
    before = answers([plain], ["1", "", "1", ""])[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert ((ours - before).flatten(1).abs().amax(1) > 1e-4).all()
    table = plain._embedders()[-1].embedding_table.weight
    for token, row in load_file(place / "learned_embeds.safetensors").items():
        moved = (row - table[{"<bag>": 1, "<ankle-boot>": 1000}[token]]).abs().max()
        assert 0 < moved < 0.2  # four steps of 1e-2 from where it began
    kept = torch.load(place / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name or name.endswith(".rows") for name in kept)


def test_rows_of_a_class_conditional_model_alone_change_no_other_class(images, tmp_path):
    folder = dit(tmp_path / "dit")
    trained = fresh(folder)
    adapt(images, tmp_path / "run", trained, rank=0)
    old, new = ["goldfish", "7", ""], ["<bag>", "<ankle-boot>"]
    assert torch.equal(*answers([trained, fresh(folder)], old))
    begun = answers([fresh(folder)], ["", ""])[0]
    assert (answers([trained], new)[0] - begun).abs().max() > 1e-4
    apart = fresh(folder)
    apart.net.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data += 1
    with pytest.raises(UserError, match=r"share a table of classes.*adapt it with tokens false"):
        adapt(images, tmp_path / "apart", apart)
    prompts = {"Bag": "1", "Ankle boot": "2"}
    place = adapt(images, tmp_path / "apart", apart, tokens=False, prompts=prompts, steps=1)
    assert not (place / "learned_embeds.safetensors").exists()
    with pytest.raises(UserError, match="text_rank 0 for dit"):
        adapt(images, tmp_path / "other", fresh(folder), text_rank=2)


def test_low_rank_weights_alone_change_and_what_is_frozen_keeps_its_bits(folder, images, tmp_path):
    backbone = fresh(folder)
    frozen = (backbone.trainable(), backbone.pipe.text_encoder, backbone.pipe.vae)
    before = copies(*frozen)
    place = adapt(images, tmp_path, backbone)
    for old, module in zip(before, frozen, strict=True):
        now = {k.replace(".base_layer", ""): v for k, v in module.state_dict().items()}
        assert old.keys() == {key for key in now if ".lora_" not in key}
        assert all(torch.equal(old[key], now[key]) for key in old)
    state = load_file(place / "pytorch_lora_weights.safetensors")
    assert {key.split(".")[0] for key in state} == {"unet"}
    assert all(value.any() for value in state.values())


def test_recomputed_activations_are_the_same(folder, images, tmp_path):
    places = [
        adapt(images, tmp_path / str(on), fresh(folder), checkpointing=on, steps=2)
        for on in (False, True)
    ]
    one, other = (load_file(place / "pytorch_lora_weights.safetensors") for place in places)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["tiny", "heads", "sd"])
def test_frozen_weights_in_bfloat16_learn_the_same(kind, folder, images, tmp_path):
    model = str(folder) if kind == "sd" else "tiny"
    more = {"sd": {"text_rank": 2}, "heads": {"image_heads": True}}.get(kind, {})
    how = {"images": images, "backbone": model, "device": "cpu", "sheets": 4, "tokens": True}
    for precision, dtype in (("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)):
        settings = AdaptSettings(
            out=str(tmp_path / precision), precision=precision, **QUICK, **how, **more
        )
        backbone = settings.load()
        adapt_backbone(settings, backbone)
        dtypes = {"lora": set(), "frozen": set()}
        for name, weight in backbone.trainable().named_parameters():
            dtypes["lora" if "lora" in name else "frozen"].add(weight.dtype)
        assert dtypes["frozen"] == {dtype} and dtypes["lora"] <= {torch.float32}
    for path in (tmp_path / "32-true").glob("*.safetensors"):
        whole, half = (load_file(tmp_path / p / path.name) for p in ("32-true", "bf16-mixed"))
        assert whole.keys() == half.keys() and {v.dtype for v in half.values()} == {torch.float32}
        rows = [torch.cat([v.flatten() for v in state.values()]) for state in (whole, half)]
        assert F.cosine_similarity(*rows, dim=0) > 0.98
    adapted = fresh(model, adapter=tmp_path / "bf16-mixed")
    assert answers([adapted], [*adapted.adapted_prompts.values()])[0].isfinite().all()


def test_what_diffusers_textual_inversion_script_writes_is_read(folder, tmp_path):
    width = 32
    (tmp_path / "ti").mkdir()
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    save_file({"<cat-toy>": vectors}, tmp_path / "ti" / "learned_embeds.safetensors")
    ours = fresh(folder, adapter=tmp_path / "ti").condition(["a <cat-toy> on a mat"])["text"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(folder))
    pipe.load_textual_inversion(str(tmp_path / "ti"), weight_name="learned_embeds.safetensors")
    theirs, _ = pipe.encode_prompt("a <cat-toy> on a mat", "cpu", 1, False)
    torch.testing.assert_close(ours, theirs)


def test_presets_are_what_papers_say():
    fusion, mix, dream = (PRESETS[name] for name in ("da-fusion", "diff-mix", "datadream"))
    assert (fusion.rank, fusion.token_lr, fusion.total(10, 99, 1)) == (0, 2e-3, 10_000)
    assert (mix.rank, mix.lr, mix.total(10, 99, 4)) == (10, 5e-5, 35_000)
    assert (dream.text_rank, dream.total(10, 160, 1)) == (16, 4000)
    assert [dream.rate(k, 300) for k in (0, 50, 100, 200, 300)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )
    settings = AdaptSettings(images="x", out="y", preset="diff-mix", rank=3)
    assert (settings.recipe.rank, settings.recipe.flip) == (3, True)


def test_a_sheet_of_samples_is_written_and_changes_nothing(adapted, images, tmp_path):
    given = {"words": {"Bag": "bag"}, "drop": 0.3, "sheets": 2}
    place = adapt(images, tmp_path, **given)
    assert [path.name for path in sorted((place / "samples").iterdir())] == [
        "000002.png",
        "000004.png",
    ]
    name = "pytorch_lora_weights.safetensors"
    assert (place / name).read_bytes() == (adapted[0] / name).read_bytes()


@pytest.mark.slow
def test_two_ranks_adapt_as_one_with_the_doubled_batch(images, tmp_path):
    common = f"adapt {images.root} --steps 4 --accumulate 2 --lr 0.01 --device cpu --rank 2"
    for name, more in (("one", "--batch-size 4"), ("two", "--batch-size 2 --devices 2")):
        command = f"-m augment.cli {common} {more} --out {tmp_path / name}"
        done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    for file in ("pytorch_lora_weights.safetensors", "learned_embeds.safetensors"):
        one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
        for name in one:  # Adam takes the sign of what is next to nothing
            assert (one[name] - two[name]).norm() < 1e-3 * one[name].norm()


def test_mirrored_images_are_otherwise_the_same_draws(images):
    plain, flipped = (
        NoisedImages(images, list("abcde"), fresh(), 0.5, 3, False, flip) for flip in (False, True)
    )
    mirrors = 0
    for number in range(40):
        one, other = plain[number], flipped[number]
        assert torch.equal(one["noise"], other["noise"]) and one["prompt"] == other["prompt"]
        mirrors += not torch.equal(one["image"], other["image"])
        assert torch.equal(one["image"].sum(-1), other["image"].sum(-1)) or mirrors
    assert 8 < mirrors < 32


def test_what_cannot_be_adapted_is_one_sentence(folder, gaussian, adapted, images, tmp_path):
    cases = (
        ({"preset": "x"}, "preset out of"),
        ({"drop": 2}, "drop in"),
        ({"steps": 0}, "steps ≥ 1"),
        ({"words": {"Hat": "bag"}}, "words for classes out of .*'Hat'"),
        ({"words": {"Bag": "hat"}}, "prompt out of .*'hat'"),
        ({"prompts": {"Hat": "bag"}}, "prompts for classes"),
        ({"text_rank": 2}, "text_rank 0 for tiny"),
        ({"rank": 0, "tokens": False}, "something to train"),
        ({"tokens": False, "prompt": "a {name}"}, "prompt out of"),
        ({"backbone": "tiny", "backbone_options": {"adapter": str(adapted[0])}}, "without a LoRA"),
    )
    for given, message in cases:
        out = tmp_path / "run"
        with pytest.raises(UserError, match=message):
            adapt_backbone(
                AdaptSettings(images=images, out=str(out), device="cpu", **{**QUICK, **given})
            )
        assert not (out / "checkpoints").exists(), message
    with pytest.raises(UserError, match="a network to train"):
        adapt(images, tmp_path / "run", gaussian)
    with pytest.raises(UserError, match="a word for a token to begin as"):
        adapt(images, tmp_path / "run", fresh(folder), tokens=True, words={"Bag": ""})


def test_an_adaptation_of_another_model_is_one_sentence(folder, adapted, tmp_path):
    place = adapted[0]
    cases = {
        "both": {"adapter": place, "lora": place},
        "got neither": {"adapter": tmp_path},
    }
    for message, given in cases.items():
        with pytest.raises(UserError, match=message):
            fresh(**given)
    with pytest.raises(UserError, match=r"model that .* adapts"):
        fresh(folder, adapter=place)
    record = json.loads((place / "adapter.json").read_text())
    for name, wrong in (("prompts", [1]), ("images", {"a": 1}), ("prompts", {"Bag": 3})):
        other = tmp_path / "other"
        other.mkdir(exist_ok=True)
        save_file(
            load_file(place / "learned_embeds.safetensors"), other / "learned_embeds.safetensors"
        )
        (other / "adapter.json").write_text(json.dumps(record | {name: wrong}))
        with pytest.raises(UserError, match="prompts and images in"):
            fresh(adapter=other)
    (other / "adapter.json").unlink()
    for rows in ({"<x>": torch.ones(3)}, {"<x>": torch.full((128,), math.nan)}, {}):
        save_file(rows, other / "learned_embeds.safetensors")
        for name in ("tiny", folder):
            with pytest.raises(UserError):
                fresh(name, adapter=other)


def test_the_command_adapts_and_says_how_to_go_on(images, tmp_path, monkeypatch, capsys):
    line = ("adapt", images.root, "--out", tmp_path / "run", "--steps", 2, "--batch-size", 2)
    monkeypatch.setenv("LATENT_AUGMENT_PROGRESS", "0.01")  # as where there is no terminal
    code, out, err = call(monkeypatch, capsys, *line, "--device", "cpu", "--rank", 1)
    assert re.search(r"^train: \d of 2 steps, \d+ s", err, re.MULTILINE)
    assert code == 0 and "adapted; use it with latent-augment invert" in out
    assert '{"adapter": ' in out
    line = ("adapt", images.root, "--out", tmp_path / "other", "--preset", "x")
    code, _, err = call(monkeypatch, capsys, *line)
    assert code == 2 and err.startswith("latent-augment: expected a preset out of")
