"""Calls of DTensors: on batch and heads each rank runs its shards, along the sequence they share a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import local_map

from flashlla.api import LLAInfo, lla_attention
from flashlla.distributed.attention import lla_attention_cp

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashlla.options import AttentionOptions


class _Dims(NamedTuple):
    """Dimensions of q, k and v; of 3-D tensors, which have no heads, None."""

    batch: int
    head: int | None
    token: int


class _Given(NamedTuple):
    """An argument: a DTensor, the placements that each rank takes its part of, and those of what comes back as its
    gradient; or what is no tensor."""

    value: Any
    placements: tuple[Placement, ...] | None
    gradients: tuple[Placement, ...] | None


def attention(q: DTensor, k: DTensor, v: DTensor, *, return_info: bool, **options: Unpack[AttentionOptions]) -> Any:
    """:func:`flashlla.lla_attention` of DTensors of one mesh and one placement: o, and what info holds, have it too.

    A ridge that is a plain tensor is the same on all ranks; its gradient is the whole.
    """
    dims = _dims(q, str(options["layout"]))
    mesh, placements = _common(q, k, v)
    along = _sequence(q, k, placements, mesh, dims)
    # Of a ridge (B, H, S) and of lengths (B,) the dimension, counted from the last, that lies along one of q.
    of_ridge = {dims.batch: 3, dims.head: 2, dims.token: 1} if dims.head else {dims.batch: 2, dims.token: 1}
    named: dict[str, dict[int, int]] = {"ridge_lambda": of_ridge}
    named |= {name: {dims.batch: 1} for name in ("seqlens_k", "seqstarts_k")}
    given = [_Given(t, placements, placements) for t in (q, k, v)]
    given += [_alike(name, options[name], mesh, placements, lie) for name, lie in named.items()]  # type: ignore[literal-required]
    choice: list[Tensor] = []  # a number, of which there are no shards

    def of_shards(q: Tensor, k: Tensor, v: Tensor, *own: Any) -> Any:
        arguments: Any = {**options, **dict(zip(named, own)), "return_info": return_info}
        if along is None:
            found = lla_attention(q, k, v, **arguments)
        else:
            found = lla_attention_cp(q, k, v, group=mesh.get_group(along), order="contiguous", **arguments)
        if not return_info:
            return found
        o, (*rows, number) = found
        choice.append(number)
        return o, *rows

    values, wanted, gradients = zip(*given)
    like_q: Any = [*placements]  # no tuple, which is of several results
    found = local_map(
        of_shards,
        out_placements=(like_q,) * len(LLAInfo._fields) if return_info else like_q,  # o, and all fields but the choice
        in_placements=wanted,
        in_grad_placements=gradients,
        device_mesh=mesh,
        redistribute_inputs=True,
    )(*values)
    if not return_info:
        return found
    o, *rows = found
    return o, LLAInfo(*rows, *choice)


def _dims(q: DTensor, layout: str) -> _Dims:
    if q.dim() == 3:
        return _Dims(batch=0, head=None, token=1)
    return _Dims(batch=0, head=1, token=2) if layout == "bhsd" else _Dims(batch=0, head=2, token=1)


def _common(q: DTensor, k: DTensor, v: DTensor) -> tuple[DeviceMesh, tuple[Placement, ...]]:
    """The mesh and the placements that they share."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, DTensor):
            raise TypeError(
                f"{name}: got a {type(t).__name__} together with DTensors, wanted a DTensor, too; try "
                f"DTensor.from_local({name}, mesh, placements)"
            )
        if t.device_mesh != q.device_mesh:
            raise ValueError(f"{name}: got mesh {t.device_mesh}, wanted {q.device_mesh}, that of q")
        if t.placements != q.placements:
            raise ValueError(
                f"{name}: got placements {t.placements}, wanted {q.placements}, those of q; try "
                f"{name}.redistribute(placements=q.placements)"
            )
    return q.device_mesh, q.placements


def _sequence(q: DTensor, k: DTensor, placements: tuple[Placement, ...], mesh: DeviceMesh, dims: _Dims) -> int | None:
    """The dimension of the mesh that the sequence lies along, if any."""
    found = None
    kinds = ", ".join(
        f"Shard({dim}) on {name}" for name, dim in zip(("batch", "heads", "the sequence"), dims) if dim is not None
    )
    for i, placement in enumerate(placements):
        where = f"mesh dimension {mesh.mesh_dim_names[i] if mesh.mesh_dim_names else i!r}"
        if isinstance(placement, Replicate):
            continue
        if type(placement) is not Shard or placement.dim not in dims:
            raise ValueError(
                f"q: got placement {placement!r} along {where}, wanted {kinds}, or Replicate(); try "
                f"q.redistribute(placements=...), and k and v likewise"
            )
        for name, t in (("q", q), ("k", k)):
            parts = mesh.size(i)
            if t.shape[placement.dim] % parts:
                raise ValueError(
                    f"{name}: got shape {tuple(t.shape)} with {placement} along {where}, wanted a multiple of its "
                    f"{parts} ranks at {placement.dim}"
                )
        if placement.dim == dims.token:
            if found is not None:
                raise ValueError(
                    f"q: got placements {placements}, wanted the sequence along one dimension of the mesh; try a mesh "
                    f"whose dimensions are flattened"
                )
            found = i
    return found


def _alike(name: str, t: Any, mesh: DeviceMesh, placements: tuple[Placement, ...], dims: dict[int, int]) -> _Given:
    """``t``, which every rank has whole or which is a DTensor, sharded as q is. ``dims``: of a dimension of q that of
    t, counted from the last; t may lack it, or have 1 there."""
    if not isinstance(t, Tensor):
        return _Given(t, None, None)
    if not isinstance(t, DTensor):
        t = DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False)
    elif t.device_mesh != mesh:
        raise ValueError(f"{name}: got mesh {t.device_mesh}, wanted {mesh}, that of q")
    wanted: list[Placement] = []
    summed: list[Placement] = []  # placements of its gradient
    for placement in placements:
        dim = t.dim() - dims.get(placement.dim, t.dim() + 1) if isinstance(placement, Shard) else -1
        sharded = dim >= 0 and t.shape[dim] > 1
        wanted.append(Shard(dim) if sharded else Replicate())
        summed.append(Shard(dim) if sharded else Partial() if isinstance(placement, Shard) else Replicate())
    return _Given(t, tuple(wanted), tuple(summed))
