"""Where kernels in Gluon run, and in words where not."""

from __future__ import annotations

import re

import pytest
import torch

from flashlla.backends.triton import configs

triton = pytest.importorskip("triton")
hopper = pytest.importorskip("flashlla.backends.triton.hopper")

CUDA = torch.device("cuda")


def reason(device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16) -> str:
    return hopper.unsupported(device, dtype) or "it runs"


@pytest.mark.quick
def test_it_says_which_devices_dtypes_and_tritons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason(torch.device("cpu")) == "Gluon has no interpreter"
    for capability in ((8, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(configs, "capability", lambda device, found=capability: found)
        assert re.search(r"Hopper.*cuda has {}\.{}".format(*capability), reason())
    monkeypatch.setattr(configs, "capability", lambda device: (9, 0))
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    hopper.without_gluon.cache_clear()
    try:
        assert re.search(r"Triton 3\.6 and 3\.7, and this is 3\.5\.1", reason())
    finally:
        hopper.without_gluon.cache_clear()
    monkeypatch.setattr(hopper, "without_gluon", lambda: None)
    assert reason() == "it runs"
    assert "its operands are of 16 bits" in reason(dtype=torch.float32)
