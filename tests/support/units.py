"""Units that round the operands of float32 products, as tensor cores do, on machines that have none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashlla import products
from flashlla.backends.base import Backend

# Bits of an operand, by what torch.set_float32_matmul_precision says: of TF32 and of bfloat16.
BITS = {"highest": 24, "high": 11, "medium": 8}
aten = torch.ops.aten
# Where the operands begin among the arguments of an operation that multiplies matrices.
_FIRST_OPERAND = {
    **dict.fromkeys((aten.mm, aten.bmm, aten.mv), 0),
    **dict.fromkeys((aten.addmm, aten.addmm_, aten.baddbmm, aten.baddbmm_, aten.addmv, aten.addmv_), 1),
}


def nearest(x: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).round() * 2.0**-bits, exponent)


def towards_zero(x: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2**bits).trunc() * 2.0**-bits, exponent)


class Units(TorchDispatchMode):
    """Under it float32 operands are rounded as ``torch.set_float32_matmul_precision`` allows."""

    def __init__(self, rounded: Callable[[Tensor, int], Tensor] = nearest) -> None:
        super().__init__()
        self.rounded = rounded

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        first, bits = _FIRST_OPERAND.get(func.overloadpacket), BITS[torch.get_float32_matmul_precision()]
        if first is not None and args[first].dtype == torch.float32:
            operands = (self.rounded(t, bits) for t in args[first : first + 2])
            args = (*args[:first], *operands, *args[first + 2 :])
        return func(*args, **(kwargs or {}))


@contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """The setting, and nothing remembered of what devices do under it."""
    before = torch.get_float32_matmul_precision()
    products.bits_kept.cache_clear()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        products.bits_kept.cache_clear()


@contextmanager
def on_units(backend: Backend) -> Iterator[None]:
    """Both passes of ``backend`` run on units that round, inside the operators that torch knows as one."""

    def under_units(run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            with Units():
                return run(*args)

        return wrapped

    with (
        mock.patch.object(backend, "forward", under_units(backend.forward)),
        mock.patch.object(backend, "backward", under_units(backend.backward)),
    ):
        yield
