"""From layouts to launches: plans of the training passes, with their operands, outputs and grids."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashlla import products
from flashlla.backends.triton import backward as backward_kernels
from flashlla.backends.triton import configs, hopper, prepare
from flashlla.backends.triton import forward as forward_kernels
from flashlla.backends.triton import gram as gram_kernels
from flashlla.backends.triton.plan import Buffer, Layout, Memory, Plan, contiguous, layouts, of_buffers, planned
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
from flashlla.backends.triton.runtime import Kernel, cdiv
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
from flashlla.records import Row

# How much coarser than the dtype's resolution the probe of bfloat16 inputs may be where queries see many keys.
PROBE_SLACK = 2.0


class Adjoined(NamedTuple):
    """What the backward passes are given."""

    inputs: Inputs
    residuals: Residuals
    grad_o: Tensor


# Plans take and give rows.
_INPUTS, _FORWARD, _ADJOINED, _GRADIENTS = Row(Inputs), Row(Forward), Row(Adjoined), Row(Gradients)


class Around(NamedTuple):
    """What a plan depends on beside the call: torch's setting of float32 products, whether configs are tuned, and
    whether kernels in Gluon may run."""

    full: bool
    tuned: bool
    hopper: bool

    @classmethod
    def now(cls, device: torch.device) -> Around:
        switches = os.environ.get("FLASHLLA_AUTOTUNE") == "1", hopper.allowed()
        return cls(products.allowed(device) == "ieee", *switches)


class Call:
    """The plan of one call's passes: what all of them share."""

    def __init__(self, problem: Problem, around: Around, plan: Plan, inputs: Any) -> None:
        self.problem, self.around, self.plan, self.inputs = problem, around, plan, inputs
        self.device, mask = problem.device, problem.mask
        # To tokens of no sequence no program comes: zeros. Some of this memory is free after the solve.
        self.memory = self.of_tokens = self.plan.memory()
        if mask.packed:
            self.of_tokens = self.plan.memory(fill=0)
        self.until_solved = self.plan.memory(fill=0 if mask.packed else None)
        sequences = problem.sequences if mask.packed else problem.batch
        self.n_heads, self.n_kv_heads = sequences * problem.q_heads, sequences * problem.kv_heads
        half = problem.dtype != torch.float32
        self.operand_dtype = torch.float16 if half else torch.float32
        self.shape = Shape(
            HEAD_DIM=problem.head_dim, V_DIM=problem.v_dim,
            BLOCK_D=configs.padded(problem.head_dim), BLOCK_V=configs.padded(problem.v_dim),
            CAUSAL=mask.causal, TF32=not (half or around.full),
        )  # fmt: skip
        # Queries and keys of the longest sequence.
        self.max_seqlens = problem.q_len, problem.k_len
        if mask.packed:
            self.max_seqlens = problem.max_seqlen_q, problem.max_seqlen_k
        self.seqlens = Seqlens(
            cu_q=inputs.cu_seqlens_q, cu_k=inputs.cu_seqlens_k, k=inputs.seqlens_k, k_start=inputs.seqstarts_k,
            own_end=inputs.seqlens_k if mask.at_lengths else None,
            slots=inputs.cu_seqlens_q if self.unequal() else None,
        )  # fmt: skip
        self.lengths = (
            self.n_heads, problem.q_heads, problem.group, problem.q_len, problem.k_len, *self.max_seqlens,
        )  # fmt: skip
        self.keys_seen = min(self.max_seqlens[1], mask.window or self.max_seqlens[1])  # by a query, at most
        # What tells a kernel which keys its queries see, as its parameters follow.
        self.sight = self.seqlens, mask.window, *self.lengths
        # float32 has digits to lose: keys are taken relative to their sequence's first (docs/math.md, section 6).
        self.k_most: float = prepare.MOST.value if half else largest_key(problem.dtype, problem.head_dim)
        self.origin = None  # (sequences Hkv, D)
        if not half:
            self.origin = self.scratch(self.n_kv_heads, problem.head_dim)
            first = functools.partial(_first_keys, problem, self.k_most)
            lengths = inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.seqlens_k, inputs.seqstarts_k
            self.plan.compute(first, self.origin, inputs.k, *lengths)
        self.operands, self.units, self.flaws = self.cast(
            self.with_unit_stride(inputs.q), self.with_unit_stride(inputs.k), self.with_unit_stride(inputs.v)
        )
        self.q, self.k = self.strided(self.operands.q), self.strided(self.operands.k)
        self.v = self.strided(self.operands.v)

    def scratch(
        self, *shape: int, dtype: torch.dtype = torch.float32, memory: Memory | None = None
    ) -> Buffer:  # fmt: skip
        return self.plan.scratch(memory or self.memory, shape, dtype)

    def rows(self, dtype: torch.dtype = torch.float32) -> Buffer:
        """(B, Hq, Sq) to be filled."""
        return self.scratch(*self.inputs.q.shape[:3], dtype=dtype, memory=self.of_tokens)

    def vectors(
        self, dtype: torch.dtype = torch.float32, width: int | None = None, memory: Memory | None = None
    ) -> Buffer:  # fmt: skip
        """(B, Hq, Sq, D) to be filled."""
        shape = *self.inputs.q.shape[:3], width or self.problem.head_dim
        return self.scratch(*shape, dtype=dtype, memory=memory or self.of_tokens)

    def strided(self, t: Buffer) -> Strided:
        """``t`` (B, H, S, ...) as kernels take it. To packed sequences, which kernels take for the batch, B is 1."""
        return Strided(t, *t.steps()[:3])

    def contiguous(self, t: Buffer) -> Buffer:
        """``t``, copied where it is not."""
        if _meta(t).is_contiguous():
            return t
        copy = self.scratch(*t.shape, dtype=t.dtype)
        self.plan.compute(Tensor.copy_, copy, t)
        return copy

    def with_unit_stride(self, t: Buffer) -> Buffer:
        """``t``, copied only where its last dimension is not contiguous, or rows are so far apart that the offsets
        within a tile, which are of 32 bits, would not hold them."""
        return t if _near(t) else self.contiguous(t)

    def output(self, *shape: int, dtype: torch.dtype = torch.float32, fill: int = 0) -> Buffer:
        """A contiguous output, to be filled by the programs of tokens; ``fill``: what is where none comes."""
        return self.plan.output(contiguous(shape, dtype), fill if self.problem.mask.packed else None)

    def output_like(
        self, x: Buffer, width: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Buffer, Buffer]:  # fmt: skip
        """An output laid out as ``x`` is, of ``width`` columns and ``dtype``, and what a kernel writes instead: the
        same, where its rows are such as kernels take."""
        dtype = dtype or x.dtype
        layout = x.layout._replace(dtype=dtype, aligned=True)
        if (width or x.shape[-1]) != x.shape[-1] or not _dense(x):
            like = empty_output(_meta(x), _meta(x)[..., :1].expand(*x.shape[:-1], width or x.shape[-1]))
            layout = Layout(like.shape, like.stride(), dtype, aligned=True)
        # No program comes to tokens of no sequence, nor to keys before the first.
        whole = not self.problem.mask.packed and self.inputs.seqstarts_k is None
        out = self.plan.output(layout, None if whole else 0)
        if _near(out):
            return out, out
        return out, self.scratch(*out.shape, dtype=out.dtype, memory=self.plan.memory(None if whole else 0))

    def moved(self, lse: Buffer, k_mean: Buffer, to_lse: Buffer, to_k_mean: Buffer, back: bool = False) -> None:
        """lse and k_mean of keys as they came, for keys as the kernels have them; ``back``: the other way."""
        move = functools.partial(_move, self.problem, -1 if back else 1)
        for out, x in ((to_lse, lse), (to_k_mean, k_mean)):
            self.plan.compute(move, out, x, self.origin, self.inputs.cu_seqlens_q, self.inputs.q)

    def cast(self, q: Buffer, k: Buffer, v: Buffer) -> tuple[Operands, Buffer, Flaws]:
        """q, k and v contiguous and finite, in the operands' dtype and in units of a head; these units; and which heads
        and which rows of q, k and v were not finite."""
        longest, slots = max(self.max_seqlens), self.n_heads + 2 * self.n_kv_heads
        units, flaws = self.scratch(slots), self.scratch(slots)
        of_operand = lambda t: self.scratch(*t.shape, dtype=self.operand_dtype)
        of_rows = lambda t: self.scratch(*t.shape[:3])
        outs = Operands(q=of_operand(q), k=of_operand(k), v=of_operand(v))
        found = Flaws(heads=flaws, q=of_rows(q), k=of_rows(k), v=of_rows(v))
        given = self.strided(q), self.strided(k), self.strided(v)
        if longest <= configs.CAST_HEAD and slots >= configs.processors(self.device):
            self.plan.launch(
                prepare.cast_heads_kernel, "cast", (self.n_heads, 3), *given, self.k_most, self.origin, outs, units,
                found, self.seqlens, *self.lengths, SHAPE=self.shape, BLOCK_M=configs.CAST_HEAD_ROWS,
            )  # fmt: skip
            return outs, units, found
        tokens = max(self.problem.q_len, self.problem.k_len) // max(1, self.problem.sequences)  # of a sequence
        chunks = configs.cast_chunks(tokens) if self.device.type == "cuda" else 1
        chunk = cdiv(cdiv(longest, chunks), configs.CAST_ROWS) * configs.CAST_ROWS
        largest, flawed = self.scratch(slots, chunks), self.scratch(slots, chunks)
        tiles = {"SHAPE": self.shape, "CHUNKS": chunks, "BLOCK_M": configs.CAST_ROWS}
        self.plan.launch(
            prepare.largest_kernel, "cast", (self.n_heads * chunks, 3), *given, self.k_most, largest, flawed,
            self.seqlens, *self.lengths, chunk, **tiles,
        )  # fmt: skip
        tiles_of = max(self.tiles(over_keys, configs.CAST_ROWS) for over_keys in (False, True))
        self.plan.launch(
            prepare.cast_kernel, "cast", (tiles_of * self.problem.q_heads, 3), *given, self.k_most,
            self.origin, largest, flawed, outs, units, found, self.seqlens, *self.lengths, **tiles,
        )  # fmt: skip
        return outs, units, found

    def cast_rows(self, grad_o: Buffer, guard: Buffer, probe: Buffer) -> tuple[Scaled, Scaled]:
        """``guard * grad_o`` in the operands' dtype, contiguous, in units of a power of two a row; and the probe so, in
        rows of unit length."""
        grad_o = self.with_unit_stride(grad_o)
        do = Scaled(ptr=self.vectors(self.operand_dtype, grad_o.shape[-1]), unit=self.rows())
        z = Scaled(ptr=self.vectors(self.operand_dtype), unit=self.rows())
        self.plan.launch(
            prepare.cast_rows_kernel, "cast", (self.tiles(False, configs.CAST_ROWS) * self.problem.q_heads,),
            self.strided(grad_o), guard, probe, do, z, self.seqlens.cu_q, self.seqlens.slots, *self.lengths,
            SHAPE=self.shape, BLOCK_M=configs.CAST_ROWS,
        )  # fmt: skip
        return do, z

    def tiles(self, over_keys: bool, block: int) -> int:
        """Tiles of ``block`` rows, of queries or keys, that one head has in all sequences; see `primitives.place`."""
        problem = self.problem
        if self.seqlens.slots is not None:
            return self.slots(over_keys, block)
        return (problem.sequences or problem.batch) * cdiv(self.max_seqlens[over_keys], block)

    def slots(self, over_keys: bool, block: int) -> int:
        """As many tiles as packed sequences of these lengths can have; see `primitives.packed_tile`."""
        problem = self.problem
        return (problem.k_len if over_keys else problem.q_len) // block + problem.sequences

    def unequal(self) -> bool:
        """Whether packed sequences are of such unequal lengths that half the programs or more would have nothing to do
        if all had as many as the longest: to find its sequence takes a program as long as it takes to find none."""
        sequences, block = self.problem.sequences, configs.CAST_ROWS
        longest = (sequences * cdiv(length, block) for length in self.max_seqlens)
        return sequences > 1 and all(2 * self.slots(bool(i), block) <= n for i, n in enumerate(longest))

    def in_gluon(self, name: str) -> configs.HopperConfig | None:
        """The config of pass ``name``, where a kernel in Gluon has it."""
        return hopper.config(name, self.problem) if self.around.hopper else None

    def launch_tiles(
        self, kernel: Kernel, name: str, *arguments: Any, over_keys: bool = False, tune: bool = True,
        gluon: bool = True, **settings: Any,
    ) -> None:  # fmt: skip
        """Launch ``kernel`` of pass ``name``, one program a tile of queries (``over_keys``: of keys) and head, with the
        table's config; where programs are few, that for few; ``tune``: with the one that FLASHLLA_AUTOTUNE=1 finds.
        Elsewhere, if ``gluon``, the kernel in Gluon where one has the pass."""
        heads = self.problem.kv_heads if over_keys else self.problem.q_heads
        widest = max(self.problem.head_dim, self.problem.v_dim)
        key = name, widest, self.operand_dtype, configs.capability(self.device)
        usual, few = configs.config(*key), configs.config(*key, few=True)

        def programs(c: configs.Config | configs.HopperConfig) -> int:
            return heads * self.tiles(over_keys, c.n if over_keys else c.m)

        chosen = [usual]
        if few is not usual and programs(usual) <= configs.FEW * configs.processors(self.device):
            chosen = [few]
        elif gluon and (mine := self.in_gluon(name)) is not None:
            settings |= {"SHAPE": self.shape, **mine.options()}
            self.plan.launch(hopper.kernel(name), name, (programs(mine),), *arguments, **settings)
            return
        elif tune and self.around.tuned and self.device.type == "cuda":
            chosen = configs.candidates(*key)
        self.plan.launch_fastest(
            key, kernel, name, {c: (programs(c),) for c in chosen}, *arguments, SHAPE=self.shape, **settings
        )


