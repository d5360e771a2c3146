"""Threads, streams, interruptions, forks, copies, torch's deterministic mode: what surrounds a call in a program."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import flashlla
import flashlla.nn
from flashlla import lla_attention, lla_attention_varlen, lla_decode
from flashlla.backends.base import Backend
from flashlla.problem import describe
from tests.support.helpers import IN_PYTORCH, cu, every_backend, interpreted, normal, problem_of, qkv
from tests.support.processes import python

on_gpu = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def step(
    backend: str | None, device: str = "cpu", length: int = 40, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The output and the gradients of one call."""
    leaves = [t.to(device).requires_grad_() for t in qkv(2, 2, length, 16, dtype=dtype)]
    ridge = torch.full((2, 1), 0.5, device=device, requires_grad=True)
    o = lla_attention(*leaves, ridge_lambda=ridge, backend=backend)
    return [o.detach(), *torch.autograd.grad(o.square().sum(), [*leaves, ridge])]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


# Threads


def in_threads(*work: Callable[[], None]) -> None:
    """Run all at a time; what one raises is raised."""
    errors: list[BaseException] = []
    gate = threading.Barrier(len(work))

    def run(one: Callable[[], None]) -> None:
        try:
            gate.wait(60)
            one()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def repeated(name: str, wanted: list[Tensor], times: int, device: str = "cpu") -> None:
    """The same bits each time, on the backend that this thread prefers."""
    with flashlla.set_backend(name):
        for _ in range(times):
            assert flashlla.get_backend() == name
            assert_same(step(None, device), wanted)


def test_threads_with_backends_of_their_own() -> None:
    wanted = {name: step(name) for name in ("naive", "chunked")}
    assert not torch.equal(wanted["naive"][0], wanted["chunked"][0])
    in_threads(*(lambda name=name: repeated(name, wanted[name], 15) for name in [*wanted, *wanted]))
    assert flashlla.get_backend() == "auto"


def test_threads_that_share_one_solver_and_one_counter() -> None:
    solver = flashlla.PCG(max_iters=100, preconditioner="gram")
    q, k, v = qkv(1, 2, 30, 8)
    wanted = lla_attention(q, k, v, solver=solver)
    with flashlla.ConvergenceCounter() as counter:

        def work() -> None:
            for _ in range(20):
                assert torch.equal(lla_attention(q, k, v, solver=solver), wanted)

        in_threads(work, work, work)
        assert counter.read() == (0, 3 * 20 * 60)


def test_threads_that_register_while_others_call() -> None:
    def register() -> None:
        for i in range(30):
            flashlla.register_solver(f"mine {i}", Mine())
            q, k, v = qkv(1, 1, 5, 4)
            lla_attention(q, k, v, solver=f"mine {i}", backend="chunked")

    in_threads(register, lambda: repeated("chunked", step("chunked"), 10))


@on_gpu
def test_threads_on_streams_of_their_own() -> None:
    wanted = {name: step(name, "cuda", 300) for name in ("triton", "chunked")}

    def work(name: str) -> None:
        with torch.cuda.stream(torch.cuda.Stream()), flashlla.set_backend(name):
            for _ in range(30):
                assert_same(step(None, "cuda", 300), wanted[name])

    in_threads(*(lambda name=name: work(name) for name in [*wanted, *wanted]))


@on_gpu
def test_threads_that_are_the_first_to_factorise() -> None:
    """Of a process of their own, since torch loads what it needs for that but once."""
    script = """
        import torch, flashlla
        from tests.support.helpers import qkv
        from tests.test_races import in_threads

        q, k, v = (t.cuda() for t in qkv(1, 2, 30, 8))
        solvers = [{"solver": "direct"}, {"solver": "pcg_gram"}, {"solver": "direct"}]
        work = lambda options: flashlla.lla_attention(q, k, v, backend="chunked", **options)
        in_threads(*(lambda options=options: work(options) for options in solvers * 2))
        print("right")
    """
    assert python(script).split() == ["right"]


