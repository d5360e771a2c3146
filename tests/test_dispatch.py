"""Who runs a call, and what the caller is told about it."""

import asyncio
import functools
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import flashlla
from flashlla import dispatch
from flashlla.backends import triton
from flashlla.backends.base import Backend
from flashlla.backends.chunked import Chunked
from flashlla.solvers import Solution

pytestmark = pytest.mark.quick


class Picky(Chunked):
    """Takes nothing longer than ten tokens."""

    name = "picky"

    def unsupported(self, problem):
        return f"length {problem.q_len} is over 10" if problem.q_len > 10 else None


@pytest.fixture
def picky():
    flashlla.register_backend(Picky())


def inputs(length):
    return tuple(torch.randn(1, length, 4) for _ in range(3))


def unasked():
    """The backend that runs a call for which none was asked."""
    return next(b.name for b in dispatch.all_backends() if b.unavailable() is None and not b.emulated())


def ran_on(length=5, **options):
    return flashlla.lla_attention(*inputs(length), return_info=True, **options)[1].backend


def test_auto_takes_the_first_that_can():
    assert ran_on() == ran_on(backend="auto") == unasked() != "naive"
    assert flashlla.get_backend() == "auto"


def test_precedence(monkeypatch):
    monkeypatch.setenv("FLASHLLA_BACKEND", "naive")
    assert flashlla.get_backend() == ran_on() == "naive"
    with flashlla.set_backend("chunked"):
        assert flashlla.get_backend() == ran_on() == "chunked"
        assert ran_on(backend="naive") == "naive"
    assert ran_on() == "naive"


def test_set_backend_is_a_call_and_a_context():
    flashlla.set_backend("naive")
    assert flashlla.get_backend() == "naive"
    with flashlla.set_backend("chunked") as inner:
        assert flashlla.get_backend() == "chunked"
        assert repr(inner) == "set_backend('chunked')"
        with flashlla.set_backend("naive"):
            assert flashlla.get_backend() == "naive"
        assert flashlla.get_backend() == "chunked"
    assert flashlla.get_backend() == "naive"


def test_one_block_entered_twice_leaves_what_was_outside_each_time():
    block = flashlla.set_backend("chunked")
    with block:
        flashlla.set_backend("naive")
        with block:
            assert flashlla.get_backend() == "chunked"
        assert flashlla.get_backend() == "naive"
    assert flashlla.get_backend() == "auto"
    with block:  # and again, later
        assert flashlla.get_backend() == "chunked"
    assert flashlla.get_backend() == "auto"


