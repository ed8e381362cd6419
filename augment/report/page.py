"""One HTML file of all that was gathered: no file beside it, no network, no script but its own.

The page's parts are ``page.html``, ``page.css`` and ``page.js`` in this folder. Whatever comes from
a bank is escaped: as text in the HTML, or in a JSON block that only `JSON.parse` reads. A policy
(CSP) with the digests of style and script lets nothing else run, and nothing be fetched.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from augment.bank.format import Reject
from augment.measure.health import Finding

REJECTS = 100
"""Images that were left out and are listed."""

MARKS = {"good": ("✓", "Good"), "warning": ("▲", "Warning")}
"""Of the levels of findings, as they are seen and heard."""


def assemble(parts: dict[str, str], data: dict[str, Any]) -> bytes:
    """The page.

    Args:
        parts: HTML by the names in ``page.html``.
        data: what ``page.js`` shows, plain.
    """
    html, css, js = (
        (files("augment.report") / f"page.{kind}").read_text("utf-8")
        for kind in ("html", "css", "js")
    )
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = f"default-src 'none'; img-src data:; style-src {digest(css)}; script-src {digest(js)}"
    policy += "; base-uri 'none'; form-action 'none'"
    known = {**parts, "css": css, "js": js, "data": text, "policy": policy}
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: known[found[1]], html)
    return page.encode("utf-8", "replace")  # names of files may be no UTF-8


def digest(text: str) -> str:
    """What a policy calls a style or script that is in the page."""
    sha = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{sha}'"


def finding_items(found: Iterable[Finding]) -> str:
    """Findings as the items of a list."""
    return "".join(
        f'<li class="{level}"><span class="mark" aria-hidden="true">{MARKS[level][0]}</span>'
        f'<span class="unseen">{MARKS[level][1]}: </span><strong>{escape(topic)}.</strong> '
        f"{escape(text)}</li>"
        for level, topic, text in found
    )


def facts_list(facts: dict[str, str]) -> str:
    """Names and values as a list of definitions."""
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )


def paragraphs(sentences: Iterable[str]) -> str:
    """A paragraph for each."""
    return "".join(f"<p>{escape(words)}</p>" for words in sentences)


def rejects_section(rejects: Sequence[Reject]) -> str:
    """The images that were left out of the bank, and why."""
    if not rejects:
        return "<p>None: every image of the source is in the bank.</p>"
    rows = "".join(
        f"<tr><td>{escape(r.id)}</td><td>{escape(r.reason)}</td></tr>" for r in rejects[:REJECTS]
    )
    more = len(rejects) - REJECTS
    rest = f"<p>and {more} more, see rejects.jsonl in the bank.</p>" if more > 0 else ""
    head = "<thead><tr><th scope=col>image</th><th scope=col>reason</th></tr></thead>"
    return f'<table class="plain">{head}<tbody>{rows}</tbody></table>{rest}'


def code_block(title: str, text: str) -> str:
    """A command or settings, which a button copies."""
    return (
        f'<figure class="code"><figcaption>{escape(title)}'
        '<button type="button" class="copy">Copy</button></figcaption>'
        f'<pre tabindex="0">{escape(text)}</pre></figure>'
    )


def settings_block(title: str, settings: dict[str, Any]) -> str:
    """Settings as JSON, folded."""
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    return (
        f"<details><summary>{escape(title)}</summary>"
        f'<pre tabindex="0">{escape(text)}</pre></details>'
    )
