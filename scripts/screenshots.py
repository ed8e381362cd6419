"""Photograph the pages that are in the README: ``python scripts/screenshots.py [--page report]``.

A page is a function in `PAGES`: it takes a browser and the folder of a small demo (embedded images,
`tiny`), which is made once under ``runs/screenshots``, and writes its picture to ``docs``. It needs
the extra ``browser`` (and ``explore`` for the explorer) and Debian's ``chromium``. The existing
pictures have the font Inter (``apt-get install fonts-inter``).
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from augment import (
    LatentBank,
    Mixing,
    Planner,
    Rule,
    Synthesizer,
    fill_bank,
    load_backbone,
    write_shards,
)
from augment.core.errors import BiasWarning
from augment.explore import Explorer
from augment.explore.server import serve
from augment.report import write_report
from augment.sources import Folder
from augment.sources.fashion import write_fashion
from augment.synthesis.filters import make_filter

CHROMIUM = "/usr/bin/chromium"
ARGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
ARGS += ["--disable-component-update", "--disable-sync"]
DOCS = Path("docs")


def make_demo(root: Path) -> Path:
    """Make a bank of 16 images a class, and shards by ``fix/0``, whose faults are visible."""
    backbone = load_backbone("tiny")
    source = Folder(write_fashion(root / "images", "shots", list(range(16))))
    bank = fill_bank(root / "bank", backbone, source)
    filters = {"degenerate": make_filter("degenerate")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BiasWarning)
        write_shards(
            Synthesizer(backbone, bank, Rule.parse("fix/0")),
            Planner(bank.members, Mixing(members=8)), 24,
            root / "shards", shard_size=60, filters=filters, candidates=3,
        )  # fmt: skip
    return root


def report(browser: Browser, root: Path) -> None:
    """Photograph the report: health and classes in light, an image and classes in dark."""
    file, bank = root / "report.html", LatentBank.open(root / "bank")
    command = f"latent-augment report --bank {bank.path} --shards {root / 'shards'} --out {file}"
    write_report(bank, file, root / "shards", load_backbone(**bank.recipe), command=command)
    shots = []
    for scheme in ("light", "dark"):
        page = opened(browser, file.resolve().as_uri(), scheme)
        shots.append(photographed(page, root / f"report-{scheme}.png"))
        page.get_by_role("button", name="Refused").click()
        page.evaluate("document.getElementById('classes').scrollIntoView()")
        page.wait_for_timeout(500)
        shots.append(photographed(page, root / f"report-{scheme}-classes.png"))
        page.locator("button.tile.kept").nth(2).click()
        page.wait_for_timeout(200)
        shots.append(photographed(page, root / f"report-{scheme}-detail.png"))
    tiled([shots[0], shots[1], shots[5], shots[4]]).save(DOCS / "report.png", optimize=True)


def explorer(browser: Browser, root: Path) -> None:
    """Photograph the explorer: a mixture under two rules in light, a walk in dark."""
    bank = LatentBank.open(root / "bank")
    model = Explorer(bank, load_backbone(**bank.recipe), bank.recipe, out=root / "kept")
    blocks, shots = serve(model, port=7897), []
    for scheme, act in (("light", mix), ("dark", stroll)):
        page = opened(browser, "http://127.0.0.1:7897", scheme, height=1040)
        page.wait_for_selector("#image-b img")
        act(page)
        shots.append(photographed(page, root / f"explorer-{scheme}.png"))
    blocks.close()
    tiled(shots).save(DOCS / "explorer.png", optimize=True)


def choose(page: Page, control: str, option: str) -> None:
    """Choose from a list of the explorer."""
    page.get_by_role("combobox", name=control, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()
    page.wait_for_timeout(3000)


def mix(page: Page) -> None:
    """Mix three dresses, the first members and drawn ones; keep both images."""
    choose(page, "Class", "Dress")
    page.locator("#keep-a").click()
    page.get_by_role("button", name="Draw members").click()
    page.wait_for_timeout(4000)
    page.locator("#keep-a").click()
    page.wait_for_timeout(2000)


def stroll(page: Page) -> None:
    """Play a walk, and stop it on its way."""
    page.get_by_role("tab", name="Walk").click()
    choose(page, "To", "Sneaker")
    page.get_by_role("button", name="Walk", exact=True).click()
    page.wait_for_selector(".player .film img")
    page.wait_for_timeout(500)
    page.locator(".player input").fill("5")
    page.wait_for_timeout(500)


PAGES: dict[str, Callable[[Browser, Path], Any]] = {"report": report, "explorer": explorer}
"""Pages by name."""


def opened(browser: Browser, address: str, scheme: Any, height: int = 1000) -> Page:
    """Open a page, in light or dark."""
    page = browser.new_page(viewport={"width": 1240, "height": height}, color_scheme=scheme)
    page.goto(address)
    page.wait_for_timeout(500)
    return page


def photographed(page: Page, path: Path) -> Path:
    """Write what is visible of a page as a PNG file; return its path."""
    page.screenshot(path=path)
    return path


def tiled(paths: list[Path], columns: int = 2, gap: int = 24) -> Image.Image:
    """Tile pictures of one size in rows, at two thirds of that size, in 256 colours."""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    width, height = (side * 2 // 3 for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    size = columns * (width + gap) - gap, rows * (height + gap) - gap
    sheet = Image.new("RGB", size, "#8a8f98")
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        small = picture.resize((width, height), Image.Resampling.LANCZOS)
        sheet.paste(small, (column * (width + gap), row * (height + gap)))
    return sheet.quantize(256, kmeans=2, dither=Image.Dither.NONE)


def main() -> None:
    """Make the demo, then the pictures that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", choices=PAGES, help="all by default")
    parser.add_argument("--root", type=Path, default=Path("runs/screenshots"))
    args = parser.parse_args()
    root = make_demo(args.root)
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        for name in [args.page] if args.page else PAGES:
            PAGES[name](browser, root)
        browser.close()


if __name__ == "__main__":
    main()
