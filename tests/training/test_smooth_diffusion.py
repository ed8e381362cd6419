"""Smooth Diffusion: the regulariser against its closed form and finite differences, and the run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import PROMPT, sd3, stable_diffusion
from conftest import Cut, call, cut_short, paint
from safetensors.torch import load_file, save_file
from torch import nn

from augment import Sampling, SyntheticDataset, UserError, fill_bank, load_backbone, write_shards
from augment.diffusion.process import GOALS, PREDICTIONS, Flow, VariancePreserving
from augment.shards.dataset import open_images
from augment.sources import Folder, as_source
from augment.sources.captions import read_captions
from augment.training.adapt.data import NoisedImages, NumberSampler
from augment.training.adapt.module import PROJECTIONS
from augment.training.smooth.regulariser import SmoothDiffusion, measured
from augment.training.smooth.run import smooth_backbone
from augment.training.smooth.settings import SmoothSettings

PROCESSES = {
    "epsilon": VariancePreserving("epsilon"),
    "v": VariancePreserving("v"),
    "flow": Flow(shift=3.0),
}
SHAPE, LEVELS = (2, 3, 3), [0.2, 0.7, 1.0]
SIZE = math.prod(SHAPE)
QUICK = {"steps": 4, "batch_size": 2, "accumulate": 2, "lr": 1e-2}


class Linear(nn.Module):
    """z ↦ A z."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(draw(SIZE, SIZE, seed=9) / 4)

    def forward(self, latent):
        return (latent.flatten(1) @ self.matrix.T).unflatten(1, SHAPE)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def rows(count=3):
    """z₀, ε and Δ."""
    clean, noise, direction = (draw(count, *SHAPE, seed=seed) for seed in (1, 2, 3))
    return clean, noise, direction / SIZE**0.5


def measure(name, network, levels=LEVELS, part=slice(None)):
    """The base loss and v of rows, by a network without a condition."""

    def answer(latent, times):
        assert times.shape == (len(latent),)
        return network(latent)

    clean, noise, direction = (x[part] for x in rows(3))
    return measured(PROCESSES[name], answer, clean, noise, levels, direction)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_what_a_network_learns_splits_into_what_it_was_made_of(name):
    clean, noise, _ = rows()
    alpha, sigma = (torch.tensor(x).double().view(-1, 1, 1, 1) for x in ((1, 0.8, 0), (0, 0.6, 1)))
    if name == "flow":
        alpha = 1 - sigma
    latent, goal = alpha * clean + sigma * noise, GOALS[name](clean, noise, alpha, sigma)
    found = PREDICTIONS[name](latent[:2], goal[:2], alpha[:2], sigma[:2])
    torch.testing.assert_close(found, (clean[:2], noise[:2]))


@pytest.mark.parametrize("name", PREDICTIONS)
def test_of_a_linear_network_the_change_and_its_gradient_are_known(name):
    network = Linear()
    direction = rows()[2].flatten(1)
    _, found = measure(name, network)
    found.sum().backward()
    expected, gradient = [], torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for level, delta in zip(LEVELS, direction, strict=True):
        alpha, sigma = PROCESSES[name].alpha_sigma(level)
        front = sigma / alpha if name == "epsilon" else sigma
        one = alpha if name == "v" else 1
        pulled = front * (one * delta - sigma * network.matrix.detach().T @ delta)  # JᵀΔ
        expected.append(sigma * pulled.norm())
        gradient -= sigma * front * sigma * torch.outer(delta, pulled / pulled.norm())
    torch.testing.assert_close(found.detach(), torch.stack(expected))
    torch.testing.assert_close(network.matrix.grad, gradient)


def convolutions():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, last = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 1)
    return nn.Sequential(first, nn.Tanh(), last).double()


