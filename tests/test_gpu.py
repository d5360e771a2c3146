"""The Triton backend on a GPU: the whole matrix against float64, and what only a GPU shows.

    python -m pytest -m gpu tests/test_gpu.py -n 8

FLASHLLA_RECORD=FILE adds the errors of the matrix to FILE, one JSON line a case.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import CG, PCG, lla_attention
from tests.support.kernels import NAMES, make, step
from tests.support.poison import poisoned
from tests.support.units import matmul_precision

pytestmark = pytest.mark.gpu

EXACT = CG(atol=0.0, rtol=1e-24, max_iters=4000)
# Numbers of one head's matrices, D x D for each query, with which the naive backend takes no more than a few GiB.
MATRICES = 2**25
RIDGES = (0.1, 1.0, 10.0, "per token")
SOLVERS = {"cg": CG(max_iters=1000), "pcg": PCG(max_iters=1000)}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def held_by_all(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    """q, k, v and grad_o, the same for all dtypes: numbers that each of them holds."""
    tensors = make(shape, torch.bfloat16, seed=seed, device="cuda")
    return [torch.where(t.abs() < 1e-3, 0, t).to(dtype) for t in tensors]


def ridges(ridge: float | str, length: int) -> Tensor:
    if ridge == "per token":
        return torch.logspace(-1, 1, length, device="cuda")[torch.randperm(length, device="cuda")]
    return torch.full((length,), ridge, device="cuda")


def exact(tensors: list[Tensor], ridge: Tensor) -> dict[str, Tensor]:
    """Of the naive backend in float64; where its matrices do not fit, of the chunked one, solved to the last digits."""
    length, dim = tensors[0].shape[-2:]
    backend = "naive" if length * dim**2 <= MATRICES else "chunked"
    return step([t.double() for t in tensors], ridge, backend=backend, solver=EXACT)


def limits(dtype: torch.dtype, dim: int, length: int, weak: bool) -> dict[str, float]:
    """What each result may be off by, relative, in the Frobenius norm; the smallest ridge decides.

    With fewer keys than dimensions a weak ridge alone fixes most of the probe, which is long there (|d| / lambda), and
    the gradients are small differences of long vectors: the rounding of operands and the solver's tolerance show.
    """
    if dtype == torch.float32:
        output, gradient = (2e-5, 1e-4) if weak else (1e-5, 5e-5)
        growth = max(1.0, dim / 64) ** 2
    else:
        output, gradient = (6e-3, 1e-2) if weak else (3e-3, 5.1e-3)
        growth = max(1.0, dim / 64) ** 1.3 if weak else 1.0 if dim <= 128 else 1.5
    allowed = {name: growth * (output if name == "o" else gradient) for name in NAMES}
    allowed["dridge"] *= 1.5
    if length == dim:
        allowed = {name: 2 * x for name, x in allowed.items()}
    if length < dim:
        allowed = {name: (4 if name in ("dk", "dridge") else 2.5) * x for name, x in allowed.items()}
        if dtype == torch.float32:  # the first query: |z| |k| times the rounding of float32
            allowed["o"] *= 4
            allowed["dridge"] *= 10
    return allowed


@pytest.mark.parametrize("length", [1, 7, 63, 64, 100, 300, 1024, 4097])
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 96, 128, 192, 256])
def test_matrix(dim: int, length: int) -> None:
    failures = []
    for ridge in RIDGES:
        lam = ridges(ridge, length)
        want = exact(held_by_all((1, 2, length, dim)), lam)
        for dtype in DTYPES:
            for solver in SOLVERS:
                with poisoned():
                    got = step(held_by_all((1, 2, length, dim), dtype), lam, backend="triton", solver=SOLVERS[solver])
                allowed = limits(dtype, dim, length, ridge in (0.1, "per token"))
                errors = {}
                for name in NAMES:
                    # Exact gradients of a single query are 0: rounding counts against those of v, about 1.
                    floor = 1.0 if length == 1 else 1e-3
                    size = max(want[name].norm().item(), floor * want[name].numel() ** 0.5)
                    errors[name] = (got[name].double() - want[name]).norm().item() / size
                line = {"dim": dim, "length": length, "dtype": str(dtype), "ridge": ridge, "solver": solver, **errors}
                if path := os.environ.get("FLASHLLA_RECORD"):
                    with open(path, "a") as file:
                        file.write(json.dumps(line) + "\n")
                failures += [(line, n, allowed[n]) for n in NAMES if not errors[n] <= allowed[n]]
    assert not failures, "\n".join(f"{n} over {a:.1e}: {line}" for line, n, a in failures)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_from_run_to_run(dtype: torch.dtype) -> None:
    tensors, lam = held_by_all((2, 4, 1000, 64), dtype), ridges("per token", 1000)
    first = step(tensors, lam, backend="triton")
    for _ in range(3):
        again = step(tensors, lam, backend="triton")
        for name in NAMES:
            assert torch.equal(first[name], again[name]), name


def test_triton_is_what_auto_takes() -> None:
    q, k, v, _ = held_by_all((1, 2, 64, 64))
    assert flashlla.explain(q, k, v).backend == "triton"
    assert flashlla.explain(q.double(), k.double(), v.double()).backend == "chunked"


def test_cuda_graph_of_a_training_step() -> None:
    shape = (2, 4, 300, 64)
    static = held_by_all(shape)
    leaves = [t.requires_grad_() for t in static[:3]]

    def train() -> tuple[Tensor, ...]:
        o = lla_attention(*leaves, ridge_lambda=1.0)
        return (o, *torch.autograd.grad(o, leaves, static[3]))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        train()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train()
    for seed in (1, 2):
        fresh = held_by_all(shape, seed=seed)
        with torch.no_grad():
            for t, new in zip(static, fresh):
                t.copy_(new)
        graph.replay()
        want = train()
        for x, y in zip(captured, want):
            assert torch.equal(x, y)


def test_no_synchronisation() -> None:
    q, k, v, grad = held_by_all((1, 2, 300, 64))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.autograd.grad(lla_attention(*leaves), leaves, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(lla_attention(*leaves), leaves, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def packed(lengths: list[int], heads: int = 4, shared: int = 2, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """q, k, v and grad_o (T, H, 64), and cu_seqlens."""
    q, k, v, grad = (t[0].transpose(0, 1) for t in held_by_all((1, heads, sum(lengths), 64), seed=seed))
    edges = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
    return [q, k[:, :shared], v[:, :shared], grad], edges


def test_cuda_graph_of_lengths_that_change() -> None:
    """Packed sequences, and keys hidden by their number: replayed with other lengths and other numbers."""
    (q, k, v, grad), edges = packed([300, 1, 83, 0])
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    rows = [t.clone().requires_grad_() for t in held_by_all((2, 4, 200, 64))[:3]]
    used = torch.tensor([200, 100], dtype=torch.int32, device="cuda")

    def train() -> tuple[Tensor, ...]:
        o = flashlla.lla_attention_varlen(*leaves, ridge_lambda=1.0, cu_seqlens=edges, max_seqlen=300)
        x = lla_attention(*rows, ridge_lambda=1.0, seqlens_k=used, window=70)
        return (o, x, *torch.autograd.grad((o, x), (*leaves, *rows), (grad, torch.ones_like(x))))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        train()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train()
    for at, lengths in enumerate(([100, 200, 0, 84], [0, 0, 384, 0], [96, 96, 96, 96])):
        fresh, new = packed(lengths, seed=at + 1)
        with torch.no_grad():
            for t, x in zip((*leaves, grad), fresh):
                t.copy_(x)
        edges.copy_(new.clamp(max=300) if max(lengths) > 300 else new)
        used.copy_(torch.tensor([0, 150 + at]))
        graph.replay()
        for x, y in zip(captured, train()):
            assert torch.equal(x, y)


def test_packed_does_not_synchronise() -> None:
    (q, k, v, grad), edges = packed([100, 0, 200, 1])
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    run = lambda: torch.autograd.grad(
        flashlla.lla_attention_varlen(*leaves, cu_seqlens=edges, max_seqlen=200), leaves, grad
    )
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "hopper"), [([300, 1, 0, 83, 1000], "0"), ([200, 150, 199, 200], "1")])
def test_packed_is_each_sequence_alone(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, lengths: list[int], hopper: str
) -> None:
    """By the same kernels: those in Gluon run on packed sequences of about one length, and on any that is alone."""
    monkeypatch.setenv("FLASHLLA_HOPPER", hopper)
    tensors, edges = packed(lengths)
    leaves = [t.to(dtype).requires_grad_() for t in tensors[:3]]
    o = flashlla.lla_attention_varlen(*leaves, ridge_lambda=0.3, cu_seqlens=edges, max_seqlen=max(lengths))
    got = (o, *torch.autograd.grad(o, leaves, tensors[3].to(dtype)))
    for first, last in itertools.pairwise(edges.tolist()):
        alone = [t[first:last].to(dtype).transpose(0, 1)[None].requires_grad_() for t in tensors[:3]]
        x = lla_attention(*alone, ridge_lambda=0.3)
        grad = tensors[3][first:last].to(dtype).transpose(0, 1)[None]
        for a, b in zip(got, (x, *torch.autograd.grad(x, alone, grad))):
            b = b[0].transpose(0, 1)
            assert (a[first:last] - b).double().norm() <= 1e-6 * b.double().norm()


def test_shared_heads_are_bitwise_the_same_from_run_to_run() -> None:
    q, k, v, grad = held_by_all((2, 8, 1000, 64))
    leaves = [t.requires_grad_() for t in (q, k[:, :2].clone(), v[:, :2].clone())]
    run = lambda: torch.autograd.grad(lla_attention(*leaves, window=200), leaves, grad)
    first = run()
    for _ in range(3):
        for x, y in zip(first, run()):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: lla_attention(q, k, v, ridge_lambda=1.0), fullgraph=True, dynamic=dynamic)
    for length in (64, 100, 333):
        tensors = held_by_all((1, 2, length, 64))
        results = []
        for call in (compiled, lambda q, k, v: lla_attention(q, k, v, ridge_lambda=1.0)):
            leaves = [t.detach().requires_grad_() for t in tensors[:3]]
            o = call(*leaves)
            results.append((o, *torch.autograd.grad(o, leaves, tensors[3])))
        for x, y in zip(*results):
            assert torch.equal(x, y)


def test_a_compiled_step_is_cuda_graphs() -> None:
    """torch.compile's reduce-overhead: both passes replayed, nothing launched from the host but what it copies."""
    torch._dynamo.reset()
    loss = lambda q, k, v: lla_attention(q, k, v, ridge_lambda=1.0).float().square().mean()
    compiled = torch.compile(loss, mode="reduce-overhead")
    tensors = held_by_all((1, 4, 300, 64))
    leaves = [t.requires_grad_() for t in tensors[:3]]

    def gradients() -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return [t.clone() for t in torch.autograd.grad(compiled(*leaves), leaves)]

    for _ in range(3):  # compiled, recorded, replayed
        found = gradients()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = gradients()
    launches = {event.key: event.count for event in profile.key_averages() if "Launch" in event.key}
    assert launches.pop("cudaGraphLaunch") == 2
    assert sum(launches.values()) <= 8, launches
    want = torch.autograd.grad(loss(*leaves), leaves)
    for x, y in zip(found, want):
        assert (x - y).float().norm() <= 5e-3 * y.float().norm()


