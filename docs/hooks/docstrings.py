"""Docstrings as the site shows them: what they cite are links, and what is told of several names is told of each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from markdown.extensions.toc import slugify

DOCS = Path(__file__).resolve().parents[1]
ROLE = re.compile(r":(?:class|func|meth):`~?([\w.]+)`")
PAGE = re.compile(r"\bdocs/(\w+\.md)")
SECTION = re.compile(r"^(?:Args|Attributes|Raises|Warns):\n(?: {4}.*\n|\n)*", re.MULTILINE)
SEVERAL = re.compile(r"^ {4}([\w.]+(?:, [\w.]+)+): (.*\n(?: {5}.*\n)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is taken apart."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = shown(obj.docstring.value + "\n", obj)


def shown(text: str, obj: griffe.Object) -> str:
    """The docstring of ``obj`` in Markdown, with the names that griffe has for its sections."""

    def name(role: re.Match[str]) -> str:
        try:
            return f"[`{role[1]}`][{obj.resolve(role[1])}]"
        except griffe.NameResolutionError:
            return f"[`{role[1]}`][{role[1]}]"

    def page(path: re.Match[str]) -> str:
        title = (DOCS / path[1]).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        return f"[{path[0]}][{slugify(title, '-')}]"

    def each(entry: re.Match[str]) -> str:
        return "".join(f"    {name}: {entry[2]}" for name in entry[1].split(", "))

    text = PAGE.sub(page, ROLE.sub(name, text))
    text = SECTION.sub(lambda section: SEVERAL.sub(each, section[0]), text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
