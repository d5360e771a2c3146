"""What the sanitizers are to watch: every kernel. Its calls need no GPU to be made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sanitize
from tests.support import kernels


@kernels.interpreted
def test_what_is_watched_is_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitize.watched(["packed", "many keys", "gram", "decode, pages", "share of a cache"], "cpu") == 0
    assert "not one less" in capsys.readouterr().out


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
