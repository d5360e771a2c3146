"""Decoding: new tokens against a cache are the last rows of a full forward pass."""

from __future__ import annotations

import functools
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import lla_decode
from flashlla.autograd import DECODE, DECODE_INFO, DECODE_OUT, OutArguments
from flashlla.backends.base import Backend
from flashlla.backends.triton import Triton
from flashlla.calls import prepared
from flashlla.problem import FEW_NEW, empty_output
from tests.support.budget import Excess, allowance
from tests.support.decoding import CASES, NAN, Decoding, arguments, expected, paged, spread
from tests.support.helpers import (
    BACKENDS,
    DEVICES,
    DTYPES,
    called,
    every_backend,
    interpreted,
    problem_of,
    refusal,
    skip_if_refused,
    table,
    turn,
)


def call(case: Decoding, backend: Backend, dtype: torch.dtype, device: str = "cpu", **more: Any) -> Tensor:
    tensors, keywords = arguments(case, dtype, device)
    return lla_decode(*tensors, **keywords, **more, backend=backend.name)


def takes(backend: Backend, device: str, case: Decoding, dtype: torch.dtype) -> bool:
    """What is run: all that a backend does not refuse, in the interpreter in one dtype each."""
    if interpreted(backend) and dtype != turn(backend, CASES.index(case)):
        return False
    tensors, keywords = arguments(case, dtype, device)
    return refusal(backend, *tensors, op=lla_decode, **keywords) is None


def quick(backend: Backend, device: str, case: Decoding, dtype: torch.dtype) -> bool:
    """One case of each feature in float32, one of them in each dtype; in the interpreter the smallest."""
    if interpreted(backend):
        return case.name in ("plain", "pages_16")
    return (case.quick and dtype == torch.float32) or case.name == "plain"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("error::flashlla.ConvergenceWarning", "error::flashlla.FallbackWarning")
@table("backend device case dtype", BACKENDS, DEVICES, CASES, DTYPES, when=takes, quick=quick)
def test_the_last_rows_of_a_full_forward(backend: Backend, device: str, case: Decoding, dtype: torch.dtype) -> None:
    o = call(case, backend, dtype, device).cpu()
    wanted = expected(case, dtype)
    if case.layout == "bshd":
        assert o.is_contiguous()
        o = o.transpose(1, 2)
    assert o.shape == wanted.shape
    assert o.dtype == dtype
    iterative = case.new > FEW_NEW and isinstance(backend, Triton)
    allowed = allowance(wanted, spread(case), dtype, iterative=iterative, truncates=interpreted(backend))
    excess = Excess.of(o, wanted, allowed)
    assert excess.ratio <= 1, f"error over budget: {excess}"
    unseen = wanted.abs().amax(-1) == 0
    assert not o[unseen].any(), "a new token before the first key has an output of 0"


@pytest.mark.parametrize(
    "name",
    [pytest.param("plain", marks=pytest.mark.quick), "fewer_keys_than_new", "bshd", "prompt_starts", "pages_16"],
)
@every_backend
def test_info(backend: Backend, name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    tensors, keywords = arguments(case, torch.float32)
    skip_if_refused(backend, *tensors, op=lla_decode, **keywords)
    plain = lla_decode(*tensors, **keywords, backend=backend.name)
    o, info = lla_decode(*tensors, **keywords, return_info=True, backend=backend.name)
    _, wanted = lla_decode(*tensors, **keywords, return_info=True, backend="naive")
    assert torch.equal(o, plain)
    assert info.backend == backend.name
    assert info.iterations.dtype == torch.int32
    assert bool(info.iterations.any()) == (case.new > FEW_NEW and isinstance(backend, Triton))
    assert all(t.shape == plain.shape[:-1] for t in (info.iterations, info.residual, info.converged, info.omega))
    torch.testing.assert_close(info.omega, wanted.omega, rtol=1e-4, atol=0)
    assert info.converged.all()
    assert info.residual.max() < 1e-3
    assert not info.residual[info.omega == 0].any()


@pytest.mark.parametrize("ridge", [1.0, 1e-3, 1e-9])
@every_backend
def test_the_bound_on_a_residual(backend: Backend, ridge: float) -> None:
    """(4.8), of what the kernels of a few new tokens do not compute."""
    q, k, v, keywords = Decoding("", lengths=(63,)).make(torch.float32)
    skip_if_refused(backend, q, k, v, op=lla_decode, **keywords)
    call = lambda name: lla_decode(q, k, v, keywords["seqlens_k"], ridge_lambda=ridge, return_info=True, backend=name)
    _, info = call(backend.name)
    if not isinstance(backend, Triton):
        assert info.residual.max() < 1e-5
        return
    p = torch.softmax(q.double() @ k.double().mT / 4, -1)  # (1, H, 1, L)
    k_mean = p @ k.double()
    d, apart = k_mean - q, k.double() - k_mean
    a = (apart * p.mT).mT @ apart + ridge * torch.eye(16, dtype=torch.float64)
    h_2 = (d @ torch.linalg.solve(a, d.mT)).squeeze(-1)
    trace = a.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True)
    bound = 2.0**-22 * trace * (h_2 / ridge).sqrt() / d.norm(dim=-1)
    torch.testing.assert_close(info.residual.double(), bound, rtol=0.01, atol=0)
    assert torch.equal(info.converged, bound < 1e-3)
    assert info.converged.all() == (ridge > 1e-6)


