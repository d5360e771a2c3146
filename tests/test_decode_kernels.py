"""The decode kernels against the naive backend in float64: on a GPU where there is one, else in Triton's interpreter.

python -m pytest tests/test_decode_kernels.py            # without a GPU
python -m pytest -m gpu tests/test_decode_kernels.py     # on one
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.support.interpreter import hasten

pytest.importorskip("triton")
hasten()

from flashlla import lla_decode  # noqa: E402
from flashlla.backends.naive import Naive  # noqa: E402
from flashlla.backends.triton import configs, plan  # noqa: E402 (after hasten)
from flashlla.backends.triton.decode import decode  # noqa: E402
from flashlla.problem import Inputs, Mask, Problem, Report, empty_output  # noqa: E402
from flashlla.solvers import Direct  # noqa: E402
from tests.support.helpers import problem_of  # noqa: E402
from tests.support.units import matmul_precision  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.gpu
    if DEVICE == "cuda"
    else pytest.mark.skipif(not INTERPRETED, reason="neither a GPU nor the interpreter"),
]
# Errors in the Frobenius norm. Rounding the output to bfloat16 is 1.7e-3 of it; the interpreter truncates: 3.3e-3.
LIMITS = {torch.float32: 1.5e-5, torch.float16: 1.2e-3, torch.bfloat16: 4.5e-3 if INTERPRETED else 3e-3}


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels in Gluon, which have tests/test_decode_hopper.py."""
    monkeypatch.setenv("FLASHLLA_HOPPER", "0")


