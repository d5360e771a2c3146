"""Decoding: new tokens against a cache are the last rows of a full forward pass."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import lla_attention, lla_decode
from flashlla.autograd import decode_op, decode_out_op
from flashlla.backends.base import Backend
from flashlla.validation import prepare_decode
from flashlla.values import check_values
from tests.support.budget import Excess, allowance, evaluate, spreads_of
from tests.support.helpers import BACKENDS, DEVICES, DTYPES, interpreted, normal, problem_of, skip_if_refused, turn

NAN = float("nan")


@dataclass(frozen=True)
class Decoding:
    """One call; keys beyond a sequence's length hold NaN."""

    name: str
    lengths: tuple[int, ...] = (40, 17)
    new: int = 1
    heads: int = 2
    key_heads: int = 2
    room: int = 63
    dim: int = 16
    value_dim: int = 16
    window: int | None = None
    page: int | None = None
    layout: str = "bhsd"
    ridge: str = "number"
    ridge_lambda: float = 0.3
    scale: float | None = None

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k and v, (B, H, S, D), and the keywords that hold tensors."""
        batch = len(self.lengths)
        q = normal(batch, self.heads, self.new, self.dim, seed=1, dtype=dtype)
        k = normal(batch, self.key_heads, self.room, self.dim, seed=2, dtype=dtype)
        v = normal(batch, self.key_heads, self.room, self.value_dim, seed=3, dtype=dtype)
        for sequence, length in enumerate(self.lengths):
            k[sequence, :, length:] = v[sequence, :, length:] = NAN
        shapes = {"per_head": (self.heads, 1), "per_token": (self.new,), "full": (batch, self.heads, self.new)}
        ridge: Any = self.ridge_lambda
        if self.ridge != "number":
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            ridge = ridge * 3 ** normal(*shapes[self.ridge], seed=4, dtype=wide).clamp(-1, 1)
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return q, k, v, {"ridge_lambda": ridge, "seqlens_k": lengths}

    def options(self) -> dict[str, Any]:
        return {"window": self.window, "qk_scale": self.scale, "layout": self.layout}


CASES = (
    Decoding("plain"),
    Decoding("one_key", lengths=(1, 2)),
    Decoding("many_new", lengths=(63, 16), new=16),
    Decoding("fewer_keys_than_new", lengths=(3, 0, 9), new=5),
    Decoding("nothing_yet", lengths=(0, 0), new=2),
    Decoding("full_cache", lengths=(63, 63), new=3),
    Decoding("long", lengths=(300, 111), room=300, heads=1, key_heads=1, new=2),
    Decoding("heads_shared_3", heads=6, key_heads=2, new=3),
    Decoding("heads_shared_8", heads=8, key_heads=1, new=1),
    Decoding("dim_60", dim=60, value_dim=60, new=2),
    Decoding("dim_100", dim=100, value_dim=100, lengths=(111,), room=111),
    Decoding("values_narrow", value_dim=5, new=2),
    Decoding("values_wide", dim=8, value_dim=60, new=2),
    Decoding("window", window=7, new=3, lengths=(40, 5)),
    Decoding("window_1", window=1, new=2),
    Decoding("window_of_old", window=20, new=2, lengths=(63, 60)),
    Decoding("window_wider", window=1000, new=2),
    Decoding("bshd", layout="bshd", heads=4, key_heads=2, new=3, value_dim=8),
    Decoding("ridge_per_head", ridge="per_head", new=2),
    Decoding("ridge_per_token", ridge="per_token", new=3),
    Decoding("ridge_full", ridge="full", heads=6, key_heads=2, new=3),
    Decoding("ridge_weak", ridge_lambda=0.01, new=2),
    Decoding("scale", scale=-0.7, new=2),
    Decoding("pages_16", page=16, room=64, new=3),
    Decoding("pages_48", page=48, room=144, lengths=(100, 48, 0), new=2),
    Decoding("pages_window", page=16, room=128, lengths=(100, 60), window=20, new=2),
    Decoding("pages_bshd", page=16, room=64, layout="bshd", heads=6, key_heads=2, value_dim=12, ridge="full", new=4),
)


def paged(k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pages in an order of their own, some of nobody among them, and the table that finds them."""
    batch, heads, room, _ = k.shape
    each = room // size
    order = torch.randperm(batch * each + 3, generator=torch.Generator().manual_seed(0))
    table = order[: batch * each].reshape(batch, each).int()
    pages = []
    for t in (k, v):
        made = t.new_full((len(order), heads, size, t.shape[-1]), NAN)
        made[table.long()] = t.unflatten(2, (each, size)).transpose(1, 2)
        pages.append(made)
    return pages[0], pages[1], table