@pytest.mark.quick
def test_info_or_out() -> None:
    q, k, v, keywords = Decoding("").make(torch.float32)
    with pytest.raises(ValueError, match=r"out: .*return_info=True.*out\.copy_\(o\)"):
        lla_decode(q, k, v, **keywords, return_info=True, out=torch.empty_like(q))
    with pytest.raises(TypeError, match=r"return_info: got int.*bool\(return_info\)"):
        lla_decode(q, k, v, **keywords, return_info=1)


@every_backend
def test_no_new_tokens(backend: Backend) -> None:
    q, k, v, keywords = Decoding("", new=0).make(torch.float32)
    skip_if_refused(backend, q, k, v, op=lla_decode, **keywords)
    assert lla_decode(q, k, v, **keywords, backend=backend.name).shape == q.shape


@pytest.mark.parametrize(
    "case",
    [
        Decoding("plain", lengths=(9, 4), room=12, dim=8, value_dim=8),
        Decoding("values_wide", lengths=(9,), room=12, dim=4, value_dim=20, new=2),
        Decoding("bshd", lengths=(9, 4), room=12, dim=8, value_dim=4, layout="bshd", key_heads=1, new=2),
        Decoding(
            "pages_bshd", lengths=(9, 4), page=16, room=16, dim=8, value_dim=12, layout="bshd", ridge="full", new=2
        ),
        Decoding("nothing_yet", lengths=(0, 0), room=12, dim=8, value_dim=8),
    ],
    ids=called,
)
@every_backend
def test_out_is_written_and_returned(backend: Backend, case: Decoding) -> None:
    tensors, keywords = arguments(case, torch.float32)
    skip_if_refused(backend, *tensors, op=lla_decode, **keywords)
    fresh = call(case, backend, torch.float32)
    wide = torch.full((*fresh.shape[:-1], 2 * fresh.shape[-1]), 7.0)
    for out in (torch.full_like(fresh, NAN), wide[..., ::2], torch.full_like(fresh.mT, NAN).contiguous().mT):
        version = out._version
        got = call(case, backend, torch.float32, out=out)
        assert got is out
        assert torch.equal(out, fresh)
        assert out._version > version
    assert (wide[..., 1::2] == 7).all()


@every_backend
def test_nothing_unseen_matters(backend: Backend) -> None:
    """Slots beyond the length, keys before the window, pages not in use: whatever they hold, the bits stay."""
    case = Decoding("", lengths=(40, 9), new=2, window=6, page=16, room=64, heads=4, key_heads=2)
    q, k, v, keywords = case.make(torch.float32)
    lengths = keywords["seqlens_k"]
    answers = []
    for junk in (0.0, 1e30, NAN):
        filled = [t.clone() for t in (k, v)]
        for t in filled:
            for b, length in enumerate(case.lengths):
                t[b, :, length:] = junk
                t[b, :, : max(0, length - 7)] = junk
        pages_k, pages_v, table = paged(*filled, 16)
        options = {"block_table": table, "window": 6, "ridge_lambda": 1.0}
        skip_if_refused(backend, q, pages_k, pages_v, op=lla_decode, seqlens_k=lengths, **options)
        answers.append(lla_decode(q, pages_k, pages_v, lengths, backend=backend.name, **options))
    assert answers[0].isfinite().all()
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0])


