"""What callers may pass, what they get, and how they are told that it does not fit."""

import inspect
import threading
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import flashlla
from flashlla import Solution, lla_attention
from flashlla.solvers.base import warn_unconverged
from flashlla.values import check_values
from tests.support.helpers import problem_of


@dataclass
class Thawed(flashlla.Solver):
    """A solver that is not hashable."""

    def solve(self, systems, b):
        raise AssertionError("refused before any work")


def qkv(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))


def test_signature_and_defaults_are_the_published_ones():
    parameters = inspect.signature(lla_attention).parameters
    published = {
        "ridge_lambda": 10.0,
        "qk_scale": None,
        "delta_eps": 1e-12,
        "cg_atol": 1e-12,
        "cg_rtol": 1e-12,
        "cg_max_iters": 32,
        "cg_use_preconditioner": False,
    }
    assert list(parameters)[:3] == ["q", "k", "v"]
    for name, default in published.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 3, 9, 4)])
def test_output_has_the_inputs_shape_and_dtype(shape, dtype):
    q, k, v = qkv(*shape, dtype=dtype)
    o, info = lla_attention(q, k, v, ridge_lambda=0.5, return_info=True)
    assert (o.shape, o.dtype) == (q.shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert info.omega.dtype == info.residual.dtype == wide
    assert info.iterations.dtype == torch.int32
    assert info.converged.dtype == torch.bool
    assert {t.shape for t in info[:4]} == {q.shape[:-1]}
    assert info.backend in flashlla.available_backends()


def test_output_keeps_the_layout_of_a_transposed_query():
    q, k, v = (t.transpose(1, 2) for t in qkv(2, 9, 3, 4))  # (B, S, H, D) seen as (B, H, S, D)
    assert lla_attention(q, k, v).stride() == q.stride()


def test_lla_function_is_the_published_call():
    q, k, v = (t.requires_grad_() for t in qkv(2, 9, 4))
    ridge = torch.tensor(0.7, requires_grad=True)
    o, omega = flashlla.LLAFunction.apply(q, k, v, ridge, None, 1e-12, 1e-12, 1e-12, 32, False)
    expected, info = lla_attention(q, k, v, ridge_lambda=ridge, return_info=True)
    assert torch.equal(o, expected)
    assert omega.shape == (2, 9, 1)
    assert torch.equal(omega.squeeze(-1), info.omega)
    o.sum().backward(retain_graph=True)
    assert ridge.grad is not None
    assert q.grad is not None
    with pytest.raises(NotImplementedError, match="omega has no gradient"):
        (o.sum() + omega.sum()).backward()


def test_published_naive_functions():
    from flashlla.ops.naive import lla_backward_naive, lla_forward_naive

    q, k, v = (t.requires_grad_() for t in qkv(2, 11, 4, dtype=torch.float64))
    grad_o = qkv(2, 11, 4, dtype=torch.float64, seed=1)[0]
    ridge = torch.rand(2, 11, dtype=torch.float64) + 0.1
    for eps in (0.0, 1e-3):
        o, rho, denom, m = lla_forward_naive(q, k, v, 0.4, ridge, eps)
        expected = lla_attention(q, k, v, qk_scale=0.4, ridge_lambda=ridge, delta_eps=eps, backend="naive")
        torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
        assert o.requires_grad
        # The text form, from its definition.
        logits = (0.4 * q @ k.mT).masked_fill(torch.ones(11, 11).triu(1).bool(), float("-inf"))
        torch.testing.assert_close(m, logits.amax(-1, keepdim=True), rtol=1e-12, atol=1e-12)
        w = (logits - m).exp()
        apart = k[:, None] - q[:, :, None]  # (B, S, S, D): k_j - q_i
        mu = torch.einsum("bij,bijd->bid", w, apart)
        sigma = torch.einsum("bij,bijd,bije->bide", w, apart, apart)
        sigma = sigma + (ridge * w.sum(-1))[..., None, None] * torch.eye(4)
        torch.testing.assert_close(rho, torch.linalg.solve(sigma, mu), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(denom, w.sum(-1, keepdim=True) - (mu * rho).sum(-1, keepdim=True) + eps)
        got = lla_backward_naive(q, k, v, rho, denom, m, grad_o, 0.4, ridge)
        for a, b in zip(got, torch.autograd.grad(expected, (q, k, v), grad_o)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 1), (2, 7)])
