"""Decoding: from layouts to the launches of decode_kernels.py and decode_solve.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashlla import products
from flashlla.backends.triton import configs, hopper
from flashlla.backends.triton.configs import DecodeConfig
from flashlla.backends.triton.decode_kernels import SCALARS, decode_moments_kernel
from flashlla.backends.triton.decode_share import decode_share_kernel
from flashlla.backends.triton.decode_solve import decode_solve_kernel
from flashlla.backends.triton.plan import Buffer, Layout, Plan, contiguous, layouts, planned
from flashlla.backends.triton.records import BlockTable, Caches, Columns, Moments, Shape, Strided
from flashlla.backends.triton.runtime import cdiv
from flashlla.problem import Inputs, Problem, Report
from flashlla.records import Row

# How many ridges the square of a mean may be away from its origin. float32 sums lose the digits of the larger one: of a
# C that lies below it, and of a Cov(v, k), 1e-7 times this; products of tensor cores, which cut off, a few times that.
FAR, FAR_FULL = 4096.0, 128.0


class Given(NamedTuple):
    """Tensors that decoding reads and writes."""

    inputs: Inputs
    out: Tensor
    report: Report


class Share(NamedTuple):
    """The first tensors of `records.Moments`, as `decode_share_kernel` makes them."""

    moments: Tensor  # (systems, BLOCK_D + BLOCK_V, BLOCK_D)
    sums: Tensor  # (systems, BLOCK_D + BLOCK_V)
    scalars: Tensor  # (systems, SCALARS)


_GIVEN: Any = Row(Given)
_NO_REPORT = Row(Report).filled(None)


def decode(
    problem: Problem, inputs: Inputs, out: Tensor, report: Report | None = None, config: DecodeConfig | None = None
) -> Tensor:  # fmt: skip
    """Local linear attention of the N newest tokens of each sequence with all cached keys, into ``out`` (B, Hq, N, Dv),
    and how each was solved, into ``report``.

    Query n sees the keys from seqstarts_k up to seqlens_k - N + n, with a window only the latest of them; if none, its
    output is 0. What else the cache holds does not matter. Key j of sequence b lies in page block_table[b, j // page
    size], the page size being a multiple of 16; lengths and pages out of range are taken for the nearest that exists:
    garbage stays in its own sequence. Grids depend on shapes alone, so a CUDA graph of the call stays right while
    lengths, tables and contents change.
    """
    full = products.allowed(problem.device) == "ieee"
    given = _GIVEN.flat(Given(inputs, out, report or _NO_REPORT))
    _plan(problem, config, full, hopper.allowed(), True, layouts(given)).run(given)
    return out


def share(problem: Problem, inputs: Inputs, config: DecodeConfig | None = None) -> Share:
    """The moments of each system of the same call."""
    full = products.allowed(problem.device) == "ieee"
    given = _GIVEN.flat(Given(inputs, inputs.q, _NO_REPORT))  # nothing is written to q
    return Share(*_plan(problem, config, full, hopper.allowed(), False, layouts(given)).run(given))


def _streams(problem: Problem, config: DecodeConfig | None, k: Buffer, v: Buffer) -> bool:
    """Whether the kernel in Gluon (decode_hopper.py), which copies 16 bytes at a time, takes such caches."""
    sliced = config is not None and config.slices not in (None, 1)
    if sliced or hopper.unsupported(problem.device, problem.dtype) is not None:
        return False
    whole = problem.head_dim == problem.v_dim and problem.head_dim in configs.DECODE_HOPPER
    return whole and all(t.layout.aligned and not any(n % 16 for n in t.steps()[:3]) for t in (k, v))


@planned
def _plan(
    problem: Problem, config: DecodeConfig | None, full: bool, gluon: bool, solved: bool,
    given_layouts: tuple[Layout | None, ...],
) -> Plan:  # fmt: skip
    """``full``: torch lets no device round products of float32. ``gluon``: its kernels may run. ``solved``: write
    the output; else give the `Share`."""
    plan, device = Plan(problem.device, given_layouts), problem.device
    memory, given = plan.memory(), _GIVEN.record(plan.given)
    inputs, out = given.inputs, given.out
    report = None if given.report == _NO_REPORT else given.report
    q, seqlens_k = inputs.q, inputs.seqlens_k

    def dense(t: Buffer) -> Buffer:
        """Whatever the strides of rows: a cache is large, and copied only where it must be."""
        if t.stride()[-1] == 1 or t.shape[-1] == 1:
            return t
        copy = plan.scratch(memory, t.shape, t.dtype)
        plan.compute(Tensor.copy_, copy, t)
        return copy

    k, v = dense(inputs.k), dense(inputs.v)
    d, v_block = configs.padded(problem.head_dim), configs.padded(problem.v_dim)
    half, streams = problem.dtype != torch.float32, gluon and _streams(problem, config, k, v)
    large = configs.large(configs.capability(device))
    config = config or configs.decode_config(d, v_block, half, full, large)
    shape = Shape(
        HEAD_DIM=problem.head_dim, V_DIM=problem.v_dim, BLOCK_D=d, BLOCK_V=v_block, CAUSAL=True,
        TF32=not (half or full),
    )  # fmt: skip

    window = min(problem.mask.window or problem.k_len, problem.k_len)
    pairs, members = problem.batch * problem.kv_heads, problem.group * problem.q_len
    tiles = min(cdiv(problem.k_len, config.tile), cdiv(window, config.tile) + 1)
    slots = configs.processors(device) * config.programs_a_processor()
    slicings = [config.slices] if config.slices else configs.decode_slicings(d, v_block, half, large)
    slicings = [1] if streams else slicings
    pieces, slices = configs.decode_parts(pairs * members, tiles, slots, slicings, d, streams)
    pieces = config.pieces or pieces
    rows_of_slice = configs.decode_rows(d, v_block, slices)
    at_once = pairs
    if solved:
        at_once = max(1, min(pairs, configs.DECODE_SCRATCH // (members * pieces * (d + v_block) * d * 4)))
    systems = at_once * members

    make = lambda *sizes: plan.scratch(memory, (systems, *sizes), torch.float32)
    rows = d + v_block
    found = parts = Moments(
        moments=make(pieces, rows, d), sums=make(pieces, rows),
        scalars=make(pieces, slices, SCALARS.value), offset=make(pieces, d),
        arrivals=plan.scratch(memory, (systems,), torch.int32),
    )  # fmt: skip
    merging = solved and (pieces > 1 or slices > 1)
    powers = triton.next_power_of_2(pieces)
    block = configs.merge_rows(powers)
    if not solved:
        make = lambda *sizes: plan.output(contiguous((systems, *sizes), torch.float32))
    if merging or not solved:
        found = parts._replace(moments=make(rows, d), sums=make(rows), scalars=make(SCALARS.value))
    half_solved = plan.scratch(memory, (systems, d), torch.float32)
    # A solver that is asked for is the factor alone.
    iterations = configs.decode_iterations(d, half) if not problem.solver_demanded else 0
    solve_rows = configs.decode_solve_rows(d, v_block)
    solve_warps = configs.factor_warps(config.solve_warps, solve_rows)

    starts = inputs.seqstarts_k
    caches = Caches(seqlens_k, seqlens_k.steps()[0], starts, 0 if starts is None else starts.steps()[0])
    table = BlockTable(seqlens_k, 0, 0)  # which nobody reads where there are no pages
    if inputs.block_table is not None:
        table = BlockTable(inputs.block_table, *inputs.block_table.steps())
    ridge, o_out = Strided(inputs.ridge_lambda, *inputs.ridge_lambda.steps()), Columns(out, *out.steps())
    moments_kernel, page = decode_moments_kernel, problem.page_size or 0
    options = {
        "FAR": FAR if half or not full else FAR_FULL, "SLICES": slices, "OPERAND": tl.float16 if half else tl.float32,
        "SLICE": rows_of_slice, "ROWS": config.thread_rows(d, half), "num_stages": config.stages,
    }  # fmt: skip
    if streams:
        from flashlla.backends.triton.decode_hopper import decode_moments_hopper_kernel

        moments_kernel, options = decode_moments_hopper_kernel, {"FAR": FAR, "STAGES": configs.DECODE_HOPPER_STAGES}
    for first in range(0, pairs, at_once):
        programs = min(at_once, pairs - first) * members
        sight = first, problem.kv_heads, problem.group, problem.q_len, problem.k_len, window
        plan.launch(
            moments_kernel, "decode", (programs * pieces * slices,),
            Columns(q, *q.steps()), Strided(k, *k.steps()[:3]), Strided(v, *v.steps()[:3]), caches, table, ridge, parts,
            *sight, pieces, k.shape[0], problem.scale,
            SHAPE=shape, PAGE=page, BLOCK_T=config.tile, num_warps=config.warps, **options,
        )  # fmt: skip
        if not solved:
            plan.launch(
                decode_share_kernel, "decode", (programs * (rows // block),),
                Columns(q, *q.steps()), Strided(k, *k.steps()[:3]), caches, table, parts, found, *sight[1:], pieces,
                k.shape[0], problem.scale, SHAPE=shape, PAGE=page, SLICES=slices,
                SLICE=rows_of_slice, PIECES=powers, BLOCK_T=config.tile, BLOCK_M=block, num_warps=solve_warps,
                num_stages=configs.SOLVE_STAGES,
            )  # fmt: skip
            return plan.finished(found[: len(Share._fields)])
        plan.launch(
            decode_solve_kernel, "decode", (programs * (rows // block if merging else 1),),
            parts, found, caches, ridge, half_solved, o_out, report, *sight, pieces, problem.delta_eps,
            SHAPE=shape, MERGED=merging, SLICES=slices, SLICE=rows_of_slice, PIECES=powers, BLOCK_T=config.tile,
            BLOCK_M=block, TOLERANCE=configs.DECODE_TOLERANCE, ITERATIONS=iterations, BLOCK_R=solve_rows,
            WARPS=solve_warps, num_warps=solve_warps, num_stages=configs.SOLVE_STAGES,
        )  # fmt: skip
    return plan.finished(())
