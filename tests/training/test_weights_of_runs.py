"""What belongs to weights lies in their checkpoint, and all that uses them takes it from there."""

import csv
import json
import re
import shutil
from importlib.util import find_spec

import pytest
import timm
import timm.models._builder as builder
import torch
from conftest import call, paint
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from augment import UserError
from augment.core.errors import AugmentWarning
from augment.networks import feature_network, timm_network, usual_form
from augment.sources.decoding import open_image
from augment.synthesis.filters import make_filter
from augment.synthesis.filters.reference import Reference
from augment.training.data.module import ImageData
from augment.training.demo import demo_trainer
from augment.training.models.classifier import Classifier
from augment.training.models.networks import build_network

CPU = torch.device("cpu")
QUICK = (
    *("--data.batch_size", 4, "--data.steps_per_epoch", 2, "--trainer.accelerator", "cpu"),
    *("--trainer.enable_model_summary", "false"),
)
CLASSES = {"ant": 4, "bee": 3, "cat": 2}
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning")


@pytest.fixture
def pretrained(monkeypatch):
    """Weights of timm without the download."""
    monkeypatch.setattr(builder, "load_pretrained", lambda model, *args, **options: None)


def save(model, path):
    """What Lightning keeps of a model, as far as weights are concerned."""
    record = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(record)
    torch.save(record, path)
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on grey images, its images and others to test on."""
    root = tmp_path_factory.mktemp("run")
    paint(root / "train", CLASSES, size=28)
    paint(root / "test", CLASSES, size=28, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        code = 0
        try:
            code = call(patch, Captured(), "train", *fit(root))[0]
        finally:
            assert code == 0
    return root


class Captured:
    """What `call` reads, where there is no capture of a test."""

    def readouterr(self):
        return "", ""


def fit(root, *more):
    data = ("--data.train", root / "train", "--data.test", root / "test", "--data.channels", 1)
    out = ("--trainer.max_steps", 4, "--trainer.default_root_dir", root / "run")
    return ("fit", *data, *QUICK, *out, *more)


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_mean_and_deviation_follow_the_weights(pretrained, tmp_path):
    first = Classifier([4] * 3, network="resnet18", pretrained=True).eval()
    assert first.mean == pytest.approx(IMAGENET_DEFAULT_MEAN)
    assert first.std == pytest.approx(IMAGENET_DEFAULT_STD)
    assert Classifier([4] * 3).mean == (0.5,) * 3 and Classifier([4] * 3).std == (0.25,) * 3
    path = save(first, tmp_path / "first.ckpt")
    stored = torch.load(path, weights_only=True)["hyper_parameters"]
    assert stored["mean"] == list(first.mean) and stored["std"] == list(first.std)
    for second in (
        Classifier([4] * 3, start=path, tune="scale"),
        Classifier([4] * 2, start=path, tune="head"),
        Classifier.load_from_checkpoint(path),
    ):
        assert torch.equal(second.mean_std, first.mean_std)
        assert second.hparams.network == "resnet18"
    state = {key: value.contiguous() for key, value in first.state_dict().items()}
    save_file(state, tmp_path / "own.safetensors")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = first(images).double()
    for weights in (str(tmp_path / "own.safetensors"), path):
        seen = timm_network("resnet18", weights, 3, CPU)(images)
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)


def test_grey_images_get_the_mean_over_the_colours(pretrained):
    model = Classifier([4] * 3, network="resnet18", channels=1, pretrained=True)
    assert model.mean == pytest.approx([sum(IMAGENET_DEFAULT_MEAN) / 3])
    assert model.eval()(torch.rand(2, 1, 32, 32)).shape == (2, 3)


def test_a_checkpoint_is_rebuilt_without_the_hub(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "load_pretrained", lambda model, *args, **options: None)
        model = Classifier([4] * 3, network="resnet18", pretrained=True, channels=1)
        path = save(model, tmp_path / "last.ckpt")

    def refuse(*args, **options):
        raise AssertionError("asked for weights again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "load_pretrained", refuse)
        loaded = Classifier.load_from_checkpoint(path)
        again = Classifier.load_from_checkpoint(save(loaded, tmp_path / "again.ckpt"))
    assert loaded.hparams.channels == 1 and torch.equal(again.mean_std, model.mean_std)
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )


def test_an_old_checkpoint_is_read_by_the_rule_of_its_time(pretrained, tmp_path):
    model = Classifier([4] * 3, network="resnet18", pretrained=True)
    known = {"counts": [4] * 3, "network": "resnet18", "channels": 3, "pretrained": True}
    state = {k: v for k, v in model.state_dict().items() if k != "mean_std"}
    for begun, mean in ((True, IMAGENET_DEFAULT_MEAN), (False, (0.5,) * 3)):
        record = {"state_dict": state, "hyper_parameters": {**known, "pretrained": begun}}
        torch.save(record, tmp_path / "old.ckpt")
        path = str(tmp_path / "old.ckpt")
        assert Classifier.load_from_checkpoint(path).mean == pytest.approx(mean)
        assert Classifier([4] * 3, start=path).mean == pytest.approx(mean)


def test_a_test_takes_all_from_the_checkpoint(run, monkeypatch, capsys):
    known = torch.load(run / "run/checkpoints/last.ckpt", weights_only=True)["hyper_parameters"]
    assert (known["network"], known["channels"], known["resolution"]) == ("small_cnn", 1, 32)
    assert known["class_names"] == list(CLASSES) and known["counts"] == list(CLASSES.values())
    measured = json.loads((run / "run/test.json").read_text())
    where = ("--trainer.default_root_dir", run / "run", "--trainer.accelerator", "cpu")
    code, _, _ = call(monkeypatch, capsys, "train", "test", "--data.test", run / "test", *where)
    assert code == 0
    assert json.loads((run / "run/test/test.json").read_text()) == measured
    images = ("--data.train", run / "train", "--data.test", run / "test")
    for wrong, words in (
        (("--model.network", "resnet32"), "small_cnn, got resnet32"),
        (("--data.channels", 3), "1, got 3"),
        (("--data.resolution", 64), "32, got 64"),
        (("--model.loss", "ldam"), "loss cross_entropy, .*got ldam"),
        (("--ckpt_path", run / "none.ckpt"), "got none at .*none.ckpt"),
    ):
        code, _, err = call(monkeypatch, capsys, "train", "test", *images, *where, *wrong)
        assert code == 2 and err.startswith("latent-augment: expected ")
        assert re.search(words, err), err


def test_a_training_ends_with_its_accuracy_and_what_to_do_next(run, tmp_path, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "train", *fit(run))
    accuracy = json.loads((run / "run/test.json").read_text())["test/accuracy"]
    said = out.partition(f"\n{run / 'run'}: ")[2].splitlines()
    assert code == 0 and said[0] == f"test accuracy {100 * accuracy:.1f} %"
    for line in said[1:-1]:
        assert (run / "run" / line.split(": ")[0].strip()).is_file(), line
    places = [line.strip().removeprefix(f"{run / 'run'}/") for line in said[1:-1]]
    assert {place.partition(":")[0] for place in places} == {
        "test.json", "per_class.csv", "confusion.csv", "metrics.csv", "checkpoints/last.ckpt"
    }  # fmt: skip
    assert said[-1].startswith("next: latent-augment train predict --data.predict NEW_IMAGES --tr")
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "NEW_IMAGES", {"any": 1}, size=28)
    assert call(monkeypatch, capsys, *said[-1].split()[2:])[0] == 0

    args = ("fit", "--data.train", run / "train", "--data.channels", 1, *QUICK)
    args += ("--trainer.max-steps", 2, "--trainer.default-root-dir", tmp_path / "out")
    monkeypatch.setenv("LATENT_AUGMENT_PROGRESS", "0.01")  # as where there is no terminal
    code, out, err = call(monkeypatch, capsys, "train", *args)
    assert code == 0 and f"\n{tmp_path / 'out'}: trained for 2 steps, not tested\n" in out
    assert re.search(r"^train: \d of 2 steps, \d+ s", err, re.MULTILINE)
    (tmp_path / "TEST_IMAGES").symlink_to(run / "test")
    code, out, _ = call(monkeypatch, capsys, *out.splitlines()[-1].split()[2:])
    assert code == 0 and "test/accuracy" in out


def test_a_logger_that_is_not_installed_is_one_sentence(run, tmp_path, monkeypatch, capsys):
    loggers = {"comet_ml": "Comet", "mlflow": "MLFlow", "neptune": "Neptune", "wandb": "Wandb"}
    missing = next(name for package, name in loggers.items() if not find_spec(package))
    more = ("--trainer.logger", f"{missing}Logger", "--trainer.default-root-dir", tmp_path / "out")
    code, _, err = call(monkeypatch, capsys, "train", *fit(run, *more))
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err
    assert err.startswith("latent-augment: expected ") and missing.lower() in err.lower()


def test_a_renamed_or_added_class_is_refused_with_its_name(run, monkeypatch, capsys):
    where = ("--trainer.default_root_dir", run / "run", "--trainer.accelerator", "cpu")
    images = ("--data.train", run / "train", "--data.test", run / "test")
    trials = (fit(run), ("test", *images, *where), ("test", *images[2:], *where))

    def rename(old, new):
        for part in ("train", "test"):
            (run / part / old).rename(run / part / new)

    rename("ant", "zebra")
    for args in trials:
        code, _, err = call(monkeypatch, capsys, "train", *args)
        assert code == 2 and "zebra new, ant missing" in err and "Traceback" not in err
    rename("zebra", "ant")
    for part in ("train", "test"):
        paint(run / part, {"dog": 2}, size=28)
    for args in trials:
        code, _, err = call(monkeypatch, capsys, "train", *args)
        assert code == 2 and "dog new" in err
    for part in ("train", "test"):
        shutil.rmtree(run / part / "dog")


def test_an_old_checkpoint_is_asked_for_its_resolution(copied, monkeypatch, capsys):
    path = copied / "run/checkpoints/last.ckpt"
    record = torch.load(path, weights_only=True)
    del record["hyper_parameters"]["resolution"], record["state_dict"]["mean_std"]
    torch.save(record, path)
    test = ("test", "--data.test", copied / "test", "--trainer.default_root_dir", copied / "run")
    code, _, err = call(monkeypatch, capsys, "train", *test)
    assert code == 2 and "give --data.resolution" in err
    code, _, _ = call(monkeypatch, capsys, "train", *test, "--data.resolution", 32)
    measured = json.loads((copied / "run/test.json").read_text())
    assert code == 0 and json.loads((copied / "run/test/test.json").read_text()) == measured


def test_predict_labels_a_folder_of_files(run, tmp_path, monkeypatch, capsys):
    new = tmp_path / "new"
    paint(new, {"deeper": 2}, size=28, seed=5)
    paint(tmp_path, {"new": 1}, size=28, seed=6)
    last = run / "run/checkpoints/last.ckpt"
    args = ("--ckpt_path", last, "--trainer.default_root_dir", tmp_path / "out")
    code, out, _ = call(
        monkeypatch, capsys, "train", "predict", "--data.predict", new, *args,
        "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert code == 0 and "3 images" in out
    text = (tmp_path / "out/predict/predictions.csv").read_text()
    rows = list(csv.reader(text.splitlines()))
    assert rows[0] == ["file", "label", *CLASSES]
    assert [row[0] for row in rows[1:]] == ["0.png", "deeper/0.png", "deeper/1.png"]
    model, data = Classifier.load_from_checkpoint(last).eval(), ImageData(channels=1)
    for file, label, *shares in rows[1:]:
        image = data.evaluation(open_image((new / file).read_bytes()))
        with torch.no_grad():
            expected = model(image[None]).softmax(1)[0]
        torch.testing.assert_close(
            torch.tensor(list(map(float, shares))), expected, atol=1e-5, rtol=0
        )
        assert label == list(CLASSES)[int(expected.argmax())]


def test_best_and_last_are_two_checkpoints(run, tmp_path, monkeypatch, capsys):
    root = tmp_path / "monitored"
    args = [
        *fit(run)[:-1], root, "--trainer.max_steps", -1, "--trainer.max_epochs", 5, "--data.val",
        run / "test", "--checkpoint.monitor", "val/ece", "--model.lr", 0.05,
    ]  # fmt: skip

    def measured(place):
        return json.loads((root / place).read_text())

    def weights(name):
        return torch.load(root / f"checkpoints/{name}.ckpt", weights_only=True)

    assert call(monkeypatch, capsys, "train", *args)[0] == 0
    first, last, best = measured("test.json"), weights("last"), weights("best")
    with (root / "metrics.csv").open() as file:
        values = [float(row["val/ece"]) for row in csv.DictReader(file) if row["val/ece"]]
    assert last["global_step"] == 10
    assert best["global_step"] == 2 * (values.index(min(values)) + 1)
    test = ("test", "--data.test", run / "test", "--trainer.default_root_dir", root)
    assert call(monkeypatch, capsys, "train", *test)[0] == 0
    assert measured("test/test.json") == first
    assert call(monkeypatch, capsys, "train", *args)[0] == 0
    assert measured("test.json") == first and weights("last")["global_step"] == 10
    assert weights("best")["global_step"] == best["global_step"]
    code, _, err = call(monkeypatch, capsys, "train", *args, "--checkpoint.monitor", "val/accuracy")
    assert code == 2 and "val/accuracy" in err
    assert call(monkeypatch, capsys, "train", *test, "--ckpt_path", "last")[0] == 0
    model = Classifier.load_from_checkpoint(root / "checkpoints/last.ckpt")
    data = ImageData(test=str(run / "test"))
    again = demo_trainer(1).test(model, data, verbose=False)[0]
    assert measured("test/test.json")["test/accuracy"] == pytest.approx(again["test/accuracy"])


def test_the_resolution_follows_the_network(tmp_path):
    images = paint(tmp_path / "images", {"ant": 2, "bee": 2}, size=28)
    for network, asked, expected in (("test_vit", None, 160), ("test_vit", 32, 32)):
        data = ImageData(str(images), batch_size=2, steps_per_epoch=1, resolution=asked)
        model = Classifier(data.counts, network=network, resolution=asked)
        demo_trainer(1).fit(model, data)
        assert model.hparams.resolution == expected
        assert next(iter(data.train_dataloader()))[0].shape[-1] == expected
        path = save(model, tmp_path / "vit.ckpt")
        assert Classifier.load_from_checkpoint(path).hparams.resolution == expected
        with pytest.raises(UserError, match=f"a resolution as .*, {expected}, got 48"):
            Classifier(data.counts, start=path, resolution=48)
    data = ImageData(str(images), resolution=64)
    with pytest.raises(UserError, match="a resolution as the classifier has it, 32, got 64"):
        demo_trainer(1).fit(model, data)


def test_one_may_start_with_weights_of_ones_own(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=10)
    state = network.state_dict()
    torch.save(state, tmp_path / "plain.pth")
    folder = tmp_path / "model"
    timm.models.save_for_hf(network, folder, safe_serialization="both")
    (folder / "pytorch_model.bin").unlink()
    local = f"local-dir:{folder}"
    body = [key for key in state if not key.startswith("fc.")]
    for given in (
        {"network": "test_resnet", "start": str(tmp_path / "plain.pth")},
        {"network": local, "pretrained": True},
        {"start": local},
    ):
        model = Classifier([4] * 3, **given)
        own = model.network.state_dict()
        assert all(torch.equal(own[key], state[key]) for key in body), given
        assert model.mean == pytest.approx(network.pretrained_cfg["mean"])
        assert model.hparams.network == "test_resnet"
    path = save(model, tmp_path / "third.ckpt")
    shutil.rmtree(folder)
    again = Classifier.load_from_checkpoint(path)
    assert torch.equal(again.network.state_dict()[body[0]], state[body[0]])
    with pytest.raises(UserError, match=r"^expected to build local-dir:.* with timm, got"):
        build_network(local, 3, 3)
    with pytest.raises(UserError, match=r"^expected weights of the network resnet18 in"):
        Classifier([4] * 3, network="resnet18", start=str(tmp_path / "plain.pth"))
    with pytest.raises(UserError, match=r"as .*third.ckpt has it, test_resnet, got resnet"):
        Classifier([4] * 3, network="resnet18", start=path)


def test_a_head_of_other_classes_is_passed_over(tmp_path):
    names = ["ant", "bee", "cat"]
    path = save(Classifier([4] * 3, names), tmp_path / "three.ckpt")
    kept = torch.load(path, weights_only=True)["state_dict"]

    def head(counts, names, **options):
        model = Classifier(counts, names, start=path, **options)
        assert torch.equal(model.network[0].weight, kept["network.0.weight"])
        return model.network[-1].weight

    assert torch.equal(head([4] * 3, names), kept["network.12.weight"])
    assert head([4] * 2, names[:2]).shape[0] == 2
    with pytest.warns(AugmentWarning, match="cow new, cat missing: its head is passed over"):
        assert not torch.equal(head([4] * 3, ["ant", "bee", "cow"]), kept["network.12.weight"])
    with pytest.raises(UserError, match="another order, bee, ant, cat"):
        head([4] * 3, ["bee", "ant", "cat"], tune="scale")


def test_filters_and_measures_take_a_checkpoint(run):
    path = str(run / "run/checkpoints/last.ckpt")
    model = Classifier.load_from_checkpoint(path).eval()
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images).double()
    torch.testing.assert_close(timm_network("", path, 3, CPU)(images), expected)
    large = torch.nn.functional.interpolate(images, (96, 96)).expand(-1, 3, -1, -1)
    assert (timm_network("", path, 3, CPU)(large) - expected).abs().max() < 0.5
    assert feature_network("", path, CPU)(images).shape == (2, 512)
    assert usual_form("", path) == (1, 32)
    with pytest.raises(UserError, match="small_cnn, got resnet50"):
        feature_network("resnet50", path, CPU)

    def reference(names):
        return Reference(list(names), [""] * 3, lambda label, limit: images, CPU)

    judge = make_filter("classifier", weights=path)
    assert judge.prepare(reference(CLASSES))(images, [0, 1]).shape == (2,)
    with pytest.raises(UserError, match="cow new, cat missing"):
        judge.prepare(reference(["ant", "bee", "cow"]))
    assert make_filter("classifier").model == "resnet50"


@pytest.mark.parametrize("rare", [False, True])
def test_a_test_measures_what_fit_measured(run, tmp_path, monkeypatch, capsys, rare):
    """With averaged weights, and checkpoints that are rarer than the last step."""
    root, config = tmp_path / "averaged", tmp_path / "ema.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n    class_path: EMAWeightAveraging\n    init_args: {decay: 0.7}\n"
    )
    args = ["fit", "--config", config, *fit(run)[1:-1], root, "--model.lr", 0.05]
    args += ["--checkpoint.every_n_train_steps", 3] if rare else []

    def measured(place):
        return json.loads((root / place).read_text())

    assert call(monkeypatch, capsys, "train", *args)[0] == 0
    first = measured("test.json")
    record = torch.load(root / "checkpoints/last.ckpt", weights_only=True)
    assert record["global_step"] == 4
    parts = (record[key]["network.0.weight"] for key in ("state_dict", "current_model_state"))
    assert torch.equal(*parts) == rare
    test = ("test", "--data.test", run / "test", "--trainer.default_root_dir", root)
    assert call(monkeypatch, capsys, "train", *test)[0] == 0
    assert measured("test/test.json") == first
    assert call(monkeypatch, capsys, "train", *args)[0] == 0
    assert measured("test.json") == first


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "ldam"},
        {"auxiliary_norms": True},
        {"tune": "lora", "network": "test_vit", "rank": 2},
        {"tune": "scale"},
    ],
    ids=str,
)
def test_a_checkpoint_of_any_make_is_a_frozen_network(options, tmp_path):
    start = save(Classifier([4] * 3), tmp_path / "start.ckpt")
    first = {"start": start} if options.get("tune") == "scale" else {}
    model = Classifier([4] * 3, **options, **first).eval()
    path, side = save(model, tmp_path / "made.ckpt"), 160 if "network" in options else 32
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images).double() * getattr(model.loss, "scale", 1.0)
    torch.testing.assert_close(timm_network("", path, 3, CPU)(images), expected)
    assert feature_network("", path, CPU)(images).ndim == 2
