"""Make docs/quick-start.ipynb of docs/quick-start.md: ``python scripts/make_notebook.py``.

Text becomes Markdown cells, ``bash`` blocks become cells of commands, ``python`` blocks cells of
code; commands that need a download stay text. The notebook runs in a folder with small JPEGs of the
embedded images.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

from augment.sources.fashion import few_shots, write_fashion

DOCS = Path(__file__).parent.parent / "docs"
RUN = re.compile(r"^```(bash|python)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def write_photos(root: Path) -> None:
    """Write three classes of five images to train on, and two to test on."""
    embedded = write_fashion(root / "embedded", "shots", few_shots(0, 7))
    for name in ("Sandal", "Coat", "Bag"):
        for number, path in enumerate(sorted((embedded / name).glob("*.png"))):
            folder = root / ("photos" if number < 5 else "photos-test") / name
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.open(path).convert("RGB").resize((60 + 7 * number, 80 - 5 * number))
            picture.save(folder / f"IMG_{number:04d}.jpg")


def cells(text: str) -> list[nbformat.NotebookNode]:
    """Return the cells of a page."""
    found, at = [], 0
    for match in RUN.finditer(text):
        if before := text[at : match.start()].strip():
            found.append(new_markdown_cell(before))
        magic = "%%bash\n" if match[1] == "bash" else ""
        found.append(new_code_cell(magic + match[2].rstrip()))
        at = match.end()
    if after := text[at:].strip():
        found.append(new_markdown_cell(after))
    for number, cell in enumerate(found):
        cell["id"] = f"cell-{number}"  # the same page makes the same notebook
    return found


def main() -> None:
    """Convert, run, and write."""
    page = (DOCS / "quick-start.md").read_text()
    notebook = new_notebook(cells=cells(page))
    os.environ["TTY_COMPATIBLE"] = "0"  # no colours and bars, whatever the kernel says
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder))
        client = NotebookClient(notebook, timeout=600, coalesce_streams=True)
        client.execute(cwd=folder)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        # progress bars are for terminals
        outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
        if cell.cell_type == "code":
            cell.outputs = outputs
    nbformat.write(notebook, DOCS / "quick-start.ipynb")


if __name__ == "__main__":
    main()