def expected(case: Decoding, dtype: torch.dtype) -> Tensor:
    """(B, Hq, N, Dv) in float64: the last rows of a full forward pass of each sequence, from inputs of ``dtype``."""
    q, k, v, keywords = case.make(dtype)
    found = []
    for b, length in enumerate(case.lengths):
        ridge = keywords["ridge_lambda"]
        if isinstance(ridge, Tensor):
            ridge = ridge.double().expand(len(case.lengths), case.heads, case.new)[b : b + 1]
        keys, values = (t[b : b + 1, :, :length].double() for t in (k, v))
        # Earlier queries before the new ones: their rows are computed and left.
        before = max(0, length - case.new)
        queries = torch.cat([normal(1, case.heads, before, case.dim, seed=9), q[b : b + 1].double()], 2)
        if isinstance(ridge, Tensor):
            ridge = torch.cat([torch.ones(1, case.heads, before, dtype=torch.float64), ridge], 2)
        o = lla_attention(
            queries,
            keys,
            values,
            ridge_lambda=ridge,
            qk_scale=case.scale,
            window=case.window,
            solver="direct",
            backend="naive",
        )
        found.append(o[:, :, before:])
    return torch.cat(found)


def call(
    case: Decoding, backend: Backend, dtype: torch.dtype, run: Callable[..., Any] = lla_decode, device: str = "cpu"
) -> Any:
    q, k, v, keywords = case.make(dtype)
    if case.page is not None:
        k, v, keywords["block_table"] = paged(k, v, case.page)
    if case.layout == "bshd":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    q, k, v = (t.to(device) for t in (q, k, v))
    keywords = {name: t.to(device) if isinstance(t, Tensor) else t for name, t in keywords.items()}
    skip_if_refused(backend, q, k, v, op=lla_decode, **keywords, **case.options())
    return run(q, k, v, keywords.pop("seqlens_k"), **keywords, **case.options(), backend=backend.name)


