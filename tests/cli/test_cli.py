"""The command: the whole way, and one sentence with exit code 2 for each fault."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import call, paint, snapshot
from PIL import Image
from safetensors.torch import save_file

from augment import LatentBank, __version__
from augment.bank.fill import InvertSettings
from augment.cli import spell, switched
from augment.commands import COMMANDS, invert
from augment.shards.dataset import open_shards
from augment.sources.fashion import write_fashion

COUNTS = {"Bag": 2, "Coat": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return paint(tmp_path_factory.mktemp("cli"), COUNTS, size=28)


@pytest.fixture(scope="module")
def tiny_bank(images, tmp_path_factory):
    bank = tmp_path_factory.mktemp("cli") / "bank"
    invert(InvertSettings(images=str(images), bank=str(bank), steps=2))
    return bank


def test_invert_then_synthesize(monkeypatch, capsys, images, tmp_path):
    bank, out = tmp_path / "bank", tmp_path / "out"
    monkeypatch.setenv("LATENT_AUGMENT_PROGRESS", "0.01")  # as where there is no terminal
    code, output, err = call(
        monkeypatch, capsys, "invert", "--images", images, "--backbone", "tiny", "--bank", bank,
        "--steps", 2, "--prompts", "{Bag: bag}",
    )  # fmt: skip
    assert re.search(r"^invert: 0 of 3 images, \d s; invert by ForwardStart: \d of 3", err, re.M)
    lines = output.splitlines()
    assert code == 0 and lines[0] == f"{bank}: 3 latents of 2 classes"
    assert lines[1].startswith("Images. Images are enlarged 1.1-fold (median of the shorter sides ")
    assert lines[2] == "" and lines[3].startswith("class ")
    assert "channel means" in output and "\nNorm. Latents are" in output
    assert LatentBank.open(bank).prompt("Bag") == "bag"
    command = ("synthesize", "--bank", bank, "--out", out, "--per-class", 3, "--rule", "fix/chm",
               "--alpha", 0.5, "--seed", 7, "--steps", 2)  # fmt: skip
    code, output, err = call(monkeypatch, capsys, *command)
    assert re.search(r"^synthesize fix/chm: 0 of 6 images", err, re.MULTILINE)
    shards = open_shards(out)
    weights = [shards.plan(index).weights for index in range(6)]
    count = sum(1 / sum(w * w for w in row) for row in weights) / 6
    assert 1 < count < 1.5
    tail = f"each mixes {count:.1f} of 1.5 members on average (effective count)\n"
    words = f"{out}: 6 of 6 images of 2 classes in 1 shard; {tail}"
    words += f"next: latent-augment train fit --data.train {images} --data.test TEST_IMAGES "
    words += f"--data.channels 1 --data.synthetic {out} --trainer.max-epochs 20\n"
    assert (code, output) == (0, words)
    assert call(monkeypatch, capsys, *command)[:2] == (0, words)
    code, output, _ = call(monkeypatch, capsys, "export", "--shards", out, "--out", tmp_path / "f")
    assert (code, output) == (0, f"{tmp_path / 'f'}: written\n")
    assert len(list((tmp_path / "f").glob("*/*.jpg"))) == 6
    for path, words in ((bank, "3 of 3 latents of 2 classes"), (out, "6 of 6 images of 2 classes")):
        assert words in call(monkeypatch, capsys, "inspect", "--path", path)[1]
        code, output, _ = call(monkeypatch, capsys, "verify", "--path", path)
        assert (code, output) == (0, f"{path}: every file is as it was written\n")


def test_synthesize_fills_the_tail(monkeypatch, capsys, tmp_path):
    counts, bank = {"Bag": 5, "Coat": 2, "Dress": 1}, tmp_path / "bank"
    images = paint(tmp_path / "images", counts, size=32)
    assert (
        call(monkeypatch, capsys, "invert", "--images", images, "--bank", bank, "--steps", 1)[0]
        == 0
    )
    command = ("synthesize", "--bank", bank, "--steps", 1, "--out")
    for out, budget, wanted in (
        ("filled", ("--fill-to", 4), [1, 1, 2, 2, 2]),
        ("tail", ("--per-class", 2, "--tail-only", 2), [2, 2]),
    ):
        assert call(monkeypatch, capsys, *command, tmp_path / out, *budget)[0] == 0
        assert sorted(open_shards(tmp_path / out).targets) == sorted(wanted)
    code, _, output = call(monkeypatch, capsys, *command, tmp_path / "none", "--fill-to", 1)
    assert code == 2 and "a class that lacks images" in output


def test_dry_runs_do_one_unit_and_estimate_the_rest(monkeypatch, capsys, images, tmp_path):
    bank, out = tmp_path / "bank", tmp_path / "out"
    command = ("invert", "--images", images, "--bank", bank, "--steps", 1, "--backbone", "tiny")
    code, output, _ = call(monkeypatch, capsys, *command, "--dry-run")
    assert code == 0 and output.startswith(
        "1 units, 3 images; 1 units, 3 images to do\nunit 0 is made"
    )
    assert call(monkeypatch, capsys, *command)[0] == 0
    command = ("synthesize", "--bank", bank, "--out", out, "--per-class", 4, "--shard-size", 2)
    code, output, _ = call(monkeypatch, capsys, *command, "--dry-run")
    assert code == 0 and "4 units, 8 images to do\n" in output and "the other 6 images" in output
    assert sorted(p.name for p in out.iterdir()) == [
        "shard-000000.json", "shard-000000.tar", "synthesis.json"
    ]  # fmt: skip
    assert call(monkeypatch, capsys, *command)[0] == 0
    code, output, _ = call(monkeypatch, capsys, *command, "--dry-run")
    assert (code, output) == (0, "4 units, 8 images; 0 units, 0 images to do\n")


def test_a_job_without_an_image_to_make_or_left_is_an_error(
    monkeypatch, capsys, tiny_bank, tmp_path
):
    command = ("synthesize", "--bank", tiny_bank, "--steps", 1, "--out", tmp_path / "out")
    for options in (("--fill-to", 1), ("--tail-only", 1), ("--per-class", 0)):
        code, _, output = call(monkeypatch, capsys, *command, *options)
        assert (
            code == 2 and "expected a class that lacks images" in output and output.count("\n") == 1
        )
    assert not (tmp_path / "out").exists()
    none = ("--per-class", 2, "--filters", "{degenerate: {minimum: 1000}}")
    code, _, output = call(monkeypatch, capsys, *command, *none)
    assert code == 2 and "got none: filters refused" in output


def test_a_lost_file_of_settings_is_repaired(monkeypatch, capsys, tiny_bank, tmp_path):
    out = tmp_path / "out"
    command = ("synthesize", "--bank", tiny_bank, "--steps", 1, "--out", out, "--per-class", 2)
    assert call(monkeypatch, capsys, *command)[0] == 0
    before = snapshot(out)
    (out / "synthesis.json").unlink()
    for look in ("verify", "inspect"):
        code, _, output = call(monkeypatch, capsys, look, out)
        assert code == 2 and "synthesis.json" in output and "--repair" in output
    code, output, _ = call(monkeypatch, capsys, "verify", out, "--repair")
    assert code == 0 and "made again from the records of the shards" in output
    assert snapshot(out) == before


def test_damage_is_found_taken_out_and_made_again(monkeypatch, capsys, images, tmp_path):
    bank, out = tmp_path / "bank", tmp_path / "out"
    invert = ("invert", "--images", images, "--bank", bank, "--steps", 1)
    synthesize = ("synthesize", "--bank", bank, "--out", out, "--per-class", 4, "--shard-size", 2)
    for command, path, file in (
        (invert, bank, bank / "0000" / "chunk-0000.safetensors"),
        (synthesize, out, out / "shard-000002.tar"),
    ):
        assert call(monkeypatch, capsys, *command)[0] == 0
        before = snapshot(path)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        code, output, complaint = call(monkeypatch, capsys, "verify", "--path", path)
        assert code == 2 and file.name in output and "--discard" in complaint
        assert call(monkeypatch, capsys, "verify", "--path", path, "--discard")[0] == 2
        assert call(monkeypatch, capsys, *command)[0] == 0
        assert snapshot(path) == before
        assert call(monkeypatch, capsys, "verify", "--path", path)[0] == 0


def test_places_that_would_mix_things_up_are_refused(
    monkeypatch, capsys, images, tiny_bank, tmp_path
):
    shards = tmp_path / "shards"
    make = ("synthesize", "--bank", tiny_bank, "--out", shards, "--per-class", 1)
    assert call(monkeypatch, capsys, *make)[0] == 0
    invert = ("invert", "--images", images, "--steps", 1, "--bank")
    for command, words in (
        ((*invert, images / "bank"), "beside the images"),
        ((*invert, shards), "in use"),
        (("export", "--shards", shards, "--out", shards / "x"), "beside"),
        (("verify", "--path", tiny_bank, "--images", tmp_path / "no"), "check the path"),
        (("split", "--bank", tiny_bank, "--classes", "", "--out", tmp_path / "no"), "class"),
        ((*invert, tmp_path / "no", "--max-rejects", 2), "max_rejects"),
    ):
        code, _, output = call(monkeypatch, capsys, *command)
        assert code == 2 and words in output and output.count("\n") == 1, output
    assert sorted(p.name for p in shards.iterdir())[-1] == "synthesis.json"
    assert call(monkeypatch, capsys, "verify", "--path", shards, "--discard", "false")[0] == 0


def test_banks_are_taken_apart_and_put_together(monkeypatch, capsys, images, tiny_bank, tmp_path):
    whole = LatentBank.open(tiny_bank)
    for name in whole.classes:
        code, output, _ = call(
            monkeypatch, capsys, "split", "--bank", tiny_bank, "--classes", name, "--out",
            tmp_path / name,
        )  # fmt: skip
        assert code == 0 and "of 1 classes" in output
    parts = ",".join(str(tmp_path / name) for name in reversed(whole.classes))
    out = tmp_path / "out"
    assert call(monkeypatch, capsys, "merge", "--banks", parts, "--out", out)[0] == 0
    merged = LatentBank.open(out)
    assert merged.classes == whole.classes[::-1]
    for name in whole.classes:
        assert merged.members[name] == whole.members[name]
        assert torch.equal(merged.latents(name), whole.latents(name))
    assert call(monkeypatch, capsys, "verify", "--path", out)[0] == 0
    code, _, output = call(
        monkeypatch, capsys, "merge", "--banks", f"{parts},{tiny_bank}", "--out", tmp_path / "no"
    )
    assert code == 2 and "in both" in output and not (tmp_path / "no").exists()


def test_inversion_prompts_and_profiles(monkeypatch, capsys, tmp_path):
    images = paint(tmp_path / "images", {"bag": 2, "001.top": 1}, size=28)
    bank = tmp_path / "bank"
    code, _, output = call(
        monkeypatch, capsys, "invert", "--images", images, "--bank", bank, "--prompt", "{name}",
        "--inversion", "fixed_point", "--steps", 3, "--inversion-options", "{iterations: 3}",
        "--dtype", "float32",
    )  # fmt: skip
    assert (code, output) == (0, "")
    opened = LatentBank.open(bank)
    assert [opened.prompt(name) for name in opened.classes] == ["top", "bag"]
    assert opened.inversion == {
        "method": "fixed_point", "solver": "ddim", "guidance": 1.0, "steps": 3, "iterations": 3,
        "average": 1,
    }  # fmt: skip
    for profile, kept in (
        (["--solver", "exact"], {"solver": "ddim", "steps": 3, "guidance": 1.0}),
        (["--solver", "fast", "--guidance", 2, "--interval", "[0.2, 0.8]"],
         {"solver": "fireflow", "steps": 10, "guidance": 2.0, "interval": [0.2, 0.8]}),
        (["--solver", "midpoint", "--steps", 2, "--prompt", "bag{name:.0}"], None),
    ):  # fmt: skip
        out = tmp_path / str(profile[1])
        code, _, output = call(monkeypatch, capsys, "synthesize", "--bank", bank, "--out", out,
                             "--per-class", 1, *profile)  # fmt: skip
        if kept is None:
            assert code == 2 and "{name}" in output
            continue
        assert (code, output) == (0, "")
        settings = json.loads((out / "synthesis.json").read_text())
        assert kept.items() <= settings.items()


def test_small_images_are_warned_of_in_one_line(monkeypatch, capsys, tmp_path):
    images = paint(tmp_path / "images", {"Bag": 2}, size=8)
    (images / "Bag" / "1.png").write_bytes(
        (paint(tmp_path / "b", {"Bag": 2}, 28) / "Bag" / "1.png").read_bytes()
    )
    done = subprocess.run(
        [sys.executable, "-m", "augment.cli", "invert", "--images", images, "--bank",
         tmp_path / "bank", "--steps", "1"], capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("latent-augment: warning:")]
    assert "1 of 2" in line and "Bag/0.png: 8" in line


def test_synthesize_from_neighbours_with_an_alpha_for_each(monkeypatch, capsys, tmp_path):
    images, bank, out = (tmp_path / name for name in ("images", "bank", "out"))
    paint(images, {"Bag": 3, "Coat": 2}, size=28)
    assert (
        call(monkeypatch, capsys, "invert", "--images", images, "--bank", bank, "--steps", 1)[0]
        == 0
    )
    ids = [image for members in LatentBank.open(bank).members.values() for image in members]
    vectors = {image: torch.tensor([float(place)]) for place, image in enumerate(ids)}
    save_file(vectors, tmp_path / "vectors.safetensors")
    command = ("synthesize", "--bank", bank, "--out", out, "--per-class", 4, "--steps", 1,
               "--members", 2, "--alpha", "1e6,0")  # fmt: skip
    code, output, _ = call(
        monkeypatch, capsys, *command, "--nearest", tmp_path / "vectors.safetensors"
    )
    assert code == 0
    assert "each mixes 1.0 of 2 members on average (effective count)\n" in output
    shards = open_shards(out)
    plans = [shards.plan(index) for index in range(len(shards))]
    assert all(plan.weights == (1.0, 0.0) for plan in plans)
    gaps = {abs(ids.index(plan.members[0]) - ids.index(plan.members[1])) for plan in plans}
    assert gaps == {1}
    for other in ([], ["--nearest", "latent"]):
        code, _, output = call(monkeypatch, capsys, *command, *other)
        assert code == 2
        assert "new folder" in output


def corrupt(root):
    (paint(root, COUNTS) / "Bag" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    return root


def truncated(root):
    path = paint(root, COUNTS, size=64) / "Bag" / "1.png"
    path.write_bytes(path.read_bytes()[:-200])
    return root


def emptied(root):
    (paint(root, COUNTS) / "Dress").mkdir()
    return root


def bare(root):
    root.mkdir()
    return root


SOURCES = {
    "a corrupt image": (corrupt, "1.png"),
    "a truncated image": (truncated, "1.png"),
    "an empty class folder": (emptied, "Dress"),
    "no class folder": (bare, "class folders"),
    "no folder": (lambda root: root, "not there"),
}


@pytest.mark.parametrize("fault", SOURCES)
def test_bad_images_are_one_sentence_and_nothing_is_written(monkeypatch, capsys, tmp_path, fault):
    make, word = SOURCES[fault]
    root, bank = make(tmp_path / "images"), tmp_path / "bank"
    args = "invert", "--images", root, "--bank", bank, "--max-rejects", 0
    code, _, output = call(monkeypatch, capsys, *args)
    assert code == 2
    assert output.count("\n") == 1
    assert output.startswith("latent-augment: expected")
    assert word in output
    assert not list(bank.glob("*/*"))


OPTIONS = {
    "an unknown backbone": (["invert", "--backbone", "sd42"], "tiny"),
    "an unknown inversion": (["invert", "--inversion", "edict"], "ddim"),
    "an unknown setting": (["invert", "--inversion-options", "{iterations: 3}"], "start"),
    "a template without a name": (["invert", "--prompt", "a photo"], "{name}"),
    "a prompt that tiny does not know": (["invert", "--prompt", "a {name}"], "trousers"),
    "a setting of another type": (["invert", "--inversion-options", "{start: a}"], "float"),
    "a setting with a place of its own": (["invert", "--inversion-options", "{steps: 3}"], "steps"),
    "an option with a place of its own": (
        ["invert", "--backbone-options", "{device: cpu}"],
        "device",
    ),
    "too many steps": (["synthesize", "--steps", "1001"], "at most 1000"),
    "a prompt that cannot be sampled": (["synthesize", "--prompt", "a {name}"], "trousers"),
    "an unknown dtype": (["invert", "--dtype", "int8"], "bfloat16"),
    "an option that tiny has not": (["invert", "--backbone-options", "{tiny_vae: a}"], "lora"),
    "null-text of nothing": (["invert", "--inversion", "null_text"], "prompt"),
    "an unknown prompt": (["invert", "--prompts", "{Bag: dog}"], "trousers"),
    "no steps": (["invert", "--steps", "0"], "solver step"),
    "a bank that is not there": (["synthesize", "--bank", "nowhere"], "nowhere"),
    "an unknown rule": (["synthesize", "--rule", "fixx/0"], "fade"),
    "an unknown solver": (["synthesize", "--solver", "heun"], "ddim"),
    "an interval upside down": (["synthesize", "--interval", "[0.8, 0.2]"], "interval"),
    "no images a class": (
        ["synthesize", "--per-class", "0"],
        "choose a larger --fill-to, --tail-only or --per-class",
    ),
    "an unknown filter": (["synthesize", "--filters", "{hat: {}}"], "degenerate"),
    "an unknown setting of a filter": (["synthesize", "--filters", "{duplicate: {hat: 1}}"], "hat"),
    "an unknown format": (["synthesize", "--extension", "gif"], "webp"),
    "an unknown executor": (["synthesize", "--executor", "dask"], "ray"),
    "a bank of another backbone": (["synthesize", "--backbone", "OTHER"], "weights"),
}


@pytest.mark.parametrize("fault", OPTIONS)
def test_a_bad_option_is_one_sentence_and_nothing_is_written(
    monkeypatch, capsys, tmp_path, images, tiny_bank, fault
):
    options, word = OPTIONS[fault]
    if "OTHER" in options:
        options = [*options[:-1], str(other_weights(tmp_path))]
    out = tmp_path / "out"
    usual = {"invert": ["--images", images, "--bank", out],
             "synthesize": ["--bank", tiny_bank, "--out", out]}[options[0]]  # fmt: skip
    code, _, output = call(monkeypatch, capsys, options[0], *usual, *options[1:])
    assert code == 2
    assert output.count("\n") == 1
    assert output.startswith("latent-augment: expected")
    assert word in output
    assert not out.exists()


def other_weights(folder):
    """Tiny's weights with one bit of one number changed: another backbone."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from augment.diffusion.backbones.tiny import WEIGHTS

    with safe_open(WEIGHTS, framework="pt") as file:
        state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    state["conv_out.bias"] += 0.5
    save_file(state, folder / "other.safetensors", metadata)
    return folder / "other.safetensors"


