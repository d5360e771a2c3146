"""The kernels through Triton's compiler, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")


def compiled(table: Path, *options: str, **variables: str) -> list[dict[str, Any]]:
    """What `python -m benchmarks compile` finds with ``options`` and in an environment with ``variables``, which must
    be nothing amiss; no GPU takes part."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), **variables}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "benchmarks", "compile", "--dtypes", "bfloat16", "--json", str(table)]
    workers = str(min(8, os.cpu_count() or 1))
    run = subprocess.run([*command, "--workers", workers, *options], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(table.read_text())["kernels"]


def test_every_kernel_compiles_for_three_architectures(tmp_path: Path) -> None:
    """bf16 at D = 64 and 128, with shared memory, spills and waits inside the limits."""
    lines = compiled(tmp_path / "kernels.json", "--plain", "--architectures", "80", "90", "100", "--dims", "64", "128")
    # Cards without Hopper's shared memory take the tiles of architecture 80, and have as little as 99 KiB.
    assert max(x["shared"] for x in lines if x["architecture"] == 80) <= 99 * 1024
    kernels = {(x["kernel"], x["architecture"], x["dim"]) for x in lines}
    from flashlla.backends.triton import (
        backward,
        decode_kernels,
        decode_share,
        decode_solve,
        forward,
        gram,
        hopper,
        prepare,
        solve,
    )

    modules = [backward, decode_kernels, decode_share, decode_solve, forward, gram, prepare, solve]
    if hopper.without_gluon() is None:
        from flashlla.backends.triton import decode_hopper, dk_hopper, dq_hopper, forward_hopper, solve_hopper

        modules += [decode_hopper, dk_hopper, dq_hopper, forward_hopper, solve_hopper]
    written = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {k for k, _, _ in kernels} == written
    assert {(a, d) for _, a, d in kernels} == {(a, d) for a in (80, 90, 100) for d in (64, 128)}


def test_every_mask_compiles(tmp_path: Path) -> None:
    """Of the plain kernels: those in Gluon take as long again, and a GPU runs them with every mask (test_hopper.py)."""
    lines = compiled(tmp_path / "kernels.json", "--architectures", "90", "--dims", "64", FLASHLLA_HOPPER="0")
    assert {x["variant"] for x in lines} >= {
        "",
        "full",
        "group",
        "window",
        "seqlens_k",
        "seqlens_k seqstarts_k",
        "seqlens_k prompt",
        "packed",
        "packed group",
        "packed slots",
        "packed slots group",
    }
