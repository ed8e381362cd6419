"""Settings of Sphinx: ``make docs`` makes one site of README, docs/ and the reference.

The sources are the repository, so that the links between pages are the same on GitHub and here.
A warning, such as a link without a target, ends it.
"""

import re
from typing import Any

from docutils.nodes import Element, SkipNode, document, literal
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.napoleon.docstring import GoogleDocstring

import augment
from augment import *  # noqa: F403  autodoc sees no names before they are imported

CONTENTS = {
    "Start": ["docs/quick-start", "docs/few-shot", "docs/imagenet-lt", "docs/your-loop"],
    "Mix": ["docs/rules", "docs/backbones", "docs/adapt", "docs/filters", "docs/measuring"],
    "Run": ["docs/shards", "docs/jobs", "docs/training"],
    "Figures": ["RESULTS", "BENCHMARKS"],
    "Look up": ["docs/glossary", "docs/papers", "docs/licences", "CHANGELOG"],
    "Develop": [".github/CONTRIBUTING"],
    "Reference": ["docs/reference/*"],
}
"""The pages by parts, in their order."""

project, release, author = "latent-augment", augment.__version__, "the latent-augment authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = "README"
include_patterns = ["*.md", ".github/CONTRIBUTING.md", "docs/*.md", "docs/reference/*.rst"]
html_theme, html_title = "furo", f"latent-augment {release}"
html_show_copyright = html_show_sphinx = html_copy_source = False
html_math_renderer = "mathml"
copybutton_exclude = ".linenos, .gp, .go"  # neither prompts nor output
myst_heading_anchors = 4
default_role = "py:obj"
autodoc_default_options = {"members": True, "imported-members": True}
autodoc_default_options |= {"special-members": "__call__", "no-value": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"


def add_contents(_: Sphinx, name: str, source: list[str]) -> None:
    """Add the table of contents, which GitHub should not show, to the README."""
    for part, pages in CONTENTS.items() if name == root_doc else ():
        options = f":caption: {part}\n:hidden:\n:glob:\n:titlesonly:\n"
        source[0] += f"\n```{{toctree}}\n{options}\n" + "\n".join(pages) + "\n```\n"


def link_names(app: Sphinx, tree: document) -> None:
    """Link public names in the code of pages to the reference."""
    for code in list(tree.findall(literal)):
        if (name := code.astext()) in augment.__all__ and code.parent.tagname == "paragraph":
            where = {"refdoc": app.env.docname, "refdomain": "py", "reftype": "obj"}
            target = pending_xref("", code.deepcopy(), reftarget=f"augment.{name}", **where)
            code.replace_self(target)


def find_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> Element | None:
    """Find a public name that a docstring has without its module."""
    python, name = env.get_domain("py"), node["reftarget"]
    found = [known for known in python.objects if known.endswith(f".{name}")]
    if node.get("refdomain") != "py" or not found:
        return None
    return python.resolve_xref(
        env, node["refdoc"], app.builder, "obj", min(found, key=len), node, content
    )


def simplify(_: Sphinx, *args: Any) -> tuple[str, str] | None:
    """Drop private arguments of a signature, and write defaults as Python that can be read."""
    signature, returns = args[-2:]
    if signature is None:
        return None
    signature = re.sub(r", _\w+: [^=]+= <factory>", "", signature).replace("<factory>", "...")
    return re.sub(r"device\(type=('\w+')\)", r"\1", signature), returns


def add_math(writer, node: Element, block: bool) -> None:
    """Write a formula as MathML, which needs no script."""
    writer.body.append(tex2mathml(node.astext(), as_block=block))
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Connect the functions."""
    app.connect("source-read", add_contents)
    app.connect("doctree-read", link_names)
    app.connect("missing-reference", find_name)
    app.connect("autodoc-process-signature", simplify)
    # the words before a colon are no type: types are in the code
    GoogleDocstring._parse_attribute_docstring = GoogleDocstring._consume_to_end
    app.add_html_math_renderer(
        "mathml",
        (lambda writer, node: add_math(writer, node, False), None),
        (lambda writer, node: add_math(writer, node, True), None),
    )
