"""What every launch of a kernel shares: a kernel is named where it fails."""

from __future__ import annotations

import functools

import pytest
import torch

from flashlla import lla_attention, lla_decode
from tests.support.kernels import interpreted, make

pytest.importorskip("triton")

pytestmark = pytest.mark.quick


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
