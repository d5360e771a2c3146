"""What the launches of all kernels share. Nothing here waits for the device, but for the clock of `fastest`."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, Protocol

import torch
import triton
from torch import Tensor

from flashlla.backends.triton import configs
from flashlla.backends.triton.records import Strided

# Without fused multiply-adds, which Triton means to stop using by default, every sweep takes a third more instructions.
COMPILER = {"enable_fp_fusion": True}
# By what a config is looked up by: what FLASHLLA_AUTOTUNE=1 has found.
_tuned: dict[tuple[Any, ...], configs.Config] = {}
# By kernel, device, settings and kinds of arguments: what Triton compiled, the settings as its parameters follow, and
# the kernel, which must live as long as its id is in a key (its own hash takes a lock, and longer than the rest).
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any], Kernel]] = {}


class Kernel(Protocol):
    """What ``triton.jit`` makes of a function."""

    __name__: str
    arg_names: Any

    def __getitem__(self, grid: tuple[int, ...], /) -> Callable[..., Any]: ...


def cdiv(a: int, b: int) -> int:
    """Triton's takes microseconds."""
    return -(-a // b)


def with_unit_stride(t: Tensor) -> Tensor:
    """``t``, copied only where its last dimension is not contiguous, or rows are so far apart that the offsets within a
    tile, which are of 32 bits, would not hold them."""
    near = t.stride(2) < 2**24 and (t.stride(-1) == 1 or t.shape[-1] == 1)
    return t if near else t.contiguous()


def launch(
    kernel: Kernel, name: str, grid: tuple[int, ...], device: torch.device, *arguments: Any, **settings: Any
) -> None:  # fmt: skip
    """Launch ``kernel`` of pass ``name``.

    From the second launch of a kind on without Triton's look at every argument, which takes as long as a short kernel.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, name, grid, device, *arguments, **settings)
    key = id(kernel), device, tuple(settings.items()), kinds(arguments)
    try:
        if (known := _compiled.get(key)) is not None:
            compiled, rest, _ = known
            compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
            return
        compiled = kernel[grid](*arguments, **settings, **COMPILER)
        if compiled is not None:  # it is None in Triton's interpreter
            rest = [settings[parameter] for parameter in kernel.arg_names[len(arguments) :]]
            _compiled[key] = compiled, rest, kernel
    except Exception as error:
        dtypes = {str(t.dtype).removeprefix("torch.") for t in map(_tensor, arguments[:3]) if t is not None}
        raise RuntimeError(
            f"flashlla: the Triton backends could not compile or launch kernel {kernel.__name__} (pass {name!r}, "
            f"{', '.join(sorted(dtypes))}, config {settings}) on {device} with Triton {triton.__version__}. "
            f"Use another backend: flashlla.set_backend('chunked'), or FLASHLLA_BACKEND=chunked."
        ) from error


def kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a kernel's arguments all that Triton compiles for: None or not, dtypes and whether pointers are aligned, and
    of integers whether they are 1, multiples of 16 and of 32 bits."""
    return tuple([
        _integers(x) if type(x) is int
        else type(x) if x is None or type(x) is float
        else (x.ptr.dtype, x.ptr.data_ptr() % 16 == 0, _integers(*x[1:])) if type(x) is Strided
        else kinds(x) if isinstance(x, tuple)
        else (x.dtype, x.data_ptr() % 16 == 0)
        for x in arguments
    ])  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _integers(*xs: int) -> tuple[tuple[bool, bool, bool], ...]:
    return tuple((x == 1, x % 16 == 0, x.bit_length() < 32) for x in xs)


def _tensor(argument: Any) -> Tensor | None:
    """The tensor that ``argument`` is, or begins with."""
    first = argument[0] if isinstance(argument, tuple) else argument
    return first if isinstance(first, Tensor) else None


def chosen_config(
    key: tuple[str, int, torch.dtype, tuple[int, int]], programs: Callable[[configs.Config], int],
    device: torch.device, launch_with: Callable[[configs.Config], None] | None,
) -> configs.Config:  # fmt: skip
    """The table's config for ``key`` (see `configs.config`); where ``programs`` are few, that for few; with
    FLASHLLA_AUTOTUNE=1 the fastest of those that ``launch_with`` launches, unless that is None."""
    usual, few = configs.config(*key), configs.config(*key, few=True)
    if few is not usual and programs(usual) <= configs.FEW * configs.processors(device):
        return few
    if launch_with is None or os.environ.get("FLASHLLA_AUTOTUNE") != "1" or device.type != "cuda":
        return usual
    if key not in _tuned:
        _tuned[key] = fastest(configs.candidates(*key), launch_with)
    return _tuned[key]


def fastest(configs_: list[configs.Config], launch_with: Callable[[configs.Config], None]) -> configs.Config:
    """The config that runs fastest; one that does not compile is none of them."""
    times: dict[configs.Config, float] = {}
    for c in configs_:
        with contextlib.suppress(RuntimeError):
            run = functools.partial(launch_with, c)
            times[c] = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    return min(times, key=times.__getitem__) if times else configs_[0]
