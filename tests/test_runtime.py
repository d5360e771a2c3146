"""What every launch of a kernel shares: compiled once, named where it fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashlla import lla_attention, lla_decode
from tests.support.kernels import interpreted, make

pytest.importorskip("triton")

pytestmark = pytest.mark.quick


class _Kernel:
    """Stands for one of Triton's: launches, and what it has compiled, are told apart by name."""

    arg_names = ("x", "n", "scale", "BLOCK")
    __name__ = "kernel"

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[object, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def launch(*arguments: object, **settings: object) -> object:
            self.launches.append(("compile", arguments))
            return {(*grid, 1, 1)[:3]: lambda *all_: self.launches.append(("again", all_))}

        return launch


def test_a_kernel_is_launched_at_once_only_where_triton_would_compile_nothing_else() -> None:
    from flashlla.backends.triton import runtime

    kernel, x = _Kernel(), torch.zeros(40)
    cpu = torch.device("cpu")

    def how(x: torch.Tensor | None = x, n: int = 7, scale: float = 0.5, block: int = 64, warps: int = 4) -> str:
        runtime.launch(kernel, "solve", (3,), cpu, x, n, scale, BLOCK=block, num_warps=warps)
        return kernel.launches[-1][0]

    assert how() == "compile"
    assert how() == "again"
    assert kernel.launches[-1][1] == (x, 7, 0.5, 64)
    assert how(x=torch.ones(9), n=99, scale=2.0) == "again"
    others: list[dict[str, Any]] = [
        {"x": x[1:]}, {"x": x.half()}, {"x": None}, {"n": 1}, {"n": 16}, {"n": 2**31 + 1}, {"block": 32}, {"warps": 8},
    ]  # fmt: skip
    for other in others:
        assert how(**other) == "compile"
        assert how(**other) == "again"


@interpreted
@pytest.mark.parametrize("name", ["solve_kernel", "gram_sums_kernel", "decode_solve_kernel"])
def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from flashlla.backends.triton import decode, gram, launch

    def fail(*_: object, **__: object) -> None:
        raise ValueError("out of something")

    class Broken:
        __name__ = name

        def __getitem__(self, _: object) -> object:
            return fail

    module, call = {
        "solve_kernel": (launch, lla_attention),
        "gram_sums_kernel": (gram, functools.partial(lla_attention, solver="pcg_gram")),
        "decode_solve_kernel": (decode, functools.partial(lla_decode, seqlens_k=torch.tensor([4], dtype=torch.int32))),
    }[name]
    monkeypatch.setattr(module, name, Broken())
    q, k, v, _ = make((1, 1, 4, 8), torch.float32)
    with pytest.raises(RuntimeError, match=rf"{name}.*config.*BLOCK_.*set_backend\('chunked'\)") as caught:
        call(q, k, v, backend="triton")
    assert isinstance(caught.value.__cause__, ValueError)
