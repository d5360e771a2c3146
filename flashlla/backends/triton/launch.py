"""From tensors to launches: operands, outputs, grids of the training passes. Nothing here waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashlla import products
from flashlla.backends.triton import backward as backward_kernels
from flashlla.backends.triton import configs, prepare
from flashlla.backends.triton import forward as forward_kernels
from flashlla.backends.triton import gram as gram_kernels
from flashlla.backends.triton.records import (
    Adjoint,
    Ended,
    Flaws,
    HandedOn,
    Operands,
    Preconditioner,
    Scaled,
    Seqlens,
    Shape,
    Strided,
    Tolerances,
)
from flashlla.backends.triton.runtime import Kernel, cdiv, chosen_config, launch, with_unit_stride
from flashlla.backends.triton.solve import solve_kernel
from flashlla.problem import (
    Forward,
    Gradients,
    Inputs,
    Problem,
    Report,
    Residuals,
    empty_output,
    largest_key,
    resolution,
    sequence_bounds,
)

# How much coarser than the dtype's resolution the probe of bfloat16 inputs may be where queries see many keys.
PROBE_SLACK = 2.0


class Call:
    """The kernels of one call: what all their launches share."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem, self.inputs = problem, inputs
        mask, self.device = problem.mask, problem.device
        sequences = problem.sequences if mask.packed else problem.batch
        self.n_heads, self.n_kv_heads = sequences * problem.q_heads, sequences * problem.kv_heads
        half = problem.dtype != torch.float32
        self.operand_dtype = torch.float16 if half else torch.float32
        full = products.allowed(self.device) == "ieee"
        self.shape = Shape(
            HEAD_DIM=problem.head_dim, V_DIM=problem.v_dim,
            BLOCK_D=configs.padded(problem.head_dim), BLOCK_V=configs.padded(problem.v_dim),
            CAUSAL=mask.causal, TF32=not (half or full),
        )  # fmt: skip
        # Queries and keys of the longest sequence.
        self.max_seqlens = problem.q_len, problem.k_len
        if mask.packed:
            self.max_seqlens = problem.max_seqlen_q, problem.max_seqlen_k
        self.seqlens = Seqlens(
            cu_q=inputs.cu_seqlens_q, cu_k=inputs.cu_seqlens_k, k=inputs.seqlens_k, k_start=inputs.seqstarts_k,
            own_end=inputs.seqlens_k if mask.at_lengths else None,
        )  # fmt: skip
        self.lengths = (
            self.n_heads, problem.q_heads, problem.group, problem.q_len, problem.k_len, *self.max_seqlens,
        )  # fmt: skip
        # What tells a kernel which keys its queries see, as its parameters follow.
        self.sight = self.seqlens, mask.window, *self.lengths
        # float32 has digits to lose: keys are taken relative to their sequence's first (docs/math.md, section 6).
        self.k_most: float = prepare.MOST.value if half else largest_key(problem.dtype, problem.head_dim)
        self.origin = None if half else self.first_keys(inputs.k)  # (sequences Hkv, D)
        self.operands, self.units, self.flaws = self.cast(
            with_unit_stride(inputs.q), with_unit_stride(inputs.k), with_unit_stride(inputs.v)
        )
        self.q, self.k = self.strided(self.operands.q), self.strided(self.operands.k)
        self.v = self.strided(self.operands.v)

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised. The dtype is said, whatever torch's default is."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def of_tokens(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """To be filled by the programs of tokens. Packed: zeros, since none comes to tokens of no sequence."""
        found = self.scratch(*shape, dtype=dtype)
        return found.zero_() if self.problem.mask.packed else found

    def rows(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, Hq, Sq) to be filled."""
        return self.of_tokens(*self.inputs.q.shape[:3], dtype=dtype)

    def vectors(self, dtype: torch.dtype = torch.float32, width: int | None = None) -> Tensor:
        """(B, Hq, Sq, D) to be filled."""
        return self.of_tokens(*self.inputs.q.shape[:3], width or self.problem.head_dim, dtype=dtype)

    def strided(self, t: Tensor) -> Strided:
        """``t`` (B, H, S, ...) as kernels take it."""
        stride_b, stride_h, stride_s = t.stride()[:3]
        return Strided(t, 0 if self.problem.mask.packed else stride_b, stride_h, stride_s)

    def target(self, out: Tensor) -> Tensor:
        """What a kernel writes instead of ``out``: itself, where its rows are such as kernels take."""
        rowed = out if with_unit_stride(out) is out else out.new_empty(out.shape)
        # No program comes to tokens of no sequence, nor to keys before the first.
        whole = not self.problem.mask.packed and self.inputs.seqstarts_k is None
        return rowed if whole else rowed.zero_()

    def first_keys(self, k: Tensor) -> Tensor:
        if self.problem.mask.packed:
            first, _ = sequence_bounds(self.inputs.cu_seqlens_k, self.problem.k_len, self.problem.max_seqlen_k)
            found = k[0].index_select(1, first.clamp(max=self.problem.k_len - 1)).transpose(0, 1)  # (sequences, Hkv, D)
        elif self.inputs.seqstarts_k is not None:
            first = self.inputs.seqstarts_k.long().clamp(0, self.problem.k_len - 1)[:, None, None, None]
            found = k.gather(2, first.expand(*k.shape[:2], 1, k.shape[3])).squeeze(2)
        else:
            found = k[:, :, 0]
        return torch.where(found.abs() <= self.k_most, found, 0).flatten(0, 1).contiguous()

    def of_queries(self, x: Tensor) -> Tensor:
        """``x`` (sequences Hkv, D) for every query: (B, Hkv, 1 or Sq, D)."""
        x = x.unflatten(0, (-1, self.problem.kv_heads))
        if self.inputs.cu_seqlens_q is None:
            return x.unsqueeze(2)
        row = torch.arange(self.problem.q_len, device=self.device)
        ends = self.inputs.cu_seqlens_q[1:].long()
        sequence = torch.searchsorted(ends, row, right=True).clamp(max=x.shape[0] - 1)
        return x[sequence].transpose(0, 1).unsqueeze(0)

    def moved(self, lse: Tensor, k_mean: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
        """lse and k_mean of keys as they came, for keys as the kernels have them; ``back``: the other way."""
        if self.origin is None:
            return lse, k_mean
        origin = self.of_queries(self.origin)
        origin = origin.repeat_interleave(self.problem.group, 1)
        sign = -1 if back else 1
        logit = self.problem.scale * (self.operands.q * origin).sum(-1)
        return lse - sign * logit, k_mean - sign * origin

    def cast(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Operands, Tensor, Flaws]:
        """q, k and v contiguous and finite, in the operands' dtype and in units of a head; these units; and which heads
        and which rows of q, k and v were not finite."""
        chunks = configs.CAST_CHUNKS if self.device.type == "cuda" else 1
        longest, slots = max(self.max_seqlens), self.n_heads + 2 * self.n_kv_heads
        chunk = cdiv(cdiv(longest, chunks), configs.CAST_ROWS) * configs.CAST_ROWS
        largest, flawed = self.scratch(2, slots, chunks)
        units, flaws = self.scratch(2, slots)
        of_operand = lambda t: self.scratch(*t.shape, dtype=self.operand_dtype)
        of_rows = lambda t: self.scratch(*t.shape[:3])
        outs = Operands(q=of_operand(q), k=of_operand(k), v=of_operand(v))
        found = Flaws(heads=flaws, q=of_rows(q), k=of_rows(k), v=of_rows(v))
        given = self.strided(q), self.strided(k), self.strided(v)
        tiles = {"SHAPE": self.shape, "CHUNKS": chunks, "BLOCK_M": configs.CAST_ROWS}
        self.launch(
            prepare.largest_kernel, "cast", (self.n_heads * chunks, 3), *given, self.k_most, largest, flawed,
            self.seqlens, *self.lengths, chunk, **tiles,
        )  # fmt: skip
        self.launch(
            prepare.cast_kernel, "cast", (self.n_heads * cdiv(longest, configs.CAST_ROWS), 3), *given, self.k_most,
            self.origin, largest, flawed, outs, units, found, self.seqlens, *self.lengths, **tiles,
        )  # fmt: skip
        return outs, units, found

    def cast_rows(self, grad_o: Tensor, guard: Tensor, probe: Tensor) -> tuple[Scaled, Scaled]:
        """``guard * grad_o`` in the operands' dtype, contiguous, in units of a power of two a row; and the probe so, in
        rows of unit length."""
        grad_o = with_unit_stride(grad_o)
        do = Scaled(ptr=self.vectors(self.operand_dtype, grad_o.shape[-1]), unit=self.rows())
        z = Scaled(ptr=self.vectors(self.operand_dtype), unit=self.rows())
        self.launch(
            prepare.cast_rows_kernel, "cast", (self.n_heads * cdiv(self.max_seqlens[0], configs.CAST_ROWS),),
            self.strided(grad_o), guard, probe, do, z, self.seqlens.cu_q, *self.lengths,
            SHAPE=self.shape, BLOCK_M=configs.CAST_ROWS,
        )  # fmt: skip
        return do, z

    def launch_tiles(
        self, kernel: Kernel, name: str, *arguments: Any, over_keys: bool = False, tune: bool = True, **settings: Any
    ) -> None:
        """Launch ``kernel`` of pass ``name``, one program a tile of queries (``over_keys``: of keys) and head;
        ``tune``: with the config that FLASHLLA_AUTOTUNE=1 finds."""
        heads = self.n_kv_heads if over_keys else self.n_heads

        def programs(c: configs.Config) -> int:
            return heads * cdiv(self.max_seqlens[over_keys], c.n if over_keys else c.m)

        def launch_with(c: configs.Config) -> None:
            self.launch(kernel, name, (programs(c),), *arguments, SHAPE=self.shape, **c.options(), **settings)

        widest = max(self.problem.head_dim, self.problem.v_dim)
        key = name, widest, self.operand_dtype, configs.capability(self.device)
        launch_with(chosen_config(key, programs, self.device, launch_with if tune else None))

    def launch(self, kernel: Kernel, name: str, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        launch(kernel, name, grid, self.device, *arguments, **settings)


def tolerances(problem: Problem, adjoint: bool) -> tuple[Tolerances, int]:
    """Of the solver, rtol no smaller than the dtype can make use of; and its cap on iterations.

    Of bfloat16 inputs, whose outputs have eight bits, the probe may be coarser where queries see many keys than the
    adjoint probe: dlambda, the most sensitive gradient, is off by as much as the adjoint probe is. docs/performance.md
    has the measurement. A tolerance of 0 asks for all that the dtype can tell.
    """
    solver: Any = problem.solver
    floor = resolution(problem.dtype)
    slack = problem.dtype == torch.bfloat16 and not adjoint and solver.rtol > 0
    coarse = (PROBE_SLACK * floor) ** 2 if slack else 0.0
    found = Tolerances(atol=float(solver.atol), rtol=max(float(solver.rtol), floor**2), coarse=coarse)
    return found, int(solver.max_iters)


def forward(problem: Problem, inputs: Inputs, preconditioner: str) -> Forward:
    """The passes of operator section 4: statistics, solve, output."""
    call = Call(problem, inputs)
    lse, lse2, omega, k_mean, image = call.rows(), call.rows(), call.rows(), call.vectors(), call.vectors()
    call.launch_tiles(
        forward_kernels.statistics_kernel, "statistics", call.q, call.k, call.units, call.flaws, lse, lse2, omega,
        k_mean, image, *call.sight, problem.scale, FLIP=problem.scale < 0,
    )  # fmt: skip
    probe = call.vectors()
    ended = Ended(iterations=call.rows(torch.int32), residual=call.rows(), converged=call.rows(torch.bool))
    if problem.mask.packed:
        ended.converged.fill_(True)
    solve(call, inputs.ridge_lambda, lse2, k_mean, image, probe, preconditioner, ended=ended)
    del image
    guard, o = call.rows(), empty_output(inputs.q, inputs.v)
    o_rows = call.target(o)
    call.launch_tiles(
        forward_kernels.output_kernel, "output", call.q, call.k, call.v, call.units, call.origin, lse2, omega, k_mean,
        probe, guard, call.strided(o_rows), *call.sight, problem.scale, problem.delta_eps,
    )  # fmt: skip
    if o_rows is not o:
        o.copy_(o_rows)
    lse, k_mean = call.moved(lse, k_mean, back=True)
    residuals = Residuals(lse=lse, guard=guard, probe=probe, k_mean=k_mean)
    report = Report(omega=omega, iterations=ended.iterations, residual=ended.residual, converged=ended.converged)
    return Forward(o, residuals, report)


def solve(
    call: Call, ridge: Tensor, lse2: Tensor, k_mean: Tensor, b: Tensor, x: Tensor, preconditioner: str, *,
    ended: Ended | None = None, adjoint: Adjoint | None = None,
) -> None:  # fmt: skip
    """Launch the one solve kernel: for the probe, filling ``ended``, or for the ``adjoint`` probe."""
    of_ridge, segments = call.strided(ridge), cdiv(call.problem.q_len, configs.SEGMENT)
    made = None
    if preconditioner == "gram":
        made = gram(call, of_ridge, k_mean, b, None if adjoint is None else adjoint.probe, segments)
    for which in ("none", "gram") if preconditioner == "gram" else (preconditioner,):
        call.launch_tiles(
            solve_kernel, "solve_gram" if which == "gram" else "solve",
            call.q, call.k, call.units, call.origin, lse2, k_mean, of_ridge, b, made, x, adjoint, ended,
            *call.sight, call.problem.scale, *tolerances(call.problem, adjoint is not None), segments,
            ADJOINT=adjoint is not None, PRECONDITIONER=which, SEGMENT=configs.SEGMENT,
            tune=preconditioner != "gram",  # either may have no tile that is its own
        )  # fmt: skip


def gram(
    call: Call, ridge: Strided, k_mean: Tensor, b: Tensor, probe: Tensor | None, segments: int
) -> Preconditioner:  # fmt: skip
    """The preconditioner "gram" of every segment of queries that has one; ``probe``: for the adjoint solve."""
    d, segment = call.shape.BLOCK_D, configs.SEGMENT
    chunks = cdiv(call.problem.k_len, segment)
    sums = call.scratch(call.n_kv_heads, chunks, d + 1, d)
    scratch = call.scratch(call.n_heads, segments, 2 * d, d)
    made = Preconditioner(
        inverse=call.scratch(call.n_heads, segments, d, d, dtype=call.operand_dtype),
        use=call.scratch(call.n_heads, segments, dtype=torch.int32),
    )
    call.launch(
        gram_kernels.gram_sums_kernel, "gram", (call.n_kv_heads * chunks,), call.k, sums, *call.sight, chunks,
        SHAPE=call.shape, SEGMENT=segment, **configs.gram_sums_tiles(d),
    )  # fmt: skip
    call.launch(
        gram_kernels.gram_kernel, "gram", (call.n_heads * segments,), call.q, sums, call.units, call.origin, k_mean,
        ridge, b, probe, scratch, made, *call.sight, chunks, segments,
        ADJOINT=probe is not None, SHAPE=call.shape, SEGMENT=segment, **configs.gram_tiles(d),
    )  # fmt: skip
    return made


def backward(
    problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor, preconditioner: str
) -> Gradients:  # fmt: skip
    """The passes of operator section 4: moments, solve, dq with dlambda, dk and dv."""
    call = Call(problem, inputs)
    q, k, v, ridge = call.q, call.k, call.v, inputs.ridge_lambda
    probe = residuals.probe.contiguous()
    do, z = call.cast_rows(grad_o, residuals.guard.contiguous(), probe)
    lse, k_mean = call.moved(residuals.lse, residuals.k_mean)
    lse, k_mean = lse.contiguous(), k_mean.contiguous()
    lse2, rhs, rhs_size, g_near = call.rows(), call.vectors(), call.rows(), None  # rhs: t of (3.1)
    half = call.operand_dtype == torch.float16
    tops = torch.zeros(2, call.n_kv_heads, dtype=torch.float32, device=call.device)
    # float32 takes them twice, then about the g_mean of the first time: its rhs shall hold where weights are sharp.
    for _ in range(1 if half else 2):
        g_mean = call.rows()
        call.launch_tiles(
            backward_kernels.moments_kernel, "moments", q, k, v, do.ptr, call.units, lse, k_mean, g_near, z.unit,
            call.strided(ridge), lse2, rhs, rhs_size, g_mean, tops, *call.sight, problem.scale,
        )  # fmt: skip
        g_near = g_mean
    y_neg, z_y = call.vectors(call.operand_dtype), call.rows()
    y = Scaled(ptr=call.vectors(call.operand_dtype), unit=call.rows()) if half else None
    adjoint = Adjoint(b_size=rhs_size, probe=probe, tops=tops, z_y=z_y, y=y)
    solve(call, ridge, lse2, k_mean, rhs, y_neg, preconditioner, adjoint=adjoint)
    del rhs
    found = Gradients(
        q=torch.empty_like(inputs.q), k=torch.empty_like(inputs.k), v=torch.empty_like(inputs.v),
        ridge_lambda=call.rows(),
    )  # fmt: skip
    dq, dk, dv = call.target(found.q), call.target(found.k), call.target(found.v)
    # What queries hand on to keys: whole tiles of queries, a sequence's apart from the next one's.
    tiles = cdiv(problem.q_len, configs.ROWS_PAD) + (problem.sequences if problem.mask.packed else 0)
    rows_len = tiles * configs.ROWS_PAD
    handed = call.scratch(5, problem.batch * problem.q_heads, rows_len)
    handed_on = HandedOn(handed, handed.stride(0))
    call.launch_tiles(
        backward_kernels.dq_kernel, "dq", q, k, v, do, y_neg, z, call.units, call.origin, z_y, lse2, k_mean,
        call.strided(ridge), g_mean, y, call.strided(dq), found.ridge_lambda, handed_on, rows_len, tops,
        *call.sight, problem.scale,
    )  # fmt: skip
    call.launch_tiles(
        backward_kernels.dk_kernel, "dk", q, k, v, do.ptr, y_neg, z.ptr, call.units, handed_on, rows_len, tops,
        call.strided(dk), call.strided(dv), *call.sight, problem.scale, over_keys=True, GROUP=problem.group,
    )  # fmt: skip
    for x, rowed in ((found.q, dq), (found.k, dk), (found.v, dv)):
        if rowed is not x:
            x.copy_(rowed)
    return found
