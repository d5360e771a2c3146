"""Moments of a share of a cache, and the solve once those of all shares are merged: by the kernels of decoding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlla import products
from flashlla.backends.triton import configs, records
from flashlla.backends.triton.configs import padded
from flashlla.backends.triton.decode import share
from flashlla.backends.triton.decode_solve import decode_solve_kernel
from flashlla.backends.triton.plan import Layout, Plan, layouts, planned
from flashlla.problem import Inputs, Moments, Problem
from flashlla.records import Row


class Given(NamedTuple):
    """Moments as those of one piece whose origin is its mean; every query is a sequence by itself."""

    moments: Tensor  # (systems, BLOCK_D + BLOCK_V, BLOCK_D)
    sums: Tensor  # (systems, BLOCK_D + BLOCK_V)
    scalars: Tensor  # (systems, SCALARS)
    offset: Tensor  # (systems, BLOCK_D)
    stop: Tensor  # (systems,) int32   1 where there are keys, else 0
    ridge: Tensor  # (systems, 1, 1)
    out: Tensor  # (systems, 1, 1, Dv)


_GIVEN: Any = Row(Given)


def moments(problem: Problem, inputs: Inputs) -> Moments:
    """Of one new query a sequence and the keys in use."""
    found = share(problem, inputs)
    d, v, block_d, block_v = _widths(problem)
    of_rows = lambda t: t
    if (d, v) != (block_d, block_v):
        of_rows = lambda t: torch.cat([t[:, :d], t[:, block_d : block_d + v]], 1)
    of_queries = lambda t: t.unflatten(0, inputs.q.shape[:2])
    scalars = of_queries(found.scalars)
    return Moments(
        m=scalars[..., 0],
        omega=scalars[..., 1],
        mean=of_queries(of_rows(found.sums)),
        second=of_queries(of_rows(found.moments)[..., :d]),
    )


def solved(problem: Problem, found: Moments, ridge_lambda: Tensor) -> Tensor:
    """o (..., Dv) of queries (...), each with its own moments and ridge."""
    d, v, block_d, block_v = _widths(problem)
    wide = (d, v) != (block_d, block_v)
    of_rows = lambda t: _filled(t, d, block_d, block_v) if wide else t
    omega = found.omega.reshape(-1)  # (systems,)
    second = found.second.flatten(0, -3)
    second = of_rows(torch.nn.functional.pad(second, (0, block_d - d)) if wide else second)
    mean = of_rows(found.mean.flatten(0, -2))
    one = torch.ones_like(omega)
    out = second.new_empty((len(omega), 1, 1, v), dtype=problem.dtype)
    given = _GIVEN.flat(
        Given(
            moments=second * omega[:, None, None],
            sums=torch.cat([torch.zeros_like(mean[:, :block_d]), mean[:, block_d:] * omega[:, None]], 1),
            scalars=torch.stack([found.m.reshape(-1), omega, one, one], 1),
            offset=mean[:, :block_d].contiguous(),
            stop=(omega > 0).int(),
            ridge=ridge_lambda.reshape(-1, 1, 1),
            out=out,
        )
    )
    full = products.allowed(problem.device) == "ieee"
    _plan(problem, full, layouts(given)).run(given)
    return out.view(*found.omega.shape, v)


def _widths(problem: Problem) -> tuple[int, int, int, int]:
    """D and Dv, and how wide they are in tiles."""
    return problem.head_dim, problem.v_dim, padded(problem.head_dim), padded(problem.v_dim)


def _filled(t: Tensor, d: int, block_d: int, block_v: int) -> Tensor:
    """Rows of keys and of values, (systems, D + Dv, ...), with zeros up to the widths of tiles."""
    out = t.new_zeros((len(t), block_d + block_v, *t.shape[2:]))
    out[:, :d], out[:, block_d : block_d + t.shape[1] - d] = t[:, :d], t[:, d:]
    return out


@planned
def _plan(problem: Problem, full: bool, given_layouts: tuple[Layout | None, ...]) -> Plan:
    plan = Plan(problem.device, given_layouts)
    given = _GIVEN.record(plan.given)
    _, _, d, v = _widths(problem)
    half = problem.dtype != torch.float32
    config = configs.decode_config(d, v, half, full, configs.large(configs.capability(problem.device)))
    systems = given.out.shape[0]
    half_solved = plan.scratch(plan.memory(), (systems, d), torch.float32)
    parts = records.Moments(given.moments, given.sums, given.scalars, given.offset, arrivals=given.stop)
    shape = records.Shape(
        HEAD_DIM=problem.head_dim, V_DIM=problem.v_dim, BLOCK_D=d, BLOCK_V=v, CAUSAL=True, TF32=not (half or full)
    )
    rows = configs.decode_solve_rows(d, v)
    warps = configs.factor_warps(config.solve_warps, rows)
    one = 1, 1, 1, 1, 1  # key heads, their query heads, new tokens, keys, window
    plan.launch(
        decode_solve_kernel, "decode", (systems,), parts, parts, records.Caches(given.stop, 1, None, 0),
        records.Strided(given.ridge, *given.ridge.steps()), half_solved,
        records.Columns(given.out, *given.out.steps()), None, 0, *one, 1, problem.delta_eps,
        SHAPE=shape, MERGED=False, SLICES=1, SLICE=configs.decode_rows(d, v, 1), PIECES=1, BLOCK_T=config.tile,
        BLOCK_M=configs.merge_rows(1), TOLERANCE=configs.DECODE_TOLERANCE,
        ITERATIONS=0 if problem.solver_demanded else configs.decode_iterations(d, half), BLOCK_R=rows, WARPS=warps,
        num_warps=warps, num_stages=configs.SOLVE_STAGES,
    )  # fmt: skip
    return plan.finished(())
