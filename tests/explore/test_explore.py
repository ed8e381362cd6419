"""The explorer without a browser: images, lines that make them again, shards, the gate."""

import asyncio
import json
import os
import shlex
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import paint
from PIL import Image

from augment import (
    LatentBank,
    Mixing,
    Plan,
    Planner,
    Rule,
    Sampling,
    Synthesizer,
    UserError,
    open_shards,
)
from augment.bank.fill import fill_bank
from augment.bank.format import DIGITS
from augment.core.files import sha256
from augment.explore import Choice, Explorer, server, widgets
from augment.explore.export import export
from augment.explore.session import MAX_MEMBERS, reweighted, toggled
from augment.sources import Folder
from augment.training.data.identity import check_apart, origins

COUNTS = {"Bag": 6, "Coat": 2, "<b>${1}": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory, tiny):
    root = tmp_path_factory.mktemp("explore")
    fill_bank(root / "bank", tiny, Folder(paint(root / "images", COUNTS, size=32)), steps=2)
    return root


@pytest.fixture
def explorer(path, tiny, tmp_path):
    bank, recipe = LatentBank.open(path / "bank"), {"name_or_path": "tiny", "device": "cpu"}
    return Explorer(bank, tiny, recipe, out=tmp_path / "out")


@pytest.fixture
def choice(explorer):
    plan = reweighted(explorer.start("Bag"), [3, 2, 1])
    return Choice(plan, "fade/chm", explorer.sampling("fireflow", 2, 1.0))


def drawn(explorer, choice, alpha=0.5, again=0):
    plan = explorer.draw(replace(choice.plan, seed=7, noise=0.25), alpha, again)
    return replace(choice, plan=plan, alpha=alpha)


def test_an_image_is_the_synthesizers_and_is_remembered(explorer, choice):
    image = explorer.image(choice)
    sampling = Sampling(solver="fireflow", steps=2, guidance=1.0)
    made = Synthesizer(explorer.backbone, explorer.bank, Rule.parse("fade/chm"), sampling)
    assert torch.equal(image, made.images([choice.plan])[0])
    assert explorer.image(replace(choice, alpha=1.0)) is image
    other = replace(choice, plan=reweighted(choice.plan, [1, 2, 3]))
    assert not torch.equal(explorer.image(other), image)
    facts, plain = (explorer.facts(replace(choice, rule=name)) for name in ("fix/0", "lin/0"))
    assert facts.norm == pytest.approx(1, abs=1e-5)
    assert plain.norm < 1 and plain.bias == pytest.approx(plain.average, abs=1e-6)


def test_the_first_solver_is_quick_where_it_undoes_the_inversion(explorer, path, tiny, tmp_path):
    assert explorer.quick == "fast"
    fast = explorer.sampling("fast")
    assert (fast.solver, fast.steps, fast.guidance) == ("fireflow", 10, 1.0)
    bank = fill_bank(tmp_path / "bank", tiny, Folder(path / "images"), None, "ddim", steps=2)
    assert Explorer(bank, tiny, {}).quick == "exact"


def test_members_come_and_go(explorer):
    plan = explorer.start("Bag", 2)
    more = toggled(plan, "Bag/5.png", "Bag")
    assert more.members == ("Bag/0.png", "Bag/1.png", "Bag/5.png")
    assert more.weights == pytest.approx((1 / 3,) * 3)
    assert toggled(more, "Bag/5.png", "Bag").weights == pytest.approx(plan.weights)
    assert reweighted(plan, [0, 0]).weights == (0.5, 0.5)
    with pytest.raises(UserError, match=f"1 to {MAX_MEMBERS} members, got 0"):
        toggled(explorer.start("Bag", 1), "Bag/0.png", "Bag")
    with pytest.raises(UserError, match=f"1 to {MAX_MEMBERS} members, got 6"):
        toggled(explorer.start("Bag", MAX_MEMBERS), "Bag/5.png", "Bag")


def test_members_may_be_of_several_classes(explorer, choice):
    plan = toggled(explorer.start("Bag", 2), "Coat/1.png", "Coat")
    assert plan.class_name == "Bag" and plan.classes == ("Bag", "Bag", "Coat")
    mixed = replace(choice, plan=plan)
    points, weights = explorer.bank.gather([plan])
    centroid = Rule.parse(choice.rule)(points, weights)[0]
    made = Synthesizer(explorer.backbone, explorer.bank, Rule.parse(choice.rule), choice.sampling)
    assert torch.equal(explorer.image(mixed), made.sample(centroid[None], [plan])[0])
    assert "67% Bag, 33% Coat" in widgets.centroid(explorer, mixed)
    assert widgets.grid(explorer, plan, "Coat").count('aria-pressed="true"') == 1
    assert toggled(plan, "Coat/1.png", "Coat").classes == ()


