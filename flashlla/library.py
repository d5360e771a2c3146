"""Operators of torch.library that take and give records."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from flashlla.records import Row

A = TypeVar("A", bound=tuple[Any, ...])
G = TypeVar("G", bound=tuple[Any, ...])

# Defined with Library rather than custom_op, which imports the whole compiler (seconds) at an operator's first call.
_library = torch.library.Library("flashlla", "DEF")


def _differentiates() -> bool:
    """Whether a call may be differentiated in eager mode, or is by a transform of torch.func or in forward mode: these
    take a Function around an operator, and know nothing of what is registered with it. All else calls it as it is."""
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return torch.is_grad_enabled() or transformed


class Operator(Generic[A, G]):
    """An operator of torch.library, called with a record and giving one.

    name: in torch.ops.flashlla. takes, gives: the kinds of records. run: what it does. fake: outputs like those of
    ``run``, uninitialised, for when torch traces. batch(size, dims, arguments): the rule of torch.vmap, for a dimension
    of ``size`` at ``dims`` of the arguments. Outputs have that dimension first, or, with batched=False, not at all.
    writes: the argument that ``run`` writes to, if any.
    """

    def __init__(
        self,
        name: str,
        takes: type[A],
        gives: type[G],
        *,
        run: Callable[[A], G],
        fake: Callable[[A], G],
        batch: Callable[[int, Any, A], G],
        batched: bool = True,
        writes: str | None = None,
    ) -> None:
        self.name, self.takes, self.gives = f"flashlla::{name}", Row(takes), Row(gives)
        self.run, self._batch, self._place = run, batch, 0 if batched else None
        arguments = self.takes.schema
        if writes is not None:
            assert f"{arguments},".count(f"Tensor {writes},") == 1
            arguments = f"{arguments},".replace(f"Tensor {writes},", f"Tensor(a!) {writes},").removesuffix(",")
        _library.define(
            f"{name}({arguments}) -> ({', '.join(['Tensor'] * self.gives.size)})", tags=(torch.Tag.pt2_compliant_tag,)
        )
        _library.impl(name, self._on_rows(run), "CompositeExplicitAutograd")
        torch.library.register_fake(self.name, self._on_rows(fake), lib=_library)
        torch.library.register_vmap(self.name, self._batch_rows, lib=_library)
        self.op: Any = getattr(torch.ops.flashlla, name).default
        self._function: Any = None

    def __call__(self, arguments: A) -> G:
        return self._unpack(self.op(*self.takes.flat(arguments)))

    def differentiable(self, arguments: A) -> G:
        """The same with the derivative that :meth:`differentiate` gave it."""
        call = self._function.apply if _differentiates() else self.op
        return self._unpack(call(*self.takes.flat(arguments)))

    def differentiate(
        self,
        derivative: Callable[[Any, G], A],
        *,
        forward_mode: Callable[..., Any],
        save: Callable[[Any, A, G], None] = lambda ctx, arguments, outputs: None,
    ) -> None:
        """Register the ``derivative``: the gradients of the arguments, from those of the outputs and from what
        ``save`` put into the context. In both forms it is asked for: torch.compile takes what is registered with the
        operator, all others a Function around it, which eager mode calls in half the time and torch.func knows."""

        def save_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, self.takes.record(inputs), self._unpack(output))

        def derivative_rows(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            return self.takes.flat(derivative(ctx, self.gives.record(gradients)))

        torch.library.register_autograd(self.name, derivative_rows, setup_context=save_rows, lib=_library)
        rules: dict[str, Callable[..., Any]] = {
            "forward": lambda *row: self.op(*row),
            "setup_context": save_rows,
            "backward": derivative_rows,
            "jvp": forward_mode,
            "vmap": self._batch_rows,
        }
        members = {name: staticmethod(rule) for name, rule in rules.items()}
        self._function = type(self.name.replace("::", "_"), (torch.autograd.Function,), members)

    def _unpack(self, row: Any) -> G:
        """The record of what ``op`` has returned: torch has a lone tensor for a row of one, and None for none."""
        if self.gives.size == 0:
            row = ()
        return self.gives.record((row,) if self.gives.size == 1 else row)

    def _on_rows(self, call: Callable[[A], G]) -> Callable[..., Any]:
        """``call`` as torch.library makes it."""

        def on_rows(*row: Any) -> Any:
            found = self.gives.flat(call(self.takes.record(row)))
            return found if len(found) > 1 else found[0] if found else None

        return on_rows

    def _batch_rows(self, info: Any, dims: tuple[Any, ...], *row: Any) -> tuple[Any, Any]:
        found = self.gives.flat(self._batch(info.batch_size, self.takes.record(dims), self.takes.record(row)))
        places = (self._place,) * len(found)
        return (found, places) if len(found) > 1 else (found[0], places[0])
