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
from flashlla.backends.triton.solve import solve_kernel
from flashlla.problem import Forward, Gradients, Inputs, Problem, Report, Residuals, empty_output, resolution

# Rows that one program of the cast kernels takes.
CAST_ROWS = 64
# What a query hands on to the keys' pass is kept for whole tiles of queries; none has more than this.
ROWS_PAD = 128
# How much coarser than the dtype's resolution the probe of 16-bit inputs may be.
PROBE_SLACK = 2.0
# Without fused multiply-adds, which Triton means to stop using by default, every sweep takes a third more instructions.
COMPILER = {"enable_fp_fusion": True}
_tuned: dict[tuple[Any, ...], configs.Config] = {}


def capability(device: torch.device) -> tuple[int, int]:
    """Of the device; on the CPU, in Triton's interpreter, that of the architecture most configs were made for."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


class Launcher:
    """The kernels of one call: what all their launches share."""

    def __init__(self, problem: Problem, inputs: Inputs) -> None:
        self.problem = problem
        self.n_heads = problem.batch * problem.q_heads
        half = problem.dtype != torch.float32
        self.operand = torch.float16 if half else torch.float32
        full = torch.get_float32_matmul_precision() == "highest"
        self.settings = {
            "HEAD_DIM": problem.head_dim,
            "CAUSAL": problem.mask.causal,
            "PRECISION": "ieee" if half or full else "tf32",
        }
        self.lengths = (self.n_heads, problem.q_heads, problem.q_len, problem.k_len)
        self.device = problem.device
        q, k, v = (with_unit_stride(t) for t in inputs[:3])
        self.units = (q.new_empty if half else q.new_ones)((3, self.n_heads), dtype=torch.float32)
        # float32 has digits to lose: keys are taken relative to their sequence's first (docs/math.md, section 6).
        self.origin = None if half else k[:, :, 0].nan_to_num(0.0, 0.0, 0.0).contiguous()  # (B, H, D)
        if self.origin is not None:
            k = with_unit_stride(k - self.origin.unsqueeze(2))
        self.q, self.k, self.v = self.cast(q, k, v) if half else (q, k, v)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def rows(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised (B, H, S)."""
        return self.empty(*self.rows_shape, dtype=dtype)

    def vectors(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised (B, H, S, D)."""
        return self.empty(*self.rows_shape, self.problem.head_dim, dtype=dtype)

    @property
    def rows_shape(self) -> tuple[int, int, int]:
        return self.problem.batch, self.problem.q_heads, self.problem.q_len

    def moved(self, lse: Tensor, k_mean: Tensor, back: bool = False) -> tuple[Tensor, Tensor]:
        """lse and k_mean of keys as they came, for keys as the kernels have them; ``back``: the other way."""
        if self.origin is None:
            return lse, k_mean
        sign, origin = -1 if back else 1, self.origin.unsqueeze(2)
        logit = self.problem.scale * (self.q * origin).sum(-1)
        return lse - sign * logit, k_mean - sign * origin

    def cast(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """q, k and v in float16, contiguous, in units of a power of two a head, with which ``self.units`` is filled."""
        batch, heads, length, d = tensors[0].shape
        # Runs of rows that look for a head's largest number side by side; the interpreter has no sides.
        chunks = 16 if self.device.type == "cuda" else 1
        chunk = triton.cdiv(triton.cdiv(length, chunks), CAST_ROWS) * CAST_ROWS
        largest = self.empty(3, self.n_heads, chunks)
        y = self.empty(3, batch, heads, length, d, dtype=torch.float16)
        sizes = {"HEAD_DIM": d, "CHUNKS": chunks, "BLOCK_M": CAST_ROWS, "BLOCK_D": configs.padded(d)}
        strides = [stride for t in tensors for stride in t.stride()[:3]]
        self.run(
            prepare.largest_kernel, "cast", (self.n_heads * chunks, 3), *tensors, largest, *strides,
            heads, length, chunk, **sizes,
        )  # fmt: skip
        self.run(
            prepare.cast_kernel, "cast", (self.n_heads * triton.cdiv(length, CAST_ROWS), 3), *tensors, largest, y,
            self.units,
            *strides, self.n_heads, heads, length, **sizes,
        )  # fmt: skip
        return y.unbind(0)

    def cast_rows(self, grad_o: Tensor, guard: Tensor, probe: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``guard * grad_o`` in the operands' dtype, contiguous, in units of a power of two a row, and those units; the
        probe so, in rows of unit length, and their lengths."""
        grad_o = with_unit_stride(grad_o)
        y, y_unit, z, z_size = self.vectors(self.operand), self.rows(), self.vectors(self.operand), self.rows()
        length, d = grad_o.shape[2:]
        self.run(
            prepare.cast_rows_kernel, "cast", (self.n_heads * triton.cdiv(length, CAST_ROWS),),
            grad_o, guard, probe, y, y_unit, z, z_size, *grad_o.stride()[:3], grad_o.shape[1], length,
            HEAD_DIM=d, PRECISION=self.settings["PRECISION"], BLOCK_D=configs.padded(d), BLOCK_M=CAST_ROWS,
        )  # fmt: skip
        return y, y_unit, z, z_size

    def sweep(self, kernel: Any, name: str, *arguments: Any, over_keys: bool = False, **settings: Any) -> None:
        """Launch ``kernel`` of pass ``name``, one program a tile of queries (``over_keys``: of keys) and head."""
        length = self.problem.k_len if over_keys else self.problem.q_len
        settings.update(self.settings, BLOCK_D=configs.padded(self.problem.head_dim))

        def with_config(c: configs.Config) -> None:
            tiles = triton.cdiv(length, c.n if over_keys else c.m)
            self.run(kernel, name, (self.n_heads * tiles,), *arguments, **c.options(), **settings)

        with_config(self.config(name, with_config))

    def config(self, name: str, with_config: Callable[[configs.Config], None]) -> configs.Config:
        key = (name, self.problem.head_dim, self.operand, capability(self.device))
        if os.environ.get("FLASHLLA_AUTOTUNE") != "1" or self.device.type != "cuda":
            return configs.config(*key)
        if key not in _tuned:
            _tuned[key] = fastest(configs.candidates(*key), with_config)
        return _tuned[key]

    def run(self, kernel: Any, name: str, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        try:
            with on_device:
                kernel[grid](*arguments, **settings, **COMPILER)
        except Exception as error:
            tiles = {n: value for n, value in settings.items() if n not in ("HEAD_DIM", "CAUSAL")}
            raise RuntimeError(
                f"flashlla: the Triton backends could not compile or launch kernel {kernel.__name__} (pass {name!r}, "
                f"head dim {self.problem.head_dim}, {self.problem.dtype}, config {tiles}) on {self.device} with Triton "
                f"{triton.__version__}. Use another backend: flashlla.set_backend('chunked'), "
                f"or FLASHLLA_BACKEND=chunked."
            ) from error


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


def tolerances(problem: Problem, adjoint: bool) -> tuple[float, float, int]:
    """atol, rtol and cap of the solver, rtol no smaller than the dtype can make use of.

    Of 16-bit inputs the probe may be coarser than the adjoint probe: dlambda, the most sensitive gradient, is off by as
    much as the adjoint probe is. docs/performance.md has the measurement.
    """
    solver: Any = problem.solver
    floor = resolution(problem.dtype) * (1 if adjoint or problem.dtype == torch.float32 else PROBE_SLACK)
    return solver.atol, max(solver.rtol, floor**2), solver.max_iters


def forward(problem: Problem, inputs: Inputs, preconditioner: str) -> Forward:
    """The passes of operator section 4: statistics, solve, output."""
    at = Launcher(problem, inputs)
    q, k, v = at.q, at.k, at.v
    lse, omega, k_mean, image = at.rows(), at.rows(), at.vectors(), at.vectors()
    at.sweep(
        forward_kernels.statistics_kernel, "statistics", q, k, at.units, lse, omega, k_mean, image,
        *q.stride()[:3], *k.stride()[:3], *at.lengths, problem.scale, FLIP=problem.scale < 0,
    )  # fmt: skip
    probe = at.vectors()
    iterations, residual, converged = at.rows(torch.int32), at.rows(), at.rows(torch.bool)
    report = iterations, residual, converged
    solve(at, inputs.ridge_lambda, lse, k_mean, image, probe, preconditioner, report=report)
    del image
    guard, o = at.rows(), empty_output(inputs.q, inputs.v)
    o_rows = o if with_unit_stride(o) is o else torch.empty_like(o, memory_format=torch.contiguous_format)
    at.sweep(
        forward_kernels.output_kernel, "output", q, k, v, at.units, at.origin, lse, omega, k_mean, probe, guard, o_rows,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o_rows.stride()[:3], *at.lengths,
        problem.scale, problem.delta_eps,
    )  # fmt: skip
    if o_rows is not o:
        o.copy_(o_rows)
    lse, k_mean = at.moved(lse, k_mean, back=True)
    return Forward(o, Residuals(lse, guard, probe, k_mean), Report(omega, *report))


def solve(
    at: Launcher, ridge: Tensor, lse: Tensor, k_mean: Tensor, b: Tensor, x: Tensor, preconditioner: str, *,
    report: tuple[Tensor, ...] | None = None, adjoint: tuple[Tensor, ...] | None = None,
) -> None:  # fmt: skip
    """Launch the one solve kernel: for the probe, with the ``report`` to fill (iterations, residual, converged); or for
    the ``adjoint`` probe, with the lengths of ``b``'s rows, the probe and z.y to fill."""
    iterations, residual, converged = report or (lse,) * 3  # what is not given is not touched
    b_size, probe, z_y = adjoint or (lse,) * 3
    at.sweep(
        solve_kernel, "solve", at.q, at.k, at.units, at.origin, lse, k_mean, ridge, b, b_size, probe, x,
        z_y, iterations, residual, converged,
        *at.q.stride()[:3], *at.k.stride()[:3], *ridge.stride(), *at.lengths, at.problem.scale,
        *tolerances(at.problem, adjoint is not None), ADJOINT=adjoint is not None, PRECONDITIONER=preconditioner,
    )  # fmt: skip


def backward(
    problem: Problem, inputs: Inputs, residuals: Residuals, grad_o: Tensor, preconditioner: str
) -> Gradients:  # fmt: skip
    """The passes of operator section 4: moments, solve, dq with dlambda, dk and dv."""
    at = Launcher(problem, inputs)
    q, k, v = at.q, at.k, at.v
    lse, guard, probe, k_mean = (t.contiguous() for t in residuals)
    do, do_unit, z, z_size = at.cast_rows(grad_o, guard, probe)
    given, k_mean = at.moved(lse, k_mean)
    lse, t, t_size, g_near = at.rows(), at.vectors(), at.rows(), None
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    # float32 takes them twice, then about the g_mean of the first time: its t shall hold where weights are sharp.
    for _ in range(1 if at.operand == torch.float16 else 2):
        g_mean = at.rows()
        at.sweep(
            backward_kernels.moments_kernel, "moments", q, k, v, do, at.units, given, k_mean, g_near, lse, t, t_size,
            g_mean, *strides, *at.lengths, problem.scale,
        )  # fmt: skip
        g_near = g_mean
    y_neg, z_y = at.vectors(at.operand), at.rows()
    solve(at, inputs.ridge_lambda, lse, k_mean, t, y_neg, preconditioner, adjoint=(t_size, probe, z_y))
    del t
    dq, dk, dv = (torch.empty_like(x) for x in inputs[:3])
    outs = [x if with_unit_stride(x) is x else x.new_empty(x.shape) for x in (dq, dk, dv)]
    dridge = at.rows()
    rows = at.empty(6, at.n_heads, triton.cdiv(problem.q_len, ROWS_PAD) * ROWS_PAD)
    at.sweep(
        backward_kernels.dq_kernel, "dq", q, k, v, do, y_neg, z, at.units, at.origin, do_unit, z_size, z_y, lse, k_mean,
        inputs.ridge_lambda, g_mean, outs[0], dridge, rows, rows.stride(1),
        *strides, *inputs.ridge_lambda.stride(), *outs[0].stride()[:3], *at.lengths, problem.scale,
    )  # fmt: skip
    at.sweep(
        backward_kernels.dk_kernel, "dk", q, k, v, do, y_neg, z, at.units, rows,
        rows[5, :, : problem.q_len].amax(-1), outs[1], outs[2], rows.stride(1),
        *strides, *outs[1].stride()[:3], *outs[2].stride()[:3], *at.lengths, problem.scale, over_keys=True,
    )  # fmt: skip
    for x, rowed in zip((dq, dk, dv), outs):
        if rowed is not x:
            x.copy_(rowed)
    return Gradients(dq, dk, dv, dridge)
