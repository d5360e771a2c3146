"""Checks on what callers pass, and the canonical form that goes on from here."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashlla.checks import (
    MOST_KEYS,
    autocast_dtype,
    check_block_table,
    check_edges,
    check_max_seqlen,
    check_number,
    check_ridge,
    check_seqlens,
    check_seqstarts,
    check_tensors,
    check_whole,
    constant,
)
from flashlla.problem import Arguments, Inputs, Settings, accumulator
from flashlla.solvers import CG, ITERATIVE, Direct, Solver, to_spelling
from flashlla.solvers.cg import check_tolerances, squared

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashlla.options import SettingOptions


class Call(NamedTuple):
    """A validated call: what the operators take, and what the caller's tensors looked like."""

    arguments: Arguments
    layout: str  # of the caller's tensors: "bsd", "bhsd", "bshd" or "thd"

    def restore(self, t: Tensor) -> Tensor:
        """``t`` of (B, H, S, ...) in the caller's layout."""
        if self.layout == "bsd":
            return t.squeeze(1)
        if self.layout == "thd":
            return t.squeeze(0).transpose(0, 1)
        return t.transpose(1, 2) if self.layout == "bshd" else t


class _CGArguments(NamedTuple):
    """The ``cg_*`` arguments, and the one that stands for ``cg_rtol``."""

    cg_atol: float = CG.atol
    cg_rtol: float = CG.rtol
    cg_max_iters: int = CG.max_iters
    cg_use_preconditioner: bool = False
    tolerance: float | None = None


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge_lambda: float | Tensor,
    seqlens_k: Tensor | None,
    seqstarts_k: Tensor | None,
    layout: str,
    **options: Unpack[SettingOptions],
) -> Call:
    """Check everything that can be checked without looking at the tensors' numbers; bring it to canonical form."""
    _check_layout(layout)
    q, k, v = check_tensors(q, k, v, layout)
    if q.dim() == 3:
        q, k, v, layout = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), "bsd"
    elif layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        ridge_lambda=check_ridge(ridge_lambda, q, layout),
        seqlens_k=check_seqlens(seqlens_k, q, k),
        seqstarts_k=check_seqstarts(seqstarts_k, q, k),
    )
    return Call(Arguments(inputs, _settings(q, **options)), layout)


def prepare_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    ridge_lambda: float | Tensor,
    **options: Unpack[SettingOptions],
) -> Call:
    """The same for packed sequences."""
    q, k, v = check_tensors(q, k, v, "thd")
    layout = "bhsd"
    if q.dim() == 3:
        q, k, v, layout = *(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)), "thd"
    cu_seqlens_q, cu_seqlens_k = check_edges(q, cu_seqlens, cu_seqlens_q, cu_seqlens_k)
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        ridge_lambda=check_ridge(ridge_lambda, q, layout),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    settings = _settings(q, **options)._replace(
        max_seqlen_q=check_max_seqlen(max_seqlen_q, max_seqlen, "max_seqlen_q", cu_seqlens_q),
        max_seqlen_k=check_max_seqlen(max_seqlen_k, max_seqlen, "max_seqlen_k", cu_seqlens_k),
    )
    return Call(Arguments(inputs, settings), layout)


