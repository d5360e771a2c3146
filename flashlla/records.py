"""Records: what goes through the package by name goes through torch.library by position.

A record is a NamedTuple whose fields are tensors, numbers, names or records. Operators of torch.library take and give
flat rows of these. Here, and nowhere else, a record becomes a row, a row a record, and a record's fields the schema of
the operator that takes it.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

R = TypeVar("R", bound=tuple[Any, ...])

# What a field's type is called in a schema. Numbers of tokens may be symbols while torch.compile traces.
_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    str: "str",
    str | None: "str?",
    tuple[float, ...]: "float[]",
}


class Row(Generic[R]):
    """How records of one kind lie in a flat row.

    Example:
        >>> from typing import NamedTuple
        >>> class Point(NamedTuple):
        ...     x: float
        ...     y: float
        >>> class Named(NamedTuple):
        ...     name: str
        ...     point: Point
        >>> row = Row(Named)
        >>> row.schema, row.size
        ('str name, float x, float y', 3)
        >>> row.flat(Named("here", Point(1.0, 2.0)))
        ('here', 1.0, 2.0)
        >>> row.record(("here", 1.0, 2.0)).point.y
        2.0
    """

    def __init__(self, kind: type[R]) -> None:
        # Of all members at once, without the call in Python that ``kind`` itself is.
        self._make: Callable[[Iterable[Any]], R] = functools.partial(tuple.__new__, kind)
        # Of every field the row of the record that it is, None if it is none, and where it begins and ends.
        self.parts: list[tuple[Row[Any] | None, int, int]] = []
        self.size = 0
        spelled: list[str] = []
        for name, field in typing.get_type_hints(kind).items():
            if field not in _SCHEMA and not hasattr(field, "_fields"):
                raise TypeError(f"{kind.__name__}.{name}: got {field}, wanted a record or a type that operators take")
            nested: Row[Any] | None = None if field in _SCHEMA else Row(field)
            stop = self.size + (1 if nested is None else nested.size)
            self.parts.append((nested, self.size, stop))
            spelled.append(f"{_SCHEMA[field]} {name}" if nested is None else nested.schema)
            self.size = stop
        self.schema: str = ", ".join(spelled)
        # Where tensors may be.
        self.tensors = [i for i, field in enumerate(self.schema.split(", ")) if field.startswith("Tensor")]
        self.plain = self.size == len(self.parts)  # no field is a record

    def filled(self, value: Any) -> R:
        """The record that has ``value`` everywhere."""
        return self.record((value,) * self.size)

    def flat(self, record: R) -> tuple[Any, ...]:
        """The row of ``record``."""
        if self.plain:
            return tuple(record)
        row: list[Any] = []
        for value, (nested, _, _) in zip(record, self.parts):
            if nested is None:
                row.append(value)
            else:
                row.extend(nested.flat(value))
        return tuple(row)

    def record(self, row: Sequence[Any]) -> R:
        """The record of ``row``: the inverse of :meth:`flat`."""
        if self.plain:
            return self._make(row)
        return self._make(
            [row[start] if nested is None else nested.record(row[start:stop]) for nested, start, stop in self.parts]
        )