def test_one_block_in_two_threads_is_two_blocks():
    block, inside, seen = flashlla.set_backend("chunked"), threading.Barrier(2), {}

    def run(outer):
        flashlla.set_backend(outer)
        with block:
            inside.wait(10)
            seen[outer, "in"] = flashlla.get_backend()
            inside.wait(10)
        seen[outer, "out"] = flashlla.get_backend()

    block.__enter__()
    threads = [threading.Thread(target=run, args=(name,)) for name in ("naive", "auto")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    block.__exit__(None, None, None)
    assert seen == {
        ("naive", "in"): "chunked",
        ("naive", "out"): "naive",
        ("auto", "in"): "chunked",
        ("auto", "out"): "auto",
    }
    assert flashlla.get_backend() == "auto"


def test_set_backend_decorates():
    @flashlla.set_backend("naive")
    def inner(depth):
        return [flashlla.get_backend(), *(inner(depth - 1) if depth else [])]

    @flashlla.set_backend("chunked")
    async def later():
        await asyncio.sleep(0)
        return flashlla.get_backend()

    assert flashlla.get_backend() == "auto"  # to decorate is not to call
    assert inner(2) == ["naive"] * 3
    assert asyncio.run(later()) == "chunked"
    assert flashlla.get_backend() == "auto"
    with flashlla.set_backend("chunked"):
        assert inner(0) == ["naive"]
        assert flashlla.get_backend() == "chunked"
    with pytest.raises(TypeError, match=r"generator function.*with block in its body"):

        @flashlla.set_backend("naive")
        def generator():
            yield


def test_a_context_restores_after_an_error():
    with pytest.raises(ZeroDivisionError), flashlla.set_backend("naive"):
        1 / 0  # noqa: B018
    assert flashlla.get_backend() == "auto"


def test_threads_and_tasks_do_not_see_each_others_choice():
    seen = {}
    ready = threading.Barrier(2)

    def work(name):
        with flashlla.set_backend(name):
            ready.wait(10)
            seen[name] = ran_on()
            ready.wait(10)

    threads = [threading.Thread(target=work, args=(n,)) for n in ("naive", "chunked")]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert seen == {"naive": "naive", "chunked": "chunked"}

    async def task(name):
        with flashlla.set_backend(name):
            await asyncio.sleep(0.01)
            return ran_on()

    async def both():
        return await asyncio.gather(task("naive"), task("chunked"))

    assert asyncio.run(both()) == ["naive", "chunked"]


@pytest.mark.usefixtures("picky")
@pytest.mark.parametrize("demand", [None, "picky"])
def test_backward_runs_where_forward_ran_whatever_came_between(monkeypatch, demand):
    """Whatever is preferred by then, known by then, and on whichever thread; and with cotangents in a batch, too."""
    ran = []
    original = Picky.backward
    monkeypatch.setattr(Picky, "backward", lambda self, *a: (ran.append(self.name), original(self, *a))[1])
    monkeypatch.setattr(Picky, "unsupported", lambda self, p: "a batch is over 2" if p.batch > 2 else None)
    q, k, v = (t.requires_grad_() for t in inputs(5))
    with flashlla.set_backend("auto" if demand else "picky"):
        o = flashlla.lla_attention(q, k, v, backend=demand)
        apart = torch.func.jacrev(lambda q: flashlla.lla_attention(q, k, v, backend=demand))(q)
    assert ran == ["picky"]
    assert apart.shape == (1, 5, 4, 1, 5, 4)

    class Latest(Chunked):
        name = "latest"

    flashlla.register_backend(Latest(), before="triton")
    monkeypatch.setenv("FLASHLLA_BACKEND", "naive")
    thread = threading.Thread(target=lambda: torch.autograd.grad(o.sum(), q))
    thread.start()
    thread.join()
    assert ran == ["picky", "picky"]


def test_a_demand_is_not_disturbed_by_a_wrong_preference(monkeypatch):
    monkeypatch.setenv("FLASHLLA_BACKEND", "nave")
    assert ran_on(backend="naive") == "naive"
    with pytest.raises(ValueError, match="backend: got ''"):
        ran_on(backend="")


def test_unknown_names_are_refused_at_once(monkeypatch):
    with pytest.raises(ValueError, match=r"name: got 'chunk'.*did you mean 'chunked'"):
        flashlla.set_backend("chunk")
    monkeypatch.setenv("FLASHLLA_BACKEND", "nave")
    with pytest.raises(ValueError, match=r"FLASHLLA_BACKEND: got 'nave'.*did you mean 'naive'"):
        ran_on()


@pytest.mark.usefixtures("picky")
def test_a_preference_falls_back_and_warns_once_a_reason():
    with flashlla.set_backend("picky"):
        assert ran_on(5) == "picky"
        with pytest.warns(flashlla.FallbackWarning, match=r"set_backend\('picky'\).*length 11 is over 10"):
            assert ran_on(11) == unasked()
        with warnings.catch_warnings():
            warnings.simplefilter("error", flashlla.FallbackWarning)
            ran_on(11)
        with pytest.warns(flashlla.FallbackWarning, match="length 12 is over 10"):
            ran_on(12)


@pytest.mark.usefixtures("picky")
def test_a_demand_is_met_or_refused_with_every_reason():
    assert ran_on(5, backend="picky") == "picky"
    with pytest.raises(flashlla.UnsupportedError) as caught:
        ran_on(11, backend="picky")
    text = str(caught.value)
    assert "length 11 is over 10" in text
    assert all(b.name in text for b in dispatch.all_backends())


@pytest.mark.usefixtures("picky")
def test_explain_agrees_and_runs_nothing(monkeypatch):
    monkeypatch.setattr(Chunked, "forward", lambda *_: pytest.fail("explain ran the call"))
    told = flashlla.explain(*inputs(11), backend="picky")
    assert told.backend is None
    assert told.reasons["picky"] == "length 11 is over 10"
    assert told.reasons["naive"] is None
    assert "backend='picky' cannot run this call:" in str(told)
    assert flashlla.explain(*inputs(5), backend="picky").backend == "picky"
    with flashlla.set_backend("picky"), warnings.catch_warnings():
        warnings.simplefilter("error")
        told = flashlla.explain(*inputs(11))
    assert told.backend == unasked()
    assert "set_backend('picky')" in str(told)


@pytest.mark.usefixtures("picky")
def test_an_emulated_backend_runs_on_demand_only():
    class Slow(Chunked):
        name = "slow"

        def emulated(self):
            return True

    flashlla.register_backend(Slow(), before=dispatch.all_backends()[0].name)
    assert flashlla.available_backends()[0] == "slow"
    assert ran_on() != "slow"
    assert ran_on(backend="slow") == "slow"
    with flashlla.set_backend("slow"):
        assert ran_on() == "slow"


def test_one_error_tells_all_that_is_in_the_way(monkeypatch):
    monkeypatch.setattr(triton, "_has_gpu", lambda: False)
    monkeypatch.setattr(triton, "_has_triton", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = (t.double() for t in inputs(5))
    with pytest.raises(flashlla.UnsupportedError) as caught:
        flashlla.lla_attention(q, k, v, backend="triton", solver="direct")
    assert [line for line in str(caught.value).splitlines() if line.startswith("  triton ")] == [
        "  triton      there is no CUDA device (TRITON_INTERPRET=1: the kernels run on the CPU, slowly, for tests); "
        "Triton is not installed (torch brings it where it is built for CUDA); "
        "it fuses the solvers CG and PCG(preconditioner='jacobi' or 'gram'), not Direct; "
        "its kernels take bfloat16, float16 and float32, not float64"
    ]


def test_tensors_on_the_wrong_side(monkeypatch):
    monkeypatch.setattr(triton, "_has_gpu", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = flashlla.explain(*inputs(5)).reasons["triton"]
    assert "its kernels run on CUDA tensors, and these are on the CPU" in reason


def test_naive_says_which_solvers_it_stands_in_for():
    class Own(flashlla.Solver):
        def solve(self, systems, b):
            return Solution.check(systems, b, b, iterations=0, tolerance=float("inf"))

    told = flashlla.explain(*inputs(5), solver=Own(), backend="naive")
    assert told.backend is None
    assert "Own" in told.reasons["naive"]
    assert flashlla.explain(*inputs(5), solver=Own()).backend == "chunked"


def test_backward_runs_where_forward_ran(monkeypatch):
    ran = []
    for backend in dispatch.all_backends():
        original = type(backend).backward
        monkeypatch.setattr(
            type(backend), "backward", lambda self, *a, _f=original: (ran.append(self.name), _f(self, *a))[1]
        )
    q, k, v = (t.requires_grad_() for t in inputs(5))
    with flashlla.set_backend("naive"):
        o = flashlla.lla_attention(q, k, v)
    flashlla.register_backend(Picky(), before=dispatch.all_backends()[0].name)
    with flashlla.set_backend("chunked"):
        o.sum().backward()
    assert ran == ["naive"]


def test_registering(picky):
    assert flashlla.available_backends()[-1] == "picky"

    class First(Picky):
        name = "first"

    flashlla.register_backend(First(), before="chunked")
    names = [b.name for b in dispatch.all_backends()]
    assert names.index("first") == names.index("chunked") - 1
    with pytest.raises(ValueError, match="taken"):
        flashlla.register_backend(Picky())
    with pytest.raises(TypeError, match=r"wanted a flashlla\.Backend"):
        flashlla.register_backend(Picky)

    class Nowhere(Picky):
        name = "nowhere"

        def unavailable(self):
            return "needs an abacus"

    flashlla.register_backend(Nowhere())
    assert "nowhere" not in flashlla.available_backends()
    assert flashlla.explain(*inputs(5)).reasons["nowhere"] == "needs an abacus"
    assert isinstance(Nowhere(), Backend)


def test_registering_in_anothers_place(picky):
    class Other(Picky):
        name = "picky"

        def forward(self, problem, inputs):
            ran.append("other")
            return super().forward(problem, inputs)

        def backward(self, problem, inputs, residuals, grad_o):
            ran.append("its backward")
            return super().backward(problem, inputs, residuals, grad_o)

    ran, names = [], [b.name for b in dispatch.all_backends()]
    q, k, v = (t.requires_grad_() for t in inputs(5))
    o, info = flashlla.lla_attention(q, k, v, backend="picky", return_info=True)
    with pytest.raises(ValueError, match=r"'picky', wanted a new one .*; overwrite=True replaces a backend"):
        flashlla.register_backend(Other())
    flashlla.register_backend(Other(), overwrite=True)
    assert [b.name for b in dispatch.all_backends()] == names
    assert info.backend == ran_on(backend="picky") == "picky"
    o.sum().backward()
    assert ran == ["other", "its backward"]
    flashlla.register_backend(Picky(), before="chunked", overwrite=True)
    names = [b.name for b in dispatch.all_backends()]
    assert names.count("picky") == 1
    assert names.index("picky") == names.index("chunked") - 1
    with pytest.raises(ValueError, match="before: got 'picky'"):
        flashlla.register_backend(Other(), before="picky", overwrite=True)


@pytest.mark.slow
def test_import_is_light():
    """Neither Triton nor SciPy is imported with the package, and it adds little to torch's own import."""
    code = (
        "import sys; from time import process_time as clock; begun = clock(); import torch; before = set(sys.modules); "
        "between = clock(); import flashlla; print((clock() - between) / (between - begun)); "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "assert not new & {'triton', 'scipy', 'matplotlib', 'statsmodels'}, new; "
        "flashlla.lla_attention(*torch.randn(3, 1, 4, 4), backend='chunked'); "
        "assert 'torch._dynamo' not in sys.modules, 'the compiler was imported'"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, env=environment)
    shares = [float(run([sys.executable, "-c", code]).stdout) for _ in range(3)]
    assert min(shares) < 0.25  # of processor time, which a busy machine changes little; 0.08 when this was written


def test_info_names_the_backend_of_the_call_not_of_what_it_calls():
    class Delegating(Chunked):
        name = "delegating"

        def forward(self, problem, inputs):
            flashlla.lla_attention(inputs.q, inputs.k, inputs.v, backend="naive")
            return super().forward(problem, inputs)

        def backward(self, problem, inputs, residuals, grad_o):
            ran.append(self.name)
            return super().backward(problem, inputs, residuals, grad_o)

    ran = []
    flashlla.register_backend(Delegating())
    q, k, v = (torch.randn(1, 9, 4, requires_grad=True) for _ in range(3))
    o, info = flashlla.lla_attention(q, k, v, backend="delegating", return_info=True)
    o.sum().backward()
    assert info.backend == "delegating"
    assert ran == ["delegating"]
