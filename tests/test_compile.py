"""The operators under torch.library's checks and torch.compile: one graph, and what eager gives."""

import dataclasses
import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing

import flashlla
from flashlla.autograd import BACKWARD, FORWARD, WHICH, AdjointArguments
from flashlla.library import Operator
from flashlla.problem import Arguments, Inputs, Settings, describe
from flashlla.solvers import Gram

# torch.compile's default backend builds C++; without a compiler the graph is still traced, differentiated and run.
HAS_COMPILER = bool(shutil.which("g++") or shutil.which("clang++"))
compiled_whole = functools.partial(torch.compile, fullgraph=True, backend="inductor" if HAS_COMPILER else "aot_eager")
TIGHT = flashlla.CG(rtol=1e-26, max_iters=200)
SETTINGS = Settings(
    causal=True,
    window=None,
    at_lengths=False,
    max_seqlen_q=0,
    max_seqlen_k=0,
    scale=0.3,
    delta_eps=1e-12,
    solver="cg",
    solver_numbers=(1e-12, 1e-12, 32.0),
    solver_demanded=True,
    backend=None,
)


def inputs(length=33, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, length, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3))
    ridge = (torch.rand(3, length, generator=generator, dtype=dtype) + 0.1).requires_grad_()
    return q, k, v, ridge


def loss(q, k, v, ridge):
    return flashlla.lla_attention(q, k, v, ridge_lambda=ridge, solver=TIGHT).sin().sum()


def opcheck(operator: Operator, arguments) -> None:
    torch.library.opcheck(operator.op, operator.takes.flat(arguments))


def opcheck_both_directions(q, k, v, ridge, backend):
    arguments = Arguments(Inputs(q, k, v, ridge), SETTINGS._replace(backend=backend))
    opcheck(FORWARD, arguments)
    with torch.no_grad():
        found = FORWARD(arguments)
    inputs = Inputs(*(t.detach() for t in (q, k, v, ridge)))
    opcheck(BACKWARD, AdjointArguments(found.o, inputs, found.residuals, arguments.settings, unrounded=False))
    return arguments


def assert_same_gradients(compiled, eager, arguments):
    for a, b in zip(
        torch.autograd.grad(compiled(*arguments), arguments), torch.autograd.grad(eager(*arguments), arguments)
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_opcheck(backend):
    q, k, v, ridge = inputs(9)
    ridge = ridge.expand(2, 3, 9).contiguous()
    arguments = opcheck_both_directions(q, k, v, ridge, backend)
    opcheck(WHICH, arguments)


@pytest.mark.quick
def test_all_outputs_are_where_the_inputs_are():
    """A CUDA graph holds no number on the CPU."""
    q, k, v, ridge = (t.detach() for t in inputs(9))
    ridge = ridge.expand(2, 3, 9).contiguous()
    q, k, v, ridge = (t.to("meta") for t in (q, k, v, ridge))
    arguments = Arguments(Inputs(q, k, v, ridge), SETTINGS)
    found = FORWARD(arguments)
    gradients = BACKWARD(AdjointArguments(found.o, arguments.inputs, found.residuals, SETTINGS, unrounded=False))
    assert {t.device.type for t in (*FORWARD.gives.flat(found), *gradients)} == {"meta"}


def test_what_no_cuda_graph_can_hold_says_so(monkeypatch):
    """As the operators look at a backend while a graph is captured."""
    problem = describe(Arguments(Inputs(*inputs(9)), SETTINGS))
    problem = dataclasses.replace(problem, device=torch.device("cuda"))
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=capturing: answer)
        if capturing:
            with pytest.raises(RuntimeError, match=r"the backend 'chunked' waits for the device.*reduce-overhead"):
                flashlla.autograd._no_capture(flashlla.dispatch.backend_named("chunked"), problem)
        for name in ("triton", "triton_pcg") if capturing else ("triton", "triton_pcg", "chunked", "naive"):
            backend = flashlla.dispatch.backend_named(name)
            assert flashlla.autograd._no_capture(backend, problem) is backend


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_gives_what_eager_gives(dynamic):
    torch._dynamo.reset()
    compiled = compiled_whole(loss, dynamic=dynamic)
    for length in (33, 20):
        assert_same_gradients(compiled, loss, inputs(length))


