"""What every launch of a kernel shares: kernels compile side by side, and one is named where it fails."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from flashlla import lla_attention, lla_decode
from tests.support.kernels import interpreted, make

pytest.importorskip("triton")

pytestmark = pytest.mark.quick


class _Compiles:
    """Stands for a kernel: it compiles by ``how``, to ``binary`` or to what does nothing."""

    arg_names = ("n",)
    __name__ = "kernel"

    function = packed_metadata = None

    def __init__(self, how: Any = lambda: None, binary: Any = None) -> None:
        self.how, self.binary = how, binary

    def run(self, *_: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        assert warmup
        self.how()
        return self.binary or self

    def __getitem__(self, _: Any) -> Any:
        return lambda *_: None


def _plan(*kernels: _Compiles) -> Any:
    from flashlla.backends.triton.plan import Plan

    plan = Plan(torch.device("cpu"), [])
    for kernel in kernels:
        plan.launch(kernel, "solve", (1,), 1, 2.0)
    return plan.finished(())


def test_kernels_of_a_plan_compile_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashlla.backends.triton import runtime

    monkeypatch.setattr(runtime, "_threads", functools.partial(_pool, 3))
    together = threading.Barrier(3, timeout=20)  # which lets three pass at once, and no two
    threads = set[str]()
    kernels = [_Compiles(lambda: (threads.add(threading.current_thread().name), together.wait())) for _ in range(3)]
    _plan(*kernels).run([])
    assert len(threads) == 3
    assert threading.current_thread().name not in threads


@functools.cache
def _pool(size: int) -> Any:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(size)


def test_a_kernel_that_two_calls_want_compiles_once() -> None:
    times, begun, go = [], threading.Event(), threading.Event()
    kernel = _Compiles(lambda: (times.append(1), begun.set(), go.wait(20)))
    calls = [threading.Thread(target=_plan(kernel).run, args=([],)) for _ in range(2)]
    for call in calls:
        call.start()
        assert begun.wait(20)
    go.set()
    for call in calls:
        call.join(20)
    assert len(times) == 1


def test_what_fails_to_compile_is_tried_again_by_the_next_call() -> None:
    failures = [ValueError("out of something"), MemoryError("and of memory")]

    def compile() -> None:
        if failures:
            raise failures.pop(0)

    plan = _plan(_Compiles(), _Compiles(compile))
    for cause in (ValueError, MemoryError):
        with pytest.raises(RuntimeError, match="could not compile or launch kernel") as caught:
            plan.run([])
        assert type(caught.value.__cause__) is cause
    plan.run([])


def test_a_forked_process_compiles_by_itself() -> None:
    """It has none of its parent's threads, one of which is still at work."""
    go = threading.Event()
    stuck = _Compiles(lambda: go.wait(30))
    _plan(stuck).compile()
    _plan(_Compiles()).run([])
    child = multiprocessing.get_context("fork").Process(target=_compile_both, args=(stuck,))
    child.start()
    child.join(20)
    code = child.exitcode
    child.kill()
    go.set()
    assert code == 0


def _compile_both(stuck: _Compiles) -> None:
    stuck.how = lambda: None
    _plan(stuck, _Compiles()).run([])


KEYS = """
import importlib, pkgutil, sys
from flashlla.backends import triton
from flashlla.backends.triton import hopper, runtime
names = [m.name for m in pkgutil.iter_modules(triton.__path__)]
names = [n for n in names if n != "hopper" and (hopper.without_gluon() is None or "hopper" not in n)]
step = int(sys.argv[1])
for name in names[::step]:
    found = vars(importlib.import_module(f"flashlla.backends.triton.{name}"))
    for kernel in [n for n in found if n.endswith("_kernel")][::step]:
        runtime._hash(found[kernel])
        print(kernel, found[kernel].hash)
"""


