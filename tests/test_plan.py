"""Plans of calls: what they are made for, and that a call by addresses is the call by tensors."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import PCG, lla_attention, lla_attention_varlen, lla_decode
from tests.support.interpreter import hasten
from tests.support.kernels import interpreted, make, step
from tests.support.replay import LAUNCHES, compiles

pytest.importorskip("triton")
hasten()


class _Kernel:
    """Stands for one of Triton's: what it compiles, and what it launches."""

    arg_names = ("x", "n", "scale", "BLOCK")
    __name__ = "kernel"

    def __init__(self) -> None:
        self.compiled: list[tuple[object, ...]] = []
        self.launches: list[tuple[object, ...]] = []

    def run(self, *arguments: object, grid: object, warmup: bool, **settings: object) -> object:
        assert warmup
        self.compiled.append(arguments)
        return _Binary(self)


class _Binary(dict[Any, Any]):
    """By every grid, what launches."""

    function = packed_metadata = None

    def __init__(self, kernel: _Kernel) -> None:
        self.run = self.kernel = kernel

    def __getitem__(self, grid: object) -> Callable[..., object]:
        return lambda *arguments: self.kernel.launches.append(arguments)


@pytest.mark.quick
def test_a_kernel_is_compiled_only_where_triton_would_compile_another() -> None:
    from flashlla.backends.triton.plan import Plan, layouts

    kernel, x = _Kernel(), torch.zeros(40)

    def compiles(x: Tensor | None = x, n: int = 7, scale: float = 0.5, block: int = 64, warps: int = 4) -> bool:
        before = len(kernel.compiled)
        plan = Plan(torch.device("cpu"), layouts([x]))
        plan.launch(kernel, "solve", (3,), plan.given[0], n, scale, BLOCK=block, num_warps=warps)
        plan.finished(()).run([x])
        assert kernel.launches[-1] == (None if x is None else x.data_ptr(), n, scale, block)
        return len(kernel.compiled) > before

    assert compiles()
    assert not compiles()
    assert not compiles(x=torch.ones(9), n=99, scale=2.0)
    others: list[dict[str, Any]] = [
        {"x": x[1:]}, {"x": x.half()}, {"x": None}, {"n": 1}, {"n": 16}, {"n": 2**31 + 1}, {"block": 32}, {"warps": 8},
    ]  # fmt: skip
    for other in others:
        assert compiles(**other)
        assert not compiles(**other)


@pytest.mark.quick
def test_what_a_plan_fills_in() -> None:
    from flashlla.backends.triton.plan import Layout, Plan, layouts

    kernel, given = _Kernel(), [torch.ones(4, 4)[:, 1:], None]
    plan = Plan(torch.device("cpu"), layouts(given))
    x, nothing = plan.given
    first, last = plan.memory(fill=0), plan.memory()
    a, b = plan.scratch(first, (3, 4), torch.float32), plan.scratch(first, (2,), torch.int32)
    c = plan.scratch(first, (2,), torch.float32)
    out = plan.output(Layout((3, 4), (1, 3), torch.float32, aligned=True), fill=7)
    record = (x, 1, 1.0, (b, 16))
    plan.launch(kernel, "solve", (3,), record, nothing, (1, (2.0, 3)), 64)
    plan.compute(lambda a, x, nothing: a.add_(x.t()) if nothing is None else None, a, x, nothing)
    plan.compute(Tensor.add_, out, a)
    plan.drop(last)
    plan.launch(kernel, "solve", (3,), c, record, b, 64)
    plan.finished([out])

    for _ in range(2):
        kernel.launches.clear()
        (found,) = plan.run(given)
        assert torch.equal(found, torch.full((3, 4), 8.0))
        assert found.stride() == (1, 3)
    (seen, none, constants, _), (late, again, at_b, _) = kernel.launches
    assert seen == again == (given[0].data_ptr(), 1, 1.0, (at_b, 16))
    assert [type(member) for member in seen] == [int, int, float, tuple]
    assert (none, constants) == (None, (1, (2.0, 3)))
    assert late % 16 == at_b % 16 == 0


def _step(shape: tuple[int, ...], dtype: torch.dtype, seed: int, **options: Any) -> list[Tensor]:
    tensors = make(shape, dtype, seed=seed)
    if options.pop("layout", "bhsd") == "bshd":
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    if options.pop("wide", False):  # rows that are no kernel's
        tensors = [t.mT.contiguous().mT for t in tensors]
    return list(step(tensors, 0.7, backend="triton", **options).values())


