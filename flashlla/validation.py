"""Checks on what callers pass, and the canonical form that goes on from here."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlla.problem import SUPPORTED_DTYPES, Inputs, accumulator
from flashlla.solvers import Solver, encode
from flashlla.solvers.cg import check_tolerances

# Asked once: torch.compile cannot trace the question before torch 2.12.
_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(d))
_CG_DEFAULTS = {"cg_atol": 1e-12, "cg_rtol": 1e-12, "cg_max_iters": 32, "cg_use_preconditioner": False}


class Call(NamedTuple):
    """A validated call: four-dimensional inputs, and the settings that both operators take, in their order."""

    inputs: Inputs
    # causal, window, scale, delta_eps, solver's name and numbers, demanded
    settings: tuple[bool, int | None, float, float, str, list[float], bool]
    layout: str  # of the caller's tensors: "bsd", "bhsd" or "bshd"

    def restore(self, t: Tensor) -> Tensor:
        """``t`` of (B, H, S, ...) in the caller's layout."""
        if self.layout == "bsd":
            return t.squeeze(1)
        return t.transpose(1, 2) if self.layout == "bshd" else t


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ridge_lambda: float | Tensor = 10.0,
    qk_scale: float | None = None,
    delta_eps: float = 1e-12,
    cg_atol: float = 1e-12,
    cg_rtol: float = 1e-12,
    cg_max_iters: int = 32,
    cg_use_preconditioner: bool = False,
    solver: str | Solver | None = None,
    backend: str | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    seqlens_k: Tensor | None = None,
    layout: str = "bhsd",
) -> Call:
    """Check everything that can be checked without looking at the tensors' numbers; bring it to canonical form."""
    if layout not in ("bhsd", "bshd"):
        raise ValueError(f"layout: got {layout!r}, wanted 'bhsd' for (B, H, S, D) or 'bshd' for (B, S, H, D)")
    q, k, v = _check_tensors(q, k, v, layout)
    window = _check_mask(causal, window)
    _refuse_forward_mode(q, k, v, ridge_lambda)
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: got {type(backend).__name__}, wanted a backend's name, 'auto' or None")
    flat = q.dim() == 3
    if flat:
        q, k, v, layout = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), "bsd"
    elif layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ridge = _check_ridge(ridge_lambda, q, flat)
    seqlens_k = _check_seqlens(seqlens_k, k)
    scale = 1 / math.sqrt(q.shape[-1]) if qk_scale is None else _check_number(qk_scale, "qk_scale")
    delta_eps = _check_number(delta_eps, "delta_eps")
    cg_numbers = (cg_atol, cg_rtol, cg_max_iters, cg_use_preconditioner)
    name, numbers = _check_solver(solver, cg_numbers)
    demanded = solver is not None or cg_use_preconditioner
    return Call(Inputs(q, k, v, ridge, seqlens_k), (causal, window, scale, delta_eps, name, numbers, demanded), layout)


