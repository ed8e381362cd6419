"""Who is mixed and by how much: concentrations of each member, neighbours, several classes."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import dataset_with, paint, planner_with, snapshot
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from augment import LatentBank, Mixing, Plan, Planner, Sampling, UserError
from augment.bank.fill import fill_bank
from augment.plan.planner import round_robin
from augment.shards.write import write_shards
from augment.sources import Folder
from augment.synthesis.synthesizer import Synthesizer

SIZES = {"ant": 3, "bee": 4, "cat": 1, "dog": 40}
IMAGES = {name: tuple(f"{name}/{i}.png" for i in range(n)) for name, n in SIZES.items()}
EQUAL = {name: ids[:3] for name, ids in IMAGES.items() if len(ids) >= 3}

# options of a planner, epoch, index -> class, rows and weights, as drawn at commit 015a42d
GOLDEN = [
    (
        {}, 0, 1, "bee", (0, 1, 2, 3),
        (0.5696664376347669, 0.19972949001184404, 0.05468633229825005, 0.17591774005513908),
    ),
    (
        {"members": 2, "seed": 3}, 2, 5, "bee", (2, 3),
        (0.1717168536173923, 0.8282831463826078),
    ),
    (
        {"alpha": 0.1, "members": 3, "seed": 7}, 1, 3, "dog", (3, 6, 14),
        (0.5710204663879417, 0.00059380201138141, 0.428385731600677),
    ),
    ({"alpha": 0.0}, 0, 3, "dog", tuple(range(40)), (*[0.0] * 36, 1.0, 0.0, 0.0, 0.0)),
]  # fmt: skip


@pytest.mark.parametrize(("options", "epoch", "index", "name", "rows", "weights"), GOLDEN)
def test_the_dice_of_one_class_and_one_alpha_fall_as_they_always_did(
    options, epoch, index, name, rows, weights
):
    plan = planner_with(IMAGES, **options)(epoch, index)
    assert plan.members == tuple(IMAGES[name][row] for row in rows)
    assert plan.weights == pytest.approx(weights, rel=1e-12, abs=0)
    assert (plan.class_name, plan.classes) == (name, ())


def test_a_plan_written_before_classes_were_mixed_can_still_be_read():
    plan = Planner(IMAGES)(0, 1)
    record = json.loads(plan.to_json())
    assert record.pop("classes") == []
    assert Plan.from_json(json.dumps(record)) == plan


def features(images, ties: bool, seed: int = 0):
    """Random features; few different ones, if there are to be ties."""
    generator = np.random.default_rng(seed)
    rows = {name: (len(ids), 2 if ties else 5) for name, ids in images.items()}
    return {
        name: torch.from_numpy(
            generator.integers(0, 3, s) if ties else generator.standard_normal(s)
        )
        for name, s in rows.items()
    }


def brute(images, table, plan, members, names):
    """The ids nearest to a plan's first member, class by class, one distance after the other."""
    row_of = {name: {i: row for row, i in enumerate(ids)} for name, ids in images.items()}
    anchor = row_of[plan.class_name][plan.members[0]]
    point, found = table[plan.class_name][anchor].numpy(), []
    for name in names:
        gaps = [((row - point) ** 2).sum() for row in table[name].numpy()]
        others = [n for n in range(len(gaps)) if (name, n) != (plan.class_name, anchor)]
        order = sorted(others, key=lambda n, gaps=gaps: (gaps[n], n))
        if name == plan.class_name:
            order = [anchor, *order]
        found += [images[name][n] for n in order[:members]]
    return tuple(found)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("members", [1, 4, 99])
@pytest.mark.parametrize("classes", [1, 3])
def test_neighbours_are_the_nearest_by_brute_force(ties, members, classes):
    table = features(IMAGES, ties)
    planner = Planner(IMAGES, Mixing(members=members), classes=classes, features=table)
    anchors = set()
    for index in range(120):
        plan = planner(0, index)
        names = tuple(dict.fromkeys(plan.member_classes))
        assert len(names) == classes
        assert plan.members == brute(IMAGES, table, plan, members, names)
        anchors.add(plan.members[0])
    assert anchors >= set(EQUAL["ant"] + IMAGES["bee"] + IMAGES["cat"]), "each has its turn"