def prepare_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens_k: Tensor,
    *,
    ridge_lambda: float | Tensor,
    qk_scale: float | None,
    delta_eps: float,
    window: int | None,
    seqstarts_k: Tensor | None,
    block_table: Tensor | None,
    solver: str | Solver | None,
    backend: str | None,
    layout: str,
) -> Call:
    """The same for decoding with a cache."""
    _check_layout(layout)
    names = ("q", "k_cache", "v_cache")
    if isinstance(q, Tensor) and q.dim() != 4:
        form, head, token = ("(B, H, N, D)", 1, 2) if layout == "bhsd" else ("(B, N, H, D)", 2, 1)
        hint = f"; try q.unsqueeze({token}) for one new token, or q.unsqueeze({head}) for one head" * (q.dim() == 3)
        raise ValueError(f"q: got shape {tuple(q.shape)}, wanted four dimensions, {form}{hint}")
    q, k, v = check_tensors(q, k_cache, v_cache, layout, names, paged=block_table is not None)
    if layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if block_table is not None:
        block_table = check_block_table(block_table, q, k)
    if seqlens_k is None:
        raise TypeError("seqlens_k: got None, wanted a tensor of (B,) integers: the keys in use, the new ones counted")
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        ridge_lambda=check_ridge(ridge_lambda, q, layout),
        seqlens_k=check_seqlens(seqlens_k, q, k),
        seqstarts_k=check_seqstarts(seqstarts_k, q, k),
        block_table=block_table,
    )
    settings = _settings(
        q,
        qk_scale=qk_scale,
        delta_eps=delta_eps,
        solver=solver or "direct",
        backend=backend,
        causal=True,
        window=window,
        **_CGArguments()._asdict(),
    )
    settings = settings._replace(at_lengths=True, solver_demanded=solver is not None)
    return Call(Arguments(inputs, settings), layout)


def check_out(out: Tensor, call: Call) -> Tensor:
    """``out`` of lla_decode as (B, Hq, N, Dv), what the operator writes."""
    q, v = call.arguments.inputs.q, call.arguments.inputs.v
    if not isinstance(out, Tensor):
        raise TypeError(f"out: got {type(out).__name__}, wanted a torch.Tensor or None")
    wide = out.transpose(1, 2) if call.layout == "bshd" and out.dim() == 4 else out
    if wide.shape != (*q.shape[:-1], v.shape[-1]):
        rows = [q.shape[i] for i in ((0, 2, 1) if call.layout == "bshd" else (0, 1, 2))]
        raise ValueError(
            f"out: got shape {tuple(out.shape)}, wanted {(*rows, v.shape[-1])}, that of q with the last of v_cache"
        )
    if out.dtype != q.dtype:
        cast = "" if autocast_dtype(q.device.type) is None else " under autocast, which is on"
        raise TypeError(
            f"out: got dtype {out.dtype}, wanted {q.dtype}, the dtype of q{cast}; "
            f"try torch.empty_like(out, dtype={q.dtype})"
        )
    if out.device != q.device:
        raise ValueError(f"out: got device {out.device}, wanted {q.device}, the device of q")
    return wide


def _settings(q: Tensor, **options: Unpack[SettingOptions]) -> Settings:
    """What every kind of call says beside its tensors, checked once for all calls that say the same. A solver that is
    an object has a name in a registry, which is asked each time."""
    solver = options["solver"]
    if not torch.compiler.is_compiling() and (solver is None or isinstance(solver, str)):
        try:
            return _checked_settings(q.shape[-1], q.dtype, **options)
        except TypeError:  # an argument is no key, or of the wrong type: said below
            pass
    return _check_settings(q.shape[-1], q.dtype, **options)


def _check_settings(
    head_dim: int,
    dtype: torch.dtype,
    *,
    qk_scale: float | None,
    delta_eps: float,
    cg_atol: float,
    cg_rtol: float,
    cg_max_iters: int,
    cg_use_preconditioner: bool,
    tolerance: float | None,
    solver: str | Solver | None,
    backend: str | None,
    causal: bool,
    window: int | None,
) -> Settings:
    cg = _CGArguments(cg_atol, cg_rtol, cg_max_iters, cg_use_preconditioner, tolerance)
    causal, window = _check_mask(causal, window)
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: got {type(backend).__name__}, wanted a backend's name, 'auto' or None")
    scale = 1 / math.sqrt(head_dim) if qk_scale is None else _check_held(qk_scale, "qk_scale", dtype)
    delta_eps = _check_held(delta_eps, "delta_eps", dtype)
    if delta_eps < 0:
        raise ValueError(f"delta_eps: got {delta_eps}, wanted a number of at least 0")
    name, solver_numbers = _check_solver(solver, cg)
    return Settings(
        causal=causal,
        window=window,
        at_lengths=False,
        max_seqlen_q=0,
        max_seqlen_k=0,
        scale=scale,
        delta_eps=delta_eps,
        solver=name,
        solver_numbers=tuple(solver_numbers),
        solver_demanded=solver is not None or cg.cg_use_preconditioner,
        backend=backend,
    )


