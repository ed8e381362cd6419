"""The report's contents: what it says is so, what it shows can be made again, and nothing runs."""

import base64
import hashlib
import inspect
import io
import json
import re
import shlex
import sys
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import paint
from PIL import Image

import augment
from augment import LatentBank, Mixing, Planner, Rule, Sampling, Synthesizer, UserError, open_shards
from augment.bank.fill import fill_bank
from augment.cli import main
from augment.commands import report
from augment.core.schema import write
from augment.measure import latent_statistics, predicted_bias
from augment.measure.bias import measured_bias
from augment.measure.health import ClassHealth, findings, from_most_biased
from augment.replay.store import CONTROL, MAGIC
from augment.report import RULES, write_report
from augment.report.evaluate import evaluate_images
from augment.report.facts import pool_facts, shard_pace
from augment.report.provenance import Provenance, draws, invert_command, synthesize_command
from augment.shards.write import write_shards
from augment.sources import Folder
from augment.synthesis.filters import FILTERS


@dataclass(frozen=True)
class Dark:
    """Scores by darkness; refuses about half."""

    minimum: float | None = -0.5

    def prepare(self, reference):
        return lambda images, labels: -images.flatten(1).mean(1)


class Parsed(HTMLParser):
    """A page's tags, its texts by tag, and the data of its script."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, []
        self.feed(path.read_text("utf-8"))
        scripts = self.texts["script"]
        self.data, self.script, self.style = json.loads(scripts[0]), scripts[1], self.texts["style"]
        self.words = " ".join(" ".join(text) for text in self.texts.values())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)

    def handle_endtag(self, tag):
        while tag in self.open and self.open.pop() != tag:
            pass

    def record(self, name):
        return next(c for c in self.data["classes"] if c["name"] == name)

    def tiles(self, name, kind):
        return [tile for tile in self.record(name)["tiles"] if tile["kind"] == kind]


@pytest.fixture
def shards(bank, gaussian, tmp_path, monkeypatch):
    """12 images a class at most, half of the candidates refused."""
    monkeypatch.setitem(FILTERS, "dark", Dark)
    made = Synthesizer(gaussian, bank, Rule.parse("fix/0"), Sampling(steps=2))
    planner = Planner(bank.members, Mixing(members=2))
    options = {"filters": {"dark": Dark()}, "candidates": 2, "shard_size": 12, "extension": "png"}
    write_shards(made, planner, 12, tmp_path / "shards", **options)
    return tmp_path / "shards"


@pytest.fixture
def page(bank, gaussian, shards, tmp_path):
    write_report(bank, tmp_path / "report.html", shards, gaussian, command="latent-augment report")
    return Parsed(tmp_path / "report.html")


def test_every_class_has_its_measures_and_its_pictures(page, bank, shards):
    assert [c["name"] for c in page.data["classes"]] == bank.classes
    found = latent_statistics(bank.latents("bee"))
    bee = page.record("bee")
    assert bee["latents"] == 4 and bee["bias"] == pytest.approx(found.largest[0], abs=1e-4)
    assert bee["fix/0 bias"] == pytest.approx(predicted_bias(found, 4, float("inf")), abs=1e-4)
    assert bee["synthetic"] == open_shards(shards).targets.count(1)
    kinds = {kind: len(page.tiles("bee", kind)) for kind in ("real", "back", "rule", "kept")}
    assert kinds == {"real": 4, "back": 4, "rule": 2 * len(RULES), "kept": 8}
    keys = [column["key"] for column in page.data["columns"]]
    assert keys == ["latents", "bias", "fix/0 bias", "norm sigmas", "PSNR", "synthetic", "refused"]
    with Image.open(io.BytesIO(base64.b64decode(bee["sprite"].split(",")[1]))) as sprite:
        assert sprite.size == (page.data["side"] * len(bee["tiles"]), page.data["side"])


def test_rules_mix_the_same_members(page):
    rows = [page.tiles("ant", "rule")[k::2] for k in (0, 1)]
    for row in rows:
        assert [tile["rule"] for tile in row] == list(RULES)
        assert len({json.dumps(tile["members"]) for tile in row}) == 1
    assert rows[0][0]["members"] != rows[1][0]["members"]


def test_kept_and_refused_images_have_plan_and_score(page, bank, shards):
    opened, planner = open_shards(shards), Planner(bank.members, Mixing(members=2))
    for name in bank.classes:
        for tile in page.tiles(name, "kept"):
            plan = opened.plan(tile["row"])
            assert (tile["epoch"], tile["index"]) == (plan.epoch, plan.index)
            assert dict(tile["members"]) == pytest.approx(
                dict(zip(plan.members, plan.weights, strict=True)), abs=1e-3
            )
            assert tile["scores"]["dark"] >= -0.5
    refused = [
        (c["name"], t) for c in page.data["classes"] for t in page.tiles(c["name"], "refused")
    ]
    assert refused and all(tile["scores"]["dark"] < -0.5 for _, tile in refused)
    for name, tile in refused:
        plan = planner(tile["epoch"], tile["index"], bank.classes.index(name))
        assert {i for i, _ in tile["members"]} == set(plan.members)
    assert sum(c["refused"] for c in page.data["classes"]) >= len(refused)


@pytest.mark.parametrize("kind", ["rule", "kept", "refused"])
def test_the_lines_of_python_make_the_image_again(
    kind, page, gaussian, shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(augment, "load_backbone", lambda **_: gaussian)
    monkeypatch.chdir(tmp_path)
    tile = next(t for c in page.data["classes"] for t in c["tiles"] if t["kind"] == kind)
    assert "Planner(bank.members, Mixing(" in tile["code"]
    exec(tile["code"], {})
    if kind == "kept":
        assert_same_as_in(shards, tile["row"])


def assert_same_as_in(shards, row):
    """The image that lines of Python left is the one of the shards."""
    with Image.open("image.png") as image:
        made = np.array(image)
    there = (open_shards(shards)[row][0] * 255).round().numpy()[0]
    assert (made == there).mean() > 0.99 and abs(made - there).max() <= 1


def test_the_lines_of_an_image_that_no_planner_draws_take_its_plan_from_the_shards(
    page, bank, gaussian, shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(augment, "load_backbone", lambda **_: gaussian)
    monkeypatch.chdir(tmp_path)
    provenance = replace(Provenance.of(bank, shards), planner=Planner(bank.members, Mixing(seed=5)))
    plan = provenance.folder.shards.plan(2)
    code = provenance.python(plan, "fix/0", 2)
    assert "complete=False).plan(2)" in code
    exec(code, {})
    assert_same_as_in(shards, 2)


def test_the_commands_are_those_that_made_it(tmp_path, monkeypatch, capsys):
    def call(line):
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        main()

    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "my images", {"Bag": 2, "Coat": 1}, size=28)
    call("latent-augment invert --images 'my images' --bank b --steps 3 --prompts '{Bag: bag}'")
    call(
        "latent-augment synthesize --bank b --out s --per-class 3 --rule lin/0 --alpha inf "
        "--members 2 --steps 3 --filters degenerate,duplicate --nearest latent --noise 0.1"
    )
    bank = LatentBank.open("b")
    provenance = Provenance.of(bank, tmp_path / "s")
    before = (tmp_path / "s" / "synthesis.json").read_bytes()
    call(invert_command(bank))  # of other settings these would be refused
    call(synthesize_command(provenance, provenance.folder))
    assert (tmp_path / "s" / "synthesis.json").read_bytes() == before
    plan = provenance.folder.shards.plan(0)
    assert provenance.planned
    assert "features=bank.features('latent')" in provenance.python(plan, "lin/0", 0)


def test_what_is_hostile_stays_text(gaussian, tmp_path):
    names = {'<b onclick="x">&': 2, "猫 {{css}}": 1}
    root = paint(tmp_path / "images", names)
    (root / "猫 {{css}}" / "<img src=y>.png").write_bytes(b"no image")
    prompts = {name: "</script><script>alert(1)</script><!--" for name in names}
    bank = fill_bank(tmp_path / "<i>", gaussian, Folder(root), prompts, steps=2, max_rejects=1.0)
    page = Parsed(write_report(bank, tmp_path / "r.html", backbone=gaussian, command="</pre><u>"))
    assert {tag for tag, _ in page.tags} & {"b", "i", "u", "img"} == {"b"}  # of the captions
    assert [attrs for tag, attrs in page.tags if tag == "b"] == [{}, {}]
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert [c["name"] for c in page.data["classes"]] == sorted(names)
    assert page.record("猫 {{css}}")["prompt"] == prompts["猫 {{css}}"]
    assert "猫 {{css}}/<img src=y>.png" in page.texts["td"] and "1 images" in page.texts["dd"]


def test_nothing_else_can_run_or_be_fetched(page):
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")
    for text in (page.script, "".join(page.style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs), tag
        links = [attrs[name] for name in ("src", "href", "action") if name in attrs]
        assert all(link.startswith(("data:", "#")) for link in links)


def test_a_network_compares_synthetic_images_with_real_ones(bank, shards, tmp_path):
    def network(images):
        return images.flatten(1)

    page = Parsed(write_report(bank, tmp_path / "r.html", shards, network=network))
    columns = {c["key"]: c["beside"] for c in page.data["columns"]}
    assert columns["distance"] == "distance of real"
    assert columns["diversity"] == "diversity of real"
    found = evaluate_images(open_shards(shards), Folder(bank.manifest.source), network, draws=0)
    rows = {row["class"]: row for row in found.classes}
    bee = page.record("bee")
    assert bee["distance"] == rows["bee"]["class distance"]
    assert bee["diversity of real"] == rows["bee"]["of real images"]
    single = next(c for c in page.data["classes"] if c["latents"] == 1)
    assert single["diversity of real"] is None
    with pytest.raises(UserError, match="pass --shards"):
        write_report(bank, tmp_path / "r.html", network=network)


def test_the_verdict_is_first_then_pictures(page, bank):
    first = findings([bank.health(name) for name in bank.classes], *bank.made_by)[0]
    assert page.texts["li"][0].strip() == first.text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert ids.index("health-title") < ids.index("strip") < ids.index("classes-title")
    assert ids.index("classes-title") < ids.index("latents-title")


def test_a_bank_alone_is_enough(bank, tmp_path):
    page = Parsed(write_report(bank, tmp_path / "r.html"))
    assert {t["kind"] for c in page.data["classes"] for t in c["tiles"]} == {"real"}
    assert "synthetic" not in [column["key"] for column in page.data["columns"]]
    assert "No images were made" in page.words and "latent-augment synthesize" not in page.words


def test_real_images_that_are_gone_or_changed_leave_a_sentence(gaussian, tmp_path):
    root = paint(tmp_path / "images")
    bank = fill_bank(tmp_path / "bank", gaussian, Folder(root), steps=2)
    (root / "ant" / "0.png").unlink()
    paint(root, {"bee": 1}, seed=5)
    root.rename(tmp_path / "moved")
    page = Parsed(write_report(bank, tmp_path / "r.html", images=tmp_path / "moved"))
    assert "2 real images are not in" in page.words
    assert [len(page.tiles(name, "real")) for name in bank.classes] == [2, 3, 1]
    page = Parsed(write_report(bank, tmp_path / "r.html"))
    assert "8 real images are not in" in page.words and "--images" in page.words
    assert all(c["sprite"] == "" for c in page.data["classes"])


def test_classes_without_synthetic_images_are_named(bank, gaussian, tmp_path):
    synthesizer = Synthesizer(gaussian, bank, sampling=Sampling(steps=2))
    write_shards(synthesizer, Planner(bank.members), {"bee": 3}, tmp_path / "s")
    page = Parsed(write_report(bank, tmp_path / "r.html", tmp_path / "s"))
    assert "No synthetic images are there of 'ant', 'cat'." in page.words


def test_a_plan_of_no_class_is_not_taken_for_one_of_the_job(bank, gaussian, tmp_path):
    synthesizer = Synthesizer(gaussian, bank, sampling=Sampling(steps=2))
    opened = write_shards(synthesizer, Planner(bank.members), 1, tmp_path / "s")
    plan = opened.plan(0)
    planner = Provenance.of(bank, tmp_path / "s").planner
    assert draws(planner, plan)
    assert not draws(planner, replace(plan, label=3))


def test_shards_need_not_be_finished(bank, shards, tmp_path):
    page = Parsed(write_report(bank, tmp_path / "r.html", shards))
    assert "not finished" not in page.words and "with a backbone some are made" in page.words
    records = sorted(shards.glob("shard-*.json"))
    for left, record in zip((2, 1, 0), reversed(records), strict=True):
        record.unlink()
        page = Parsed(write_report(bank, tmp_path / "r.html", shards))
        assert f"not finished: {left} of 3" in page.words
    assert all(c["synthetic"] == 0 for c in page.data["classes"])


def test_shards_of_another_state_or_bank_are_told(bank, gaussian, shards, pictures, tmp_path):
    more = paint(tmp_path / "more", {"ant": 4, "bee": 4, "cat": 1})
    grown = fill_bank(tmp_path / "grown", gaussian, Folder(more), steps=4)
    page = Parsed(write_report(grown, tmp_path / "r.html", shards, gaussian))
    assert "no longer as it was" in page.words and "plans are not known" in page.words
    assert all("open_shards(" in tile["code"] for tile in page.tiles("bee", "kept"))
    other = fill_bank(tmp_path / "other", gaussian, Folder(paint(tmp_path / "o", {"dog": 2})))
    with pytest.raises(UserError, match=r"shards of classes of bank .*, got 'ant'"):
        write_report(other, tmp_path / "r.html", shards)
    with pytest.raises(UserError, match="shards of synthetic images"):
        write_report(bank, tmp_path / "r.html", tmp_path / "nothing")


def test_images_that_were_chosen_one_by_one_are_refused(bank, shards, tmp_path):
    """Older versions of the explorer exported shards; `open_shards` still reads them."""
    settings = json.loads((shards / "synthesis.json").read_text())
    keys = ("schema", "classes", "shards", "extension", "images", "bank")
    write(shards / "synthesis.json", {**{key: settings[key] for key in keys}, "by": "explore"})
    assert len(open_shards(shards))
    with pytest.raises(UserError, match="chosen one by one"):
        write_report(bank, tmp_path / "r.html", shards)


def test_classes_are_spread_from_the_most_biased_to_the_least():
    classes = [health(0.1 * k, name=str(k)) for k in range(7)]
    assert [c.name for c in from_most_biased(classes, 3)] == ["6", "3", "0"]
    assert [c.name for c in from_most_biased(classes, 1)] == ["6"] and from_most_biased(
        classes, 0
    ) == []
    assert len(from_most_biased(classes, 9)) == 7


def noise(count=32, seed=0):
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def health(bias=0.0, count=32, scale=1.0, name="a", errors=None, smooth=0.0):
    latents = scale * noise(count) + bias * torch.tensor([1.0, 0, 0, 0])[:, None, None]
    latents = latents + smooth * latents.roll(1, -1)
    lost = None if errors is None else torch.tensor(errors).repeat(count // len(errors))
    return ClassHealth.of(name, latents, lost)


@pytest.mark.parametrize(
    ("classes", "level", "words"),
    [
        ([health()], "good", "The class has no significant channel bias"),
        ([health(0.2), health()], "warning", "1 of 2 classes has a channel bias"),
        ([health(0.2, name="cup")] * 3, "warning", "All 3 classes have"),
        ([health(0.2)], "warning", r"of a to 0\.\d\d with 32 members. Take a rule with /chm"),
        ([health(0.05)], "good", "too small to matter"),
        ([health()], "good", "as long as white noise"),
        ([health(scale=0.9)], "warning", "10% shorter than white noise .* nin that of"),
        ([health(scale=1.1)], "warning", "10% longer"),
        ([health(smooth=0.3)], "warning", r"correlate, \+0.\d\d across .* forward_start"),
        ([health(errors=(1e-3, 1e-3))], "good", "come back at 30.0 dB"),
        ([health(errors=(0.063, 0.04))], "warning", "12.9 dB .* ddim in 5 steps .* more steps"),
        ([health(count=1, name="x"), health()], "warning", "1 of 2 classes has one image, .* x"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_sentence(classes, level, words):
    printed = findings(classes, "ddim in 5 steps")
    assert any(f.level == level and re.search(words, f.text) for f in printed), printed
    assert [f.level for f in printed] == sorted((f.level for f in printed), reverse=True)


def test_the_measured_bias_is_the_one_foretold():
    latents = noise(64) + 0.1 * torch.tensor([1.0, 0, 0, 0])[:, None, None]
    found = latent_statistics(latents)
    for number in (2, 8, 64):
        bias = measured_bias(latents, "fix/0", number)
        assert bias == pytest.approx(predicted_bias(found, number, float("inf")), rel=0.1)
    for number in (2, 8, 64):
        bias = measured_bias(latents, "fix/chm", number)
        assert bias == pytest.approx(found.largest[0], abs=0.2 / number)


def test_a_pool_tells_throughput_and_reuse(tmp_path):
    control = np.zeros(1, CONTROL)
    control["magic"], control["made"], control["before"] = MAGIC, 120, 20
    control["started"], control["beat"], control["draws"][0, :2] = 10.0, 20.0, (300, 300)
    control.tofile(tmp_path / "pool")
    facts = pool_facts(tmp_path / "pool")
    assert facts["reuse factor"].startswith("5.0 ") and facts["pool made"].startswith("10 images/s")
    (tmp_path / "other").write_bytes(b"something")
    for name in ("other", "none"):
        with pytest.raises(UserError, match="expected the file of a replay pool"):
            pool_facts(tmp_path / name)


def test_the_pace_is_told_by_dates_and_only_where_they_tell(bank, shards):
    import os

    folder = Provenance.of(bank, shards).folder
    for number, path in enumerate(folder.shards.paths):
        os.utime(path.with_suffix(".json"), (1e9, 1e9 + 4 * number))
    assert shard_pace(folder) == pytest.approx(len(folder.shards) / 3 / 4)
    for path in folder.shards.paths:
        os.utime(path.with_suffix(".json"), (1e9, 1e9))
    assert shard_pace(folder) is None


def luminance(colour):
    """Relative luminance, WCAG 2.2."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_have_contrast_enough_in_light_and_dark(page):
    blocks = re.findall(r":root \{(.*?)\}", "".join(page.style), re.DOTALL)[:2]
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for back in ("paper", "panel", "faint"):
            for front in ("ink", "soft", "blue", "red", "green"):
                light, dark = sorted(map(luminance, (colours[front], colours[back])))[::-1]
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def test_the_command_writes_it(bank, shards, tmp_path, monkeypatch, capsys):
    def call(*args):
        line = ["latent-augment", "report", "--bank", str(bank.path), *map(str, args)]
        monkeypatch.setattr(sys, "argv", line)
        try:
            main()
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    out = tmp_path / "r.html"
    assert call("--rules", "", "--shards", shards, "--out", out) == (
        0, f"{out}: written; open it in a browser\n",
    )  # fmt: skip
    assert f"--bank {bank.path}" in Parsed(out).words
    code, printed = call("--rules", "fix/zero", "--out", out)
    assert code == 2 and "expected a mean split out of" in printed
    assert inspect.signature(report).parameters["rules"].default == ",".join(RULES)
    with pytest.raises(UserError, match="expected a number of classes"):
        write_report(bank, out, classes=-1)
