"""What calls cost the host, beside torch's softmax attention and what torch takes for the parts of a call.

    python -m benchmarks host                 # a minute or two: torch.compile is in it
    python -m benchmarks host --name NAME     # and keep it

Microseconds from the call to its return, which waits for no kernel: of rounds of calls, with an idle GPU before each,
the median (and the least) of the rounds' means. "step" is forward and backward, "compiled" the same under
torch.compile's default mode, "new length" a step at a length that has not been seen, whose kernels are compiled.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import needs, record
from benchmarks.data import TRAINED, learned_ridge, make
from benchmarks.timing import sdpa
from flashlla import lla_attention, lla_decode

# Kind of data, batch, heads, length, head dim, ridge (None: that of trained keys).
SHAPES: list[tuple[str, int, int, int, int, float | None]] = [
    (TRAINED[1], 4, 8, 1024, 64, None), ("iid", 1, 8, 256, 64, 10.0), ("iid", 4, 8, 512, 64, 10.0),
    ("iid", 4, 16, 1024, 64, 10.0), ("iid", 2, 16, 2048, 64, 1.0), ("iid", 4, 16, 4096, 64, 1.0),
]  # fmt: skip
COMPILED = SHAPES[2]
# Batch and room for keys; of 8 heads of 128.
DECODING = [(1, 4096), (32, 4096)]
ROUNDS, CALLS = 15, 10


def microseconds(call: Callable[[], Any], calls: int = CALLS, warm: int = 3) -> dict[str, float]:
    """Of the host, for one ``call``."""
    for _ in range(warm):
        call()
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return {"median": statistics.median(rounds), "least": min(rounds)}


def steps(attend: Callable[..., Tensor], tensors: list[Tensor], ridge: Tensor | None) -> Callable[[], Any]:
    """Forward and backward; ``ridge``: it is trained, too."""
    q, k, v, grad_o = tensors
    leaves = [t.detach().requires_grad_() for t in (q, k, v)] + ([] if ridge is None else [ridge])
    return lambda: torch.autograd.grad(attend(*leaves), leaves, grad_o)


def of_shape(
    data: str, batch: int, heads: int, length: int, dim: int, ridge: float | None, eager: bool
) -> dict[str, Any]:  # fmt: skip
    shape = batch, heads, length, dim
    tensors = make(shape, data)
    # (H, 1), as layers learn it.
    lam = torch.full((heads, 1), ridge, device="cuda") if ridge else learned_ridge(shape, data)[0]
    lam.requires_grad_()
    attend = lambda q, k, v, lam=lam: lla_attention(q, k, v, ridge_lambda=lam)
    step = steps(attend, tensors, lam)
    # One token less each time: its kernels are those of the whole length.
    shorter = itertools.count(1)

    def step_at_new_length() -> None:
        fewer = length - next(shorter)
        steps(attend, [t[:, :, :fewer] for t in tensors], lam)()

    with torch.no_grad():
        forward = microseconds(lambda: attend(*tensors[:3]))
        softmax = microseconds(lambda: sdpa(*tensors[:3]))
    line = {
        "data": data, "batch_heads": batch * heads, "length": length, "dim": dim, "ridge": ridge,
        "forward_us": forward, "step_us": microseconds(step),
        "new_length_us": microseconds(step_at_new_length, calls=1),
        "sdpa_forward_us": softmax, "sdpa_step_us": microseconds(steps(sdpa, tensors, None)),
    }  # fmt: skip
    if (data, *shape, ridge) == COMPILED and not eager:
        line["compiled_us"] = microseconds(steps(torch.compile(attend, fullgraph=True), tensors, lam))
        line["sdpa_compiled_us"] = microseconds(steps(torch.compile(sdpa, fullgraph=True), tensors, None))
    return line


def of_decoding(batch: int, room: int) -> dict[str, Any]:
    q, k, v, _ = make((batch, 8, room, 128))
    q = q[:, :, :1].contiguous()
    lengths = torch.full((batch,), room - 7, dtype=torch.int32, device="cuda")
    with torch.no_grad():
        ours = microseconds(lambda: lla_decode(q, k, v, lengths, ridge_lambda=1.0))
        softmax = microseconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    return {"batch": batch, "room": room, "dim": 128, "decode_us": ours, "sdpa_us": softmax}


class Nothing(torch.autograd.Function):
    """Of four tensors the first."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, grad, grad, grad


def of_torch() -> dict[str, Any]:
    """What torch takes on this machine of what calls are made of: an addition of 8 numbers, which is a launch, an
    allocation, and a step of an autograd Function that does nothing."""
    x = torch.randn(8, device="cuda")
    leaves = [torch.randn(8, device="cuda", requires_grad=True) for _ in range(4)]
    step = lambda: torch.autograd.grad(Nothing.apply(*leaves), leaves, x)
    allocate = lambda: torch.empty_strided((4, 8, 512), (4096, 512, 1), dtype=torch.float32, device="cuda")
    return {
        "addition_us": microseconds(lambda: x + x, calls=100), "allocation_us": microseconds(allocate, calls=100),
        "nothing_step_us": microseconds(step),
    }  # fmt: skip


def show(line: dict[str, Any]) -> dict[str, Any]:
    """Medians, with the least."""
    words = [
        f"{name.removesuffix('_us')} {x['median']:.0f} ({x['least']:.0f})" if isinstance(x, dict) else f"{name} {x}"
        for name, x in line.items()
    ]
    print(*words, sep="  ", flush=True)
    return line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    record.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    needs.cuda()
    needs.triton()
    kept = record.Record(options, "cuda")
    print(kept.figures)
    kept.figures["parts"] = show(of_torch())
    lines: list[dict[str, Any]] = []
    kept.figures |= {"host": lines, "decoding": [show(of_decoding(*shape)) for shape in DECODING]}
    for shape in SHAPES:
        lines.append(show(of_shape(*shape, options.eager)))
        kept.write()
    kept.figures["parts_again"] = show(of_torch())
    kept.write()
    kept.end()
    return 0