# A key tells True from 1 and from 1.0.
_checked_settings = functools.lru_cache(maxsize=1024, typed=True)(_check_settings)


def _check_held(value: float, name: str, dtype: torch.dtype) -> float:
    """A number that the accumulator of inputs of ``dtype`` holds."""
    number, most = constant(check_number(value, name)), torch.finfo(accumulator(dtype)).max
    if not -most <= number <= most:
        raise ValueError(f"{name}: got {value}, wanted a number that sums of {dtype} hold: at most {most:.1e}")
    return number


def _check_layout(layout: str) -> None:
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout: got {layout!r}, wanted 'bhsd' for (B, H, S, D) or 'bshd' for (B, S, H, D)")


def _check_mask(causal: bool, window: int | None) -> tuple[bool, int | None]:
    """Both as Python's own, if the two go together."""
    if not isinstance(causal, (bool, np.bool_)):
        raise TypeError(f"causal: got {type(causal).__name__}, wanted True or False; try bool(causal)")
    causal = bool(causal)
    if window is None:
        return causal, None
    pair = isinstance(window, (tuple, list))
    hint = "the causal (left, 0) of FlashAttention is window=left + 1" if pair else "try int(window)"
    window = check_whole(window, "window", "a whole number of keys, or None for all", hint)
    if window < 1:
        raise ValueError(f"window: got {window}, wanted at least 1, the query's own key, or None for all keys")
    if not causal:
        raise ValueError(f"window: got {window} with causal=False, wanted causal=True: it keeps the latest keys")
    return causal, window if window < MOST_KEYS else MOST_KEYS


def _check_solver(solver: str | Solver | None, cg: _CGArguments) -> tuple[str, Sequence[float]]:
    """The solver as a name and numbers, from either way of asking for one."""
    check_tolerances(cg.cg_atol, cg.cg_rtol, cg.cg_max_iters, prefix="cg_")
    if not isinstance(cg.cg_use_preconditioner, bool):
        raise TypeError(
            f"cg_use_preconditioner: got {cg.cg_use_preconditioner!r}, wanted True or False; for a preconditioner "
            f"by name or object try solver=flashlla.PCG(preconditioner=...)"
        )
    rtol = cg.cg_rtol if cg.tolerance is None else squared(cg.tolerance)
    if cg.tolerance is not None and cg.cg_rtol != CG.rtol:
        raise ValueError(
            f"cg_rtol: got {cg.cg_rtol} together with tolerance={cg.tolerance}, wanted one of the two: the one is the "
            f"square of the other"
        )
    numbers = tuple(constant(float(number)) for number in (cg.cg_atol, rtol, cg.cg_max_iters))
    if solver is None:
        return "pcg" if cg.cg_use_preconditioner else "cg", numbers
    for name, value, default in zip(cg._fields, cg, _CGArguments(tolerance=cg.tolerance)):
        if value != default:
            raise ValueError(
                f"{name}: got {value} together with solver={solver!r}, wanted one of the two. Try "
                f"solver=flashlla.CG(atol=..., rtol=..., max_iters=...) or flashlla.PCG(...), without cg_* arguments"
            )
    if isinstance(solver, type) and issubclass(solver, Solver):
        raise TypeError(f"solver: got the class {solver.__name__}, wanted an object of it; try {solver.__name__}()")
    if not isinstance(solver, (str, Solver)):
        raise TypeError(
            f"solver: got {type(solver).__name__}, wanted 'cg', 'pcg', 'pcg_gram', 'direct' or a flashlla.Solver object"
        )
    if cg.tolerance is None:
        return to_spelling(solver)
    if isinstance(solver, str) and solver in ITERATIVE:
        return solver, numbers
    direct = solver == "direct" or isinstance(solver, Direct)
    why = "which is exact and has none" if direct else "which has its own"
    hint = "solver='cg'" if direct else "solver=flashlla.CG(tolerance=...)"
    raise ValueError(
        f"tolerance: got {cg.tolerance} together with solver={solver!r}, {why}; try it without tolerance, or {hint}"
    )