@pytest.mark.slow
def test_a_kernels_key_on_disk_is_the_same_whoever_comes_first() -> None:
    """Of every kernel, as it is hashed in one order and in the other."""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    environment.pop("TRITON_INTERPRET", None)
    run = lambda step: subprocess.run(
        [sys.executable, "-c", KEYS, step], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    keys = [set(run(step).stdout.splitlines()) for step in ("1", "-1")]
    assert len(keys[0]) > 12
    assert keys[0] == keys[1]


def test_a_kernel_is_hashed_before_triton_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashlla.backends.triton import runtime

    order: list[str] = []
    monkeypatch.setattr(runtime, "_hash", lambda kernel: order.append("hashed"))
    _plan(_Compiles(lambda: order.append("compiled"))).run([])
    assert order == ["hashed", "compiled"]


def test_what_each_thread_would_make_is_made_before_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    from flashlla.backends.triton import runtime

    together, done = threading.Barrier(2, timeout=20), []
    make = lambda what: (together.wait(), time.sleep(0.01), done.append(what))
    active = SimpleNamespace(get_current_target=lambda: make("driver"))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(triton.runtime.cache, "triton_key", lambda: make("hash"), raising=False)
    runtime._set_up.__wrapped__("cuda")
    assert sorted(done) == ["driver", "hash"]


class _Source:
    """Stands for what Triton compiles a kernel of."""

    def make_ir(self, front_end: Any) -> Any:
        return front_end()


def test_front_ends_pass_one_by_one_the_longest_first() -> None:
    from flashlla.backends.triton import runtime

    order, inside, go = [], threading.Event(), threading.Event()

    def begun(name: str, front_end: Any) -> threading.Thread:
        kernel: Any = SimpleNamespace(__name__=name, device_caches={0: None}, ASTSource=_Source)
        for _ in range(2):  # of each thread that wants it
            runtime._in_turn(kernel, 0)
        thread = threading.Thread(target=lambda: kernel.ASTSource().make_ir(lambda: (order.append(name), front_end())))
        thread.start()
        return thread

    threads = [begun("first", lambda: (inside.set(), go.wait(20)))]
    assert inside.wait(20)
    threads += [begun(name, lambda: None) for name in ("cast_kernel", "solve_kernel", "gram_kernel")]
    while len(runtime._front_end._waiting) < 3:
        time.sleep(0.001)
    assert order == ["first"]
    go.set()
    for thread in threads:
        thread.join(20)
    assert order == ["first", "gram_kernel", "solve_kernel", "cast_kernel"]


def test_a_front_end_that_fails_gives_up_its_turn() -> None:
    from flashlla.backends.triton import runtime

    with pytest.raises(ValueError, match="of a kernel"), runtime._front_end.turn(0):
        raise ValueError("of a kernel")
    with runtime._front_end.turn(0):
        pass


class _Launchers:
    """Stands for what Triton 3.6 makes of kernels: launchers are modules of one name, which is one at a time."""

    def __init__(self) -> None:
        self.loaded = 0

    def compiled(self, mine: int) -> Any:
        def load(_: object) -> Any:
            self.loaded = mine
            time.sleep(0.01)  # here another thread may load its own
            return lambda *_, found=self.loaded: found

        return type("Binary", (), {"run": property(load), "function": None, "packed_metadata": None})()


def test_each_kernel_has_its_own_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashlla.backends.triton import runtime

    monkeypatch.setattr(runtime, "_threads", functools.partial(_pool, 8))
    launchers = _Launchers()
    kernels = [_Compiles(binary=launchers.compiled(i)) for i in range(8)]
    futures = [runtime.compiling((id(k),), cast("Any", k), torch.device("cpu"), (1,), {"n": 1}) for k in kernels]
    assert [cast("Any", future.result(20)).run() for future in futures] == list(range(8))


def test_a_child_forked_while_a_launcher_is_made_makes_its_own() -> None:
    from flashlla.backends.triton import runtime

    with runtime._alone:
        child = multiprocessing.get_context("fork").Process(target=_plan(_Compiles()).run, args=([],))
        child.start()
        child.join(20)
        code = child.exitcode
        child.kill()
    assert code == 0


def test_a_launcher_is_on_disk_before_triton_wants_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.6."):
        pytest.skip("others compile none")
    from triton.backends.nvidia import driver
    from triton.runtime import build

    from flashlla.backends.triton import runtime

    built: list[str] = []

    def compiler(name: str, source: str, folder: str, *_: Any) -> str:
        built.append(pathlib.Path(source).read_text())
        return source

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_build", compiler)
    monkeypatch.setattr(build, "_load_module_from_path", lambda *_: SimpleNamespace(launch=None))
    monkeypatch.setattr(driver, "library_dirs", list)
    source = SimpleNamespace(constants={(1,): 64}, signature={"x": ("*fp16", "i32"), "N": "constexpr", "y": "fp32"})
    sizes = ["global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align"]
    metadata = SimpleNamespace(launch_cooperative_grid=False, launch_pdl=False, **dict.fromkeys(sizes, 0))
    runtime._build_launcher(SimpleNamespace(src=source, metadata=metadata))
    assert len(built) == 1
    driver.CudaLauncher(source, metadata)
    runtime._build_launcher(SimpleNamespace(src=source, metadata=metadata))
    assert len(built) == 1


@interpreted
@pytest.mark.parametrize("name", ["solve_kernel", "gram_sums_kernel", "decode_solve_kernel"])
def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from flashlla.backends.triton import decode, gram, launch

    class Broken:
        __name__ = name

        def run(self, *_: object, **__: object) -> None:
            raise ValueError("out of something")

    module, call = {
        "solve_kernel": (launch, lla_attention),
        "gram_sums_kernel": (gram, functools.partial(lla_attention, solver="pcg_gram")),
        "decode_solve_kernel": (decode, functools.partial(lla_decode, seqlens_k=torch.tensor([4], dtype=torch.int32))),
    }[name]
    monkeypatch.setattr(module, name, Broken())
    q, k, v, _ = make((1, 1, 4, 8), torch.float32)
    with pytest.raises(RuntimeError, match=rf"{name}.*config.*BLOCK_.*set_backend\('chunked'\)") as caught:
        call(q, k, v, backend="triton")
    assert isinstance(caught.value.__cause__, ValueError)


def test_past_tritons_launcher_goes_what_it_would_hand_on() -> None:
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.6."):
        pytest.skip("of another Triton, by its own launcher")
    from triton.backends.nvidia.driver import CudaLauncher

    from flashlla.backends.triton import runtime

    seen: list[tuple[Any, ...]] = []
    launcher = CudaLauncher.__new__(CudaLauncher)  # without a source to compile
    sizes = {"global_scratch_size": 0, "profile_scratch_size": 0}
    others = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": True}
    others |= {"global_scratch_align": 1, "profile_scratch_align": 1, "launch": lambda *given: seen.append(given)}
    vars(launcher).update(sizes | others)
    binary = SimpleNamespace(run=launcher, function=5, packed_metadata=(1, 2))
    run, head = runtime._launcher(binary)
    assert run is not launcher
    run(3, 1, 1, 7, *head, (8, 9), 10, 64)
    launcher(3, 1, 1, 7, binary.function, binary.packed_metadata, None, None, None, (8, 9), 10, 64)
    assert seen[0] == seen[1]
    launcher.global_scratch_size = 16
    assert runtime._launcher(binary)[0] is launcher