def _meta(t: Buffer) -> Tensor:
    """A tensor like it without memory, which torch can be asked about."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _dense(t: Buffer) -> bool:
    """Whether it is what torch.empty_like would make of it, as torch takes tens of microseconds to tell."""
    numbers = 1
    for stride, n in sorted(zip(t.stride(), t.shape)):
        if n > 1 and stride != numbers:
            return False
        numbers *= n
    return True


def _near(t: Buffer) -> bool:
    """Whether kernels take it: rows contiguous, and no further apart than offsets of 32 bits within a tile hold."""
    return t.stride()[2] < 2**24 and (t.stride()[-1] == 1 or t.shape[-1] == 1)


def _first_keys(
    problem: Problem, most: float, out: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None,
    seqlens_k: Tensor | None, seqstarts_k: Tensor | None,
) -> None:  # fmt: skip
    """The first key that a query sees of every sequence, (sequences Hkv, D); 0 where it is not finite."""
    window, last = problem.mask.window, problem.k_len - 1
    if cu_k is not None:
        first, stop = sequence_bounds(cu_k, problem.k_len, problem.max_seqlen_k)
        if window is not None:
            q_first, q_stop = sequence_bounds(cu_q, problem.q_len, problem.max_seqlen_q)
            first = torch.maximum(first, (stop - (q_stop - q_first) + 1 - window).minimum(stop - 1))
        found = k[0].index_select(1, first.clamp(0, last)).transpose(0, 1)  # (sequences, Hkv, D)
    else:
        end: Any = seqlens_k.long() if problem.mask.at_lengths and seqlens_k is not None else problem.k_len
        begin = 0 if window is None else end - problem.q_len + 1 - window
        begin = begin if seqstarts_k is None else seqstarts_k.long().clamp(min=begin)
        if isinstance(begin, int):
            found = k[:, :, min(max(begin, 0), last)]
        else:
            found = k.gather(2, begin.clamp(0, last)[:, None, None, None].expand(*k.shape[:2], 1, k.shape[3]))[:, :, 0]
    out.copy_(torch.where(found.abs() <= most, found, 0).flatten(0, 1))


def _move(
    problem: Problem, sign: int, out: Tensor, x: Tensor, origin: Tensor, cu_seqlens_q: Tensor | None, q: Tensor
) -> None:  # fmt: skip
    """``x``, lse or k_mean, less ``sign`` times what the keys' ``origin`` makes of it."""
    origin = _of_queries(problem, origin, cu_seqlens_q).repeat_interleave(problem.group, 1)
    if x.dim() == 3:
        origin = problem.scale * (q.where(q.isfinite(), 0) * origin).sum(-1)
    torch.sub(x, sign * origin, out=out)


