"""What the launches of all kernels share. Nothing here waits for the device, but for the clock of `fastest`."""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import os
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
import triton
from triton.runtime.jit import JITCallable

from flashlla.backends.triton import configs

# Without fused multiply-adds, which Triton means to stop using by default, every sweep takes a third more instructions.
COMPILER = {"enable_fp_fusion": True}
# By what a config is looked up by: what FLASHLLA_AUTOTUNE=1 has found.
tuned: dict[tuple[Any, ...], configs.Config] = {}
# By kernel, device, settings and kinds of arguments (`plan.kinds`): what Triton has compiled, or is compiling; None of
# its interpreter, which compiles nothing.
compiled: dict[tuple[Any, ...], Future[Compiled | None]] = {}


# Held by the one thread that does what threads of Triton's must not do side by side. One hashes kernels (`_hash`). And
# one makes a launcher: Triton 3.6 compiles and loads one for each signature, all as modules of one name, and of a file
# that was loaded before Python gives the last module of that name, with another ``launch`` in it than that thread finds
# which is between loading and asking for it.
_alone = threading.Lock()


class _Turns:
    """Whoever waits for a turn with the least number comes next."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int]] = []
        self._count = itertools.count()
        self._taken = False
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[None]:
        mine = number, next(self._count)
        with self._changed:
            self._waiting.append(mine)
            self._changed.wait_for(lambda: not self._taken and mine == min(self._waiting))
            self._waiting.remove(mine)
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()


# Triton's front end holds Python's lock: side by side all kernels would leave it when the last one does. So they pass
# it one by one, first those that take the rest of the compiler longest.
_front_end = _Turns()
LONGEST = ("gram_kernel", "forward_hopper_kernel", "solve_hopper_kernel", "solve_kernel", "dq_kernel")


def turn(kernel: Kernel | None) -> int:
    """A number that is less where ``kernel`` is to come before others."""
    name = getattr(kernel, "__name__", "")
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


class Compiled(NamedTuple):
    """What Triton made of ``kernel``, which must live as long as its id is in a key: its own hash takes a lock."""

    binary: Any
    run: Callable[..., Any]
    head: tuple[Any, ...]  # what ``run`` takes between the stream and the kernel's arguments
    parameters: tuple[Any, ...]  # those of the kernel that are settings, as they follow its arguments
    kernel: Kernel

    def launch(self, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        """As Triton does, which asks for the device, its stream and what hooks launches."""
        self.binary[grid](*arguments, *self.parameters)


def _launcher(binary: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What launches ``binary``, and what that takes between the stream and the kernel's arguments.

    Triton's launcher looks at each launch for memory that the kernel may want to itself, and asks the launcher beneath
    for the rest. Where that one is known, kernels that want none, as ours, are launched by it."""
    run, hooks = binary.run, (binary.packed_metadata, None, None, None)  # to ask for ``run`` loads the kernel
    if triton.__version__.startswith("3.6.") and type(run).__name__ == "CudaLauncher":
        wants = run.global_scratch_size or run.profile_scratch_size
        if not wants:
            return run.launch, (binary.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *hooks)
    return run, (binary.function, *hooks)


class Kernel(Protocol):
    """What ``triton.jit`` makes of a function."""

    __name__: str
    arg_names: Any

    def __getitem__(self, grid: tuple[int, ...], /) -> Callable[..., Any]: ...

    def run(self, *arguments: Any, grid: tuple[int, ...], warmup: bool, **settings: Any) -> Any: ...