@pytest.mark.quick
def test_more_keys_than_any_call_has():
    """What no int64 of an operator's holds."""
    torch._dynamo.reset()
    q, k, v = (t.detach() for t in inputs(9)[:3])
    call = lambda most: flashlla.lla_attention(q, k, v, window=most)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(2**64), call(None))
    rows, edges = [t[0].transpose(0, 1) for t in (q, k, v)], torch.tensor([0, 9], dtype=torch.int32)
    packed = lambda most: flashlla.lla_attention_varlen(*rows, cu_seqlens=edges, max_seqlen=most)
    assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(2**64), packed(9))


def test_compile_follows_the_backend_that_is_set(monkeypatch):
    torch._dynamo.reset()
    ran = {"forward": [], "backward": []}
    for backend in flashlla.dispatch.all_backends():
        for name, names in ran.items():
            original = getattr(type(backend), name)
            spy = lambda self, *a, _f=original, _names=names: (_names.append(self.name), _f(self, *a))[1]
            monkeypatch.setattr(type(backend), name, spy)
    arguments = inputs(9)
    compiled = compiled_whole(loss)
    for name in ("naive", "chunked", "naive"):
        with flashlla.set_backend(name):
            torch.autograd.grad(compiled(*arguments), arguments)
    # In the backward pass, too, that of CPU tensors being on this thread: nothing is kept from when it was traced.
    assert ran["forward"] == ran["backward"] == ["naive", "chunked", "naive"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("op", "tensors", "words"),
    [
        (flashlla.lla_attention, {"ridge_lambda": torch.zeros(())}, "ridge_lambda: got 0"),
        (flashlla.lla_attention, {"seqlens_k": torch.tensor([34, 1])}, "seqlens_k: got 34"),
        (flashlla.lla_attention_varlen, {"cu_seqlens": torch.tensor([0, 9, 8])}, "cu_seqlens: got 9 and then 8"),
        (flashlla.lla_decode, {"seqlens_k": torch.tensor([1, -1])}, "seqlens_k: got -1"),
        (
            flashlla.lla_decode,
            {"seqlens_k": torch.tensor([1, 1]), "block_table": torch.tensor([[2], [0]])},
            "block_table: got page 2",
        ),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_compiled_calls_check_numbers(op, tensors, words):
    torch._dynamo.reset()
    more = {"max_seqlen": 33} if op is flashlla.lla_attention_varlen else {}
    call = lambda q, k, v, tensors: op(q, k, v, **tensors, **more)
    cache = torch.randn(2, 2, 32, 8)
    given = [t[0] for t in (cache, cache, cache)] if more else [cache[:, :, :16], cache, cache]
    with pytest.raises(ValueError, match=words):
        torch.compile(call, fullgraph=True, backend="aot_eager")(*given, tensors)


def test_compile_with_numbers_info_and_a_registered_solver():
    torch._dynamo.reset()
    flashlla.register_solver("tight", TIGHT)

    def call(q, k, v, number):
        return flashlla.lla_attention(
            q, k, v, ridge_lambda=number, qk_scale=number / 4, solver="tight", return_info=True
        )

    compiled = compiled_whole(call)
    q, k, v, _ = inputs(9)
    for number in (0.5, 1.5, 2.5):
        (a, told), (b, expected) = compiled(q, k, v, number), call(q, k, v, number)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert torch.equal(told.iterations, expected.iterations)
        assert told.backend == expected.backend


def test_a_solver_of_ones_own_is_compiled_by_name():
    @dataclasses.dataclass(frozen=True)
    class Mine(flashlla.Solver):
        def solve(self, systems, b):
            return TIGHT.solve(systems, b)

    q, k, v, _ = inputs(9)
    flashlla.register_solver("mine", Mine())
    for solver in ("mine", Mine()):
        torch._dynamo.reset()
        compiled = compiled_whole(lambda q, k, v, solver=solver: flashlla.lla_attention(q, k, v, solver=solver))
        if solver == "mine":
            assert torch.equal(compiled(q, k, v), flashlla.lla_attention(q, k, v, solver=Mine()))
        else:
            with pytest.raises(Exception, match="register_solver"):
                compiled(q, k, v)


@pytest.mark.parametrize("solver", [flashlla.PCG(max_iters=40, preconditioner=Gram()), flashlla.Direct()])
def test_a_solver_of_the_package_is_compiled_as_an_object(solver):
    q, k, v, _ = inputs(9)
    call = lambda q, k, v: flashlla.lla_attention(q, k, v, solver=solver)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), call(q, k, v))


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_layouts_are_those_of_the_fakes(backend):
    """A projection's layout, (B, S, H, D) seen as (B, H, S, D), where B = 1 makes more of it a view."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 9, 3, 4, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3))
    ridge = torch.ones(1, 3, 9)
    opcheck_both_directions(q, k, v, ridge, backend)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", ["ridge_lambda", "qk_scale", "delta_eps", "cg_rtol", "tolerance"])
def test_a_number_that_varies_is_not_kept(name, dynamic):
    """It also multiplies a tensor, so that torch.compile has it as a symbol."""
    torch._dynamo.reset()
    q, k, v = (t.detach() for t in inputs(17)[:3])

    def call(q, k, v, number):
        options = {"cg_max_iters": 99, **({} if name == "tolerance" else {"cg_rtol": 1e-24}), name: number / 8}
        return flashlla.lla_attention(q * number, k, v, **options)

    frames = torch._dynamo.testing.CompileCounterWithBackend("inductor" if HAS_COMPILER else "aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=frames)
    for number in (0.5, 1.0, 2.0, 3.0, 0.25):
        torch.testing.assert_close(compiled(q, k, v, number), call(q, k, v, number), rtol=1e-12, atol=1e-12)
    if name == "ridge_lambda":
        assert frames.frame_count <= 2  # one more where it becomes a symbol


# An operator whose derivative calls another, which takes a factor from the second "release" on; compiled.
RELEASE = """
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from flashlla.library import Operator


