"""The small systems as operators, against their definition."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.systems import matrices, systems_of

pytestmark = pytest.mark.quick


def test_systems_are_what_they_say() -> None:
    systems, b = systems_of()
    a = matrices(systems)
    np.testing.assert_allclose(systems.dense().numpy(), a, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(systems.diagonal().numpy(), np.diagonal(a, axis1=-2, axis2=-1), rtol=1e-12)
    np.testing.assert_allclose(
        systems.matvec(b).numpy(), np.einsum("hide,hie->hid", a, b.numpy()), rtol=1e-11, atol=1e-11
    )
