"""compute-sanitizer over small calls of every kernel: bad accesses, races in shared memory, uninitialised reads.

Needs a GPU and NVIDIA's compute-sanitizer. Each tool must first find a fault that is planted for it. Exits with 1 where
one does not, where it finds anything else, or where some kernel was not among those it watched.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import needs, record

# By name, its options. initcheck must see who writes: torch's kernels, too.
_OURS = ("--kernel-name", "kns=_kernel")
TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": _OURS,
    "racecheck": _OURS,
    "initcheck": (),
}
# What each tool's calls are made under. racecheck tells of threads that write different numbers to one place: where
# lanes hold copies of a sum, and a product is fused with its first exchange, they differ in the last bit, by which lane
# rounded its own (docs/reliability.md).
BEFORE = {"racecheck": "from flashlla.backends.triton import runtime\nruntime.COMPILER['enable_fp_fusion'] = False\n"}
# What is made on purpose for each tool.
PLANTED = {
    "memcheck": "a store beyond what was allocated",
    "racecheck": "all threads at one place of shared memory",
    "initcheck": "a read of what nobody wrote",
}
# A line that begins with it names the kernels that ran; and how much is kept of what else is said.
_RAN, _KEPT = "ran:", 3000
_SUMMARY = re.compile(r"^=+ *((?:ERROR|RACECHECK) SUMMARY:.*)$", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--only", nargs="+", metavar="CALL", help="of the calls that are watched (default: all)")
    parser.add_argument("--processes", type=int, default=1, help="side by side (default 1); each compiles what it runs")
    record.add_arguments(parser)


def _tensors(device: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes]


def _attend(
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    queries: int = 100,
    keys: int | None = None,
    dim: int = 64,
    v_dim: int | None = None,
    heads: int = 2,
    group: int = 1,
    spoilt: bool = False,
    **keywords: Any,
) -> None:
    """Forward and backward."""
    from flashlla import lla_attention

    keys, v_dim = keys or queries, v_dim or dim
    shapes = [(2, heads * group, queries, dim), (2, heads, keys, dim), (2, heads, keys, v_dim)]
    q, k, v, grad_o = _tensors(device, dtype, *shapes, (2, heads * group, queries, v_dim))
    if spoilt:
        k[0, 0, keys // 2] = float("nan")
    keywords = {"ridge_lambda": 1.0, "backend": "triton", **keywords}
    for name in ("seqlens_k", "seqstarts_k"):
        if name in keywords:
            keywords[name] = torch.tensor(keywords[name], dtype=torch.int32).to(device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.autograd.grad(lla_attention(*leaves, **keywords), leaves, grad_o)


def _pack(device: str, edges: tuple[int, ...], dtype: torch.dtype = torch.bfloat16, **keywords: Any) -> None:
    from flashlla import lla_attention_varlen

    total, longest = edges[-1], max(b - a for a, b in itertools.pairwise(edges))
    leaves = [t.requires_grad_() for t in _tensors(device, dtype, *[(total, 2, 40)] * 3)]
    cu_seqlens = torch.tensor(edges, dtype=torch.int32).to(device)
    keywords = {"cu_seqlens": cu_seqlens, "max_seqlen": longest, "ridge_lambda": 1.0, "backend": "triton", **keywords}
    o = lla_attention_varlen(*leaves, **keywords)
    torch.autograd.grad(o, leaves, torch.ones_like(o))


def _decode(
    device: str, new: int = 1, room: int = 130, dtype: torch.dtype = torch.bfloat16, page: int | None = None,
    dim: int = 64, **keywords: Any,
) -> None:  # fmt: skip
    from flashlla import lla_decode

    shape = (2, 2, room, dim) if page is None else (2 * room // page, 2, page, dim)
    q, k, v = _tensors(device, dtype, (2, 4, new, dim), shape, shape)
    lengths = torch.tensor([room, room // 3], dtype=torch.int32).to(device)
    if page is not None:
        keywords["block_table"] = torch.arange(2 * room // page, dtype=torch.int32).to(device).view(2, -1)
    with torch.no_grad():
        lla_decode(q, k, v, lengths, ridge_lambda=1.0, backend="triton", **keywords)


def _share(device: str) -> None:
    """Moments of a cache, as ranks that share one make them, and the solve."""
    from flashlla import explain, lla_decode
    from flashlla.backends.triton import moments
    from flashlla.calls import prepared
    from flashlla.problem import describe

    q, k, v = _tensors(device, torch.bfloat16, (2, 4, 1, 40), (2, 2, 130, 40), (2, 2, 130, 40))
    lengths = torch.tensor([130, 43], dtype=torch.int32).to(device)
    arguments = prepared(lla_decode, explain, q, k, v, seqlens_k=lengths, ridge_lambda=1.0).arguments
    problem, inputs = describe(arguments), arguments.inputs
    moments.solved(problem, moments.moments(problem, inputs), inputs.ridge_lambda)


# What the tools watch, by name; what it stands for.
CALLS: dict[str, Callable[[str], None]] = {
    "bfloat16": _attend,
    "float16": lambda device: _attend(device, torch.float16),
    "float32": lambda device: _attend(device, torch.float32, dim=40),
    "odd sizes": lambda device: _attend(device, torch.float32, 65, 67, dim=17, v_dim=5),
    "shared heads": lambda device: _attend(device, group=3),
    "many heads": lambda device: _attend(device, queries=20, heads=40),
    "many programs": lambda device: _attend(device, heads=70),
    "many programs, wide": lambda device: _attend(device, torch.float16, heads=70, dim=128),
    "many keys": lambda device: _attend(device, queries=3, keys=520, dim=16),
    "no mask": lambda device: _attend(device, queries=33, keys=70, causal=False),
    "window": lambda device: _attend(device, window=20),
    "lengths": lambda device: _attend(device, seqlens_k=[100, 37], seqstarts_k=[13, 0]),
    "not finite": lambda device: _attend(device, spoilt=True),
    "jacobi": lambda device: _attend(device, solver="pcg"),
    "gram": lambda device: _attend(device, queries=200, solver="pcg_gram", backend="triton_pcg"),
    "gram, float32": lambda device: _attend(
        device, torch.float32, 200, dim=16, solver="pcg_gram", backend="triton_pcg"
    ),
    "wide": lambda device: _attend(device, dim=128),
    "packed": lambda device: _pack(device, (0, 50, 50, 113)),
    "packed, unequal": lambda device: _pack(device, (0, 1, 3, 4, 6, 8, 9, 11, 300)),
    "packed, float32": lambda device: _pack(device, (0, 50, 50, 113), torch.float32, window=9),
    "decode": _decode,
    "decode some": lambda device: _decode(device, new=5, dtype=torch.float32, window=50),
    "decode, pages": lambda device: _decode(device, room=128, page=16, new=2),
    "decode, wide": lambda device: _decode(device, dim=128, room=600),
    "share of a cache": _share,
    "prompt": lambda device: _decode(device, new=40),
    "long": lambda device: _attend(device, queries=700),
    "long, wide": lambda device: _attend(device, torch.float16, 600, dim=128, seqlens_k=[600, 310]),
    "short, no mask": lambda device: _attend(device, queries=130, causal=False),
    "long, window": lambda device: _attend(device, queries=700, window=650),
}


def written() -> dict[int, str]:
    """The kernels of the package, by their id."""
    from flashlla.backends import triton as package
    from flashlla.backends.triton import hopper

    gluon = torch.cuda.is_available() and hopper.without_gluon() is None  # which no interpreter runs
    files = [path for path in Path(package.__file__ or "").parent.glob("*.py") if path.stem != "__init__"]
    names = sorted(path.stem for path in files if gluon or "experimental import gluon" not in path.read_text())
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    # None but those that are launched: others are parts of these.
    return {id(v): name for module in modules for name, v in vars(module).items() if name.endswith("_kernel")}


def ran(name: str, device: str = "cuda") -> set[str]:
    """Make that call, by the kernels in Gluon and by the others; the kernels that ran, by name."""
    from flashlla.backends.triton import runtime

    for asked in "01" if device == "cuda" else "0":
        with patch.dict(os.environ, FLASHLLA_HOPPER=asked):
            CALLS[name](device)
    if device == "cuda":
        torch.cuda.synchronize()
    all_of = written()
    return {all_of[key[0]] for key in runtime.compiled if key[0] in all_of}


def plant(tool: str) -> None:
    """What ``tool`` is to find."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def planted_kernel(x, out, WHICH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, BLOCK)
        if WHICH == "memcheck":
            tl.store(out + (1 << 20) + i, i)
        elif WHICH == "initcheck":
            tl.store(out + i, tl.load(x + i) + 1)
        else:
            found = tl.inline_asm_elementwise(
                "{ .reg .u32 at; mov.u32 at, 0; st.shared.u32 [at], $1; ld.shared.u32 $0, [at]; }",
                "=r,r", [i], dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
            tl.store(out + i, found + tl.sum(i, 0))  # the sum is what makes it have shared memory

    x, out = (torch.empty(1024, dtype=torch.int32, device="cuda") for _ in range(2))
    planted_kernel[(1,)](x, out, tool, 1024, num_warps=8)
    torch.cuda.synchronize()


def _under(tool: str, program: str) -> dict[str, Any]:
    """What ``tool`` says of ``program``."""
    watch = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *TOOLS[tool], "--print-limit", "20"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begun = time.monotonic()
    made = subprocess.run(
        [*watch, sys.executable, "-c", f"from benchmarks import sanitize\n{program}"],
        env=environment, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    summary = _SUMMARY.findall(made.stdout)
    return {
        "status": made.returncode,
        "summary": summary[-1] if summary else "none",
        "seconds": round(time.monotonic() - begun),
        "said": made.stdout,
    }


def planted(tool: str) -> dict[str, Any]:
    """Whether ``tool`` finds what is planted for it."""
    said = _under(tool, f"sanitize.plant({tool!r})")
    found = {"what": PLANTED[tool], "found": said["status"] == 9, "summary": said["summary"]}
    return found if found["found"] else {**found, "said": _brief(said["said"])}


def examine(tool: str, name: str) -> dict[str, Any]:
    """What ``tool`` says of a call, and the kernels that it saw."""
    found = _under(tool, f"{BEFORE.get(tool, '')}print({_RAN!r}, *sorted(sanitize.ran({name!r})))")
    said = found.pop("said")
    kernels = [line.split()[1:] for line in said.splitlines() if line.startswith(_RAN)]
    found["kernels"] = kernels[-1] if kernels else []
    return found if found["status"] == 0 else {**found, "said": _brief(said)}


def _brief(said: str) -> str:
    """The tool's first reports, and how it ended."""
    reports = "\n".join(line for line in said.splitlines() if line.startswith("=="))
    return f"{reports[:_KEPT]}\n...\n{said[-_KEPT:]}"


def summed(tools: dict[str, Any], names: list[str]) -> None:
    """To what each tool found of each call, how many of them are clean, and what is still to be watched."""
    kernels = set(written().values())
    for of in tools.values():
        seen = {kernel for call in of["calls"].values() for kernel in call["kernels"]}
        of["clean"] = sum(call["status"] == 0 for call in of["calls"].values())
        of["not_watched"] = {
            "kernels": sorted(kernels - seen),
            "calls": [name for name in names if name not in of["calls"]],
        }


def clean(of: dict[str, Any]) -> bool:
    """Whether a tool that finds what is planted found nothing else, in every kernel and call."""
    watched = not any(of["not_watched"].values()) and of["clean"] == len(of["calls"])
    return watched and bool(of.get("planted", {}).get("found"))


def main(options: argparse.Namespace) -> int:
    needs.cuda()
    if shutil.which("compute-sanitizer") is None:
        raise needs.Missing("it needs NVIDIA's compute-sanitizer on the PATH; try /usr/local/cuda/bin, or install CUDA")
    names = options.only or list(CALLS)
    kept = record.Record(options, "cuda")
    tools: dict[str, Any] = {tool: {"calls": {}} for tool in options.tools}
    kept.figures["tools"] = tools

    def keep(tool: str, name: str | None) -> None:
        found = planted(tool) if name is None else examine(tool, name)
        with kept_by_one:
            if name is None:
                tools[tool]["planted"] = found
            else:
                tools[tool]["calls"][name] = found
            summed(tools, names)
            kept.write()
            print(f"{tool}, {name or 'planted'}: {found['summary']}, {found.get('seconds', '')} s", flush=True)
            if "said" in found:
                print(found["said"], flush=True)

    kept_by_one = threading.Lock()
    work = [(tool, name) for name in (None, *names) for tool in options.tools]
    work.sort(key=lambda of: of[0] == "initcheck")  # last, with the kernels that memcheck had compiled
    with ThreadPoolExecutor(options.processes) as threads:
        for done in [threads.submit(keep, *of) for of in work]:
            done.result()
    kept.end()
    return int(not all(map(clean, tools.values())))
