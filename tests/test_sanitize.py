"""What the sanitizers are to watch: every kernel. Its calls need no GPU to be made."""

from __future__ import annotations

import pytest

from benchmarks import sanitize
from tests.support import kernels


@kernels.interpreted
def test_what_is_watched_is_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.watched(["packed", "gram", "decode, pages", "share of a cache"], "cpu") == 0
    assert "not one less" in capsys.readouterr().out


@pytest.mark.quick
def test_each_tool_has_a_fault_to_find() -> None:
    assert sanitize.PLANTED.keys() == sanitize.TOOLS.keys()