# Streams and devices


@on_gpu
@every_backend
def test_a_side_stream(backend: Backend) -> None:
    """Tensors that are made, used and given up on a side stream, while another one allocates."""
    wanted = step(backend.name, "cuda", 300)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    for _ in range(20):
        inputs = [t.cuda().requires_grad_() for t in qkv(2, 2, 300, 16)]
        ridge = torch.full((2, 1), 0.5, device="cuda", requires_grad=True)
        side.wait_stream(main)
        with torch.cuda.stream(side):
            o = lla_attention(*inputs, ridge_lambda=ridge, backend=backend.name)
            found = [o.detach(), *torch.autograd.grad(o.square().sum(), [*inputs, ridge])]
        for t in (*inputs, ridge):
            t.detach().record_stream(side)
        del inputs, ridge, t
        torch.full((2, 2, 300, 16), float("nan"), device="cuda")  # takes freed memory, if any is free too early
        main.wait_stream(side)
        for t in found:
            t.record_stream(main)
        assert_same(found, wanted)


@on_gpu
@two_gpus
@every_backend
def test_another_current_device(backend: Backend) -> None:
    wanted = step(backend.name, "cuda:0", 300)
    with torch.cuda.device(0):
        there = step(backend.name, "cuda:1", 300)
        assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda", 1) for t in there)
    assert_same([t.to("cuda:0") for t in there], wanted)


# Interruptions


INTERRUPTED = """
    import os, signal, threading, time
    import torch, flashlla
    from tests.support import helpers
    from tests.support.helpers import qkv
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes are made to ignore it
    torch.set_num_threads(1)
    NAME, LENGTH, TIMES = {name!r}, {length}, {times}

    def step(length):
        leaves = [t.requires_grad_() for t in qkv(1, 2, length, 16)]
        with flashlla.set_backend(NAME):
            o = flashlla.lla_attention(*leaves, ridge_lambda=0.5)
            return [o.detach(), *torch.autograd.grad(o.square().sum(), leaves)]

    small = step(20)
    begun = time.monotonic()
    step(LENGTH)
    whole = time.monotonic() - begun
    interrupted = 0
    for i in range(TIMES):
        timer = threading.Timer(whole * (i + 0.5) / TIMES, os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            step(LENGTH)
            timer.join()
            time.sleep(0.2)  # a signal that came late
        except KeyboardInterrupt:
            interrupted += 1
        assert flashlla.get_backend() == "auto", flashlla.get_backend()
        again = step(20)
        assert all(map(torch.equal, again, small))
        assert all(t.isfinite().all() for t in again)
    exact = flashlla.lla_attention(*(t.double() for t in qkv(1, 2, 20, 16)), ridge_lambda=0.5, backend="naive")
    torch.testing.assert_close(small[0].double(), exact, rtol=1e-4, atol=1e-4)
    print(interrupted)
"""


@pytest.mark.parametrize(("name", "length"), [("chunked", 700), ("naive", 150)])
def test_an_interrupted_call_leaves_a_usable_process(name: str, length: int) -> None:
    interrupted = int(python(INTERRUPTED.format(name=name, length=length, times=12)))
    assert interrupted >= 6


def test_an_interrupted_first_call_of_kernels_leaves_a_usable_process() -> None:
    """While plans are made: what is half made is not kept."""
    pytest.importorskip("triton")
    script = INTERRUPTED.format(name="triton", length=33, times=5)
    assert int(python(script, TRITON_INTERPRET="1")) >= 3


# Forks