def test_a_prompt_replaces_the_banks(explorer, choice, tmp_path, monkeypatch):
    mine = replace(drawn(explorer, choice), prompt="footwear")
    assert explorer.prompt(mine) == "footwear"
    assert not torch.equal(explorer.image(mine), explorer.image(replace(mine, prompt="")))
    assert explorer.command(mine) is None, "a prompt of one image is no template"
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(explorer.python(mine), "copied", "exec"), names)
    assert torch.equal(names["image"], explorer.image(mine))


def test_a_draw_is_the_one_of_synthesize(explorer, choice):
    planner = Planner(explorer.bank.members, Mixing(seed=7, alpha=0.5, members=3, noise=0.25))
    for again in (0, 1):
        plan = drawn(explorer, choice, again=again).plan
        assert plan == planner(0, plan.index)  # whose class goes by the index
        assert plan.class_name == "Bag"


def test_the_python_lines_make_the_image_again(explorer, choice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for mine in (choice, drawn(explorer, choice)):
        names = {}
        exec(compile(explorer.python(mine), "copied", "exec"), names)
        assert torch.equal(names["image"], explorer.image(mine))
        with Image.open("image.png") as file:
            assert file.size == (32, 32)


def test_the_command_makes_the_image_again(explorer, choice, tmp_path, monkeypatch):
    from augment.cli import main

    monkeypatch.chdir(tmp_path)
    assert explorer.command(choice) is None
    assert explorer.command(replace(choice, alpha=0.5)) is None  # moved since
    for again in (0, 1):
        mine = drawn(explorer, choice, again=again)
        words = explorer.command(mine).replace("centroids", f"centroids-{again}")
        monkeypatch.setattr(sys, "argv", shlex.split(words.replace("\\\n", " ")))
        main()
        shards = open_shards(f"centroids-{again}")
        assert shards.plan(mine.plan.index) == mine.plan
        near = (shards[mine.plan.index][0] - explorer.image(mine)).abs().max()
        assert near < 1 / 255


def test_thumbnails_are_of_the_banks_images_alone(path, tiny, tmp_path):
    images = paint(tmp_path / "images", COUNTS, size=32)
    bank = LatentBank.open(path / "bank")
    explorer = Explorer(bank, tiny, {}, source=images)
    with Image.open(images / "Bag" / "0.png") as file:
        assert (np.array(explorer.real("Bag", "Bag/0.png")) == np.array(file)).all()
    (images / "Bag" / "1.png").write_bytes((images / "Bag" / "0.png").read_bytes())
    (images / "Bag" / "2.png").unlink()
    for image_id in ("Bag/1.png", "Bag/2.png"):
        assert explorer.real("Bag", image_id) is None
        assert explorer.thumbnail("Bag", image_id).size == (32, 32)


def test_a_walk_begins_and_ends_in_its_images(explorer):
    ends = [("Bag", "Bag/0.png"), ("Coat", "Coat/1.png")]
    images, norms = explorer.walk(ends, "slerp", 3, explorer.sampling("fireflow", 2, 1.0))
    assert len(images) == len(norms) == 3
    for image, (name, image_id) in zip(images[[0, -1]], ends, strict=True):
        plan = replace(explorer.start(name), members=(image_id,), weights=(1.0,))
        own = explorer.image(Choice(plan, "lin/0", explorer.sampling("fireflow", 2, 1.0)))
        assert (image - own).abs().max() < 1e-3
    assert widgets.player(images, norms).count("<img") == 4


def test_an_export_is_an_image_folder_with_plans(explorer, choice, tmp_path):
    choices = [choice, drawn(explorer, choice), replace(choice, rule="fix/0")]
    assert export(explorer, choices[:1]) == export(explorer, choices[1:]) == explorer.out
    lines = (explorer.out / "metadata.jsonl").read_text().splitlines()
    for line, mine in zip(map(json.loads, lines), choices, strict=True):
        with Image.open(explorer.out / line["file_name"]) as file:
            image = torch.from_numpy(np.array(file))[None] / 255
        assert (image - explorer.image(mine)).abs().max() < 1 / 255
        plan = {key: line[key] for key in mine.plan.facts}
        assert Plan.from_json(json.dumps(plan)) == mine.plan
        assert (line["rule"], line["steps"], line["alpha"]) == (mine.rule, 2, mine.alpha)
    assert Folder(explorer.out).classes == explorer.bank.classes  # those without images too


def test_held_out_images_are_found_among_the_origins_of_an_export(explorer, choice, path):
    """Whose images it comes from is written beside it, as `export_folder` does."""
    export(explorer, [choice])
    known = origins(Folder(explorer.out))
    held_out = {"Bag/3.png": sha256((path / "images" / "Bag" / "3.png").read_bytes())[:DIGITS]}
    with pytest.raises(UserError, match=r"Bag/3\.png"):
        check_apart(known, held_out, "test")
    check_apart(known, {"Bag/9.png": "0" * DIGITS}, "test")


def test_an_export_goes_to_a_folder_of_its_own(explorer, choice, tmp_path):
    with pytest.raises(UserError, match="got 0 images"):
        export(explorer, [])
    with pytest.raises(UserError, match="no folder"):
        export(replace(explorer, out=None), [choice])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="another --out"):
        export(replace(explorer, out=tmp_path / "used"), [choice])
    export(explorer, [choice])
    bank = explorer.bank.subset(lambda image_id: image_id != "Bag/5.png")
    with pytest.raises(UserError, match="another --out"):
        export(replace(explorer, bank=bank), [choice])