def test_a_bank_of_other_settings_is_left_alone(monkeypatch, capsys, images, tiny_bank):
    before = snapshot(tiny_bank)
    code, _, output = call(
        monkeypatch, capsys, "invert", "--images", images, "--bank", tiny_bank, "--steps", 3
    )
    assert code == 2
    assert "steps" in output
    assert snapshot(tiny_bank) == before


WRONG = {
    "nope": "expected a command, invert",
    "invert --imagse x": "unrecognized arguments: --imagse",
    "synthesize": "required: bank",
    "invert x --bank b --steps ten": "expected an integer for --steps, got ten; see --help",
    "synthesize b --out o --per_class many": "expected an integer for --per-class, got many; see",
    "synthesize b --out o --noise much": "expected a number for --noise, got much; see --help",
    "train": "but it was not provided; see --help",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_is_one_sentence(monkeypatch, capsys, line):
    code, _, output = call(monkeypatch, capsys, *line.split())
    assert code == 2 and output.count("\n") == 1 and WRONG[line] in output


def test_the_bare_command_is_the_overview_and_tells_its_version(monkeypatch, capsys):
    code, shown, _ = call(monkeypatch, capsys)
    assert code == 0 and all(name in shown for name in COMMANDS)
    assert call(monkeypatch, capsys, "--version")[1] == f"latent-augment {__version__}\n"


def test_options_may_be_spelled_either_way(monkeypatch, capsys):
    """Also those of Lightning; help shows dashes, and no name of a class is changed."""
    assert spell(["--per-class=a-b", "--per_class", "fade/chm-x"]) == [
        "--per_class=a-b", "--per_class", "fade/chm-x"
    ]  # fmt: skip
    assert spell(["--prompts.T-shirt", "--words.a-b=c-d"]) == [
        "--prompts.T-shirt",
        "--words.a-b=c-d",
    ]
    for either in ("--trainer.max-steps", "--trainer.max_steps"):
        shown = call(monkeypatch, capsys, "train", "fit", either, 17, "--print-config")[1]
        assert "\n  max_steps: 17\n" in shown


@pytest.mark.parametrize("command", [*COMMANDS, "train fit", "train test"])
def test_help_spells_options_with_dashes(monkeypatch, capsys, command):
    code, shown, _ = call(monkeypatch, capsys, *command.split(), "--help")
    options = re.findall(r"--\w[\w.-]*", shown)
    assert code == 0 and options and not [option for option in options if "_" in option]
    source = call(monkeypatch, capsys, "invert", "--images.help", "FewShot")[1]
    assert "--images.keep-order" not in source and "--images.shots" in source


def test_a_switch_needs_no_value_but_may_have_one():
    assert switched(["--dry_run", "--seed", "1"], ["dry_run"]) == ["--dry_run=true", "--seed", "1"]
    for given in (["--dry_run", "false"], ["--dry_run=false"]):
        assert switched(given, ["dry_run"]) == given


def test_the_installed_command_lists_its_commands():
    script = Path(sys.executable).with_name("latent-augment")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in COMMANDS)


