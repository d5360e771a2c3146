"""The table of versions is that of its record, and Pythons are found where they are."""

from __future__ import annotations

import sys

import pytest

from tests import matrix

pytestmark = pytest.mark.quick


def test_the_page_has_the_table_of_the_record() -> None:
    page = matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.written(page, matrix.read()) == page, "run python -m tests.matrix"
    assert matrix.read().keys() <= {row.name for row in matrix.ROWS}


def test_what_pytest_says_is_counted() -> None:
    said = "FAILED tests/test_a.py::test_b - Error\n1 failed, 22 passed, 3 skipped in 4.56s\n"
    assert matrix.outcome("quick", 1, said) == {
        "status": 1,
        "failed": 1,
        "passed": 22,
        "skipped": 3,
        "failures": ["tests/test_a.py::test_b"],
    }
    assert matrix.outcome("compile", 0, "1 passed") == {"status": 0}


def test_suites_of_the_same_versions_are_kept_together() -> None:
    versions = {"python": "3.12.1", **dict.fromkeys(matrix.SHOWN, "1.0")}
    before = {**versions, "quick": {"status": 0, "passed": 2}}
    assert matrix.joined(before, {**versions, "all": {"status": 1}}).keys() == {*versions, "quick", "all"}
    newer = {**versions, "torch": "2.0", "all": {"status": 1}}
    assert matrix.joined(before, newer) == newer
    assert matrix.joined({}, newer) == newer


def test_where_a_python_is() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert matrix.python_of(version, {version: sys.executable}) == sys.executable
    assert matrix.python_of("9.99", {}) is None
