"""The short way: bit for bit what the long one gives, taken where it may be, and nothing lost on it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flashlla
from flashlla import again, autograd, lla_attention, values
from tests.support.interpreter import hasten
from tests.support.kernels import interpreted, make

hasten()
SHAPE = (1, 4, 40, 16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# By the kernels themselves where there is a GPU.
by_kernels = pytest.mark.gpu if DEVICE == "cuda" else interpreted


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Numbers are not looked at, as on a GPU; what is run the short way."""
    pytest.importorskip("triton")
    from flashlla.backends.triton.kept import KeptPlans

    again._cell.cache_clear()
    monkeypatch.setattr(again, "looked_at", lambda device: False)
    monkeypatch.setattr(autograd, "_kind", lambda *_: [None])  # operators keep nothing of their own
    runs: list[str] = []
    for name in ("forward", "backward"):
        run = getattr(KeptPlans, name)
        monkeypatch.setattr(KeptPlans, name, lambda *a, run=run, name=name: (runs.append(name), run(*a))[1])
    yield runs
    again._cell.cache_clear()


def _tensors(dtype: torch.dtype = torch.bfloat16, swapped: bool = False, seed: int = 0) -> list[Tensor]:
    """q, k, v, grad_o and a ridge a head; two query heads share one of keys."""
    q, k, v, grad_o = make(SHAPE, dtype, seed=seed, device=DEVICE)
    tensors = [q, k[:, :2].contiguous(), v[:, :2].contiguous(), grad_o]
    if swapped:
        tensors = [t.transpose(1, 2).contiguous() for t in tensors]
    return [*tensors, torch.linspace(0.5, 2, SHAPE[1], device=DEVICE)[:, None]]


