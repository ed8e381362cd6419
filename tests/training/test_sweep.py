"""What each run of a sweep is given."""

import json

import pytest

from augment.training import sweep


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Sweep with trainings that do nothing; return the configurations by folder."""

    def child(args, log):
        folder = log.parent
        (folder / "test.json").write_text(json.dumps({"test/accuracy": 0.5}))
        return 0

    monkeypatch.setattr(sweep, "_run_child", child)

    def run(vary, seeds=2, **given):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text("data: {train: photos, seed: 5}\nmodel: {lr: 0.1}\n")
        sweep.sweep(str(recipe), str(tmp_path / "out"), seeds, vary, given)
        return {
            file.parent.name: json.loads(file.read_text())
            for file in sorted((tmp_path / "out").glob("*/given.json"))
        }

    return run


def shots(number):
    return {"class_path": "FewShot", "init_args": {"source": "photos", "shots": number}}


def test_the_seed_of_a_run_reaches_what_is_varied(run):
    found = run({"data.train": [shots(1), shots(5)]})
    drawn = [
        (
            config["data"]["train"]["init_args"]["shots"],
            config["data"]["train"]["init_args"]["seed"],
        )
        for config in found.values()
    ]
    assert sorted(drawn) == [(1, 0), (1, 1), (5, 0), (5, 1)]
    assert {config["data"]["seed"] for config in found.values()} == {0, 1}


def test_a_seed_that_is_varied_stays_as_it_is(run):
    found = run({"data.seed": [7, 8]})
    assert sorted(config["data"]["seed"] for config in found.values()) == [7, 7, 8, 8]
    assert sorted(config["seed_everything"] for config in found.values()) == [0, 0, 1, 1]


def test_values_are_names_of_folders_if_they_are_short(run):
    long = {"class_path": "augment.SyntheticDataset", "init_args": {"bank": "b" * 300}}
    found = run({"model.lr": [0.1], "data.synthetic": [None, long]}, seeds=2)
    assert "lr-0.1_synthetic-None_seed-0" in found and len(found) == 4
    assert max(map(len, found)) < 60
