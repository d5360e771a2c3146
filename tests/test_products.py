"""Products keep float32's digits, and with them the PyTorch backends, whatever torch may round operands to."""

from __future__ import annotations

import ast
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla import products
from flashlla.backends.base import Backend
from flashlla.dispatch import all_backends
from tests import test_conformance
from tests.support.cases import BY_NAME
from tests.support.helpers import IN_PYTORCH, called, normal, qkv
from tests.support.units import BITS, Units, matmul_precision, nearest, on_units, towards_zero

CPU = torch.device("cpu")


@pytest.fixture(params=["high", "medium"])
def setting(request: pytest.FixtureRequest) -> Iterator[str]:
    with matmul_precision(request.param):
        yield request.param


def operands() -> tuple[Tensor, Tensor]:
    """Rows of very different sizes; the second a transposed view."""
    a = normal(2, 70, 300, dtype=torch.float32) * torch.logspace(-9, 9, 70)[:, None]
    return a, normal(2, 90, 300, seed=1, dtype=torch.float32).mT


def error(got: Tensor, a: Tensor, b: Tensor) -> float:
    """As a share of |a| |b|, the largest."""
    a, b = a.double(), b.double()
    return float(((got.double() - a @ b).abs() / (a.abs() @ b.abs())).max())


@pytest.mark.parametrize("rounded", [nearest, towards_zero])
def test_products_keep_their_digits(setting: str, rounded: Callable[[Tensor, int], Tensor]) -> None:
    a, b = operands()
    plain = error(torch.bmm(a, b), a, b)
    with Units(rounded):
        assert error(torch.bmm(a, b), a, b) > 2.0 ** -(BITS[setting] + 6)
        assert products.bits_kept(CPU, products.allowed(CPU)) == BITS[setting]
        found = products.product(a, b)
        into = torch.empty(2, 3, 70, 90)
        returned = products.product(a, b, out=into[:, 1])
        wide = products.product(a.expand(2, 2, 70, 300), b)
        total = normal(2, 70, 90, seed=2, dtype=torch.float32) * 1e-9
        sum_of = products.add_product(total.clone(), a, b, alpha=-0.5)
    assert error(found, a, b) < 4 * plain + 2.0**-23
    assert returned.data_ptr() == into[:, 1].data_ptr()
    assert torch.equal(into[:, 1], found)
    assert torch.equal(wide[1], found)
    assert error((total - sum_of) * 2, a, b) < 4 * plain + 2.0**-22


def test_products_are_torchs_own_where_nothing_rounds() -> None:
    a, b = operands()
    for precision in BITS:
        with matmul_precision(precision):
            for x, y in ((a.double(), b.double()), (a, b))[: 1 if precision != "highest" else 2]:
                assert torch.equal(products.product(x, y), torch.bmm(x, y))


def test_nan_and_zero_stay(setting: str) -> None:
    a, b = torch.zeros(1, 3, 40), normal(1, 40, 5, dtype=torch.float32)
    a[0, 1, 7] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # as CUDA makes it
    a[0, 2, 7] = 1e-45
    with Units():
        found = products.product(a, b)
    assert (found[0, 0] == 0).all()
    assert found[0, 1].isnan().all()
    assert found[0, 2].isfinite().all()


@pytest.mark.filterwarnings("error::flashlla.ConvergenceWarning")
@pytest.mark.parametrize("case", ["length_129", "correlated", "ridge_weak", "everything", "varlen_heads_3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("solver", ["cg", "pcg", "gram", "direct"])
@pytest.mark.parametrize("backend", IN_PYTORCH, ids=called)
def test_against_oracle(backend: Backend, solver: str, dtype: torch.dtype, case: str, setting: str) -> None:
    """What every backend is held to, on units that round."""
    with on_units(backend):
        test_conformance.test_against_oracle(backend, "cpu", solver, dtype, BY_NAME[case])


def test_the_units_round() -> None:
    """The tests above could fail: a product of torch's own, put in place of ours, is noise."""
    q, k, v = qkv(1, 100, 16)
    (chunked,) = (backend for backend in all_backends() if backend.name == "chunked")
    call = lambda: flashlla.lla_attention(q, k, v, ridge_lambda=0.1, solver="direct", backend="chunked")
    exact = call()
    with matmul_precision("high"), on_units(chunked):
        assert (call() - exact).norm() < 1e-5 * exact.norm()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "_bits", lambda a: 24)
            assert (call() - exact).norm() > 1e-4 * exact.norm()


def test_the_setting_stays_the_callers() -> None:
    """Another thread, and who sets what between two passes, find the setting as they left it."""
    seen = set()
    q, k, v = (t.requires_grad_() for t in qkv(1, 60, 8))
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.add(torch.get_float32_matmul_precision())

    with matmul_precision("high"):
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for backend in ("naive", "chunked"):
                flashlla.lla_attention(q, k, v, ridge_lambda=0.1, backend=backend).sum().backward()
        finally:
            done.set()
            watcher.join()
    assert seen == {"high"}


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="this torch has no settings of each device")
def test_settings_of_each_device() -> None:
    """Once they have been used, torch.get_float32_matmul_precision raises."""
    before = {of: of.matmul.fp32_precision for of in (torch.backends.cuda, torch.backends.mkldnn)}
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert products.allowed(torch.device("cuda")) == "tf32"
        assert products.allowed(CPU) == "bf16"
        q, k, v = qkv(1, 20, 8)
        for backend in all_backends():
            if flashlla.explain(q, k, v, backend=backend.name).reasons[backend.name] is None:
                assert flashlla.lla_attention(q, k, v, backend=backend.name).isfinite().all()
    finally:
        for of, precision in before.items():
            of.matmul.fp32_precision = precision


def test_nothing_else_multiplies_matrices() -> None:
    """But naive, in float64, and the kernels, which say to what precision. Layers' projections are as torch is set to
    make them."""
    package = Path(products.__file__).parent
    names = {"matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "einsum", "tensordot", "inner", "linear"}
    names |= {f"{name}_" for name in names} | {
        "multi_dot",
        "matrix_power",
        "chain_matmul",
        "scaled_dot_product_attention",
    }
    found = set()
    for path in package.rglob("*.py"):
        file = path.relative_to(package).as_posix()
        if file.startswith(("nn/", "integrations/")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            operator = isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)
            if operator or (isinstance(node, ast.Attribute) and node.attr in names):
                found.add(file)
    assert found <= {"products.py", "backends/naive.py", "crosscheck.py"}
