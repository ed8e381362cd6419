"""One HTML file of all that was gathered: no file beside it, no network, no script but its own.

The page's parts are ``page.html``, ``page.css`` and ``page.js`` in this folder. Whatever comes from
a bank is escaped: as text in the HTML, or in a JSON block that only `JSON.parse` reads. A policy
(CSP) with the digests of style and script lets nothing else run, and nothing be fetched.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

from augment.bank.format import Reject
from augment.measure.health import Finding

MAX_REJECTS = 100
"""Maximum number of left out images that are listed."""

MARKS = {"good": ("✓", "Good"), "warning": ("▲", "Warning")}
"""Mark and name of each level of findings, for those who see and those who listen."""


def assemble(parts: dict[str, str], data: Mapping[str, object]) -> bytes:
    """Put the page together.

    Args:
        parts: HTML by the names in ``page.html``.
        data: what ``page.js`` shows, for JSON.
    """
    html, css, js = (
        (files("augment.report") / f"page.{kind}").read_text("utf-8")
        for kind in ("html", "css", "js")
    )
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(css)}; script-src {_digest(js)}"
    )
    policy += "; base-uri 'none'; form-action 'none'"
    parts = {**parts, "css": css, "js": js, "data": text, "policy": policy}
    page = re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], html)
    return page.encode("utf-8", "replace")  # names of files may be no UTF-8


def _digest(text: str) -> str:
    """Return the name, in a policy, of a style or script that is in the page."""
    sha = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{sha}'"


def finding_items(findings: Iterable[Finding]) -> str:
    """Return findings as the items of a list."""
    return "".join(
        f'<li class="{level}"><span class="mark" aria-hidden="true">{MARKS[level][0]}</span>'
        f'<span class="unseen">{MARKS[level][1]}: </span><strong>{escape(topic)}.</strong> '
        f"{escape(text)}</li>"
        for level, topic, text in findings
    )


def facts_list(facts: dict[str, str]) -> str:
    """Return names and values as a list of definitions."""
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )


def paragraphs(sentences: Iterable[str]) -> str:
    """Return a paragraph of each sentence."""
    return "".join(f"<p>{escape(words)}</p>" for words in sentences)


def rejects_section(rejects: Sequence[Reject]) -> str:
    """Return a table of the images that were left out of the bank, and why."""
    if not rejects:
        return "<p>None: every image of the source is in the bank.</p>"
    rows = "".join(
        f"<tr><td>{escape(r.id)}</td><td>{escape(r.reason)}</td></tr>"
        for r in rejects[:MAX_REJECTS]
    )
    more = len(rejects) - MAX_REJECTS
    rest = f"<p>and {more} more, see rejects.jsonl in the bank.</p>" if more > 0 else ""
    head = "<thead><tr><th scope=col>image</th><th scope=col>reason</th></tr></thead>"
    return f'<table class="plain">{head}<tbody>{rows}</tbody></table>{rest}'


def code_block(title: str, text: str) -> str:
    """Return a command or settings, which a button copies."""
    return (
        f'<figure class="code"><figcaption>{escape(title)}'
        '<button type="button" class="copy">Copy</button></figcaption>'
        f'<pre tabindex="0">{escape(text)}</pre></figure>'
    )


def settings_block(title: str, settings: Mapping[str, object]) -> str:
    """Return settings as JSON, folded."""
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    return (
        f"<details><summary>{escape(title)}</summary>"
        f'<pre tabindex="0">{escape(text)}</pre></details>'
    )
