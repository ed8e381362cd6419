"""Episodes: frozen tasks, heads against slow references, and whole runs on painted pictures."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import call, paint
from safetensors.torch import save_file

import augment.training.episodes.evaluate as module
from augment import Mixing, Sampling, UserError
from augment.bank.fill import fill_bank
from augment.core.errors import AugmentWarning
from augment.core.registry import make
from augment.networks import feature_network
from augment.sources import Folder
from augment.training.episodes.evaluate import (
    EpisodeSettings,
    EpisodeSynthesizer,
    TaskEvaluator,
    run_episodes,
)
from augment.training.episodes.protocol import Episodes
from augment.training.models.heads import HEADS

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("episodes_*.yaml"))
NOVEL = dict.fromkeys(("ant", "bee", "cat", "dog", "elk", "fox"), 9)
SMALL = {"n_way": 3, "n_shot": 2, "n_query": 4, "n_tasks": 5}
CPU = torch.device("cpu")
each_head = pytest.mark.parametrize("name", HEADS)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Folder(paint(tmp_path_factory.mktemp("episodes") / "novel", NOVEL, size=32))


@pytest.fixture(scope="module")
def bank(tiny, source):
    return fill_bank(source.root.parent / "bank", tiny, source, steps=1)


@pytest.fixture(scope="module")
def weights(source):
    """Of a network without training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=2, in_chans=1)
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    save_file(state, source.root.parent / "network.safetensors")
    return str(source.root.parent / "network.safetensors")


@pytest.fixture
def given(source, weights, tmp_path):
    """The arguments of a small run."""
    paths = {"images": str(source.root), "weights": weights, "out": str(tmp_path / "out")}
    form = {"channels": 1, "resolution": 32, "device": "cpu", "per_class": 2, "steps": 1}
    return {**paths, "network": "test_resnet", **SMALL, **form}


def make_head(name, **settings):
    return make(HEADS, name, settings, "head")


