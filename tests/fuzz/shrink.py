"""A smaller call that goes wrong in the same way."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.fuzz.calls import Call
from tests.support.cases import Case
from tests.support.decoding import Decoding

# What is left alone: who computes, and which numbers are drawn.
_KEPT = ("name", "dtype", "backend", "case", "wrong", "seed")


def shrink(call: Call, fails: Callable[[Call], bool], tries: int = 300, seconds: float = 60) -> Call:
    """The smallest that ``fails`` of those that are found by one simplification at a time, in so many tries and
    ``seconds``: on a GPU each may have to be compiled."""
    shrunk, stop = True, time.monotonic() + seconds
    while shrunk:
        shrunk = False
        for smaller in _smaller(call):
            if tries <= 0 or time.monotonic() > stop:
                return call
            tries -= 1
            if fails(smaller):
                call, shrunk = smaller, True
                break
    return call


def _smaller(call: Call) -> Iterator[Call]:
    """Calls that are simpler by one thing: first by much, then by little."""
    for change in _plainer(call):
        yield dataclasses.replace(call, **change)
    of_case = _of_decoding(call.case) if isinstance(call.case, Decoding) else _of_attention(call.case)
    for change in (*of_case, *_plainer(call.case), *_lower(call.case)):
        try:
            yield dataclasses.replace(call, case=dataclasses.replace(call.case, **change))
        except AssertionError:  # no case: its fields do not go together
            continue


def _plainer(value: Any) -> Iterator[dict[str, Any]]:
    """One field at its default."""
    for field in dataclasses.fields(value):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.name in (*_KEPT, "batch", "length", "keys", "room", "lengths") and isinstance(value, (Case, Decoding)):
            continue
        given = getattr(value, field.name)
        larger = type(given) is type(default) is int and given < default
        if default is not dataclasses.MISSING and field.name not in _KEPT and given != default and not larger:
            yield {field.name: default}
    if isinstance(value, Call) and len(value.planted) > 1:
        yield from ({"planted": (one,)} for one in value.planted)


def _lower(case: Case | Decoding) -> Iterator[dict[str, Any]]:
    """One number smaller: half of it, or one less."""
    for name in ("dim", "value_dim", "window", "heads", "new"):
        value = getattr(case, name, None)
        if value is not None and value > 1:
            shared = case.key_heads or 1
            fits = lambda n, name=name, shared=shared: name != "heads" or n % shared == 0
            yield from ({name: n} for n in dict.fromkeys((1, value // 2, value - 1)) if fits(n))
    if not case.key_heads or case.key_heads == case.heads == 1:
        return
    yield {"heads": case.heads // case.key_heads, "key_heads": 1}
    yield {"heads": 1, "key_heads": 1}


def _without(values: tuple[int, ...] | None, at: int) -> tuple[int, ...] | None:
    return None if values is None else (*values[:at], *values[at + 1 :])


def _capped(values: tuple[int, ...] | None, most: int) -> tuple[int, ...] | None:
    return None if values is None else tuple(min(n, most) for n in values)


def _of_attention(case: Case) -> Iterator[dict[str, Any]]:
    """Fewer sequences, shorter ones."""
    for at in range(case.batch if case.batch > 1 else 0):
        rest = {name: _without(getattr(case, name), at) for name in ("seqlens", "seqstarts")}
        yield {"batch": case.batch - 1, **rest}
    for at in range(len(case.packed or ()) if case.packed != (0,) else 0):
        yield {name: _without(getattr(case, name), at) or (0,) for name in ("packed",)} | (
            {} if case.packed_keys is None else {"packed_keys": _without(case.packed_keys, at) or (0,)}
        )
    if case.keys is not None and case.packed is None:
        yield {"keys": None} | {name: _capped(getattr(case, name), case.length) for name in ("seqlens", "seqstarts")}
    for name in ("length", "keys"):
        value = getattr(case, name)
        for n in dict.fromkeys((1, (value or 1) // 2, (value or 1) - 1)):
            if value is None or not 1 <= n < value:
                continue
            change: dict[str, Any] = {name: n}
            if name == "keys" or case.keys is None:
                change |= {ends: _capped(getattr(case, ends), n) for ends in ("seqlens", "seqstarts")}
            if case.packed is not None:
                change |= {ends: _capped(getattr(case, ends), n) for ends in ("packed", "packed_keys")}
            yield change


def _of_decoding(case: Decoding) -> Iterator[dict[str, Any]]:
    for at in range(len(case.lengths) if len(case.lengths) > 1 else 0):
        yield {"lengths": _without(case.lengths, at), "starts": _without(case.starts, at)}
    if case.page is None:
        rooms = (max(1, *case.lengths), case.room // 2, case.room - 1)
    else:
        rooms = (case.page, case.room - case.page)
        yield {"page": None}
    for room in dict.fromkeys(rooms):
        if 1 <= room < case.room:
            yield {"room": room, "lengths": _capped(case.lengths, room), "starts": _capped(case.starts, room)}
    for at, length in enumerate(case.lengths):
        for n in dict.fromkeys((0, 1, length // 2, length - 1)):
            if 0 <= n < length:
                yield {"lengths": (*case.lengths[:at], n, *case.lengths[at + 1 :])}