@dataclass
class Call:
    """One call of the kernels, its caches without pages."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    ridge: Tensor
    window: int | None = None
    delta_eps: float = 1e-12
    scale: float | None = None
    demanded: bool = False  # a direct solve

    @property
    def factor(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def run(
        self, pieces: int | None = None, page: int = 0, out: Tensor | None = None, spoil: float = float("nan"),
        tile: int | None = None, slices: int | None = None, report: Report | None = None,
    ) -> Tensor:  # fmt: skip
        """What the kernels make of it, with ``spoil`` wherever no query looks."""
        (batch, _, new, _), capacity = self.q.shape, self.k.shape[2]
        k, v = self.k.clone(), self.v.clone()
        for b, length in enumerate(self.lengths.tolist()):
            length = min(max(length, 0), capacity)
            first = 0 if self.window is None else max(0, length - new + 1 - self.window)
            for cache in (k, v):
                cache[b, :, length:] = spoil
                cache[b, :, :first] = spoil
        table = None
        if page:
            pages = -(-capacity // page)
            generator = torch.Generator().manual_seed(page)
            table = torch.randperm(batch * pages, generator=generator).to(DEVICE, torch.int32).view(batch, pages)
            k, v = (paged(cache, table, page, spoil) for cache in (k, v))
        if out is None:
            out = torch.empty(*self.q.shape[:3], self.v.shape[-1], dtype=self.q.dtype, device=DEVICE)
        d, v_dim = configs.padded(self.q.shape[-1]), configs.padded(self.v.shape[-1])
        full = torch.get_float32_matmul_precision() == "highest"
        tuned = configs.decode_config(d, v_dim, self.q.dtype != torch.float32, full)._replace(pieces=pieces)
        tuned = tuned._replace(tile=tile or tuned.tile, slices=slices)
        assert self.decoded(k, v, table, out, tuned, report) is out
        return out

    def decoded(
        self, k: Tensor, v: Tensor, table: Tensor | None, out: Tensor, config: configs.DecodeConfig | None = None,
        report: Report | None = None,
    ) -> Tensor:  # fmt: skip
        """What the kernels make of caches ``k`` and ``v``."""
        k_len = k.shape[2] * (1 if table is None else table.shape[1])
        problem = Problem(
            *self.q.shape[:2], k.shape[1], self.q.shape[2], k_len, self.q.shape[3], v.shape[3], self.q.dtype,
            self.q.device, self.factor, self.delta_eps, Direct(), solver_demanded=self.demanded,
            mask=Mask(window=self.window, padded=True, at_lengths=True),
            page_size=None if table is None else k.shape[2],
        )  # fmt: skip
        ridge = self.ridge.expand(self.q.shape[:3])
        inputs = Inputs(self.q, k, v, ridge, self.lengths, block_table=table)
        return decode(problem, inputs, out, report, config)

    def exact(self) -> Tensor:
        """The naive backend in float64, lengths out of range taken as the nearest that there are."""
        q, k, v, ridge = (t.double() for t in (self.q, self.k, self.v, self.ridge.expand(self.q.shape[:3])))
        keywords = {"ridge_lambda": ridge, "qk_scale": self.factor, "window": self.window}
        problem, inputs = problem_of(q, k, v, lla_decode, seqlens_k=torch.zeros_like(self.lengths), **keywords)
        problem = dataclasses.replace(problem, delta_eps=self.delta_eps)
        out = empty_output(inputs.q, inputs.v)
        return Naive().decode(problem, inputs._replace(seqlens_k=self.lengths), out)


def paged(cache: Tensor, table: Tensor, page: int, spoil: float) -> Tensor:
    """A cache of (B, H, L, D) in the pages of ``table``."""
    batch, heads, _, dim = cache.shape
    out = cache.new_full((table.numel(), heads, page, dim), spoil)
    for b in range(batch):
        for i, place in enumerate(table[b].tolist()):
            rows = cache[b, :, i * page : (i + 1) * page]
            out[place, :, : rows.shape[1]] = rows
    return out


def make(
    batch: int, heads: int, group: int, new: int, capacity: int, dim: int, v_dim: int, dtype: torch.dtype,
    lengths: list[int] | None = None, ridge: float = 0.1, offset: float = 0.0, **options: object,
) -> Call:  # fmt: skip
    generator = torch.Generator().manual_seed(capacity + dim)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    point = normal(dim)
    point *= offset / point.norm()
    q, k, v = (
        t.to(dtype).to(DEVICE)
        for t in (
            normal(batch, heads * group, new, dim) + point,
            normal(batch, heads, capacity, dim) + point,
            normal(batch, heads, capacity, v_dim),
        )
    )
    filled = torch.tensor(lengths or [capacity] * batch, dtype=torch.int32, device=DEVICE)
    return Call(q, k, v, filled, torch.full((1, 1, 1), ridge, device=DEVICE), **options)  # type: ignore[arg-type]


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


DTYPES = [pytest.param(t, id=str(t).removeprefix("torch.")) for t in LIMITS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("capacity", "dim", "v_dim", "group", "new", "pieces"),
    [
        (1, 3, 16, 1, 1, None),
        (17, 16, 3, 3, 1, 1),
        (33, 16, 32, 1, 1, 1),
        (33, 32, 16, 1, 1, 2),
        (63, 60, 60, 1, 3, 2),
        (111, 100, 40, 1, 1, 2),
        (300, 128, 128, 1, 1, None),
        (300, 64, 64, 2, 1, 5),
    ],
)
def test_against_the_definition(
    dtype: torch.dtype, capacity: int, dim: int, v_dim: int, group: int, new: int, pieces: int | None
) -> None:
    call = make(1, 1, group, new, capacity, dim, v_dim, dtype)
    assert error(call.run(pieces), call.exact()) <= LIMITS[dtype] * (2 if capacity < dim else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("dim", "v_dim"), [(256, 16), (16, 256), (130, 256)])
def test_moments_that_one_program_does_not_hold(dim: int, v_dim: int, dtype: torch.dtype) -> None:
    call = make(1, 1, 1, 1, 70, dim, v_dim, dtype, ridge=1.0)
    assert error(call.run(2), call.exact()) <= LIMITS[dtype] * 2


def test_many_queries_of_many_heads() -> None:
    call = make(1, 1, 8, 16, 17, 8, 8, torch.float32)
    assert error(call.run(), call.exact()) <= LIMITS[torch.float32]


@pytest.mark.parametrize("page", [0, 16, 48, 64])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_lengths_windows_and_pages(window: int | None, page: int) -> None:
    """Sequences of every length, NaN in all that no query sees, pages in any order."""
    call = make(4, 1, 2, 2, 144, 16, 8, torch.float16, lengths=[0, 1, 77, 144], window=window)
    got, want = call.run(3 if window is None else 1, page, tile=16 if page == 48 else None), call.exact()
    assert error(got, want) <= LIMITS[torch.float16]
    assert (got[0] == 0).all()
    assert (got[1, :, 0] == 0).all()
    assert (got[1, :, 1] != 0).all()


def test_lengths_out_of_range_are_clamped() -> None:
    call = make(3, 1, 1, 1, 20, 8, 8, torch.float32, lengths=[-5, 20, 1000])
    assert error(call.run(), call.exact()) <= LIMITS[torch.float32]


def test_pages_out_of_range_stay_in_their_sequence() -> None:
    call = make(2, 1, 1, 1, 32, 8, 8, torch.float32)
    table = torch.tensor([[1, 10**6], [2, 3]], dtype=torch.int32, device=DEVICE)
    k, v = (paged(t, torch.arange(4, device=DEVICE).view(2, 2), 16, 0.0) for t in (call.k, call.v))
    out = torch.empty(2, 1, 1, 8, device=DEVICE)
    call.decoded(k, v, table, out)
    assert error(out[1], call.exact()[1]) <= LIMITS[torch.float32]
    assert out.isfinite().all()
    table[0] = torch.tensor([-7, 3])
    call.decoded(k, v, table, out)
    assert error(out[1], call.exact()[1]) <= LIMITS[torch.float32]


@pytest.mark.parametrize("spoil", [float("inf"), 3e38])
def test_what_no_query_sees_does_not_matter(spoil: float) -> None:
    call = make(2, 2, 1, 1, 90, 16, 16, torch.bfloat16, lengths=[40, 90], window=30)
    assert torch.equal(call.run(2, spoil=spoil), call.run(2, spoil=0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_far_from_the_origin(dtype: torch.dtype) -> None:
    call = make(1, 2, 1, 1, 150, 32, 32, dtype, offset=30.0)
    assert error(call.run(2), call.exact()) <= LIMITS[dtype] * (10 if dtype == torch.float32 else 1.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharpness", [1.0, 8.0])
def test_one_key_with_nearly_all_the_weight(sharpness: float, dtype: torch.dtype) -> None:
    """C all but vanishes, the ridge is small beside |k|^2, and |z| is large: nothing may be left over of either."""
    call = make(1, 2, 1, 1, 70, 32, 32, dtype, scale=sharpness)
    assert error(call.run(2), call.exact()) <= LIMITS[dtype] * (10 if dtype == torch.float32 else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logit", [4.0, 9.0, 40.0, 700.0])
def test_a_weight_that_comes_late(logit: float, dtype: torch.dtype) -> None:
    """Of a key in the third tile, above all before it: by less than sums fade for, by more, by more than they hold; the
    last leaves nothing of the others."""
    call = make(1, 2, 1, 1, 150, 32, 32, dtype)
    call.k[:, :, 40] = call.q[:, :, 0] * (logit / call.factor / call.q[:, :, 0].float().square().sum(-1, True)).to(
        dtype
    )
    for slices in (None, 2):
        got = call.run(1, tile=16, slices=slices)
        assert error(got, call.exact()) <= LIMITS[dtype] * (10 if dtype == torch.float32 else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["first", "last"])
def test_one_key_far_from_all_others(which: str, dtype: torch.dtype) -> None:
    """Also the last, from which the others are measured."""
    call = make(1, 1, 1, 1, 70, 16, 16, dtype)
    call.k[:, :, 0 if which == "first" else -1] *= 20
    call.v[:, :, 0 if which == "first" else -1] *= 20
    assert error(call.run(2), call.exact()) <= LIMITS[dtype] * (20 if dtype == torch.float32 else 3)


@pytest.mark.parametrize("where", [0, 5, 69])
@pytest.mark.parametrize("size", [2.0**20, 2.0**-20])
def test_sizes_that_float16_does_not_hold(size: float, where: int) -> None:
    """Of all keys and values, in any unit; then of a single value beside the others."""
    call = make(1, 2, 1, 1, 70, 16, 16, torch.bfloat16)
    want = call.exact()
    scaled = Call(
        call.q * size, call.k * size, (call.v.float() * 1e30).bfloat16(), call.lengths, call.ridge * size**2,
        scale=0.25 / size**2,
    )  # fmt: skip
    assert error(scaled.run(2).double() / 1e30, want) <= LIMITS[torch.bfloat16] + 2e-3  # 1e30 is no power of two
    call.v[:, :, where] *= 1e30
    assert error(call.run(2), call.exact()) <= LIMITS[torch.bfloat16] * 1.5
    call.k[:, 0, where] = 0  # the origin may be zero, and suggests no unit at all
    call.v[:, 0, where] = 0
    assert error(call.run(2)[:, :1], call.exact()[:, :1]) <= LIMITS[torch.bfloat16] * 1.5


def test_keys_of_no_size() -> None:
    call = make(1, 1, 1, 1, 20, 16, 16, torch.bfloat16)
    call.k.zero_()
    assert error(call.run(2), call.exact()) <= LIMITS[torch.bfloat16]


def test_a_key_that_float16_does_not_hold() -> None:
    """With weight, far beyond what the other keys suggest."""
    call = make(1, 1, 1, 1, 70, 16, 16, torch.bfloat16, ridge=1e8)
    call.k[0, 0, 3] *= 2.0**17
    call.q[0, 0, 0] *= 2.0**-17
    assert error(call.run(2), call.exact()) <= LIMITS[torch.bfloat16] * 1.5


def not_finite_reaches_those_who_see_it(which: str, capacity: int, dim: int, dtype: torch.dtype) -> None:
    """Numbers of argument ``which`` in a call of two new tokens against ``capacity`` keys."""
    call = make(1, 2, 1, 2, capacity, dim, dim, dtype)
    call.ridge = call.ridge.expand(1, 2, 2).contiguous()
    clean = call.run(2)
    # A key and a value are seen by the second of the two new tokens, a query and a ridge are the first one's.
    row, place = {"q": (0, (0, 1, 0, 3)), "ridge": (0, (0, 1, 0))}.get(which, (1, (0, 1, capacity - 1, 3)))
    for bad in (float("nan"), float("inf"), float("-inf")):
        getattr(call, which)[place] = bad
        got = call.run(2)
        assert got[0, 1, row].isnan().all(), bad
        assert torch.equal(got[0, 0], clean[0, 0]), bad
        assert torch.equal(got[0, 1, 1 - row], clean[0, 1, 1 - row]), bad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["q", "k", "v", "ridge"])
def test_numbers_that_are_not_finite_reach_those_who_see_them(which: str, dtype: torch.dtype) -> None:
    not_finite_reaches_those_who_see_it(which, 40, 8, dtype)


def test_more_warps_than_the_device_is_counted_in() -> None:
    call = make(1, 1, 1, 1, 70, 16, 16, torch.bfloat16)
    usual = configs.decode_config(16, 16, True, True)
    out = torch.empty_like(call.q)
    call.decoded(call.k, call.v, None, out, usual._replace(warps=16))
    assert error(out, call.exact()) <= LIMITS[torch.bfloat16]


def test_strides() -> None:
    """Caches of (B, L, H, D), queries and outputs of (B, N, H, D), ridges of any stride."""
    call = make(2, 1, 4, 2, 20, 8, 16, torch.float16, lengths=[20, 11])
    swap = lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)
    call.ridge = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE).permute(2, 1, 0) + 0.1
    plain = call.run()
    assert error(plain, call.exact()) <= LIMITS[torch.float16]
    strided = Call(swap(call.q), swap(call.k), swap(call.v), call.lengths, call.ridge)
    out = torch.full((2, 2, 4, 32), 7.0, dtype=torch.float16, device=DEVICE)
    strided.run(out=out[..., :16].transpose(1, 2))
    assert torch.equal(out[..., :16].transpose(1, 2), plain)
    assert (out[..., 16:] == 7).all()
    columns = torch.empty(2, 4, 16, 2, dtype=torch.float16, device=DEVICE).transpose(2, 3)  # rows that lie apart
    assert torch.equal(strided.run(out=columns), plain)


@pytest.mark.quick
def test_the_guard() -> None:
    call = make(1, 1, 1, 1, 20, 8, 8, torch.float32, delta_eps=3.0)
    want = call.exact()
    assert error(call.run(2), want) <= LIMITS[torch.float32]
    call.delta_eps = 0.0
    assert error(call.run(2), want) > 0.1


@pytest.mark.parametrize("slices", [1, 2, 4])
def test_pieces_and_slices(slices: int) -> None:
    call = make(2, 1, 2, 1, 300, 64, 40, torch.bfloat16, lengths=[300, 90])
    want = call.exact()
    for pieces in (1, 3, 9):
        assert error(call.run(pieces, slices=slices), want) <= LIMITS[torch.bfloat16]


@pytest.mark.parametrize("pieces", [1, 2])
def test_what_does_not_converge_is_factored(pieces: int) -> None:
    """Iterations take the well-conditioned system, a factor the other; who demands a direct solve gets a factor of
    both, and the same numbers."""
    call = make(1, 2, 1, 1, 150, 64, 32, torch.float16)
    basis, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    spread = (torch.logspace(0, -2, 64)[:, None] * basis).to(DEVICE)  # along no axis, so that Jacobi does not help
    call.k[:, 1] = (call.k[:, 1].float() @ spread).to(torch.float16)
    call.ridge = torch.tensor([1.0, 1e-5], device=DEVICE).view(1, 2, 1)
    dtypes = torch.float32, torch.int32, torch.float32, torch.bool
    report = Report(*(torch.empty(1, 2, 1, dtype=dtype, device=DEVICE) for dtype in dtypes))
    got, want = call.run(pieces, report=report), call.exact()
    assert report.iterations.flatten().tolist()[1] == 0
    assert 0 < report.iterations.flatten().tolist()[0] <= configs.decode_iterations(64, True)
    assert report.residual[0, 0, 0] <= 2e-4
    direct = dataclasses.replace(call, demanded=True).run(pieces)
    for head in range(2):
        assert error(got[:, head], want[:, head]) <= LIMITS[torch.float16] * (1 if head == 0 else 20)
    assert torch.equal(direct[:, 1], got[:, 1])
    assert error(got[:, 0], direct[:, 0].double()) <= LIMITS[torch.float16]


def test_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory for one pair of sequence and head at a time."""
    call = make(2, 2, 2, 1, 40, 8, 8, torch.float16, lengths=[40, 22])
    whole = call.run(2)
    monkeypatch.setattr(configs, "DECODE_SCRATCH", 1)
    plan.forget()
    assert torch.equal(call.run(2), whole)