def _packed(dtype: torch.dtype, seed: int) -> list[Tensor]:
    q, k, v, grad_o = (t[0].transpose(0, 1) for t in make((1, 2, 40, 16), dtype, seed=seed))
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    edges = torch.tensor([0, 7, 7, 30], dtype=torch.int32)  # and ten tokens of no sequence
    o = lla_attention_varlen(q, k, v, cu_seqlens=edges, max_seqlen=25, ridge_lambda=0.7, backend="triton")
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), grad_o)]


def _decode(dtype: torch.dtype, seed: int, return_info: bool) -> list[Tensor]:
    q, k, v, _ = make((2, 2, 40, 16), dtype, seed=seed)
    lengths = torch.tensor([40, 9], dtype=torch.int32)
    found = lla_decode(q[:, :, :1], k, v.mT.contiguous().mT, lengths, backend="triton", return_info=return_info)
    return [found[0], *found[1]] if return_info else [found]


HALF, SINGLE = torch.bfloat16, torch.float32
CALLS: dict[str, Callable[[int], list[Tensor]]] = {
    "plain": lambda seed: _step((2, 2, 40, 16), HALF, seed),
    "single": lambda seed: _step((1, 2, 40, 16), SINGLE, seed),
    "layout": lambda seed: _step((1, 2, 40, 16), HALF, seed, layout="bshd"),
    "wide": lambda seed: _step((1, 2, 40, 16), HALF, seed, wide=True),
    "full": lambda seed: _step((1, 1, 40, 16), HALF, seed, causal=False),
    "starts": lambda seed: _step((2, 1, 40, 16), SINGLE, seed, seqstarts_k=torch.tensor([0, 5], dtype=torch.int32)),
    "gram": lambda seed: _step((1, 1, 70, 16), HALF, seed, solver=PCG(preconditioner="gram")),
    "packed": lambda seed: _packed(HALF, seed),
    "packed single": lambda seed: _packed(SINGLE, seed),
    "decode": lambda seed: _decode(HALF, seed, return_info=False),
    "decode info": lambda seed: _decode(SINGLE, seed, return_info=True),
}


@interpreted
@pytest.mark.parametrize("name", CALLS)
def test_a_call_by_addresses_is_the_call_by_tensors(
    monkeypatch: pytest.MonkeyPatch, poisoned_memory: None, name: str
) -> None:
    from flashlla.backends.triton import configs

    monkeypatch.setattr(configs, "SEGMENT", 64)
    by_tensors = [CALLS[name](seed) for seed in (1, 2)]
    compiles(monkeypatch)
    for seed, want in enumerate(by_tensors, start=1):
        LAUNCHES.clear()
        got = CALLS[name](seed)
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want, strict=True))
    assert LAUNCHES["by address"] > 0
    assert LAUNCHES["compiled"] == 0


