"""Every kernel compiled for CUDA architectures, without a GPU: shared memory, registers, spills.

    python -m benchmarks compile                                    # every config, dtype and architecture
    python -m benchmarks compile --architectures 90 --dims 64 128 --dtypes bfloat16

Exits with 1 where a kernel does not compile, needs more shared memory than the architecture has, spills heavily, or
waits for single matrix instructions.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import needs, record
from benchmarks.launches import Launch, recorded
from flashlla import products
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
DECODING = Mask(padded=True, at_lengths=True)
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
    long = meta(2, 6, 2048, head_dim, dtype=dtype)
    yield (
        dataclasses.replace(plain, q_len=2048, k_len=2048),
        Inputs(long, long, long, meta(2, 6, 2048, dtype=torch.float32)), "none",
    )  # fmt: skip
    yield plain, Inputs(q, q, q, rows), "jacobi"
    capability = divmod(architecture, 10)
    if configs.gram_compiles(capability) and head_dim <= configs.gram_widest(dtype, capability):
        yield plain, Inputs(q, q, q, rows), "gram"
    yield dataclasses.replace(plain, mask=Mask(causal=False)), Inputs(q, q, q, rows), "none"
    yield grouped, Inputs(q, shared, shared, rows), "none"
    yield dataclasses.replace(plain, mask=Mask(window=100)), Inputs(q, q, q, rows), "none"
    padded = dataclasses.replace(plain, mask=Mask(padded=True))
    yield padded, Inputs(q, q, q, rows, seqlens_k=meta(2)), "none"
    yield padded, Inputs(q, q, q, rows, seqlens_k=meta(2), seqstarts_k=meta(2)), "none"
    yield dataclasses.replace(plain, mask=DECODING), Inputs(q, q, q, rows, seqlens_k=meta(2)), "none"
    packs = Inputs(q[:1], shared[:1], shared[:1], rows[:1], cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
    yield packed, packs, "none"
    yield dataclasses.replace(packed, max_seqlen_q=64, max_seqlen_k=64), packs, "none"


def decodings(head_dim: int, dtype: torch.dtype, plain: bool) -> None:
    """Decode: the cache in one piece, in several, and (not ``plain``) in pages larger and smaller than tiles."""
    from flashlla.backends.triton import decode

    meta = lambda *shape, dtype=torch.int32: torch.empty(shape, dtype=dtype, device="meta")
    q, ridge = meta(2, 6, 1, head_dim, dtype=dtype), meta(2, 6, 1, dtype=torch.float32)
    width = configs.padded(head_dim)
    full = products.allowed(q.device) == "ieee"
    large = configs.large(configs.capability(q.device))
    usual = configs.decode_config(width, width, dtype != torch.float32, full, large)
    plain_call = Problem(
        2, 6, 2, 1, 4096, head_dim, head_dim, dtype, q.device, 0.3, 1e-12, CG(), solver_demanded=False, mask=DECODING
    )  # fmt: skip
    for page in (0,) if plain else (0, 16, 256):
        cache = meta(*((32, 2, page) if page else (2, 2, 4096)), head_dim, dtype=dtype)
        table = meta(2, 4096 // page) if page else None
        for pieces in (1, 4):
            problem = dataclasses.replace(plain_call, page_size=page or None)
            inputs = Inputs(q, cache, cache, ridge, meta(2), block_table=table)
            for slices in (None, 2):  # Hopper's own kernel makes moments that are not sliced
                config = usual._replace(pieces=pieces, slices=slices)
                decode.decode(problem, inputs, torch.empty_like(q), config=config)
                decode.share(problem, inputs, config)


def step_launches(
    head_dim: int, dtype: torch.dtype, architecture: int, precision: str, plain: bool = False
) -> list[Launch]:
    """One of each kind among the launches of a step, forward and backward, and of decoding; ``plain``: of the plain
    call and the preconditioned ones, and of a cache without pages. With FLASHLLA_HOPPER=0 none of those in Gluon."""
    from flashlla.backends.triton import launch

    allowed = os.environ.get("FLASHLLA_HOPPER", "1")

    with (
        recorded(carried_out=False) as found,
        mock.patch.object(configs, "capability", return_value=divmod(architecture, 10)),
        mock.patch.object(products, "allowed", return_value="ieee" if precision == "highest" else "tf32"),
    ):
        for problem, inputs, preconditioner in calls(head_dim, dtype, architecture):
            if plain and (problem.mask != Mask() or problem.group > 1):
                continue
            for hopper in "10":  # the kernels in Triton have what those in Gluon do not take
                with mock.patch.dict(os.environ, FLASHLLA_HOPPER=min(hopper, allowed)):
                    launch.forward(problem, inputs, preconditioner)
                    rows = inputs.ridge_lambda
                    vectors = torch.empty(inputs.q.shape, device="meta")
                    launch.backward(problem, inputs, Residuals(rows, rows, vectors, vectors), inputs.q, preconditioner)
        for hopper in "10":
            with mock.patch.dict(os.environ, FLASHLLA_HOPPER=min(hopper, allowed)):
                decodings(head_dim, dtype, plain)
    return list({(x.kernel.__name__, _absent(x.arguments), str(sorted(x.settings.items()))): x for x in found}.values())


def _absent(argument: Any) -> Any:
    """Whether it is None; of a record, of each member."""
    return tuple(map(_absent, argument)) if isinstance(argument, tuple) else argument is None


def variant(launch: Launch) -> str:
    """What the call asks for beyond the plain one, as far as the kernel knows of it."""
    settings = launch.settings
    given = {param.name: value for param, value in zip(launch.kernel.params, launch.arguments)}
    found = []
    if (seqlens := given.get("seqlens")) is not None:  # to decode lengths always are there, and the window is a number
        found += [] if seqlens.cu_q is None else ["packed"]
        found += [] if seqlens.slots is None else ["slots"]
        found += [] if seqlens.k is None else ["seqlens_k"]
        found += [] if seqlens.k_start is None else ["seqstarts_k"]
        found += [] if seqlens.own_end is None else ["prompt"]
        found += [] if given.get("window") is None else ["window"]
    found += [f"page {settings['PAGE']}"] if settings.get("PAGE") else []
    found += ["merged"] if settings.get("MERGED") else []
    found += [] if settings["SHAPE"].CAUSAL else ["full"]
    return " ".join(found + (["group"] if settings.get("GROUP", 1) > 1 else []))


def compiled(launch: Launch, architecture: int) -> dict[str, Any]:
    """Shared memory, registers and stack of one compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flashlla.backends.triton.runtime import COMPILER

    kernel, settings = launch.kernel, launch.settings
    options: dict[str, Any] = {
        name: settings[name] for name in ("num_warps", "num_stages", "maxnreg") if name in settings
    }
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def described(value: Any, path: tuple[int, ...], specialized: bool) -> Any:
        """The type of an argument; of a record the types of its members."""
        if isinstance(value, tuple):
            members = [described(member, (*path, i), True) for i, member in enumerate(value)]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if value is None:
            constants[path] = None
            return "constexpr"
        if specialized and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return POINTERS[value.dtype]
        return "fp32" if isinstance(value, float) else "i32"

    signature = {}
    for index, param in enumerate(kernel.params):
        if param.name in settings:
            signature[param.name], constants[(index,)] = "constexpr", settings[param.name]
        else:
            signature[param.name] = described(launch.arguments[index], (index,), not param.do_not_specialize)
    options.update(COMPILER)
    source_of = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source_of = GluonASTSource
    source = source_of(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return {"shared": binary.metadata.shared, **resources(binary.asm["cubin"])}


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
    for launch in step_launches(head_dim, DTYPES[dtype], architecture, precision, plain):
        settings = launch.settings
        line: dict[str, Any] = {
            "architecture": architecture, "dtype": dtype, "precision": precision, "dim": head_dim, "pass": launch.name,
            "kernel": launch.kernel.__name__, "preconditioner": settings.get("PRECONDITIONER", ""),
            "adjoint": settings.get("ADJOINT", ""), "variant": variant(launch),
            "config": [
                settings.get("BLOCK_M", settings.get("BLOCK_T")), settings.get("BLOCK_N"),
                settings.get("num_warps"), settings.get("num_stages"),
            ],
        }  # fmt: skip
        try:
            line |= compiled(launch, architecture)
            too_much = line["shared"] > SHARED_LIMIT[architecture]
            heavy = line["spills"] and (line["spills"][0] > SPILLS or max(line["spills"]) > SPILLS_CUT)
            waiting = line["waits"] > WAITS
            line["verdict"] = "shared memory" if too_much else "spills" if heavy else "waits" if waiting else "ok"
        except Exception as error:
            line["verdict"] = f"failed: {type(error).__name__}: {str(error)[:300]}"
        lines.append(line)
    return lines


def row(line: dict[str, Any]) -> str:
    return (
        f"sm_{line['architecture']:<4}{line['dtype']:<9}{line['precision']:<8}D={line['dim']:<4}{line['kernel']:<22}"
        f"{line['preconditioner']:<7}{line['adjoint']!s:<6}{line['variant']:<13}{line['config']!s:<23}"
        f"shared {line.get('shared', -1):>7}  registers {line.get('reg', -1):>4}  stack {line.get('stack', -1):>5}"
        f"  spills {' '.join(f'{100 * share:.0f}%' for share in line.get('spills', [])):<8}"
        f"  waits {line.get('waits', -1):<5} {line['verdict']}"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architectures", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 32, 64, 80, 128, 256])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--plain", action="store_true", help="no windows, lengths, packed sequences or shared heads")
    record.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    needs.triton()
    os.environ.pop("TRITON_INTERPRET", None)  # it would replace the compiler
    kept = record.Record(options, "cpu")
    lines: list[dict[str, Any]] = []
    kept.figures["kernels"] = lines
    tasks = [
        (architecture, dtype, dim, precision, options.plain)
        for architecture in options.architectures
        for dtype in options.dtypes
        for dim in options.dims
        for precision in (("highest", "high") if dtype == "float32" else ("highest",))
    ]
    with ProcessPoolExecutor(options.workers) as pool:
        for found in pool.map(report, tasks):
            lines += found
            for line in found:
                print(row(line), flush=True)
    kept.write()
    bad = [line for line in lines if line["verdict"] != "ok"]
    print(f"{len(lines)} kernels, {len(bad)} not ok")
    kept.end()
    return 1 if bad else 0