def test_tf32() -> None:
    call = make(1, 1, 1, 1, 100, 32, 32, torch.float32)
    with matmul_precision("high"):
        assert error(call.run(2), call.exact()) <= LIMITS[torch.float16]


def test_pieces_and_slices_fill_the_device_and_no_more() -> None:
    slicings = configs.decode_slicings(128, 128, True, True)
    assert slicings == [1, 2]
    assert configs.decode_slicings(128, 128, False, True) == [1]
    parts = lambda systems, tiles: configs.decode_parts(systems, tiles, 132, slicings)
    assert parts(8, 64) == (16, 1)
    assert parts(8, 8) == (8, 2)
    assert parts(8, 1) == (1, 1)
    assert parts(256, 64) == (1, 1)
    assert parts(8192, 256) == (1, 1)
    hopper = lambda systems, tiles: configs.decode_parts(systems, tiles, 132, [1], hopper=True)
    assert hopper(8, 8) == (4, 1)
    assert hopper(8, 64) == (8, 1)
    assert hopper(8, 256) == (16, 1)
    assert hopper(64, 8) == (1, 1)
    assert hopper(256, 8) == hopper(256, 64) == (1, 1)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_graph_stays_right_while_everything_changes() -> None:
    call = make(3, 2, 2, 1, 256, 64, 64, torch.bfloat16, lengths=[256, 100, 1])
    table = torch.randperm(48, device=DEVICE).to(torch.int32).view(3, 16)
    k, v = (paged(t, table, 16, 0.0) for t in (call.k, call.v))
    out = torch.empty(3, 4, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    go = lambda: call.decoded(k, v, table, out)
    go()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        go()
    for lengths in ([256, 100, 1], [0, 17, 255], [3, 256, 64]):
        call.lengths.copy_(torch.tensor(lengths))
        call.q.normal_()
        call.k.normal_()
        table.copy_(torch.randperm(48, device=DEVICE).view(3, 16))
        for cache, full in ((k, call.k), (v, call.v)):
            cache.copy_(paged(full, table, 16, 0.0))
        graph.replay()
        assert error(out, call.exact()) <= LIMITS[torch.bfloat16]
