"""docs/architecture.md is true: the files it lists are those there are, and imports go the way it says."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from flashlla import api, autograd, validation
from flashlla.backends.base import Backend
from flashlla.dispatch import all_backends
from flashlla.problem import Arguments, Inputs
from tests.support.helpers import interpreted

pytestmark = pytest.mark.quick

PACKAGE = Path(api.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
MODULES = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in FILES}
# Rooms by name, and on which line of the page they stand.
LINES = PAGE.split("## Who may import whom")[1].split("\n    ")[1:]
ROOMS = {room: number for number, line in enumerate(LINES) for room in line.split("\n\n")[0].split()}


def room_of(module: str) -> str:
    """The room with the longest name that ``module`` is, or is in."""
    inside = [room for room in ROOMS if module == room or module.startswith(f"{room}.")]
    assert inside, f"{module} has no line in docs/architecture.md"
    return max(inside, key=len)


def imports(file: str) -> Iterator[str]:
    """Modules of the package that ``file`` imports, also inside functions and for types alone."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name.partition("flashlla.")[2] or "__init__" for a in node.names if "flashlla" in a.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flashlla":
            package = (node.module or "").partition("flashlla.")[2]
            for alias in node.names:
                module = f"{package}.{alias.name}".removeprefix(".")
                yield module if module in MODULES else package or "__init__"


def test_the_table_lists_every_file() -> None:
    assert sorted(re.findall(r"^\| `([\w/]+\.py)` \| \S", PAGE, re.MULTILINE)) == FILES


@pytest.mark.parametrize("module", [module for module in MODULES if module != "backends"])
def test_imports_go_down(module: str) -> None:
    room = room_of(module)
    for imported in imports(MODULES[module]):
        if imported not in ("backends", "ops"):  # packages that hold nothing themselves
            there = room_of(imported)
            assert there == room or ROOMS[there] > ROOMS[room], f"{module} imports {imported}"


def test_no_file_is_longer_than_a_person_reads() -> None:
    lengths = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {file: length for file, length in lengths.items() if length > 600} == {}


def test_q_can_be_followed_by_name() -> None:
    """From the signature to a backend every hand-over is typed, and the one operator between names what it runs."""
    for prepare in (validation.prepare, validation.prepare_varlen, validation.prepare_decode):
        assert prepare.__annotations__["q"] == "Tensor"
        assert prepare.__annotations__["return"] == "Call"
        assert "q=q" in inspect.getsource(prepare)
    assert typing.get_type_hints(validation.Call)["arguments"] is Arguments
    assert typing.get_type_hints(Arguments)["inputs"] is Inputs
    assert typing.get_type_hints(Inputs)["q"] is Tensor
    for operator, run in ((autograd.FORWARD, autograd._run_forward), (autograd.DECODE, autograd._run_decode)):
        assert operator.run is run
        assert typing.get_type_hints(run)["arguments"] is Arguments
    for backend in all_backends():
        for method in (Backend.forward, type(backend).forward, type(backend).decode):
            assert typing.get_type_hints(method)["inputs"] is Inputs


def by_position(source: str) -> Iterator[int]:
    """Lines that take a record's fields by where they stand: ``inputs[:3]``, ``residuals[0]``, ``q, *_ = inputs``."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(ast.Name(name) | ast.Attribute(attr=name), ast.Slice() | ast.Constant()):
                if name in ("inputs", "residuals", "settings"):
                    yield node.lineno
            case ast.Starred(ast.Name("_"), ast.Store()):
                yield node.lineno


def test_no_record_goes_by_position() -> None:
    offenders = ("x = inputs[:3]", "x = call.residuals[0]", "q, *_ = inputs", "for q, *_ in calls: pass")
    assert all(list(by_position(line)) == [1] for line in offenders)
    found = {file: list(by_position((PACKAGE / file).read_text(encoding="utf-8"))) for file in FILES}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_q_can_be_followed_into_the_kernels_launch(direction: str) -> None:
    if not any(interpreted(backend) for backend in all_backends()):
        pytest.importorskip("triton")
    from flashlla.backends.triton import launch

    assert typing.get_type_hints(getattr(launch, direction))["inputs"] is Inputs
