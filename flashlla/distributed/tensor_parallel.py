"""The layer with its heads over several devices, by torch's own styles."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from flashlla.hints import with_hints


class RidgeParallel(ParallelStyle):
    """A :class:`flashlla.nn.Ridge` by heads: each rank has the ridges of its heads. Hidden states are whole on every
    rank, as for ``ColwiseParallel``.

    Raises:
        ValueError: the heads do not divide by the ranks.

    Example:
        >>> from flashlla.distributed import RidgeParallel
        >>> plan = {"layers.0.attention.ridge": RidgeParallel()}  # beside q_proj, k_proj, v_proj and o_proj
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check_heads("num_heads", int(module.num_heads), device_mesh)  # type: ignore[arg-type]
        return distribute_module(module, device_mesh, _shard_ridge, _whole_input, _own_output)  # type: ignore[arg-type]


def _shard_ridge(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        module.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))


def _whole_input(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
    whole = partial(DTensor.from_local, device_mesh=mesh, placements=[Replicate()], run_check=False)
    return tuple(whole(t) if isinstance(t, Tensor) and not isinstance(t, DTensor) else t for t in inputs)


def _own_output(_: nn.Module, ridge: Any, mesh: DeviceMesh) -> Any:
    return ridge.to_local() if isinstance(ridge, DTensor) else ridge


@with_hints()
def tensor_parallel_plan(layer: nn.Module, mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    """What ``parallelize_module`` is to do with a :class:`flashlla.nn.LocalLinearAttention`: heads over ``mesh``.

    Queries, keys and values are projected to each rank's heads (``ColwiseParallel``), the output from them
    (``RowwiseParallel``), ridges go with their heads, and the norms of heads are shared. Hidden states are whole on
    every rank, before and after.

    Args:
        layer: the layer, or one with its names.
        mesh: a DeviceMesh of one dimension.

    Raises:
        ValueError: ``num_heads`` or ``num_kv_heads`` does not divide by the ranks.

    Source: Shoeybi et al., "Megatron-LM", 2019.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from flashlla.distributed import tensor_parallel_plan
        >>> from flashlla.nn import LocalLinearAttention
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh, layer = init_device_mesh("cpu", (1,)), LocalLinearAttention(64, num_heads=4)
        >>> _ = parallelize_module(layer, mesh, tensor_parallel_plan(layer, mesh))
        >>> dist.destroy_process_group()
    """
    for name in ("num_heads", "num_kv_heads"):
        _check_heads(name, getattr(layer, name), mesh)
    plan: dict[str, ParallelStyle] = {
        **{name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
        "o_proj": RowwiseParallel(),
        "ridge": RidgeParallel(),
    }
    for name in ("q_norm", "k_norm"):
        if not isinstance(getattr(layer, name), nn.Identity):
            plan[name] = SequenceParallel(sequence_dim=2, use_local_output=True)  # heads of (B, S, H, D)
    return plan


def _check_heads(name: str, heads: int, mesh: DeviceMesh) -> None:
    if heads % mesh.size():
        raise ValueError(f"{name}: got {heads} on {mesh.size()} ranks, wanted a multiple of {mesh.size()}")