def test_memory_is_linear_and_small() -> None:
    kept, peak = {}, {}
    for length in (2048, 4096):
        tensors = held_by_all((2, 16, length, 64))
        leaves = [t.requires_grad_() for t in tensors[:3]]
        unit = leaves[0].numel() * 2
        torch.autograd.grad(lla_attention(*leaves), leaves, tensors[3])
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        o = lla_attention(*leaves)
        kept[length] = (torch.cuda.memory_allocated() - before) / unit - 1
        grads = torch.autograd.grad(o, leaves, tensors[3])
        peak[length] = (torch.cuda.max_memory_allocated() - before) / unit - 4
        del o, grads
    assert kept[4096] <= 5
    assert peak[4096] <= 12
    assert abs(kept[4096] - kept[2048]) < 0.1


def test_more_heads_than_a_grid_axis_holds() -> None:
    tensors, lam = held_by_all((70000, 1, 4, 16)), ridges(1.0, 4)
    got = step(tensors, lam, backend="triton")
    want = step([t[-3:].double() for t in tensors], lam, backend="naive")
    for name in NAMES:
        assert (got[name][-3:].double() - want[name]).norm() <= 1e-2 * want[name].norm(), name


def test_offsets_beyond_32_bits() -> None:
    shape = (1024, 260, 64, 128)  # more than 2**31 numbers
    if torch.cuda.mem_get_info()[0] < 110 * 2**30:
        pytest.skip("needs 110 GiB")
    small = held_by_all((1, 1, 64, 128))
    big = [torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
    for t, x in zip(big, small):
        t[-1, -1] = x[0, 0]
    lam = ridges(1.0, 64)
    q, k, v = (t.requires_grad_() for t in big[:3])
    o = lla_attention(q, k, v, ridge_lambda=lam, backend="triton")
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), big[3])
    want = step([t.double() for t in small], lam, backend="naive")
    for name, x in (("o", o), ("dq", dq), ("dk", dk), ("dv", dv)):
        assert (x[-1, -1].double() - want[name][0, 0]).norm() <= 6e-3 * want[name].norm(), name
    del q, k, v, o, dq, dk, dv, big
    torch.cuda.empty_cache()


