"""Sequences and heads on 2 and on 4 processes: what one process gives, gradients too.

The processes are spawned once for each number of them, and make all checks of ``CHECKS``, each on every rank.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils.checkpoint import checkpoint

from flashlla import lla_attention, lla_attention_varlen
from flashlla.distributed import (
    lla_attention_cp,
    lla_attention_varlen_cp,
    shard_positions,
    shard_sequence,
    sum_gradients,
    tensor_parallel_plan,
    unshard_sequence,
)
from flashlla.nn import LLACache, LocalLinearAttention
from tests.support.helpers import cu, normal
from tests.support.processes import Checks, close, outcomes, world

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

SIZES = (2, 4)
LENGTH = 48
ORDERS, METHODS = ("head_tail", "contiguous"), ("all_gather", "all_to_all")
CHECKS = Checks()
check = CHECKS.add


def wanted(call: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Of one process: o, a gradient of it, and the gradients of the leaves."""
    leaves = tuple(t.clone().requires_grad_() for t in leaves)
    o = call(*leaves)
    grad_o = normal(*o.shape, seed=9)
    return o.detach(), grad_o, torch.autograd.grad(o, leaves, grad_o)


def compare(
    call: Callable[..., Tensor],
    across: Callable[..., Tensor],
    leaves: tuple[Tensor, ...],
    dims: tuple[int | None, ...],
    order: str,
) -> None:
    """``across``, of shards along ``dims``, gives what ``call`` gives of the whole ``leaves``; None: no shard."""
    o, grad_o, gradients = wanted(call, *leaves)
    shard = lambda t, dim: t if dim is None else shard_sequence(t, group=world(), order=order, dim=dim)
    unshard = functools.partial(unshard_sequence, group=world(), order=order)
    own = [shard(t, dim).clone().requires_grad_() for t, dim in zip(leaves, dims)]
    o_own = across(*own)
    o_own.backward(shard(grad_o, dims[0]))
    close(unshard(o_own.detach(), dim=dims[0]), o)
    for t, dim, gradient in zip(own, dims, gradients):
        if dim is None:
            sum_gradients(t, group=world())
        close(t.grad if dim is None else unshard(t.grad, dim=dim), gradient)


HEADS = normal(2, 8, LENGTH, 6), normal(2, 8, LENGTH, 6, seed=1), normal(2, 8, LENGTH, 5, seed=2)
RIDGE_OF_HEADS, RIDGE_OF_TOKENS = normal(8, 1, seed=3).exp(), normal(2, 8, LENGTH, seed=4).exp()
LENGTHS = {"seqlens_k": torch.tensor([40, 7]), "seqstarts_k": torch.tensor([9, 0])}
# Whether ridges are heads', how many key heads there are, and the keywords.
CASES: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "plain": (True, 8, {}),
    "tokens": (False, 8, {}),
    "shared": (False, 4, {"scale": -0.3}),
    "all_keys": (False, 8, {"causal": False}),
    "lengths": (False, 8, LENGTHS),
    **{f"window_{n}": (False, 8, {"window": n}) for n in (1, 9, 29)},
}


def attention(order: str, method: str, of_heads: bool, key_heads: int, keywords: dict[str, Any]) -> None:
    keywords = {"solver": "direct", **keywords}
    if "scale" in keywords:
        keywords["qk_scale"] = keywords.pop("scale")
    q, k, v = HEADS
    leaves = q, k[:, :key_heads], v[:, :key_heads], RIDGE_OF_HEADS if of_heads else RIDGE_OF_TOKENS
    dims = 2, 2, 2, None if of_heads else 2
    compare(
        lambda q, k, v, ridge: lla_attention(q, k, v, ridge_lambda=ridge, **keywords),
        lambda q, k, v, ridge: lla_attention_cp(
            q, k, v, ridge_lambda=ridge, group=world(), order=order, method=method, **keywords
        ),
        leaves,
        dims,
        order,
    )


for (_name, _case), _order, _method in itertools.product(CASES.items(), ORDERS, METHODS):
    check(_order, _method, *_case, name=f"{_name}-{_order}-{_method}")(attention)

# Documents that cross ranks, uneven ones and empty ones, and tokens behind the last.
ROWS = {"uneven": (0, 5, 5, 30, 41), "one": (0, 48), "short": (0, 13, 13, 13, 14, 48), "rest": (0, 0, 3)}