def _of_queries(problem: Problem, x: Tensor, cu_seqlens_q: Tensor | None) -> Tensor:
    """``x`` (sequences Hkv, D) for every query: (B, Hkv, 1 or Sq, D)."""
    x = x.unflatten(0, (-1, problem.kv_heads))
    if cu_seqlens_q is None:
        return x.unsqueeze(2)
    row = torch.arange(problem.q_len, device=x.device)
    sequence = torch.searchsorted(cu_seqlens_q[1:].long(), row, right=True).clamp(max=x.shape[0] - 1)
    return x[sequence].transpose(0, 1).unsqueeze(0)


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
    around, given = Around.now(problem.device), layouts(inputs)
    plan = plan_forward(problem, preconditioner, around, given, True)
    return _FORWARD.record(run_forward(plan, problem, preconditioner, around, _INPUTS.flat(inputs)))


def run_forward(
    plan: Plan, problem: Problem, preconditioner: str, around: Around, inputs: Sequence[Tensor | None]
) -> list[Tensor]:  # fmt: skip
    """What ``plan`` makes of ``inputs``. Where a backward pass will come, its kernels compile while those of the first
    forward pass do."""
    if not plan.compiles:
        plan.compile()
        if any(t is not None and t.requires_grad for t in inputs):
            # What comes back has, as a rule, the layout of what went out.
            o, *residuals = [output.layout for output in plan.outputs[: 1 + len(Residuals._fields)]]
            given = *(None if t is None else t.layout for t in plan.given), *residuals, o
            plan_backward(problem, preconditioner, around, given).compile()
    return plan.run(inputs)


