"""What the sanitizers are to watch: every kernel. Its calls need no GPU to be made."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sanitize
from tests.support import kernels


@kernels.interpreted
def test_what_is_watched_is_every_kernel() -> None:
    calls = ["packed", "many keys", "gram", "decode, pages", "share of a cache"]
    seen = set().union(*(sanitize.ran(name, "cpu") for name in calls))
    assert seen == set(sanitize.written().values())


def _said(tool: str, program: str, ran: list[str], dirty: str) -> dict[str, object]:
    """What a tool might say: of one call, that it is not clean."""
    found = "plant" in program or (tool == "racecheck" and dirty in program)
    said = f"{'=' * 9} ERROR SUMMARY: {int(found)} errors\nran: {' '.join(ran)}\n"
    return {"status": 9 if found else 0, "summary": f"ERROR SUMMARY: {int(found)} errors", "seconds": 1, "said": said}


@kernels.interpreted
@pytest.mark.parametrize(("dirty", "lacking", "status"), [("", 0, 0), ("'window'", 0, 1), ("", 1, 1)])
def test_the_record_is_whole_whenever_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dirty: str, lacking: int, status: int
) -> None:
    """After each call that was examined; it tells what is still to be watched, and which call was not clean."""
    path, seen = tmp_path / "sanitize.json", sorted(set(sanitize.written().values()))[lacking:]
    monkeypatch.setattr(sanitize.needs, "cuda", lambda: None)
    monkeypatch.setattr(sanitize.shutil, "which", lambda _: "there")
    monkeypatch.setattr(sanitize.record, "circumstances", lambda _: {})

    def under(tool: str, program: str) -> dict[str, object]:
        if path.exists():
            tools = json.loads(path.read_text())["tools"]
            assert all(len(of["calls"]) + len(of["not_watched"]["calls"]) == 2 for of in tools.values())
        return _said(tool, program, seen, dirty or "no call")

    monkeypatch.setattr(sanitize, "_under", under)
    options = ["--only", "bfloat16", "window", "--processes", "2", "--json", str(path)]
    parser = argparse.ArgumentParser()
    sanitize.add_arguments(parser)
    assert sanitize.main(argparse.Namespace(command="sanitize", **vars(parser.parse_args(options)))) == status
    tools = json.loads(path.read_text())["tools"]
    assert {tool: of["clean"] for tool, of in tools.items()} == {
        "memcheck": 2,
        "racecheck": 1 if dirty else 2,
        "initcheck": 2,
    }
    assert all(len(of["not_watched"]["kernels"]) == lacking for of in tools.values())
    assert all(of["planted"]["found"] for of in tools.values())
    assert ("said" in tools["racecheck"]["calls"]["window"]) == bool(dirty)


@pytest.mark.quick
def test_each_tool_has_a_fault_to_find() -> None:
    assert sanitize.PLANTED.keys() == sanitize.TOOLS.keys()


SUM_OF_SQUARES = """
import re, subprocess, sys
from pathlib import Path
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def sum_kernel(x, out, stride, D: tl.constexpr):
    i, d = tl.arange(0, 4), tl.arange(0, D)
    t = tl.load(x + i[:, None] * stride + d)
    tl.store(out + i, tl.sum(t * t, 1))

kinds = {"x": "*fp32", "out": "*fp32", "stride": "i32", "D": "constexpr"}
for fused in (True, False):
    source = ASTSource(sum_kernel, signature=kinds, constexprs={"D": 32})
    options = {"num_warps": 4, "enable_fp_fusion": fused}
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    Path("kernel.cubin").write_bytes(binary.asm["cubin"])
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    said = subprocess.run([disassembler, "-c", "kernel.cubin"], capture_output=True, text=True, check=True).stdout
    print(*re.findall(r"SHFL|FFMA|FMUL|FADD|STS", said))
"""


def test_why_copies_of_a_sum_differ(tmp_path: Path) -> None:
    """racecheck's reports (docs/reliability.md), in a kernel of nothing else: 32 lanes have a row, each squares its
    number and adds up what others have; with fused multiply-adds a lane adds its own square unrounded to one that was
    rounded. All of them store the sum."""
    pytest.importorskip("triton")
    (tmp_path / "sums.py").write_text(SUM_OF_SQUARES)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    ran = subprocess.run(
        [sys.executable, "sums.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    fused, apart = (line.split() for line in ran.stdout.splitlines())
    exchanges = ["SHFL", "FADD"] * 4
    assert fused == ["FMUL", "SHFL", "FFMA", *exchanges, "STS"]
    assert apart == ["FMUL", "SHFL", "FADD", *exchanges, "STS"]
