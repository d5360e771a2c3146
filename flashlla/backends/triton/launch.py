"""From tensors to launches: operands, outputs, grids. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from flashlla.backends.triton import backward as backward_kernels
from flashlla.backends.triton import configs, prepare
from flashlla.backends.triton import forward as forward_kernels
from flashlla.backends.triton import gram as gram_kernels
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

# Rows that one program of the cast kernels takes.
CAST_ROWS = 64
# Programs that run side by side on a processor: a pass with no more of them takes its config for few, if it has one.
FEW = 2
# How much coarser than the dtype's resolution the probe of bfloat16 inputs may be where queries see many keys.
PROBE_SLACK = 2.0
# Without fused multiply-adds, which Triton means to stop using by default, every sweep takes a third more instructions.
COMPILER = {"enable_fp_fusion": True}
_tuned: dict[tuple[Any, ...], configs.Config] = {}
# By kernel, device, settings and kinds of arguments: what Triton compiled, and the settings as its parameters follow.
_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def cdiv(a: int, b: int) -> int:
    """Triton's takes microseconds."""
    return -(-a // b)


class Call:
    """The kernels of one call: what all their launches share."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem, self.inputs = problem, inputs
        mask, self.device = problem.mask, problem.device
        sequences = problem.sequences if mask.packed else problem.batch
        self.n_heads, self.n_kv_heads = sequences * problem.q_heads, sequences * problem.kv_heads
        half = problem.dtype != torch.float32
        self.operand = torch.float16 if half else torch.float32
        full = torch.get_float32_matmul_precision() == "highest"
        self.dims = {
            "HEAD_DIM": problem.head_dim,
            "V_DIM": problem.v_dim,
            "BLOCK_D": configs.padded(problem.head_dim),
            "BLOCK_V": configs.padded(problem.v_dim),
        }
        self.precision = "ieee" if half or full else "tf32"
        # Queries and keys of the longest sequence.
        self.max_seqlens = problem.q_len, problem.k_len
        if mask.packed:
            self.max_seqlens = problem.max_seqlen_q, problem.max_seqlen_k
        self.lengths = (
            self.n_heads, problem.q_heads, problem.group, problem.q_len, problem.k_len, *self.max_seqlens,
        )  # fmt: skip
        self.seqlens = inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.seqlens_k
        # What tells a kernel which keys its queries see, as `primitives.place` takes it.
        self.where = (*self.seqlens, mask.window, *self.lengths)
        # float32 has digits to lose: keys are taken relative to their sequence's first (docs/math.md, section 6).
        self.k_most = prepare.MOST.value if half else largest_key(problem.dtype, problem.head_dim)
        self.origin = None if half else self.first_keys(inputs.k)  # (sequences Hkv, D)
        self.q, self.k, self.v, self.units, self.flaws = self.cast(*map(with_unit_stride, inputs[:3]))

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised. Packed: zeros, since no program comes to tokens of no sequence."""
        make = torch.zeros if self.problem.mask.packed else torch.empty
        return make(shape, dtype=dtype, device=self.device)

    def rows(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, Hq, Sq) to be filled."""
        return self.empty(*self.inputs.q.shape[:3], dtype=dtype)

    def vectors(self, dtype: torch.dtype = torch.float32, width: int | None = None) -> Tensor:
        """(B, Hq, Sq, D) to be filled."""
        return self.empty(*self.inputs.q.shape[:3], width or self.problem.head_dim, dtype=dtype)

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """Of batch, head and row of each."""
        if self.problem.mask.packed:
            return tuple([stride for t in tensors for stride in (0, *t.stride()[1:3])])
        return tuple([stride for t in tensors for stride in t.stride()[:3]])

    def target(self, out: Tensor) -> Tensor:
        """What a kernel writes instead of ``out``: itself, where its rows are such as kernels take."""
        rowed = out if with_unit_stride(out) is out else out.new_empty(out.shape)
        return rowed.zero_() if self.problem.mask.packed else rowed  # no program comes to tokens of no sequence

    def first_keys(self, k: Tensor) -> Tensor:
        if self.problem.mask.packed:
            first, _ = sequence_bounds(self.inputs.cu_seqlens_k, self.problem.k_len, self.problem.max_seqlen_k)
            found = k[0].index_select(1, first.clamp(max=self.problem.k_len - 1)).transpose(0, 1)  # (sequences, Hkv, D)
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
        logit = self.problem.scale * (self.q * origin).sum(-1)
        return lse - sign * logit, k_mean - sign * origin

    def cast(self, *tensors: Tensor) -> tuple[Any, ...]:
        """q, k and v contiguous and finite, in the operands' dtype and in units of a head; these units; and which heads
        and which rows of q, k and v were not finite."""
        # Chunks of rows that look for a head's largest number side by side; the interpreter has no sides.
        chunks = 16 if self.device.type == "cuda" else 1
        longest, slots = max(self.max_seqlens), self.n_heads + 2 * self.n_kv_heads
        chunk = cdiv(cdiv(longest, chunks), CAST_ROWS) * CAST_ROWS
        largest, flawed = torch.empty(2, slots, chunks, device=self.device)
        units, flaws = torch.empty(2, slots, device=self.device)
        outs = [torch.empty(t.shape, dtype=self.operand, device=self.device) for t in tensors]
        row_flaws = [torch.empty(t.shape[:3], device=self.device) for t in tensors]
        sizes = {"CHUNKS": chunks, "BLOCK_M": CAST_ROWS, **self.dims}
        strides = self.strides(*tensors)
        self.launch(
            prepare.largest_kernel, "cast", (self.n_heads * chunks, 3), *tensors, self.k_most, largest, flawed,
            *strides, *self.seqlens, *self.lengths, chunk, **sizes,
        )  # fmt: skip
        self.launch(
            prepare.cast_kernel, "cast", (self.n_heads * cdiv(longest, CAST_ROWS), 3), *tensors, self.k_most,
            self.origin, largest, flawed, *outs, units, flaws, *row_flaws, *strides, *self.seqlens, *self.lengths,
            **sizes,
        )  # fmt: skip
        return (*outs, units, (flaws, *row_flaws))

    def cast_rows(self, grad_o: Tensor, guard: Tensor, probe: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``guard * grad_o`` in the operands' dtype, contiguous, in units of a power of two a row, and those units; the
        probe so, in rows of unit length, and their lengths."""
        grad_o = with_unit_stride(grad_o)
        do, do_unit = self.vectors(self.operand, grad_o.shape[-1]), self.rows()
        z, z_size = self.vectors(self.operand), self.rows()
        self.launch(
            prepare.cast_rows_kernel, "cast", (self.n_heads * cdiv(self.max_seqlens[0], CAST_ROWS),),
            grad_o, guard, probe, do, do_unit, z, z_size, *self.strides(grad_o), self.seqlens[0], *self.lengths,
            PRECISION=self.precision, BLOCK_M=CAST_ROWS, **self.dims,
        )  # fmt: skip
        return do, do_unit, z, z_size

    def launch_tiles(
        self, kernel: Any, name: str, *arguments: Any, over_keys: bool = False, tune: bool = True, **settings: Any
    ) -> None:
        """Launch ``kernel`` of pass ``name``, one program a tile of queries (``over_keys``: of keys) and head;
        ``tune``: with the config that FLASHLLA_AUTOTUNE=1 finds."""
        heads = self.n_kv_heads if over_keys else self.n_heads
        settings.update(self.dims, CAUSAL=self.problem.mask.causal, PRECISION=self.precision)
        programs = lambda c: heads * cdiv(self.max_seqlens[over_keys], c.n if over_keys else c.m)

        def with_config(c: configs.Config) -> None:
            self.launch(kernel, name, (programs(c),), *arguments, **c.options(), **settings)

        with_config(self.config(name, programs, with_config if tune else None))

    def config(
        self, name: str, programs: Callable[[configs.Config], int], with_config: Callable[[configs.Config], None] | None
    ) -> configs.Config:
        key = (name, max(self.problem.head_dim, self.problem.v_dim), self.operand, configs.capability(self.device))
        usual, few = configs.config(*key), configs.config(*key, few=True)
        if few is not usual and programs(usual) <= FEW * configs.processors(self.device):
            return few
        if with_config is None or os.environ.get("FLASHLLA_AUTOTUNE") != "1" or self.device.type != "cuda":
            return usual
        if key not in _tuned:
            _tuned[key] = fastest(configs.candidates(*key), with_config)
        return _tuned[key]

    def launch(self, kernel: Any, name: str, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        launch(kernel, name, grid, self.device, *arguments, **settings)


def launch(
    kernel: Any, name: str, grid: tuple[int, ...], device: torch.device, *arguments: Any, **settings: Any
) -> None:  # fmt: skip
    """Launch ``kernel`` of pass ``name``.

    From the second launch of a kind on without Triton's look at every argument, which takes as long as a short kernel.
    """
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    on_device = torch.cuda.device(device) if elsewhere else contextlib.nullcontext()
    key = kernel, device, tuple(settings.items()), kinds(arguments)
    try:
        with on_device:
            if (known := _compiled.get(key)) is not None:
                compiled, rest = known
                compiled[(*grid, 1, 1)[:3]](*arguments, *rest)
                return
            compiled = kernel[grid](*arguments, **settings, **COMPILER)
            if compiled is not None:  # it is None in Triton's interpreter
                _compiled[key] = compiled, [settings[parameter] for parameter in kernel.arg_names[len(arguments) :]]
    except Exception as error:
        dtypes = {str(a.dtype).removeprefix("torch.") for a in arguments[:3] if isinstance(a, Tensor)}
        raise RuntimeError(
            f"flashlla: the Triton backends could not compile or launch kernel {kernel.__name__} (pass {name!r}, "
            f"{', '.join(sorted(dtypes))}, config {settings}) on {device} with Triton {triton.__version__}. "
            f"Use another backend: flashlla.set_backend('chunked'), or FLASHLLA_BACKEND=chunked."
        ) from error


def kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a kernel's arguments all that Triton compiles for: None or not, dtypes and whether pointers are aligned, and
    of integers whether they are 1, multiples of 16 and of 32 bits."""
    return tuple([
        (x == 1, x % 16 == 0, x.bit_length() < 32) if type(x) is int
        else type(x) if x is None or type(x) is float
        else (x.dtype, x.data_ptr() % 16 == 0)
        for x in arguments
    ])  # fmt: skip


def with_unit_stride(t: Tensor) -> Tensor:
    """``t``, copied only where its last dimension is not contiguous, or rows are so far apart that the offsets within a
    tile, which are of 32 bits, would not hold them."""
    near = t.stride(2) < 2**24 and (t.stride(-1) == 1 or t.shape[-1] == 1)
    return t if near else t.contiguous()


def fastest(configs_: list[configs.Config], with_config: Callable[[configs.Config], None]) -> configs.Config:
    """The config that runs fastest; one that does not compile is none of them."""
    times = {}
    for c in configs_:
        with contextlib.suppress(RuntimeError):
            times[c] = triton.testing.do_bench(lambda c=c: with_config(c), warmup=5, rep=20, return_mode="median")
    return min(times, key=times.__getitem__) if times else configs_[0]


def tolerances(problem: Problem, adjoint: bool) -> tuple[float, float, float, int]:
    """atol, rtol and cap of the solver, rtol no smaller than the dtype can make use of; and before the cap, what rtol
    may be where queries see many keys.

    Of bfloat16 inputs, whose outputs have eight bits, the probe may be coarser there than the adjoint probe: dlambda,
    the most sensitive gradient, is off by as much as the adjoint probe is. docs/performance.md has the measurement.
    """
    solver: Any = problem.solver
    floor = resolution(problem.dtype)
    coarse = (PROBE_SLACK * floor) ** 2 if problem.dtype == torch.bfloat16 and not adjoint else 0.0
    return float(solver.atol), max(float(solver.rtol), floor**2), coarse, int(solver.max_iters)


def forward(problem: Problem, inputs: Inputs, preconditioner: str) -> Forward:
    """The passes of operator section 4: statistics, solve, output."""
    call = Call(problem, inputs)
    q, k, v = call.q, call.k, call.v
    lse, lse2, omega, k_mean, image = call.rows(), call.rows(), call.rows(), call.vectors(), call.vectors()
    call.launch_tiles(
        forward_kernels.statistics_kernel, "statistics", q, k, call.units, *call.flaws, lse, lse2, omega, k_mean,
        image, *call.strides(q, k), *call.where, problem.scale, FLIP=problem.scale < 0,
    )  # fmt: skip
    probe = call.vectors()
    iterations, residual, converged = call.rows(torch.int32), call.rows(), call.rows(torch.bool)
    if problem.mask.packed:
        converged.fill_(True)
    report = iterations, residual, converged
    solve(call, inputs.ridge_lambda, lse2, k_mean, image, probe, preconditioner, report=report)
    del image
    guard, o = call.rows(), empty_output(inputs.q, inputs.v)
    o_rows = call.target(o)
    call.launch_tiles(
        forward_kernels.output_kernel, "output", q, k, v, call.units, call.origin, lse2, omega, k_mean, probe, guard,
        o_rows, *call.strides(q, k, v, o_rows), *call.where, problem.scale, problem.delta_eps,
    )  # fmt: skip
    if o_rows is not o:
        o.copy_(o_rows)
    lse, k_mean = call.moved(lse, k_mean, back=True)
    return Forward(o, Residuals(lse, guard, probe, k_mean), Report(omega, *report))


def solve(
    call: Call, ridge: Tensor, lse2: Tensor, k_mean: Tensor, b: Tensor, x: Tensor, preconditioner: str, *,
    report: tuple[Tensor, ...] | None = None, adjoint: tuple[Tensor, ...] | None = None,
) -> None:  # fmt: skip
    """Launch the one solve kernel: for the probe, with the ``report`` to fill (iterations, residual, converged); or for
    the ``adjoint`` probe, with the lengths of ``b``'s rows, the probe and z.y to fill."""
    iterations, residual, converged = report or (lse2,) * 3  # what is not given is not touched
    b_size, probe, z_y = adjoint or (lse2,) * 3
    segments = cdiv(call.problem.q_len, gram_kernels.SEGMENT)
    inverse, use = None, None
    if preconditioner == "gram":
        inverse, use = gram(call, ridge, k_mean, b, probe, segments, adjoint is not None)
    for which in ("none", "gram") if preconditioner == "gram" else (preconditioner,):
        call.launch_tiles(
            solve_kernel, "solve_gram" if which == "gram" else "solve",
            call.q, call.k, call.units, call.origin, lse2, k_mean, ridge, b, b_size, probe, inverse, use, x,
            z_y, iterations, residual, converged,
            *call.strides(call.q, call.k, ridge), *call.where, call.problem.scale,
            *tolerances(call.problem, adjoint is not None), segments,
            ADJOINT=adjoint is not None, PRECONDITIONER=which, SEGMENT=gram_kernels.SEGMENT,
            tune=preconditioner != "gram",  # either may have no tile that is its own
        )  # fmt: skip


def gram(
    call: Call, ridge: Tensor, k_mean: Tensor, b: Tensor, probe: Tensor, segments: int, adjoint: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The preconditioner "gram": the matrices, and which ``segments`` of queries have one."""
    d, segment = call.dims["BLOCK_D"], gram_kernels.SEGMENT
    chunks = cdiv(call.problem.k_len, segment)
    sums = torch.empty(call.n_kv_heads, chunks, d + 1, d, device=call.device)
    inverse = torch.empty(call.n_heads, segments, d, d, dtype=call.operand, device=call.device)
    scratch = torch.empty(call.n_heads, segments, 2 * d, d, device=call.device)
    use = torch.empty(call.n_heads, segments, dtype=torch.int32, device=call.device)
    common = {"CAUSAL": call.problem.mask.causal, "PRECISION": call.precision, "SEGMENT": segment, **call.dims}
    call.launch(
        gram_kernels.gram_sums_kernel, "gram", (call.n_kv_heads * chunks,), call.k, sums, *call.strides(call.k),
        *call.where, chunks, **gram_kernels.sums_settings(d), **common,
    )  # fmt: skip
    call.launch(
        gram_kernels.gram_kernel, "gram", (call.n_heads * segments,), call.q, sums, call.units, call.origin,
        k_mean, ridge, b, probe, scratch, inverse, use, *call.strides(call.q, ridge), *call.where, chunks, segments,
        ADJOINT=adjoint, **gram_kernels.settings(d), **common,
    )  # fmt: skip
    return inverse, use


def backward(
    problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor, preconditioner: str
) -> Gradients:  # fmt: skip
    """The passes of operator section 4: moments, solve, dq with dlambda, dk and dv."""
    call = Call(problem, inputs)
    q, k, v, ridge = call.q, call.k, call.v, inputs.ridge_lambda
    lse, guard, probe, k_mean = (t.contiguous() for t in residuals)
    do, do_unit, z, z_size = call.cast_rows(grad_o, guard, probe)
    given, k_mean = call.moved(lse, k_mean)
    given, k_mean = given.contiguous(), k_mean.contiguous()
    lse2, t, t_size, g_near = call.rows(), call.vectors(), call.rows(), None
    # float32 takes them twice, then about the g_mean of the first time: its t shall hold where weights are sharp.
    for _ in range(1 if call.operand == torch.float16 else 2):
        g_mean = call.rows()
        call.launch_tiles(
            backward_kernels.moments_kernel, "moments", q, k, v, do, call.units, given, k_mean, g_near, lse2, t, t_size,
            g_mean, *call.strides(q, k, v), *call.where, problem.scale,
        )  # fmt: skip
        g_near = g_mean
    y_neg, z_y = call.vectors(call.operand), call.rows()
    solve(call, ridge, lse2, k_mean, t, y_neg, preconditioner, adjoint=(t_size, probe, z_y))
    del t
    dq, dk, dv = (torch.empty_like(x) for x in inputs[:3])
    outs = [call.target(x) for x in (dq, dk, dv)]
    dridge = call.rows()
    # What queries hand on to keys: whole tiles of queries, a sequence's apart from the next one's.
    tiles = cdiv(problem.q_len, configs.ROWS_PAD) + (problem.sequences if problem.mask.packed else 0)
    rows = torch.empty(5, problem.batch * problem.q_heads, tiles * configs.ROWS_PAD, device=call.device)
    top = torch.zeros(call.n_kv_heads, device=call.device)
    call.launch_tiles(
        backward_kernels.dq_kernel, "dq", q, k, v, do, y_neg, z, call.units, call.origin, do_unit, z_size, z_y, lse2,
        k_mean, ridge, g_mean, outs[0], dridge, rows, top, rows.stride(1), rows.stride(0),
        *call.strides(q, k, v, ridge, outs[0]), *call.where, problem.scale,
    )  # fmt: skip
    call.launch_tiles(
        backward_kernels.dk_kernel, "dk", q, k, v, do, y_neg, z, call.units, rows, top, outs[1], outs[2],
        rows.stride(1), rows.stride(0), *call.strides(q, k, v, outs[1], outs[2]), *call.where, problem.scale,
        over_keys=True, GROUP=problem.group,
    )  # fmt: skip
    for x, rowed in zip((dq, dk, dv), outs):
        if rowed is not x:
            x.copy_(rowed)
    return Gradients(dq, dk, dv, dridge)
