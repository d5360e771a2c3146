"""The soak: what it calls a leak, and that it finds none in a few seconds."""

from __future__ import annotations

import pytest

from tests import soak

pytestmark = pytest.mark.quick


def looks(**leak: float) -> list[dict[str, float]]:
    """Eight looks at memory that grows by so much from one to the next."""
    return [
        {"host": 500.0, "allocated": 0.0, "reserved": 60.0, "kernels": 90.0, **{n: x * i for n, x in leak.items()}}
        for i in range(8)
    ]


def test_what_is_a_leak() -> None:
    assert soak.leaks(soak.growth(looks())) == []
    assert soak.leaks(soak.growth(looks(host=20.0))) == ["host"]
    assert soak.leaks(soak.growth(looks(allocated=0.01))) == ["allocated"]
    assert soak.leaks(soak.growth(looks(reserved=200.0))) == ["reserved"]
    assert soak.leaks(soak.growth(looks(host=20.0, kernels=40.0))) == []  # what is compiled takes room


def test_a_short_soak() -> None:
    found = soak.soak("cpu", 2, seed=0)
    assert found["calls"] > 5
    assert found["looks"][-1]["problems"] > 0
