"""Nothing depends on torch's defaults: of a dtype, of a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from flashlla import lla_attention, lla_attention_varlen, lla_decode
from flashlla.backends.base import Backend
from tests.support.helpers import BACKENDS, cu, interpreted, normal, skip_if_refused, table


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
}


def results(backend: Backend, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, edges: Tensor) -> list[Tensor]:
    """Outputs and gradients of every kind of call, one whose solver is gram among them."""
    found: list[Tensor] = []
    for op, keywords in (
        (lla_attention, {"ridge_lambda": 0.5}),
        (lla_attention, {"solver": "direct" if backend.name == "naive" else "pcg_gram", "seqlens_k": lengths}),
        (lla_attention_varlen, {"cu_seqlens": edges, "max_seqlen": 20}),
    ):
        skip_if_refused(backend, q, k, v, op=op, **keywords)
        o = op(q, k, v, **keywords, backend=backend.name)
        found += [o, *torch.autograd.grad(o, (q, k, v), torch.ones_like(o))]
    return [*found, lla_decode(q[:, :, :1].detach(), k.detach(), v.detach(), lengths, backend=backend.name)]


def worth(backend: Backend, defaults: str, dtype: torch.dtype) -> bool:
    """Of kernels in an interpreter, which are slow, a wider default than what they need and a narrower one."""
    return not interpreted(backend) or (defaults, dtype) in (("float64", torch.float32), ("float16", torch.bfloat16))


@table("backend defaults dtype", BACKENDS, DEFAULTS, (torch.float32, torch.bfloat16), when=worth)
def test_results_are_the_same_under_any_default(backend: Backend, defaults: str, dtype: torch.dtype) -> None:
    q, k, v = (normal(1, 1, 17, 8, seed=i, dtype=dtype).requires_grad_() for i in range(3))
    given = q, k, v, torch.tensor([15], dtype=torch.int32), cu(0, 6, 17)
    wanted = results(backend, *given)
    with DEFAULTS[defaults]():
        got = results(backend, *given)
    for a, b in zip(wanted, got, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
