"""docs/backends.md says of every backend what the backend says of itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from flashlla.backends.chunked import Chunked

pytestmark = pytest.mark.quick

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "support_table.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_backends_answer(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.written(page) == page, "run python docs/support_table.py"


def test_an_answer_that_changes_shows(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = script.table()
    reason = "it takes no window; try window=None"
    monkeypatch.setattr(Chunked, "unsupported", lambda self, problem: reason if problem.mask.window else None)
    after = script.table()
    assert reason in after
    assert len(after.splitlines()) == len(before.splitlines()) + 1
    (row,) = (line for line in after.splitlines() if line.startswith("| `window`"))
    assert "no (" in row.split("|")[4]
