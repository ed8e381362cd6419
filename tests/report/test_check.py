"""`latent-augment check`: healthy models are as expected, and the fault of sick ones is named."""

import json
import shutil
from pathlib import Path

import checkpoints
import pytest
from checkpoints import LANDSCAPE, RESOLUTION, UNET, learned
from conftest import call
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from augment.report.check import CheckSettings, run_check

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline that knows the three landscapes by heart."""
    return learned(tmp_path_factory.mktemp("model"))


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def judged(record):
    """Return the reasons of what is not as expected, by topic."""
    return {line["topic"]: line["reason"] for line in record["lines"] if line["expected"] is False}


def test_tiny_is_as_expected(tmp_path, monkeypatch, capsys):
    out = tmp_path / "sheet.png"
    words = ("--json", "check", "--device", "cpu", "--batch-size", 2, "--out", out)
    code, text, _ = call(monkeypatch, capsys, *words)
    record = json.loads(text)
    assert code == 0 and record["as_expected"] and judged(record) == {}
    topics = [line["topic"] for line in record["lines"]]
    assert topics[:5] == ["machine", "model", "codec", "scale", "network"]
    assert {"forward_start", "fireflow", "centroids", "invert", "sample", "memory"} < {*topics}
    assert "torch" in record["lines"][0]["values"]["versions"]
    with Image.open(out) as page:
        assert page.width > 3 * 64


def test_a_pipeline_of_diffusers_is_as_expected(model):
    lines = []
    settings = CheckSettings(backbone=str(model), device="cpu", steps=8, batch_size=2)
    record = run_check(settings, lines.append)
    assert judged(record) == {}
    json.dumps(record, allow_nan=False)
    found = {line.topic: line for line in lines}
    assert LANDSCAPE in found["model"].text and "null_text" in found
    assert found["diffusers"].values["psnr"] > 60


def nine(folder):
    UNet2DConditionModel(**{**UNET, "in_channels": 9}).save_pretrained(folder / "unet")


def scaled(folder):
    path = folder / "vae" / "config.json"
    change(path, scaling_factor=5 * json.loads(path.read_text())["scaling_factor"])


def declared(folder):
    change(folder / "scheduler" / "scheduler_config.json", prediction_type="epsilon")


def loud(folder):
    path = folder / "unet" / WEIGHTS
    weights = load_file(path)
    weights["conv_in.weight"] *= 2.0**20
    save_file(weights, path, {"format": "pt"})


def distilled(folder):
    return folder.rename(folder.with_name("sd-turbo"))


def untrained(folder):
    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")


class Found(Exception):
    """The first line that is not as expected."""


SICK = {
    "a UNet of 9 channels": (nine, "model", "expected a network of 4 channels"),
    "a wrong scale": (scaled, "scale", "look at scaling_factor"),
    "v declared as ε": (declared, "network", "its output fits the prediction v"),
    "overflow": (loud, "network", "the network overflows in float16"),
    "few steps": (distilled, "warning", "a few-step one by the name"),
    "untrained": (untrained, "network", "its weights are untrained"),
}


@pytest.mark.parametrize("name", SICK)
def test_the_fault_of_a_sick_model_is_named(name, model, tmp_path):
    spoil, topic, words = SICK[name]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    folder = spoil(folder) or folder
    settings = CheckSettings(
        backbone=str(folder), device="cpu", steps=2, dtype="float16" if spoil is loud else None
    )

    def tell(line):
        if line.expected is False:
            raise Found(line)  # the rest would only take time

    with pytest.raises(Found) as found:
        run_check(settings, tell)
    (line,) = found.value.args
    assert line.topic == topic and words in line.reason


@pytest.mark.slow
@pytest.mark.parametrize("family", checkpoints.FAMILIES)
def test_every_stage_measures_every_family_and_names_untrained_networks(family, tmp_path):
    folder = getattr(checkpoints, family)(tmp_path / "model")
    options = {"resolution": RESOLUTION} if family in ("flux", "flux2", "z_image") else {}
    lines = []
    run_check(
        CheckSettings(
            backbone=str(folder), device="cpu", steps=2, batch_size=1, backbone_options=options
        ),
        lines.append,
    )
    found = {line.topic: line for line in lines}
    assert "not measured" not in [line.text for line in lines]
    assert {"codec", "scale", "forward_start", "centroids", "invert", "sample"} < found.keys()
    assert "its weights are untrained" in found["network"].reason
    if family in ("flux", "sd3", "sdxl", "stable_diffusion", "z_image"):
        assert found["diffusers"].values["psnr"] > 60


def test_what_is_not_as_expected_ends_with_2(model, tmp_path, monkeypatch, capsys):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    nine(folder)
    words = "check", "--backbone", folder, "--device", "cpu"
    code, text, error = call(monkeypatch, capsys, *words)
    assert code == 2 and "not as expected  model:" in text
    assert error.endswith("and docs/backbones.md what to look at\n")
    code, text, again = call(monkeypatch, capsys, "--json", *words)
    assert code == 2 and again == error and [*judged(json.loads(text))] == ["model", "verdict"]
    code, _, error = call(monkeypatch, capsys, "check", "--images", tmp_path / "none")
    assert code == 2 and error.count("\n") == 1