def test_ridge_broadcasts_and_has_a_gradient_of_its_own_shape(shape):
    q, k, v = qkv(2, 7, 3, dtype=torch.float64)
    ridge = (torch.rand(shape, dtype=torch.float64) + 0.2).requires_grad_()
    o = lla_attention(q, k, v, ridge_lambda=ridge, solver="direct")
    (grad,) = torch.autograd.grad(o.square().sum(), ridge)
    full = ridge.detach().expand(2, 7).clone().requires_grad_()
    (per_row,) = torch.autograd.grad(lla_attention(q, k, v, ridge_lambda=full, solver="direct").square().sum(), full)
    torch.testing.assert_close(grad, per_row.sum_to_size(shape) if shape else per_row.sum())
    assert grad.abs().sum() > 0


def test_ridge_is_not_rounded_to_a_narrow_dtype():
    q, k, v = qkv(1, 8, 4, dtype=torch.bfloat16)
    exact, rounded = 0.1, float(torch.tensor(0.1).bfloat16())
    as_tensor = lla_attention(q, k, v, ridge_lambda=torch.tensor(exact), return_info=True)[1]
    as_number = lla_attention(q, k, v, ridge_lambda=exact, return_info=True)[1]
    other = lla_attention(q, k, v, ridge_lambda=rounded, return_info=True)[1]
    assert torch.equal(as_tensor.residual, as_number.residual)
    assert not torch.equal(as_number.residual, other.residual)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (0, 2, 5, 4), (2, 0, 5, 4), (2, 2, 0, 4)])
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(shape, backend):
    q, k, v = (t.requires_grad_() for t in qkv(*shape))
    ridge = torch.tensor(1.0, requires_grad=True)
    o = lla_attention(q, k, v, ridge_lambda=ridge, backend=backend)
    assert o.shape == shape
    o.sum().backward()
    assert q.grad.shape == shape
    assert ridge.grad == 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.randn(3, 9, 4)}, ValueError, ["k:", "(3, 9, 4)", "(2, 9, 4)"]),
        ({"k": torch.randn(2, 9, 5)}, ValueError, ["k:", "(2, 9, 5)", "head dim"]),
        ({"v": torch.randn(2, 8, 4)}, ValueError, ["v:", "(2, 8, 4)", "(2, 9, 4)"]),
        ({"v": torch.randn(2, 9, 0)}, ValueError, ["v:", "value dim"]),
        ({"k": torch.randn(2, 1, 9, 4)}, ValueError, ["k:", "3 dimensions, as q (2, 9, 4)"]),
        ({n: torch.randn(2, h, 9, 4) for n, h in zip("qkv", (4, 3, 3))}, ValueError, ["k:", "3 heads", "divides"]),
        (
            {n: torch.randn(2, s, 4, 4) for n, s in zip("qkv", (9, 7, 7))},
            ValueError,
            ["k:", "7 heads", "(B, S, H, D)", "layout='bshd'"],
        ),
        (
            {"layout": "bshd"} | {n: torch.randn(2, 4, s, 4) for n, s in zip("qkv", (9, 7, 7))},
            ValueError,
            ["k:", "7 heads", "(B, H, S, D)", "layout='bhsd'"],
        ),
        ({"causal": 1}, TypeError, ["causal", "int", "bool(causal)"]),
        ({"window": 0}, ValueError, ["window", "0", "at least 1", "None for all keys"]),
        ({"window": (16, 0)}, TypeError, ["window", "tuple", "; the causal (left, 0) of FlashAttention is"]),
        ({"window": 2.0}, TypeError, ["window", "float", "int(window)"]),
        ({"window": torch.tensor(2)}, TypeError, ["window", "Tensor", "int(window)"]),
        ({"window": 4, "causal": False}, ValueError, ["window", "causal=True"]),
        ({"seqlens_k": [3, 4]}, TypeError, ["seqlens_k", "list", "torch.tensor"]),
        ({"seqlens_k": torch.ones(2)}, TypeError, ["seqlens_k", "float32", ".int()"]),
        ({"seqlens_k": torch.ones(2, 9).bool()}, TypeError, ["seqlens_k", "a mask", ".sum(-1).to(torch.int32)"]),
        ({"seqlens_k": torch.tensor([9, 10])}, ValueError, ["seqlens_k", "10 at sequence 1", "0 to 9"]),
        ({"seqlens_k": torch.tensor([-1, 9])}, ValueError, ["seqlens_k", "-1 at sequence 0", "0 to 9"]),
        ({"seqlens_k": torch.ones(3, dtype=torch.int32)}, ValueError, ["seqlens_k", "(3,)", "(2,)"]),
        ({"seqlens_k": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, ["seqlens_k", "meta", "cpu"]),
        ({"layout": "sbhd"}, ValueError, ["layout", "'sbhd'", "'bshd'"]),
        ({"q": torch.randn(9, 4)}, ValueError, ["q:", "(9, 4)", "(B, S, D)"]),
        ({"q": [[1.0]]}, TypeError, ["q:", "list"]),
        ({"v": torch.randn(2, 9, 4).half()}, TypeError, ["v:", "float16", "float32"]),
        ({"k": torch.randn(2, 9, 4, device="meta")}, ValueError, ["k:", "meta", "cpu"]),
        ({n: torch.ones(2, 9, 4, dtype=torch.int64) for n in "qkv"}, TypeError, ["q:", "int64", "float32"]),
        ({n: torch.randn(2, 9, 0) for n in "qkv"}, ValueError, ["q:", "head dim"]),
        ({"ridge_lambda": 0.0}, ValueError, ["ridge_lambda", "0.0", "above 0"]),
        ({"ridge_lambda": -1}, ValueError, ["ridge_lambda", "-1"]),
        ({"ridge_lambda": float("nan")}, ValueError, ["ridge_lambda", "nan"]),
        ({"ridge_lambda": 1e300}, ValueError, ["ridge_lambda", "1e+300", "float32"]),
        ({"ridge_lambda": 1e-50}, ValueError, ["ridge_lambda", "1e-50", "float32"]),
        ({"ridge_lambda": True}, TypeError, ["ridge_lambda", "bool"]),
        ({"ridge_lambda": np.ones(9)}, TypeError, ["ridge_lambda", "ndarray", "torch.as_tensor"]),
        ({"cg_use_preconditioner": "jacobi"}, TypeError, ["cg_use_preconditioner", "jacobi", "PCG"]),
        ({"k": torch.randn(2, 9, 4).to_sparse()}, TypeError, ["k:", "sparse"]),
        ({"ridge_lambda": "big"}, TypeError, ["ridge_lambda", "str, wanted a number or a tensor"]),
        ({"ridge_lambda": None}, TypeError, ["ridge_lambda", "leave it out for the default 10.0"]),
        ({"ridge_lambda": torch.ones(2)}, ValueError, ["(2,)", "one a sequence? try ridge_lambda[:, None]"]),
        (
            {"ridge_lambda": torch.ones(3)} | {n: torch.randn(2, 3, 9, 4) for n in "qkv"},
            ValueError,
            ["ridge_lambda", "(3,)", "one a head? try ridge_lambda[:, None]"],
        ),
        ({"ridge_lambda": torch.ones(3)}, ValueError, ["ridge_lambda", "(3,)", "(B, S)", "(2, 9)"]),
        ({"ridge_lambda": torch.ones(2, 9, 1)}, ValueError, ["ridge_lambda", "(2, 9, 1)"]),
        ({"ridge_lambda": torch.ones(9, dtype=torch.int32)}, TypeError, ["ridge_lambda", "int32"]),
        ({"ridge_lambda": torch.ones(9, device="meta")}, ValueError, ["ridge_lambda", "meta"]),
        ({"ridge_lambda": -torch.ones(9)}, ValueError, ["ridge_lambda", "-1.0", "query 0"]),
        ({"qk_scale": float("nan")}, ValueError, ["qk_scale", "nan"]),
        ({"qk_scale": torch.tensor(0.5)}, TypeError, ["qk_scale", "Tensor", "float(qk_scale)"]),
        ({"delta_eps": float("inf")}, ValueError, ["delta_eps", "inf"]),
        ({"delta_eps": -1e-3}, ValueError, ["delta_eps", "-0.001", "at least 0"]),
        ({"cg_max_iters": True}, TypeError, ["cg_max_iters", "bool"]),
        ({"return_info": "no"}, TypeError, ["return_info", "str", "True or False"]),
        ({"is_causal": True}, TypeError, ["lla_attention()", "'is_causal'", "try causal="]),
        ({"ridge_lamda": 1.0}, TypeError, ["'ridge_lamda'", "try ridge_lambda="]),
        ({"return_inf": True}, TypeError, ["'return_inf'", "try return_info="]),
        ({"cu_seqlens": None}, TypeError, ["'cu_seqlens'", "try flashlla.lla_attention_varlen"]),
        ({"temperature": 1.0}, TypeError, ["'temperature'", "try one of q, k, v, ridge_lambda, qk_scale"]),
        ({"cg_rtol": -1.0}, ValueError, ["cg_rtol", "-1.0"]),
        ({"cg_max_iters": 0}, ValueError, ["cg_max_iters", "0"]),
        ({"solver": "cgg"}, ValueError, ["solver", "'cgg'", "did you mean 'cg'"]),
        ({"solver": 3}, TypeError, ["solver", "int"]),
        ({"solver": flashlla.CG}, TypeError, ["solver", "class CG", "CG()"]),
        ({"solver": Thawed()}, TypeError, ["solver", "Thawed", "frozen=True"]),
        ({"cg_max_iters": 2.5}, ValueError, ["cg_max_iters", "2.5"]),
        ({"cg_rtol": "x"}, TypeError, ["cg_rtol", "str"]),
        ({"backend": 3}, TypeError, ["backend", "int"]),
        ({"solver": "direct", "cg_rtol": 1e-3}, ValueError, ["cg_rtol", "0.001", "solver='direct'"]),
        ({"solver": flashlla.CG(), "cg_max_iters": 5}, ValueError, ["cg_max_iters", "5"]),
        ({"backend": "chunkd"}, ValueError, ["backend", "'chunkd'", "did you mean 'chunked'"]),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_bad_input_names_the_argument_and_what_came(change, error, words):
    q, k, v = qkv(2, 9, 4)
    arguments = {"q": q, "k": k, "v": v, **change}
    with pytest.raises(error) as caught:
        lla_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    for word in words:
        assert word in str(caught.value)


def test_heads_that_share_keys_are_as_if_keys_were_repeated():
    q, k, v = torch.randn(2, 6, 20, 4), torch.randn(2, 2, 20, 4), torch.randn(2, 2, 20, 4)
    o = lla_attention(q, k, v, ridge_lambda=1.0)
    apart = lla_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), ridge_lambda=1.0)
    torch.testing.assert_close(o, apart, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_no_key():
    q, k, v = (t.requires_grad_() for t in (torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 4)))
    ridge = torch.ones(2, 9, requires_grad=True)
    o, info = lla_attention(
        q, k, v, ridge_lambda=ridge, seqlens_k=torch.tensor([5, 0]), delta_eps=0.0, return_info=True
    )
    grads = torch.autograd.grad(o, (q, k, v, ridge), torch.randn_like(o))
    assert not o[0, :4].any()
    assert not o[1].any()
    assert o[0, 4:].all()
    assert info.converged.all()
    for g in (grads[0], grads[3]):
        assert not g[0, :4].any()
        assert not g[1].any()
    assert not grads[1][1].any()
    assert all(g.isfinite().all() for g in grads)