def cdiv(a: int, b: int) -> int:
    """Triton's takes microseconds."""
    return -(-a // b)


def stream(device: torch.device) -> int | None:
    """The current one of ``device``, unless launches go by hooks of Triton's, as those of its profiler."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    if device.type != "cuda" or any(getattr(hook, "calls", hook) for hook in hooks):
        return None
    found: int = triton.runtime.driver.active.get_current_stream(device.index)
    return found


def allocator(device: torch.device) -> Callable[[Any, Any, torch.dtype], torch.Tensor]:
    """What makes a tensor of a shape, strides (tuples) and a dtype on ``device``, the current one, uninitialised."""
    # What compiled code calls, in a third of the time. It does not fill memory where torch is asked to.
    direct = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if direct is not None and not torch.are_deterministic_algorithms_enabled():
        return cast("Callable[..., torch.Tensor]", direct)
    return lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Triton's compiler lets go of Python's lock for all but its front end, and the assembler is a process of its own:
    threads compile side by side. docs/performance.md has the measurement."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ThreadPoolExecutor(processors or 1, thread_name_prefix="flashlla-compile")


@functools.cache
def _set_up(device_type: str) -> None:
    """What Triton makes at its first kernel, and each thread would make anew: the hash of itself, of hundreds of
    megabytes, and its driver, meanwhile, by a C compiler where it is not on disk."""
    if device_type == "cuda":
        hashing = threading.Thread(target=getattr(triton.runtime.cache, "triton_key", lambda: None))
        with contextlib.suppress(RuntimeError):  # Python is on its way out, and starts no more threads
            hashing.start()
        triton.runtime.driver.active.get_current_target()
        if hashing.ident is not None:
            hashing.join()


def _hash(function: Any) -> None:
    """Have Triton make the key of ``function`` by which it finds on disk what it compiled; callees first.

    In a key are the global numbers of all functions that are called, but not of one whose own key is not made yet: by
    another order, of threads or of calls, a kernel would have another key, and be compiled in each process anew."""
    if isinstance(function, JITCallable) and function.hash is None:
        for node in ast.walk(function.parse()):
            if isinstance(node, ast.Name):
                _hash(function.__globals__.get(node.id))
        _ = function.cache_key


def _in_turn(kernel: Any, device: int | None) -> None:
    """Have ``kernel`` wait for its turn in the front end, in versions of Triton whose kernels name the class of sources
    that they are compiled of."""
    caches = getattr(kernel, "device_caches", None)
    if caches is None:
        return
    _ = caches[device]  # which names it
    source: Any = getattr(kernel, "ASTSource", None)
    if source is None or hasattr(source, "turns"):
        return
    number = turn(kernel)

    def make_ir(self: Any, *arguments: Any, **others: Any) -> Any:
        with _front_end.turn(number):
            return source.make_ir(self, *arguments, **others)

    kernel.ASTSource = type(source.__name__, (source,), {"turns": number, "make_ir": make_ir})


def _build_launcher(binary: Any) -> None:
    """Have Triton 3.6 write to disk the launcher of ``binary``, which it makes by a C compiler at the first launch: a
    process, which others of its kind may run beside."""
    if not (triton.__version__.startswith("3.6.") and hasattr(binary, "src")):
        return
    from triton.backends.nvidia import driver
    from triton.runtime import build, cache

    name = "__triton_launcher"
    text = driver.make_launcher(binary.src.constants, binary.src.signature, None)
    kept = cache.get_cache_manager(hashlib.sha256((text + build.platform_key()).encode()).hexdigest())
    file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if kept.get_file(file) is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.c")
        path.write_text(text)
        made = build._build(name, str(path), folder, driver.library_dirs(), driver.include_dirs, driver.libraries, [])
        kept.put(Path(made).read_bytes(), file, binary=True)


def _forget_threads() -> None:
    """A forked process has none of its parent's, and nobody finishes what they have begun."""
    global _alone, _front_end
    _threads.cache_clear()
    _alone, _front_end = threading.Lock(), _Turns()
    for key in [key for key, found in compiled.items() if not found.done()]:
        del compiled[key]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def compiling(
    key: tuple[Any, ...], kernel: Kernel, device: torch.device, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> Future[Compiled | None]:  # fmt: skip
    """What `compiled` has for ``key``; begun now, on a thread, where it has nothing. Of tensors, dtypes and alignment
    are looked at, and no more."""
    if (found := compiled.get(key)) is not None:
        return found
    mine: Future[Compiled | None] = Future()
    found = compiled.setdefault(key, mine)
    if found is mine:
        _set_up(device.type)
        try:
            _threads().submit(_fill, mine, kernel, device, arguments, settings)
        except RuntimeError:  # Python is on its way out, and starts no more threads
            _fill(mine, kernel, device, arguments, settings)
    return found


def _fill(future: Future[Compiled | None], *what: Any) -> None:
    try:
        future.set_result(_compile(*what))
    except BaseException as error:
        future.set_exception(error)


def _compile(
    kernel: Kernel, device: torch.device, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> Compiled | None:  # fmt: skip
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    with _alone:
        _hash(kernel)
        _in_turn(kernel, device.index)
    binary = kernel.run(*arguments, grid=(1,), warmup=True, **settings, **COMPILER)
    if binary is None:
        return None
    parameters = tuple(settings[parameter] for parameter in kernel.arg_names[len(arguments) :])
    with contextlib.suppress(Exception):  # Triton makes it then
        _build_launcher(binary)
    with _alone:  # to ask for ``run`` makes one, and loads the kernel to the device
        return Compiled(binary, *_launcher(binary), parameters, kernel)


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
    concurrent.futures.wait(list(compiled.values()))  # the host shall do nothing else meanwhile
    times: dict[configs.Config, float] = {}
    for c in configs_:
        with contextlib.suppress(RuntimeError):
            run = functools.partial(launch_with, c)
            times[c] = triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")
    return min(times, key=times.__getitem__) if times else configs_[0]
