"""Packed sequences: each is what it is alone, and nothing crosses from one to the next."""

from __future__ import annotations

import functools
import shutil
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import lla_attention, lla_attention_varlen, problem
from flashlla.backends.base import Backend
from tests.support.helpers import (
    BACKENDS,
    cu,
    every_backend,
    interpreted,
    make_indefinite,
    normal,
    problem_of,
    skip_if_refused,
    table,
)

DTYPE = torch.float32
EDGES = (0, 9, 9, 10, 27)  # sequences of 9, 0, 1 and 17 tokens
TOTAL = 30  # and 3 tokens of no sequence
NAMES = ("q", "k", "v", "ridge_lambda")


def leaves(heads: int = 2, key_heads: int = 2, dim: int = 8, value_dim: int = 8) -> dict[str, Tensor]:
    """(1, H, T, D)."""
    shapes = ((heads, TOTAL, dim), (key_heads, TOTAL, dim), (key_heads, TOTAL, value_dim), (heads, TOTAL))
    made = [normal(1, *shape, seed=i, dtype=DTYPE) for i, shape in enumerate(shapes)]
    made[3] = made[3].exp()
    return dict(zip(NAMES, made))


def results(o: Tensor, given: dict[str, Tensor], grad_o: Tensor) -> dict[str, Tensor]:
    gradients = torch.autograd.grad(o, list(given.values()), grad_o)
    return {"o": o.detach(), **dict(zip(given, gradients))}


def run(
    backend: Backend, given: dict[str, Tensor], edges: tuple[int, ...] = EDGES, **options: Any
) -> dict[str, Tensor]:
    """The output and the gradients by name."""
    given = {name: t.clone().requires_grad_() for name, t in given.items()}
    q, k, v, ridge = given.values()
    keywords = {"ridge_lambda": ridge, "cu_seqlens": cu(*edges), "max_seqlen": TOTAL, **options}
    skip_if_refused(backend, q, k, v, op=lla_attention_varlen, **keywords)
    o = lla_attention_varlen(q, k, v, backend=backend.name, **keywords)
    return results(o, given, normal(*o.shape, seed=7, dtype=DTYPE))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 4}], ids=str)
@every_backend
def test_each_sequence_is_what_it_is_alone(backend: Backend, options: dict[str, Any]) -> None:
    """Under the PyTorch backends to the last bit: they see the same views."""
    given = leaves(heads=6, value_dim=5) if not interpreted(backend) else leaves()
    packed = run(backend, given, **options)
    grad_o = normal(*packed["o"].shape, seed=7, dtype=DTYPE)
    same = functools.partial(torch.testing.assert_close, **({} if interpreted(backend) else {"rtol": 0, "atol": 0}))
    for first, last in pairwise(EDGES):
        alone = {name: t[:, :, first:last].detach().requires_grad_() for name, t in given.items()}
        q, k, v, ridge = alone.values()
        o = lla_attention(q, k, v, ridge_lambda=ridge, backend=backend.name, **options)
        for name, wanted in results(o, alone, grad_o[:, :, first:last]).items():
            same(packed[name][:, :, first:last], wanted, msg=lambda m, name=name: f"{name}: {m}")
    for name, t in packed.items():
        assert not t[:, :, EDGES[-1] :].any(), f"{name} of tokens that belong to no sequence"


@functools.cache
def clean_run(backend: Backend) -> dict[str, Tensor]:
    return run(backend, leaves())


@table(
    "backend at where",
    BACKENDS,
    [3, 9, 12, 28],
    NAMES,
    when=lambda backend, at, where: not interpreted(backend) or (at == 12 and where != "q"),
)
def test_nan_stays_in_its_sequence(backend: Backend, at: int, where: str) -> None:
    given, clean = leaves(), clean_run(backend)
    given[where][:, :, at] = float("nan")
    spoilt = run(backend, given)
    own = torch.zeros(TOTAL, dtype=torch.bool)
    for first, last in pairwise(EDGES):
        own[first:last] = first <= at < last
    for name, t in spoilt.items():
        assert torch.equal(t[:, :, ~own], clean[name][:, :, ~own]), name
    if own.any():
        assert spoilt["o"][:, :, at].isnan().all()
        assert spoilt["q"][:, :, at].isnan().all()