def _check_mask(causal: bool, window: int | None) -> int | None:
    """``window``, if the two go together."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {type(causal).__name__}, wanted True or False")
    if window is None:
        return None
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"window: got {type(window).__name__}, wanted a whole number of keys, or None for all")
    if window < 1:
        raise ValueError(f"window: got {window}, wanted at least 1, the query's own key")
    if not causal:
        raise ValueError(f"window: got {window} with causal=False, wanted causal=True: it keeps the latest keys")
    return window


def _check_seqlens(seqlens_k: Tensor | None, k: Tensor) -> Tensor | None:
    """seqlens_k as (B,) int32 on the device of ``k``."""
    if seqlens_k is None:
        return None
    if not isinstance(seqlens_k, Tensor):
        raise TypeError(
            f"seqlens_k: got {type(seqlens_k).__name__}, wanted a tensor of (B,) integers; "
            f"try torch.tensor(seqlens_k, dtype=torch.int32, device=k.device)"
        )
    if seqlens_k.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seqlens_k: got dtype {seqlens_k.dtype}, wanted torch.int32; try seqlens_k.int()")
    if seqlens_k.shape != k.shape[:1]:
        raise ValueError(f"seqlens_k: got shape {tuple(seqlens_k.shape)}, wanted (B,) = {tuple(k.shape[:1])}")
    if seqlens_k.device != k.device:
        raise ValueError(
            f"seqlens_k: got device {seqlens_k.device}, wanted {k.device}, the device of k; try seqlens_k.to(k.device)"
        )
    return seqlens_k.to(torch.int32)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    letters = "(B, S, H, D)" if layout == "bshd" else "(B, H, S, D)"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, wanted a torch.Tensor; try torch.as_tensor({name})")
        if t.layout != torch.strided or t.is_nested:
            raise TypeError(f"{name}: got a sparse or nested tensor, wanted a dense one; try {name}.to_dense()")
        if t.dim() not in (3, 4):
            hint = f"; try {name}.unsqueeze(0)" if t.dim() == 2 else ""
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, wanted (B, S, D) or {letters}{hint}")
        if t.dim() != q.dim():
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, wanted {q.dim()} dimensions, as q")
        if t.device != q.device:
            raise ValueError(
                f"{name}: got device {t.device}, wanted {q.device}, the device of q; try {name}.to(q.device)"
            )
    _check_shapes(q, k, v, 2 if layout == "bshd" else 1)
    q, k, v = _autocast(q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dtype not in SUPPORTED_DTYPES:
            hint = "" if t.is_complex() else f"; try {name}.float()"
            wanted = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED_DTYPES)
            raise TypeError(f"{name}: got dtype {t.dtype}, wanted one of {wanted}{hint}")
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, wanted {q.dtype}, the dtype of q; try {name}.to(q.dtype)")
    return q, k, v


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, head: int) -> None:
    """``head``: which dimension counts the heads, if there are four."""
    if q.shape[-1] == 0:
        raise ValueError(f"q: got shape {tuple(q.shape)}, wanted a head dim (the last) of at least 1")
    if v.shape[-1] == 0:
        raise ValueError(f"v: got shape {tuple(v.shape)}, wanted a value dim (the last) of at least 1")
    if k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: got shape {tuple(k.shape)}, wanted the batch size and head dim of q {tuple(q.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: got shape {tuple(v.shape)}, wanted {tuple(k.shape)} but for the last, as k")
    if q.dim() == 4:
        heads, shared = q.shape[head], k.shape[head]
        if heads != shared and (shared == 0 or heads % shared):
            raise ValueError(
                f"k: got {shared} heads, wanted as many as q ({heads}) or a number that divides it (query heads in "
                f"groups that share keys)"
            )


def _refuse_forward_mode(*arguments: Any) -> None:
    """Operators with a backward formula only would drop a tangent in silence."""
    if torch.compiler.is_compiling():
        return
    for t in arguments:
        if isinstance(t, Tensor) and torch.autograd.forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                "flashlla: lla_attention has no forward-mode derivative (torch.func.jvp, forward_ad); "
                "try torch.autograd.grad or backward()"
            )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, what scaled_dot_product_attention does: floating inputs but float64 go to the autocast dtype."""
    device = tensors[0].device.type
    if device not in _AUTOCAST or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _check_ridge(ridge_lambda: float | Tensor, q: Tensor, flat: bool) -> Tensor:
    """ridge_lambda as (B, H, S) in the accumulator dtype; a view of few numbers where few were given."""
    dtype, rows = accumulator(q.dtype), q.shape[:-1]
    if not isinstance(ridge_lambda, Tensor):
        number = _check_number(ridge_lambda, "ridge_lambda")
        if number <= 0:
            raise ValueError(f"ridge_lambda: got {ridge_lambda}, wanted a number above 0")
        least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        if not least <= number <= most:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"ridge_lambda: got {ridge_lambda}, wanted one that {name} holds: {least:.1e} to {most:.1e}"
            )
        return torch.full((), number, dtype=dtype, device=q.device).expand(rows)
    if not ridge_lambda.is_floating_point():
        raise TypeError(
            f"ridge_lambda: got dtype {ridge_lambda.dtype}, wanted a floating dtype; try ridge_lambda.float()"
        )
    if ridge_lambda.device != q.device and ridge_lambda.dim() > 0:
        raise ValueError(
            f"ridge_lambda: got device {ridge_lambda.device}, wanted {q.device}, the device of q; "
            f"try ridge_lambda.to(q.device)"
        )
    ridge = ridge_lambda.to(q.device, dtype)
    wanted = (rows[0], rows[2]) if flat else tuple(rows)
    if ridge.dim() > len(wanted) or any(n not in (1, w) for n, w in zip(ridge.shape[::-1], wanted[::-1])):
        letters = "(B, S)" if flat else "(B, H, S)"
        raise ValueError(
            f"ridge_lambda: got shape {tuple(ridge.shape)}, wanted one that broadcasts to {letters} = {wanted}"
        )
    ridge = ridge.expand(wanted)
    return ridge.unsqueeze(1) if flat else ridge


def _check_number(value: float, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        hint = " or a tensor; try torch.as_tensor" if name == "ridge_lambda" else ""
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number{hint}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: got {value}, wanted a finite number")
    return float(value)


def _check_solver(solver: str | Solver | None, cg_numbers: tuple[float, float, int, bool]) -> tuple[str, list[float]]:
    """The solver as a name and numbers, from either way of asking for one."""
    atol, rtol, max_iters, preconditioned = cg_numbers
    check_tolerances(atol, rtol, max_iters, prefix="cg_")
    if not isinstance(preconditioned, bool):
        raise TypeError(
            f"cg_use_preconditioner: got {preconditioned!r}, wanted True or False; for a preconditioner by name or "
            f"object try solver=flashlla.PCG(preconditioner=...)"
        )
    if solver is None:
        return ("pcg" if preconditioned else "cg"), [float(atol), float(rtol), float(max_iters)]
    for (name, default), value in zip(_CG_DEFAULTS.items(), cg_numbers):
        if value != default:
            raise ValueError(
                f"{name}: got {value} together with solver={solver!r}, wanted one of the two. Try "
                f"solver=flashlla.CG(atol=..., rtol=..., max_iters=...) or flashlla.PCG(...), without cg_* arguments"
            )
    if isinstance(solver, type) and issubclass(solver, Solver):
        raise TypeError(f"solver: got the class {solver.__name__}, wanted an object of it; try {solver.__name__}()")
    if not isinstance(solver, (str, Solver)):
        raise TypeError(
            f"solver: got {type(solver).__name__}, wanted 'cg', 'pcg', 'direct' or a flashlla.Solver object"
        )
    return encode(solver)
