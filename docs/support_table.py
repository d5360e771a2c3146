"""The table of docs/backends.md, from the backends' own answers: ``python docs/support_table.py`` writes it anew.

They are asked as on a GPU of compute capability 9.0, whether or not there is one here; nothing runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

from flashlla import dispatch
from flashlla.backends import triton
from flashlla.backends.base import Backend
from flashlla.problem import SUPPORTED_DTYPES, Mask, Problem
from flashlla.solvers import CG, PCG, Direct, Solver

PAGE = Path(__file__).with_name("backends.md")
BEGIN, END = "<!-- written by docs/support_table.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class OneOfYours(Solver):
    """A solver that no backend has heard of."""

    def solve(self, systems, b):  # type: ignore[no-untyped-def]
        raise NotImplementedError


CALL = Problem(
    batch=2,
    q_heads=4,
    kv_heads=4,
    q_len=128,
    k_len=128,
    head_dim=64,
    v_dim=64,
    dtype=torch.bfloat16,
    device=torch.device("cuda", 0),
    scale=0.125,
    delta_eps=1e-12,
    solver=CG(),
    solver_demanded=False,
)
DECODE = replace(CALL, q_len=1, solver=Direct(), mask=Mask(padded=True, at_lengths=True))
PACKED = replace(CALL, batch=1, sequences=2, max_seqlen_q=64, max_seqlen_k=64, mask=Mask(packed=True))

# Whether a backend takes the call.
CALLS = {
    "CUDA tensors": CALL,
    "CPU tensors": replace(CALL, device=torch.device("cpu")),
    "values of another width than keys": replace(CALL, v_dim=96),
    "query heads that share key heads": replace(CALL, kv_heads=2),
    "`causal=False`": replace(CALL, mask=Mask(causal=False)),
    "more keys than queries, or fewer": replace(CALL, k_len=100),
    "`window`": replace(CALL, mask=Mask(window=16)),
    "`seqlens_k`, `seqstarts_k`": replace(CALL, mask=Mask(padded=True)),
    "`lla_attention_varlen`": PACKED,
    "the same with `window`, other keys": replace(PACKED, k_len=100, mask=Mask(window=16, packed=True)),
    "`lla_decode`": DECODE,
    "the same with more than 16 new tokens": replace(DECODE, q_len=64),
    "the same with `window`": replace(DECODE, mask=replace(DECODE.mask, window=16)),
    "the same with pages": replace(DECODE, page_size=16),
    '`solver="cg"`': replace(CALL, solver_demanded=True),
    '`solver="pcg"`': replace(CALL, solver=PCG(), solver_demanded=True),
    '`solver="direct"`': replace(CALL, solver=Direct(), solver_demanded=True),
    "a solver of yours": replace(CALL, solver=OneOfYours(), solver_demanded=True),
}
WIDTHS = (64, 128, 256, 512, 4096)


@contextmanager
def a_gpu() -> Iterator[None]:
    """Backends see one, and no interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    there = mock.patch.object(triton, "_has_gpu", return_value=True)
    capability = mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0))
    with mock.patch.dict(os.environ, environment, clear=True), there, capability:
        yield


def widest(backend: Backend, call: Problem) -> str:
    """The largest head dim that it takes."""
    taken = [n for n in WIDTHS if backend.unsupported(replace(call, head_dim=n, v_dim=n)) is None]
    if not taken:
        return "none"
    return "any" if taken[-1] == WIDTHS[-1] else f"up to {taken[-1]}"


def dtypes(backend: Backend) -> str:
    taken = [d for d in SUPPORTED_DTYPES if backend.unsupported(replace(CALL, dtype=d)) is None]
    return "all" if len(taken) == len(SUPPORTED_DTYPES) else ", ".join(str(d).removeprefix("torch.") for d in taken)


# What it answers with a word.
WORDS: dict[str, Callable[[Backend], str]] = {
    "dtypes": dtypes,
    "head dim, 16 bit": lambda b: widest(b, CALL),
    "head dim, float32": lambda b: widest(b, replace(CALL, dtype=torch.float32)),
    "head dim, `lla_decode`": lambda b: widest(b, DECODE),
}


def table() -> str:
    """Markdown: a column for each backend, a row for each question, and the reasons of every no."""
    backends = dispatch.all_backends()
    reasons: list[str] = []

    def verdict(backend: Backend, call: Problem) -> str:
        reason = backend.unsupported(call)
        if reason is None:
            return "yes"
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"

    lines = [
        f"| | {' | '.join(f'`{b.name}`' for b in backends)} |",
        f"|---|{'---|' * len(backends)}",
    ]
    with a_gpu():
        for label, answer in WORDS.items():
            lines.append(f"| {label} | {' | '.join(map(answer, backends))} |")
        for label, call in CALLS.items():
            lines.append(f"| {label} | {' | '.join(verdict(b, call) for b in backends)} |")
    lines += ["", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """``page`` with the table in its place."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
