"""What the launches of all kernels share. Nothing here waits for the device, but for the clock of `fastest`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import triton

from flashlla.backends.triton import configs

# Without fused multiply-adds, which Triton means to stop using by default, every sweep takes a third more instructions.
COMPILER = {"enable_fp_fusion": True}
_HERE: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
# By what a config is looked up by: what FLASHLLA_AUTOTUNE=1 has found.
tuned: dict[tuple[Any, ...], configs.Config] = {}
# By kernel, device, settings and kinds of arguments (`plan.kinds`): what Triton compiled.
compiled: dict[tuple[Any, ...], Compiled] = {}


class Compiled(NamedTuple):
    """What Triton made of ``kernel``, which must live as long as its id is in a key: its own hash takes a lock."""

    binary: Any
    parameters: tuple[Any, ...]  # those of the kernel that are settings, as they follow its arguments
    kernel: Kernel

    def launch(self, grid: tuple[int, ...], stream: int | None, arguments: tuple[Any, ...]) -> None:
        """On ``stream``; None: as Triton does, which asks for the device, its stream and what hooks launches."""
        binary, grid = self.binary, (*grid, 1, 1)[:3]
        if stream is None:
            binary[grid](*arguments, *self.parameters)
        else:
            binary.run(
                *grid, stream, binary.function, binary.packed_metadata, None, None, None, *arguments, *self.parameters
            )


class Kernel(Protocol):
    """What ``triton.jit`` makes of a function."""

    __name__: str
    arg_names: Any

    def __getitem__(self, grid: tuple[int, ...], /) -> Callable[..., Any]: ...


def cdiv(a: int, b: int) -> int:
    """Triton's takes microseconds."""
    return -(-a // b)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within it ``device`` is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


def stream(device: torch.device) -> int | None:
    """The current one of ``device``, unless launches go by hooks of Triton's, as those of its profiler."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    if device.type != "cuda" or any(getattr(hook, "calls", hook) for hook in hooks):
        return None
    found: int = triton.runtime.driver.active.get_current_stream(device.index)
    return found


def launch(
    kernel: Kernel, name: str, grid: tuple[int, ...], device: torch.device, *arguments: Any, **settings: Any
) -> Compiled | None:  # fmt: skip
    """Launch ``kernel`` of pass ``name`` on tensors; what Triton has compiled, but for its interpreter."""
    try:
        with on(device):
            binary = kernel[grid](*arguments, **settings, **COMPILER)
    except Exception as error:
        raise failed(kernel, name, device, arguments, settings) from error
    if binary is None:
        return None
    return Compiled(binary, tuple(settings[parameter] for parameter in kernel.arg_names[len(arguments) :]), kernel)


def failed(
    kernel: Kernel, name: str, device: torch.device, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> RuntimeError:  # fmt: skip
    """The error of a launch."""
    firsts = [x[0] if isinstance(x, tuple) else x for x in arguments[:3]]
    dtypes = {str(x.dtype).removeprefix("torch.") for x in firsts if hasattr(x, "dtype")}
    return RuntimeError(
        f"flashlla: the Triton backends could not compile or launch kernel {kernel.__name__} (pass {name!r}, "
        f"{', '.join(sorted(dtypes))}, config {settings}) on {device} with Triton {triton.__version__}. "
        f"Use another backend: flashlla.set_backend('chunked'), or FLASHLLA_BACKEND=chunked."
    )


def fastest(configs_: list[configs.Config], launch_with: Callable[[configs.Config], None]) -> configs.Config:
    """The config that runs fastest; one that does not compile is none of them."""
    times: dict[configs.Config, float] = {}
    for c in configs_:
        with contextlib.suppress(RuntimeError):
            run = functools.partial(launch_with, c)
            times[c] = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    return min(times, key=times.__getitem__) if times else configs_[0]
