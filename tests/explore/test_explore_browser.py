"""The explorer as a hand finds it: a browser, the command, and what it copies."""

import base64
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from augment import open_shards
from augment.bank.fill import InvertSettings
from augment.commands import invert
from augment.sources.fashion import write_fashion

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's chromium"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # of playwright's pipes
]
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("explore")
    write_fashion(root / "images", "shots", [0, 1, 2, 3])
    images, bank = str(root / "images"), str(root / "bank")
    invert(InvertSettings(images=images, bank=bank, steps=10, errors=False))
    return root


@pytest.fixture(scope="module")
def address(place):
    """Of the running command, whose environment asks gradio to open every door."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    doors = {"GRADIO_ALLOWED_PATHS": "/", "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
    command = [sys.executable, "-m", "augment.cli", "explore", "--bank", place / "bank", "--out",
               place / "out", "--port", str(port)]  # fmt: skip
    with (place / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **doors})
    try:
        for _ in range(600):
            if "Ctrl-C" in (place / "log").read_text():
                break
            assert server.poll() is None, (place / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.asked, page.faults = [], []
    page.set_default_timeout(PATIENCE_MS)
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda fault: page.faults.append(fault))
    page.goto(address)
    page.wait_for_selector("#image-b img")
    page.wait_for_selector("#mixer input")
    yield page
    assert page.faults == []
    assert {url for url in page.asked if not url.startswith((address, "data:"))} == set()
    context.close()


def pixels(page, where):
    """The pixels of a picture on the page."""
    source = page.locator(f"{where} img").first.get_attribute("src")
    content = source.removeprefix("data:image/png;base64,")
    assert content != source
    return np.array(Image.open(io.BytesIO(base64.b64decode(content))))


def changes(page, act):
    """Act, and wait until both pictures are other ones."""
    old = [page.locator(f"#image-{side} img").get_attribute("src") for side in "ab"]
    act()
    for side, source in zip("ab", old, strict=True):
        page.wait_for_function(
            "([side, old]) => document.querySelector(`#image-${side} img`).src !== old",
            arg=[side, source],
        )


def copied(page, button):
    """What the button of a box with code puts on the clipboard."""
    page.evaluate("navigator.clipboard.writeText('')")
    page.locator("#again-a button").first.click()
    page.locator(f"{button} button[aria-label='Copy'], {button} button[title='Copy']").click()
    page.wait_for_function("navigator.clipboard.readText().then(text => text.length > 0)")
    return page.evaluate("navigator.clipboard.readText()")


def test_a_weight_changes_the_image_and_the_copied_lines_make_it_again(page, place, tmp_path):
    changes(page, lambda: page.locator("#mixer input").nth(0).fill("1"))
    changes(page, lambda: page.locator("#mixer input").nth(1).fill("0"))
    weights = [int(text[:-1]) for text in page.locator("#mixer output").all_inner_texts()]
    assert weights == [75, 0, 25]
    lines = copied(page, "#py-a")
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "image.png") as file:
        assert (np.array(file) == pixels(page, "#image-a")).all()
    assert "take the Python lines" in page.locator("#sh-a").inner_text()


def test_a_draw_has_a_command_that_makes_the_image_again(page, tmp_path):
    changes(page, lambda: page.get_by_role("button", name="Draw members").click())
    command = copied(page, "#sh-a").replace("\\\n", " ")
    words = [sys.executable, "-m", "augment.cli", *shlex.split(command)[1:]]
    subprocess.run(words, cwd=tmp_path, check=True)
    made = open_shards(tmp_path / "centroids")[0][0][0].numpy() * 255
    assert np.abs(made - pixels(page, "#image-a")).max() <= 1


def test_the_triangle_the_images_and_the_class_change_the_mixture(page):
    box = page.locator("#mixer svg").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + 0.3 * box["height"]

    def drag():
        page.mouse.move(x, y + 30)
        page.mouse.down()
        page.mouse.move(x, y, steps=4)
        page.mouse.up()

    changes(page, drag)
    weights = [int(text[:-1]) for text in page.locator("#mixer output").all_inner_texts()]
    assert weights[0] > 70 and abs(weights[1] - weights[2]) <= 2
    changes(page, lambda: page.locator(".grid button").nth(3).click())
    assert page.locator("#mixer input").count() == 4
    for row in (0, 1):  # faster than images are made
        page.locator(".grid button").nth(row).click()
    page.wait_for_function("document.querySelectorAll('#mixer input').length === 2")
    assert page.locator(".grid button[aria-pressed=true]").count() == 2
    page.get_by_label("Class").click()
    page.get_by_role("option", name="Bag").click()
    page.wait_for_selector(".grid button[title='Bag/000.png']")
    page.wait_for_selector("#image-b img[alt='Bag, fix/0']")


def test_what_is_kept_is_exported(page, place):
    for side in "ab":
        page.locator(f"#keep-{side}").click()
    page.wait_for_function("document.querySelectorAll('.tray img').length === 2")
    page.get_by_role("button", name="Export").click()
    page.wait_for_function("document.querySelectorAll('.tray img').length === 0")
    lines = map(json.loads, (place / "out" / "metadata.jsonl").read_text().splitlines())
    files = {line["rule"]: place / "out" / line["file_name"] for line in lines}
    assert list(files) == ["fade/chm", "fix/0"]
    with Image.open(files["fade/chm"]) as file:
        assert (np.array(file) == pixels(page, "#image-a")).all()


def test_a_walk_is_played(page):
    page.get_by_role("tab", name="Walk").click()
    page.get_by_role("combobox", name="To", exact=True).click()
    page.get_by_role("option", name="Coat").click()
    page.wait_for_function(
        "[...document.querySelectorAll('input')].some(input => input.value === 'Coat/000.png')"
    )
    page.get_by_role("button", name="Walk", exact=True).click()
    page.wait_for_selector(".player .film img")
    assert page.locator(".player .film img").count() == 9
    page.wait_for_function("+document.querySelector('.player input').value > 2")  # plays by itself
    page.locator(".player button").click()
    page.locator(".player input").fill("8")
    last = page.locator(".film img").last.get_attribute("src")
    assert page.locator(".player .frame").get_attribute("src") == last
    assert "γ 1.00" in page.locator(".player output").inner_text()


def answer(url, **headers):
    """The status of a request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_no_file_is_served(address, place):
    assert answer(address) == 200
    for path in ("/etc/passwd", place / "log", place / "bank" / "manifest.json"):
        for door in ("/gradio_api/file=", "/file=", "/gradio_api/file/", "/static/..%2F"):
            assert answer(f"{address}{door}{path}") in (403, 404)
    assert answer(address, Host="evil.example") == 403
    port = int(address.rpartition(":")[2])
    with pytest.raises(OSError), socket.create_connection((own_address(), port), 2):
        pass  # it listens on loopback alone, whatever the environment says


def own_address():
    """The address of this machine that others would use."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("no address but loopback")
        return probe.getsockname()[0]