@pytest.mark.parametrize("name", PREDICTIONS)
def test_value_and_gradient_agree_with_finite_differences(name):
    network, level, step, part = convolutions(), 0.6, 1e-5, slice(0, 1)
    clean, noise, direction = (x[part] for x in rows())
    alpha, sigma = PROCESSES[name].alpha_sigma(level)

    def estimate(epsilon):
        latent = alpha * clean + sigma * epsilon
        return PREDICTIONS[name](latent, network(latent), alpha, sigma)[0]

    with torch.no_grad():
        moves = step * torch.eye(SIZE, dtype=torch.float64).view(-1, 1, *SHAPE)
        pulled = [(direction * (estimate(noise + m) - estimate(noise - m))).sum() for m in moves]
        value = sigma * torch.stack(pulled).norm() / (2 * step)

    def penalty():
        return (measure(name, network, [level], part)[1] - 0.1).square().sum()

    found = measure(name, network, [level], part)[1]
    torch.testing.assert_close(found.detach()[0], value, rtol=1e-7, atol=0)
    penalty().backward()
    for parameter in network.parameters():
        place = (0,) * parameter.ndim
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * step
            sides.append(penalty().detach())
            with torch.no_grad():
                parameter[place] -= sign * step
        slope = (sides[0] - sides[1]) / (2 * step)
        known = 0 if parameter.grad is None else parameter.grad[place]
        torch.testing.assert_close(torch.as_tensor(known).double(), slope, rtol=1e-6, atol=1e-9)


def test_rows_of_different_levels_are_what_they_are_alone():
    network = convolutions()
    together = measure("v", network)
    for row, level in enumerate(LEVELS):
        alone = measure("v", network, [level], slice(row, row + 1))
        for one, all_of in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_of[row])


def test_the_base_loss_is_zero_where_the_network_is_right():
    clean, noise, _ = rows()
    base, _ = measure("flow", lambda latent: 0 * latent + noise - clean)
    assert base.max().item() == 0


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return Folder(paint(tmp_path_factory.mktemp("smooth"), {"Bag": 3, "Coat": 2}, size=28))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stable_diffusion(tmp_path_factory.mktemp("sd"))


def train(backbone, source, out, prompts=None, **settings):
    """Train with `QUICK` settings, or others."""
    given = {"images": source, "out": str(out), "prompts": prompts, **QUICK, **settings}
    return smooth_backbone(SmoothSettings(**given), backbone)


def fresh(**options):
    return load_backbone("tiny", device="cpu", **options)