def test_what_lies_beyond_seqlens_is_not_looked_at():
    q, k, v = qkv(2, 9, 4)
    lengths = torch.tensor([9, 6])
    want = lla_attention(q, k, v, ridge_lambda=1.0, seqlens_k=lengths)
    k[1, 6:], v[1, 6:] = float("nan"), float("inf")
    k, v = k.requires_grad_(), v.requires_grad_()
    o = lla_attention(q, k, v, ridge_lambda=1.0, seqlens_k=lengths)
    assert torch.equal(o, want)
    o.sum().backward()
    assert not k.grad[1, 6:].any()
    assert k.grad.isfinite().all()
    # The diagonal stays: query 3 of the short sequence sees keys 0 to 3, as ever.
    assert torch.equal(o[1, :6], lla_attention(q, *qkv(2, 9, 4)[1:], ridge_lambda=1.0)[1, :6])


def test_layout_of_heads_after_tokens():
    q, k, v = (t.requires_grad_() for t in qkv(2, 9, 3, 4))
    o, info = lla_attention(q, k, v, ridge_lambda=1.0, layout="bshd", return_info=True)
    turned = lla_attention(*(t.transpose(1, 2) for t in (q, k, v)), ridge_lambda=1.0)
    assert torch.equal(o, turned.transpose(1, 2))
    assert o.is_contiguous()
    assert info.residual.shape == (2, 9, 3)


