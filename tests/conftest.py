"""What all tests share: a clean dispatcher, poisoned memory, figures at the end of a run."""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported. Kernels then run in its interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; threads that wait for one another's core take forever

from collections.abc import Callable, Iterator

import pytest

from flashlla import again, dispatch, notices, solvers
from tests.support.poison import poisoned


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def clean_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with no preferred backend and no warning given; what it registers is forgotten."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_backends", list(dispatch._backends))
    monkeypatch.setattr(solvers, "_named", dict(solvers._named))
    monkeypatch.setattr(solvers, "_unnamed", dict(solvers._unnamed))
    preference = dispatch._preference.set(None)
    notices.forget()
    again._cell.cache_clear()
    if plan := sys.modules.get("flashlla.backends.triton.plan"):
        plan.forget()  # its configs may be a test's own
    yield
    dispatch._preference.reset(preference)
    notices.forget()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory holds NaN: whoever reads what was never written shows it."""
    with poisoned():
        yield


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Call it with a line to print at the end of the run (also from a worker of pytest-xdist)."""
    return lambda line: record_property("figure", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for outcome in ("passed", "failed") for r in terminalreporter.stats.get(outcome, [])]
    lines = sorted(line for r in reports for name, line in getattr(r, "user_properties", ()) if name == "figure")
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
