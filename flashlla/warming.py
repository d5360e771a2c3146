"""``warmup``: the kernels of calls to come, compiled before they come."""

from __future__ import annotations

import contextvars
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flashlla.api import lla_attention, lla_decode
from flashlla.backends.triton import Triton
from flashlla.hints import CALLS, with_hints
from flashlla.options import SettingOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

WHAT = ("forward", "backward", "decode")
# Batch, heads, tokens: few programs, many, and enough keys for the preconditioner of long sequences.
SHAPES = ((1, 8, 256), (4, 8, 1024), (1, 8, 4096))


class Warmup(NamedTuple):
    """What :func:`warmup` did: how many kernels are ready that were not, the seconds that took, and, where there is
    nothing to compile, why."""

    kernels: int
    seconds: float
    reason: str | None = None


@with_hints(CALLS, beside=SettingOptions.__annotations__)
def warmup(
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    *,
    what: Sequence[str] = WHAT,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    kv_heads: int | None = None,
    device: torch.device | str = "cuda",
    verbose: bool = True,
    **options: Unpack[SettingOptions],
) -> Warmup:
    """Compile the fused kernels that calls with these arguments will run, side by side, and run each once.

    Triton keeps what it has compiled on disk, by default in ``~/.triton/cache``: later processes of this machine find
    it there. What is compiled depends on head dim, dtype, mask, shared key heads and solver, on whether ridges are one
    number or one a head or token, and of shapes on little: whether programs are many, whether more than 1024 keys are
    there. Padding and packed sequences are compiled by their first call, as whatever is not warmed up.

    Args:
        head_dim: of q, k and v. Default 64.
        dtype: of q, k and v. Default torch.bfloat16.
        what: some of "forward", "backward", "decode"; default all. Backward comes with a forward pass.
        shapes: (batch, heads, tokens) of calls; of decoding, tokens are the room of the cache. Default: a short one, a
            usual one, and one of 4096 tokens.
        kv_heads: heads of k and v. Default None: as many as of q.
        device: a CUDA device. Default "cuda".
        verbose: say on stderr what is done, with a bar where tqdm is installed. Default True.
        options: as for :func:`flashlla.lla_attention`: ``causal``, ``window``, ``solver``. Decoding takes the window.

    Returns:
        :class:`flashlla.warming.Warmup`. Without a GPU nothing is compiled, and its ``reason`` says so.

    Raises:
        ValueError: ``what`` names something else.
        TypeError, ValueError, flashlla.UnsupportedError: a call does not fit, or no fused kernel takes it.

    Example:
        >>> import flashlla
        >>> made = flashlla.warmup(head_dim=64, what=["forward"], shapes=[(2, 4, 128)], verbose=False)
    """
    if unknown := set(what) - set(WHAT):
        raise ValueError(f"what: got {sorted(unknown)[0]!r}, wanted some of {', '.join(map(repr, WHAT))}")
    say = functools.partial(print, file=sys.stderr, flush=True) if verbose else lambda line: None
    if (reason := _nothing_to_compile()) is not None:
        say(f"flashlla: nothing is compiled: {reason}")
        return Warmup(0, 0.0, reason)
    from flashlla.backends.triton import runtime

    options.setdefault("backend", "triton")
    before, start = len(runtime.compiled), time.perf_counter()
    calls = _calls(head_dim, dtype, what, shapes, kv_heads, torch.device(device), options)
    # Each on a thread, with the caller's settings: a call waits for its own kernels alone.
    with ThreadPoolExecutor(len(calls) or 1) as threads:
        running = {threads.submit(contextvars.copy_context().run, call): name for name, call in calls.items()}
        for done in _shown(as_completed(running), len(running), verbose):
            done.result()
            if not _tqdm():
                say(f"flashlla: {time.perf_counter() - start:5.1f} s: {running[done]}")
    made = Warmup(len(runtime.compiled) - before, time.perf_counter() - start)
    where = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    say(f"flashlla: {made.kernels} kernels in {made.seconds:.1f} s; Triton keeps them in {where}")
    return made


def _nothing_to_compile() -> str | None:
    """Why, where it is so; in words for users."""
    triton = Triton()
    if triton.emulated():
        return "TRITON_INTERPRET=1 is set, and Triton's interpreter compiles nothing"
    if (why := triton.unavailable()) is not None:
        return f"{why}; what the other backends run, torch has compiled already"
    return None


def _calls(
    head_dim: int,
    dtype: torch.dtype,
    what: Sequence[str],
    shapes: Sequence[tuple[int, int, int]],
    kv_heads: int | None,
    device: torch.device,
    options: SettingOptions,
) -> dict[str, Callable[[], Any]]:
    """By what they are, in words."""
    calls: dict[str, Callable[[], Any]] = {}
    for shape in shapes:
        batch, heads, tokens = shape
        named = f"{batch} x {heads} x {tokens} x {head_dim}, {str(dtype).removeprefix('torch.')}"
        q, kv = (batch, heads, tokens, head_dim), (batch, kv_heads or heads, tokens, head_dim)
        make = functools.partial(torch.randn, dtype=dtype, device=device)
        # As operators take it by default, and as layers learn it.
        ridges: dict[str, Callable[[], Any]] = {
            "one ridge": lambda: 10.0,
            "a ridge a head": functools.partial(torch.ones, heads, 1, device=device),
        }
        for name, ridge in ridges.items():
            if "forward" in what or "backward" in what:
                step = functools.partial(_attend, make, q, kv, ridge, "backward" in what, options)
                passes = "forward and backward" if "backward" in what else "forward"
                calls[f"{passes}, {named}, {name}"] = step
            if "decode" in what:
                window = options.get("window")
                calls[f"decode, {named}, {name}"] = functools.partial(_decode, make, q, kv, ridge, window)
    return calls


def _attend(
    make: Callable[..., Tensor],
    q_shape: tuple[int, ...],
    kv_shape: tuple[int, ...],
    ridge: Callable[[], Any],
    backward: bool,
    options: SettingOptions,
) -> None:
    q, k, v = (make(shape, requires_grad=backward) for shape in (q_shape, kv_shape, kv_shape))
    o = lla_attention(q, k, v, ridge_lambda=ridge(), **options)
    if backward:
        (o * torch.ones_like(o)).sum().backward()  # torch.autograd.grad, given gradients, imports sympy


def _decode(
    make: Callable[..., Tensor],
    q_shape: tuple[int, ...],
    kv_shape: tuple[int, ...],
    ridge: Callable[[], Any],
    window: int | None,
) -> None:
    batch, heads, room, dim = q_shape
    q, k, v = make((batch, heads, 1, dim)), make(kv_shape), make(kv_shape)
    lengths = torch.full((batch,), room, dtype=torch.int32, device=q.device)
    lla_decode(q, k, v, lengths, ridge_lambda=ridge(), window=window, backend="triton")


@functools.cache
def _tqdm() -> Any:
    """The bar of that name; None where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def _shown(done: Iterator[Any], total: int, verbose: bool) -> Iterator[Any]:
    """``done``, with a bar, where there is one to show."""
    bar = _tqdm() if verbose else None
    return iter(done if bar is None else bar(done, total=total, desc="flashlla warmup", unit="call"))
