"""NaN and inf stay in the sequence, head and rows that they belong to; later tokens change nothing earlier."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import lla_attention
from flashlla.backends.base import Backend
from tests.support import kernels
from tests.support.helpers import (
    BACKENDS,
    IN_PYTORCH,
    called,
    every_backend,
    interpreted,
    normal,
    qkv,
    skip_if_refused,
    table,
)
from tests.support.units import matmul_precision

B, H, S, D = 2, 2, 21, 8
BAD = (1, 0)  # the sequence and head that something is wrong in
AT = 9  # and the token
NAMES = ("q", "k", "v", "ridge_lambda", "grad_o")
DTYPE = torch.float32


def inputs() -> dict[str, Tensor]:
    made = {name: normal(B, H, S, D, seed=i, dtype=DTYPE) for i, name in enumerate(NAMES)}
    made["ridge_lambda"] = made["ridge_lambda"][..., 0].exp()
    return made


def run(backend: Backend, given: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output and the gradients by name."""
    leaves = {name: given[name].clone().requires_grad_() for name in NAMES[:4]}
    q, k, v, ridge = leaves.values()
    skip_if_refused(backend, q, k, v, ridge_lambda=ridge, **options)
    o = flashlla.lla_attention(q, k, v, ridge_lambda=ridge, backend=backend.name, **options)
    o.backward(given["grad_o"])
    return {"o": o.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


@functools.cache
def clean_run(backend: Backend, **options: Any) -> dict[str, Tensor]:
    return run(backend, inputs(), **options)


def worth_it(backend: Backend, where: str, value: float) -> bool:
    """A ridge below zero is refused; in the interpreter one value each."""
    if interpreted(backend):
        return value == math.inf if where in ("q", "v") else math.isnan(value)
    return where != "ridge_lambda" or value != -math.inf


@table("backend where value", BACKENDS, NAMES, [math.nan, math.inf, -math.inf], when=worth_it)
def test_nothing_reaches_another_head_or_an_earlier_row(backend: Backend, where: str, value: float) -> None:
    clean, given = clean_run(backend), inputs()
    given[where][(*BAD, AT)] = value
    spoilt = run(backend, given)
    others = torch.ones(B, H, dtype=torch.bool)
    others[BAD] = False
    for name, t in spoilt.items():
        torch.testing.assert_close(t[others], clean[name][others], msg=lambda m, name=name: f"{name}: {m}")
    # A key or a value is seen from its own row on; the rest belongs to one row. What a row before it gives, and its
    # own gradients, are as they were.
    for name in ("o", "q", "ridge_lambda"):
        torch.testing.assert_close(
            spoilt[name][BAD][:AT], clean[name][BAD][:AT], msg=lambda m, name=name: f"{name}: {m}"
        )
    rows = spoilt["o"][BAD].isnan().all(-1)
    if where in ("k", "v"):
        assert rows[AT:].all(), "a row that sees it must say so"
    elif where != "grad_o":
        assert rows[AT]
        assert not rows[AT + 1 :].any()
    else:
        assert not rows.any()
        assert spoilt["q"][BAD][AT].isnan().all()


@pytest.mark.quick
@pytest.mark.parametrize("where", NAMES)
@pytest.mark.parametrize("backend", IN_PYTORCH, ids=called)
def test_gradients_are_nan_where_a_bad_query_sees(backend: Backend, where: str) -> None:
    clean, given = clean_run(backend), inputs()
    given[where][(*BAD, AT)] = float("nan")
    spoilt = run(backend, given)
    if where in ("k", "v"):  # every later query is bad, and the last one sees all keys
        assert all(spoilt[name][BAD][AT:].isnan().all() for name in ("q", "ridge_lambda"))
        assert all(spoilt[name][BAD].isnan().all() for name in ("k", "v"))
    else:  # one query is bad, and sees the keys up to itself
        for name in ("k", "v"):
            assert spoilt[name][BAD][: AT + 1].isnan().all()
            torch.testing.assert_close(spoilt[name][BAD][AT + 1 :], clean[name][BAD][AT + 1 :])
        for name in ("q", "ridge_lambda"):
            assert spoilt[name][BAD][AT].isnan().all()
            torch.testing.assert_close(spoilt[name][BAD][AT + 1 :], clean[name][BAD][AT + 1 :])


@table(
    "backend change dtype",
    BACKENDS,
    ["other", "large", "nan"],
    [torch.float64, torch.float32, torch.bfloat16],
    when=lambda backend, change, dtype: not interpreted(backend) or (dtype == torch.float32 and change != "other"),
)
def test_later_tokens_never_change_earlier_output(backend: Backend, change: str, dtype: torch.dtype) -> None:
    """Bit for bit under naive; elsewhere to rounding, which 1e4 times larger tokens would show."""
    # Under, at and over the edge of a block or tile of queries.
    length, cuts = (70, (33,)) if interpreted(backend) else (150, (1, 64, 77, 128, 149))
    q, k, v = (normal(1, 2, length, D, seed=i, dtype=dtype) for i in range(3))
    skip_if_refused(backend, q, k, v)
    for cut in cuts:
        before = flashlla.lla_attention(q, k, v, ridge_lambda=0.5, backend=backend.name)
        later = [t.clone() for t in (q, k, v)]
        for i, t in enumerate(later):
            fresh = normal(1, 2, length - cut, D, seed=10 + i, dtype=dtype)
            t[:, :, cut:] = {"other": fresh, "large": 1e4 * fresh, "nan": fresh * float("nan")}[change]
        after = flashlla.lla_attention(*later, ridge_lambda=0.5, backend=backend.name)
        if backend.name == "naive":
            assert torch.equal(after[:, :, :cut], before[:, :, :cut])
        else:
            torch.testing.assert_close(after[:, :, :cut], before[:, :, :cut])
        if change == "nan":
            assert after[:, :, cut:].isnan().all()
        else:
            assert not torch.equal(after[:, :, cut:], before[:, :, cut:])


@every_backend
def test_bad_numbers_everywhere_are_no_error(backend: Backend) -> None:
    q, k, v = (torch.full((1, 1, 5, 4), float("nan"), dtype=DTYPE) for _ in range(3))
    skip_if_refused(backend, q, k, v)
    o, info = flashlla.lla_attention(q, k, v, backend=backend.name, return_info=True)
    assert o.isnan().all()
    assert not info.converged.any()


@pytest.mark.parametrize("where", ["q", "k", "v", "grad_o"])
@every_backend
def test_nothing_leaves_a_window(backend: Backend, where: str) -> None:
    """A key is seen by the queries of its window, and a query's gradient goes to the keys of its window."""
    window = 4
    clean, given = clean_run(backend, window=window), inputs()
    given[where][(*BAD, AT)] = float("nan")
    spoilt = run(backend, given, window=window)
    rows = torch.zeros(S, dtype=torch.bool)
    rows[AT : AT + window if where in ("k", "v") else AT + 1] = True  # queries that are due NaN
    keys = torch.zeros(S, dtype=torch.bool)
    first, last = int(rows.nonzero().min()), int(rows.nonzero().max())
    keys[first - window + 1 : last + 1] = True
    if where != "grad_o":
        assert spoilt["o"][BAD][rows].isnan().all()
        torch.testing.assert_close(spoilt["o"][BAD][~rows], clean["o"][BAD][~rows])
    assert spoilt["q"][BAD][rows].isnan().all()
    torch.testing.assert_close(spoilt["q"][BAD][~rows], clean["q"][BAD][~rows])
    assert spoilt["k"][BAD][keys].isnan().all()
    torch.testing.assert_close(spoilt["k"][BAD][~keys], clean["k"][BAD][~keys])


@pytest.mark.parametrize("bad", [pytest.param(math.nan, marks=pytest.mark.quick), math.inf])
@pytest.mark.parametrize("options", [{}, pytest.param({"window": 5}, marks=pytest.mark.slow)], ids=["all", "window"])
@every_backend
def test_padding_on_the_left_goes_nowhere(backend: Backend, options: dict[str, int], bad: float) -> None:
    """Queries, keys, values, ridges and grad_o before the first key: zeros there, the rest as if it were cut off."""
    starts = torch.tensor([AT, 0], dtype=torch.int32)
    given = inputs()
    for t in given.values():
        t[0, :, :AT] = bad
    padded = run(backend, given, seqstarts_k=starts, **options)
    cut = run(backend, {name: t[:1, :, AT:] for name, t in inputs().items()}, **options)
    whole = run(backend, {name: t[1:] for name, t in inputs().items()}, **options)
    for name, t in padded.items():
        assert not t[0, :, :AT].any(), name
        torch.testing.assert_close(t[:1, :, AT:], cut[name])
        torch.testing.assert_close(t[1:], whole[name])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["naive", "chunked"])