@pytest.mark.parametrize(("threads", "before"), [(1, True), (1, False), (2, False)])
def test_a_forked_child_computes_the_same(threads: int, before: bool) -> None:
    """``before``: after the parent has computed, with what is planned and cached; of one thread, since OpenMP's others,
    once they have run, do not outlive a fork, and torch waits for them."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork")
    script = f"""
        import os, pickle
        import torch, flashlla
        from tests.test_races import step
        torch.set_num_threads({threads})
        if {before}:
            step("chunked")
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            with os.fdopen(write, "wb") as out:
                pickle.dump([t.tolist() for t in step("chunked")], out)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as into:
            found = pickle.load(into)
        assert os.waitpid(child, 0)[1] == 0
        for got, wanted in zip(found, step("chunked"), strict=True):
            torch.testing.assert_close(torch.tensor(got), wanted)
        print("same")
    """
    assert python(script, timeout=60).split() == ["same"]


# Copies


class Mine(flashlla.Direct):
    """A solver of the caller's."""


def info() -> flashlla.LLAInfo:
    return lla_attention(*qkv(1, 5, 4), return_info=True)[1]


def layer() -> flashlla.nn.LocalLinearAttention:
    torch.manual_seed(0)
    return flashlla.nn.LocalLinearAttention(16, 2, layer_idx=0)


def cache() -> flashlla.nn.LLACache:
    made = flashlla.nn.LLACache()
    with torch.no_grad():
        layer()(normal(1, 3, 16, dtype=torch.float32), past_key_values=made)
    return made


def ridge() -> flashlla.nn.Ridge:
    return layer().ridge