def samples(spread=0.3, classes=3, count=4, width=6):
    """Clusters: features, labels, weights, queries."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(classes).repeat(count)
    middle = torch.randn(classes, width, generator=generator).double()[labels]
    noise = spread * torch.randn(2, len(labels), width, generator=generator).double()
    weights = torch.rand(len(labels), generator=generator).double() + 0.1
    return middle + noise[0], labels, weights, middle + noise[1]


def test_a_task_is_a_function_of_seed_and_number_and_disjoint(source):
    some, more = (Episodes.draw(source, **SMALL | {"n_tasks": n}) for n in (3, 50))
    assert more.tasks[:3] == some.tasks
    assert len(set(more.tasks)) == 50
    assert Episodes.draw(source, **SMALL, seed=1)[0] != some[0]
    for task in more:
        assert len(task.images) == 3 * (2 + 4)
        for name, support, query in zip(task.classes, task.support, task.query, strict=True):
            assert (len(support), len(query)) == (2, 4)
            assert {*support, *query} <= set(source.ids[name])


def test_frozen_tasks_come_back_and_damaged_ones_are_one_sentence(source, tmp_path):
    path, drawn = tmp_path / "episodes.json", Episodes.draw(source, **SMALL)
    drawn.write(path)
    good, read = path.read_text(), Episodes.read(path, source)
    assert (read.tasks, read.digest, read.n_shot) == (drawn.tasks, drawn.digest, 2)
    twice = drawn[1].support[0][0]
    for part, value, words in (
        ("classes", 3, "of another form"),
        ("classes", ["ant", "bee", "ant"], "2 classes in task 1"),
        ("support", [["ant/0.png"]] * 3, "other numbers of images than 2 a class in task 1"),
        ("query", drawn[1].query[:2], "other numbers of images than 4 a class in task 1"),
        ("classes", ["yak", *drawn[1].classes[1:]], "of class 'yak', which is not there, in"),
        ("query", [[twice, *q[1:]] for q in drawn[1].query], "an image of class .* twice in"),
    ):
        record = json.loads(good)
        record["tasks"][1][part] = value
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match=f"^expected .*{words}.*; .*remove the file"):
            Episodes.read(path, source)
    for content in (b"", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"tasks": []}'):
        path.write_bytes(content)
        with pytest.raises(UserError, match="expected frozen episodes"):
            Episodes.read(path, source)


@pytest.mark.parametrize("metric", ["cosine", "euclid"])
def test_a_prototype_is_the_nearest_mean(metric):
    features, labels, weights, query = samples()
    if metric == "cosine":
        features, query = F.normalize(features), F.normalize(query)
    expected = []
    for point in query:
        costs = []
        for label in range(3):
            rows = [k for k in range(12) if labels[k] == label]
            mean = sum(weights[k] * features[k] for k in rows) / sum(weights[k] for k in rows)
            costs += [-point @ mean / mean.norm() if metric == "cosine" else (point - mean).norm()]
        expected.append(costs.index(min(costs)))
    assert make_head("prototype", metric=metric)(*samples()).tolist() == expected


def test_a_logistic_regression_is_at_its_optimum_and_separates():
    features, labels, weights, query = samples(spread=0.05)
    head = make_head("logistic", c=10)
    solution = head.fit(features, labels, weights).requires_grad_()
    logits = F.normalize(features) @ solution[:, :-1].T + solution[:, -1]
    costs = weights * F.cross_entropy(logits, labels, reduction="none")
    (10 * costs.sum() + solution[:, :-1].square().sum() / 2).backward()
    assert solution.grad.abs().max() < 1e-5
    assert head(features, labels, weights, query).tolist() == labels.tolist()


@each_head
def test_a_weight_counts_samples_and_zero_leaves_out(name):
    (features, labels, weights, query), head = samples(spread=1.0), make_head(name)
    often = weights.mul(5).ceil().long()
    ones = torch.ones(int(often.sum())).double()
    repeated = (features.repeat_interleave(often, 0), labels.repeat_interleave(often))
    expected = head(*repeated, ones, query)
    assert torch.equal(head(features, labels, often.double(), query), expected)
    more = (torch.cat([features, query]), torch.cat([labels, labels.roll(1)]))
    assert torch.equal(head(*more, torch.cat([often, 0 * often]).double(), query), expected)


def test_wrong_tasks_and_heads_are_one_sentence(source):
    for factory, wrong, words in (
        (Episodes.draw, {"n_way": 7}, "at least 7 classes for 7 ways, got 6"),
        (
            Episodes.draw,
            {"n_query": 8},
            r"2 \+ 8 images of each class to draw from, got 9 of 'ant'",
        ),
        (Episodes.draw, {"n_shot": 0}, "n_shot ≥ 1, got 0"),
        (Episodes.draw, {"seed": -1}, "seed ≥ 0, got -1"),
        (make_head, {"name": "svm"}, "a head out of prototype, logistic, got 'svm'"),
        (make_head, {"name": "logistic", "l2": 1.0}, "settings of logistic out of c, got 'l2'"),
        (make_head, {"name": "logistic", "c": "1"}, "c of logistic as float, got '1'"),
        (make_head, {"name": "logistic", "c": 0.0}, "c > 0, got 0"),
        (make_head, {"name": "prototype", "metric": "taxi"}, "a metric out of cosine, euclid"),
    ):
        with pytest.raises(UserError, match=words):
            factory(source, **SMALL | wrong) if factory == Episodes.draw else factory(**wrong)


@each_head
def test_copies_of_the_supports_change_nothing(name, source, weights):
    network = feature_network("test_resnet", weights, CPU)

    def copies(task, episode):
        images = [source.load(i, 1, 32) for ids in episode.support for i in ids]
        return torch.stack(images).repeat(3, 1, 1, 1), torch.tensor([0, 0, 1, 1, 2, 2] * 3)

    for task, episode in enumerate(Episodes.draw(source, **SMALL | {"n_tasks": 3})):
        vectors = {i: network(source.load(i, 1, 32)[None])[0] for i in episode.images}
        real, fake = TaskEvaluator(make_head(name), vectors, network, copies, (1, 32), 0.7)(
            task, episode
        )
        assert real == fake


def test_centroids_mix_supports_alone(source, bank, tiny):
    settings = (Mixing(rule="lol", noise=0.2), Sampling(steps=1), 2)
    synthesis, episode = (
        EpisodeSynthesizer(bank, tiny, *settings),
        Episodes.draw(source, **SMALL)[3],
    )
    plans = synthesis.plans(3, episode)
    assert [(p.epoch, p.class_name) for p in plans] == [(3, c) for c in episode.classes] * 2
    assert all(p.members == episode.support[p.label] for p in plans)
    images, labels = synthesis(3, episode)
    assert (images.shape, labels.tolist()) == ((6, 1, 32, 32), [0, 1, 2] * 2)
    only = replace(bank, members=dict(zip(episode.classes, episode.support, strict=True)))
    assert torch.equal(
        EpisodeSynthesizer(only, tiny, *settings)(3, episode)[0], images
    )  # lol's mean too


def test_a_run_resumes_to_the_same_table(given, bank, tmp_path, monkeypatch, capsys):
    given |= {"bank": str(bank.path), "episodes": str(tmp_path / "frozen.json")}
    whole, cut = tmp_path / "out" / "results.csv", tmp_path / "cut" / "results.csv"
    run_episodes(EpisodeSettings(**given))
    out = capsys.readouterr().out
    assert out.startswith("3-way 2-shot, 5 episodes: ")
    assert " % real only, " in out
    measure, given["out"] = TaskEvaluator.__call__, str(cut.parent)

    def dies(self, task, episode):
        if task == 3:
            raise KeyboardInterrupt
        return measure(self, task, episode)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TaskEvaluator, "__call__", dies)
        run_episodes(EpisodeSettings(**given))
    assert cut.read_text() == "".join(whole.read_text().splitlines(keepends=True)[:4])
    cut.write_text(cut.read_text() + "3,0.5,0.")  # a torn row
    run_episodes(EpisodeSettings(**given | {"n_tasks": 4}))
    run_episodes(EpisodeSettings(**given))
    assert cut.read_bytes() == whole.read_bytes()
    monkeypatch.setattr(module, "embed", None)  # all is done: nothing is loaded
    run_episodes(EpisodeSettings(**given))
    with pytest.raises(UserError, match="cut to be new or of per_class 3, got 2; choose"):
        run_episodes(EpisodeSettings(**given | {"per_class": 3}))
    monkeypatch.undo()
    run_episodes(EpisodeSettings(**given | {"bank": None, "out": str(tmp_path / "real")}))
    real = (tmp_path / "real" / "results.csv").read_text().splitlines()
    pairs = zip(whole.read_text().splitlines(), real, strict=True)
    assert all(a.split(",")[:2] == b.split(",")[:2] for a, b in pairs)


def test_a_wrong_run_is_one_sentence(given, source, bank, tiny, tmp_path):
    Episodes.draw(source, **SMALL).write(tmp_path / "frozen.json")
    part = paint(tmp_path / "part", {"ant": 1}, size=32)
    lacking = str(fill_bank(tmp_path / "lacking", tiny, Folder(part), steps=1).path)
    one = {"episodes": None, "n_shot": 1}
    for wrong, words in (
        ({"n_shot": 1}, r"= \(3, 1, 4\), got 5 of \(3, 2, 4\) in .*; ask for these, or remove"),
        ({"n_tasks": 6}, "expected 6 tasks of .*, got 5 of"),
        ({"n_tasks": 1}, "at least 2 tasks for an interval, got 1"),
        ({"weights": "no.safetensors"}, r"weights at no\.safetensors, got no file of weights"),
        ({"weights": __file__}, r"\.safetensors file, got .*; save a state dict"),
        ({"weights": "no.ckpt"}, r"weights at no\.ckpt, got no file of weights"),
        ({"per_class": 0}, "per_class ≥ 1, got 0"),
        ({"rule": "fade/no"}, "got 'no'"),
        ({"bank": str(bank.path), "solver": "no"}, "a solver out of exact, fast, .*, got 'no'"),
        ({"noise": 1.0}, r"noise in \[0, 1\), got 1.0"),
        ({"device": "gpu"}, "a device that is there, got 'gpu'"),
        ({"images": "nowhere"}, "class folders, got nowhere"),
        ({"bank": lacking}, r"every support image in .*, got none of \w+/\d.png in class"),
        ({"bank": str(bank.path), **one}, "noise > 0 where a centroid mixes 1 support, got 0"),
    ):
        given["out"] = str(tmp_path / f"out {words[:9]}")
        with pytest.raises((UserError, AugmentWarning), match=words):
            given["episodes"] = str(tmp_path / "frozen.json")
            run_episodes(EpisodeSettings(**{**given, **wrong}))


def test_the_interval_is_paired_and_normal():
    text = module.summary("2-way", [(0.5, 0.6), (0.7, 0.8), (0.6, 0.7), (0.8, 1.0)])
    half = 100 * 1.96 * math.sqrt(0.05 / 3) / 2
    assert text.startswith(f"2-way, 4 episodes: 65.0 ± {half:.1f} % real only, 77.5 ± ")
    assert text.endswith(f"with synthetic, paired gain +12.5 ± {1.96 * 5 / 2:.1f}")
    assert module.summary("s", [(0.5, None)] * 2) == "s, 2 episodes: 50.0 ± 0.0 % real only"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_a_config_runs(config, given, bank, monkeypatch, capsys):
    assert config.read_text().startswith("# expected:")
    given |= {"bank": bank.path, "n_way": 2, "n_query": 2, "n_tasks": 2}
    del given["n_shot"]
    args = [f"--{key}={value}" for key, value in given.items()]
    code, out, _ = call(monkeypatch, capsys, "episodes", "--config", config, *args)
    assert code == 0 and "% with synthetic, paired gain" in out


def test_a_checkpoint_of_ours_gives_features(tmp_path):
    classifier = pytest.importorskip("augment.training.models.classifier")
    model = classifier.Classifier([3, 4], channels=1).eval()
    record = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save(record, tmp_path / "last.ckpt")
    network = feature_network("small_cnn", str(tmp_path / "last.ckpt"), CPU)
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model.network[-1](network(images).float()), model(images))
    with pytest.raises(UserError, match=r"as .*last.ckpt has it, small_cnn, got resnet32"):
        feature_network("resnet32", str(tmp_path / "last.ckpt"), CPU)