def checkpoint(out):
    return torch.load(out / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of `QUICK`, and the backbone as it was left."""
    backbone, out = fresh(), tmp_path_factory.mktemp("whole")
    place = train(backbone, images, out, {"Bag": "bag"})
    return place, backbone


def test_a_run_leaves_a_lora_that_loads(whole, images):
    place, trained = whole
    assert place.name == "pytorch_lora_weights.safetensors"
    smooth, plain = fresh(lora=place), fresh()
    latents, condition = draw(2, 4, 16, 16).float(), plain.condition(["bag", ""])
    answers = [b.network(latents, 700, condition) for b in (smooth, trained, plain)]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)
    assert (answers[0] - answers[2]).abs().max() > 1e-3
    assert fresh(lora=place.parent).fingerprint == smooth.fingerprint != plain.fingerprint
    assert load_backbone(**smooth.recipe, device="cpu").fingerprint == smooth.fingerprint
    half = fresh(lora=place, lora_scale=0.5)
    assert half.fingerprint["lora"] != smooth.fingerprint["lora"]
    name = "mid_block.attentions.0.to_q.weight"
    weights = [b.unet.get_parameter(name) for b in (plain, half, smooth)]
    torch.testing.assert_close(weights[1], (weights[0] + weights[2]) / 2)
    assert len(load_file(place)) == 2 * 4 * 6
    kept = checkpoint(place.parent)["state_dict"]
    assert len(kept) == 2 * 4 * 6 + 1 and kept["a"].isfinite()


def test_a_run_that_was_cut_short_ends_with_the_same_bits(whole, images, tmp_path, monkeypatch):
    seen = cut_short(monkeypatch, SmoothDiffusion, 6)
    with pytest.raises(Cut):
        train(fresh(), images, tmp_path, {"Bag": "bag"})
    before = checkpoint(tmp_path)
    assert before["global_step"] == 2 and before["state_dict"]["a"].isfinite()
    place = train(fresh(), images, tmp_path, {"Bag": "bag"})
    assert len(seen) == 6 + 4
    assert place.read_bytes() == whole[0].read_bytes()
    one, other = checkpoint(tmp_path)["state_dict"], checkpoint(whole[0].parent)["state_dict"]
    assert one["a"] == other["a"] != before["state_dict"]["a"]
    begun = place.stat().st_mtime_ns
    train(fresh(), images, tmp_path, {"Bag": "bag"})
    assert len(seen) == 10 and place.stat().st_mtime_ns >= begun
    with pytest.raises(UserError, match=r"of weight 2, got 1\.0; choose another --out"):
        train(fresh(), images, tmp_path, {"Bag": "bag"}, weight=2)


def test_the_mean_begins_with_the_first_batch_and_follows_slowly():
    module = SmoothDiffusion(fresh())
    module.all_gather = lambda value: torch.stack([value, value + 2])  # another rank's
    module.follow(torch.tensor([1.0, 3.0]))
    assert module.a == 3
    module.follow(torch.tensor([1.0, 3.0]) + 100)
    assert module.a == pytest.approx(3 + 0.01 * 100)


def test_an_image_is_noised_alike_in_every_layout_and_prompts_are_dropped(images):
    rows = NoisedImages(images, list("abcde"), fresh(), 0.5, seed=3)
    first = [NumberSampler(4, 3, lambda: 1)]
    ranks = [NumberSampler(2, 3, lambda: 1, rank, 2) for rank in (0, 1)]
    batches = [[n for stream in part for batch in stream for n in batch] for part in (first, ranks)]
    assert sorted(batches[0]) == sorted(batches[1]) == list(range(4, 12))
    some = [rows[number] for number in range(200)]
    prompts = [row["prompt"] for row in some]
    assert 60 < prompts.count("") < 140 and set(prompts) == {"", *"abcde"}
    levels = torch.tensor([row["level"] for row in some])
    assert 0 < levels.min() < 0.1 and 0.9 < levels.max() <= 1
    assert torch.equal(rows[7]["noise"], some[7]["noise"])
    length = torch.stack([row["direction"] for row in some]).flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.ones(200))


def test_all_weights_can_be_trained_and_are_a_backbone(images, tmp_path):
    trained = fresh()
    place = train(trained, images, tmp_path, rank=0, weight=0.0)
    again = load_backbone(place, device="cpu")
    latents, condition = draw(2, 4, 16, 16).float(), again.condition(["bag", ""])
    answers = [b.network(latents, 700, condition) for b in (again, trained, fresh())]
    torch.testing.assert_close(answers[0], answers[1])
    assert (answers[0] - answers[2]).abs().max() > 1e-3


@pytest.mark.parametrize("rank", [2, 0])
def test_stable_diffusion_trains_and_loads(rank, folder, images, tmp_path):
    trained, plain = load_backbone(folder, device="cpu"), load_backbone(folder, device="cpu")
    prompts = {"Bag": "a bag", "Coat": "a coat"}
    place = train(trained, images, tmp_path, prompts, rank=rank)
    again = load_backbone(folder, "cpu", lora=place) if rank else load_backbone(place, "cpu")
    latents, condition = draw(2, 4, 16, 16).float(), plain.condition([PROMPT, ""])
    answers = [b.network(latents, 700, condition) for b in (again, trained, plain)]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)
    assert (answers[0] - answers[2]).abs().max() > 1e-3
    with pytest.raises(UserError, match="of backbone"):
        train(fresh(), images, tmp_path, rank=rank)


def test_a_lora_changes_another_checkpoint_of_the_family_by_the_same_weights(
    folder, images, tmp_path
):
    prompts = {"Bag": "a bag", "Coat": "a coat"}
    place = train(load_backbone(folder, device="cpu"), images, tmp_path, prompts, rank=2)
    other = stable_diffusion(tmp_path / "other", seed=7)
    pairs = [
        (load_backbone(path, "cpu"), load_backbone(path, "cpu", lora=place))
        for path in (folder, other)
    ]
    plain, smooth = (
        [dict(b.net.named_parameters()) for b in side] for side in zip(*pairs, strict=True)
    )
    moved = {name for name in plain[0] if not torch.equal(plain[0][name], smooth[0][name])}
    assert moved and all(".to_" in name for name in moved)
    for name in plain[0]:
        own, others = (
            after[name] - before[name] for before, after in zip(plain, smooth, strict=True)
        )
        torch.testing.assert_close(own, others, rtol=0, atol=1e-6)
        assert name not in moved or not torch.equal(plain[0][name], plain[1][name])
    latents, condition = draw(2, 4, 16, 16).float(), pairs[1][0].condition([PROMPT, ""])
    before, after = (backbone.network(latents, 700, condition) for backbone in pairs[1])
    assert after.isfinite().all() and (before - after).abs().max() > 1e-3


def test_a_flow_transformer_trains_and_loads(images, tmp_path):
    folder = sd3(tmp_path / "sd3")
    trained, plain = load_backbone(folder, device="cpu"), load_backbone(folder, device="cpu")
    place = train(trained, images, tmp_path / "run", rank=2)
    again = load_backbone(folder, "cpu", lora=place)
    latents = draw(1, *plain.latent_shape).float()
    answers = [b.network(latents, 700, plain.condition([""])) for b in (again, trained, plain)]
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)
    assert (answers[0] - answers[2]).abs().max() > 1e-3


def test_the_published_layout_is_read_by_tiny_too(whole, tmp_path):
    state = {}
    for key, value in load_file(whole[0]).items():
        layer, side, _ = key.removeprefix("unet.").rsplit(".", 2)
        name, projection = layer.removesuffix(".0").rsplit(".", 1)
        direction = {"lora_A": "down", "lora_B": "up"}[side]
        state[f"{name}.processor.{projection}_lora.{direction}.weight"] = value
    assert "mid_block.attentions.0.processor.to_q_lora.down.weight" in state
    save_file(state, tmp_path / "smooth_lora.safetensors")
    backbones = fresh(lora=tmp_path / "smooth_lora.safetensors"), fresh(lora=whole[0])
    for one, other in zip(*(b.unet.parameters() for b in backbones), strict=True):
        assert torch.equal(one, other)


def test_a_lora_of_another_model_is_refused(whole, folder, tmp_path):
    with pytest.raises(UserError, match="expected a LoRA for this model"):
        load_backbone(folder, device="cpu", lora=whole[0])
    state = load_file(whole[0])
    damaged = {
        "a layer that is not there": {k.replace("mid_block", "end"): v for k, v in state.items()},
        "another width": {k: v.repeat(2, 2) for k, v in state.items()},
        "half of it": {k: v for k, v in state.items() if "lora_A" in k},
        "nothing": {"odd": torch.ones(1)},
    }
    for name, other in damaged.items():
        save_file(other, tmp_path / "other.safetensors")
        with pytest.raises(UserError, match="expected a LoRA for this model"):
            fresh(lora=tmp_path / "other.safetensors")
            pytest.fail(name)


def test_what_cannot_be_trained_is_one_sentence(gaussian, images, whole, folder, tmp_path):
    module = {
        "no linear layers": ({"targets": ["to_p"]}, r"such as .*to_k, to_out.0, .* got 'to_p'"),
        "no such rank": ({"rank": -1}, "rank ≥ 0"),
    }
    for given, message in module.values():
        with pytest.raises(UserError, match=message):
            SmoothDiffusion(fresh(), **given)
    for backbone, message in (
        (gaussian, "network to train, got gaussian"),
        (fresh(dtype=torch.bfloat16), "in float32"),
        (fresh(lora=whole[0]), "without a LoRA"),
    ):
        with pytest.raises(UserError, match=message):
            SmoothDiffusion(backbone)
    run = {
        "prompt out of": {"prompts": {"Bag": "hat"}},
        "prompts for classes out of Bag, Coat, got one for 'Hat'": {"prompts": {"Hat": "bag"}},
        "drop in": {"drop": 2},
        "steps ≥ 1": {"steps": 0},
        "batch_size ≥ 1": {"batch_size": 0},
    }
    for message, given in run.items():
        with pytest.raises(UserError, match=message):
            train(fresh(), images, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_captions_are_read_by_file_name(images, tmp_path):
    path = tmp_path / "metadata.jsonl"
    good = {"file_name": "Bag/1.png", "text": "bag"}
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"file_name": "x/y.png"}))
    assert read_captions(path, images) == {"Bag/1.png": "bag"}
    for text, message in (
        ("{", r"line of .* got '\{' in line 1"),
        (json.dumps(good | {"text": 3}), "in line 1"),
        (json.dumps(good | {"file_name": "1.png"}), "images such as Bag/0.png"),
        ("[1]", "in line 1"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_captions(path, images)
    with pytest.raises(UserError, match=r"captions at .*nowhere"):
        read_captions(tmp_path / "nowhere", images)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no UTF-8 text"):
        read_captions(path, images)


def test_the_command_takes_its_yaml(images, tmp_path, monkeypatch, capsys):
    file = Path(__file__).parents[2] / "configs" / "smooth_tiny.yaml"
    assert file.read_text().startswith("# expected: ")
    config = yaml.safe_load(file.read_text())
    config |= {"images": str(images.root), "out": str(tmp_path / "run"), "steps": 1}
    config |= {"batch_size": 2, "prompts": {"Bag": "bag", "Coat": "top"}, "device": "cpu"}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    code, out, _ = call(monkeypatch, capsys, "smooth", "--config", tmp_path / "small.yaml")
    assert code == 0 and "pytorch_lora_weights.safetensors: written; load it with" in out
    wrong = ("--targets", "[to_x]", "--out", tmp_path / "other")
    code, _, err = call(monkeypatch, capsys, "smooth", "--config", tmp_path / "small.yaml", *wrong)
    assert code == 2 and err.startswith("latent-augment: expected targets") and "'to_x'" in err


def test_shards_are_images_to_train_on(tiny, images, tmp_path):
    bank = fill_bank(tmp_path / "bank", tiny, images, steps=1)
    fly = SyntheticDataset(bank, tiny, sampling=Sampling(steps=1), per_class=2)
    write_shards(fly.synthesizer, fly.planner, 2, tmp_path / "shards")
    source = as_source(open_images(tmp_path / "shards"))
    assert source.counts == [2, 2] and source.classes == ["Bag", "Coat"]
    row = NoisedImages(source, [""] * 4, tiny, 0.0, 0)[0]
    assert row["image"].shape == (1, 32, 32)


@pytest.mark.slow
def test_two_ranks_train_as_one_with_the_doubled_batch(images, tmp_path):
    common = f"smooth --images {images.root} --steps 4 --accumulate 2 --lr 0.01 --device cpu"
    for name, more in (("one", "--batch-size 4"), ("two", "--batch-size 2 --devices 2")):
        command = f"-m augment.cli {common} {more} --out {tmp_path / name}"
        done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (checkpoint(tmp_path / name)["state_dict"] for name in ("one", "two"))
    assert one["a"].item() == pytest.approx(two["a"].item(), rel=1e-6)
    for name in one:  # Adam takes the sign of what is next to nothing
        assert (one[name] - two[name]).norm() < 1e-3 * one[name].norm()


def test_the_projections_are_diffusers_own():
    names = {name for name, _ in fresh().unet.named_modules()}
    assert all(f"mid_block.attentions.0.{name}" in names for name in PROJECTIONS)


@pytest.mark.parametrize("name", ["metadata", "tensor"])
def test_the_alpha_of_a_lora_is_honoured_for_tiny(name, whole, tmp_path):
    path, state = tmp_path / "other.safetensors", load_file(whole[0])
    layer, about = "unet.mid_block.attentions.0.to_q", {}
    if name == "tensor":
        state = {key: value for key, value in state.items() if key.startswith(layer)}
        state[f"{layer}.alpha"] = torch.tensor(12.0)
    else:
        config = {"unet.r": 4, "unet.lora_alpha": 12}
        about = {"lora_adapter_metadata": json.dumps(config)}
    save_file(state, path, about)
    rank = len(state[f"{layer}.lora_A.weight"])
    product = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
    found, plain = fresh(lora=path), fresh()
    weight = f"{layer.removeprefix('unet.')}.weight"
    change = found.unet.get_parameter(weight) - plain.unet.get_parameter(weight)
    torch.testing.assert_close(change, 12 / rank * product, rtol=1e-4, atol=1e-6)
    if name == "metadata":
        save_file(state, path)
        assert fresh(lora=path).fingerprint["lora"] != found.fingerprint["lora"]


def test_a_lora_of_another_width_is_not_spread_over_tinys_layers(whole, tmp_path):
    state = load_file(whole[0])
    key = "unet.mid_block.attentions.0.to_q.lora_B.weight"
    save_file({**state, key: state[key][:1].clone()}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"LoRA for this model.*to_q of \(1, "):
        fresh(lora=tmp_path / "other.safetensors")
