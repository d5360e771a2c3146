"""Uninitialised memory that gives itself away."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
    (torch._C._dynamo.guards, "_empty_strided_cpu"),
    (torch._C._dynamo.guards, "_empty_strided_cuda"),
)


def _poison(t: Tensor) -> Tensor:
    if t.is_floating_point() or t.is_complex():
        return t.fill_(float("nan"))
    if t.dtype == torch.bool:
        return t.fill_(True)
    if t.dtype == torch.uint8:  # of memory that tensors share: NaN in every format
        return t.fill_(255)
    return t.fill_(torch.iinfo(t.dtype).max // 2)


def _wrap(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            return _poison(allocate(*args, **kwargs))

    return wrapped


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what torch.empty and its kin return: NaN, or a large number where there is no NaN."""
    with ExitStack() as stack:
        for owner, name in _ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, _wrap(getattr(owner, name))))
        yield
