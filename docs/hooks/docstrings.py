"""Docstrings as the site shows them: Sphinx's roles are links, and what is told of several names is told of each."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?([\w.]+)`")
SECTION = re.compile(r"^(Args|Raises|Warns):\n((?:[ ]{4}.*\n|\n)*)", re.MULTILINE)
SEVERAL = re.compile(r"^    ([\w.]+(?:, [\w.]+)+): (.*\n(?:     .*\n)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is taken apart."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = shown(obj)


def shown(obj: griffe.Object) -> str:
    assert obj.docstring is not None

    def link(role: re.Match[str]) -> str:
        try:
            return f"[`{role[1]}`][{obj.resolve(role[1])}]"
        except griffe.NameResolutionError:
            return f"[`{role[1]}`][{role[1]}]"

    def each(entry: re.Match[str]) -> str:
        return "".join(f"    {name}: {entry[2]}" for name in entry[1].split(", "))

    text = ROLE.sub(link, obj.docstring.value + "\n")
    text = SECTION.sub(lambda section: SEVERAL.sub(each, section[0]), text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