def test_a_key_of_a_16_bit_dtype_that_is_not_finite_reaches_no_earlier_row(
    name: str, dtype: torch.dtype, value: float
) -> None:
    q, k, v = (normal(1, 1, 7, 16, seed=i).to(dtype) for i in range(3))
    k[0, 0, 6, 3] = value
    o = flashlla.lla_attention(q, k, v, ridge_lambda=1.0, backend=name)
    assert o[0, 0].isnan().all(-1).tolist() == [False] * 6 + [True]


@pytest.mark.quick
def test_nan_in_packed_sequences_with_tokens_of_none() -> None:
    q, k, v = (normal(1, 2, n, 3, seed=i, dtype=torch.float32) for i, n in enumerate((8, 12, 12)))
    q[0, 1, 3, 2] = float("nan")
    lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 0, 5], [0, 7, 9]))
    cu = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), lengths))
    o = flashlla.lla_attention_varlen(
        q, k, v, **cu, max_seqlen_q=5, max_seqlen_k=7, window=1, ridge_lambda=1.0, backend="chunked"
    )
    assert o[0, 1].isnan().any(-1).tolist() == [row == 3 for row in range(8)]


@functools.cache
def clean_step(dtype: torch.dtype) -> dict[str, Tensor]:
    return kernels.step(kernels.make((1, 2, 40, 8), dtype), 1.0, backend="triton")


