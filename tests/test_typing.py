"""What a type checker says of calls: right ones pass, a misspelt keyword or a wrong type does not."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from flashlla import api, calls, options

ROOT = Path(__file__).resolve().parents[1]
CALLS = ROOT / "tests" / "typing" / "calls.py"


def test_mypy_tells_right_calls_from_wrong_ones() -> None:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--no-pretty", str(CALLS)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    found = {(int(m[1]), m[2]) for m in re.finditer(r"calls\.py:(\d+): error: .*\[([a-z-]+)\]$", said, re.MULTILINE)}
    lines = enumerate(CALLS.read_text(encoding="utf-8").splitlines(), 1)
    wanted = {(number, line.split("# error: ")[1]) for number, line in lines if "# error: " in line}
    assert found == wanted, said


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        (api.lla_attention, options.AttentionOptions),
        (api.lla_attention_varlen, options.VarlenOptions),
        (api.lla_decode, options.DecodeOptions),
    ],
    ids=lambda x: x.__name__,
)
def test_overloads_have_the_arguments_of_the_signature(op: typing.Any, kind: type) -> None:
    types = typing.get_type_hints(op)
    keywords = [p.name for p in inspect.signature(op).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert typing.get_type_hints(kind) == {name: types[name] for name in keywords if name not in ("return_info", "out")}


def test_whoever_takes_any_call_takes_every_argument() -> None:
    decode = inspect.signature(api.lla_decode).parameters.values()
    names = {p.name for p in decode if p.kind is p.KEYWORD_ONLY and p.name not in ("return_info", "out")}
    names |= set(typing.get_type_hints(options.AttentionOptions)) | set(typing.get_type_hints(options.VarlenOptions))
    assert set(typing.get_type_hints(options.AnyOptions)) == names


@pytest.mark.parametrize("op", [api.lla_attention, api.lla_attention_varlen, api.lla_decode], ids=lambda x: x.__name__)
def test_a_default_is_the_same_wherever_it_stands(op: typing.Any) -> None:
    wanted = inspect.signature(api.lla_attention).parameters
    published = inspect.signature(calls.LLAFunction.apply).parameters
    for name, parameter in inspect.signature(op).parameters.items():
        for other in (wanted, published):
            if name in other and inspect.Parameter.empty not in (parameter.default, other[name].default):
                assert parameter.default == other[name].default, name
