"""Checks on what callers pass, and the canonical form that goes on from here."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flashlla.problem import SUPPORTED_DTYPES, Arguments, Inputs, Settings, accumulator
from flashlla.solvers import CG, Solver, to_spelling
from flashlla.solvers.cg import check_tolerances

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashlla.options import SettingOptions

# Asked once: torch.compile cannot trace the question before torch 2.12.
_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(d))
# The most new tokens of a sequence that decoding takes.
MOST_NEW = 16
# The size of a page, in keys, is a multiple of this.
PAGE_MULTIPLE = 16
# By layout: its form in three and in four dimensions, and the hint where heads and tokens look swapped.
_FORMS = {
    "bhsd": ("(B, S, D)", "(B, H, S, D)", "for tensors (B, S, H, D) pass layout='bshd'"),
    "bshd": ("(B, S, D)", "(B, S, H, D)", "for tensors (B, H, S, D) pass layout='bhsd'"),
    "thd": (
        "(T, H, D)",
        "(1, H, T, D)",
        "tensors are (T, H, D) or (1, H, T, D): of (1, T, H, D) try q[0], k[0] and v[0]",
    ),
}


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
    """The ``cg_*`` arguments."""

    cg_atol: float = CG.atol
    cg_rtol: float = CG.rtol
    cg_max_iters: int = CG.max_iters
    cg_use_preconditioner: bool = False


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge_lambda: float | Tensor,
    seqlens_k: Tensor | None,
    layout: str,
    **options: Unpack[SettingOptions],
) -> Call:
    """Check everything that can be checked without looking at the tensors' numbers; bring it to canonical form."""
    _check_layout(layout)
    q, k, v = _check_tensors(q, k, v, layout)
    if q.dim() == 3:
        q, k, v, layout = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), "bsd"
    elif layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        ridge_lambda=_check_ridge(ridge_lambda, q, layout),
        seqlens_k=_check_seqlens(seqlens_k, q, k),
    )
    return Call(Arguments(inputs, _check_settings(q, **options)), layout)


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
    q, k, v = _check_tensors(q, k, v, "thd")
    layout = "bhsd"
    if q.dim() == 3:
        q, k, v, layout = *(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v)), "thd"
    cu_seqlens_q, cu_seqlens_k = _check_edges(q, cu_seqlens, cu_seqlens_q, cu_seqlens_k)
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        ridge_lambda=_check_ridge(ridge_lambda, q, layout),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
    )
    settings = _check_settings(q, **options)._replace(
        max_seqlen_q=_check_max_seqlen(max_seqlen_q, max_seqlen, "max_seqlen_q", cu_seqlens_q),
        max_seqlen_k=_check_max_seqlen(max_seqlen_k, max_seqlen, "max_seqlen_k", cu_seqlens_k),
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
    q, k, v = _check_tensors(q, k_cache, v_cache, layout, names, paged=block_table is not None)
    if layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not 1 <= q.shape[2] <= MOST_NEW:
        raise ValueError(
            f"q: got {q.shape[2]} new tokens a sequence, wanted 1 to {MOST_NEW}; for more, lla_attention with seqlens_k"
        )
    if block_table is not None:
        block_table = _check_block_table(block_table, q, k)
    if seqlens_k is None:
        raise TypeError("seqlens_k: got None, wanted a tensor of (B,) integers: the keys in use, the new ones counted")
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        ridge_lambda=_check_ridge(ridge_lambda, q, layout),
        seqlens_k=_check_seqlens(seqlens_k, q, k),
        block_table=block_table,
    )
    settings = _check_settings(
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
        cast = "" if _autocast_dtype(q.device.type) is None else " under autocast, which is on"
        raise TypeError(
            f"out: got dtype {out.dtype}, wanted {q.dtype}, the dtype of q{cast}; "
            f"try torch.empty_like(out, dtype={q.dtype})"
        )
    if out.device != q.device:
        raise ValueError(f"out: got device {out.device}, wanted {q.device}, the device of q")
    return wide


def _check_settings(
    q: Tensor,
    *,
    qk_scale: float | None,
    delta_eps: float,
    cg_atol: float,
    cg_rtol: float,
    cg_max_iters: int,
    cg_use_preconditioner: bool,
    solver: str | Solver | None,
    backend: str | None,
    causal: bool,
    window: int | None,
) -> Settings:
    """What every kind of call says beside its tensors."""
    cg = _CGArguments(cg_atol, cg_rtol, cg_max_iters, cg_use_preconditioner)
    causal, window = _check_mask(causal, window)
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: got {type(backend).__name__}, wanted a backend's name, 'auto' or None")
    scale = 1 / math.sqrt(q.shape[-1]) if qk_scale is None else _check_scale(qk_scale, q.dtype)
    delta_eps = _constant(_check_number(delta_eps, "delta_eps"))
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


def _check_scale(qk_scale: float, dtype: torch.dtype) -> float:
    scale, most = _constant(_check_number(qk_scale, "qk_scale")), torch.finfo(accumulator(dtype)).max
    if not -most <= scale <= most:
        raise ValueError(f"qk_scale: got {qk_scale}, wanted a number that sums of {dtype} hold: at most {most:.1e}")
    return scale


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
    window = _check_whole(window, "window", "a whole number of keys, or None for all", hint)
    if window < 1:
        raise ValueError(f"window: got {window}, wanted at least 1, the query's own key, or None for all keys")
    if not causal:
        raise ValueError(f"window: got {window} with causal=False, wanted causal=True: it keeps the latest keys")
    return causal, window


def _check_whole(value: int, name: str, wanted: str = "a whole number", hint: str = "") -> int:
    """``value`` as Python's own int, or as torch.compile's; no tensor, since to read one waits for the device."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, Integral)):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted {wanted}; {hint or f'try int({name})'}")
    return value if isinstance(value, (int, torch.SymInt)) else operator.index(value)


def _check_integers(t: Tensor, name: str, shape: str, device: torch.device) -> Tensor:
    """``t``, if it is an integer tensor on ``device``, in int32."""
    if not isinstance(t, Tensor):
        raise TypeError(
            f"{name}: got {type(t).__name__}, wanted a tensor of {shape} integers; "
            f"try torch.tensor({name}, dtype=torch.int32, device=q.device)"
        )
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: got dtype {t.dtype}, wanted torch.int32; try {name}.int()")
    if t.device != device:
        raise ValueError(f"{name}: got device {t.device}, wanted {device}, the device of q; try {name}.to(q.device)")
    # What int32 does not hold stays out of range, where a plain cast would wrap it round.
    return t if t.dtype == torch.int32 else t.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def _check_seqlens(seqlens_k: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """seqlens_k as (B,) int32."""
    if seqlens_k is None:
        return None
    if isinstance(seqlens_k, Tensor) and seqlens_k.dtype == torch.bool:
        raise TypeError(
            f"seqlens_k: got a mask, torch.bool of shape {tuple(seqlens_k.shape)}, wanted how many keys each sequence "
            f"has, (B,) int32; try seqlens_k.sum(-1).to(torch.int32), if the mask is True for a sequence's first keys"
        )
    if isinstance(seqlens_k, Integral):
        raise TypeError(
            f"seqlens_k: got {type(seqlens_k).__name__}, wanted a tensor of (B,) integers; for the same in each "
            f"sequence try torch.full(({q.shape[0]},), seqlens_k, dtype=torch.int32, device=q.device)"
        )
    seqlens_k = _check_integers(seqlens_k, "seqlens_k", "(B,)", k.device)
    if seqlens_k.shape != q.shape[:1]:
        raise ValueError(f"seqlens_k: got shape {tuple(seqlens_k.shape)}, wanted (B,) = {tuple(q.shape[:1])}")
    return seqlens_k


def _check_edges(
    q: Tensor, both: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where packed sequences begin, of queries and of keys: ``both`` (cu_seqlens), or one tensor for each."""
    apart = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if both is not None:
        for name, value in apart.items():
            if value is not None:
                raise ValueError(f"{name}: got it together with cu_seqlens, wanted cu_seqlens alone or both others")
        edges = _check_cu_seqlens(both, q, "cu_seqlens")
        return edges, edges
    if all(value is None for value in apart.values()):
        raise ValueError(
            "cu_seqlens: got None, wanted a tensor of (sequences + 1,) int32, where each sequence begins and the "
            "last one ends; or cu_seqlens_q and cu_seqlens_k"
        )
    for name, value in apart.items():
        if value is None:
            raise ValueError(f"{name}: got None, wanted a tensor of (sequences + 1,) int32, or cu_seqlens for both")
    of_q, of_k = (_check_cu_seqlens(value, q, name) for name, value in apart.items())
    if of_q.shape != of_k.shape:
        raise ValueError(
            f"cu_seqlens_k: got shape {tuple(of_k.shape)}, wanted {tuple(of_q.shape)}, that of cu_seqlens_q: the "
            f"two tell of the same sequences"
        )
    return of_q, of_k


def _check_cu_seqlens(cu_seqlens: Tensor | None, t: Tensor, name: str) -> Tensor:
    """``cu_seqlens`` of the packed ``t`` as (sequences + 1,) int32."""
    cu_seqlens = _check_integers(cu_seqlens, name, "(sequences + 1,)", t.device)  # type: ignore[arg-type]
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{name}: got shape {tuple(cu_seqlens.shape)}, wanted (sequences + 1,): where each sequence begins, and "
            f"where the last one ends; try torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()"
        )
    return cu_seqlens