@planned
def plan_forward(
    problem: Problem, preconditioner: str, around: Around, given: tuple[Layout | None, ...], reported: bool
) -> Plan:  # fmt: skip
    """``reported``: its outputs are those of `Forward`; else o and the residuals alone."""
    plan = Plan(problem.device, given)
    call = Call(problem, around, plan, _INPUTS.record(plan.given))
    q = call.inputs.q
    of_rows = q.shape[:3]
    residuals = of_buffers(
        Residuals, lse=call.output(*of_rows), guard=call.output(*of_rows),
        probe=call.output(*q.shape), k_mean=call.output(*q.shape),
    )  # fmt: skip

    def told(dtype: torch.dtype = torch.float32, fill: int = 0) -> Buffer:
        return call.output(*of_rows, dtype=dtype, fill=fill) if reported else call.rows(dtype)

    ended = Ended(iterations=told(torch.int32), residual=told(), converged=told(torch.bool, fill=1))
    omega = told()
    # Of keys as the kernels have them.
    lse, k_mean = residuals.lse, residuals.k_mean
    if call.origin is not None:
        lse, k_mean = call.rows(), call.vectors()
    many_keys = call.keys_seen > configs.FEW_KEYS
    if preconditioner == "none" and not many_keys and (whole := call.in_gluon("forward")) is not None:
        o, o_rows = call.output_like(q, problem.v_dim)
        plan.launch(
            hopper.kernel("forward"), "forward", (problem.q_heads * call.tiles(False, whole.m),), call.q, call.k,
            call.v, call.units, call.flaws, call.strided(call.inputs.ridge_lambda), lse, omega, k_mean, residuals.probe,
            residuals.guard, call.strided(o_rows), ended, *call.sight, problem.scale, problem.delta_eps,
            *tolerances(problem, adjoint=False), FLIP=problem.scale < 0, SHAPE=call.shape, **whole.options(),
        )  # fmt: skip
    else:
        lse2, image = call.rows(), None
        if preconditioner == "gram" or (call.origin is None and (preconditioner != "none" or many_keys)):
            image = call.vectors(memory=call.until_solved)
        call.launch_tiles(
            forward_kernels.statistics_kernel, "statistics", call.q, call.k, call.units, call.flaws, lse, lse2, omega,
            k_mean, image, *call.sight, problem.scale, FLIP=problem.scale < 0,
        )  # fmt: skip
        solve(call, call.inputs.ridge_lambda, lse2, k_mean, image, residuals.probe, preconditioner, ended=ended)
        plan.drop(call.until_solved)
        o, o_rows = call.output_like(q, problem.v_dim)
        call.launch_tiles(
            forward_kernels.output_kernel, "output", call.q, call.k, call.v, call.units, call.origin, lse2, omega,
            k_mean, residuals.probe, residuals.guard, call.strided(o_rows), *call.sight, problem.scale,
            problem.delta_eps,
        )  # fmt: skip
    if o_rows is not o:
        plan.compute(Tensor.copy_, o, o_rows)
    if call.origin is not None:
        call.moved(lse, k_mean, residuals.lse, residuals.k_mean, back=True)
    report = of_buffers(Report, omega=omega, **ended._asdict())
    outputs = _FORWARD.flat(of_buffers(Forward, o=o, residuals=residuals, report=report))
    return plan.finished(outputs if reported else outputs[: 1 + len(residuals)])


