"""The short way of a call that is like one before.

Who trains makes the same call over and over: tensors of the same shapes, strides and dtypes on the same device, and the
same options. To check them, to choose a backend and to find its plans takes the host longer than to run these, and all
of it sees no more of a call than is in a key here. So a call goes the long way once, which has every check and every
error, and what it came to is kept by that key. What may change from call to call beside it is asked for in each: modes,
transforms, autocast, the preferred backend and the environment. Where somebody watches, counts what converged, or has
numbers looked at, as on the CPU they always are, the operators run inside; it saves the same tensors for backward
either way, so that checkpointing may come back the other way. Who wants a report, or has lengths, goes the long way.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlla import autograd, convergence, dispatch
from flashlla.backends.base import Kept
from flashlla.checks import autocast_dtype
from flashlla.library import PLAIN, plain, recorded, transformed, watched
from flashlla.options import AttentionOptions, SettingOptions
from flashlla.problem import Arguments, Inputs, Problem, Residuals, Settings, accumulator, describe
from flashlla.solvers import ITERATIVE
from flashlla.validation import prepare
from flashlla.values import looked_at

_of_settings = operator.itemgetter(*SettingOptions.__annotations__)


class Kind(NamedTuple):
    """What all calls of a kind come to."""

    settings: Settings  # with the name of the backend, if it has ``kept`` something
    problem: Problem
    kept: Kept | None
    swapped: bool  # tensors are (B, S, H, D)
    rows: torch.Size  # (B, Hq, Sq)
    ridge_shape: torch.Size  # as given

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As operators take them."""
        if self.swapped:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return q, k, v, ridge.expand(self.rows)

    def forward(self, *tensors: Tensor) -> Any:
        """The output, the residuals, and the settings that backward goes by."""
        if self.kept is None or watched() or convergence.active or looked_at(self.problem.device):
            arguments = Arguments(Inputs(*self.inputs(*tensors)), self.settings)
            found = autograd.FORWARD.below_autograd(arguments)
            o, residuals, settings = found.o, list(found.residuals), autograd.ran(arguments).settings
        else:
            with autograd.no_autocast(self.problem), torch._C._AutoDispatchBelowAutograd():
                o, *residuals = self.kept.forward(*self.inputs(*tensors))
            autograd.ran_on(self.settings.backend)
            settings = self.settings
        if self.swapped:
            o.transpose_(1, 2)  # in place, for autograd lets nobody write to a view that a Function returns
        return o, residuals, settings

    def backward(self, settings: Settings, saved: tuple[Tensor, ...], grad_o: Tensor, of_ridge: bool) -> Any:
        """The gradients of q, k, v and, if it is wanted, ridge_lambda."""
        residuals = saved[4:]
        if (
            self.kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed() or watched()
            or not plain((grad_o,)) or settings is not self.settings or not PLAIN.issuperset(map(type, saved))
        ):  # fmt: skip
            inputs, grad_o = self.inputs(*saved[:4]), grad_o.transpose(1, 2) if self.swapped else grad_o
            call = autograd.AdjointArguments(grad_o, Inputs(*inputs), Residuals(*residuals), settings, unrounded=False)
            return self._of_given(of_ridge, *autograd.backward(call))
        with autograd.no_autocast(self.problem), torch._C._AutoDispatchBelowAutograd():
            inputs, grad_o = self.inputs(*saved[:4]), grad_o.transpose(1, 2) if self.swapped else grad_o
            return self._of_given(of_ridge, *self.kept.backward((*inputs, *residuals), grad_o))

    def _of_given(self, of_ridge: bool, q: Tensor, k: Tensor, v: Tensor, ridge: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of tensors as they were given."""
        if self.swapped:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return q, k, v, ridge.sum_to_size(self.ridge_shape) if of_ridge else None


@functools.lru_cache(maxsize=autograd.KINDS, typed=True)  # which tells True from 1 and from 1.0
def _cell(*key: Any) -> list[Kind | None]:
    """Where the Kind of ``key`` is: empty until a call was checked; None where there is no short way."""
    return []


def attend(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Tensor | None:
    """The output of lla_attention; None: not this way."""
    ridge = options["ridge_lambda"]
    if (
        torch.compiler.is_compiling()
        or not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor))
        or transformed()
        or recorded()
        or not plain((q, k, v, ridge) if isinstance(ridge, Tensor) else (q, k, v))
        or options["seqlens_k"] is not None
        or options["seqstarts_k"] is not None
        or autocast_dtype(q.device.type) not in (None, q.dtype)
        or (kind := _kind_of(q, k, v, options)) is None
    ):
        return None
    if not isinstance(ridge, Tensor):
        ridge = torch.full((), float(ridge), dtype=accumulator(q.dtype), device=q.device)
    if torch.is_grad_enabled():
        o: Tensor = _apply(q, k, v, ridge, kind)
    else:
        o = kind.forward(q, k, v, ridge)[0]
    return o


class LLA(torch.autograd.Function):
    """The node of such a call."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, kind: Kind) -> Tensor:
        o: Tensor
        o, residuals, ctx.settings = kind.forward(q, k, v, ridge)
        ctx.save_for_backward(q, k, v, ridge, *residuals)
        ctx.set_materialize_grads(False)
        ctx.kind = kind
        return o

    @staticmethod
    def backward(ctx: Any, grad_o: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_o is None:
            return (None,) * 5
        return (*ctx.kind.backward(ctx.settings, ctx.saved_tensors, grad_o, ctx.needs_input_grad[3]), None)


# Past what torch does for transforms, which there are none of here.
_apply = super(torch.autograd.function._SingleLevelFunction, LLA).apply


def _kind_of(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Kind | None:
    """Of this call; if it is the first of its kind by way of all checks, which may raise."""
    ridge = options["ridge_lambda"]
    of_ridge: tuple[Any, ...] = (ridge,)
    if isinstance(ridge, Tensor):
        of_ridge = ridge.shape, ridge.stride(), ridge.dtype, ridge.device, ridge.data_ptr() % 16 == 0
    try:
        cell = _cell(
            q.shape, q.stride(), q.dtype, q.device, q.data_ptr() % 16 == 0,
            k.shape, k.stride(), k.dtype, k.device, k.data_ptr() % 16 == 0,
            v.shape, v.stride(), v.dtype, v.device, v.data_ptr() % 16 == 0,
            *of_ridge, options["layout"], *_of_settings(options), *dispatch.standing(options["backend"]),
        )  # fmt: skip
    except TypeError:  # an argument is no key
        return None
    if not cell:
        cell.append(_first(q, k, v, options))
    return cell[0]


def _first(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> Kind | None:
    arguments = prepare(q, k, v, **options).arguments
    (inputs, settings), ridge = arguments, options["ridge_lambda"]
    # Nothing was cast or put in.
    same = k.dtype == v.dtype == q.dtype and q.dim() == 4
    if isinstance(ridge, Tensor):
        same &= ridge.dtype == inputs.ridge_lambda.dtype and ridge.device == q.device
    # No registry can say another day that the solver is another.
    if not same or settings.solver not in ITERATIVE:
        return None
    problem = describe(arguments)
    backend = None if problem.empty else dispatch.choose(problem, settings.backend)
    kept = None if backend is None else backend.kept(problem, inputs)
    if backend is not None and kept is not None:
        settings = settings._replace(backend=backend.name)
    shape = ridge.shape if isinstance(ridge, Tensor) else torch.Size()
    return Kind(settings, problem, kept, options["layout"] == "bshd", inputs.ridge_lambda.shape, shape)
