"""Banks below the noisiest level, banks of clean latents, and what is mixed of them."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import snapshot
from PIL import Image

from augment import (
    LatentBank,
    Mixing,
    Plan,
    Planner,
    Rule,
    Sampling,
    Synthesizer,
    SyntheticDataset,
    UserError,
    open_shards,
    sample,
    write_shards,
)
from augment.bank.fill import fill_bank
from augment.centroid.norms import NORMS
from augment.centroid.prior import modal_norm, nominal_norm
from augment.core.rng import normal, rng
from augment.diffusion.process import level_number, levels_to
from augment.inversion import INVERTERS, invert
from augment.report.evaluate import sampled_by
from augment.report.tiles import Tile
from augment.sources import Folder
from augment.synthesis.synthesizer import DEFAULT_LEVEL, planner_of

STEPS = 10
LEVELS = (0.3, 0.6, 0.9)


@pytest.fixture(scope="module")
def banks(tmp_path_factory, gaussian, pictures):
    """Banks of the same images at each level, and clean."""
    root, source = tmp_path_factory.mktemp("banks"), Folder(pictures)
    made = {
        s: fill_bank(root / f"{s}", gaussian, source, None, "fireflow", steps=STEPS, level=s)
        for s in (*LEVELS, 1.0)
    }
    return made | {"noise": fill_bank(root / "noise", gaussian, source, None, "noise", steps=STEPS)}


def of_ants(**more):
    ids = ("ant/0.png", "ant/1.png", "ant/2.png")
    return Plan(0, "ant", ids, (0.5, 0.3, 0.2), 0.0, 0, 0, 3, **more)


@pytest.mark.parametrize("s", LEVELS)
def test_the_true_level_is_recorded_and_the_clean_latents_kept(s, banks, gaussian):
    bank, top = banks[s], banks[1.0]
    level = gaussian.process.levels(STEPS)[int(STEPS * s)]
    assert bank.inversion["level"] == bank.level == level
    assert bank.manifest.keeps == ["errors", "clean"]
    assert "level" not in top.inversion and top.manifest.keeps == ["errors"]
    assert bank.errors("ant").max() < 1e-3, "each latent is sampled back from its level"
    alpha, sigma = gaussian.process.alpha_sigma(level)
    exact = alpha * 0.1 + (alpha**2 + sigma**2) ** 0.5 * (bank.clean("ant") - 0.1)
    torch.testing.assert_close(bank.latents("ant"), exact, rtol=0, atol=0.01)


def test_level_1_is_what_it_was_to_the_bit(banks, gaussian, pictures, tmp_path):
    options = {"inversion": "fireflow", "steps": STEPS}
    plain = fill_bank(tmp_path / "bank", gaussian, Folder(pictures), **options)
    ours, theirs = snapshot(banks[1.0].path), snapshot(plain.path)
    assert ours == theirs
    plan = Planner(plain.members)(0, 0)
    assert "level" not in plan.to_json()
    asked = planner_of(plain, Mixing(level=1.0))(0, 0)
    assert asked == plan, "level 1 is the bank's own"
    images = [Synthesizer(gaussian, bank).images([plan]) for bank in (plain, banks[1.0])]
    assert torch.equal(*images)
    levels = gaussian.process.levels(STEPS)
    assert levels_to(gaussian.process, STEPS) == levels == levels_to(gaussian.process, STEPS, 1.0)


@pytest.mark.parametrize("name", [n for n in INVERTERS if n not in ("noise", "null_text")])
def test_every_inversion_stops_where_it_is_told(name, gaussian):
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    half = invert(gaussian, images, None, name, 50, level=0.5)
    level = gaussian.process.levels(50)[25]
    back = sample(gaussian, half, None, INVERTERS[name].solver, 50, level=level)
    near = 0.3 if name == "forward_start" else 0.02  # whose noise changes the image
    assert (back - images).abs().max() < near
    alpha, sigma = gaussian.process.alpha_sigma(level)
    exact = alpha * 0.1 + (alpha**2 + sigma**2) ** 0.5 * (2 * images - 1.1)
    assert (half - exact).abs().max() < 2 * near


@pytest.mark.parametrize("rule", ["fade/chm", "nin/0", "slerp/0", "nao/0", "lin/0", "vp/mu"])
@pytest.mark.parametrize("s", LEVELS)
def test_a_vertex_gives_back_the_images_own(s, rule, banks, gaussian):
    bank = banks[s]
    plan = replace(of_ants(), weights=(0.0, 1.0, 0.0))
    found = Synthesizer(gaussian, bank, Rule.parse(rule)).centroid(plan)
    torch.testing.assert_close(found, bank.latents("ant")[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("s", LEVELS)
def test_the_noise_of_a_centroid_is_the_rules_and_keeps_its_norm_law(s, norm, banks, gaussian):
    bank, plan = banks[s], of_ants()
    if norm == "circle":
        plan = replace(plan, members=plan.members[:2], weights=(0.6, 0.4))
    rule = Rule.parse(f"{norm}/0")
    alpha, sigma = gaussian.process.alpha_sigma(bank.level)
    rows, weights = slice(len(plan.members)), torch.tensor(plan.weights)
    clean = bank.clean("ant")[rows]
    noises = (bank.latents("ant")[rows] - alpha * clean) / sigma
    mean = torch.einsum("k,kchw->chw", weights, clean)
    centroid = Synthesizer(gaussian, bank, rule).centroid(plan)
    noise = (centroid - alpha * mean) / sigma
    torch.testing.assert_close(noise, rule(noises[None], weights[None])[0], rtol=0, atol=1e-4)
    own = (weights * noises.flatten(1).norm(dim=1)).sum()
    law = {
        "fix": nominal_norm(noise.numel()),
        "mode": modal_norm(noise.numel()),
        "nin": own,
        "slerp": own,
    }
    if norm in law:
        torch.testing.assert_close(noise.norm(), torch.tensor(float(law[norm])), rtol=1e-4, atol=0)


def test_fresh_noise_is_one_more_noise_to_mix(banks, gaussian):
    bank, plan = banks[0.6], replace(of_ants(), noise=0.25)
    alpha, sigma = gaussian.process.alpha_sigma(bank.level)
    noises = (bank.latents("ant") - alpha * bank.clean("ant")) / sigma
    fresh = normal(rng(0, "noise", 0, 3), 1, 8, 8)
    weights = torch.tensor([[*(0.75 * w for w in plan.weights), 0.25]])
    mean = torch.einsum("k,kchw->chw", torch.tensor(plan.weights), bank.clean("ant"))
    expected = alpha * mean + sigma * Rule()(torch.cat([noises, fresh[None]])[None], weights)[0]
    found = Synthesizer(gaussian, bank).centroid(plan)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_other_step_counts_begin_exactly_at_the_level(gaussian):
    process = gaussian.process
    level = process.levels(STEPS)[level_number(STEPS, 0.7)]
    for steps in (4, 25):
        levels = levels_to(process, steps, level)
        assert levels[-1] == level
        assert levels[:-1] == [known for known in process.levels(steps) if known < level]
    assert levels_to(process, STEPS, level) == process.levels(STEPS)[:8]


def test_clean_latents_get_the_plans_noise_at_the_plans_level(banks, gaussian):
    bank = banks["noise"]
    assert bank.manifest.keeps == ["errors"] and bank.errors("ant").max() < 1e-5
    synthesizer = Synthesizer(gaussian, bank)
    plans = [of_ants(level=s) for s in (0.3, 1.0, 0.6)] + [of_ants()]
    weights = torch.tensor(plans[0].weights)
    mean = torch.einsum("k,kchw->chw", weights, bank.clean("ant"))
    noise, images = normal(rng(0, "noise", 0, 3), 1, 8, 8), synthesizer.images(plans)
    for row, (plan, s) in enumerate(zip(plans, (0.3, 1.0, 0.6, DEFAULT_LEVEL), strict=True)):
        level = gaussian.process.levels(STEPS)[int(STEPS * s)]
        alpha, sigma = gaussian.process.alpha_sigma(level)
        centroid = synthesizer.centroid(plan)
        torch.testing.assert_close(centroid, alpha * mean + sigma * noise, rtol=0, atol=1e-6)
        alone = sample(gaussian, centroid[None], None, "fireflow", STEPS, level=level)
        torch.testing.assert_close(images[row : row + 1], alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(synthesizer.mix(plans).centroids[2], synthesizer.centroid(plans[2]))


def test_levels_are_drawn_by_the_plan_alone_and_change_no_other_draw(banks):
    levels = (1.0, 0.75, 0.5, 0.25)
    plain = Planner(banks["noise"].members, Mixing(members=2))
    drawing = planner_of(banks["noise"], Mixing(members=2, level="1,0.75,0.5,0.25"))
    plans = [drawing(epoch, index) for epoch in range(2) for index in range(100)]
    assert [replace(plan, level=None) for plan in plans] == [
        plain(epoch, index) for epoch in range(2) for index in range(100)
    ]
    counts = {level: sum(plan.level == level for plan in plans) for level in levels}
    assert sum(counts.values()) == 200 and min(counts.values()) > 30
    assert plans[7] == drawing(0, 7) == Plan.from_json(plans[7].to_json())
    assert json.loads(plans[7].to_json())["level"] == plans[7].level
    other = [planner_of(banks["noise"], Mixing(level=levels, seed=1))(0, i) for i in range(50)]
    assert [plan.level for plan in other] != [plan.level for plan in plans[:50]]


def test_a_plan_of_before_has_its_bytes():
    line = (
        '{"label": 0, "class_name": "ant", "members": ["a"], "weights": [1.0], "noise": 0.0, '
        '"seed": 0, "epoch": 0, "index": 4, "classes": []}'
    )
    plan = Plan.equal(0, "ant", ["a"], 4)
    assert plan.to_json() == line
    assert Plan.from_json(line) == plan and plan.level is None


def test_data_sets_and_shards_know_the_level_of_each_image(banks, gaussian, tmp_path):
    bank, mixing = banks["noise"], Mixing(members=1, level=(0.9, 0.4))
    dataset = SyntheticDataset(bank, gaussian, mixing, Sampling(batch_size=4), per_class=2)
    levels = {dataset.plan(index).level for index in range(6)}
    assert levels == {0.9, 0.4}
    shards = write_shards(
        dataset.synthesizer, dataset.planner, 2, tmp_path / "shards", extension="png"
    )
    for row in range(6):
        assert shards.plan(row) == dataset.plan(row)
    assert sampled_by(shards)["level"] == shards.plan(0).level
    tile = Tile("kept", Image.new("L", (8, 8)), plan=shards.plan(0))
    assert tile.record()["level"] == shards.plan(0).level
    assert "level" not in replace(tile, plan=of_ants()).record()
    manifest = json.loads((tmp_path / "shards" / "synthesis.json").read_text())
    assert manifest["level"] == [0.9, 0.4]
    again = write_shards(
        dataset.synthesizer, dataset.planner, 2, tmp_path / "shards", extension="png"
    )
    assert len(again) == 6
    at_level = planner_of(banks[0.6])
    assert at_level(0, 0).level == banks[0.6].level
    write_shards(Synthesizer(gaussian, banks[0.6]), at_level, 1, tmp_path / "other")
    assert open_shards(tmp_path / "other").plan(0) == at_level(0, 0)
    manifest = json.loads((tmp_path / "other" / "synthesis.json").read_text())
    assert manifest["fingerprint"]["inversion"]["level"] == banks[0.6].level


def test_a_bank_in_memory_and_the_one_on_disk_mix_the_same(banks, gaussian):
    plan = of_ants()
    found = [Synthesizer(gaussian, b).centroid(plan) for b in (banks[0.6], banks[0.6].to("cpu"))]
    assert torch.equal(*found)


def test_an_image_of_another_class_is_translated_and_its_label_shared_by_the_level(banks, gaussian):
    mixing = Mixing(members=1, level=(0.9, 0.4), translate=0.5)
    dataset = SyntheticDataset(banks["noise"], gaussian, mixing, per_class=20)
    others = set()
    for index, (_, label) in enumerate(dataset[k] for k in range(len(dataset))):
        plan = dataset.plan(index)
        (other,) = plan.classes
        assert plan.class_name == dataset.classes[plan.label] != other
        assert plan.members[0].startswith(other)
        expected = torch.zeros(3)
        expected[plan.label] = plan.level**0.5
        expected[dataset.class_to_idx[other]] = 1 - plan.level**0.5
        torch.testing.assert_close(label, expected)
        others.add((plan.class_name, other))
    assert len(others) == 6, "from each class to each other"
    with pytest.raises(UserError, match=r"translate = 0\.5; use SyntheticDataset"):
        write_shards(dataset.synthesizer, dataset.planner, 1, banks["noise"].path / "no")


FAULTS = {
    "above 1": (lambda b, g, p, t: fill_bank(t, g, Folder(p), level=1.5), r"level in \(0, 1\]"),
    "below the first step": (
        lambda b, g, p, t: fill_bank(t, g, Folder(p), steps=4, level=0.2),
        "level of at least 0.25, one of 4 steps, got 0.2",
    ),
    "to noise": (
        lambda b, g, p, t: fill_bank(t, g, Folder(p), None, "noise", steps=4, level=0.5),
        "settings of noise out of steps, got 'level'",
    ),
    "mixing": (lambda b, g, p, t: Mixing(level=1.2), r"levels in \(0, 1\], got 1.2"),
    "translated": (lambda b, g, p, t: Mixing(translate=0.0), "translate above 0"),
    "translated classes": (
        lambda b, g, p, t: planner_of(b["noise"], Mixing(translate=0.5), 2),
        "one class a centroid and another to take images from",
    ),
    "no number": (lambda b, g, p, t: Mixing(level="half"), "numbers such as 1,0.75,0.5 for level"),
    "above the bank's": (
        lambda b, g, p, t: planner_of(b[0.6], Mixing(level=0.9)),
        "level 0.6 of the bank's latents, got 0.9; leave level out",
    ),
    "below the bank's": (
        lambda b, g, p, t: planner_of(b[1.0], Mixing(level=0.5)),
        "level 1 of the bank's latents, got 0.5; leave level out",
    ),
    "another plan": (
        lambda b, g, p, t: Synthesizer(g, b[0.6]).images([of_ants(level=0.3)]),
        "at the level 0.6 of the bank's latents, got 0.3",
    ),
    "noise twice": (
        lambda b, g, p, t: Synthesizer(g, b["noise"]).mix([replace(of_ants(), noise=0.5)]),
        "no share of noise with a bank of clean latents",
    ),
    "in JSON": (
        lambda b, g, p, t: Plan.from_json(replace(of_ants(), level=0.0).to_json()),
        r"a level outside \(0, 1\]",
    ),
    "of a sample": (
        lambda b, g, p, t: sample(g, torch.zeros(1, 1, 8, 8), level=1.5),
        r"noise level in \[0, 1\], got 1.5",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_level_that_cannot_be_is_refused_and_nothing_written(
    fault, banks, gaussian, pictures, tmp_path
):
    make, message = FAULTS[fault]
    with pytest.raises(UserError, match=message):
        make(banks, gaussian, pictures, tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    assert LatentBank.open(banks[0.6].path).level == banks[0.6].level