@functools.cache
def of_sequences_with(backend: Backend, nan: str | None) -> Tensor:
    """Three new tokens under a window of 9, with NaN in the second sequence's query, key or value of that name."""
    case = Decoding("", lengths=(20, 17), room=20, dim=8, value_dim=8, new=3, window=9, heads=4, key_heads=2)
    q, k, v, keywords = case.make(torch.float32)
    lengths = keywords["seqlens_k"]
    skip_if_refused(backend, q, k, v, op=lla_decode, seqlens_k=lengths, window=9)
    if nan is not None:
        {"q": q, "k": k, "v": v}[nan][1, 1, 2 if nan == "q" else 7] = NAN
    return lla_decode(q, k, v, lengths, ridge_lambda=1.0, window=9, backend=backend.name)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@every_backend
def test_nan_stays_in_its_sequence_and_head(backend: Backend, where: str) -> None:
    clean = of_sequences_with(backend, None)
    spoilt = of_sequences_with(backend, where)
    bad = torch.zeros(2, 4, 3, dtype=torch.bool)
    if where == "q":
        bad[1, 1, 2] = True
    else:  # key 7 of 17 is in the window of the first new token, which is at 14 and sees from 6 on, and of the next
        bad[1, 2:, :2] = True
    assert spoilt[bad].isnan().all()
    torch.testing.assert_close(spoilt[~bad], clean[~bad])


@every_backend
def test_numbers_that_only_the_device_sees(backend: Backend) -> None:
    """Lengths and pages out of range are taken as the nearest that there are."""
    case = Decoding("", lengths=(64, 0), new=2, page=16, room=64)
    q, k, v, _ = case.make(torch.float32)
    k, v, table = paged(k.nan_to_num(), v.nan_to_num(), 16)
    k, v = k.nan_to_num(), v.nan_to_num()  # of pages that are nobody's
    keywords = {"op": lla_decode, "ridge_lambda": 1.0, "seqlens_k": torch.tensor(case.lengths), "block_table": table}
    skip_if_refused(backend, q, k, v, **keywords)
    problem, inputs = problem_of(q, k, v, **keywords)

    def decode(first: int, second: int, lengths: tuple[int, int]) -> Tensor:
        pages = table.clone()
        pages[0, 1], pages[0, 2] = first, second
        given = inputs._replace(block_table=pages, seqlens_k=torch.tensor(lengths).int())
        return backend.decode(problem, given, empty_output(inputs.q, inputs.v))

    wanted = decode(0, len(k) - 1, (64, 0))
    assert wanted.isfinite().all()
    assert not wanted[1].any()
    torch.testing.assert_close(decode(-5, 10**6, (1000, -3)), wanted)


@pytest.mark.quick
def test_solvers() -> None:
    case = Decoding("", new=3)
    q, k, v, keywords = case.make(torch.float64)
    lengths = keywords["seqlens_k"]
    exact = lla_decode(q, k, v, lengths, ridge_lambda=0.3)
    for solver in ("cg", "pcg", "direct", flashlla.CG(rtol=1e-26, max_iters=200)):
        o = lla_decode(q, k, v, lengths, ridge_lambda=0.3, solver=solver)
        torch.testing.assert_close(o, exact, rtol=1e-4, atol=1e-4)
    with pytest.warns(flashlla.ConvergenceWarning, match="CG stopped early"):
        lla_decode(q, k, v, lengths, ridge_lambda=1e-3, solver=flashlla.CG(rtol=1e-26, max_iters=1))


@pytest.mark.quick
def test_no_gradient_is_dropped_in_silence() -> None:
    case = Decoding("")
    q, k, v, keywords = case.make(torch.float32)
    lengths, ridge = keywords["seqlens_k"], torch.tensor(1.0, requires_grad=True)
    for change in ({"q": q.requires_grad_()}, {"ridge": ridge}):
        given = {"q": q.detach(), "ridge": 1.0, **change}
        o = lla_decode(given["q"], k, v, lengths, ridge_lambda=given["ridge"])
        with pytest.raises(NotImplementedError, match=r"lla_decode has no gradient.*torch\.no_grad"):
            o.sum().backward()
        with pytest.raises(NotImplementedError, match=r"out: lla_decode has no gradient"):
            lla_decode(given["q"], k, v, lengths, ridge_lambda=given["ridge"], out=torch.empty_like(o))
        with torch.no_grad():
            again = lla_decode(given["q"], k, v, lengths, ridge_lambda=given["ridge"], out=torch.empty_like(o))
        assert torch.equal(again, o)
        assert not again.requires_grad
    with torch.inference_mode():
        assert torch.equal(lla_decode(q, k, v, lengths, ridge_lambda=1.0, out=torch.empty_like(o)), o)