def packed(
    order: str,
    method: str,
    edges: tuple[int, ...],
    keywords: dict[str, Any],
    of_heads: bool = False,
    key_heads: int = 8,
) -> None:
    keywords = {"solver": "direct", "cu_seqlens": cu(*edges), **keywords}
    q, k, v = (t[0].transpose(0, 1) for t in HEADS)
    compare(
        lambda q, k, v, ridge: lla_attention_varlen(q, k, v, ridge_lambda=ridge, **keywords),
        lambda q, k, v, ridge: lla_attention_varlen_cp(
            q, k, v, ridge_lambda=ridge, group=world(), order=order, method=method, **keywords
        ),
        (q, k[:, :key_heads], v[:, :key_heads], RIDGE_OF_HEADS if of_heads else RIDGE_OF_TOKENS[0]),
        (0, 0, 0, None if of_heads else 1),
        order,
    )


for (_name, _edges), _order, _method in itertools.product(ROWS.items(), ORDERS, METHODS):
    for _also, _keywords in {"": {}, "-window": {"window": 6}, "-all_keys": {"causal": False}}.items():
        check(_order, _method, _edges, _keywords, name=f"packed_{_name}-{_order}-{_method}{_also}")(packed)
    check(_order, _method, _edges, {}, True, 4, name=f"packed_{_name}-{_order}-{_method}-shared")(packed)


@check()
def a_few_heads_at_a_time() -> None:
    q, k, v = HEADS
    compare(
        lambda q, k, v, ridge: lla_attention(q, k, v, ridge_lambda=ridge, solver="direct"),
        lambda q, k, v, ridge: lla_attention_cp(
            q, k, v, ridge_lambda=ridge, solver="direct", group=world(), key_heads_at_once=3
        ),
        (q, k, v, RIDGE_OF_HEADS),
        (2, 2, 2, None),
        "head_tail",
    )


@check()
def other_layouts() -> None:
    compare(
        lambda q, k, v: lla_attention(q, k, v, ridge_lambda=0.3, solver="direct", layout="bshd"),
        lambda q, k, v: lla_attention_cp(q, k, v, ridge_lambda=0.3, solver="direct", layout="bshd", group=world()),
        tuple(t.transpose(1, 2) for t in HEADS),
        (1, 1, 1),
        "head_tail",
    )
    compare(
        lambda q, k, v: lla_attention(q, k, v, solver="direct"),
        lambda q, k, v: lla_attention_cp(q, k, v, solver="direct", group=world()),
        tuple(t[:, 0] for t in HEADS),
        (1, 1, 1),
        "head_tail",
    )


@check()
def meshes_do_as_groups() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))
    shards = [shard_sequence(t, group=mesh, dim=2) for t in HEADS]
    o = lla_attention_cp(*shards, group=mesh["cp"])
    close(o, lla_attention_cp(*shards, group=world()))
    two = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("dp", "cp"))
    with pytest.raises(ValueError, match=r"group: got a DeviceMesh of 2 dimensions \(dp, cp\), wanted one"):
        lla_attention_cp(*shards, group=two)


@check()
def sequences_come_back() -> None:
    for order, dim in itertools.product(ORDERS, (1, -1)):
        x = normal(3, LENGTH, LENGTH, seed=5)
        shard = shard_sequence(x, group=world(), order=order, dim=dim)
        assert shard.is_contiguous()
        assert torch.equal(unshard_sequence(shard, group=world(), order=order, dim=dim), x)
        places = shard_positions(LENGTH, group=world(), order=order)
        assert torch.equal(x.index_select(dim, places), shard)
        # The gradient is that of the sum of all ranks' losses, each of which is the square here.
        own = shard.clone().requires_grad_()
        unshard_sequence(own, group=world(), order=order, dim=dim).square().sum().backward()
        close(own.grad, 2 * dist.get_world_size() * shard)


@check()
def info_is_that_of_own_tokens() -> None:
    shards = [shard_sequence(t, group=world(), dim=2) for t in HEADS]
    o, whole = lla_attention(*HEADS, ridge_lambda=0.5, return_info=True)
    for method in METHODS:
        o_own, info = lla_attention_cp(*shards, ridge_lambda=0.5, group=world(), method=method, return_info=True)
        close(unshard_sequence(o_own, group=world(), dim=2), o, 1e-10)
        close(unshard_sequence(info.omega, group=world(), dim=2), whole.omega, 1e-10)
        assert unshard_sequence(info.converged, group=world(), dim=2).all()
        assert torch.equal(unshard_sequence(info.iterations, group=world(), dim=2), whole.iterations)
        assert info.backend == whole.backend


