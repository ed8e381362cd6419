"""SeedSelect: slopes against finite differences, what it is for on real pictures, and in jobs."""

import json
import shutil
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from checkpoints import save_clip
from conftest import call, snapshot
from test_filters import save_network

import augment.synthesis.refine
from augment import LatentBank, Planner, Rule, Sampling, Synthesizer, UserError, open_shards, sample
from augment.bank.fill import fill_bank
from augment.diffusion.backbone import denoiser
from augment.diffusion.backbones.gaussian import GaussianBackbone
from augment.diffusion.process import Flow, VariancePreserving
from augment.diffusion.sampling import ResolvedSampling
from augment.diffusion.solver import SOLVERS
from augment.networks import feature_network, unit
from augment.sources import Folder
from augment.sources.fashion import write_fashion
from augment.synthesis.refine import Goal, Recorder, SeedSelect, losses

CPU = torch.device("cpu")
DDIM = ResolvedSampling(solver="ddim", steps=3)
NAMES = ("Trouser", "Sneaker", "Bag")
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    """Four images of each of three classes."""
    root = write_fashion(tmp_path_factory.mktemp("clothes"), "shots", list(range(4)))
    for folder in root.iterdir():
        if folder.name not in NAMES:
            shutil.rmtree(folder)
    return root


@pytest.fixture(scope="module")
def bank(clothes, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "bank"
    return fill_bank(path, tiny, Folder(clothes), steps=4, stored=())


def noise(count, seed=0):
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def goals(tiny, bank):
    made = Synthesizer(tiny, bank)
    return [SeedSelect().goal(tiny, made.real(name)) for name in bank.classes]


def away(tiny, images, goals):
    """1 − cosine of images to their class."""
    rows = SeedSelect().see(tiny)(images)
    return 1 - F.cosine_similarity(rows, torch.stack([goal.features for goal in goals]))


PROCESSES = (VariancePreserving(), VariancePreserving(prediction="v"), Flow())


@pytest.mark.parametrize("process", PROCESSES, ids=["epsilon", "v", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_slope_is_that_of_finite_differences(solver, process):
    model = GaussianBackbone(0.1, 0.2, process, (1, 3, 3))
    generator = torch.Generator().manual_seed(0)
    latents, judge = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 1, 3, 3), (9, 4))
    )
    goal = Goal(judge[:2].abs(), judge.new_full((2, 1, 3, 3), 0.3))
    levels = process.levels(4)[::-1]

    def loss(latent):
        recorder = Recorder(**vars(denoiser(model, ["", ""])))
        see = lambda images: torch.tanh(images.flatten(1) @ judge)  # noqa: E731
        return losses(recorder, latent, goal, see, solver, levels)

    assert torch.autograd.gradcheck(loss, latents.requires_grad_(), atol=1e-7, rtol=1e-5)


def test_what_is_looked_at_is_the_images_of_the_last_three_steps(tiny, goals):
    """By DDIM one after another, with the clean estimates as the steps there would end clean."""
    latents, levels, seen = noise(1), tiny.process.levels(5)[::-1], []

    def see(images):
        seen.append(images)
        return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1).double()

    goal = Goal(torch.ones(1, 2, dtype=torch.float64), goals[0].clean[None])
    with torch.no_grad():
        found = losses(Recorder(**vars(denoiser(tiny, [""]))), latents, goal, see, "ddim", levels)
    torch.testing.assert_close(seen[-1], sample(tiny, latents, None, "ddim", 5))
    latent, plain, expected = latents, denoiser(tiny, [""]), []
    with torch.no_grad():
        for here, there in pairwise(levels):
            clean, rest = plain(latent, here)
            expected.append(tiny.decode(clean))
            alpha, sigma = tiny.process.alpha_sigma(there)
            latent = alpha * clean + sigma * rest
    torch.testing.assert_close(torch.cat(seen), torch.cat(expected[-3:]))
    rows = torch.stack([see(images)[0] for images in expected[-3:]])
    far = 1 - F.cosine_similarity(rows, goal.features)
    total = 10 * (torch.tensor([0.05, 0.25, 0.7]) * far).sum()
    total += (latent - goal.clean).square().mean()
    torch.testing.assert_close(found[0], total.float())


@pytest.mark.parametrize("solver", ["ddim", "fireflow", "dpm++"])
def test_the_loss_and_the_distance_to_the_class_fall(tiny, bank, goals, solver):
    # twice the mean: a centroid in some way off
    centroids = torch.stack([bank.latents(name).mean(0) * 2 for name in bank.classes])
    found = SeedSelect(4)(tiny, centroids, goals, "", ResolvedSampling(solver=solver, steps=3))
    assert found.losses.shape == (3, 5)
    assert (found.losses[:, -1] < found.losses[:, 0]).all()
    before, after = (
        away(tiny, sample(tiny, latents, None, solver, 3), goals)
        for latents in (centroids, found.latents)
    )
    assert after.mean() < 0.7 * before.mean()


