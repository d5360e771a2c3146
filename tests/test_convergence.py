"""Counting what did not converge, without a look at each call."""

from __future__ import annotations

import threading

import pytest
import torch

import flashlla
from flashlla import convergence
from tests.support.helpers import normal

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore::flashlla.ConvergenceWarning")]
FEW = {"ridge_lambda": 0.01, "backend": "chunked", "cg_max_iters": 2}


def tensors() -> list[torch.Tensor]:
    return [normal(2, 3, 40, 16, seed=i, dtype=torch.float32) for i in range(3)]


def left() -> int:
    """Queries of a call that do not converge: some, and not all."""
    _, info = flashlla.lla_attention(*tensors(), **FEW, return_info=True)
    found = int((~info.converged).sum())
    assert 0 < found < 240
    return found


def test_it_counts_from_look_to_look_until_it_is_stopped() -> None:
    bad = left()
    with flashlla.ConvergenceCounter() as counter:
        assert counter.read() == (0, 0)
        for _ in range(3):
            flashlla.lla_attention(*tensors(), **FEW)
        assert counter.read() == (3 * bad, 3 * 240)
        flashlla.lla_attention(*tensors(), backend="chunked", cg_max_iters=200)
        found = counter.read()
        assert (found.unconverged, found.queries) == (0, 240)
        flashlla.lla_attention(*tensors(), **FEW)
    assert not convergence.active
    flashlla.lla_attention(*tensors(), **FEW)
    assert counter.read() == (bad, 240)


def test_several_and_backward() -> None:
    bad = left()
    first = flashlla.ConvergenceCounter()
    q, k, v = (t.requires_grad_() for t in tensors())
    flashlla.lla_attention(q, k, v, **FEW).sum().backward()
    with flashlla.ConvergenceCounter() as second:
        flashlla.lla_attention(q, k, v, **FEW)
    first.stop()
    first.stop()
    assert first.read() == (2 * bad, 480)
    assert second.read() == (bad, 240)


def test_all_threads_and_modes() -> None:
    bad = left()

    def run() -> None:
        with torch.inference_mode():
            for _ in range(5):
                flashlla.lla_attention(*tensors(), **FEW)

    with flashlla.ConvergenceCounter() as counter:
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counter.read() == (20 * bad, 20 * 240)
        flashlla.lla_attention(*tensors(), **FEW)
        assert counter.read() == (bad, 240)


def test_packed_sequences_and_queries_without_keys() -> None:
    q, k, v = (torch.randn(6, 2, 4) for _ in range(3))
    with flashlla.ConvergenceCounter() as counter:
        flashlla.lla_attention_varlen(q, k, v, cu_seqlens=torch.tensor([0, 2, 6]), max_seqlen=4)
        flashlla.lla_attention(torch.randn(2, 5, 4), *torch.randn(2, 2, 0, 4))
        assert counter.read() == (0, 12 + 10)


def test_compiled() -> None:
    """Whether it was on or off when the function was compiled."""
    torch._dynamo.reset()
    bad = left()
    call = torch.compile(lambda q, k, v: flashlla.lla_attention(q, k, v, **FEW), fullgraph=True, backend="aot_eager")
    call(*tensors())
    with flashlla.ConvergenceCounter() as counter:
        call(*tensors())
        assert counter.read() == (bad, 240)


@pytest.mark.gpu
def test_on_a_gpu_and_in_its_graphs() -> None:
    options = {"ridge_lambda": 0.01, "cg_max_iters": 2, "backend": "triton"}
    q, k, v = (t.cuda() for t in tensors())
    _, info = flashlla.lla_attention(q, k, v, **options, return_info=True)
    bad = int((~info.converged).sum())
    assert bad > 0
    with flashlla.ConvergenceCounter() as counter:
        flashlla.lla_attention(q, k, v, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            flashlla.lla_attention(q, k, v, **options)
        assert counter.read() == (bad, 240)
        for _ in range(3):
            graph.replay()
        assert counter.read() == (3 * bad, 720)
