"""Records go through torch.library as rows, and come out as they went in."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from flashlla.autograd import BACKWARD, DECODE_OUT, FORWARD, AdjointArguments
from flashlla.problem import Arguments, Forward, Gradients, Inputs, Report, Residuals, Settings
from flashlla.records import Row

pytestmark = pytest.mark.quick

Leaf = type("Leaf", (), {})


def leaves(count: int) -> tuple[Any, ...]:
    return tuple(Leaf() for _ in range(count))


@pytest.mark.parametrize("kind", [Inputs, Settings, Arguments, AdjointArguments, Forward, Gradients, Residuals, Report])
def test_a_row_comes_back_as_the_record_it_was(kind: type) -> None:
    row = Row(kind)
    flat = leaves(row.size)
    record = row.record(flat)
    assert type(record) is kind
    assert row.flat(record) == flat
    assert type(row.flat(record)) is tuple
    assert row.schema.count(", ") == row.size - 1


def test_leaves_go_by_their_names() -> None:
    row = Row(AdjointArguments)
    names = [leaf.split()[1] for leaf in row.schema.split(", ")]
    record = row.record(tuple(names))
    assert record.grad_o == "grad_o"
    for part in (record.inputs, record.residuals, record.settings):
        assert part == part._fields


def test_a_field_of_no_known_type_is_refused() -> None:
    class Wrong(NamedTuple):
        shape: torch.Size

    with pytest.raises(TypeError, match=r"Wrong\.shape: .* wanted a record or a type that operators take"):
        Row(Wrong)


def test_schemas_are_made_of_the_fields() -> None:
    for operator, kind in ((FORWARD, Arguments), (BACKWARD, AdjointArguments)):
        told = [argument.name for argument in operator.op._schema.arguments]
        assert told == [leaf.split()[1] for leaf in Row(kind).schema.split(", ")]
    assert len(FORWARD.op._schema.returns) == Row(Forward).size
    written = [a.name for a in DECODE_OUT.op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["out"]
