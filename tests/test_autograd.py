"""The operators in autograd: what has a derivative, and where backward may run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flashlla
from flashlla import again, autograd, lla_attention, lla_attention_varlen
from flashlla.autograd import AdjointArguments, backward, forward
from flashlla.backends.base import Backend
from flashlla.calls import prepared
from flashlla.problem import Gradients
from tests.support.helpers import cu, every_backend, normal, qkv, skip_if_refused
from tests.support.interpreter import hasten
from tests.support.kernels import interpreted, make

pytestmark = pytest.mark.quick


def test_a_second_derivative_is_refused():
    q, k, v = (t.requires_grad_() for t in qkv(1, 5, 4))
    (grad,) = torch.autograd.grad(lla_attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivative only"):
        torch.autograd.grad(grad.sum(), q)


def test_backward_may_be_called_from_another_thread():
    q, k, v = (t.requires_grad_() for t in qkv(1, 5, 4))
    o = lla_attention(q, k, v, backend="naive")
    thread = threading.Thread(target=lambda: o.sum().backward())
    thread.start()
    thread.join()
    assert q.grad is not None


@pytest.mark.parametrize("differentiate", [torch.func.jacfwd, torch.func.hessian])
def test_forward_mode_is_refused(differentiate):
    q, k, v = qkv(1, 5, 4)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        differentiate(lambda q: lla_attention(q, k, v).sum())(q)


@every_backend
def test_only_what_is_wanted(backend: Backend) -> None:
    """One differentiable input of the four at a time gets the gradient that it gets together with the others."""
    leaves = [normal(1, 2, 9, 4, seed=i, dtype=torch.float32) for i in range(3)]
    leaves.append(normal(2, 9, seed=3, dtype=torch.float32).exp())
    grad_o = normal(1, 2, 9, 4, seed=4, dtype=torch.float32)
    skip_if_refused(backend, *leaves[:3], ridge_lambda=leaves[3])

    def gradients(wanted: set[int]) -> list[Tensor | None]:
        given = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        flashlla.lla_attention(*given[:3], ridge_lambda=given[3], backend=backend.name).backward(grad_o)
        return [t.grad for t in given]

    together = gradients({0, 1, 2, 3})
    for i in range(4):
        alone = gradients({i})
        assert [g is not None for g in alone] == [j == i for j in range(4)]
        torch.testing.assert_close(alone[i], together[i])


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_keys_before_they_are_rounded(backend: Backend, packed: bool) -> None:
    """For who adds them to others; rounded, they are those that autograd gives."""
    q, k, v = qkv(1, 2, 20, 16, dtype=torch.float16, seed=1)
    options = {"op": lla_attention_varlen, "cu_seqlens": cu(0, 7, 7, 18)} if packed else {}
    arguments = prepared(options.pop("op", None), flashlla.explain, q, k, v, **options).arguments
    arguments = arguments._replace(settings=arguments.settings._replace(backend=backend.name))
    with torch.no_grad():
        found = forward(arguments)
        adjoint = AdjointArguments(
            qkv(1, 2, 20, 16, dtype=torch.float16)[0], arguments.inputs, found.residuals, arguments.settings,
            unrounded=False,
        )  # fmt: skip
        rounded, unrounded = backward(adjoint), backward(adjoint._replace(unrounded=True))
    for name, dtype in zip(Gradients._fields, (torch.float16, torch.float32, torch.float32, torch.float32)):
        assert getattr(unrounded, name).dtype == dtype
        assert getattr(unrounded, name).stride() == getattr(rounded, name).stride()
        assert torch.equal(getattr(unrounded, name).to(getattr(rounded, name).dtype), getattr(rounded, name)), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    arguments = [t.requires_grad_() for t in qkv(2, 3, 9, 4, dtype=torch.float64)]
    loss = lambda q, k, v: lla_attention(q, k, v, ridge_lambda=0.5, solver="direct").sin().sum()
    expected = torch.autograd.grad(loss(*arguments), arguments)
    checkpoint(loss, *arguments, use_reentrant=reentrant).backward()
    for t, grad in zip(arguments, expected):
        assert torch.equal(t.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_follows_sdpa(dtype):
    q, k, v = (t.requires_grad_() for t in qkv(2, 3, 9, 4, dtype=dtype))
    ridge = torch.full((3, 1), 0.5, dtype=torch.float64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = flashlla.lla_attention(q, k, v, ridge_lambda=ridge)
        assert o.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype
        o.float().sum().backward()  # inside: autocast is on while the operators run, and must not reach into them
    assert q.grad.dtype == dtype
    assert ridge.grad.dtype == torch.float64
    plain = q.dtype if dtype == torch.float64 else torch.bfloat16
    assert torch.equal(o, flashlla.lla_attention(*(t.to(plain) for t in (q, k, v)), ridge_lambda=ridge))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Numbers are not looked at, as on a GPU; what operators run by what a backend has kept."""
    pytest.importorskip("triton")
    from flashlla.backends.triton.kept import KeptPlans

    autograd._cell.cache_clear()
    monkeypatch.setattr(autograd, "looked_at", lambda device: False)
    monkeypatch.setattr(again, "attend", lambda *_: None)
    runs: list[str] = []
    for name in ("reported", "backward"):
        run = getattr(KeptPlans, name)
        monkeypatch.setattr(KeptPlans, name, lambda *a, run=run, name=name: (runs.append(name), run(*a))[1])
    yield runs
    autograd._cell.cache_clear()


