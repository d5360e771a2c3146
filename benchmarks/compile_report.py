"""Compile every kernel for CUDA architectures, without a GPU: shared memory, registers, spills.

    python benchmarks/compile_report.py                                    # every config, dtype and architecture
    python benchmarks/compile_report.py --architectures 90 --dims 64 128 --dtypes bfloat16

Exits with 1 where a kernel does not compile, needs more shared memory than the architecture has, spills heavily, or
waits for single matrix instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from flashlla.backends.triton import configs
from flashlla.problem import Inputs, Mask, Problem, Residuals
from flashlla.solvers import CG

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# Spilled registers (loads and stores of local memory) as a share of a sweep's instructions: of the tiles seen whole,
# and of the few that the mask cuts. Spills between sweeps cost nothing that can be measured; capping registers to make
# room for another program buys more than they cost.
SPILLS, SPILLS_CUT = 0.10, 0.30
# Waits a matrix instruction (see `waits`): 1 where the assembler has put them one after the other.
WAITS = 0.9
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.bool: "*i1",
}


def calls(head_dim: int, dtype: torch.dtype, architecture: int) -> Iterator[tuple[Problem, Inputs, str]]:
    """What is compiled: (problem, its inputs, preconditioner) of the plain call, then of what makes other kernels."""
    meta = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device="meta")
    q, shared = meta(2, 6, 512, head_dim, dtype=dtype), meta(2, 2, 512, head_dim, dtype=dtype)
    rows, cu_seqlens = meta(2, 6, 512, dtype=torch.float32), meta(9)
    plain = Problem(2, 6, 6, 512, 512, head_dim, head_dim, dtype, q.device, 0.3, 1e-12, CG())
    grouped = dataclasses.replace(plain, kv_heads=2)
    packed = dataclasses.replace(
        grouped, batch=1, sequences=8, max_seqlen_q=512, max_seqlen_k=512, mask=Mask(packed=True)
    )
    few = meta(1, 1, 32, head_dim, dtype=dtype)
    yield plain, Inputs(q, q, q, rows), "none"
    yield (
        dataclasses.replace(plain, batch=1, q_heads=1, kv_heads=1, q_len=32, k_len=32),
        Inputs(few, few, few, meta(1, 1, 32, dtype=torch.float32)), "none",
    )  # fmt: skip
    yield plain, Inputs(q, q, q, rows), "jacobi"
    if head_dim <= configs.gram_widest(dtype, divmod(architecture, 10)):
        yield plain, Inputs(q, q, q, rows), "gram"
    yield dataclasses.replace(plain, mask=Mask(causal=False)), Inputs(q, q, q, rows), "none"
    yield grouped, Inputs(q, shared, shared, rows), "none"
    yield dataclasses.replace(plain, mask=Mask(window=100)), Inputs(q, q, q, rows), "none"
    yield dataclasses.replace(plain, mask=Mask(padded=True)), Inputs(q, q, q, rows, meta(2)), "none"
    yield packed, Inputs(*(t[:1] for t in (q, shared, shared, rows)), None, cu_seqlens, cu_seqlens), "none"


def decodings(head_dim: int, dtype: torch.dtype, plain: bool) -> None:
    """Decode: the cache in one piece, in several, and (not ``plain``) in pages larger and smaller than tiles."""
    from flashlla.backends.triton import decode

    meta = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device="meta")
    q, ridge = meta(2, 6, 1, head_dim, dtype=dtype), meta(2, 6, 1, dtype=torch.float32)
    width = configs.padded(head_dim)
    full = torch.get_float32_matmul_precision() == "highest"
    large = configs.large(configs.capability(q.device))
    usual = decode.tuning(width, width, dtype != torch.float32, full, large)
    for page in (0,) if plain else (0, 16, 256):
        cache = meta(*((32, 2, page) if page else (2, 2, 4096)), head_dim, dtype=dtype)
        table = meta(2, 4096 // page) if page else None
        for pieces in (1, 4):
            tuned = usual._replace(pieces=pieces)
            decode.decode(q, cache, cache, meta(2), ridge, 0.3, 1e-12, None, table, torch.empty_like(q), tuned)


def launches(
    head_dim: int, dtype: torch.dtype, architecture: int, precision: str, plain: bool = False
) -> list[tuple[Any, str, tuple, dict]]:
    """(kernel, pass, arguments, settings) of each launch of a step, forward and backward, and of decoding; ``plain``:
    of the plain call and the preconditioned ones, and of a cache without pages."""
    from flashlla.backends.triton import decode, launch

    found: list[tuple[Any, str, tuple, dict]] = []

    def record(kernel: Any, name: str, grid: Any, device: torch.device, *arguments: Any, **settings: Any) -> None:
        found.append((kernel, name, arguments, settings))

    with (
        mock.patch.object(launch, "launch", record),
        mock.patch.object(decode, "launch", record),
        mock.patch.object(configs, "capability", return_value=divmod(architecture, 10)),
        mock.patch.object(torch, "get_float32_matmul_precision", return_value=precision),
    ):
        for problem, inputs, preconditioner in calls(head_dim, dtype, architecture):
            if plain and (problem.mask != Mask() or problem.group > 1):
                continue
            launch.forward(problem, inputs, preconditioner)
            rows = inputs.ridge_lambda
            vectors = torch.empty(inputs.q.shape, device="meta")
            launch.backward(problem, inputs, Residuals(rows, rows, vectors, vectors), inputs.q, preconditioner)
        decodings(head_dim, dtype, plain)
    given = lambda arguments: tuple(x is None for x in arguments)
    unique = {(k.__name__, given(a), str(sorted(s.items()))): (k, n, a, s) for k, n, a, s in found}
    return list(unique.values())


def variant(kernel: Any, arguments: tuple, settings: dict) -> str:
    """What the call asks for beyond the plain one, as far as the kernel knows of it."""
    given = {param.name: value for param, value in zip(kernel.params, arguments)}
    training = "cu_seqlens_q" in given  # to decode lengths always are there, and the window is a number
    found = ["packed"] if given.get("cu_seqlens_q") is not None else []
    found += [name for name in ("seqlens_k", "window") if training and given.get(name) is not None]
    found += [f"page {settings['PAGE']}"] if settings.get("PAGE") else []
    found += ["merged"] if settings.get("MERGED") else []
    found += [] if settings.get("CAUSAL", True) else ["full"]
    return " ".join(found + (["group"] if settings.get("GROUP", 1) > 1 else []))


def compile_launch(kernel: Any, arguments: tuple, settings: dict, architecture: int) -> dict[str, Any]:
    """Shared memory, registers and stack of one compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flashlla.backends.triton.launch import COMPILER

    options = {name: settings[name] for name in ("num_warps", "num_stages", "maxnreg") if name in settings}
    constants: dict[str, Any] = {n: v for n, v in settings.items() if n not in options}
    options.update(COMPILER)
    signature, attributes = {}, {}
    for index, param in enumerate(kernel.params):
        if param.name in constants:
            signature[param.name] = "constexpr"
            continue
        value = arguments[index]
        if value is None:
            signature[param.name], constants[param.name] = "constexpr", None
            continue
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


