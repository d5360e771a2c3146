"""Compile every kernel for CUDA architectures, without a GPU: shared memory, registers, spills.

    python benchmarks/compile_report.py                                    # every config and dtype, 80, 90 and 100
    python benchmarks/compile_report.py --architectures 90 --dims 64 128 --dtypes bfloat16

Exits with 1 where a kernel does not compile, needs more shared memory than the architecture has, or spills heavily.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from flashlla.problem import Inputs, Problem, Residuals
from flashlla.solvers import CG

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes a thread of stack, which is what spilled registers live in. A few dozen registers stored around a sweep, not
# inside it, cost nothing that can be measured; more do.
STACK_LIMIT = 512
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


def launches(
    head_dim: int, dtype: torch.dtype, architecture: int, precision: str
) -> list[tuple[Any, str, tuple, dict]]:
    """(kernel, pass, arguments, settings) of each launch of a step, forward and backward, all preconditioners."""
    from flashlla.backends.triton import launch

    found: list[tuple[Any, str, tuple, dict]] = []

    def record(self: Any, kernel: Any, name: str, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
        found.append((kernel, name, arguments, settings))

    shape = (2, 3, 512, head_dim)
    x = torch.empty(shape, dtype=dtype, device="meta")
    rows = torch.empty(shape[:3], device="meta")
    vectors = torch.empty(shape, device="meta")
    problem = Problem(2, 3, 3, 512, 512, head_dim, head_dim, dtype, x.device, 0.3, 1e-12, CG())
    inputs = Inputs(x, x, x, rows)
    with (
        mock.patch.object(launch.Launcher, "run", record),
        mock.patch.object(launch, "capability", lambda _: divmod(architecture, 10)),
        mock.patch.object(torch, "get_float32_matmul_precision", lambda: precision),
    ):
        launch.forward(problem, inputs, "none")
        launch.backward(problem, inputs, Residuals(rows, rows, vectors, vectors), x, "none")
        launch.forward(problem, inputs, "jacobi")
    unique = {(k.__name__, str(sorted(s.items()))): (k, n, a, s) for k, n, a, s in found}
    return list(unique.values())


def compile_launch(kernel: Any, arguments: tuple, settings: dict, architecture: int) -> dict[str, Any]:
    """Shared memory, registers and stack of one compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: settings[name] for name in ("num_warps", "num_stages", "maxnreg") if name in settings}
    constants: dict[str, Any] = {n: v for n, v in settings.items() if n not in options}
    signature, attributes = {}, {}
    for index, param in enumerate(kernel.params):
        if param.name in constants:
            signature[param.name] = "constexpr"
            continue
        value = arguments[index]
        if isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
        else:
            signature[param.name] = "fp32" if isinstance(value, float) else "i32"
        divisible = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if divisible and not param.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return {"shared": compiled.metadata.shared, **resources(compiled.asm["cubin"])}


def resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {
        name.lower(): int(found.group(1)) if (found := re.search(rf"\b{name}:(\d+)", text)) else -1
        for name in ("REG", "STACK")
    }


def report(task: tuple[int, str, int, str]) -> list[dict[str, Any]]:
    """All kernels of one architecture, dtype, head dim and precision."""
    architecture, dtype, head_dim, precision = task
    lines = []
    for kernel, name, arguments, settings in launches(head_dim, DTYPES[dtype], architecture, precision):
        line: dict[str, Any] = {
            "architecture": architecture, "dtype": dtype, "precision": precision, "dim": head_dim, "pass": name,
            "kernel": kernel.__name__, "preconditioner": settings.get("PRECONDITIONER", ""),
            "adjoint": settings.get("ADJOINT", ""),
            "config": [settings.get(s) for s in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")],
        }  # fmt: skip
        try:
            line |= compile_launch(kernel, arguments, settings, architecture)
            too_much = line["shared"] > SHARED_LIMIT[architecture]
            line["verdict"] = "shared memory" if too_much else "spills" if line["stack"] > STACK_LIMIT else "ok"
        except Exception as error:
            line["verdict"] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        lines.append(line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 64, 80, 128, 256])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float16", "float32"])
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args()
    tasks = [
        (architecture, dtype, dim, precision)
        for architecture in options.architectures
        for dtype in options.dtypes
        for dim in options.dims
        for precision in (("highest", "high") if dtype == "float32" else ("highest",))
    ]
    lines: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.workers) as pool:
        for found in pool.map(report, tasks):
            lines += found
            for x in found:
                print(
                    f"sm_{x['architecture']:<4}{x['dtype']:<9}{x['precision']:<8}D={x['dim']:<4}{x['kernel']:<18}"
                    f"{x['preconditioner']:<7}{x['adjoint']!s:<6}{x['config']!s:<18}"
                    f"shared {x.get('shared', -1):>7}  registers {x.get('reg', -1):>4}  stack {x.get('stack', -1):>5}"
                    f"  {x['verdict']}",
                    flush=True,
                )
    if options.json:
        import triton

        header = {"triton": triton.__version__, "torch": torch.__version__}
        options.json.write_text(json.dumps({**header, "kernels": lines}, indent=1) + "\n")
    bad = [x for x in lines if x["verdict"] != "ok"]
    print(f"{len(lines)} kernels, {len(bad)} not ok")
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # it would replace the compiler
    sys.exit(main())