def test_the_output_lies_as_the_query_does_when_values_are_wider():
    q, k, v = torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3, 7)
    assert lla_attention(q, k, v, layout="bshd").is_contiguous()


def test_verify_knows_every_mask():
    q, k, v = torch.randn(2, 4, 9, 4), torch.randn(2, 2, 12, 4), torch.randn(2, 2, 12, 6)
    lengths = torch.tensor([12, 7])
    report = flashlla.verify(q, k, v, ridge_lambda=1.0, window=5, seqlens_k=lengths)
    assert report.error.max() < 1e-4


def test_numpy_numbers_are_numbers():
    q, k, v = qkv(1, 5, 4)
    o = lla_attention(q, k, v, ridge_lambda=np.float32(2.0), qk_scale=np.float64(0.5))
    assert torch.equal(o, lla_attention(q, k, v, ridge_lambda=2.0, qk_scale=0.5))
    o = lla_attention(q, k, v, window=np.int64(2), causal=np.bool_(True))
    assert torch.equal(o, lla_attention(q, k, v, window=2))


@pytest.mark.parametrize("differentiate", [torch.func.jacfwd, torch.func.hessian])
def test_forward_mode_is_refused(differentiate):
    q, k, v = qkv(1, 5, 4)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        differentiate(lambda q: lla_attention(q, k, v).sum())(q)


