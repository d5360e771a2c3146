"""The operators in autograd: what has a derivative, and where backward may run."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flashlla
from flashlla import lla_attention, lla_attention_varlen
from flashlla.autograd import AdjointArguments, backward, forward
from flashlla.backends.base import Backend
from flashlla.calls import prepared
from flashlla.problem import Gradients
from tests.support.helpers import cu, every_backend, normal, qkv, skip_if_refused

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


@every_backend
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_keys_before_they_are_rounded(backend: Backend, packed: bool) -> None:
    """For who adds them to others; rounded, they are those that autograd gives."""
    q, k, v = qkv(1, 2, 20, 16, dtype=torch.float16, seed=1)
    options = {"op": lla_attention_varlen, "cu_seqlens": cu(0, 7, 7, 18)} if packed else {}
    arguments = prepared(options.pop("op", None), "test", q, k, v, **options).arguments
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