class X(NamedTuple):
    x: Tensor


class OfFirst(NamedTuple):
    grad: Tensor


class OfSecond(NamedTuple):
    grad: Tensor
    factor: float


kind, rest = (OfFirst, ()) if sys.argv[1] == "1" else (OfSecond, (5.0,))
rules = {"fake": lambda row: X(torch.empty_like(row[0])), "batch": None}
backward = Operator("probe_backward", kind, X, run=lambda row: X(row.grad * (row[1:] or [3.0])[0]), **rules)
forward = Operator("probe", X, X, run=lambda row: X(row.x * 3), calls=(backward,), **rules)
forward.differentiate(lambda ctx, grad: (backward(kind(grad, *rest)).x,), of=1, forward_mode=None)
x = torch.ones(4, requires_grad=True)
torch.compile(lambda x: forward.differentiable(X(x)).x.sum())(x).backward()
print(x.grad[0].item(), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.skipif(not HAS_COMPILER, reason="only torch.compile's default backend keeps graphs on disk")
def test_a_graph_compiled_for_another_release_is_not_taken_from_disk(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def run(release):
        command = [sys.executable, "-c", RELEASE, release]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert run("1") == ["3.0", "0"]
    assert run("2") == ["5.0", "0"]
    assert run("2") == ["5.0", "1"]


CALLS_TO_RECORD = {
    "plain": lambda q, k, v: flashlla.lla_attention(q, k, v, ridge_lambda=1.0),
    "bshd": lambda q, k, v: flashlla.lla_attention(*(t.transpose(1, 2) for t in (q, k, v)), layout="bshd"),
    "lengths": lambda q, k, v: flashlla.lla_attention(q, k, v, seqlens_k=torch.tensor([20, 33], dtype=torch.int32)),
    "report": lambda q, k, v: flashlla.lla_attention(q, k, v, return_info=True)[1].omega,
    "packed": lambda q, k, v: flashlla.lla_attention_varlen(
        q[:1], k[:1], v[:1], cu_seqlens=torch.tensor([0, 9, 33], dtype=torch.int32), max_seqlen=24
    ),
    "decode": lambda q, k, v: flashlla.lla_decode(q.detach()[:, :, -2:], k.detach(), v.detach(), torch.tensor([33, 9])),
    "published": lambda q, k, v: flashlla.LLAFunction.apply(q[:, 0], k[:, 0], v[:, 0], 1.0)[1],
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", CALLS_TO_RECORD)
def test_nothing_that_is_recorded_is_a_constant(name, grad):
    """By torch.jit.trace: on other numbers what the call gives there, and its gradients."""
    call = CALLS_TO_RECORD[name]
    q, k, v = (t.requires_grad_(grad) for t in torch.randn(3, 2, 3, 33, 8, dtype=torch.float64).unbind(0))
    for _ in range(2):  # as a call that is like one before, too
        call(q, k, v)
    recorded = torch.jit.trace(call, (q, k, v), check_trace=False)
    others = [torch.randn_like(t, requires_grad=grad) for t in (q, k, v)]
    found, wanted = recorded(*others), call(*others)
    assert torch.equal(found, wanted)
    if wanted.requires_grad and name != "published":
        grad_o = torch.randn_like(wanted)
        for mine, its in zip(*(torch.autograd.grad(o, others, grad_o) for o in (found, wanted)), strict=True):
            assert torch.equal(mine, its)