def test_a_rule_that_enlarges_the_bias_is_warned_of_in_one_line(tmp_path):
    """As a user sees it: real images, a biased bank, and a rule without a mean split."""
    write_fashion(tmp_path / "all", "shots", list(range(16)))
    (tmp_path / "images").mkdir()
    (tmp_path / "all" / "Sandal").rename(tmp_path / "images" / "Sandal")
    bank, command = tmp_path / "bank", [sys.executable, "-m", "augment.cli"]
    invert = ["invert", "--images", tmp_path / "images", "--bank", bank, "--steps", "10"]
    done = subprocess.run([*command, *invert], capture_output=True, text=True, check=True)
    assert "class Sandal, whose channel means are largest" in done.stdout
    assert "Take a rule with /chm" in done.stdout
    for rule, lines in (("fix/0", 1), ("fix/chm", 0)):
        synthesize = ["synthesize", "--bank", bank, "--out", tmp_path / rule, "--per-class", "4",
                      "--alpha", "inf", "--rule", rule, "--steps", "2"]  # fmt: skip
        done = subprocess.run([*command, *synthesize], capture_output=True, text=True, check=True)
        known = "latent-augment: warning: class 'Sandal': fix/0 makes the channel means"
        assert sum(x.startswith(known) for x in done.stderr.splitlines()) == lines, done.stderr
        assert "Traceback" not in done.stderr and "UserWarning" not in done.stderr


def test_the_embedded_backbone_is_chosen_by_the_images(monkeypatch, capsys, tmp_path):
    grey = paint(tmp_path / "grey", {"a": 2}, size=32)
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), colour).save(tmp_path / "photos" / name / "0.png")
    for images, backbone in ((grey, "tiny"), (tmp_path / "photos", "tiny-cifar")):
        bank = tmp_path / f"bank-{images.name}"
        options = ("--bank", bank, "--steps", 1, "--errors", "false")
        code, output, _ = call(monkeypatch, capsys, "invert", images, *options)
        assert code == 0 and f"backbone: {backbone}, which is embedded" in output
        assert LatentBank.open(bank).recipe == {"name_or_path": backbone}
    (tmp_path / "photos" / "b").rename(grey / "b")
    bank = tmp_path / "bank-grey"
    code, output, _ = call(
        monkeypatch, capsys, "invert", grey, "--bank", bank, "--steps", 1, "--errors", "false"
    )
    assert code == 0 and "backbone: tiny," in output, "a bank that was begun keeps its backbone"
    assert LatentBank.open(bank).classes == ["a", "b"]