def _check_max_seqlen(own: int | None, both: int | None, name: str, cu_seqlens: Tensor) -> int:
    """The most tokens of a sequence; found by waiting for the device where the caller does not say."""
    given = both if own is None else own
    if own is None and both is not None:
        name = "max_seqlen"
    if given is None:
        return max(1, int(cu_seqlens.diff().amax())) if cu_seqlens.shape[0] > 1 else 1
    given = _check_whole(given, name)
    if given < 0:
        raise ValueError(f"{name}: got {given}, wanted at least 0, the length of the longest sequence")
    return given


def _check_block_table(block_table: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """(B, pages) int32."""
    block_table = _check_integers(block_table, "block_table", "(B, pages)", q.device)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(f"block_table: got shape {tuple(block_table.shape)}, wanted (B, pages), B = {q.shape[0]}")
    pages, _, size, _ = k.shape
    if pages == 0:
        raise ValueError("k_cache: got no pages, wanted at least one")
    if size == 0 or size % PAGE_MULTIPLE:
        raise ValueError(f"k_cache: got pages of {size} keys, wanted a multiple of {PAGE_MULTIPLE}")
    return block_table


def _check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: str,
    names: tuple[str, str, str] = ("q", "k", "v"),
    paged: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``paged``: whether k and v are pages, where they may be; None where they may not."""
    flat, letters = _FORMS[layout][:2]
    for name, t in zip(names, (q, k, v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: got {type(t).__name__}, wanted a torch.Tensor; try torch.as_tensor({name})")
        if type(t).__name__ == "DTensor":  # not imported: most have no use for it
            raise TypeError(
                f"{name}: got a DTensor, wanted each rank's own tensor. Where q, k and v are sharded on batch or heads "
                f"try {name}.to_local(), or torch.distributed.tensor.experimental.local_map"
            )
        if t.layout != torch.strided or t.is_nested:
            raise TypeError(f"{name}: got a sparse or nested tensor, wanted a dense one; try {name}.to_dense()")
        if t.dim() != q.dim():
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, wanted {q.dim()} dimensions, as q {tuple(q.shape)}")
        if t.dim() not in (3, 4):
            hint = f"; try {name}.unsqueeze({1 if layout == 'thd' else 0})" if t.dim() == 2 else ""
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, wanted {flat} or {letters}{hint}")
        if layout == "thd" and t.dim() == 4 and t.shape[0] != 1:
            raise ValueError(
                f"{name}: got shape {tuple(t.shape)}, wanted {flat} or {letters}: sequences lie one behind the other"
            )
        if t.device != q.device:
            raise ValueError(
                f"{name}: got device {t.device}, wanted {q.device}, the device of q; try {name}.to(q.device)"
            )
    _check_shapes(q, k, v, layout, names, paged)
    q, k, v = _autocast(q, k, v)
    for name, t in zip(names, (q, k, v)):
        if t.dtype not in SUPPORTED_DTYPES:
            hint = "" if t.is_complex() else f"; try {name}.float()"
            wanted = ", ".join(str(d).removeprefix("torch.") for d in SUPPORTED_DTYPES)
            raise TypeError(f"{name}: got dtype {t.dtype}, wanted one of {wanted}{hint}")
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, wanted {q.dtype}, the dtype of q; try {name}.to(q.dtype)")
    return q, k, v


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, layout: str, names: tuple[str, str, str], paged: bool | None
) -> None:
    q_name, k_name, v_name = names
    if q.shape[-1] == 0:
        raise ValueError(f"{q_name}: got shape {tuple(q.shape)}, wanted a head dim (the last) of at least 1")
    if v.shape[-1] == 0:
        raise ValueError(f"{v_name}: got shape {tuple(v.shape)}, wanted a value dim (the last) of at least 1")
    flat, packed = q.dim() == 3, layout == "thd"
    other_batch = k.shape[0] != q.shape[0] and not paged and not (flat and packed)
    if other_batch or k.shape[-1] != q.shape[-1]:
        hint = "; if it holds pages, pass block_table" if other_batch and paged is False else ""
        raise ValueError(
            f"{k_name}: got shape {tuple(k.shape)}, wanted the batch size and head dim of {q_name} {tuple(q.shape)}"
            f"{hint}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"{v_name}: got shape {tuple(v.shape)}, wanted {tuple(k.shape)} but for the last, as {k_name}")
    if flat and not packed:
        return
    head, token = (1, 0) if flat else (2, 1) if layout == "bshd" else (1, 2)
    fits = lambda heads, shared: heads == shared or (shared > 0 and heads % shared == 0)
    heads, shared = q.shape[head], k.shape[head]
    if not fits(heads, shared):
        hint = f"; {_FORMS[layout][2]}" if fits(q.shape[token], k.shape[token]) else ""
        raise ValueError(
            f"{k_name}: got {shared} heads, wanted as many as {q_name} ({heads}) or a number that divides it "
            f"(query heads in groups that share keys){hint}"
        )


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, what scaled_dot_product_attention does: floating inputs but float64 go to the autocast dtype."""
    dtype = _autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to; None where it is off."""
    return torch.get_autocast_dtype(device) if device in _AUTOCAST and torch.is_autocast_enabled(device) else None


def _check_ridge(ridge_lambda: float | Tensor, q: Tensor, layout: str) -> Tensor:
    """ridge_lambda as (B, H, S) in the accumulator dtype; a view of few numbers where few were given."""
    dtype, rows = accumulator(q.dtype), q.shape[:-1]
    if not isinstance(ridge_lambda, Tensor):
        hint = ""
        if ridge_lambda is None:
            hint = "; leave it out for the default 10.0"
        elif isinstance(ridge_lambda, (list, tuple, np.ndarray)):
            hint = "; try torch.as_tensor(ridge_lambda)"
        number = _check_number(ridge_lambda, "ridge_lambda", f"a number or a tensor{hint}")
        if number <= 0:
            raise ValueError(f"ridge_lambda: got {ridge_lambda}, wanted a number above 0")
        least, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
        if not least <= number <= most:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"ridge_lambda: got {ridge_lambda}, wanted one that {name} holds: {least:.1e} to {most:.1e}"
            )
        if torch.compiler.is_compiling():
            # By arithmetic: what torch.full fills with is taken for a constant, and each compiled anew.
            return (torch.ones((), dtype=dtype, device=q.device) * number).expand(rows)
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
    kept, letters, lacking = {"bsd": ((0, 2), "(B, S)", 1), "thd": ((1, 2), "(H, T)", 0)}.get(
        layout, ((0, 1, 2), "(B, H, S)", None)
    )
    wanted = tuple(rows[i] for i in kept)
    given = tuple(ridge.shape)
    fits = lambda shape: len(shape) <= len(wanted) and all(n in (1, w) for n, w in zip(shape[::-1], wanted[::-1]))
    if not fits(given):
        hint = ""
        if len(given) > 1 and fits((*given[:-2], given[-1], given[-2])):
            hint = f"; try ridge_lambda.{'T' if len(given) == 2 else 'mT'}"
        elif fits((*given, 1)):
            each, rest = "sequence" if layout == "bsd" else "head", ":" if len(given) == 1 else "..."
            hint = f"; one a {each}? try ridge_lambda[{rest}, None]"
        raise ValueError(f"ridge_lambda: got shape {given}, wanted one that broadcasts to {letters} = {wanted}{hint}")
    ridge = ridge.expand(wanted)
    return ridge if lacking is None else ridge.unsqueeze(lacking)


def _check_number(value: float, name: str, wanted: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        hint = f"; try float({name}): it has no gradient" if isinstance(value, Tensor) else ""
        raise TypeError(f"{name}: got {type(value).__name__}, wanted {wanted}{hint}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: got {value}, wanted a finite number")
    return float(value)


def _constant(value: float) -> float:
    """``value``, which torch.compile is to guard: of one that is computed from an argument, and is no operand of a
    tensor's, it keeps what the first calls had (as in scaled_dot_product_attention's scale)."""
    return float.fromhex(value.hex()) if torch.compiler.is_compiling() else value


def _check_solver(solver: str | Solver | None, cg: _CGArguments) -> tuple[str, Sequence[float]]:
    """The solver as a name and numbers, from either way of asking for one."""
    check_tolerances(cg.cg_atol, cg.cg_rtol, cg.cg_max_iters, prefix="cg_")
    if not isinstance(cg.cg_use_preconditioner, bool):
        raise TypeError(
            f"cg_use_preconditioner: got {cg.cg_use_preconditioner!r}, wanted True or False; for a preconditioner "
            f"by name or object try solver=flashlla.PCG(preconditioner=...)"
        )
    if solver is None:
        name = "pcg" if cg.cg_use_preconditioner else "cg"
        return name, tuple(_constant(float(number)) for number in (cg.cg_atol, cg.cg_rtol, cg.cg_max_iters))
    for name, value, default in zip(cg._fields, cg, _CGArguments()):
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
    return to_spelling(solver)
