"""Kernels in Gluon: where they run, in words where not, and on a GPU that they give what the plain ones give."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlla import CG, PCG, lla_attention, lla_attention_varlen
from flashlla.backends.triton import configs
from flashlla.problem import Problem
from tests.support.kernels import NAMES, make, step
from tests.support.poison import poisoned

triton = pytest.importorskip("triton")
hopper = pytest.importorskip("flashlla.backends.triton.hopper")

CUDA = torch.device("cuda")
PLAIN = Problem(2, 6, 6, 512, 512, 128, 128, torch.bfloat16, CUDA, 0.3, 1e-12, CG())


def reason(device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16) -> str:
    return hopper.unsupported(device, dtype) or "it runs"


@pytest.mark.quick
def test_it_says_which_devices_dtypes_and_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(torch.device("cpu")) == "Gluon has no interpreter"
    for capability in ((8, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(configs, "capability", lambda device, found=capability: found)
        assert re.search(r"Hopper.*cuda has {}\.{}".format(*capability), reason())
    monkeypatch.setattr(configs, "capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    hopper.without_gluon.cache_clear()
    try:
        assert re.search(r"Triton 3\.6 and 3\.7, and this is 3\.5\.1", reason())
    finally:
        hopper.without_gluon.cache_clear()
    monkeypatch.setattr(hopper, "without_gluon", lambda: None)
    assert reason() == "it runs"
    assert "its operands are of 16 bits" in reason(dtype=torch.float32)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "without_gluon", lambda: None)


@pytest.mark.quick
@pytest.mark.usefixtures("on_hopper")
def test_what_has_a_config() -> None:
    for head_dim, table in configs.HOPPER.items():
        problem = dataclasses.replace(PLAIN, head_dim=head_dim, v_dim=head_dim)
        assert set(table) <= set(hopper.MODULES)
        assert {name: hopper.config(name, problem) for name in table} == table
        assert hopper.config("dk", dataclasses.replace(problem, v_dim=head_dim // 2)) is None
        assert hopper.config("dk", dataclasses.replace(problem, dtype=torch.float32)) is None
    assert hopper.config("solve_gram", PLAIN) is None
    assert hopper.config("dk", dataclasses.replace(PLAIN, head_dim=80, v_dim=80)) is None


@pytest.mark.quick
def test_tiles_are_those_that_the_kernels_take() -> None:
    """A warp has 16 rows of a product; of a ring, a tile is used, one is read by the last product of the tile before
    (but in dk), and one comes; dk reads what dq writes of whole tiles of queries."""
    for head_dim, table in configs.HOPPER.items():
        for name, c in table.items():
            assert (c.n if name == "dk" else c.m) == 16 * c.warps
            assert c.slots >= (2 if name == "dk" else 3)
        key = head_dim, torch.float16, (9, 0)
        for dq in (configs.config("dq", *key).m, *(c.m for name, c in table.items() if name == "dq")):
            assert dq % table["dk"].m == 0


def launched(monkeypatch: pytest.MonkeyPatch, problem: Problem, preconditioner: str = "none") -> dict[str, str]:
    """The kernel of each pass of a step."""
    from flashlla.backends.triton import launch, plan
    from flashlla.problem import Inputs, Residuals

    found: dict[str, str] = {}

    def run(self: Any, call: Any) -> None:
        if self.name in hopper.MODULES:
            found[self.name] = self.kernel.__name__

    monkeypatch.setattr(plan.Launch, "run", run)
    monkeypatch.setattr(plan.Launch, "compile", lambda self: None)
    meta = lambda *shape, dtype=problem.dtype: torch.empty(shape, dtype=dtype, device="meta")
    q = meta(problem.batch, problem.q_heads, problem.q_len, problem.head_dim)
    rows, vectors = meta(*q.shape[:3], dtype=torch.float32), meta(*q.shape, dtype=torch.float32)
    plan.forget()
    inputs = Inputs(q, q, q, rows)
    problem = dataclasses.replace(problem, device=q.device)
    monkeypatch.setattr(hopper, "unsupported", lambda device, dtype: None)
    launch.forward(problem, inputs, preconditioner)
    launch.backward(problem, inputs, Residuals(rows, rows, vectors, vectors), q, preconditioner)
    plan.forget()
    return found


@pytest.mark.quick
@pytest.mark.usefixtures("on_hopper")
def test_which_kernels_a_step_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    if hopper.without_gluon() is not None:
        pytest.skip("of another Triton")
    in_gluon = {name: f"{name}_hopper_kernel" for name in configs.HOPPER[PLAIN.head_dim]}
    plain = {name: f"{name}_kernel" for name in hopper.MODULES if name != "forward"}
    monkeypatch.setenv("FLASHLLA_HOPPER", "0")
    assert launched(monkeypatch, PLAIN) == plain
    monkeypatch.delenv("FLASHLLA_HOPPER")
    assert launched(monkeypatch, PLAIN) == {**plain, **in_gluon}
    narrow = dataclasses.replace(PLAIN, head_dim=64, v_dim=64)
    of_narrow = {name: f"{name}_hopper_kernel" for name in configs.HOPPER[64]}
    assert launched(monkeypatch, narrow) == {**plain, **of_narrow}
    # With a first guess or a preconditioner statistics, solve and output are apart.
    del of_narrow["forward"], in_gluon["forward"]
    assert launched(monkeypatch, dataclasses.replace(narrow, q_len=2048, k_len=2048)) == {**plain, **of_narrow}
    jacobi = {**plain, **in_gluon, "solve": "solve_kernel"}
    assert launched(monkeypatch, dataclasses.replace(PLAIN, solver=PCG()), "jacobi") == jacobi


# What a GPU runs: heads of q and k, lengths of q and k, ridge, options.
CASES: dict[str, tuple[int, int, int, int, float, dict[str, Any]]] = {
    "1": (2, 2, 1, 1, 1.0, {}),
    "63": (2, 2, 63, 63, 1.0, {}),
    # Of few keys and a weak ridge a single row may have most of dlambda's error: many heads, or luck decides.
    "65": (32, 32, 65, 65, 0.1, {}),
    "1000": (2, 2, 1000, 1000, 1.0, {}),
    "with a first guess": (1, 1, 1500, 1500, 10.0, {}),
    "with gram": (1, 1, 1500, 1500, 1.0, {"solver": "pcg_gram"}),
    "loose": (2, 2, 300, 300, 1.0, {"tolerance": 0.1}),
    "grouped": (6, 2, 300, 300, 1.0, {}),
    "more keys": (2, 2, 100, 400, 1.0, {}),
    "more queries": (2, 2, 400, 100, 1.0, {}),
    "not causal": (2, 2, 200, 333, 1.0, {"causal": False}),
    "negative scale": (2, 2, 300, 300, 1.0, {"qk_scale": -0.1}),
    "window 1": (2, 2, 300, 300, 1.0, {"window": 1}),
    "window 100": (2, 2, 1000, 1000, 1.0, {"window": 100}),
    "lengths": (2, 2, 400, 400, 1.0, {"seqlens_k": [300, 0], "seqstarts_k": [33, 0]}),
    "packed unequal": (
        4,
        2,
        990,
        990,
        1.0,
        {"cu_seqlens": [0, 20, 40, 45, 45, 445, 450, 470, 490, 520], "max_seqlen": 400},
    ),
    "packed": (4, 2, 990, 990, 1.0, {"cu_seqlens": [0, 300, 300, 301, 700, 980], "max_seqlen": 400}),
}


def called(case: str, dim: int, dtype: torch.dtype) -> tuple[list[Tensor], Callable[..., Tensor], dict[str, Any]]:
    """q, k, v and grad_o, the operator, its options."""
    q_heads, k_heads, q_len, k_len, _, options = CASES[case]
    batch = 1 if "cu_seqlens" in options else 2
    q, _, _, grad = make((batch, q_heads, q_len, dim), dtype, device="cuda")
    _, k, v, _ = make((batch, k_heads, k_len, dim), dtype, device="cuda")
    lists = {name: torch.tensor(x, dtype=torch.int32, device="cuda") for name, x in options.items() if type(x) is list}
    operator = lla_attention_varlen if "cu_seqlens" in options else lla_attention
    return [q, k, v, grad], operator, {**options, **lists}


@pytest.mark.quick
@pytest.mark.parametrize("switch", "10")
def test_decoding_has_a_kernel_of_its_own_unless_told_not_to(monkeypatch: pytest.MonkeyPatch, switch: str) -> None:
    if (without := hopper.without_gluon()) is not None:
        pytest.skip(without)
    from benchmarks.launches import recorded
    from flashlla.backends.triton.decode import decode
    from flashlla.problem import Inputs, Mask

    monkeypatch.setattr(configs, "capability", lambda device: (9, 0))
    monkeypatch.setenv("FLASHLLA_HOPPER", switch)
    meta = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
    q, cache, lengths = meta(2, 6, 1, 128), meta(2, 6, 512, 128), meta(2, dtype=torch.int32)
    mask = Mask(padded=True, at_lengths=True)
    problem = dataclasses.replace(PLAIN, q_len=1, mask=mask, device=q.device, solver_demanded=False)
    with recorded(carried_out=False) as found:
        decode(problem, Inputs(q, cache, cache, meta(2, 6, 1, dtype=torch.float32), lengths), q)
    kernel = "decode_moments_hopper_kernel" if switch == "1" else "decode_moments_kernel"
    assert [launch.kernel.__name__ for launch in found] == [kernel, "decode_solve_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", configs.HOPPER)
@pytest.mark.parametrize("case", CASES)
def test_they_give_what_the_plain_kernels_give(
    monkeypatch: pytest.MonkeyPatch, case: str, dim: int, dtype: torch.dtype
) -> None:
    """As near to float64, by as many iterations, and bit for bit the same call after call."""
    tensors, operator, options = called(case, dim, dtype)
    if hopper.unsupported(tensors[0].device, dtype) is not None:
        pytest.skip("not on this GPU")
    ridge = CASES[case][4]
    exact = {name: x for name, x in options.items() if name not in ("tolerance", "solver")}
    solver = CG(atol=0.0, rtol=1e-24, max_iters=4000)
    want = step([t.double() for t in tensors], ridge, operator, backend="chunked", solver=solver, **exact)
    floor = {name: max(want[name].norm().item(), 1e-2 * want[name].numel() ** 0.5) for name in NAMES}
    errors, iterations = {}, {}
    for switch in "10":
        monkeypatch.setenv("FLASHLLA_HOPPER", switch)
        with poisoned():
            got = step(tensors, ridge, operator, backend="triton", **options)
            again = step(tensors, ridge, operator, backend="triton", **options)
        assert all(torch.equal(got[name], again[name]) for name in NAMES)
        errors[switch] = {name: (got[name].double() - want[name]).norm().item() / floor[name] for name in NAMES}
        info = operator(*tensors[:3], ridge_lambda=ridge, backend="triton", return_info=True, **options)[1]
        iterations[switch] = info.iterations.float().mean().item()
    for name in NAMES:
        assert errors["1"][name] <= 1.1 * errors["0"][name] + 3e-4, (name, errors)
    assert abs(iterations["1"] - iterations["0"]) < 0.3, iterations


@pytest.mark.gpu
@pytest.mark.parametrize("dim", configs.HOPPER)
@pytest.mark.parametrize("where", [0, 1, 2], ids="qkv")
def test_nan_stays_where_it_belongs(monkeypatch: pytest.MonkeyPatch, where: int, dim: int) -> None:
    tensors, operator, options = called("grouped", dim, torch.bfloat16)
    tensors[where][0, 0, 150, 3] = float("nan")
    got = {}
    for switch in "10":
        monkeypatch.setenv("FLASHLLA_HOPPER", switch)
        got[switch] = step(tensors, 1.0, operator, backend="triton", **options)
    for name in NAMES:
        assert torch.equal(got["1"][name].isnan(), got["0"][name].isnan()), name


@pytest.mark.gpu
@pytest.mark.parametrize("dim", configs.HOPPER)
def test_keys_far_from_the_origin(monkeypatch: pytest.MonkeyPatch, dim: int) -> None:
    """k_mean is in float16 meanwhile: its error is of second order."""
    tensors = make((2, 2, 500, dim), torch.bfloat16, offset=30.0, device="cuda")
    want = step([t.double() for t in tensors], 1.0, backend="chunked", solver=CG(atol=0.0, rtol=1e-24, max_iters=4000))
    errors = {}
    for switch in "10":
        monkeypatch.setenv("FLASHLLA_HOPPER", switch)
        got = step(tensors, 1.0, backend="triton")
        errors[switch] = {name: ((got[name].double() - want[name]).norm() / want[name].norm()).item() for name in NAMES}
    for name in NAMES:
        assert errors["1"][name] <= 1.25 * errors["0"][name] + 3e-4, (name, errors)
