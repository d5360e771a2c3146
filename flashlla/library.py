"""Operators of torch.library that take and give records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from flashlla.records import Row
from flashlla.version import __version__

A = TypeVar("A", bound=tuple[Any, ...])
G = TypeVar("G", bound=tuple[Any, ...])

# What torch dispatches on where a tensor is plain: nothing that wraps another, in torch.vmap say, and has memory.
PLAIN = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_KEYS = 0
for _key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA"):
    _PLAIN_KEYS |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key)).raw_repr()
# Defined with Library rather than custom_op, which imports the whole compiler (seconds) at an operator's first call.
_library = torch.library.Library("flashlla", "DEF")


def transformed() -> bool:
    """Whether a call is in a transform of torch.func, or in forward mode."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def watched() -> bool:
    """Whether somebody but autograd is told of operators: a mode, a tracer, a profiler."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.autograd.profiler._is_profiler_enabled
        or recorded()
    )


def recorded() -> bool:
    """Whether torch.jit.trace records what is called: it takes what comes of a Function in Python for a constant."""
    return torch._C._get_tracing_state() is not None


def plain(tensors: Sequence[Any]) -> bool:
    """Whether ``tensors``, some of which may be None, are memory and nothing else that torch or others know of."""
    for x in tensors:
        if x is not None and (type(x) not in PLAIN or torch._C._dispatch_keys(x).raw_repr() & ~_PLAIN_KEYS):
            return False
    return True


class _Call:
    """On its way through autograd, which sees its tensors."""

    __slots__ = ("arguments", "outputs", "row")
    outputs: Any

    def __init__(self, arguments: Any, row: tuple[Any, ...]) -> None:
        self.arguments, self.row = arguments, row


def _edition(*parts: str) -> str:
    """A name for this version of the package with ``parts``."""
    return "v" + hashlib.sha256("\n".join((__version__, *parts)).encode()).hexdigest()[:12]


class Operator(Generic[A, G]):
    """An operator of torch.library, called with a record and giving one.

    name: in torch.ops.flashlla. takes, gives: the kinds of records. run: what it does. fake: outputs like those of
    ``run``, uninitialised, for when torch traces. batch(size, dims, arguments): the rule of torch.vmap, for a dimension
    of ``size`` at ``dims`` of the arguments. Outputs have that dimension first, or, with batched=False, not at all.
    writes: the argument that ``run`` writes to, if any. calls: operators that the derivative calls.

    What torch.compile keeps on disk of a graph it finds again by the names in it, of which those of its backward pass
    are none. So an operator's overload is named after this version of the package and after its own schema and those of
    whatever it ``calls``: code that was compiled before one of these changed is not found, rather than wrong.
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
        calls: Sequence[Operator[Any, Any]] = (),
    ) -> None:
        self.takes, self.gives = Row(takes), Row(gives)
        self.run, self._batch, self._place = run, batch, 0 if batched else None
        arguments = self.takes.schema
        if writes is not None:
            assert f"{arguments},".count(f"Tensor {writes},") == 1
            arguments = f"{arguments},".replace(f"Tensor {writes},", f"Tensor(a!) {writes},").removesuffix(",")
        schema = f"({arguments}) -> ({', '.join(['Tensor'] * self.gives.size)})"
        self.overload: str = _edition(schema, *(operator.overload for operator in calls))
        own = f"{name}.{self.overload}"
        self.name = f"flashlla::{own}"
        _library.define(own + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(own, self._on_rows(run), "CompositeExplicitAutograd")
        torch.library.register_fake(self.name, self._on_rows(fake), lib=_library)
        torch.library.register_vmap(self.name, self._batch_rows, lib=_library)
        self.op: Any = getattr(getattr(torch.ops.flashlla, name), self.overload)
        self._function: Any = None
        self._registered: Any = None
        self._transform: Any = None

    def __call__(self, arguments: A) -> G:
        return self._unpack(self.op(*self.takes.flat(arguments)))

    def differentiable(self, arguments: A) -> G:
        """The same with the derivative that :meth:`differentiate` gave it."""
        row = self.takes.flat(arguments)
        if torch.compiler.is_compiling() or recorded():
            return self._unpack(self.op(*row))
        if transformed():
            return self._unpack(self._transform.apply(*row))
        if torch.is_grad_enabled():
            call = _Call(arguments, row)
            found = self._function.apply(*self._tensors(row), call)
            return self._with(found if isinstance(found, tuple) else (found,), call.outputs)
        return self.below_autograd(arguments, row)

    def below_autograd(self, arguments: A, row: tuple[Any, ...] | None = None) -> G:
        """Without what is registered for the derivative: a Function around it has one, or nobody wants it. Straight to
        ``run``, where torch need not know: its way there takes as long as all else in a call."""
        row = self.takes.flat(arguments) if row is None else row
        if watched() or not plain(self._tensors(row)):
            return self._unpack(self.op(*row))
        with torch._C._AutoDispatchBelowAutograd():
            return self.run(arguments)

    def differentiate(
        self,
        derivative: Callable[..., tuple[Tensor | None, ...]],
        *,
        of: int,
        forward_mode: Callable[..., Any],
        save: Callable[[Any, A, G], None] = lambda ctx, arguments, outputs: None,
    ) -> None:
        """Register the ``derivative(ctx, *gradients)`` of the first ``of`` outputs, tensors: the gradients of the first
        arguments of a row, tensors too; all others have none. ``save`` puts into the context what it needs.

        In each form it is asked for: torch.compile takes what is registered with the operator, torch.func and forward
        mode a Function around it, and eager mode another, which it calls in a fraction of the time of either. That one
        gives autograd tensors alone, and those ``of`` outputs, for it takes some microseconds for each.
        """

        def save_rows(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            save(ctx, self.takes.record(inputs), self._unpack(output))

        def forward_and_save(ctx: Any, *tensors_and_call: Any) -> Any:
            call = tensors_and_call[-1]
            call.outputs = outputs = self.below_autograd(call.arguments, call.row)
            save(ctx, call.arguments, outputs)
            return outputs[0] if of == 1 else tuple(outputs[:of])

        def derivative_of(size: int) -> Callable[..., tuple[Tensor | None, ...]]:
            def padded(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
                found = derivative(ctx, *gradients[:of])
                return (*found, *(None,) * (size - len(found)))

            return padded

        def below(*row: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.op(*row)

        def registered(*row: Any) -> Any:
            tensors = self._tensors(row)
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
                return self._registered.apply(*row)
            # As compiled code has it: torch takes half as long as a plan to get from here to ``run``.
            if transformed() or watched() or not plain(tensors):
                return below(*row)
            with torch._C._AutoDispatchBelowAutograd():
                return self._packed(self.run(self.takes.record(row)))

        of_row = derivative_of(self.takes.size)
        self._registered = self._function_of(forward=below, setup_context=save_rows, backward=of_row)
        _library.impl(self.name.removeprefix("flashlla::"), registered, "Autograd")
        of_call = derivative_of(len(self.takes.tensors) + 1)
        self._function = self._function_of(forward=forward_and_save, backward=of_call)
        self._transform = self._function_of(
            forward=lambda *row: self.op(*row),
            setup_context=save_rows,
            backward=of_row,
            jvp=forward_mode,
            vmap=self._batch_rows,
        )

    def _with(self, firsts: tuple[Tensor, ...], outputs: G) -> G:
        """``outputs`` with others for the first ones."""
        found: G = tuple.__new__(type(outputs), (*firsts, *outputs[len(firsts) :]))
        return found

    def _tensors(self, row: tuple[Any, ...]) -> list[Any]:
        """What may be a tensor in ``row``."""
        return [row[i] for i in self.takes.tensors]

    def _function_of(self, **rules: Callable[..., Any]) -> Any:
        members = {name: staticmethod(rule) for name, rule in rules.items()}
        return type(self.name.replace("::", "_").partition(".")[0], (torch.autograd.Function,), members)

    def _unpack(self, row: Any) -> G:
        """The record of what ``op`` has returned: torch has a lone tensor for a row of one, and None for none."""
        if self.gives.size == 0:
            row = ()
        return self.gives.record((row,) if self.gives.size == 1 else row)

    def _packed(self, outputs: G) -> Any:
        """The inverse of :meth:`_unpack`."""
        row = self.gives.flat(outputs)
        return row if len(row) > 1 else row[0] if row else None

    def _on_rows(self, call: Callable[[A], G]) -> Callable[..., Any]:
        """``call`` as torch.library makes it."""
        return lambda *row: self._packed(call(self.takes.record(row)))

    def _batch_rows(self, info: Any, dims: tuple[Any, ...], *row: Any) -> tuple[Any, Any]:
        found = self.gives.flat(self._batch(info.batch_size, self.takes.record(dims), self.takes.record(row)))
        places = (self._place,) * len(found)
        return (found, places) if len(found) > 1 else (found[0], places[0])
