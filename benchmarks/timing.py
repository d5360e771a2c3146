"""How calls are timed, here and nowhere else: medians, on either device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# both: a training step.
PASSES = ("forward", "backward", "both")


def milliseconds(call: Callable[[], Any], device: str = "cuda") -> float:
    """Of one call: the median of many. On a GPU each begins with an empty cache, as Triton's do_bench has it; and of
    three such medians the middle one, for a clock or a host may be slow for as long as one takes."""
    if device == "cuda":
        from triton.testing import do_bench

        medians: list[float] = [do_bench(call, warmup=20, rep=40, return_mode="median") for _ in range(3)]
        return statistics.median(medians)
    call()
    times: list[float] = []
    while len(times) < 3 or (len(times) < 20 and sum(times) < 500):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The yardstick: torch's causal softmax attention."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def prepared(which: str, attend: Attend, tensors: Sequence[Tensor]) -> Callable[[], Any]:
    """One of ``PASSES`` of ``attend`` on q, k, v and grad_o, ready to be timed."""
    q, k, v, grad_o = tensors
    if which == "forward":
        return lambda: attend(q, k, v)
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    if which == "backward":
        o = attend(q, k, v)
        return lambda: torch.autograd.grad(o, (q, k, v), grad_o, retain_graph=True)
    return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), grad_o)


class Graphed(NamedTuple):
    graph: torch.cuda.CUDAGraph
    call: Callable[[], Any]  # what it was captured of, whose tensors it reads

    def __call__(self) -> None:
        self.graph.replay()


def graphed(which: str, attend: Attend, tensors: Sequence[Tensor]) -> Graphed:
    """The same, replayed from a CUDA graph, which leaves out what the host takes to launch it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # gradients run on the stream of what they are gradients of
        call = prepared(which, attend, tensors)
    return Graphed(captured(call, stream), call)


def captured(call: Callable[[], Any], stream: torch.cuda.Stream | None = None) -> torch.cuda.CUDAGraph:
    if not torch.cuda.is_available():
        raise RuntimeError("a CUDA graph needs a CUDA device")
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or set up in the first calls cannot be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 25) -> float:
    """Of one of ``calls``, too short to be timed alone: the median over replays of a CUDA graph of all of them."""
    rounds = max(1, 8 // len(calls))  # so that a graph is longer than what starting it takes

    def every() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    graph = captured(every)
    graph.replay()
    times: list[float] = []
    while len(times) < replays and sum(times) < 4e5:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3)
    return statistics.median(times) / (rounds * len(calls))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GiB on the GPU."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (microseconds([lambda: target.copy_(source)]) * 1e-6)


def matrix_tflops(dtype: torch.dtype, device: str = "cuda") -> float:
    """What a large square product reaches."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: a @ b, device) / 1e9
