"""Checks of single arguments: what came, what is wanted, what to try."""

from __future__ import annotations

import operator
import sys
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

from flashlla.problem import SUPPORTED_DTYPES, accumulator

# More keys than any call has: what asks for more asks for all, in the int64 that operators take.
MOST_KEYS = 2**31 - 1
# Whole numbers and fractions may be larger, and no float has them.
_LARGEST = sys.float_info.max
# Asked once: torch.compile cannot trace the question before torch 2.12.
_AUTOCAST = frozenset(d for d in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(d))
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
# Of ridge_lambda by layout: its dimensions among those of (B, H, S), their letters, and which one is put in.
_RIDGES = {"bsd": ((0, 2), "(B, S)", 1), "thd": ((1, 2), "(H, T)", 0)}


def check_whole(value: int, name: str, wanted: str = "a whole number", hint: str = "") -> int:
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


def check_seqlens(seqlens_k: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """seqlens_k as (B,) int32."""
    hint = "how many keys each sequence has, (B,) int32; try seqlens_k.sum(-1).to(torch.int32), if the mask is True for"
    return _check_ends(seqlens_k, "seqlens_k", hint, q, k)


def check_seqstarts(seqstarts_k: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """seqstarts_k as (B,) int32."""
    hint = "each sequence's first key, (B,) int32; try (~seqstarts_k).sum(-1).to(torch.int32), if the mask is False for"
    return _check_ends(seqstarts_k, "seqstarts_k", hint, q, k)


def _check_ends(ends: Tensor | None, name: str, hint: str, q: Tensor, k: Tensor) -> Tensor | None:
    """``ends``, one number a sequence, as (B,) int32; ``hint``: what is wanted instead of a mask that tells them."""
    if ends is None:
        return None
    if isinstance(ends, Tensor) and ends.dtype == torch.bool:
        raise TypeError(
            f"{name}: got a mask, torch.bool of shape {tuple(ends.shape)}, wanted {hint} a sequence's first keys"
        )
    if isinstance(ends, Integral):
        raise TypeError(
            f"{name}: got {type(ends).__name__}, wanted a tensor of (B,) integers; for the same in each "
            f"sequence try torch.full(({q.shape[0]},), {name}, dtype=torch.int32, device=q.device)"
        )
    ends = _check_integers(ends, name, "(B,)", k.device)
    if ends.shape != q.shape[:1]:
        raise ValueError(f"{name}: got shape {tuple(ends.shape)}, wanted (B,) = {tuple(q.shape[:1])}")
    return ends


def check_edges(
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


def check_max_seqlen(own: int | None, both: int | None, name: str, cu_seqlens: Tensor) -> int:
    """The most tokens of a sequence; found by waiting for the device where the caller does not say."""
    given = both if own is None else own
    if own is None and both is not None:
        name = "max_seqlen"
    if given is None:
        return max(1, int(cu_seqlens.diff().amax())) if cu_seqlens.shape[0] > 1 else 1
    given = check_whole(given, name)
    if given < 0:
        raise ValueError(f"{name}: got {given}, wanted at least 0, the length of the longest sequence")
    return given if given < MOST_KEYS else MOST_KEYS


def check_block_table(block_table: Tensor, q: Tensor, k: Tensor) -> Tensor:
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


def check_tensors(
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
                f"{name}: got a DTensor, wanted each rank's own tensor: lla_attention alone takes DTensors. Where they "
                f"are sharded on batch or heads try {name}.to_local(); along the sequence flashlla.distributed"
            )
        if t.is_nested:
            jagged = "" if t.layout == torch.jagged else " and layout=torch.jagged where it is made"
            raise TypeError(
                f"{name}: got a nested tensor, wanted a dense one; of sequences (B, j, H, D) try "
                f"flashlla.lla_attention_varlen(q.values(), k.values(), v.values(), cu_seqlens=q.offsets()){jagged}"
            )
        if t.layout != torch.strided:
            raise TypeError(f"{name}: got a sparse tensor, wanted a dense one; try {name}.to_dense()")
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
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def autocast_dtype(device: str) -> torch.dtype | None:
    """What autocast casts to; None where it is off."""
    return torch.get_autocast_dtype(device) if device in _AUTOCAST and torch.is_autocast_enabled(device) else None


def check_ridge(ridge_lambda: float | Tensor, q: Tensor, layout: str) -> Tensor:
    """ridge_lambda as (B, H, S) in the accumulator dtype; a view of few numbers where few were given."""
    dtype, rows = accumulator(q.dtype), q.shape[:-1]
    if not isinstance(ridge_lambda, Tensor):
        hint = ""
        if ridge_lambda is None:
            hint = "; leave it out for the default 10.0"
        elif isinstance(ridge_lambda, (list, tuple, np.ndarray)):
            hint = "; try torch.as_tensor(ridge_lambda)"
        number = check_number(ridge_lambda, "ridge_lambda", f"a number or a tensor{hint}")
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
    ridge = ridge_lambda
    if ridge.dtype != dtype or ridge.device != q.device:
        ridge = ridge.to(q.device, dtype)
    kept, letters, lacking = _RIDGES.get(layout, (None, "(B, H, S)", None))
    wanted = tuple(rows if kept is None else [rows[i] for i in kept])
    given = tuple(ridge.shape)
    if layout != "bsd" and len(given) == 1 and given != (1,):
        raise ValueError(
            f"ridge_lambda: got shape {given}, wanted one that says whether its numbers are heads' or tokens', and "
            f"broadcasts to {letters} = {wanted}; try ridge_lambda[:, None] for heads, ridge_lambda[None, :] for tokens"
        )
    if not _broadcasts(given, wanted):
        hint = ""
        if len(given) > 1 and _broadcasts((*given[:-2], given[-1], given[-2]), wanted):
            hint = f"; try ridge_lambda.{'T' if len(given) == 2 else 'mT'}"
        elif len(given) > 1 and given[-1] == 1 and _broadcasts(given[:-1], wanted):
            hint = "; try ridge_lambda.squeeze(-1)"
        elif _broadcasts((*given, 1), wanted):
            each, rest = "sequence" if layout == "bsd" else "head", ":" if len(given) == 1 else "..."
            hint = f"; one a {each}? try ridge_lambda[{rest}, None]"
        raise ValueError(f"ridge_lambda: got shape {given}, wanted one that broadcasts to {letters} = {wanted}{hint}")
    ridge = ridge.expand(wanted)
    return ridge if lacking is None else ridge.unsqueeze(lacking)


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor of ``shape`` expands to ``wanted``."""
    return len(shape) <= len(wanted) and all(n in (1, w) for n, w in zip(shape[::-1], wanted[::-1]))


def check_number(value: float, name: str, wanted: str = "a number") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        hint = f"; try float({name}): it has no gradient" if isinstance(value, Tensor) else ""
        if isinstance(value, Tensor) and name == "qk_scale":
            hint += (
                "; or, to learn it, q * r, k * r, ridge_lambda * r**2 and qk_scale=1.0 with r = qk_scale.sqrt(), which "
                "is the same (q * qk_scale would move the queries, too)"
            )
        raise TypeError(f"{name}: got {type(value).__name__}, wanted {wanted}{hint}")
    if not -_LARGEST <= value <= _LARGEST:
        raise ValueError(f"{name}: got {value}, wanted a finite number")
    return float(value)


def constant(value: float) -> float:
    """``value``, which torch.compile is to guard: of one that is computed from an argument, and is no operand of a
    tensor's, it keeps what the first calls had (as in scaled_dot_product_attention's scale)."""
    return float.fromhex(value.hex()) if torch.compiler.is_compiling() else value