def test_an_anchor_comes_before_its_duplicates():
    alike = {name: torch.ones(len(ids), 2) for name, ids in IMAGES.items()}
    planner = Planner(IMAGES, Mixing(members=3), features=alike)
    plans = [planner(0, 4 * number + 1) for number in range(60)]
    assert {plan.members[0] for plan in plans} == set(IMAGES["bee"])
    for plan in plans:
        others = [image for image in IMAGES["bee"] if image != plan.members[0]]
        assert plan.members[1:] == tuple(others[:2])


def test_the_first_alpha_favours_the_anchor():
    planner = Planner(
        EQUAL, Mixing(alpha=(8.0, 1.0, 1.0), members=3), features=features(EQUAL, False)
    )
    weights = torch.tensor([planner(0, index).weights for index in range(600)])
    torch.testing.assert_close(weights.mean(0), torch.tensor([0.8, 0.1, 0.1]), rtol=0, atol=0.03)


def test_home_classes_take_turns_and_the_others_are_drawn_alike():
    planner = Planner(IMAGES, Mixing(members=2), classes=2)
    others = dict.fromkeys(IMAGES, 0)
    for index in range(1200):
        plan = planner(0, index)
        home, other = dict.fromkeys(plan.classes)
        assert plan.label == index % 4
        assert home == plan.class_name == list(IMAGES)[plan.label] != other
        for name in (home, other):
            mine = [i for i, c in zip(plan.members, plan.classes, strict=True) if c == name]
            assert len(set(mine)) == len(mine) == min(2, SIZES[name])
            assert set(mine) <= set(IMAGES[name])
        others[other] += 1
    assert all(count == pytest.approx(300, abs=75) for count in others.values())


def test_all_classes_may_be_mixed_at_once():
    plan = Planner(IMAGES, classes=4)(0, 2)
    assert plan.members[0] == "cat/0.png"
    assert sorted(plan.members) == sorted(i for ids in IMAGES.values() for i in ids)


def by_hand(**changes):
    """A plan whose label and count are plain to see."""
    record = {
        "label": 0, "class_name": "ant", "members": ("a", "b", "c"), "weights": (0.5, 0.2, 0.3),
        "noise": 0.4, "seed": 0, "epoch": 0, "index": 0, "classes": ("ant", "dog", "ant"),
    }  # fmt: skip
    return Plan(**record | changes)


def test_a_soft_label_adds_up_the_weights_of_each_class():
    label = by_hand().soft_label(["ant", "bee", "dog"])
    assert label.dtype == torch.float32
    torch.testing.assert_close(label, torch.tensor([0.8, 0, 0.2]))
    assert by_hand(classes=()).soft_label(list(IMAGES)).tolist() == [1, 0, 0, 0]
    with pytest.raises(UserError, match="'dog'"):
        by_hand().soft_label(["ant", "bee"])


def test_the_effective_count_of_a_plan_is_that_of_its_weights():
    assert by_hand().effective_count == pytest.approx(1 / 0.38)
    assert Planner(IMAGES, Mixing(alpha=math.inf))(0, 3).effective_count == pytest.approx(40)
    assert Planner(IMAGES, Mixing(alpha=0.0))(0, 3).effective_count == 1


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_soft_labels_sum_to_one_and_favour_nobody_beyond_the_mixed(classes):
    planner = Planner(IMAGES, Mixing(members=3, noise=0.5), classes=classes)
    for index in range(40):
        plan = planner(1, index)
        assert Plan.from_json(plan.to_json()) == plan
        label = plan.soft_label(list(IMAGES))
        assert label.sum().item() == pytest.approx(1)
        assert {n for n, share in zip(IMAGES, label, strict=True) if share} == {
            *plan.member_classes
        }