def test_no_tangent_is_dropped_in_silence() -> None:
    q, k, v, keywords = Decoding("").make(torch.float32)
    for out in (None, torch.empty_like(q)):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(lambda q, out=out: lla_decode(q, k, v, keywords["seqlens_k"], out=out), (q,), (q,))


@pytest.mark.quick
def test_out_under_autocast() -> None:
    q, k, v, keywords = Decoding("").make(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=r"out: got .*float32, wanted .*bfloat16.*autocast, which is on"):
            lla_decode(q, k, v, keywords["seqlens_k"], out=torch.empty_like(q))
        lla_decode(q, k, v, keywords["seqlens_k"], out=torch.empty_like(q, dtype=torch.bfloat16))


def test_out_tells_who_saved_it_that_it_has_changed() -> None:
    q, k, v, keywords = Decoding("").make(torch.float32)
    out = torch.ones_like(q)
    product = torch.ones_like(q).requires_grad_() * out
    lla_decode(q, k, v, keywords["seqlens_k"], out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("backend", ["naive", "chunked"])
@pytest.mark.parametrize("name", [pytest.param("values_wide", marks=pytest.mark.quick), "bshd", "pages_bshd"])
def test_opcheck(backend: str, name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    tensors, keywords = arguments(case, torch.float32)
    asked = prepared(lla_decode, flashlla.explain, *tensors, **keywords, backend=backend).arguments
    for operator in (DECODE, DECODE_INFO):
        torch.library.opcheck(operator.op, operator.takes.flat(asked))
    into = OutArguments(*asked, torch.empty_like(DECODE(asked).o))
    torch.library.opcheck(DECODE_OUT.op, DECODE_OUT.takes.flat(into))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        o = lla_decode(q * 2, k, v, lengths, ridge_lambda=1.0, window=9)
        lla_decode(q * 2, k, v, lengths, ridge_lambda=1.0, out=out)
        again, info = lla_decode(q * 2, k, v, lengths, ridge_lambda=1.0, window=9, return_info=True)
        return o + again, out * info.omega.unsqueeze(-1)

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for lengths in ((40, 17), (41, 18), (5, 0)):
        q, k, v, keywords = Decoding("", lengths=lengths, new=2).make(torch.float32)
        outs = torch.zeros_like(q), torch.zeros_like(q)
        got, wanted = (f(q, k, v, keywords["seqlens_k"], out) for f, out in zip((compiled, step), outs))
        for a, b in zip((*got, outs[0]), (*wanted, outs[1])):
            torch.testing.assert_close(a, b)


def test_vmap_is_refused_with_what_to_do() -> None:
    q, k, v, keywords = Decoding("").make(torch.float32)
    lengths = keywords["seqlens_k"]
    with pytest.raises(NotImplementedError, match=r"vmap over lla_decode.*flatten"):
        torch.vmap(lambda q: lla_decode(q, k, v, lengths))(torch.stack([q, q]))


@pytest.mark.quick
def test_verify_and_explain() -> None:
    case = next(c for c in CASES if c.name == "pages_bshd")
    q, k, v, keywords = case.make(torch.float32)
    k, v, table = paged(k, v, 16)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    report = flashlla.verify(q, k, v, op=lla_decode, block_table=table, **keywords, **case.options())
    assert len(report.row) == 2 * 4 * 2
    assert report.error.max() < 1e-4
    assert "output error" in str(report)
    assert "residual" not in str(report)
    told = flashlla.explain(q, k, v, op=lla_decode, block_table=table, **keywords, **case.options(), backend="chunked")
    assert told.backend == "chunked"
    with pytest.raises(TypeError, match=r"explain\(\) lacks the keyword argument 'seqlens_k' of lla_decode"):
        flashlla.explain(q, k, v, op=lla_decode)