def test_names_are_not_taken_for_html(explorer, choice):
    name = "<b>${1}"
    for html in (
        widgets.grid(explorer, explorer.start(name), name),
        widgets.mixer(explorer, explorer.start(name)),
        widgets.centroid(
            explorer, Choice(explorer.start(name), "lin/0", explorer.sampling("fireflow", 2, 1.0))
        ),
    ):
        assert "<b>" not in html and "&lt;b&gt;" in html


def status(path, host="127.0.0.1:7860", hosts=frozenset({"127.0.0.1"}), kind="http"):
    """What the gate answers; 200 is what is behind it."""
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [(b"host", host.encode())]}
    asyncio.run(server.Gate(app, hosts)(scope, None, send))
    return sent[0]["status"]


@pytest.mark.parametrize("path", ["/", "/config", "/assets/a-1.js", "/gradio_api/queue/join"])
def test_the_gate_lets_the_page_through(path):
    assert status(path) == 200
    assert status(path, host="evil.example") == 403
    assert status(path, host="example:80", hosts=None) == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/file=/etc/passwd", "/file=/etc/passwd", "/gradio_api/upload"),
        *("/assets/../x", "/gradio_api/proxy=http://x", "/gradio_api/info", "//gradio_api/file=x"),
    ],
)
def test_the_gate_holds_back_everything_else(path):
    assert status(path) == status(path, hosts=None) == 403
    assert status("/", kind="websocket") == 403


def test_names_that_are_not_utf_8_are_shown(tmp_path, tiny):
    """What a page is sent is JSON in UTF-8, and what it sends back is found again."""
    pytest.importorskip("gradio")
    from augment.explore.page import Page

    odd = os.fsdecode(b"caf\xe9")
    root = paint(tmp_path / "images", {odd: 3, "Bag": 1}, size=32)
    bank = fill_bank(tmp_path / "bank", tiny, Folder(root), steps=1)

    async def build():
        page = Page(Explorer(bank, tiny, {"name_or_path": "tiny"}))
        json.dumps(page.blocks.get_config_file(), ensure_ascii=False, default=str).encode()
        mixture = page.of_class(page.explorer.start("Bag"), None, "caf\\udce9")
        assert mixture[0].class_name == odd
        how = ("fade/chm", "fix/0", "fast", 1, 1.0, "")
        pieces = list(page.change(lambda *old: old, [mixture], how))
        texts = [text for row in pieces for text in row if isinstance(text, str)]
        assert len(texts) == 9 and all(text.encode() for text in texts)
        image = "caf\\udce9/0.png"
        assert image in page.ids_of("caf\\udce9")
        ends = ("caf\\udce9", image, "Bag", "Bag/0.png")
        assert page.walk(*ends, "slerp", 3, "fast", 1, 1.0).encode()

    asyncio.run(build())


def test_every_change_of_the_mixture_is_undone(explorer):
    pytest.importorskip("gradio")
    from augment.explore.page import Page

    async def build():
        page, how = Page(explorer), ("fade/chm", "fix/0", "fast", 1, 1.0, "")
        history = [(explorer.start("Bag"), None)]
        for edit in (
            lambda plan, alpha: page.of_class(plan, alpha, "Coat"),
            lambda plan, alpha: page.noisy(plan, alpha, 0.5),
            lambda plan, alpha: page.mixed(plan, alpha, {"weights": [1.0, 0.0]}),
        ):
            known, (history, *_) = history, next(page.change(edit, history, how))
            assert history[:-1] == known
        for number in (3, 2, 1, 1):  # nothing is before the first
            history, name, noise, *_ = next(page.change(None, history, how))
            assert len(history) == number
            assert (name, noise) == (history[-1][0].class_name, history[-1][0].noise)

    asyncio.run(build())


def test_without_gradio_it_is_one_sentence(monkeypatch, path):
    from augment.commands import explore

    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"latent-augment\[explore\]"):
        explore(str(path / "bank"))


def test_the_page_is_built_with_gradio(explorer):
    pytest.importorskip("gradio")
    from augment.explore.page import Page

    async def build():  # where no loop runs, gradio leaves one open
        return Page(explorer).blocks.get_config_file()

    config = asyncio.run(build())
    kinds = [part["type"] for part in config["components"]]
    assert kinds.count("code") == 4 and "file" not in kinds and "image" not in kinds
    assert not config["analytics_enabled"]
