"""The Triton kernels without a GPU: in Triton's interpreter against the float64 oracle, and through its compiler.

What a GPU run must show is in test_gpu.py.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import CG, PCG, Direct, lla_attention, lla_attention_varlen, lla_decode
from tests.support.budget import budget
from tests.support.cases import BY_NAME, DATA
from tests.support.helpers import differentiable
from tests.support.interpreter import hasten

pytest.importorskip("triton")
hasten()
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="with a GPU, test_gpu.py runs the kernels themselves"
)
NAMES = ("o", "dq", "dk", "dv", "dridge")


def make(shape: tuple[int, ...], dtype: torch.dtype, offset: float = 0.0) -> list[Tensor]:
    """q, k, v, grad_o."""
    generator = torch.Generator().manual_seed(sum(shape))
    q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
    point = torch.randn(shape[-1], generator=generator)
    point *= offset / point.norm()
    return [t.to(dtype) for t in (q + point, k + point, v, grad)]


def step(tensors: list[Tensor], ridge: float | Tensor, **options: object) -> dict[str, Tensor]:
    q, k, v = (t.detach().requires_grad_() for t in tensors[:3])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    ridge = (torch.as_tensor(ridge).to(wide).expand(q.shape[:-1])).clone().requires_grad_()
    o = lla_attention(q, k, v, ridge_lambda=ridge, **options)
    grads = torch.autograd.grad(o, (q, k, v, ridge), tensors[3].to(o.dtype))
    return dict(zip(NAMES, (o.detach(), *grads)))


def check(got: dict[str, Tensor], want: dict[str, Tensor], limit: float, small: float = 0.0) -> None:
    """Relative errors in the Frobenius norm; ``small``: what a root mean square below it counts as."""
    for name in NAMES:
        size = max(want[name].norm().item(), small * want[name].numel() ** 0.5)
        error = (got[name].double() - want[name]).norm().item() / size
        assert error <= limit, f"{name}: {error:.1e}"


# The interpreter truncates to bfloat16 where devices round: 3.3e-3 of these limits is that.
@interpreted
@pytest.mark.parametrize(
    ("dtype", "length", "dim", "ridge", "limit"),
    [
        (torch.float32, 1, 8, 1.0, 2e-6),
        (torch.float32, 37, 16, 0.1, 4e-5),
        (torch.float32, 70, 3, 10.0, 1e-5),
        (torch.float16, 7, 16, 0.2, 1.5e-2),
        (torch.float16, 100, 24, 1.0, 4e-3),
        (torch.bfloat16, 65, 16, 0.2, 1.2e-2),
        (torch.bfloat16, 63, 40, 10.0, 5e-3),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_every_gradient_against_the_oracle(
    dtype: torch.dtype, length: int, dim: int, ridge: float, limit: float
) -> None:
    tensors = make((1, 2, length, dim), dtype)
    ridges = ridge * torch.linspace(0.5, 2, length)
    want = step([t.double() for t in tensors], ridges, backend="naive")
    check(step(tensors, ridges, backend="triton"), want, limit, small=1e-3)


@interpreted
@pytest.mark.parametrize("name", ["offset", "scale_large", "sharp", "ridge_weak"])
def test_float32_where_digits_are_scarce(name: str) -> None:
    """Keys far from the origin; weights so sharp that the adjoint's right-hand side is a difference of large sums; and
    probes so long that what k_mean is off by shows in z.k_mean."""
    case = BY_NAME[name]
    leaves = differentiable(case.make(torch.float32))
    keywords = case.keywords(leaves)
    o = lla_attention(*case.arrange(leaves), **keywords, cg_atol=0.0, cg_rtol=0.0, cg_max_iters=1000, backend="triton")
    o.backward(leaves["grad_o"])
    gradients = {n: leaf.grad for n, leaf in leaves.items() if n != "grad_o"}
    for n, excess in budget(name, torch.float32, iterative=True).worst(o, gradients).items():
        assert excess.ratio <= 1, f"{n}: {excess}"


@interpreted
def test_queries_with_fewer_keys_than_dimensions() -> None:
    """What they solve for lies among the keys seen, where A is large; beside them A is a weak ridge, and magnifies."""
    tensors = make((1, 2, 7, 64), torch.float16)
    want = step([t.double() for t in tensors], 0.1, backend="naive")
    got = step(tensors, 0.1, backend="triton")
    for name, limit in (("o", 2e-2), ("dq", 4e-3), ("dk", 8e-2), ("dv", 2e-2), ("dridge", 4e-2)):
        assert (got[name].double() - want[name]).norm() <= limit * want[name].norm(), name


@interpreted
@pytest.mark.parametrize("solver", ["cg", "pcg"])
@pytest.mark.parametrize("backend", ["triton", "triton_pcg"])
def test_solvers(backend: str, solver: str) -> None:
    tensors = make((1, 1, 40, 8), torch.float32)
    if backend == "triton_pcg" and solver == "cg":
        with pytest.raises(flashlla.UnsupportedError, match="fuses the solver PCG"):
            step(tensors, 0.1, backend=backend, solver=solver)
        return
    want = step([t.double() for t in tensors], 0.1, backend="naive")
    check(step(tensors, 0.1, backend=backend, solver=solver), want, 1e-5)


@interpreted
def test_what_is_refused_and_why() -> None:
    q, k, v, _ = make((1, 1, 4, 8), torch.float32)
    reason = lambda *x, **o: flashlla.explain(*x, backend="triton", **o).reasons["triton"]
    assert "not Direct" in reason(q, k, v, solver=Direct())
    assert "float64" in reason(q.double(), k.double(), v.double())
    wide = torch.zeros(1, 1, 2, 300)
    assert "up to 256" in reason(wide, wide, wide)
    assert reason(q, k, v, solver=CG(rtol=1e-4)) is None
    assert reason(q, k, v, solver=PCG()) is None


@interpreted
def test_keys_far_from_the_origin() -> None:
    errors = []
    for offset in (0.0, 30.0):
        tensors = make((1, 1, 64, 16), torch.float16, offset)
        want = step([t.double() for t in tensors], 1.0, backend="naive")["o"]
        got = step(tensors, 1.0, backend="triton")["o"]
        errors.append(((got.double() - want).norm() / want.norm()).item())
    assert errors[1] <= 2 * errors[0] + 2e-3, errors


@interpreted
@pytest.mark.parametrize("size", [1e30, 1e-6])
def test_sizes_that_float16_does_not_hold(size: float) -> None:
    """Keys and queries of any size, values and gradients of any other."""
    tensors = make((1, 1, 33, 8), torch.bfloat16)
    want = step([t.double() for t in tensors], 1.0, backend="naive")
    scaled = [tensors[0], tensors[1], (tensors[2].float() * size).bfloat16(), tensors[3]]
    got = step(scaled, 1.0, backend="triton")
    for name, factor in (("o", size), ("dq", size), ("dk", size), ("dv", 1.0)):
        error = (got[name].double() / factor - want[name]).norm() / want[name].norm()
        assert error < 1e-2, (name, error)
    root = 2.0**40 if size > 1 else 2.0**-20
    moved = [(t.float() * root).bfloat16() for t in tensors[:2]]
    got = step([*moved, *tensors[2:]], root**2, backend="triton", qk_scale=8**-0.5 / root**2)
    assert (got["o"].double() - want["o"]).norm() / want["o"].norm() < 1e-2
    assert (got["dk"].double() * root - want["dk"]).norm() / want["dk"].norm() < 1e-2


@interpreted
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_gradients_of_any_size_are_as_exact(size: float) -> None:
    tensors = make((1, 1, 33, 8), torch.float32)
    want = step([t.double() for t in tensors], 0.1, backend="naive")
    tensors[3] = tensors[3] * size
    got = step(tensors, 0.1, backend="triton")
    check({n: t if n == "o" else t.double() / size for n, t in got.items()}, want, 1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_in_their_rows(dtype: torch.dtype, which: str, bad: float) -> None:
    tensors = make((1, 2, 40, 8), dtype)
    clean = step(tensors, 1.0, backend="triton")
    at = ("q", "k", "v", "grad").index(which)
    tensors[at] = tensors[at].clone()
    tensors[at][0, 0, 21, 3] = bad
    got = step(tensors, 1.0, backend="triton")
    for name in NAMES:
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


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strided_inputs(dtype: torch.dtype) -> None:
    tensors = make((2, 3, 20, 8), dtype)
    plain = step(tensors, 1.0, backend="triton")
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    views[3] = views[3].transpose(2, 3).contiguous().transpose(2, 3)  # rows that are not contiguous
    got = step(views, 1.0, backend="triton")
    assert got["o"].stride() == views[0].stride()
    for name in NAMES:
        assert torch.equal(got[name], plain[name]), name


@interpreted
def test_how_the_solve_went() -> None:
    q, k, v, _ = make((1, 1, 40, 8), torch.float32)
    _, info = lla_attention(q, k, v, ridge_lambda=0.1, backend="triton", return_info=True)
    assert info.converged.all()
    assert 0 < info.iterations[0, 0, -1] <= 32
    assert info.iterations[0, 0, 0] == 1  # A = lambda I
    assert (info.residual <= 2e-6).all()
    _, info = lla_attention(q, k, v, ridge_lambda=0.1, backend="triton", return_info=True, cg_max_iters=2)
    assert info.iterations.max() == 2
    assert not info.converged.all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_gram(monkeypatch: pytest.MonkeyPatch, causal: bool, dtype: torch.dtype) -> None:
    """Fewer iterations for correlated keys, forward and backward the same."""
    from flashlla.backends.triton import gram

    monkeypatch.setattr(gram, "SEGMENT", 64)
    q, k = (torch.from_numpy(t).to(dtype) for t in DATA["correlated"](np.random.default_rng(0), (1, 1, 150, 12)))
    tensors = [q, k, *make((1, 1, 150, 12), dtype)[2:]]
    options = {"causal": causal, "qk_scale": 12**-0.5 if causal else 0.05}
    solver = PCG(max_iters=200, preconditioner="gram")
    call = functools.partial(lla_attention, *tensors[:3], **options, ridge_lambda=0.02, return_info=True)
    plain, info = (call(backend="triton", solver=s)[1].iterations for s in (CG(max_iters=200), solver))
    first = 64 if causal else 0  # earlier queries have no keys in common
    assert info[..., first:].float().mean() < 0.8 * plain[..., first:].float().mean()
    assert torch.equal(info[..., :first], plain[..., :first])
    got = step(tensors, 0.02, backend="triton", solver=solver, **options)
    want = step([t.double() for t in tensors], 0.02, backend="naive", **options)
    check(got, want, 3e-5 if dtype == torch.float32 else 1.5e-2)


class _Kernel:
    """Stands for one of Triton's: launches, and what it has compiled, are told apart by name."""

    arg_names = ("x", "n", "scale", "BLOCK")
    __name__ = "kernel"

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[object, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def launch(*arguments: object, **settings: object) -> object:
            self.launches.append(("compile", arguments))
            return {(*grid, 1, 1)[:3]: lambda *all_: self.launches.append(("again", all_))}

        return launch


def test_a_kernel_is_launched_at_once_only_where_triton_would_compile_nothing_else() -> None:
    from flashlla.backends.triton import launch

    kernel, x = _Kernel(), torch.zeros(40)
    cpu = torch.device("cpu")

    def how(x: torch.Tensor | None = x, n: int = 7, scale: float = 0.5, block: int = 64, warps: int = 4) -> str:
        launch.launch(kernel, "solve", (3,), cpu, x, n, scale, BLOCK=block, num_warps=warps)
        return kernel.launches[-1][0]

    assert how() == "compile"
    assert how() == "again"
    assert kernel.launches[-1][1] == (x, 7, 0.5, 64)
    assert how(x=torch.ones(9), n=99, scale=2.0) == "again"
    others: list[dict[str, Any]] = [
        {"x": x[1:]}, {"x": x.half()}, {"x": None}, {"n": 1}, {"n": 16}, {"n": 2**31 + 1}, {"block": 32}, {"warps": 8},
    ]  # fmt: skip
    for other in others:
        assert how(**other) == "compile"
        assert how(**other) == "again"


@interpreted
def test_gram_is_the_default_of_long_sequences_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashlla.backends import triton
    from flashlla.backends.triton import gram

    monkeypatch.setattr(gram, "SEGMENT", 64)
    monkeypatch.setattr(triton, "GRAM_LEAST_KEYS", 149)
    q, k = (torch.from_numpy(t).bfloat16() for t in DATA["correlated"](np.random.default_rng(0), (1, 1, 150, 12)))
    v = make((1, 1, 150, 12), torch.bfloat16)[2]

    def iterations(length: int, dtype: torch.dtype, solver: str | None) -> torch.Tensor:
        tensors = (t[:, :, :length].to(dtype) for t in (q, k, v))
        _, info = lla_attention(*tensors, ridge_lambda=0.02, backend="triton", solver=solver, return_info=True)
        return info.iterations

    bf16, fp32 = torch.bfloat16, torch.float32
    assert torch.equal(iterations(150, bf16, None), iterations(150, bf16, "pcg_gram"))
    assert iterations(150, bf16, None).float().mean() < 0.8 * iterations(150, bf16, "cg").float().mean()
    assert torch.equal(iterations(149, bf16, None), iterations(149, bf16, "cg"))
    assert torch.equal(iterations(150, fp32, None), iterations(150, fp32, "cg"))


@interpreted
@pytest.mark.parametrize("data", ["iid", "power_law", "sharp"])
def test_a_last_step_saves_iterations_and_costs_no_accuracy(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    """(4.7): as good as what CG's tolerance allows, and converged by its own account, though iterations are saved."""
    import triton.language as tl

    from flashlla.backends.triton import solve

    q, k = (torch.from_numpy(t).bfloat16() for t in DATA[data](np.random.default_rng(0), (1, 1, 200, 12)))
    tensors = [q, k, *make((1, 1, 200, 12), torch.bfloat16)[2:]]
    want = step([t.double() for t in tensors], 10.0, backend="naive")

    def call() -> tuple[float, float]:
        info = lla_attention(*tensors[:3], ridge_lambda=10.0, backend="triton", solver="cg", return_info=True)[1]
        assert info.converged.all()
        got = step(tensors, 10.0, backend="triton", solver="cg")
        error = max(((got[n] - want[n]).norm() / want[n].norm()).item() for n in ("o", "dq", "dk", "dv", "dridge"))
        return info.iterations.float().mean().item(), error

    iterations, error = call()
    monkeypatch.setattr(solve, "LAST_MOST", tl.constexpr(0.0))
    plain_iterations, plain_error = call()
    assert error < 1.2 * plain_error
    assert iterations <= (0.9 if data == "iid" else 1.0) * plain_iterations


@interpreted
def test_a_last_step_is_not_taken_on_the_word_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of one query, of one query many times, and such as need no sweep, are what they are without it."""
    import triton.language as tl

    from flashlla.backends.triton import solve

    q, k = (torch.from_numpy(t).bfloat16() for t in DATA["power_law"](np.random.default_rng(1), (1, 24, 193, 16)))
    v = make((1, 24, 193, 16), torch.bfloat16)[2]
    flat = k.clone()
    flat[..., 0] = 0
    away = torch.zeros_like(q)
    away[..., 0] = 2000 * (1 + 0.1 * torch.rand(q.shape[:-1]))

    def outputs() -> list[torch.Tensor]:
        cases = (
            (q[:, :, -1:], k, 1.0),
            (q[:, :, -1:].expand(-1, -1, 64, -1), k, 1.0),
            (away[:, :2], flat[:, :2], 0.01),
        )
        return [
            lla_attention(q, k, v[:, : k.shape[1]], ridge_lambda=ridge, causal=False, backend="triton", solver="cg")
            for q, k, ridge in cases
        ]

    found = outputs()
    monkeypatch.setattr(solve, "LAST_MOST", tl.constexpr(0.0))
    (one, same, none), (plain_one, plain_same, plain_none) = found, outputs()
    assert torch.equal(one, plain_one)
    assert torch.equal(none, plain_none)
    far = (same - plain_same).double().norm(dim=-1) / plain_same.double().norm(dim=-1)
    assert far.max() < 5e-3


@interpreted
@pytest.mark.parametrize("data", ["iid", "power_law", "sharp"])
def test_gram_is_left_off_where_it_would_not_help(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    from flashlla.backends.triton import gram

    monkeypatch.setattr(gram, "SEGMENT", 128)
    q, k = (torch.from_numpy(t).bfloat16() for t in DATA[data](np.random.default_rng(0), (1, 1, 256, 12)))
    v = make((1, 1, 256, 12), torch.bfloat16)[2]
    plain, o = (
        lla_attention(q, k, v, ridge_lambda=1.0, backend="triton", solver=solver)
        for solver in (CG(max_iters=200), PCG(max_iters=200, preconditioner="gram"))
    )
    assert torch.equal(o, plain)


@interpreted
@pytest.mark.parametrize("spoilt", ["query", "ridge"])
def test_one_bad_number_leaves_gram_to_the_others(monkeypatch: pytest.MonkeyPatch, spoilt: str) -> None:
    from flashlla.backends.triton import gram

    monkeypatch.setattr(gram, "SEGMENT", 64)
    q, k = (torch.from_numpy(t).float() for t in DATA["correlated"](np.random.default_rng(0), (1, 1, 150, 12)))
    v, grad = make((1, 1, 150, 12), torch.float32)[2:]
    ridge = torch.full((150,), 0.02)
    # So few that gradients show whether the adjoint solve had it.
    solver = PCG(max_iters=12, preconditioner="gram")
    clean = step([q, k, v, grad], ridge, backend="triton", solver=solver)
    if spoilt == "query":
        q[0, 0, 70, 3] = float("nan")
    else:
        ridge[70] = float("inf")
    got = step([q, k, v, grad], ridge, backend="triton", solver=solver)
    others = torch.arange(150) != 70
    for name in ("o", "dq", "dridge"):
        torch.testing.assert_close(got[name][0, 0][others], clean[name][0, 0][others], rtol=2e-3, atol=2e-3)


@interpreted
def test_gram_is_left_off_where_queries_see_no_more_keys_than_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashlla.backends.triton import gram

    monkeypatch.setattr(gram, "SEGMENT", 64)
    q, k = (torch.from_numpy(t).float() for t in DATA["correlated"](np.random.default_rng(0), (1, 1, 150, 12)))
    v = make((1, 1, 150, 12), torch.float32)[2]
    plain, o = (
        lla_attention(q, k, v, ridge_lambda=1e-3, window=12, backend="triton", solver=solver)
        for solver in (CG(max_iters=200), PCG(max_iters=200, preconditioner="gram"))
    )
    assert torch.equal(o, plain)


@interpreted
@pytest.mark.parametrize("solver", ["cg", "pcg"])
@pytest.mark.parametrize("size", [1e20, 3e38])
def test_a_key_as_good_as_infinite_reaches_those_who_see_it(size: float, solver: str) -> None:
    tensors = make((1, 1, 21, 8), torch.float32)
    clean = step(tensors, 1.0, backend="triton", solver=solver)
    tensors[1] = tensors[1].clone()
    tensors[1][0, 0, 9] = size
    got = step(tensors, 1.0, backend="triton", solver=solver)
    for name in ("o", "dq", "dridge"):
        assert got[name][0, 0, 9:].isnan().all()
        torch.testing.assert_close(got[name][0, 0, :9], clean[name][0, 0, :9])


@interpreted
def test_gram_of_keys_of_few_dims_and_a_ridge_of_almost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its matrix is singular but for the ridge, which has no digits in it."""
    from flashlla.backends.triton import gram

    monkeypatch.setattr(gram, "SEGMENT", 64)
    q, k, v = (t.float() for t in make((1, 1, 150, 32), torch.float32)[:3])
    k = 3 * k[..., :3] @ torch.linspace(-1, 1, 96).view(3, 32)
    o, info = lla_attention(
        0.1 * q, k, v, ridge_lambda=1e-6, backend="triton", solver=PCG(preconditioner="gram"), return_info=True
    )
    assert o.isfinite().all()
    assert info.residual.isfinite().all()


@interpreted
def test_what_gram_is_not_made_for() -> None:
    solver = PCG(preconditioner="gram")
    q, k, v, _ = make((1, 1, 4, 200), torch.float32)
    assert "up to 128" in str(flashlla.explain(q, k, v, solver=solver).reasons["triton"])
    q, k, v = (torch.randn(1, 1, 9, 8) for _ in range(3))
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
    why = flashlla.explain(q, k, v, op=lla_attention_varlen, cu_seqlens=lengths, max_seqlen=5, solver=solver).reasons
    assert "packed" in str(why["triton"])


@interpreted
@pytest.mark.parametrize("name", ["solve_kernel", "gram_sums_kernel", "decode_solve_kernel"])
def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from flashlla.backends.triton import decode, gram, launch

    def fail(*_: object, **__: object) -> None:
        raise ValueError("out of something")

    class Broken:
        __name__ = name

        def __getitem__(self, _: object) -> object:
            return fail

    module, call = {
        "solve_kernel": (launch, lla_attention),
        "gram_sums_kernel": (gram, functools.partial(lla_attention, solver="pcg_gram")),
        "decode_solve_kernel": (decode, functools.partial(lla_decode, seqlens_k=torch.tensor([4], dtype=torch.int32))),
    }[name]
    monkeypatch.setattr(module, name, Broken())
    q, k, v, _ = make((1, 1, 4, 8), torch.float32)
    with pytest.raises(RuntimeError, match=rf"{name}.*config.*BLOCK_.*set_backend\('chunked'\)") as caught:
        call(q, k, v, backend="triton")
    assert isinstance(caught.value.__cause__, ValueError)


def test_what_a_chip_has_no_shared_memory_for() -> None:
    from flashlla.backends.triton import configs

    assert "shared memory" in str(configs.too_large(200, torch.float32, (8, 9)))
    assert configs.too_large(200, torch.float16, (8, 9)) is None
    assert configs.too_large(128, torch.float32, (12, 0)) is None
    assert configs.too_large(256, torch.float32, (9, 0)) is None
    assert configs.gram_widest(torch.float32, (8, 9)) == 64
    assert configs.gram_widest(torch.float32, (8, 0)) == configs.gram_widest(torch.float16, (8, 9)) == 128


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("operand", [torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 128, 200, 256])
def test_tiles_of_dk_lie_inside_those_of_dq(head_dim: int, operand: torch.dtype, capability: tuple[int, int]) -> None:
    from flashlla.backends.triton import configs

    dq = configs.config("dq", head_dim, operand, capability)
    assert all(c.m <= configs.ROWS_PAD for c in configs.candidates("dq", head_dim, operand, capability))
    few = configs.config("dk", head_dim, operand, capability, few=True)
    for dk in (few, *configs.candidates("dk", head_dim, operand, capability)):
        assert dq.m % dk.m == 0


@interpreted
def test_few_programs_have_a_config_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two heads of 64 keys and room for two programs a processor; and the gradients are right with either."""
    from flashlla.backends.triton import configs, launch

    tiles = []
    run = launch.Call.launch
    spy = lambda self, kernel, name, *a, **s: (tiles.append((name, s.get("BLOCK_N"))), run(self, kernel, name, *a, **s))
    monkeypatch.setattr(launch.Call, "launch", spy)
    tensors = make((1, 2, 64, 64), torch.float16)
    want = step([t.double() for t in tensors], 1.0, backend="naive")
    for processors, keys in ((1, 32), (0, 64)):
        tiles.clear()
        monkeypatch.setattr(configs, "processors", lambda device, n=processors: n)
        check(step(tensors, 1.0, backend="triton"), want, 4e-3)
        assert ("dk", keys) in tiles
        assert ("dq", 64) in tiles


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, flashlla; sys.exit(any(m.split('.')[0] == 'triton' for m in sys.modules))"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    before = "import sys, torch; sys.exit(any(m.split('.')[0] == 'triton' for m in sys.modules))"
    if subprocess.run([sys.executable, "-c", before], env=environment).returncode:
        pytest.skip("torch itself imports Triton here")
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def compiled(table: Path, *options: str) -> list[dict[str, Any]]:
    """What benchmarks/compile_report.py finds with ``options``, which must be nothing amiss; no GPU takes part."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(root / "benchmarks" / "compile_report.py"), "--dtypes", "bfloat16"]
    run = subprocess.run(
        [*command, "--workers", "2", "--json", str(table), *options], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(table.read_text())["kernels"]


def test_every_kernel_compiles_for_three_architectures(tmp_path: Path) -> None:
    """bf16 at D = 64 and 128, with shared memory, spills and waits inside the limits."""
    lines = compiled(tmp_path / "kernels.json", "--plain", "--architectures", "80", "90", "100", "--dims", "64", "128")
    # Cards without Hopper's shared memory take the tiles of architecture 80, and have as little as 99 KiB.
    assert max(x["shared"] for x in lines if x["architecture"] == 80) <= 99 * 1024
    kernels = {(x["kernel"], x["architecture"], x["dim"]) for x in lines}
    from flashlla.backends.triton import backward, decode, forward, gram, prepare, solve

    modules = (backward, decode, forward, gram, prepare, solve)
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {k for k, _, _ in kernels} == written
    assert {(a, d) for _, a, d in kernels} == {(a, d) for a in (80, 90, 100) for d in (64, 128)}


def test_every_mask_compiles(tmp_path: Path) -> None:
    lines = compiled(tmp_path / "kernels.json", "--architectures", "90", "--dims", "64")
    assert {x["variant"] for x in lines} >= {"", "full", "group", "window", "seqlens_k", "packed", "packed group"}


@interpreted
@pytest.mark.parametrize("size", [0.0, 1e-21])
def test_keys_of_no_size(size: float) -> None:
    """As projections that begin at zero make them: softmax attention with equal weights, and no NaN."""
    tensors = make((1, 2, 20, 8), torch.bfloat16)
    tensors[1] = tensors[1] * size
    got, want = step(tensors, 1.0, backend="triton"), step([t.double() for t in tensors], 1.0, backend="naive")
    assert all(t.isfinite().all() for t in got.values())
    assert (got["o"].double() - want["o"]).norm() <= 1e-2 * want["o"].norm()
    assert (got["dv"].double() - want["dv"]).norm() <= 1e-2 * want["dv"].norm()


@interpreted
@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_a_first_key_far_from_all_others(factor: float) -> None:
    tensors = make((1, 1, 40, 8), torch.float32)
    tensors[1][:, :, 0] *= factor
    want = step([t.double() for t in tensors], 0.5, backend="naive")
    errors = []
    for backend in ("triton", "chunked"):
        got = step(tensors, 0.5, backend=backend, solver=CG(atol=0.0, rtol=0.0, max_iters=1000))
        errors.append(((got["o"].double() - want["o"]).norm() / want["o"].norm()).item())
    assert errors[0] <= 4 * errors[1] + 1e-6, errors


@interpreted
def test_the_nan_that_cuda_makes_survives_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    tensors = make((1, 1, 40, 8), torch.float32)
    tensors[1][0, 0, 21, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    try:
        torch.set_float32_matmul_precision("high")
        o = step(tensors, 1.0, backend="triton")["o"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert o[0, 0, 21:].isnan().all()
    assert o[0, 0, :21].isfinite().all()


@interpreted
def test_keys_whose_difference_lies_otherwise() -> None:
    """Strides that make PyTorch lay out k minus its first key with rows apart by one."""
    q, _, v, grad = make((1, 1, 7, 16), torch.float32)
    strided = torch.randn(1, 1, 22, generator=torch.Generator().manual_seed(0)).unfold(-1, 16, 1)
    want = step([t.double() for t in (q, strided, v, grad)], 1.0, backend="naive")
    o = lla_attention(q, strided, v, ridge_lambda=1.0, backend="triton")
    assert (o.double() - want["o"]).norm() <= 1e-5 * want["o"].norm()
