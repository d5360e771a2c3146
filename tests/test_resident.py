"""The resident solve: where it runs, in words where not, and on a GPU that it gives what the plain one gives."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashlla import CG, lla_attention, lla_attention_varlen
from flashlla.backends.triton import configs
from flashlla.problem import Mask, Problem
from tests.support.kernels import NAMES, interpreted, make, step
from tests.support.poison import poisoned

triton = pytest.importorskip("triton")
hopper_kernels = pytest.importorskip("flashlla.backends.triton.hopper")
resident = pytest.importorskip("flashlla.backends.triton.resident")
Share = resident.Share

PLAIN = Problem(2, 6, 6, 512, 512, 64, 64, torch.bfloat16, torch.device("cuda"), 0.3, 1e-12, CG())
SOME = configs.RESIDENT[64][-1].tiles  # tiles of keys


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper_kernels, "without_gluon", lambda: None)


@pytest.mark.quick
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"dtype": torch.float16, "q_len": 1, "k_len": 1}, None),
        ({"q_len": 8000, "k_len": 8000}, None),  # of the first queries
        ({"dtype": torch.float32}, "its operands are of 16 bits"),
        ({"head_dim": 80}, "it takes head dims of .*, and this one is 80"),
        ({"q_len": 100, "k_len": 5000}, f"see at most {64 * SOME} keys"),
        ({"mask": Mask(causal=False)}, None),
        ({"kv_heads": 2}, None),
        (
            {"batch": 1, "max_seqlen_q": 900, "max_seqlen_k": 900, "mask": Mask(packed=True)},
            f"see at most {64 * SOME} keys",
        ),
    ],
)  # fmt: skip
def test_it_says_why_it_does_not_run(changes: dict[str, Any], words: str | None) -> None:
    found = resident.unsupported(dataclasses.replace(PLAIN, **changes))
    if words is None:
        assert found is None
    else:
        assert re.search(words, found or "it runs")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, Share(8, 8)),
        ({"q_len": 1, "k_len": 1}, Share(1, 1)),
        ({"q_len": 65, "k_len": 65}, Share(2, 2)),
        ({"q_len": 4096, "k_len": 4096}, Share(SOME, SOME)),
        ({"q_len": 4096, "k_len": 4096, "mask": Mask(window=64)}, Share(64, 2)),
        ({"q_len": 4096, "k_len": 4096, "mask": Mask(window=65)}, Share(64, 2)),
        ({"q_len": 4096, "k_len": 4096, "mask": Mask(window=66)}, Share(64, 3)),
        ({"q_len": 64, "k_len": 64 * SOME}, Share(1, SOME)),
        ({"q_len": 65, "k_len": 64 * SOME + 1}, Share(1, SOME)),
        ({"q_len": 100, "k_len": 70, "mask": Mask(causal=False)}, Share(2, 2)),
        ({"q_len": 500, "k_len": 600, "mask": Mask(at_lengths=True, padded=True)}, None),
        ({"batch": 1, "max_seqlen_q": 100, "max_seqlen_k": 512, "mask": Mask(packed=True)}, Share(2, 8)),
        ({"batch": 1, "max_seqlen_q": 900, "max_seqlen_k": 900, "mask": Mask(packed=True)}, None),
        ({"batch": 1, "max_seqlen_q": 900, "max_seqlen_k": 900, "mask": Mask(packed=True, window=100)}, Share(15, 3)),
    ],
)  # fmt: skip
def test_share(changes: dict[str, Any], share: Share | None) -> None:
    assert resident.solves(dataclasses.replace(PLAIN, **changes)) == share


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, Share(8, 8)),
        ({"q_len": 4096, "k_len": 4096}, Share(8, 8)),
        ({"q_len": 4096, "k_len": 4096, "mask": Mask(window=449)}, Share(64, 8)),
        ({"q_len": 4096, "k_len": 4096, "mask": Mask(window=512)}, None),  # those after them are solved as they are
        ({"batch": 1, "max_seqlen_q": 100, "max_seqlen_k": 512, "mask": Mask(packed=True)}, Share(2, 8)),
        ({"v_dim": 128}, None),
        ({"head_dim": 128, "v_dim": 128}, None),
    ],
)  # fmt: skip
def test_share_of_the_whole_forward_pass(changes: dict[str, Any], share: Share | None) -> None:
    assert resident.attends(dataclasses.replace(PLAIN, **changes)) == share


@pytest.mark.quick
def test_plans_are_in_order_and_have_room() -> None:
    """Of the keys that stream, one is used while one comes and the last product may still read a third."""
    for plans in configs.RESIDENT.values():
        assert [plan.tiles for plan in plans] == sorted({plan.tiles for plan in plans})
        for plan in plans:
            assert plan.slots == plan.tiles or (plan.slots >= 3 and not plan.ahead)
    assert len(configs.resident_options(64, 2)["PLANS"]) == 1
    assert configs.resident_options(64, 3)["PLANS"][-1].tiles >= 3
    assert configs.resident_options(64, SOME)["PLANS"] == configs.RESIDENT[64]


# What a GPU runs: lengths, dim, ridge, options.
CASES: dict[str, tuple[int, int, float, dict[str, Any]]] = {
    "1": (1, 64, 1.0, {}),
    "63": (63, 64, 1.0, {}),
    "65": (65, 64, 0.1, {}),
    "512": (512, 64, 1.0, {}),
    "300 of 128": (300, 128, 1.0, {}),
    "512 of 128": (512, 128, 1.0, {}),
    "in two launches": (1000, 64, 1.0, {}),
    "with gram": (1500, 64, 1.0, {}),
    "loose": (512, 64, 1.0, {"tolerance": 0.1}),
    "window 1": (300, 64, 1.0, {"window": 1}),
    "window 100": (1000, 64, 1.0, {"window": 100}),
    "window 512": (1500, 64, 1.0, {"window": 512}),
    "window 100 of 128": (700, 128, 1.0, {"window": 100}),
    "packed": (990, 64, 1.0, {"cu_seqlens": [0, 300, 300, 301, 700, 980], "max_seqlen": 400}),
}


def called(case: str) -> tuple[list[Tensor], dict[str, Any], Callable[..., Tensor]]:
    """Tensors, options and operator."""
    length, dim, _, options = CASES[case]
    tensors = make((1 if "cu_seqlens" in options else 2, 2, length, dim), torch.bfloat16, device="cuda")
    if "cu_seqlens" not in options:
        return tensors, options, lla_attention
    cu_seqlens = torch.tensor(options["cu_seqlens"], dtype=torch.int32, device="cuda")
    return tensors, {**options, "cu_seqlens": cu_seqlens}, lla_attention_varlen


def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Fills with whether each forward pass and each solve that follows had a resident kernel."""
    from flashlla.backends.triton import launch, plan

    found: list[bool] = []
    share, solve = launch.resident_share, launch.solve_resident
    monkeypatch.setattr(launch, "resident_share", lambda *a: (found.append((n := share(*a)) is not None), n)[1])
    monkeypatch.setattr(launch, "solve_resident", lambda *a: (found.append((n := solve(*a)) > 0), n)[1])
    plan.forget()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_it_gives_what_the_plain_solve_gives(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """As near to float64, by as many iterations."""
    tensors, options, operator = called(case)
    if resident.unsupported(dataclasses.replace(PLAIN, device=tensors[0].device)) is not None:
        pytest.skip("not on this GPU")
    ridge = CASES[case][2]
    exact = {name: x for name, x in options.items() if name != "tolerance"}
    solver = CG(atol=0.0, rtol=1e-24, max_iters=4000)
    want = step([t.double() for t in tensors], ridge, operator, backend="chunked", solver=solver, **exact)
    errors, iterations, used = {}, {}, ran(monkeypatch)
    for switch in "10":
        monkeypatch.setenv("FLASHLLA_HOPPER", switch)
        used.clear()
        with poisoned():
            got = step(tensors, ridge, operator, backend="triton", **options)
        assert sum(used) == 2 * (switch == "1")
        floor = {name: max(want[name].norm().item(), 1e-2 * want[name].numel() ** 0.5) for name in NAMES}
        errors[switch] = {name: (got[name].double() - want[name]).norm().item() / floor[name] for name in NAMES}
        info = operator(*tensors[:3], ridge_lambda=ridge, backend="triton", return_info=True, **options)[1]
        iterations[switch] = info.iterations.float().mean().item()
    for name in NAMES:
        assert errors["1"][name] <= 1.25 * errors["0"][name] + 3e-4, (name, errors)
    assert abs(iterations["1"] - iterations["0"]) < 1.0, iterations


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["q", "k", "v", "ridge"])
def test_nan_stays_where_it_belongs(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    tensors, _, _ = called("512")
    ridge = torch.ones(512, device="cuda")
    at = ridge if where == "ridge" else tensors["qkv".index(where)][0, 0, :, 3]
    at[150] = float("nan")
    got = {}
    for switch in "10":
        monkeypatch.setenv("FLASHLLA_HOPPER", switch)
        got[switch] = step(tensors, ridge[None], backend="triton")
    for name in NAMES:
        assert torch.equal(got["1"][name].isnan(), got["0"][name].isnan()), name


@interpreted
def test_the_plain_solve_has_the_queries_that_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another launch has the first ones."""
    from flashlla.backends.triton import launch, plan

    tensors = make((1, 2, 200, 16), torch.bfloat16)
    whole = step(tensors, 1.0, backend="triton", solver="cg")
    done, launch_tiles = 128, launch.Call.launch_tiles

    def first(
        call: Any, lse2: Any, k_mean: Any, ridge: Any, b: Any, made: Any, x: Any, adjoint: Any, *rest: Any
    ) -> int:
        solve, settings = launch.solve_kernel, {"PRECONDITIONER": "none", "SEGMENT": configs.SEGMENT}
        operands = call.q, call.k, call.units, call.origin, lse2, k_mean, ridge, b, made, x, adjoint, *rest
        launch_tiles(call, solve, "solve", *operands, ADJOINT=adjoint is not None, **settings)
        call.plan.compute(lambda t: t[:, :, done:].fill_(float("nan")), x)
        return done

    monkeypatch.setattr(launch, "solve_resident", first)
    plan.forget()
    parted = step(tensors, 1.0, backend="triton", solver="cg")
    plan.forget()
    for name in NAMES:
        assert torch.equal(parted[name], whole[name]), name