def test_checks_that_wait_for_the_device_are_asked_for(monkeypatch):
    """On a device of which no number can be read at all."""
    q, k, v = (t.to("meta") for t in qkv(2, 9, 4))
    call = problem_of(q, k, v, ridge_lambda=1.0, seqlens_k=torch.ones(2, dtype=torch.int32, device="meta"))
    check_values(*call)
    monkeypatch.setenv("FLASHLLA_CHECK", "1")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        check_values(*call)


class Wrong(flashlla.Solver):
    """Returns ``what`` instead of a solution."""

    def __init__(self, what):
        self.what = what

    def solve(self, systems, b):
        return self.what(systems, b)


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        (lambda systems, b: b, TypeError, "Wrong.solve returned Tensor"),
        (
            lambda systems, b: Solution.check(systems, b, b, iterations=0, tolerance=1)._replace(x=b[..., :1]),
            ValueError,
            "shape",
        ),
    ],
)
def test_a_solver_that_returns_no_solution_is_named(what, error, words):
    with pytest.raises(error, match=words):
        lla_attention(*qkv(1, 5, 4), solver=Wrong(what))


@pytest.mark.parametrize(("backend", "solver"), [("naive", None), ("chunked", "direct"), ("chunked", None)])
def test_a_solution_that_is_none_is_not_called_converged(backend, solver):
    """Keys of very unequal spread and a tiny ridge: more than float32 can do, whoever solves."""
    q, k, v = qkv(1, 60, 8)
    k = k * torch.logspace(2, -2, 8)
    with pytest.warns(flashlla.ConvergenceWarning, match="stopped early"):
        _, info = lla_attention(
            q, k, v, ridge_lambda=1e-4, qk_scale=1e-6, solver=solver, backend=backend, return_info=True
        )
    assert not info.converged.all()
    assert info.residual[~info.converged].max() > 1e-6