@every_backend
def test_layouts_agree(backend: Backend) -> None:
    """(T, H, D) and (1, H, T, D), the ridge being (H, T) and (1, H, T)."""
    given = leaves()
    four = run(backend, given)
    three = run(
        backend,
        {name: t[0] if name == "ridge_lambda" else t[0].transpose(0, 1).contiguous() for name, t in given.items()},
    )
    grad_o = normal(*three["o"].shape, seed=7, dtype=DTYPE)
    assert three["o"].is_contiguous()
    torch.testing.assert_close(three["o"].transpose(0, 1), four["o"][0])
    q, k, v = (t[0].transpose(0, 1).clone().requires_grad_() for t in list(given.values())[:3])
    ridge = given["ridge_lambda"][0].clone().requires_grad_()
    o, info = lla_attention_varlen(
        q, k, v, cu_seqlens=cu(*EDGES), ridge_lambda=ridge, backend=backend.name, return_info=True
    )
    assert torch.equal(o.detach(), three["o"])
    assert {t.shape for t in info[:4]} == {(TOTAL, 2)}
    assert info.converged.all()
    for name, got in zip(NAMES, torch.autograd.grad(o, (q, k, v, ridge), grad_o)):
        assert torch.equal(got, three[name])


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(), (2, 1), (1, TOTAL), (2, TOTAL)])
def test_ridge_has_a_gradient_of_its_own_shape(shape: tuple[int, ...]) -> None:
    given = leaves()
    q, k, v = (given[name][0].transpose(0, 1) for name in NAMES[:3])
    ridge = normal(*shape, seed=5, dtype=DTYPE).exp().requires_grad_()
    full = ridge.detach().expand(2, TOTAL).clone().requires_grad_()
    grads = []
    for r in (ridge, full):
        o = lla_attention_varlen(q, k, v, cu_seqlens=cu(*EDGES), max_seqlen=17, ridge_lambda=r)
        grads.append(torch.autograd.grad(o.square().sum(), r)[0])
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[0], grads[1].sum_to_size(shape) if shape else grads[1].sum())


@pytest.mark.quick
def test_gradients_are_right() -> None:
    """Against finite differences, with queries that have no key and keys that no query has."""
    q, k, v = normal(6, 2, 3), normal(7, 1, 3, seed=1), normal(7, 1, 2, seed=2)
    ridge = normal(2, 6, seed=3).exp()
    edges = {"cu_seqlens_q": cu(0, 1, 5, 5), "cu_seqlens_k": cu(0, 0, 4, 6)}

    def attention(*given: Tensor) -> Tensor:
        *qkv, ridge = given
        return lla_attention_varlen(*qkv, ridge_lambda=ridge, solver="direct", delta_eps=0.0, **edges)

    given = [t.requires_grad_() for t in (q, k, v, ridge)]
    assert torch.autograd.gradcheck(attention, given, atol=1e-7, rtol=1e-5)