def test_what_comes_out_is_the_best_on_the_way(tiny, goals):
    latents = noise(3)
    far = SeedSelect(1, 50.0)(tiny, latents, goals, "", DDIM)
    assert (far.losses[:, 1] > far.losses[:, 0]).all() and torch.equal(far.latents, latents)


@pytest.mark.slow
def test_a_centroid_needs_five_steps_where_noise_needs_thirty(tiny, bank, goals):
    made = Synthesizer(tiny, bank, Rule.parse("nao/chm"), Sampling(solver="ddim"))
    plans = [Planner(bank.members)(0, label) for label in range(3)]
    centroids = torch.stack([made.centroid(plan) for plan in plans])
    near = SeedSelect(5, 0.05)(tiny, centroids, goals, "", replace(DDIM, steps=4)).losses
    far = SeedSelect(30, 0.1)(tiny, noise(3), goals, "", replace(DDIM, steps=4)).losses
    assert far[:, -1].mean() < 0.5 * far[:, 0].mean()
    assert near[:, -1].mean() < far[:, -1].mean()


def test_a_sample_does_not_depend_on_its_batch(tiny, goals):
    latents, refine = noise(3), SeedSelect(2)
    how, guided = (tiny, latents, goals, ["", "top", "bag"]), replace(DDIM, guidance=2.0)
    whole, alone = refine(*how, guided), refine(*how, replace(guided, batch_size=1))
    torch.testing.assert_close(alone.losses, whole.losses, rtol=1e-3, atol=1e-3)
    # a number whose slope is rounding alone may go the other way, by twice 2 · 0.05
    assert (alone.latents - whole.latents).abs().mean() < 1e-3


def test_doing_layers_again_changes_no_slope(tiny, goals, monkeypatch):
    goal = Goal(*map(torch.stack, zip(*goals, strict=True)))
    see, kept = SeedSelect().see(tiny), []

    def slope():
        latents = noise(3).requires_grad_()
        recorder = Recorder(**vars(denoiser(tiny, [""] * 3)))
        levels, held = tiny.process.levels(4)[::-1], 0

        def hold(tensor):
            nonlocal held
            held += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            found = losses(recorder, latents, goal, see, "ddim", levels)
        kept.append(held)
        return torch.autograd.grad(found.sum(), latents)[0]

    again = slope()
    monkeypatch.setattr(
        augment.synthesis.refine, "checkpoint", lambda run, *args, use_reentrant: run(*args)
    )
    torch.testing.assert_close(slope(), again, rtol=1e-4, atol=1e-6)
    assert kept[0] < 0.02 * kept[1], "and next to nothing is kept"


def test_it_differentiates_in_inference_mode_too(tiny, bank):
    plans = [Planner(bank.members)(0, 0)]
    with torch.inference_mode():
        images = Synthesizer(tiny, bank, refine=SeedSelect(1)).images(plans)
    assert torch.equal(images, Synthesizer(tiny, bank, refine=SeedSelect(1)).images(plans))
    assert not images.requires_grad


def test_networks_have_slopes_where_images_ask_for_them(tmp_path):
    save_clip(tmp_path / "clip")
    timm = save_network(tmp_path)
    images = torch.rand(2, 3, 16, 16)
    known = ("fashion", ""), ("clip", str(tmp_path / "clip")), ("test_resnet", timm)
    for name, weights in known:
        see = feature_network(name, weights, CPU)
        assert not see(images).requires_grad
        variable = images.clone().requires_grad_()
        with torch.no_grad():
            assert not see(variable).requires_grad
        (slope,) = torch.autograd.grad(unit(see(variable))[:, 0].sum(), variable)
        assert slope.isfinite().all() and slope.any()


