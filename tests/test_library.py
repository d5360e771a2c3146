"""Operators of records: eager calls go past torch's dispatcher, unless somebody is told there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashlla import lla_attention
from flashlla.autograd import BACKWARD, FORWARD

pytestmark = pytest.mark.quick


def _step(kind: Callable[[Tensor], Tensor] = lambda t: t) -> list[Tensor]:
    q, k, v = (kind(torch.randn(1, 2, 9, 4)).requires_grad_() for _ in range(3))
    return list(torch.autograd.grad(lla_attention(q, k, v, backend="naive").sum(), (q, k, v)))


class _Dispatched(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _Profiled(contextlib.AbstractContextManager[None]):
    def __init__(self, seen: list[str]) -> None:
        self.seen, self.profile = seen, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def __enter__(self) -> None:
        self.profile.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.profile.__exit__(*error)
        self.seen += [event.name.replace("::", ".") for event in self.profile.events()]


@pytest.mark.parametrize("watching", [_Dispatched, _Called, _Profiled])
@pytest.mark.parametrize("differentiated", [False, True])
def test_who_watches_sees_the_operators(watching: Any, differentiated: bool) -> None:
    seen: list[str] = []
    with torch.set_grad_enabled(differentiated), watching(seen):
        if differentiated:
            _step()
        else:
            lla_attention(*torch.randn(3, 1, 2, 9, 4).unbind(0), backend="naive")
    assert any("flashlla.forward" in what for what in seen)
    if differentiated and watching is not _Called:  # autograd calls no such mode
        assert any("flashlla.backward" in what for what in seen)


def test_a_subclass_of_tensor_sees_the_operators() -> None:
    seen: list[str] = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    _step(lambda t: t.as_subclass(Watched))
    assert any("flashlla.forward" in what for what in seen)


def test_nobody_else_pays_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with parameters, under autocast, or in inference mode."""

    def fail(*_: Any) -> None:
        raise AssertionError("a plain call came to the dispatcher")

    for operator in (FORWARD, BACKWARD):
        monkeypatch.setattr(operator, "op", fail)
    _step()
    _step(torch.nn.Parameter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _step()
    with torch.inference_mode():
        lla_attention(*torch.randn(3, 1, 2, 9, 4).unbind(0), backend="naive")


@pytest.mark.parametrize("operator", [FORWARD, BACKWARD])
def test_compiled_code_goes_past_torchs_way_to_what_runs(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[Any, ...]] = []
    run = operator.run
    monkeypatch.setattr(
        operator, "run", lambda arguments: (rows.append(operator.takes.flat(arguments)), run(arguments))[1]
    )
    _step()
    row = [x.detach() if isinstance(x, Tensor) else x for x in rows.pop()]
    found = operator.op(*row)
    assert len(rows) == 1
    with _Dispatched([]):  # who is told by the dispatcher
        told = operator.op(*row)
    assert len(rows) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, told))