@every_backend
def test_max_seqlen_may_be_left_out(backend: Backend) -> None:
    given = leaves()
    exact = run(backend, given, max_seqlen=17)
    for name, t in run(backend, given, max_seqlen=None).items():
        assert torch.equal(t, exact[name]), name
    for name, t in run(backend, given, max_seqlen=1000).items():
        torch.testing.assert_close(t, exact[name], msg=lambda m, name=name: f"{name}: {m}")
    apart = {"cu_seqlens": None, "cu_seqlens_q": cu(*EDGES), "cu_seqlens_k": cu(*EDGES)}
    for more in (
        {"max_seqlen": None},
        {"max_seqlen": 17},
        {"max_seqlen": 1000, "max_seqlen_q": 17, "max_seqlen_k": 17},
    ):
        for name, t in run(backend, given, **apart, **more).items():
            torch.testing.assert_close(t, exact[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.quick
@pytest.mark.parametrize("edges", [(0,), (0, 0), (0, 0, 0, 0)])
@every_backend
def test_no_tokens_at_all(backend: Backend, edges: tuple[int, ...]) -> None:
    for max_seqlen in (None, 0):
        for t in run(backend, leaves(), edges, max_seqlen=max_seqlen).values():
            assert not t.any()
    q, k, v = (torch.zeros(0, 2, 8, requires_grad=True) for _ in range(3))
    o = lla_attention_varlen(q, k, v, cu_seqlens=cu(*edges))
    assert o.shape == (0, 2, 8)
    o.sum().backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("longest", [5, 500])
@pytest.mark.parametrize("edges", [(0, 40, 20, 25), (3, 50), (-5, 4, 100), (9, 0)])
@every_backend
def test_numbers_that_only_the_device_sees(backend: Backend, edges: tuple[int, ...], longest: int) -> None:
    """Unchecked, whatever they are, nothing outside the tensors is touched, and sequences are cut to max_seqlen."""
    given = {name: t.requires_grad_() for name, t in leaves().items()}
    q, k, v, ridge = given.values()
    keywords = {"ridge_lambda": ridge, "max_seqlen": longest}
    skip_if_refused(backend, q, k, v, op=lla_attention_varlen, cu_seqlens=cu(0, 5), **keywords)
    asked, inputs = problem_of(q, k, v, lla_attention_varlen, cu_seqlens=cu(*(0,) * len(edges)), **keywords)
    inputs = inputs._replace(cu_seqlens_q=cu(*edges), cu_seqlens_k=cu(*edges))
    with torch.no_grad():
        o, residuals, report = backend.forward(asked, inputs)
        gradients = backend.backward(asked, inputs, residuals, torch.ones_like(o))
    assert all(t.isfinite().all() for t in (o, *gradients))
    assert report.converged.all()
    first, last = problem.sequence_bounds(cu(*edges), TOTAL, longest)
    inside = torch.zeros(TOTAL, dtype=torch.bool)
    for i, j in zip(first.tolist(), last.tolist()):
        assert 0 <= i <= j <= min(TOTAL, i + longest)
        inside[i:j] = True
    assert not o[:, :, ~inside].any()
    assert o[:, :, inside].any(-1).all()


@pytest.mark.quick
def test_the_system_that_cannot_be_solved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    make_indefinite(monkeypatch, ridge=0.5)
    q, k, v = (normal(6, 1, 2, seed=i, dtype=DTYPE) for i in range(3))
    ridge = torch.ones(1, 6)
    ridge[0, 4] = 0.5  # the second token of the third sequence
    with pytest.raises(torch.linalg.LinAlgError, match=r"packed sequence 2: .* query 1 "):
        lla_attention_varlen(q, k, v, cu_seqlens=cu(0, 3, 3, 6), ridge_lambda=ridge, solver="direct")


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()

    def loss(q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, edges: Tensor) -> Tensor:
        return lla_attention_varlen(q, k, v, cu_seqlens=edges, max_seqlen=17, ridge_lambda=ridge).sin().sum()

    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for edges in ((0, 9, 9, 10, 27), (0, 17, 20, 20, 30)):
        given = [t.requires_grad_() for t in leaves().values()]
        got, wanted = (torch.autograd.grad(f(*given, cu(*edges)), given) for f in (compiled, loss))
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b)


@pytest.mark.quick
def test_vmap_is_refused_with_what_to_do() -> None:
    q, k, v = torch.randn(3, 4, TOTAL, 2, 8).unbind(0)
    with pytest.raises(NotImplementedError, match=r"vmap over lla_attention_varlen.*pack the sequences"):
        torch.vmap(lambda q, k, v: lla_attention_varlen(q, k, v, cu_seqlens=cu(*EDGES), max_seqlen=17))(q, k, v)


@pytest.mark.quick
def test_verify_and_explain() -> None:
    q, k, v, ridge = leaves(heads=6, value_dim=5).values()
    options = {"ridge_lambda": ridge, "window": 6, "cu_seqlens": cu(*EDGES)}
    report = flashlla.verify(q, k, v, op=lla_attention_varlen, rows=1000, **options)
    assert len(report.row) == 6 * TOTAL
    assert report.error.max() < 1e-4
    assert flashlla.explain(q, k, v, op=lla_attention_varlen, backend="naive", **options).backend == "naive"
    with pytest.raises(TypeError, match="seqlens_k"):
        flashlla.explain(q, k, v, op=lla_attention_varlen, seqlens_k=ridge, **options)
    with pytest.raises(ValueError, match=r"op: got .*lla_attention_varlen"):
        flashlla.explain(q, k, v, op=flashlla.verify)


@every_backend
def test_edges_may_lie_anyhow_in_memory(backend: Backend) -> None:
    """A column of a table, and every second number: what they say counts, not what lies behind the first."""
    columns = torch.stack([cu(*EDGES), cu(*EDGES) * 0 + 3], 1)
    wanted = run(backend, leaves(), EDGES)
    for edges in (columns[:, 0], columns.flatten()[::2]):
        assert not edges.is_contiguous()
        for name, t in run(backend, leaves(), cu_seqlens=edges).items():
            assert torch.equal(t, wanted[name]), name
