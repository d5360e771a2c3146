"""Tile sizes: what fits, which divides which, and which are taken."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernels import check, interpreted, make, step

pytest.importorskip("triton")

pytestmark = pytest.mark.quick


def test_what_a_chip_has_no_shared_memory_for() -> None:
    from flashlla.backends.triton import configs

    assert "shared memory" in str(configs.too_large(200, torch.float32, (8, 9)))
    assert configs.too_large(200, torch.float16, (8, 9)) is None
    assert configs.too_large(128, torch.float32, (12, 0)) is None
    assert configs.too_large(256, torch.float32, (9, 0)) is None
    assert configs.gram_widest(torch.float32, (8, 9)) == 64
    assert configs.gram_widest(torch.float32, (8, 0)) == configs.gram_widest(torch.float16, (8, 9)) == 128


@pytest.mark.parametrize(("version", "capability", "compiles"), [
    ("3.6.0", (10, 0), False), ("3.6.0", (9, 0), True), ("3.7.1", (10, 0), True), ("3.6.0", (12, 0), True),
])  # fmt: skip
def test_gram_is_left_where_triton_does_not_compile_it(
    monkeypatch: pytest.MonkeyPatch, version: str, capability: tuple[int, int], compiles: bool
) -> None:
    """There the solver's plain steps take its place, and who asks for it by name is told."""
    import triton

    from flashlla import explain
    from flashlla.backends.triton import configs

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(configs, "capability", lambda device: capability)
    assert configs.gram_compiles(capability) == compiles
    q = torch.zeros(1, 1, 1100, 16, dtype=torch.bfloat16)
    reason = explain(q, q, q, backend="triton", solver="pcg_gram").reasons["triton"]
    assert (reason is None) == compiles, reason
    if not compiles:
        assert "Triton 3.6" in str(reason)
    assert explain(q, q, q, backend="triton").reasons["triton"] is None


def test_without_triton_its_version_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashlla import explain
    from flashlla.backends import triton as backend
    from flashlla.backends.triton import configs

    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    monkeypatch.setattr(configs, "triton_version", lambda: pytest.fail("there is none"))
    monkeypatch.setattr(configs, "capability", lambda device: (10, 0))
    q = torch.zeros(1, 1, 1100, 16, dtype=torch.bfloat16)
    assert "Triton is not installed" in str(explain(q, q, q, solver="pcg_gram").reasons["triton"])


@pytest.mark.parametrize(("version", "cap"), [("3.6.0", 168), ("3.7.1", 168), ("3.8.0", None), ("3.10.0+git", None)])
def test_dk_has_all_registers_where_triton_is_all_it_has(
    monkeypatch: pytest.MonkeyPatch, version: str, cap: int | None
) -> None:
    import triton

    from flashlla.backends.triton import configs

    monkeypatch.setattr(triton, "__version__", version)
    table = configs.config.__wrapped__("dk", 64, torch.float16, (9, 0))
    assert table == configs.Config(32, 64, 4, 2, cap)
    assert configs.config.__wrapped__("dk", 128, torch.float16, (9, 0)) == configs._HALF[128]["dk"]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("operand", [torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [1, 16, 40, 64, 128, 200, 256])
def test_tiles_of_dk_lie_inside_those_of_dq(head_dim: int, operand: torch.dtype, capability: tuple[int, int]) -> None:
    from flashlla.backends.triton import configs

    dq = configs.config("dq", head_dim, operand, capability)
    assert all(c.m <= configs.ROWS_PAD for c in configs.candidates("dq", head_dim, operand, capability))
    few = configs.config("dk", head_dim, operand, capability, few=True)
    for dk in (few, *configs.candidates("dk", head_dim, operand, capability)):
        assert dq.m % dk.m == 0


@pytest.mark.slow
@interpreted
def test_few_programs_have_a_config_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two heads of 64 keys and room for two programs a processor; and the gradients are right with either."""
    from flashlla.backends.triton import configs, plan

    tiles = []
    run = plan.Launch.run
    spy = lambda launch, call: (tiles.append((launch.name, launch.settings.get("BLOCK_N"))), run(launch, call))[1]
    monkeypatch.setattr(plan.Launch, "run", spy)
    tensors = make((1, 2, 64, 64), torch.float16)
    for processors, keys in ((1, 32), (0, 64)):
        tiles.clear()
        plan.forget()
        monkeypatch.setattr(configs, "processors", lambda device, n=processors: n)
        check(step(tensors, 1.0, backend="triton"), tensors, 1.0)
        assert ("dk", keys) in tiles
        assert ("dq", 64) in tiles