FAULTS = {
    "no step": (lambda: SeedSelect(0), "at least 1 step to refine, got 0"),
    "no rate": (lambda: SeedSelect(lr=0.0), "learning rate above 0"),
    "a rate that is no number": (lambda: SeedSelect(lr=float("nan")), "learning rate above 0"),
    "a network without slopes": (lambda: SeedSelect(network="inception"), "differentiable"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_one_sentence(name):
    fault, words = FAULTS[name]
    with pytest.raises(UserError, match=words):
        fault()


def test_a_synthesizer_refuses_what_it_cannot_refine(tiny, bank, goals, tmp_path):
    with pytest.raises(UserError, match="at least 3 solver steps"):
        Synthesizer(
            tiny, bank, Rule.parse("fix"), Sampling(solver="ddim", steps=2), refine=SeedSelect()
        )
    with pytest.raises(UserError, match="at least 3 solver steps"):
        SeedSelect()(tiny, noise(1), goals[:1], "", replace(DDIM, steps=2))
    with pytest.raises(UserError, match="a solver out of"):
        SeedSelect()(tiny, noise(1), goals[:1], "", ResolvedSampling(solver="heun"))
    mixed = Planner(bank.members, classes=2)(0, 0)
    with pytest.raises(UserError, match="one class each to refine"):
        Synthesizer(tiny, bank, refine=SeedSelect()).images([mixed])
    plan = Planner(bank.members)(0, 0)
    with pytest.raises(UserError, match="--images"):
        Synthesizer(tiny, bank, refine=SeedSelect(), source=tmp_path).check([plan])
    with pytest.raises(UserError, match="a network of timm"):
        Synthesizer(tiny, bank, refine=SeedSelect(network="hat")).check([plan])


def test_overflow_is_told(tiny, goals):
    broken = Goal(goals[0].features, goals[0].clean * torch.inf)
    with pytest.raises(UserError, match="finite slope"):
        SeedSelect()(tiny, noise(1), [broken], "", DDIM)


def test_a_slope_that_overflows_is_had_at_a_smaller_scale(tiny, goals, monkeypatch):
    found = []
    for scales in ((torch.inf, 1.0), (1.0,)):
        monkeypatch.setattr(augment.synthesis.refine, "SCALES", scales)
        found.append(SeedSelect(1)(tiny, noise(1), goals[:1], "", DDIM).latents)
    assert torch.equal(*found)


def test_synthesize_refines_goes_on_and_makes_any_image_again(
    monkeypatch, capsys, tiny, bank, tmp_path
):
    out = tmp_path / "out"
    command = ("synthesize", "--bank", bank.path, "--out", out, "--per-class", 1, "--steps", 3,
               "--shard-size", 2, "--extension", "png")  # fmt: skip
    code, _, message = call(monkeypatch, capsys, *command, "--refine", 2)
    assert code == 0, message
    known = json.loads((out / "synthesis.json").read_text())["refine"]
    assert known == {"steps": 2, "lr": 0.05, "network": "fashion", "weights": ""}
    whole = snapshot(out)
    for suffix in ("tar", "json"):
        (out / f"shard-000001.{suffix}").unlink()
    assert call(monkeypatch, capsys, *command, "--refine.steps", 2)[0] == 0
    assert snapshot(out) == whole, "a job that was stopped goes on"
    code, _, message = call(monkeypatch, capsys, *command, "--refine", 3)
    assert code == 2 and "(refine)" in message and message.count("\n") == 1
    assert call(monkeypatch, capsys, *command)[0] == 2, "nor is it the job without"
    shards = open_shards(out)
    again = Synthesizer(
        tiny, LatentBank.open(bank.path), sampling=Sampling(steps=3), refine=SeedSelect(**known)
    )
    for index in (1, 2):
        before, after = shards.about(index)["refined"]
        assert after <= before
        image, tolerance = again.images([shards.plan(index)])[0], 0.01
        assert (image - shards[index][0]).abs().mean() < tolerance
        plain = Synthesizer(tiny, bank, sampling=Sampling(steps=3)).images([shards.plan(index)])[0]
        assert (image - plain).abs().mean() > tolerance


def test_faults_of_the_command(monkeypatch, capsys, bank, tmp_path):
    command = ("synthesize", "--bank", bank.path, "--out", tmp_path / "out", "--per-class", 1)
    for given, words in (
        (("--refine", 0), "at least 1 step to refine"),
        (("--refine.lr", 0), "learning rate above 0"),
        (("--refine", 2, "--steps", 2), "at least 3 solver steps"),
        (("--refine", 2, "--images", tmp_path / "no"), "say where they are with --images"),
        (("--refine.network", "hat"), "a network of timm"),
        (("--refine", "often"), "often"),
    ):
        code, _, message = call(monkeypatch, capsys, *command, *given)
        assert code == 2 and words in message and message.count("\n") == 1, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "less"),
    [
        ("seedselect", ("--per-class", 1)),
        ("seedselect_imagenet_lt", ("--fill-to", 5, "--refine.network", "fashion")),
    ],
)
def test_the_config_runs(monkeypatch, capsys, bank, tmp_path, name, less):
    config = CONFIGS / f"{name}.yaml"
    text = config.read_text()
    assert text.startswith("# expected: ")
    given = yaml.safe_load(text)
    assert SeedSelect(**given["refine"] | {"network": "fashion", "weights": ""}) == SeedSelect(
        5, 0.05, "fashion"
    )
    shutil.copytree(bank.path, tmp_path / given["bank"])
    monkeypatch.chdir(tmp_path)
    less = (*less, "--steps", 3, "--refine.steps", 1, "--refine.weights", "")
    code, _, message = call(monkeypatch, capsys, "synthesize", "--config", config, *less)
    assert code == 0, message
    shards = open_shards(given["out"])
    settings = json.loads((tmp_path / given["out"] / "synthesis.json").read_text())
    assert settings["rule"] == given["rule"]
    assert settings["refine"] == asdict(SeedSelect(1, 0.05, "fashion"))
    assert len(shards) == 3 and "refined" in shards.about(0)
