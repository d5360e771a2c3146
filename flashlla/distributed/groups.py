"""The processes that share a call: who they are, and whether they ask for the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch._compile import _disable_dynamo

with contextlib.suppress(ImportError):
    # Before there is a group. torch loads it with the compiler, at the first call here, and as default of an argument
    # keeps the group of that moment: one that outlives destroy_process_group has threads, of which one that gives up
    # a tensor while the interpreter ends aborts the process.
    import torch.distributed.nn.functional

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    Group: TypeAlias = dist.ProcessGroup | DeviceMesh

# Calls of a group in which its ranks compare what they ask for. To compare waits for the device.
COMPARED = 10
# Of every group, how many calls it has had. Counted, and nothing else: a rank that left out a comparison, because it
# knew the call, would have its next collective taken for one.
_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """``function``, which torch.compile breaks its graph for: collectives are run, not traced."""
    # torch.compiler.disable, but for the compiler's import, which takes seconds, before anything is compiled.
    return cast("F", _disable_dynamo(function))


class Ranks(NamedTuple):
    """A process group, seen from one of its processes."""

    group: dist.ProcessGroup
    rank: int
    size: int


def ranks_of(group: Group, name: str = "group") -> Ranks:
    """Of a ProcessGroup, or of a DeviceMesh of one dimension, which the caller calls ``name``."""
    found: Any = group
    if type(group).__name__ == "DeviceMesh":  # whose module is not loaded for those that have none
        if found.ndim != 1:
            names = f" ({', '.join(found.mesh_dim_names)})" if found.mesh_dim_names else ""
            raise ValueError(
                f"{name}: got a DeviceMesh of {found.ndim} dimensions{names}, wanted one; try mesh['cp'], by the name "
                f"of the dimension that the sequence lies along"
            )
        found = found.get_group()
    not_in_it = f"{name}: this process is not in it, wanted a group of which it is a rank"
    if dist.is_available() and found is dist.GroupMember.NON_GROUP_MEMBER:  # what torch gives those that are left out
        raise ValueError(not_in_it)
    if not dist.is_available() or not isinstance(found, dist.ProcessGroup):
        hint = "torch.distributed.group.WORLD"
        if not dist.is_available() or not dist.is_initialized():
            hint = f"torch.distributed.init_process_group() in a process that torchrun has started, then {hint}"
        raise TypeError(
            f"{name}: got {type(group).__name__}, wanted a ProcessGroup or a DeviceMesh of one dimension; for all "
            f"processes try {hint}"
        )
    rank = dist.get_rank(found)
    if rank < 0:
        raise ValueError(not_in_it)
    return Ranks(found, rank, dist.get_world_size(found))


def agree(ranks: Ranks, device: torch.device, asked: Callable[[], dict[str, Any]]) -> None:
    """An error on all ranks where what they have ``asked`` for differs; looked at in a group's first calls, and in all
    of them where the environment variable FLASHLLA_CHECK is 1. What is asked for is told by its ``repr``.
    """
    calls = _calls[ranks.group] = _calls.get(ranks.group, 0) + 1
    if ranks.size == 1 or (calls > COMPARED and os.environ.get("FLASHLLA_CHECK") != "1"):
        return
    # A rank that compared in later calls what others do not would take their next collective for a comparison.
    alike = {**asked(), "FLASHLLA_CHECK": os.environ.get("FLASHLLA_CHECK") == "1"}
    told = {name: repr(value) for name, value in alike.items()}
    digest = hashlib.sha256(repr(told).encode()).digest()[:8]
    own = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=device)
    everyones = [torch.empty_like(own) for _ in range(ranks.size)]
    dist.all_gather(everyones, own, group=ranks.group)
    if len({int(number) for number in everyones}) == 1:
        return
    tellings: list[dict[str, str]] = [{} for _ in range(ranks.size)]
    dist.all_gather_object(tellings, told, group=ranks.group)
    differing = "; ".join(
        f"{name}: " + ", ".join(f"{telling.get(name)} on rank {rank}" for rank, telling in enumerate(tellings))
        for name in told
        if len({telling.get(name) for telling in tellings}) > 1
    )
    raise ValueError(f"group: its ranks call with other arguments than one another, wanted the same. {differing}")
