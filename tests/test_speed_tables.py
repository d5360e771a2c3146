"""README.md and docs/performance.md show what was recorded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.quick

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "speed_tables.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("speed_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_records(script: ModuleType) -> None:
    found = set()
    for path in script.PAGES:
        page = path.read_text(encoding="utf-8")
        assert script.written(page) == page, "run python docs/speed_tables.py"
        found |= {block[2] for block in script.BLOCK.finditer(page)}
    assert found == set(script.recorded())


def test_a_figure_that_changes_shows(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    record = script.record

    def faster(name: str) -> dict:
        found = record(name)
        for line in found.get("lines", []):
            line.update({key: line[key] / 2 for key in ("ratio", "graph_ratio") if key in line})
        return found

    page = (script.ROOT / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(script, "record", faster)
    assert script.written(page) != page