def solve(
    call: Call, ridge: Buffer, lse2: Buffer, k_mean: Buffer, b: Buffer | None, x: Buffer, preconditioner: str, *,
    ended: Ended | None = None, adjoint: Adjoint | None = None,
) -> None:  # fmt: skip
    """Launch the one solve kernel: for the probe, filling ``ended``, or for the ``adjoint`` probe."""
    of_ridge, segments = call.strided(ridge), cdiv(call.problem.q_len, configs.SEGMENT)
    made = None
    if preconditioner == "gram":
        assert b is not None
        made = gram(call, of_ridge, k_mean, b, None if adjoint is None else adjoint.probe, segments)
    tail = *call.sight, call.problem.scale, *tolerances(call.problem, adjoint is not None), segments
    # Of float32 no first guess is made: what its C u is rounded by, the solution keeps, and a weak ridge magnifies.
    if adjoint is None and call.origin is not None:
        b = None
    for which in ("none", "gram") if preconditioner == "gram" else (preconditioner,):
        call.launch_tiles(
            solve_kernel, "solve_gram" if which == "gram" else "solve",
            call.q, call.k, call.units, call.origin, lse2, k_mean, of_ridge, b, made, x, adjoint, ended, *tail,
            ADJOINT=adjoint is not None, PRECONDITIONER=which, SEGMENT=configs.SEGMENT,
            tune=preconditioner != "gram",  # either may have no tile that is its own
            gluon=which == "none",
        )  # fmt: skip