@interpreted
@pytest.mark.parametrize("name", [name for name in CALLS if "decode" not in name])
@pytest.mark.filterwarnings("ignore::flashlla.ConvergenceWarning")  # of kernels that do nothing
def test_backwards_kernels_are_compiled_with_forwards(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from flashlla.backends.triton import configs, launch, plan, runtime

    monkeypatch.setattr(configs, "SEGMENT", 64)
    compiles(monkeypatch, computes=False)
    run, seen = plan.Plan.run, []
    monkeypatch.setattr(plan.Plan, "run", lambda *call: (seen.append(len(runtime.compiled)), run(*call))[1])
    CALLS[name](1)
    assert seen == [len(runtime.compiled)] * 2
    assert launch.plan_backward.cache_info().currsize == 1


@interpreted
@pytest.mark.filterwarnings("ignore::flashlla.ConvergenceWarning")
def test_without_gradients_backwards_kernels_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashlla.backends.triton import launch

    compiles(monkeypatch, computes=False)
    q, k, v, _ = make((1, 2, 40, 16), HALF)
    lla_attention(q, k, v, backend="triton")
    assert launch.plan_backward.cache_info().currsize == 0
    assert LAUNCHES["compiled"] == LAUNCHES["by address"]


@interpreted
def test_strides_along_dimensions_of_one_are_nobodys_business(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of one head decodes with the kernels of any such cache, whatever it was cut from."""
    compiles(monkeypatch, computes=False)

    def compiled(room: int) -> int:
        """By a call on tensors cut from others, of ``room`` sequences and tokens."""
        LAUNCHES.clear()
        q, k, v, ridge = torch.ones(room, 1, room, 16), *torch.ones(2, room, 1, 40, 16), torch.ones(room, 1, room)
        q, k, v, ridge = q[:1, :, :1], k[:1], v[:1], ridge[:1, :, :1]
        lengths = torch.ones(1, room, dtype=torch.int32)[:, 0] * 30
        lla_decode(q, k, v, lengths, ridge_lambda=ridge, backend="triton")
        return LAUNCHES["compiled"]

    assert compiled(1) > 0
    assert compiled(3) == compiled(16) == 0


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do nothing are launched by addresses, and numbers are not looked at; torch's own allocator, which a
    profiler sees."""
    from flashlla import again
    from flashlla.backends.triton import runtime

    compiles(monkeypatch, computes=False)
    monkeypatch.setattr(again, "looked_at", lambda device: False)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    again._cell.cache_clear()
    assert runtime.allocator(torch.device("cpu")) is not torch._C._dynamo.guards._empty_strided_cpu


@interpreted
@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_a_call_takes_of_the_host() -> None:
    """Launches, allocations and torch's other operators, beside those of autograd and of the ridge's checks."""
    from flashlla.backends.triton import launch
    from flashlla.dispatch import backend_named
    from flashlla.problem import Arguments, Inputs, describe
    from tests.test_compile import SETTINGS

    q, k, v, grad_o = make((1, 2, 40, 16), torch.bfloat16)
    inputs = Inputs(q, k, v, torch.ones(1, 2, 40))
    problem = describe(Arguments(inputs, SETTINGS._replace(solver_demanded=False)))
    backend = backend_named("triton")
    residuals = backend.forward(problem, inputs).residuals
    backend.backward(problem, inputs, residuals, grad_o)
    kept = backend.kept(problem, inputs)
    assert kept is not None
    kept.forward(*inputs[:4])

    def taken(call: Callable[[], Any]) -> dict[str, int]:
        LAUNCHES.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            call()
        found = Counter(event.name for event in profile.events() if event.name.startswith("aten::"))
        return {"launches": LAUNCHES["by address"], **found}

    # Nine outputs, five where nobody wants the report, and memory until the solve and until the end; four outputs, the
    # same, and one that begins with 0.
    assert taken(lambda: backend.forward(problem, inputs)) == {"launches": 4, "aten::empty_strided": 11}
    assert taken(lambda: kept.forward(*inputs[:4])) == {"launches": 4, "aten::empty_strided": 7}
    for call in (
        lambda: backend.backward(problem, inputs, residuals, grad_o),
        lambda: kept.backward((*inputs[:4], *residuals), grad_o),
    ):
        assert taken(call) == {"launches": 6, "aten::empty_strided": 7, "aten::fill_": 1}
    assert launch.plan_forward.cache_info().currsize == 2
    assert launch.plan_backward.cache_info().currsize == 1


@interpreted
@pytest.mark.usefixtures("as_on_a_gpu")
def test_how_much_code_a_call_runs() -> None:
    """Functions of this package, lambdas and comprehensions among them: what the host's time goes with."""
    q, k, v, grad_o = make((1, 2, 40, 16), torch.bfloat16)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)] + [torch.ones(2, 1, requires_grad=True)]
    forward = lambda: lla_attention(*leaves[:3], ridge_lambda=leaves[3], backend="triton")
    root = str(Path(flashlla.__file__).parent)

    def run(call: Callable[[], Any]) -> int:
        for _ in range(2):
            call()
        found: list[str] = []
        note = lambda frame, event, _: found.append(event) if frame.f_code.co_filename.startswith(root) else None
        sys.setprofile(note)
        try:
            call()
        finally:
            sys.setprofile(None)
        return found.count("call")

    with torch.no_grad():
        assert run(forward) <= 105
    assert run(lambda: torch.autograd.grad(forward(), leaves, grad_o)) <= 190


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_plans_make_what_a_backend_owes(packed: bool, dtype: torch.dtype) -> None:
    """Which is not looked at in each call."""
    from flashlla.backends.base import Backend
    from flashlla.calls import prepared
    from flashlla.dispatch import backend_named
    from flashlla.problem import describe

    q, k, v, grad_o = make((1, 4, 40, 16), dtype)
    q, grad_o = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, grad_o))
    edges = {"op": lla_attention_varlen, "cu_seqlens": torch.tensor([0, 7, 40], dtype=torch.int32)} if packed else {}
    ridge = torch.ones(4, 1)
    arguments = prepared(
        edges.pop("op", None), flashlla.explain, q, k[:, :2], v[:, :2], ridge_lambda=ridge, **edges
    ).arguments
    backend, problem = backend_named("triton"), describe(arguments)
    found = Backend.forward_checked(backend, problem, arguments.inputs)
    again = backend.forward_checked(problem, arguments.inputs)
    gradients = Backend.backward_checked(backend, problem, arguments.inputs, found.residuals, grad_o)
    assert all(t.is_contiguous() for t in (*again.residuals, *again.report, gradients.ridge_lambda))
    assert torch.equal(again.o, found.o)
