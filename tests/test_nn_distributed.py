"""The layer on two processes gives the gradients of one: DistributedDataParallel, FSDP2, both casts of FSDP2."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor

from flashlla.nn import LocalLinearAttention, Ridge, param_groups
from tests.support.helpers import normal
from tests.support.processes import together

PROCESSES = 2
WIDTH = 16

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


class Model(nn.Module):
    """Two layers, one with a ridge of heads and one with a ridge of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            LocalLinearAttention(WIDTH, 4, 2, ridge=ridge, dtype=torch.float64)  # type: ignore[arg-type]
            for ridge in ("head", "token")
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, attention_mask=mask)[0]
        return x


def made(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ridge" in name:
                parameter.add_(normal(*parameter.shape, seed=3, dtype=parameter.dtype))
    return model.to(dtype)


def batch() -> tuple[Tensor, Tensor]:
    return normal(4, 9, WIDTH), torch.arange(9) >= torch.tensor([0, 2, 1, 5])[:, None]


def gradients(model: nn.Module, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
    model(x, mask).square().sum(-1).mean().backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def _ddp() -> nn.Module:
    return nn.parallel.DistributedDataParallel(made())


def _fsdp() -> nn.Module:
    model = made()
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _fsdp_on_meta() -> nn.Module:
    with torch.device("meta"):
        model = Model()
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    whole = made().state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(distribute_tensor(whole[name], parameter.device_mesh, parameter.placements))
    return model


def _fsdp_bfloat16() -> nn.Module:
    """What the docstring of Ridge says to do with a model in bfloat16."""
    model = made(torch.bfloat16)
    for layer in model.layers:
        fully_shard(layer.ridge)
        fully_shard(layer)
    return fully_shard(model)


def _fsdp_mixed() -> nn.Module:
    model = made(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


WRAPPED = {
    "ddp": (_ddp, torch.float64),
    "fsdp": (_fsdp, torch.float64),
    "fsdp_on_meta": (_fsdp_on_meta, torch.float64),
    "fsdp_bfloat16": (_fsdp_bfloat16, torch.bfloat16),
    "fsdp_mixed": (_fsdp_mixed, torch.float32),
}


def of_processes(folder: Path) -> None:
    """Each process puts its part of the batch through each wrapped model; the first saves all gradients."""
    rank = dist.get_rank()
    found: dict[str, dict[str, Any]] = {}
    for name, (wrapped, dtype) in WRAPPED.items():
        model = wrapped()
        x, mask = (t[rank::PROCESSES] for t in batch())
        found[name] = {
            parameter: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            for parameter, grad in gradients(model, x.to(dtype), mask).items()
        }
        ridges = [p for group in param_groups(model, 1e-3, 0.1) if group["name"] == "ridges" for p in group["params"]]
        assert len(ridges) == 3
        assert all(isinstance(m.raw, nn.Parameter) for m in model.modules() if isinstance(m, Ridge))
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.barrier()  # so that none goes while another still talks to it


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    together(PROCESSES, folder, functools.partial(of_processes, folder))
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", WRAPPED)
def test_gradients_are_those_of_one_process(name: str, found: dict[str, dict[str, Tensor]]):
    _, dtype = WRAPPED[name]
    expected = gradients(made(), *batch())
    assert found[name].keys() == expected.keys()
    for parameter, exact in expected.items():
        grad = found[name][parameter]
        assert exact.any(), parameter
        if name.endswith(("bfloat16", "mixed")):
            assert grad.dtype == (torch.promote_types(dtype, torch.float32) if "ridge" in parameter else dtype)
            assert (grad - exact).norm() < 0.05 * exact.norm(), parameter
        else:
            assert (grad - exact).norm() < 1e-10 * exact.norm(), parameter