TABLE = features(IMAGES, False)
FAULTS = {
    "more alphas than members": ({"alpha": (1.0, 1.0), "members": 1}, ("1", "'ant'", "2")),
    "alphas for a tail class": ({"alpha": (1.0,) * 3, "members": 3}, ("1", "'cat'", "3")),
    "alphas for one of two classes": ({"alpha": (1.0,), "members": 1, "classes": 2}, ("2", "1")),
    "alphas all zero": ({"alpha": (0.0,), "members": 1}, ("not all of them 0",)),
    "an infinite alpha of several": ({"alpha": (math.inf,), "members": 1}, ("inf",)),
    "no alphas": ({"alpha": ()}, ("one alpha", "1 points", "0")),
    "no class": ({"classes": 0}, ("classes", "4", "0")),
    "more classes than there are": ({"classes": 5}, ("classes", "4", "5")),
    "neighbours of no number": ({"features": TABLE}, ("members", "nearest")),
    "features of fewer classes": ({"members": 1, "features": {"ant": TABLE["ant"]}}, ("'bee'",)),
    "features of no class": ({"members": 1, "features": {}}, ("'ant'", "3", "none")),
    "features of fewer images": (
        {"members": 1, "features": TABLE | {"dog": TABLE["dog"][1:]}},
        ("'dog'", "40", "(39, 5)"),
    ),
    "features of two lengths": (
        {"members": 1, "features": TABLE | {"dog": TABLE["dog"][:, 1:]}},
        ("'dog'", "(40, 4)"),
    ),
    "features in a row": ({"members": 1, "features": {"ant": torch.ones(3)}}, ("'ant'", "(3,)")),
    "features not a number": (
        {"members": 1, "features": TABLE | {"bee": TABLE["bee"] / 0}},
        ("'bee'", "NaN"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_choice_that_cannot_be_made_is_refused_at_once(fault):
    options, words = FAULTS[fault]
    with pytest.raises(UserError) as caught:
        planner_with(IMAGES, **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.fixture
def vectors(bank, tmp_path):
    """Features of the shared bank by image id, and where to keep them."""
    generator = torch.Generator().manual_seed(0)
    ids = [i for members in bank.members.values() for i in members]
    return {i: torch.randn(6, generator=generator) for i in ids}, tmp_path / "features.safetensors"


def test_features_are_the_latents_or_a_files_vectors_in_the_banks_order(bank, vectors):
    table, path = vectors
    save_file(table | {"elk/0.png": torch.ones(2)}, path)
    part = bank.subset(lambda image_id: image_id != "bee/1.png")
    latent, ours = part.features("latent"), part.features(path)
    for name, ids in part.members.items():
        assert torch.equal(latent[name], part.latents(name).flatten(1))
        assert torch.equal(ours[name], torch.stack([table[i] for i in ids]))


BAD_VECTORS = {
    "missing": (lambda t: t.pop("bee/2.png"), ("none", "bee/2.png", "8 images")),
    "longer": (lambda t: t.update({"bee/2.png": torch.ones(7)}), ("(6,)", "(7,)", "bee/2.png")),
    "a table": (lambda t: t.update({"ant/0.png": torch.ones(1, 6)}), ("(1, 6)", "ant/0.png")),
    "not finite": (lambda t: t["cat/0.png"].fill_(math.nan), ("NaN", "cat/0.png")),
}


@pytest.mark.parametrize("fault", BAD_VECTORS)
def test_features_that_do_not_fit_the_bank_are_refused_by_the_image(bank, vectors, fault):
    (table, path), (harm, words) = vectors, BAD_VECTORS[fault]
    harm(table)
    save_file(table, path)
    with pytest.raises(UserError) as caught:
        bank.features(str(path))
    assert all(word in str(caught.value) for word in (*words, str(path))), caught.value


@pytest.mark.parametrize("content", [None, b"", b"not features"])
def test_a_file_that_has_no_features_is_refused(bank, tmp_path, content):
    path = tmp_path / "features.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"features\.safetensors"):
        bank.features(path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, tiny) -> LatentBank:
    """A small bank of the embedded backbone."""
    root = tmp_path_factory.mktemp("drawn")
    source = Folder(paint(root / "images", {"ant": 3, "bee": 3, "cat": 3}, size=28))
    return fill_bank(root / "bank", tiny, source, steps=1)


def test_a_dataset_of_several_classes_gives_soft_labels(drawn, tiny):
    options = {"members": 2, "classes": 2, "alpha": (4.0, 1.0, 1.0, 1.0), "nearest": "latent"}
    synthetic = dataset_with(drawn, tiny, rule="lin/0", per_class=2, steps=1, **options)
    images, labels = next(iter(DataLoader(synthetic, batch_size=6)))
    assert images.shape == (6, 1, 32, 32)
    assert (labels.shape, labels.dtype) == ((6, 3), torch.float32)
    for index, label in enumerate(labels):
        plan, shares = synthetic.plan(index), torch.zeros(3)
        centroid = torch.zeros(drawn.latents("ant").shape[1:])
        for name, member, weight in zip(plan.classes, plan.members, plan.weights, strict=True):
            shares[drawn.classes.index(name)] += weight
            centroid += weight * drawn.latents(name)[drawn.members[name].index(member)]
        torch.testing.assert_close(label, shares)
        torch.testing.assert_close(synthetic.synthesizer.centroid(plan), centroid)
    hard = dataset_with(
        drawn, tiny, per_class=2, steps=1, **options, target_transform=lambda t: t.argmax().item()
    )
    assert [hard[index][1] for index in range(6)] == labels.argmax(1).tolist()
    assert synthetic.targets == [0, 1, 2, 0, 1, 2]


def test_a_folder_by_class_refuses_to_mix_classes(bank, gaussian, tmp_path):
    with pytest.raises(UserError, match="SyntheticDataset"):
        write_shards(
            Synthesizer(gaussian, bank), Planner(bank.members, classes=2), 1, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


RECORDS = {
    "plain": ({"members": 1}, 1.0),
    "infinite": ({"members": 1, "alpha": math.inf}, "inf"),
    "a number a member": ({"members": 1, "alpha": (2.0,)}, [2.0]),
}


@pytest.mark.parametrize("record", RECORDS)
def test_a_folder_records_how_it_was_chosen_and_goes_on_only_so(bank, gaussian, tmp_path, record):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    def write(**options):
        synthesizer = Synthesizer(gaussian, bank, sampling=Sampling(steps=1))
        return write_shards(synthesizer, planner_with(bank.members, **options), 1, tmp_path / "out")

    options, alpha = RECORDS[record]
    write(**options)
    before = snapshot(tmp_path)
    kept = json.loads((tmp_path / "out" / "synthesis.json").read_text(), parse_constant=refuse)
    assert kept["alpha"] == alpha
    assert "nearest" not in kept
    write(**options)
    assert snapshot(tmp_path) == before
    for other in ({"alpha": (3.0,)}, {"alpha": 2.0}, {"features": bank.features("latent")}):
        with pytest.raises(UserError, match="new folder"):
            write(**options | other)
    assert snapshot(tmp_path) == before


def test_a_folder_of_neighbours_goes_on_with_the_same_features_only(bank, gaussian, tmp_path):
    def write(table):
        synthesizer = Synthesizer(gaussian, bank, sampling=Sampling(steps=1))
        planner = Planner(bank.members, Mixing(members=2), features=table)
        return write_shards(synthesizer, planner, 1, tmp_path / "out")

    table = features(bank.members, False)
    write(table)
    write({name: rows.clone() for name, rows in table.items()})
    with pytest.raises(UserError, match="new folder"):
        write(features(bank.members, False, seed=1))


def test_classes_take_turns_until_each_has_enough():
    counts = {"ant": 1, "bee": 0, "cat": 3}
    labels = round_robin(counts, ["ant", "bee", "cat"])
    assert labels == [0, 2, 2, 2]
    assert round_robin(2, ["ant", "bee"]) == [0, 1, 0, 1]
    for wrong in (0, -1, {}, {"ant": 0}, {"ant": -1, "bee": 3}, {"dog": 1}):
        with pytest.raises(UserError, match="expected"):
            round_robin(wrong, ["ant", "bee"])


PLAIN = {"label": 0, "class_name": "a", "members": ["x"], "weights": [1], "noise": 0.0, "seed": 0}


@pytest.mark.parametrize(
    "harm",
    [
        {"label": -1}, {"label": 0.5}, {"label": True}, {"class_name": None}, {"members": "x"},
        {"members": [1]}, {"members": {"x": 1}}, {"weights": ["1"]}, {"weights": [True]},
        {"weights": 1}, {"noise": "0"}, {"noise": []}, {"seed": 2**64}, {"epoch": None},
        {"index": []}, {"classes": [0]}, {"more": 1}, {"weights": [1e300]},
        {"weights": [0.5]}, {"noise": 1.0}, {"noise": -0.1},
        {"members": ["x", "y"], "member_classes": ["a", "a"], "weights": [2, -1]},
        {"weights": [1, 0]}, {"members": []}, {"classes": ["a", "b"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_plan_of_other_types_is_refused(harm):
    facts = PLAIN | {"epoch": 0, "index": 3}
    plan = Plan.from_json(json.dumps(facts))
    assert (plan.members, plan.weights, plan.classes) == (("x",), (1,), ())
    with pytest.raises(UserError, match="expected a plan as JSON"):
        Plan.from_json(json.dumps(facts | harm))
    for line in ("[]", "null", "[" * 100_000, '{"weights": [NaN]}'):
        with pytest.raises(UserError, match="expected a plan as JSON"):
            Plan.from_json(line)