@pytest.mark.parametrize("which", range(4))
def test_numbers_that_are_not_finite_stay_in_their_rows(which: int) -> None:
    tensors, lam = held_by_all((1, 2, 200, 64)), ridges(1.0, 200)
    clean = step(tensors, lam, backend="triton")
    tensors[which][0, 0, 100, 3] = float("nan")
    got = step(tensors, lam, backend="triton")
    close = lambda x, y: torch.allclose(x.float(), y.float(), rtol=2e-2, atol=2e-2)
    for name in NAMES:
        assert close(got[name][0, 1], clean[name][0, 1]), name
    assert close(got["dq"][0, 0, :100], clean["dq"][0, 0, :100])
    if which < 3:
        assert close(got["o"][0, 0, :100], clean["o"][0, 0, :100])
        assert got["o"][0, 0, 100].isnan().all()
    if which in (1, 2):
        assert got["o"][0, 0, 100:].isnan().all()
    if which in (0, 3):
        assert close(got["dk"][0, 0, 101:], clean["dk"][0, 0, 101:])
        assert got["dk"][0, 0, :101].isnan().all()


def test_float32_follows_the_matmul_precision() -> None:
    lam = ridges(1.0, 300)
    want = step([t.double() for t in held_by_all((1, 2, 300, 64))], lam, backend="naive")
    errors = {}
    for precision in ("highest", "high"):
        with matmul_precision(precision):
            got = step(held_by_all((1, 2, 300, 64), torch.float32), lam, backend="triton")
        errors[precision] = [((got[n].double() - want[n]).norm() / want[n].norm()).item() for n in NAMES]
    assert errors["highest"][0] < 5e-6
    assert max(errors["highest"]) < 1e-5
    assert errors["high"][0] > 1e-5
    assert max(errors["high"]) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("ridge", [0.1, 0.01])