def _tool(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, Any]:
    """Registers, bytes of stack, and the share of spills in each sweep's loop, the shortest loop first."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = _tool("-res-usage", file.name), _tool("-sass", file.name)
    found = {
        name.lower(): int(number.group(1)) if (number := re.search(rf"\b{name}:(\d+)", usage)) else -1
        for name in ("REG", "STACK")
    }
    return {**found, "spills": spills(listing), "waits": waits(listing)}


def sweeps(listing: str) -> list[list[str]]:
    """The instructions of each innermost loop that multiplies matrices, the shortest loop first."""
    code = [(int(m[1], 16), m[2]) for m in re.finditer(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", listing)]
    ends = [
        (int(target[1], 16), place)
        for place, text in code
        if "BRA" in text and (target := re.search(r"0x([0-9a-f]+)", text)) and int(target[1], 16) < place
    ]
    inner = [(a, b) for a, b in ends if not any((a, b) != (c, d) and a <= c and d <= b for c, d in ends)]
    loops = []
    for start, stop in inner:
        body = [text for place, text in code if start <= place <= stop]
        if any(re.search(r"\b(HGMMA|HMMA|QGMMA|UTCHMMA|UTC\w*MMA)", text) for text in body):
            loops.append(body)
    return sorted(loops, key=len)


def spills(listing: str) -> list[float]:
    """Of each sweep, the share of its instructions that spill."""
    share = lambda body: sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in body) / len(body)
    return [round(share(body), 3) for body in sweeps(listing)]


def waits(listing: str) -> float:
    """Waits a matrix instruction of Hopper's, in the sweep where it is worst.

    A product is an instruction for 16 numbers of its inner dimension, and one wait. Where the assembler cannot tell
    that accumulators are left alone meanwhile, it waits for each instruction (its note C7515), at twice the time.
    """
    worst = 0.0
    for body in sweeps(listing):
        products = sum("HGMMA" in text for text in body)
        worst = max(worst, sum("WARPGROUP.DEPBAR" in text for text in body) / max(1, products))
    return round(worst, 2)


def report(task: tuple[int, str, int, str, bool]) -> list[dict[str, Any]]:
    """All kernels of one architecture, dtype, head dim and precision."""
    architecture, dtype, head_dim, precision, plain = task
    lines: list[dict[str, Any]] = []
    if configs.too_large(head_dim, torch.float32 if dtype == "float32" else torch.float16, divmod(architecture, 10)):
        return lines  # the backend refuses it there
    for kernel, name, arguments, settings in launches(head_dim, DTYPES[dtype], architecture, precision, plain):
        line: dict[str, Any] = {
            "architecture": architecture, "dtype": dtype, "precision": precision, "dim": head_dim, "pass": name,
            "kernel": kernel.__name__, "preconditioner": settings.get("PRECONDITIONER", ""),
            "adjoint": settings.get("ADJOINT", ""), "variant": variant(kernel, arguments, settings),
            "config": [
                settings.get("BLOCK_M", settings.get("BLOCK_T")), settings.get("BLOCK_N"),
                settings.get("num_warps"), settings.get("num_stages"),
            ],
        }  # fmt: skip
        try:
            line |= compile_launch(kernel, arguments, settings, architecture)
            too_much = line["shared"] > SHARED_LIMIT[architecture]
            heavy = line["spills"] and (line["spills"][0] > SPILLS or max(line["spills"]) > SPILLS_CUT)
            waiting = line["waits"] > WAITS
            line["verdict"] = "shared memory" if too_much else "spills" if heavy else "waits" if waiting else "ok"
        except Exception as error:
            line["verdict"] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        lines.append(line)
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(SHARED_LIMIT))
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 64, 80, 128, 256])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float16", "float32"])
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--plain", action="store_true", help="no windows, lengths, packed sequences or shared heads")
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args()
    tasks = [
        (architecture, dtype, dim, precision, options.plain)
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
                    f"sm_{x['architecture']:<4}{x['dtype']:<9}{x['precision']:<8}D={x['dim']:<4}{x['kernel']:<22}"
                    f"{x['preconditioner']:<7}{x['adjoint']!s:<6}{x['variant']:<12}{x['config']!s:<18}"
                    f"shared {x.get('shared', -1):>7}  registers {x.get('reg', -1):>4}  stack {x.get('stack', -1):>5}"
                    f"  spills {' '.join(f'{100 * share:.0f}%' for share in x.get('spills', [])):<8}"
                    f"  waits {x.get('waits', -1):<5} {x['verdict']}",
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
