"""The naive backend in float64 with every intermediate disturbed, as rounding to a narrower precision disturbs it.

Nothing of the operator stands here: the backend runs as it is, and each operation of PyTorch that it calls is disturbed
on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
aten = torch.ops.aten
_PRODUCTS = {aten.mm, aten.bmm}
# Products of two numbers go into a sum or a matrix product, which are rounded: where they are fused, but once.
_ELEMENTWISE = {aten.add, aten.sub, aten.div, aten.sum}
# Terms that are apart by no more than this, squared, beside their size.
_ALIKE = 1e-6
_COPIES = {aten.clone, aten.gather, aten.where, aten._unsafe_view}


@dataclass(frozen=True)
class Rounding:
    """Sizes of the disturbances: unit roundoffs, and the relative residual of the solver."""

    operand: float = 0.0
    sum: float = 0.0
    residual: float = 0.0


EXACT = Rounding()


class _Disturbed(TorchDispatchMode):
    """Disturbs what runs under it.

    data: the tensors that the caller gives. They, and their differences from a point, are no operands to round: that
    inputs are rounded is no error of who computes with them. All tensors kept are kept alive, so that no memory is
    taken for another's.
    """

    def __init__(self, rounding: Rounding, data: Sequence[Tensor]) -> None:
        super().__init__()
        self.rounding = rounding
        self.generator = torch.Generator().manual_seed(0)
        self.data = {_memory(t): t for t in data}
        self.centred: dict[int, Tensor] = {}
        self.operands: dict[int, Tensor] = {}  # the rounded memory of each
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, func.overloadpacket
        tensors = [t for t in args if isinstance(t, Tensor) and t.is_floating_point()]
        if packet in _PRODUCTS:
            product = self._product(*tensors)
            return kwargs["out"].copy_(product) if "out" in kwargs else product
        if packet is aten._linalg_solve_ex:
            return self._solve(func(*args, **kwargs), *tensors)
        # Keys about their mean times weights, to be multiplied with keys: the weights are an operand. And the sum of a
        # product's weights is that of the rounded ones.
        weighted = packet is aten.mul and self._is(self.centred, *tensors[:1])
        if weighted:
            args = (args[0], self._operand(args[1]))
        elif packet is aten.sum and tensors:
            args = (self._rounded(args[0]), *args[1:])
        out = func(*args, **kwargs)
        if not isinstance(out, Tensor) or not out.is_floating_point() or func._schema.is_mutable:
            return out
        if packet is aten.sub and self._is(self.data, args[0]):
            (self.data if self._is(self.data, *tensors) else self.centred)[_memory(out)] = out
        if weighted or (packet in _COPIES and self._is(self.data, *tensors)):
            self.data[_memory(out)] = out
        if packet in _ELEMENTWISE and self.rounding.sum:
            out.mul_(self._uniform(out).mul_(self.rounding.sum).add_(1))  # infinity stays
        return out

    @staticmethod
    def _is(kept: Mapping[int, Tensor], *tensors: Tensor) -> bool:
        return bool(tensors) and all(_memory(t) in kept for t in tensors)

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=like.dtype).mul_(2).sub_(1)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _operand(self, t: Tensor) -> Tensor:
        """``t`` rounded as an operand of a matrix product: once, however often it is one."""
        if not self.rounding.operand or self._is(self.data, t) or self._is(self.centred, t):
            return t
        if not self._is(self.operands, t):
            self.kept.append(t)
            memory = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
            self.operands[_memory(t)] = memory + memory * self._uniform(memory) * self.rounding.operand
        return self._rounded(t)

    def _rounded(self, t: Tensor) -> Tensor:
        """``t`` as an operand, where it or what it is a view of has been one."""
        if not self._is(self.operands, t):
            return t
        return self.operands[_memory(t)].as_strided(t.shape, t.stride(), t.storage_offset())

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b, its terms added one after the other, every partial sum rounded."""
        a, b = self._operand(a), self._operand(b)
        exact = a @ b
        if self.rounding.sum:
            # Terms in no particular order: after m of n, the partial sum is m / n of the whole, and a bridge between.
            n, squares = a.shape[-1], a.square() @ b.square()
            alike = exact.square() >= n * squares * (1 - _ALIKE)
            spread = squares.add_(exact.square().add_(squares.clone(), alpha=0.5), alpha=n / 3).sqrt_()
            # Of terms that are all the same, as gradients of a sum are, one is rounded as the next, while the partial
            # sum is in one binade: of the last, that is half of them, each by up to half of its rounding.
            spread = torch.where(alike, torch.maximum(spread, n / 4 * exact.abs()), spread)
            exact = exact + spread.mul_(self._uniform(exact)).mul_(self.rounding.sum)
        return exact

    def _solve(self, found: Any, a: Tensor, b: Tensor) -> Any:
        """A direct solver leaves a residual of about sqrt(D) roundings of |A| |x|, an iterative one of its tolerance:
        a multiple of one vector for all queries, as neighbours stop in much the same place, and keys add them up."""
        x = found[0]  # (..., M, D, 1)
        residual = torch.zeros_like(b)
        if self.rounding.sum:
            size = self.rounding.sum * a.norm(dim=(-2, -1)) * x.norm(dim=(-2, -1))
            residual += size[..., None, None] * self._normal(*b.shape)
        if self.rounding.residual:
            direction = torch.nn.functional.normalize(self._normal(*b.shape[:-3], 1, *b.shape[-2:]), dim=-2)
            residual += self.rounding.residual * b.norm(dim=-2, keepdim=True) * direction
        return (x + torch.linalg.solve(a, residual), *found[1:])


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def disturbed(run: Callable[[], T], rounding: Rounding, data: Sequence[Tensor]) -> T:
    """What ``run`` gives, each of its operations disturbed; ``data``: the tensors that are as they are."""
    with torch.no_grad():
        if rounding == EXACT:
            return run()
        with _Disturbed(rounding, data):
            return run()