@pytest.mark.parametrize(
    ("backend", "solver"),
    [("naive", "direct"), ("chunked", "direct"), *(("chunked", solver(max_iters=1000)) for solver in (CG, PCG))],
)
def test_the_pytorch_backends_follow_no_matmul_precision(
    backend: str, solver: object, ridge: float, precision: str, dtype: torch.dtype, figure: Callable[[str], None]
) -> None:
    tensors, lam = held_by_all((1, 2, 300, 64), dtype), ridges(ridge, 300)
    want = step([t.double() for t in tensors], lam, backend="naive")

    def errors() -> list[float]:
        got = step(tensors, lam, backend=backend, solver=solver)
        return [((got[n].double() - want[n]).norm() / want[n].norm()).item() for n in NAMES]

    usual = errors()
    with matmul_precision(precision):
        q, k, v, _ = tensors
        x = torch.randn(256, 256, device="cuda")
        rounded = (x @ x - x.double() @ x.double()).norm() / x.double().square().sum()
        assert rounded > 1e-5, "this GPU rounds no operands"
        found = errors()
        _, info = lla_attention(q, k, v, ridge_lambda=ridge, backend=backend, solver=solver, return_info=True)
    assert info.converged.all()
    figure(f"{backend} {solver} ridge {ridge} {dtype} {precision}: {max(found):.1e}, at highest {max(usual):.1e}")
    assert all(f <= 3 * u + 1e-6 for f, u in zip(found, usual))


def test_autotune_is_opt_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashlla.backends.triton import runtime

    monkeypatch.setattr(runtime, "tuned", {})
    tensors, lam = held_by_all((1, 2, 128, 32)), ridges(1.0, 128)
    plain = step(tensors, lam, backend="triton")
    assert not runtime.tuned
    monkeypatch.setenv("FLASHLLA_AUTOTUNE", "1")
    tuned = step(tensors, lam, backend="triton")
    assert runtime.tuned
    for name in NAMES:
        assert (tuned[name].double() - plain[name].double()).norm() <= 5e-3 * plain[name].double().norm(), name
    keys = set(runtime.tuned)
    step(held_by_all((1, 2, 300, 32)), ridges(1.0, 300), backend="triton")
    assert set(runtime.tuned) == keys  # no key holds the length


def test_a_first_call_may_be_captured() -> None:
    """Its kernels are compiled and loaded by other threads meanwhile."""
    q, k, v, _ = held_by_all((2, 3, 150, 24))  # of a width that no other test has
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = lla_attention(q, k, v, ridge_lambda=1.0, backend="triton")
    graph.replay()
    assert torch.equal(o, lla_attention(q, k, v, ridge_lambda=1.0, backend="triton"))


def test_what_is_warmed_up_is_not_compiled_again() -> None:
    from flashlla.backends.triton import runtime

    # Of fewer rows fewer programs look for the largest numbers, by kernels of their own (configs.cast_chunks).
    assert flashlla.warmup(48, shapes=[(1, 4, 280)], verbose=False).kernels > 0
    ready = len(runtime.compiled)
    tensors = held_by_all((3, 4, 300, 48))
    q, k, v = (t.requires_grad_() for t in tensors[:3])
    for ridge in (1.0, torch.ones(4, 1, device="cuda")):
        torch.autograd.grad(lla_attention(q, k, v, ridge_lambda=ridge, backend="triton"), (q, k, v), tensors[3])
    assert len(runtime.compiled) == ready
