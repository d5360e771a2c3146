"""Factorisations: of whom they are taken, and that the first is made alone."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
import torch

import flashlla
from flashlla import linalg

pytestmark = pytest.mark.quick
PACKAGE = Path(flashlla.__file__).parent


def test_nobody_else_asks_torch() -> None:
    lazy = re.compile(r"torch\.linalg\.(cholesky|eig|inv|ldl|lstsq|lu|solve|svd)\w*\(")
    users = {file.name for file in PACKAGE.rglob("*.py") if lazy.search(file.read_text(encoding="utf-8"))}
    assert users == {"linalg.py"}


def test_the_first_call_is_made_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, calls = 0, 0, 0

    def first() -> None:
        nonlocal running, most, calls
        running, calls = running + 1, calls + 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1

    monkeypatch.setattr(linalg, "_first_call", first)
    threads = [threading.Thread(target=linalg._load, args=(torch.device("cuda"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, calls) == (1, 4)
    linalg._load(torch.device("cpu"))
    assert calls == 4


def test_what_they_give() -> None:
    root = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = root @ root.mT + torch.eye(4), root[..., :1]
    factor, failed = linalg.cholesky(a)
    assert not failed.any()
    torch.testing.assert_close(factor @ factor.mT, a)
    x, failed = linalg.solve(a, b)
    assert not failed.any()
    torch.testing.assert_close(a @ x, b)
    values, vectors = linalg.eigh(a)
    torch.testing.assert_close(vectors * values.unsqueeze(-2) @ vectors.mT, a)
    assert linalg.cholesky(-a)[1].all()
