"""Calls of DTensors: on batch and heads each rank runs its shards, along the sequence they share a call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flashlla.api import lla_attention
from flashlla.distributed.attention import lla_attention_cp

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashlla.options import AttentionOptions


class _Dims(NamedTuple):
    """Dimensions of q, k and v; of 3-D tensors, which have no heads, None."""

    batch: int
    head: int | None
    token: int


def attention(q: DTensor, k: DTensor, v: DTensor, *, return_info: bool, **options: Unpack[AttentionOptions]) -> Any:
    """:func:`flashlla.lla_attention` of DTensors of one mesh and one placement: o, and what info holds, have it too.

    A ridge that is a plain tensor is the same on all ranks; its gradient is the whole.
    """
    dims = _dims(q, str(options["layout"]))
    mesh, placements = _common(q, k, v)
    along = _sequence(q, k, placements, mesh, dims)
    # Of a ridge (B, H, S) the dimension, counted from its last, that lies along one of q.
    of_ridge = {dims.batch: 2 if dims.head is None else 3, dims.head: 2, dims.token: 1}
    if dims.head is None:
        del of_ridge[None]
    options["ridge_lambda"] = _alike(options["ridge_lambda"], mesh, placements, of_ridge)
    for name in ("seqlens_k", "seqstarts_k"):
        options[name] = _alike(options[name], mesh, placements, {dims.batch: 1})
    shards = [t.to_local() for t in (q, k, v)]
    if along is None:
        found = lla_attention(*shards, return_info=return_info, **options)
    else:
        found = lla_attention_cp(
            *shards, group=mesh.get_group(along), order="contiguous", return_info=return_info, **options
        )
    whole = lambda t: DTensor.from_local(t, mesh, placements, run_check=False)
    if isinstance(found, Tensor):
        return whole(found)
    o, info = found
    rows = {name: whole(t) for name, t in info._asdict().items() if name != "choice"}
    return whole(o), info._replace(**rows)


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


def _alike(t: Any, mesh: DeviceMesh, placements: tuple[Placement, ...], dims: dict[int | None, int]) -> Any:
    """The local part of ``t``, which every rank has whole or which is a DTensor, sharded as q is. ``dims``: of a
    dimension of q that of t, counted from the last; t may lack it, or have 1 there."""
    if not isinstance(t, Tensor):
        return t
    whole = [Replicate()] * mesh.ndim
    given = t if isinstance(t, DTensor) else DTensor.from_local(t, mesh, whole, run_check=False)
    wanted: list[Placement] = []
    summed: list[Placement] = []  # placements of its gradient
    for placement in placements:
        dim = t.dim() - dims.get(placement.dim, t.dim() + 1) if isinstance(placement, Shard) else -1
        sharded = dim >= 0 and t.shape[dim] > 1
        wanted.append(Shard(dim) if sharded else Replicate())
        summed.append(Shard(dim) if sharded else Partial() if isinstance(placement, Shard) else Replicate())
    return given.redistribute(mesh, wanted).to_local(grad_placements=summed)