def test_early_stops_are_told_once_and_again_where_they_are_worse():
    q, k, v = qkv(1, 60, 8)
    call = lambda ridge: lla_attention(q, k, v, ridge_lambda=ridge, backend="chunked", cg_max_iters=2)
    with pytest.warns(flashlla.ConvergenceWarning, match="stopped early"):
        call(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(0.1)
    with pytest.warns(flashlla.ConvergenceWarning, match="stopped early"):
        call(1e-5)


def test_nan_from_finite_inputs_is_not_silent():
    q, k, v = qkv(1, 9, 4)
    with pytest.warns(flashlla.ConvergenceWarning, match="NaN on"):
        o = lla_attention(q, k, v, ridge_lambda=torch.full((9,), 1e-38), qk_scale=1e20, solver="cg", backend="chunked")
    assert not o.isfinite().all()


@dataclass(frozen=True)
class Tired(flashlla.Solver):
    """Does not converge on right-hand sides of unit length, which those of the backward pass are."""

    def solve(self, systems, b):
        solution = flashlla.CG(max_iters=100).solve(systems, b)
        return solution._replace(converged=(b.norm(dim=-1) - 1).abs() > 1e-5)


def test_backward_says_that_it_stopped_early():
    q, k, v = (t.requires_grad_() for t in qkv(1, 60, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        o = lla_attention(q, k, v, solver=Tired(), backend="chunked")
    with pytest.warns(flashlla.ConvergenceWarning, match="Tired stopped early in the backward pass on 5"):
        o.sum().backward()


@pytest.mark.parametrize(
    ("solver", "words"),
    [
        (flashlla.Direct(), r"1 of 2 queries.*\. Try a larger ridge_lambda or float64"),
        (flashlla.CG(), r"Try more iterations .*, solver='direct', a larger ridge_lambda or float64"),
    ],
)
def test_what_to_try_where_a_solver_stopped_early(solver, words):
    """Where Direct stops, CG would, too."""
    with pytest.warns(flashlla.ConvergenceWarning, match=words):
        warn_unconverged(solver, torch.tensor([0.5]), 2)


def test_a_huge_later_value_does_not_reach_an_earlier_row():
    for backend in ("naive", "chunked"):
        q, k, v = (t.requires_grad_() for t in qkv(1, 9, 4))
        changed_k, changed_v = k.detach().clone(), v.detach().clone()
        changed_k[:, -1], changed_v[:, -1] = 1e38, 1e38
        changed_k.requires_grad_(), changed_v.requires_grad_()
        grad_o = torch.full((1, 9, 4), 10.0)
        grad_o[:, -1] = 0
        expected = lla_attention(q, k, v, backend=backend)
        got = lla_attention(q, changed_k, changed_v, backend=backend)
        assert torch.equal(got[:, :-1], expected[:, :-1])
        (a,), (b,) = torch.autograd.grad(expected, q, grad_o), torch.autograd.grad(got, q, grad_o)
        torch.testing.assert_close(b[:, :-1], a[:, :-1])


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