def _step(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The output, the report and the gradients, by the operators."""
    q, k, v, grad_o, ridge = tensors
    leaves = [t.detach().requires_grad_() for t in (q, k, v, ridge)]
    o, info = lla_attention(*leaves[:3], ridge_lambda=leaves[3], return_info=True, **{"backend": "triton", **options})
    told = [info.omega, info.iterations, info.residual, info.converged]
    return [o.detach(), *told, *torch.autograd.grad(o, leaves, grad_o)]


def _anew(call: Callable[[], list[Tensor]]) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "_kind", lambda *_: [None])
        return call()


@pytest.mark.slow
@interpreted
def test_what_an_operator_keeps_gives_the_same_bits_and_is_for_calls_alike(kept: list[str]) -> None:
    """By a call and a step of each, all of them beside one another."""
    hasten()
    q, k, v, grad_o = make((1, 2, 20, 16), torch.bfloat16)
    ridge = torch.linspace(0.5, 2, 2)[:, None]
    wide, odd = torch.cat([q, q], -1)[..., :16], torch.cat([q.flatten()[:1], q.flatten()])[1:].view_as(q)
    alike: list[tuple[list[Tensor], dict[str, Any]]] = [
        ([q, k, v, grad_o, ridge], {}), ([odd, k, v, grad_o, ridge], {}), ([wide, k, v, grad_o, ridge], {}),
        ([q[:, :, :17], k, v, grad_o[:, :, :17], ridge], {}), ([q, k[:, :, 1:], v[:, :, 1:], grad_o, ridge], {}),
        ([q, k, v[..., :9], grad_o[..., :9], ridge], {}), ([q, k, v, grad_o.mT.contiguous().mT, ridge], {}),
        ([q, k, v, grad_o, ridge.expand(2, 20).contiguous()], {}), ([q, k, v, grad_o, ridge], {"window": 5}),
        ([q, k, v, grad_o, ridge], {"tolerance": 0.1}), ([q, k, v, grad_o, ridge], {"causal": False}),
        ([t.half() for t in (q, k, v, grad_o)] + [ridge], {"qk_scale": 0.3}),
        ([q, k, v, grad_o, ridge], {"solver": "pcg"}), ([q, k, v, grad_o, ridge], {"backend": "triton_pcg"}),
    ]  # fmt: skip
    for times in range(2):
        for tensors, options in alike:
            found = _step(tensors, **options)
            for a, b in zip(found, _anew(lambda t=tensors, o=options: _step(t, **o)), strict=True):
                assert torch.equal(a, b)
                assert a.stride() == b.stride()
        assert kept == ["reported", "backward"] * (times * len(alike) + 1)  # how grad_o lies is looked at anew


@pytest.mark.slow
@interpreted
def test_what_an_operator_keeps_is_not_for_other_ways(kept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    hasten()
    q, k, v, grad_o = make((1, 2, 20, 16), torch.bfloat16)
    tensors = [q, k, v, grad_o, torch.ones(2, 1)]
    first = _step(tensors)
    with flashlla.set_backend("naive"):
        _step(tensors, backend=None)
    _step(tensors, seqlens_k=torch.tensor([20], dtype=torch.int32))
    assert kept == []
    arguments = prepared(None, flashlla.explain, q, k, v, ridge_lambda=tensors[4], backend="triton").arguments
    with torch.no_grad():
        residuals = forward(arguments).residuals
        assert kept.pop() == "reported"
        call = AdjointArguments(grad_o, arguments.inputs, residuals, arguments.settings, unrounded=True)
        assert backward(call).k.dtype == torch.float32
    with flashlla.ConvergenceCounter() as counter:
        again_found = _step(tensors)
    assert kept == ["reported", "backward"]
    assert torch.equal(again_found[0], first[0])
    assert counter.read().queries == 40
    monkeypatch.setattr(autograd, "looked_at", lambda device: True)
    with pytest.raises(ValueError, match="ridge_lambda"):
        _step([*tensors[:4], -tensors[4]])
