"""What every launch of a kernel shares: kernels compile side by side, and one is named where it fails."""

from __future__ import annotations

import functools
import multiprocessing
import pathlib
import threading
from typing import Any

import pytest
import torch

from flashlla import lla_attention, lla_decode
from tests.support.kernels import interpreted, make

pytest.importorskip("triton")

pytestmark = pytest.mark.quick


class _Loads:
    """Stands for what Triton has compiled of a kernel with arguments of these ``types``."""

    def __init__(self, *types: str) -> None:
        self.src = types_of = type("Source", (), {})()
        types_of.signature = dict(enumerate(types))

    def run(self, *_: Any) -> None:
        """Nothing, as does `_Loads[grid]`, which launches Triton's way."""

    def __getitem__(self, _: Any) -> Any:
        return self.run


class _Compiles:
    """Stands for a kernel of one pointer: it compiles by ``how``, to what does nothing."""

    arg_names = ("n",)
    __name__ = "kernel"

    def __init__(self, how: Any = lambda: None) -> None:
        self.how = how

    def run(self, *_: Any, grid: Any, warmup: bool, **settings: Any) -> Any:
        assert warmup
        self.how()
        return _Loads("*fp16")


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


@pytest.fixture
def older_triton(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def _hold(folder: str, inside: Any, go: Any) -> None:
    """A launcher of one pointer is being made until ``go``."""
    import triton

    from flashlla.backends.triton import runtime

    triton.__version__, triton.knobs.cache.dir = "3.6.0", folder
    with runtime._launcher_alone(_Loads("*fp16")):
        inside.set()
        go.wait(60)


def _enters(*types: str) -> tuple[threading.Thread, threading.Event]:
    """A thread that makes a launcher, and whether it was let in."""
    from flashlla.backends.triton import runtime

    inside = threading.Event()

    def make() -> None:
        with runtime._launcher_alone(_Loads(*types)):
            inside.set()

    thread = threading.Thread(target=make)
    thread.start()
    return thread, inside


@pytest.mark.parametrize("kind", ["thread", "process"])
@pytest.mark.usefixtures("older_triton")
def test_a_launcher_is_made_by_one_at_a_time(tmp_path: pathlib.Path, kind: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    inside, go = (spawn.Event(), spawn.Event()) if kind == "process" else (threading.Event(), threading.Event())
    worker: Any = (spawn.Process if kind == "process" else threading.Thread)(
        target=_hold, args=(str(tmp_path), inside, go)
    )
    worker.start()
    assert inside.wait(60)
    same, let_in = _enters("*fp16")
    other, other_let_in = _enters("*fp16", "i32")
    assert other_let_in.wait(20)
    assert not let_in.wait(0.2)
    go.set()
    assert let_in.wait(20)
    for each in (worker, same, other):
        each.join(20)


@pytest.mark.usefixtures("older_triton")
def test_a_kernel_that_compiles_waits_for_its_launcher() -> None:
    from flashlla.backends.triton import runtime

    plan = _plan(_Compiles())
    call = threading.Thread(target=plan.run, args=([],))
    with runtime._launcher_alone(_Loads("*fp16")):
        call.start()
        call.join(0.5)
        assert call.is_alive()
    call.join(20)
    assert not call.is_alive()


@pytest.mark.usefixtures("older_triton")
def test_a_process_forked_meanwhile_holds_no_launcher() -> None:
    from flashlla.backends.triton import runtime

    go = multiprocessing.get_context("fork").Event()
    child = multiprocessing.get_context("fork").Process(target=go.wait, args=(60,))
    with runtime._launcher_alone(_Loads("*fp16")):
        child.start()
    thread, let_in = _enters("*fp16")
    assert let_in.wait(20)
    go.set()
    thread.join(20)
    child.join(20)


@pytest.mark.usefixtures("older_triton")
def test_launchers_are_made_where_nothing_can_be_locked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    import triton

    (tmp_path / "file").touch()
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "file" / "in it"))
    _, let_in = _enters("*fp16")
    assert let_in.wait(20)


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