@functools.cache
def spread(case: Decoding) -> dict[str, Tensor]:
    """What the error budget knows of the output's rows: tests/support/budget.py."""
    q, k, v, keywords = case.make(torch.float64)
    k, v = (t.nan_to_num().repeat_interleave(case.heads // case.key_heads, 1) for t in (k, v))
    rows = q.shape[:-1]
    ridge = torch.as_tensor(keywords["ridge_lambda"], dtype=torch.float64).expand(rows)
    lengths = keywords["seqlens_k"][:, None, None, None]
    own, j = lengths - case.new + torch.arange(case.new)[:, None], torch.arange(case.room)
    visible = (j <= own) & (j < lengths) & (j > own - (case.window or case.room))
    grad_o, scale = torch.zeros(*rows, case.value_dim, dtype=torch.float64), case.scale or case.dim**-0.5
    run = lambda rounding, seed: [evaluate(q, k, v, ridge, grad_o, scale, 1e-12, visible, rounding, seed)[0]]
    return {kind: of[0] for kind, of in spreads_of(run, [expected(case, torch.float64)]).items()}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("error::flashlla.ConvergenceWarning", "error::flashlla.FallbackWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_rows_of_a_full_forward(backend: Backend, device: str, case: Decoding, dtype: torch.dtype) -> None:
    if interpreted(backend) and dtype != turn(backend, CASES.index(case)):
        pytest.skip("too many for the interpreter: one dtype each")
    o = call(case, backend, dtype, device=device).cpu()
    wanted = expected(case, dtype)
    if case.layout == "bshd":
        assert o.is_contiguous()
        o = o.transpose(1, 2)
    assert o.shape == wanted.shape
    assert o.dtype == dtype
    allowed = allowance(wanted, spread(case), dtype, iterative=False, truncates=interpreted(backend))
    excess = Excess.of(o, wanted, allowed)
    assert excess.ratio <= 1, f"error over budget: {excess}"
    unseen = wanted.abs().amax(-1) == 0
    assert not o[unseen].any(), "a new token before the first key has an output of 0"


@pytest.mark.parametrize("name", ["plain", "values_wide", "bshd", "pages_bshd", "nothing_yet"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_out_is_written_and_returned(backend: Backend, name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    fresh = call(case, backend, torch.float32)
    wide = torch.full((*fresh.shape[:-1], 2 * fresh.shape[-1]), 7.0)
    for out in (torch.full_like(fresh, NAN), wide[..., ::2], torch.full_like(fresh.mT, NAN).contiguous().mT):
        version = out._version
        got = call(case, backend, torch.float32, lambda *a, out=out, **o: lla_decode(*a, out=out, **o))
        assert got is out
        assert torch.equal(out, fresh)
        assert out._version > version
    assert (wide[..., 1::2] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_unseen_matters(backend: Backend) -> None:
    """Slots beyond the length, keys before the window, pages not in use: whatever they hold, the bits stay."""
    case = Decoding("", lengths=(40, 9), new=2, window=6, page=16, room=64, heads=4, key_heads=2)
    q, k, v, keywords = case.make(torch.float32)
    lengths = keywords["seqlens_k"]
    answers = []
    for junk in (0.0, 1e4, 1e30, NAN, float("inf")):
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


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sequence_and_head(backend: Backend, where: str) -> None:
    case = Decoding("", lengths=(40, 17), new=3, window=9, heads=4, key_heads=2)
    q, k, v, keywords = case.make(torch.float32)
    lengths = keywords["seqlens_k"]
    run = lambda: lla_decode(q, k, v, lengths, ridge_lambda=1.0, window=9, backend=backend.name)
    skip_if_refused(backend, q, k, v, op=lla_decode, seqlens_k=lengths, window=9)
    clean = run()
    {"q": q, "k": k, "v": v}[where][1, 1, 2 if where == "q" else 7] = NAN
    spoilt = run()
    bad = torch.zeros(2, 4, 3, dtype=torch.bool)
    if where == "q":
        bad[1, 1, 2] = True
    else:  # key 7 of 17 is in the window of the first new token, which is at 14 and sees from 6 on, and of the next
        bad[1, 2:, :2] = True
    assert spoilt[bad].isnan().all()
    torch.testing.assert_close(spoilt[~bad], clean[~bad])


@pytest.mark.parametrize("backend", BACKENDS)
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
        return backend.decode(problem, inputs._replace(block_table=pages, seqlens_k=torch.tensor(lengths).int()))

    wanted = decode(0, len(k) - 1, (64, 0))
    assert wanted.isfinite().all()
    assert not wanted[1].any()
    torch.testing.assert_close(decode(-5, 10**6, (1000, -3)), wanted)


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
@pytest.mark.parametrize("name", ["values_wide", "bshd", "pages_bshd"])
def test_opcheck(backend: str, name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    q, k, v, keywords = case.make(torch.float32)
    if case.page is not None:
        k, v, keywords["block_table"] = paged(k, v, case.page)
    if case.layout == "bshd":
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    arguments = prepare_decode(q, k, v, **keywords, **case.options()).arguments
    torch.library.opcheck(decode_op, (*arguments, backend))
    out = decode_op(*arguments, backend)
    torch.library.opcheck(decode_out_op, (*arguments, backend, torch.empty_like(out)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    backend = "inductor" if shutil.which("g++") or shutil.which("clang++") else "aot_eager"

    def step(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        o = lla_decode(q * 2, k, v, lengths, ridge_lambda=1.0, window=9)
        lla_decode(q * 2, k, v, lengths, ridge_lambda=1.0, out=out)
        return o + 1, out * 3

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


def test_verify_and_explain() -> None:
    case = next(c for c in CASES if c.name == "pages_bshd")
    q, k, v, keywords = case.make(torch.float32)
    k, v, table = paged(k, v, 16)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    report = flashlla.verify(q, k, v, op=lla_decode, block_table=table, **keywords, **case.options())
    assert len(report.row) == 2 * 6 * 4
    assert report.error.max() < 1e-4
    assert "output error" in str(report)
    assert "residual" not in str(report)
    told = flashlla.explain(q, k, v, op=lla_decode, block_table=table, **keywords, **case.options(), backend="chunked")
    assert told.backend == "chunked"
    with pytest.raises(TypeError, match=r"explain\(\) lacks the keyword argument 'seqlens_k' of lla_decode"):
        flashlla.explain(q, k, v, op=lla_decode)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(2, 2, 17, 8)}, ValueError, ["q:", "17 new tokens", "1 to 16", "lla_attention"]),
        ({"q": torch.zeros(2, 2, 0, 8)}, ValueError, ["q:", "0 new tokens"]),
        ({"q": torch.zeros(2, 2, 8)}, ValueError, ["q:", "(2, 2, 8)", "unsqueeze(2) for one new", "unsqueeze(1)"]),
        ({"q": torch.zeros(2, 2, 8), "layout": "bshd"}, ValueError, ["q:", "(B, N, H, D)", "unsqueeze(1) for one new"]),
        (
            {"q": torch.zeros(2, 1, 4, 8), "k_cache": torch.zeros(2, 20, 2, 8), "v_cache": torch.zeros(2, 20, 2, 8)},
            ValueError,
            ["k_cache:", "20 heads", "(B, S, H, D)", "layout='bshd'"],
        ),
        ({"k_cache": torch.zeros(2, 20, 8)}, ValueError, ["k_cache:", "(2, 20, 8)", "4 dimensions"]),
        ({"k_cache": torch.zeros(3, 2, 20, 8)}, ValueError, ["k_cache:", "(3, 2, 20, 8)", "batch size", "block_table"]),
        ({"v_cache": torch.zeros(2, 2, 19, 8)}, ValueError, ["v_cache:", "(2, 2, 19, 8)", "as k_cache"]),
        ({"k_cache": torch.zeros(2, 2, 20, 8).half()}, TypeError, ["k_cache:", "float16", "k_cache.to(q.dtype)"]),
        ({"seqlens_k": None}, TypeError, ["seqlens_k", "None", "the new ones counted"]),
        ({"seqlens_k": 3}, TypeError, ["seqlens_k", "int", "torch.full((2,), seqlens_k, dtype=torch.int32"]),
        ({"seqlens_k": [3, 4]}, TypeError, ["seqlens_k", "list", "torch.tensor"]),
        ({"seqlens_k": torch.ones(2)}, TypeError, ["seqlens_k", "float32", ".int()"]),
        ({"seqlens_k": torch.ones(3, dtype=torch.int32)}, ValueError, ["seqlens_k", "(3,)", "(2,)"]),
        ({"seqlens_k": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, ["seqlens_k", "meta"]),
        ({"seqlens_k": torch.tensor([20, 21])}, ValueError, ["seqlens_k", "21 at sequence 1", "0 to 20"]),
        ({"seqlens_k": torch.tensor([-1, 20])}, ValueError, ["seqlens_k", "-1 at sequence 0"]),
        ({"ridge_lambda": torch.ones(2, 2)}, ValueError, ["ridge_lambda", "(2, 2)", "(2, 2, 1)"]),
        ({"ridge_lambda": torch.zeros(2, 1)}, ValueError, ["ridge_lambda", "0.0", "above 0"]),
        ({"window": 0}, ValueError, ["window", "0"]),
        ({"layout": "thd"}, ValueError, ["layout", "'thd'"]),
        ({"solver": "drect"}, ValueError, ["solver", "did you mean 'direct'"]),
        ({"backend": "chunkd"}, ValueError, ["backend", "did you mean 'chunked'"]),
        ({"out": [1.0]}, TypeError, ["out", "list"]),
        ({"out": torch.zeros(2, 2, 8)}, ValueError, ["out", "(2, 2, 8)", "(2, 2, 1, 8)"]),
        ({"out": torch.zeros(2, 1, 2, 8)}, ValueError, ["out", "(2, 1, 2, 8)", "(2, 2, 1, 8)"]),
        ({"out": torch.zeros(2, 2, 1, 8).half()}, TypeError, ["out", "float16", "float32"]),
        ({"out": torch.zeros(2, 2, 1, 8, device="meta")}, ValueError, ["out", "meta", "cpu"]),
        ({"cg_rtol": 1.0}, TypeError, ["cg_rtol"]),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_bad_input_names_the_argument_and_what_came(change: dict[str, Any], error: type, words: list[str]) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(2, 2, 1, 8),
        "k_cache": torch.zeros(2, 2, 20, 8),
        "v_cache": torch.zeros(2, 2, 20, 8),
        "seqlens_k": torch.tensor([20, 3]),
        **change,
    }
    tensors = [given.pop(name) for name in ("q", "k_cache", "v_cache", "seqlens_k")]
    with pytest.raises(error) as caught:
        lla_decode(*tensors, **given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"block_table": [[0]]}, TypeError, ["block_table", "list"]),
        ({"block_table": torch.zeros(2, 2)}, TypeError, ["block_table", "float32"]),
        ({"block_table": torch.zeros(3, 2).int()}, ValueError, ["block_table", "(3, 2)", "B = 2"]),
        ({"block_table": torch.zeros(2).int()}, ValueError, ["block_table", "(2,)", "(B, pages)"]),
        ({"block_table": torch.tensor([[0, 1], [2, 5]])}, ValueError, ["block_table", "page 5", "sequence 1", "4"]),
        ({"block_table": torch.tensor([[0, 1], [-1, 2]])}, ValueError, ["block_table", "page -1", "fill"]),
        ({"seqlens_k": torch.tensor([20, 33])}, ValueError, ["seqlens_k", "33 at sequence 1", "0 to 32"]),
        ({"size": 24}, ValueError, ["k_cache", "24 keys", "multiple of 16"]),
        ({"pages": 0}, ValueError, ["k_cache", "no pages"]),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_bad_pages(change: dict[str, Any], error: type, words: list[str]) -> None:
    tables = {"block_table": torch.tensor([[0, 1], [2, 3]]), "seqlens_k": torch.tensor([20, 3])}
    given: dict[str, Any] = {"size": 16, "pages": 5, **tables, **change}
    cache = torch.zeros(given["pages"], 2, given["size"], 8)
    with pytest.raises(error) as caught:
        lla_decode(torch.zeros(2, 2, 1, 8), cache, cache, given["seqlens_k"], block_table=given["block_table"])
    for word in words:
        assert word in str(caught.value)


def test_checks_that_wait_for_the_device_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device of which no number can be read at all."""
    on = lambda *shape, dtype=torch.float32: torch.zeros(shape, device="meta", dtype=dtype)
    tensors = on(2, 2, 1, 8), on(5, 2, 16, 8), on(5, 2, 16, 8)
    tables = {"seqlens_k": on(2, dtype=torch.int32), "block_table": on(2, 3, dtype=torch.int32)}
    call = problem_of(*tensors, op=lla_decode, **tables)
    check_values(*call)
    monkeypatch.setenv("FLASHLLA_CHECK", "1")
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        check_values(*call)