# By name: an object of each public class, and of what public functions return.
OBJECTS: dict[str, Callable[[], Any]] = {
    "CG": lambda: flashlla.CG(tolerance=1e-2),
    "PCG": lambda: flashlla.PCG(max_iters=7, preconditioner="gram"),
    "PCG of an object": lambda: flashlla.PCG(preconditioner=flashlla.solvers.Gram()),
    "Direct": flashlla.Direct,
    "a solver of one's own": Mine,
    "Gram": lambda: flashlla.solvers.Gram(),
    "Jacobi": lambda: flashlla.solvers.Jacobi(),
    "LLAInfo": info,
    "Explanation": lambda: flashlla.explain(*qkv(1, 5, 4)),
    "verify": lambda: flashlla.verify(*qkv(1, 5, 4)),
    "Counted": lambda: flashlla.convergence.Counted(1, 2),
    "Problem": lambda: problem_of(*qkv(1, 5, 4))[0],
    "Inputs": lambda: problem_of(*qkv(1, 5, 4))[1],
    "UnsupportedError": lambda: flashlla.UnsupportedError("why"),
    "ConvergenceWarning": lambda: flashlla.ConvergenceWarning("why"),
    "FallbackWarning": lambda: flashlla.FallbackWarning("why"),
    "naive": lambda: IN_PYTORCH[0],
    "chunked": lambda: IN_PYTORCH[1],
    "triton": lambda: flashlla.backends.triton.Triton(),
    "LocalLinearAttention": layer,
    "Ridge": ridge,
    "LLACache": cache,
    "Keys": lambda: flashlla.nn.Keys(torch.zeros(1), torch.zeros(1), None, None),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


def contents(thing: Any) -> Any:
    """What is to be the same in a copy, down to plain values and tensors."""
    if isinstance(thing, (Tensor, int, float, str, bool, type(None), torch.dtype, torch.device, type)):
        return thing
    if isinstance(thing, dict):
        return {key: contents(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [contents(value) for value in thing]
    if isinstance(thing, torch.nn.Module):
        return {**thing.state_dict(), "": thing.extra_repr()}
    if isinstance(thing, BaseException):
        return [str(thing)]
    fields = getattr(thing, "__dict__", {})
    return [type(thing).__qualname__, contents(dict(fields))]


def alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())  # a cache's room for more holds anything
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b)


@pytest.mark.quick
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", OBJECTS)
def test_copies_are_the_same(name: str, how: str) -> None:
    thing = OBJECTS[name]()
    copied = COPIES[how](thing)
    assert type(copied) is type(thing)
    assert alike(contents(copied), contents(thing))
    if isinstance(thing, flashlla.Solver):
        assert copied == thing
        assert hash(copied) == hash(thing)
        q, k, v = qkv(1, 9, 4)
        assert torch.equal(lla_attention(q, k, v, solver=copied), lla_attention(q, k, v, solver=thing))


@pytest.mark.quick
def test_every_public_class_is_copied() -> None:
    public = {n for room in (flashlla, flashlla.nn) for n in room.__all__ if isinstance(getattr(room, n), type)}
    # Made to be derived from, never made, or tested below.
    assert public - OBJECTS.keys() == {
        *("Backend", "Preconditioner", "Solver", "LLAFunction", "Solution"),
        *("ConvergenceCounter", "set_backend"),
    }


@pytest.mark.quick
@pytest.mark.parametrize("how", COPIES)
def test_a_copied_model_goes_on_where_the_other_was(how: str) -> None:
    model, past = layer(), cache()
    new = normal(1, 1, 16, seed=5, dtype=torch.float32)
    copied_model, copied_past = COPIES[how](model), COPIES["pickle" if how == "pickle" else "deepcopy"](past)
    with torch.no_grad():
        assert torch.equal(copied_model(new, past_key_values=copied_past)[0], model(new, past_key_values=past)[0])


@pytest.mark.quick
def test_a_copied_cache_is_a_cache_of_its_own() -> None:
    first = cache()
    second = copy.deepcopy(first)
    with torch.no_grad():
        layer()(normal(1, 2, 16, dtype=torch.float32), past_key_values=second)
    assert (first.get_seq_length(), second.get_seq_length()) == (3, 5)


@pytest.mark.quick
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_what_is_in_force(how: str) -> None:
    """A copy of a block can be entered; a copy of a counter holds what was counted, and counts no more."""
    with flashlla.set_backend("naive") as block:
        with COPIES[how](block):
            assert flashlla.get_backend() == "naive"
        assert flashlla.get_backend() == "naive"
    assert flashlla.get_backend() == "auto"
    with flashlla.ConvergenceCounter() as counter:
        lla_attention(*qkv(1, 5, 4))
        copied = COPIES["deepcopy" if how == "copy" else how](counter)
        lla_attention(*qkv(1, 5, 4))
        assert copied.read() == (0, 5)
        assert counter.read() == (0, 10)


# torch's deterministic mode


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def everything(backend: Backend, device: str) -> list[Tensor]:
    """All three functions, forward and backward, with lengths, shared heads, NaN and a counter."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q = normal(2, 4, 20, 8, dtype=dtype).to(device).requires_grad_()
    k, v = (normal(2, 2, 20, 8, seed=i, dtype=dtype).to(device).requires_grad_() for i in (1, 2))
    with torch.no_grad():
        v[1, 1, 3] = float("nan")
    lengths = torch.tensor([20, 13], dtype=torch.int32, device=device)
    with flashlla.ConvergenceCounter():
        o = lla_attention(q, k, v, ridge_lambda=0.5, seqlens_k=lengths, backend=backend.name)
        packed = [t[0].transpose(0, 1) for t in (q, k, v)]
        of_packed = lla_attention_varlen(
            *packed, cu_seqlens=cu(0, 7, 20).to(device), max_seqlen=13, backend=backend.name
        )
    with torch.no_grad():
        decoded = lla_decode(q[:, :, :1], k, v, lengths, backend=backend.name)
    gradients = torch.autograd.grad(o.nansum() + of_packed.nansum(), (q, k, v))
    return [t.detach().nan_to_num() for t in (o, of_packed, decoded, *gradients)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@every_backend
def test_under_deterministic_algorithms(backend: Backend, device: str) -> None:
    if reason := backend.unsupported(describe_plain(device)):
        pytest.skip(reason)
    wanted = everything(backend, device)
    with deterministic():
        first = everything(backend, device)
        second = first if interpreted(backend) else everything(backend, device)
    assert_same(first, second)
    for got, want in zip(first, wanted, strict=True):
        torch.testing.assert_close(got, want)


def describe_plain(device: str) -> Any:
    from flashlla.calls import prepared

    q = torch.zeros(1, 4, 4, device=device)
    return describe(prepared(None, flashlla.explain, q, q, q).arguments)