@kernels.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_in_their_rows(dtype: torch.dtype, which: str, bad: float) -> None:
    tensors = kernels.make((1, 2, 40, 8), dtype)
    clean = clean_step(dtype)
    at = ("q", "k", "v", "grad").index(which)
    tensors[at] = tensors[at].clone()
    tensors[at][0, 0, 21, 3] = bad
    got = kernels.step(tensors, 1.0, backend="triton")
    for name in kernels.NAMES:
        assert torch.allclose(got[name][0, 1].float(), clean[name][0, 1].float(), rtol=1e-2, atol=1e-2)
    if which in ("k", "v"):
        assert got["o"][0, 0, 21:].isnan().all()
        assert got["dq"][0, 0, 21:].isnan().all()
    elif which == "q":
        assert got["o"][0, 0, 21].isnan().all()
        assert got["dq"][0, 0, 21].isnan().all()
        assert torch.allclose(got["o"][0, 0, 22:].float(), clean["o"][0, 0, 22:].float(), rtol=1e-2, atol=1e-2)
    else:
        assert got["dv"][0, 0, :22].isnan().all()
    if which != "grad":
        assert torch.allclose(got["o"][0, 0, :21].float(), clean["o"][0, 0, :21].float(), rtol=1e-2, atol=1e-2)
    assert torch.allclose(got["dq"][0, 0, :21].float(), clean["dq"][0, 0, :21].float(), rtol=2e-2, atol=2e-2)
    if which in ("q", "grad"):  # keys that no spoilt query sees
        assert torch.allclose(got["dk"][0, 0, 22:].float(), clean["dk"][0, 0, 22:].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.quick
@kernels.interpreted
@pytest.mark.parametrize("solver", ["cg", "pcg"])
@pytest.mark.parametrize("size", [1e20, 3e38])
def test_a_key_as_good_as_infinite_reaches_those_who_see_it(size: float, solver: str) -> None:
    tensors = kernels.make((1, 1, 21, 8), torch.float32)
    clean = kernels.step(tensors, 1.0, backend="triton", solver=solver)
    tensors[1] = tensors[1].clone()
    tensors[1][0, 0, 9] = size
    got = kernels.step(tensors, 1.0, backend="triton", solver=solver)
    for name in ("o", "dq", "dridge"):
        assert got[name][0, 0, 9:].isnan().all()
        torch.testing.assert_close(got[name][0, 0, :9], clean[name][0, 0, :9])


@pytest.mark.quick
@kernels.interpreted
def test_the_nan_that_cuda_makes_survives_tf32() -> None:
    tensors = kernels.make((1, 1, 40, 8), torch.float32)
    tensors[1][0, 0, 21, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    with matmul_precision("high"):
        o = kernels.step(tensors, 1.0, backend="triton")["o"]
    assert o[0, 0, 21:].isnan().all()
    assert o[0, 0, :21].isfinite().all()


@pytest.mark.quick
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_backend
def test_large_logits(backend: Backend, dtype: torch.dtype) -> None:
    """One key has all the weight: o is its value, and dv what came to its queries. docs/numerics.md has the limit."""
    q, k, v = (normal(1, 1, 17, 8, seed=i, dtype=dtype).requires_grad_() for i in range(3))
    scale = 1e6 / float((q @ k.mT).abs().max())
    skip_if_refused(backend, q, k, v, qk_scale=scale)
    o = lla_attention(q, k, v, qk_scale=scale, backend=backend.name)
    chosen = (q @ k.mT).double().masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf).argmax(-1)[0, 0]
    torch.testing.assert_close(o[0, 0], v[0, 0, chosen])
    (dv,) = torch.autograd.grad(o, v, torch.ones_like(o))
    torch.testing.assert_close(dv[0, 0, :, 0].float(), chosen.bincount(minlength=17).float(), rtol=1e-2, atol=1e-5)