def gram(
    call: Call, ridge: Strided, k_mean: Buffer, b: Buffer, probe: Buffer | None, segments: int
) -> Preconditioner:  # fmt: skip
    """The preconditioner "gram" of every segment of queries that has one; ``probe``: for the adjoint solve."""
    d, segment = call.shape.BLOCK_D, configs.SEGMENT
    chunks = cdiv(call.problem.k_len, segment)
    memory = call.until_solved
    sums = call.scratch(call.n_kv_heads, chunks, d + 1, d, memory=memory)
    scratch = call.scratch(call.n_heads, segments, 2 * d, d, memory=memory)
    made = Preconditioner(
        inverse=call.scratch(call.n_heads, segments, d, d, dtype=call.operand_dtype, memory=memory),
        use=call.scratch(call.n_heads, segments, dtype=torch.int32, memory=memory),
    )
    call.plan.launch(
        gram_kernels.gram_sums_kernel, "gram", (call.n_kv_heads * chunks,), call.k, sums, *call.sight, chunks,
        SHAPE=call.shape, SEGMENT=segment, **configs.gram_sums_tiles(d),
    )  # fmt: skip
    call.plan.launch(
        gram_kernels.gram_kernel, "gram", (call.n_heads * segments,), call.q, sums, call.units, call.origin, k_mean,
        ridge, b, probe, scratch, made, *call.sight, chunks, segments,
        ADJOINT=probe is not None, SHAPE=call.shape, SEGMENT=segment, **configs.gram_tiles(d),
    )  # fmt: skip
    return made