@check()
def only_what_is_wanted() -> None:
    """Of one differentiable input at a time the gradient that it gets together with the others."""
    leaves = [*(shard_sequence(t, group=world(), dim=2) for t in (*HEADS, RIDGE_OF_TOKENS))]

    def gradients(which: set[int]) -> list[Tensor | None]:
        given = [t.clone().requires_grad_(i in which) for i, t in enumerate(leaves)]
        lla_attention_cp(*given[:3], ridge_lambda=given[3], group=world()).sum().backward()
        return [t.grad for t in given]

    together = gradients({0, 1, 2, 3})
    for i in range(4):
        alone = gradients({i})
        assert [g is not None for g in alone] == [j == i for j in range(4)]
        close(alone[i], together[i])
    with torch.no_grad():
        assert not lla_attention_cp(*leaves[:3], group=world()).requires_grad


@check()
def a_second_derivative_is_refused() -> None:
    q, k, v = (shard_sequence(t, group=world(), dim=2).requires_grad_() for t in HEADS)
    (grad,) = torch.autograd.grad(lla_attention_cp(q, k, v, group=world()).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivative only"):
        grad.sum().backward()


@check()
def checkpointing() -> None:
    given = [shard_sequence(t, group=world(), dim=2).requires_grad_() for t in HEADS]
    loss = lambda *tensors: lla_attention_cp(*tensors, group=world()).sin().sum()
    expected = torch.autograd.grad(loss(*given), given)
    checkpoint(loss, *given, use_reentrant=False).backward()
    for t, gradient in zip(given, expected):
        assert torch.equal(t.grad, gradient)


@check()
def gradients_of_keys_are_rounded_once() -> None:
    """In bfloat16 as near to float64 as those of one process: parts are added in float32."""
    leaves = [t.bfloat16() for t in HEADS]
    grad_o = normal(*leaves[2].shape, seed=9).bfloat16()

    def gradient(call: Callable[..., Tensor], grad_o: Tensor, *given: Tensor) -> Tensor:
        given = tuple(t.detach().clone().requires_grad_() for t in given)
        return torch.autograd.grad(call(*given), given[1], grad_o)[0]

    one = functools.partial(lla_attention, solver="direct")
    exact = gradient(one, grad_o.double(), *(t.double() for t in leaves))
    alone = gradient(one, grad_o, *leaves)
    shard = functools.partial(shard_sequence, group=world(), dim=2)
    own = gradient(
        functools.partial(lla_attention_cp, solver="direct", group=world()), shard(grad_o), *map(shard, leaves)
    )
    assert own.dtype == torch.bfloat16
    across = unshard_sequence(own, group=world(), dim=2)
    rounding = (exact.bfloat16() - exact).norm()
    assert (alone - exact).norm() < 1.1 * rounding
    assert (across - exact).norm() < 1.1 * rounding


@check()
def gathered_keys_are_not_kept() -> None:
    """For the backward pass, which gathers them again: nothing of all tokens, but this rank's alone."""
    shapes: list[tuple[int, ...]] = []
    given = [shard_sequence(t, group=world(), dim=2).requires_grad_() for t in HEADS]
    keep = lambda t: shapes.append(tuple(t.shape)) or t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lla_attention_cp(*given, group=world()).sum().backward()
    assert tuple(given[1].shape) in shapes
    assert not any(LENGTH in shape for shape in shapes)


def the_same_bits_in_every_run(method: str, window: int | None) -> None:
    given = [shard_sequence(t, group=world(), dim=2).bfloat16().requires_grad_() for t in (*HEADS, RIDGE_OF_TOKENS)]

    def found() -> list[Tensor]:
        o = lla_attention_cp(
            *given[:3], ridge_lambda=given[3].float(), group=world(), method=method, window=window, key_heads_at_once=3
        )
        return [o, *torch.autograd.grad(o.float().square().sum(), given)]

    first = found()
    for _ in range(2):
        assert all(map(torch.equal, found(), first))


for _method, _window in itertools.product(METHODS, (None, 9)):
    check(_method, _window, name=f"the_same_bits_in_every_run-{_method}-{_window}")(the_same_bits_in_every_run)


# DTensors.


def dtensors(placements: list[Any], ridge_as: str, keywords: dict[str, Any]) -> None:
    """Of DTensors lla_attention gives DTensors, whose gradients are whole."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,) if len(placements) == 1 else (2, size // 2))
    ridge = RIDGE_OF_HEADS if ridge_as.endswith("heads") else RIDGE_OF_TOKENS
    call = lambda q, k, v, ridge: lla_attention(q, k, v, ridge_lambda=ridge, solver="direct", **keywords)
    o, grad_o, gradients = wanted(call, *HEADS, ridge)
    own = [distribute_tensor(t, mesh, placements).requires_grad_() for t in HEADS]
    whole = [Replicate()] * mesh.ndim
    given = ridge.clone() if ridge_as.startswith("plain") else distribute_tensor(ridge, mesh, whole)
    given.requires_grad_()
    got = call(*own, given)
    assert got.placements == tuple(placements)
    got.backward(distribute_tensor(grad_o, mesh, placements))
    close(got.full_tensor(), o)
    for t, gradient in zip([*own, given], gradients):
        close(t.grad.full_tensor() if isinstance(t.grad, DTensor) else t.grad, gradient)


for _name, _placements in {
    "batch_heads": [Shard(0), Shard(1)], "heads": [Shard(1)], "sequence": [Shard(2)], "whole": [Replicate()],
    "heads_sequence": [Shard(1), Shard(2)], "batch_whole": [Shard(0), Replicate()],
}.items():  # fmt: skip
    for _ridge in ("plain_heads", "plain_tokens", "dtensor_heads", "dtensor_tokens"):
        check(_placements, _ridge, LENGTHS, name=f"dtensors_{_name}-{_ridge}")(dtensors)


@check()
def dtensors_that_do_not_fit() -> None:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    q, k, v = (distribute_tensor(t, mesh, [Shard(1)]) for t in HEADS)
    for refused, words in (
        (Partial(), r"q: got placement Partial\(sum\) along mesh dimension 'tp', wanted Shard\(0\) on batch"),
        (Shard(3), r"q: got placement Shard\(dim=3\) along mesh dimension 'tp'"),
    ):
        wrong = [DTensor.from_local(t, mesh, [refused], run_check=False) for t in HEADS]
        with pytest.raises(ValueError, match=words):
            lla_attention(*wrong)
    with pytest.raises(ValueError, match=r"k: got placements .*, those of q"):
        lla_attention(q, k.redistribute(placements=[Replicate()]), v)
    with pytest.raises(TypeError, match="k: got a Tensor together with DTensors"):
        lla_attention(q, HEADS[1], v)
    with pytest.raises(TypeError, match="lla_attention alone takes DTensors"):
        lla_attention_varlen(q[0], k[0], v[0], cu_seqlens=cu(0, 3))
    few = [distribute_tensor(normal(2, 1, 8, 4), mesh, [Shard(1)]) for _ in range(3)]
    with pytest.raises(ValueError, match=rf"q: got shape .* wanted a multiple of its {size} ranks at 1"):
        lla_attention(*few)
    other = distribute_tensor(RIDGE_OF_HEADS, init_device_mesh("cpu", (1, size)), [Replicate(), Replicate()])
    with pytest.raises(ValueError, match=r"ridge_lambda: got mesh .*, wanted .*, that of q"):
        lla_attention(q, k, v, ridge_lambda=other)


@check()
def info_of_dtensors_lies_as_their_output() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    o, whole = lla_attention(*HEADS, return_info=True)
    for placement in (Shard(1), Shard(2), Replicate()):
        got, info = lla_attention(*(distribute_tensor(t, mesh, [placement]) for t in HEADS), return_info=True)
        close(got.full_tensor(), o, 1e-10)
        for name in ("iterations", "residual", "converged", "omega"):
            assert getattr(info, name).placements == got.placements == (placement,)
        close(info.omega.full_tensor(), whole.omega, 1e-10)
        assert info.converged.full_tensor().all()
        assert info.backend == whole.backend


# The layer.


def layer_of(ridge: str, **keywords: Any) -> LocalLinearAttention:
    torch.manual_seed(0)
    layer = LocalLinearAttention(16, 8, 4, ridge=ridge, solver="direct", dtype=torch.float64, **keywords)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * normal(*parameter.shape, seed=parameter.numel()))
    return layer


def gradients_of(
    layer: LocalLinearAttention, x: Tensor, grad_o: Tensor, **keywords: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    o = layer(x, **keywords)[0]
    o.backward(grad_o)
    return o.detach(), {name: parameter.grad for name, parameter in layer.named_parameters()}


def a_layer_across(ridge: str, edges: tuple[int, ...] | None, window: int | None) -> None:
    x, grad_o = normal(1, LENGTH, 16), normal(1, LENGTH, 16, seed=1)
    keywords = {} if edges is None else {"cu_seqlens": cu(*edges)}
    o, gradients = gradients_of(layer_of(ridge, window=window), x, grad_o, **keywords)
    shard = functools.partial(shard_sequence, group=world(), dim=1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = layer_of(ridge, window=window, context_parallel=mesh)
    o_own, own = gradients_of(layer, shard(x), shard(grad_o), **keywords)
    close(unshard_sequence(o_own, group=world(), dim=1), o)
    sum_gradients(layer.parameters(), group=world())
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close(own[name], gradient)
    with pytest.raises(ValueError, match="attention_mask: got one together with context_parallel"):
        layer(shard(x), attention_mask=torch.ones(1, LENGTH // dist.get_world_size()))
    with pytest.raises(ValueError, match="past_key_values: got one together"):
        layer(shard(x), past_key_values=LLACache())


for _name, _case in {
    "heads": ("head", None, None),
    "tokens": ("token", None, 7),
    "rows": ("head", (0, 5, 5, 41), None),
}.items():
    check(*_case, name=f"layer_across-{_name}")(a_layer_across)


@check()
def means_of_gradients_want_losses_times_the_ranks() -> None:
    """DistributedDataParallel and FSDP2 over the ranks of the sequence, as docs/distributed.md has them."""
    x, grad_o = normal(1, LENGTH, 16), normal(1, LENGTH, 16, seed=1)
    _, gradients = gradients_of(layer_of("head"), x, grad_o)
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    shard = functools.partial(shard_sequence, group=world(), dim=1)
    for wrapped in (nn.parallel.DistributedDataParallel, functools.partial(fully_shard, mesh=mesh)):
        layer = wrapped(layer_of("head", context_parallel=mesh))
        _, own = gradients_of(layer, shard(x), size * shard(grad_o))
        for name, gradient in gradients.items():
            got = own[name if name in own else f"module.{name}"]
            close(got.full_tensor() if isinstance(got, DTensor) else got, gradient)


def a_layer_by_heads(ridge: str) -> None:
    x, grad_o = normal(2, 12, 16), normal(2, 12, 16, seed=1)
    own_x = x.clone().requires_grad_()
    x.requires_grad_()
    o, gradients = gradients_of(layer_of(ridge), x, grad_o)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer = layer_of(ridge)
    layer = parallelize_module(layer, mesh, tensor_parallel_plan(layer, mesh))
    o_own, own = gradients_of(layer, own_x, grad_o)
    close(o_own, o)
    close(own_x.grad, x.grad)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        close(own[name].full_tensor(), gradient)
    assert own["ridge.raw"].to_local().shape == (8 // dist.get_world_size(),)
    odd = LocalLinearAttention(12, 3)
    with pytest.raises(ValueError, match=f"num_heads: got 3 on {dist.get_world_size()} ranks"):
        tensor_parallel_plan(odd, mesh)


for _ridge in ("head", "token"):
    check(_ridge, name=f"layer_by_heads-{_ridge}")(a_layer_by_heads)


@check()
def a_layer_by_heads_across() -> None:
    """Heads along one dimension of a mesh, the sequence along the other."""
    x, grad_o = normal(1, LENGTH, 16), normal(1, LENGTH, 16, seed=1)
    o, gradients = gradients_of(layer_of("head"), x, grad_o)
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("cp", "tp"))
    cp = mesh["cp"]
    layer = layer_of("head", context_parallel=cp)
    layer = parallelize_module(layer, mesh["tp"], tensor_parallel_plan(layer, mesh["tp"]))
    shard = functools.partial(shard_sequence, group=cp, dim=1)
    o_own, own = gradients_of(layer, shard(x), shard(grad_o))
    close(unshard_sequence(o_own, group=cp, dim=1), o)
    sum_gradients(layer.parameters(), group=cp)
    for name, gradient in gradients.items():
        close(own[name].full_tensor(), gradient)


@check()
def zz_a_rank_that_dies_ends_the_others() -> None:
    """Comes last: whoever waits for a rank that is gone gets an error."""
    if dist.get_rank() == 1:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return
    q = normal(1, 2, 4, 4)
    with pytest.raises(RuntimeError):
        lla_attention_cp(q, q, q, group=world())


@pytest.mark.parametrize("size", SIZES)
def test_processes_together(size: int, tmp_path: Path) -> None:
    """One test for all checks, so that processes are spawned once, on whichever worker it runs."""
    found = outcomes(size, tmp_path, CHECKS)
    assert {name: told for name, told in found.items() if any(told)} == {}