def _step(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    q, k, v, grad_o, ridge = tensors
    leaves = [t.detach().requires_grad_() for t in (q, k, v, ridge)]
    o = lla_attention(*leaves[:3], ridge_lambda=leaves[3], **{"backend": "triton", **options})
    return [o.detach(), *torch.autograd.grad(o, leaves, grad_o)]


def _long(call: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(again, "attend", lambda *_: None)
        return call()


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "single": ({"dtype": torch.float32}, {}),
    "swapped": ({"swapped": True}, {"layout": "bshd"}),
    "window": ({}, {"window": 9, "tolerance": 1e-2}),
    "not causal": ({}, {"causal": False, "qk_scale": 0.2}),
    "pcg": ({}, {"solver": "pcg"}),
}


@by_kernels
@pytest.mark.parametrize("name", CALLS)
def test_the_bits_of_the_long_way(short: list[str], name: str) -> None:
    make_with, options = CALLS[name]
    for seed in (1, 2):
        tensors = _tensors(**make_with, seed=seed)
        want = _long(lambda t=tensors: _step(t, **options))
        assert short == []
        assert _same(_step(tensors, **options), want)
        assert short == ["forward", "backward"]
        with torch.no_grad():
            o = lla_attention(*tensors[:3], ridge_lambda=tensors[4], backend="triton", **options)
        assert torch.equal(o, want[0])
        assert short.pop() == "forward"
        short.clear()


@by_kernels
def test_a_ridge_that_is_a_number(short: list[str]) -> None:
    q, k, v, *_ = _tensors()
    for ridge in (2.0, 0.5, 2):
        o = lla_attention(q, k, v, ridge_lambda=ridge, backend="triton")
        assert torch.equal(o, _long(lambda r=ridge: lla_attention(q, k, v, ridge_lambda=r, backend="triton")))
    assert short == ["forward"] * 3


@by_kernels
def test_what_is_kept_is_not_for_calls_that_differ(short: list[str]) -> None:
    """By a call and a step of each, all of them beside one another."""
    q, k, v, grad_o, ridge = _tensors()
    wide, odd = torch.cat([q, q], -1)[..., :16], torch.cat([q.flatten()[:1], q.flatten()])[1:].view_as(q)
    others: list[list[Tensor]] = [
        [odd, k, v, grad_o, ridge], [q, k, v, grad_o, ridge], [wide, k, v, grad_o, ridge],
        [q[:, :, :33], k, v, grad_o[:, :, :33], ridge],
        [q, k[:, :, 1:], v[:, :, 1:], grad_o, ridge], [q, k, v[..., :9], grad_o[..., :9], ridge],
        [q, k, v, grad_o.mT.contiguous().mT, ridge], [q, k, v, grad_o, ridge.mT.contiguous().T],
        [q, k, v, grad_o, ridge[:, :, None].expand(1, 4, 1, 40)[:, :, 0]],
        [t.half() for t in (q, k, v, grad_o)] + [ridge],
    ]  # fmt: skip
    for _ in range(2):
        for tensors in others:
            assert _same(_step(tensors), _long(lambda t=tensors: _step(t)))
    assert len(short) == 4 * len(others)


@pytest.mark.quick
def test_no_check_is_lost(short: list[str]) -> None:
    """A call that is wrong is refused after one that was right and is equal to it to a dictionary, too."""
    q, k, v, _, ridge = _tensors(torch.float32)
    right: dict[str, Any] = {"ridge_lambda": ridge, "causal": True, "window": 5, "backend": "chunked"}
    lla_attention(q, k, v, **right)
    wrong: list[dict[str, Any]] = [
        {"causal": 1}, {"window": True}, {"window": 5.0}, {"return_info": 0}, {"layout": "sbhd"},
        {"backend": "none"}, {"solver": "none"}, {"qk_scale": float("nan")}, {"tolerance": 2.0}, {"ridge_lambda": None},
        {"ridge_lambda": -1.0}, {"ridge_lambda": True}, {"ridge_lambda": ridge[:3]}, {"ridge_lambda": ridge.int()},
        {"qk_scale": torch.ones((), device=DEVICE)}, {"cg_use_preconditioner": 0}, {"seqlens_k": 3}, {"other": 1},
    ]  # fmt: skip
    for change in wrong:
        for _ in range(2):
            with pytest.raises((TypeError, ValueError)) as error:
                lla_attention(q, k, v, **{**right, **change})
            assert next(iter(change)) in str(error.value)
    bad_tensors: list[tuple[str, Any]] = [("q", None), ("q", q[0, 0, 0]), ("q", q.double()), ("v", v.long())]
    for name, bad in (*bad_tensors, ("k", k[..., :8]), ("k", [1])):
        for _ in range(2):
            with pytest.raises((TypeError, ValueError)):
                lla_attention(**{"q": q, "k": k, "v": v, name: bad}, **right)


@by_kernels
def test_what_may_change_beside_the_call(short: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _tensors()

    def backend(**options: Any) -> str:
        lla_attention(*tensors[:3], ridge_lambda=tensors[4], **options)
        return flashlla.autograd._last_backend.name or ""

    for _ in range(2):
        with flashlla.set_backend("triton"):
            assert backend() == "triton"
        with flashlla.set_backend("chunked"):
            assert backend() == "chunked"
            assert backend(backend="triton_pcg") == "triton_pcg"
        monkeypatch.setenv("FLASHLLA_BACKEND", "naive")
        assert backend() == "naive"
        monkeypatch.setenv("FLASHLLA_BACKEND", "nobody")
        with pytest.raises(ValueError, match="FLASHLLA_BACKEND"):
            backend()
        monkeypatch.delenv("FLASHLLA_BACKEND")
    assert short == ["forward"] * 4


def test_a_backend_that_is_registered_later(short: list[str]) -> None:
    from flashlla.backends.chunked import Chunked

    class Mine(Chunked):
        name = "chunked"

        def forward(self, *call: Any) -> Any:
            found = super().forward(*call)
            return found._replace(o=found.o + 1)

    q, k, v, *_ = _tensors(torch.float32)
    call = lambda: lla_attention(q, k, v, backend="chunked")
    before = call()
    flashlla.register_backend(Mine(), overwrite=True)
    assert torch.equal(call(), before + 1)


@by_kernels
def test_numbers_are_looked_at_where_they_are(short: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _, ridge = _tensors()
    call = lambda: lla_attention(q, k, v, ridge_lambda=-ridge, backend="triton")
    call()
    monkeypatch.setattr(again, "looked_at", values.looked_at)
    monkeypatch.setenv("FLASHLLA_CHECK", "1")
    with pytest.raises(ValueError, match="ridge_lambda"):
        call()


@by_kernels
def test_who_counts_and_who_watches(short: list[str]) -> None:
    tensors = _tensors()
    step = lambda: _step(tensors)
    want = step()
    short.clear()
    with flashlla.ConvergenceCounter() as counter:
        assert _same(step(), want)
        assert counter.read().queries == 160
    with FlopCounterMode(display=False) as flops:
        assert _same(step(), want)
    assert flops.get_total_flops() > 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert _same(step(), want)
    assert {"flashlla::forward", "flashlla::backward"} <= {event.name for event in profile.events()}
    assert "forward" not in short


@by_kernels
def test_no_second_derivative(short: list[str]) -> None:
    q, k, v, _, ridge = _tensors()
    for swapped in (False, True):
        leaves = [t.detach().requires_grad_() for t in (q, k, v, ridge)]
        given = [t.transpose(1, 2) for t in leaves[:3]] if swapped else leaves[:3]
        o = lla_attention(*given, ridge_lambda=leaves[3], backend="triton", layout="bshd" if swapped else "bhsd")
        for leaf in leaves:
            (grad,) = torch.autograd.grad(o.sum(), leaf, create_graph=True)
            with pytest.raises(NotImplementedError, match="first derivative"):
                torch.autograd.grad(grad.sum(), leaves, allow_unused=True)
    assert "backward" not in short


@by_kernels
def test_writing_to_an_input_before_backward_is_noticed(short: list[str]) -> None:
    q, k, v, _, ridge = _tensors(swapped=True)
    leaves = [t.requires_grad_() for t in (q, k, v, ridge)]
    for i in range(4):
        given = [t.clone() for t in leaves]
        o = lla_attention(*given[:3], ridge_lambda=given[3], backend="triton", layout="bshd")
        o.mul_(1.0)  # a result may be written to
        with torch.no_grad():
            given[i].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()


@by_kernels
@pytest.mark.parametrize("first", ["short", "long", "counted"])
def test_checkpointing_may_come_back_the_other_way(short: list[str], first: str) -> None:
    """Which of the two is taken is nothing that the numbers or shapes of what is saved depend on."""
    q, k, v, grad_o, ridge = _tensors()
    want = _step([q, k, v, grad_o, ridge])
    leaves = [t.requires_grad_() for t in (q, k, v, ridge)]
    call = lambda *t: lla_attention(*t[:3], ridge_lambda=t[3], backend="triton")
    run = lambda: checkpoint(call, *leaves, use_reentrant=False)
    if first == "counted":
        with flashlla.ConvergenceCounter():
            o = run()
        grads = torch.autograd.grad(o, leaves, grad_o)
    elif first == "long":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            o = run()
        grads = torch.autograd.grad(o, leaves, grad_o)
    else:
        o = run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            grads = torch.autograd.grad(o, leaves, grad_o)
    assert _same([o.detach(), *grads], want)


@by_kernels
def test_what_hooks_give_back_may_lie_otherwise(short: list[str]) -> None:
    q, k, v, grad_o, ridge = _tensors()
    want = _step([q, k, v, grad_o, ridge])
    q = torch.cat([q, q], -1)[..., :16]
    otherwise = lambda t: t.mT.contiguous().mT if t.dim() == 4 else t
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), otherwise):
        leaves = [t.detach().requires_grad_() for t in (q, k, v, ridge)]
        o = lla_attention(*leaves[:3], ridge_lambda=leaves[3], backend="triton")
        grads = torch.autograd.grad(o, leaves, grad_o)
    for a, b in zip(grads, want[1:], strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert short[-1] == "backward"


@by_kernels
def test_autocast(short: list[str]) -> None:
    half, single = _tensors(), _tensors(torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert _same(_step(half), _long(lambda: _step(half)))
        q, k, v, _, ridge = single
        for _ in range(2):
            assert lla_attention(q, k, v, ridge_lambda=ridge, backend="triton").dtype == torch.bfloat16
            assert lla_attention(half[0], k, v, ridge_lambda=ridge, backend="triton").dtype == torch.bfloat16
    assert lla_attention(q, k, v, ridge_lambda=ridge, backend="triton").dtype == torch.float32
    with pytest.raises(TypeError, match="dtype"):
        lla_attention(half[0], k, v, ridge_lambda=ridge, backend="triton")


@by_kernels
@pytest.mark.parametrize("learned", [False, True])
def test_the_gradient_of_a_ridge_is_summed_where_it_is_wanted(short: list[str], learned: bool) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    q, k, v, grad_o, ridge = _tensors()
    o = lla_attention(q.requires_grad_(), k, v, ridge_lambda=ridge.requires_grad_(learned), backend="triton")
    with Seen():
        o.backward(grad_o)
    assert any("sum" in name for name in seen) == learned
    assert (ridge.grad is not None) == learned


@by_kernels
def test_some_gradients_and_transforms(short: list[str]) -> None:
    q, k, v, grad_o, ridge = _tensors()
    want = _step([q, k, v, grad_o, ridge])
    leaves = [q, k, v, ridge]
    for i in range(4):
        given = [t.detach().requires_grad_(i == j) for j, t in enumerate(leaves)]
        o = lla_attention(*given[:3], ridge_lambda=given[3], backend="triton")
        assert _same(list(torch.autograd.grad(o, given[i], grad_o)), [want[1 + i]])
    assert not lla_attention(q, k, v, ridge_lambda=2.0, backend="triton").requires_grad
    given = [t.detach().requires_grad_() for t in leaves]
    o = lla_attention(*given[:3], ridge_lambda=given[3], backend="triton")
    several = torch.autograd.grad(o, given, torch.stack([grad_o, grad_o]), is_grads_batched=True)
    assert all(torch.equal(a[0], b) and torch.equal(a[1], b) for a, b in zip(several, want[1:], strict=True))
    short.clear()
    _, pull = torch.func.vjp(lambda q, k, v, r: lla_attention(q, k, v, ridge_lambda=r, backend="triton"), *leaves)
    assert _same(list(pull(grad_o)), want[1:])
    assert short == []


def test_threads(short: list[str]) -> None:
    backend = "triton" if DEVICE == "cuda" else "chunked"  # the interpreter has one grid for all threads
    tensors = [_tensors(torch.float32, seed=seed) for seed in range(4)]
    want = [_step(t, backend=backend) for t in tensors]
    found: dict[int, list[Tensor]] = {}
    again._cell.cache_clear()
    run = lambda i: found.update({i: _step(tensors[i], backend=backend)})
    workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(_same(found[i], want[i]) for i in range(4))


@by_kernels
def test_kinds_are_not_piled_up(short: list[str]) -> None:
    assert again._cell.cache_info().maxsize == autograd.KINDS
    q, k, v, _, ridge = _tensors()
    for number in range(3):
        lla_attention(q, k, v, ridge_lambda=ridge * (1 + number), backend="triton")
    assert again._cell.cache_info().currsize == 1