def backward(
    problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor, preconditioner: str
) -> Gradients:  # fmt: skip
    """The passes of operator section 4: moments, solve, dq with dlambda, dk and dv."""
    given = _ADJOINED.flat(Adjoined(inputs, residuals, grad_o))
    plan = plan_backward(problem, preconditioner, Around.now(problem.device), layouts(given))
    return _GRADIENTS.record(plan.run(given))


@planned
def plan_backward(
    problem: Problem, preconditioner: str, around: Around, given: tuple[Layout | None, ...]
) -> Plan:  # fmt: skip
    plan = Plan(problem.device, given)
    adjoined: Any = _ADJOINED.record(plan.given)
    call = Call(problem, around, plan, adjoined.inputs)
    q, k, v, ridge = call.q, call.k, call.v, call.inputs.ridge_lambda
    lse, guard, probe, k_mean = map(call.contiguous, adjoined.residuals)
    do, z = call.cast_rows(adjoined.grad_o, guard, probe)
    if call.origin is not None:
        moved = call.rows(), call.vectors()
        call.moved(lse, k_mean, *moved)
        lse, k_mean = moved
    lse2, rhs_size, g_near = call.rows(), call.rows(), None
    rhs = call.vectors(memory=call.until_solved)  # t of (3.1)
    half = call.operand_dtype == torch.float16
    tops = call.scratch(2, call.n_kv_heads, memory=plan.memory(fill=0))
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
    plan.drop(call.until_solved)
    of_keys = (call.output_like(x, dtype=problem.key_gradients) for x in (call.inputs.k, call.inputs.v))
    outputs = [call.output_like(call.inputs.q), *of_keys]
    dq, dk, dv = (rowed for _, rowed in outputs)
    d_ridge = call.output(*call.inputs.q.shape[:3])
    # What queries hand on to keys: whole tiles of queries, a sequence's apart from the next one's.
    tiles = cdiv(problem.q_len, configs.ROWS_PAD) + (problem.sequences if problem.mask.packed else 0)
    rows_len = tiles * configs.ROWS_PAD
    handed = call.scratch(5 if half else 6, problem.batch * problem.q_heads, rows_len)
    handed_on = HandedOn(handed, handed.stride()[0])
    call.launch_tiles(
        backward_kernels.dq_kernel, "dq", q, k, v, do, y_neg, z, call.units, call.origin, z_y, lse2, k_mean,
        call.strided(ridge), g_mean, y, call.strided(dq), d_ridge, handed_on, rows_len, tops,
        *call.sight, problem.scale,
    )  # fmt: skip
    call.launch_tiles(
        backward_kernels.dk_kernel, "dk", q, k, v, do.ptr, y_neg, z.ptr, call.units, handed_on, rows_len, tops,
        call.strided(dk), call.strided(dv), *call.sight, problem.scale, over_keys=True, GROUP=problem.group,
    )  # fmt: skip
    for x, rowed in outputs:
        if rowed is not x:
            plan.compute(Tensor.copy_, x, rowed)
    dq, dk, dv = (x for x, _ in outputs)
    return plan.finished(of_buffers(Gradients, q=dq, k=dk, v=dv, ridge_lambda=d_ridge))
