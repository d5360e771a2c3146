"""What a random call is, and how one is drawn."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import flashlla
from tests.support.cases import DATA, LAYOUTS, RIDGES, Case
from tests.support.decoding import Decoding

# Arguments that no call takes, by name: each is to be refused, and the error to say which it was.
WRONG: dict[str, tuple[Any, ...]] = {
    "ridge_lambda": (0.0, -1.0, float("nan"), float("inf"), "1", None, [1.0], torch.tensor([1.0, -1.0])),
    "qk_scale": (float("nan"), float("inf"), "1", torch.tensor(1.0)),
    "delta_eps": (-1.0, float("nan"), None),
    "window": (0, -1, 2.5, True, (3, 0)),
    "solver": ("gauss", 3, flashlla.CG),
    "backend": ("cuda", 3),
}
WRONG_OF_ATTENTION: dict[str, tuple[Any, ...]] = {
    "cg_atol": (-1.0, float("nan"), "0"),
    "cg_rtol": (-1.0, float("inf")),
    "cg_max_iters": (0, -3, 2.5),
    "cg_use_preconditioner": (1, "jacobi"),
    "tolerance": (1.0, -0.1, float("nan"), "0"),
    "causal": (1, None, "yes"),
}


@dataclass(frozen=True)
class Call:
    """One call, forward and backward, and what is to be found out about it.

    options: of the solver, by keyword. bshd: with layout="bshd". flipped: sequences and heads the other way round.
    lengths: how tensors of integers lie, "int32", "int64" or "column" of a table. planted: (name, place, value), a
    number that is no number, or as good as none; places go from 0 to 1 along tensors (B, H, S, D). wrong: an argument
    and what it must be refused for. out: of decoding, into a strided tensor. twice: the second time to the same bits;
    brief: without a report, the second time.
    """

    case: Case | Decoding
    dtype: torch.dtype
    backend: str
    options: dict[str, Any] = field(default_factory=dict)
    bshd: bool = False
    flipped: bool = False
    lengths: str = "int32"
    planted: tuple[tuple[str, float, float], ...] = ()
    wrong: tuple[str, Any] | None = None
    out: bool = False
    twice: bool = True
    brief: bool = False

    def __str__(self) -> str:
        return f"check({_spelled(self)})"


def _spelled(value: object) -> str:
    """As Python, without what is at its default."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, float) and value != value:
        return 'float("nan")'
    if isinstance(value, float) and abs(value) == float("inf"):
        return f'float("{value}")'
    if isinstance(value, tuple):
        return f"({', '.join(map(_spelled, value))}{',' * (len(value) == 1)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_spelled(v)}' for key, v in value.items())}}}"
    if not isinstance(value, (Call, Case, Decoding)):
        return repr(value)
    shown = []
    for one in dataclasses.fields(value):
        given = getattr(value, one.name)
        default = one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default
        if given != default or type(given) is not type(default):
            shown.append(f"{one.name}={_spelled(given)}")
    return f"{type(value).__name__}({', '.join(shown)})"


def pasted(call: Call) -> str:
    """A program that makes the call again."""
    kind = type(call.case)
    return "\n".join(
        [
            "import torch",
            "from flashlla import CG, PCG, Direct" if "(" in str(call.options) else "",
            "from tests.fuzz import Call, check",
            f"from {kind.__module__} import {kind.__name__}",
            str(call),
        ]
    ).replace("\n\n", "\n")


class Sizes(NamedTuple):
    """What tensors may be like. few: for who takes a second for what takes others a millisecond.

    alike: values have the dimension of keys, or the next one of ``dims``: kernels are compiled for each pair.
    turns: calls that follow one another and differ in nothing that kernels are compiled for.
    work: queries times the cube of dim, at most, which the oracle's systems and the budget's take time for.
    """

    lengths: tuple[int, ...]
    dims: tuple[int, ...]
    rooms: tuple[int, ...]
    pages: int
    few: bool = False
    alike: bool = False
    turns: int = 1
    work: float = math.inf


USUAL = Sizes(
    lengths=(1, 1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 33, 47, 63, 64, 65, 80, 100, 129),
    dims=(1, 1, 2, 3, 4, 5, 7, 8, 8, 12, 16, 16, 17, 20, 24),
    rooms=(1, 2, 7, 16, 33, 63, 64, 130, 200),
    pages=4,
)
INTERPRETED = USUAL._replace(lengths=(1, 2, 3, 5, 8, 15, 16, 17), rooms=(1, 2, 7, 16, 20), pages=1, few=True)
# Of kernels there are as many as kinds of calls: dims and strides that are multiples of 16 make one where others make
# several, and a kind of calls is worth its seconds of compiling only to several calls. What is beside the tiles,
# tests/test_conformance.py has on GPUs.
COMPILED = USUAL._replace(
    lengths=(*USUAL.lengths, 200, 257), dims=(16, 64, 128, 64), alike=True, turns=100, work=100 * 128**3
)


def draw(seed: int, number: int, backends: Sequence[str], sizes: Sizes = USUAL) -> Call:
    """The call of that number; always the same."""
    form, turn = divmod(number, sizes.turns)
    rng = random.Random(f"{seed}/{form}")
    backend = rng.choice(backends)
    fused = backend.startswith("triton")
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (not fused)
    dtype = rng.choice(dtypes)
    name = f"fuzz_{seed}_{number}"
    case = _decoding(rng, name, sizes) if rng.random() < 0.25 else _case(rng, name, sizes, dtype)
    call = Call(case, dtype, backend)
    call = dataclasses.replace(
        call,
        options=_options(rng, case, backend),
        bshd=isinstance(case, Case) and not case.packed and LAYOUTS[case.layout].lacking is None and _one_in(rng, 5),
        flipped=isinstance(case, Case) and _one_in(rng, 5),
        lengths=rng.choice(["int32", "int32", "int64", "column"]),
        out=isinstance(case, Decoding) and _one_in(rng, 4),
        twice=not sizes.few or _one_in(rng, 5),
        brief=isinstance(case, Case) and _one_in(random.Random(f"{seed}/{number}/brief"), 8),
    )
    if turn:
        rng = random.Random(f"{seed}/{form}/{turn}")
        alike = _decoding_alike if isinstance(case, Decoding) else _case_alike
        call = dataclasses.replace(
            call, case=alike(rng, case, sizes, dtype), lengths=rng.choice(["int32", "int64", "column"])
        )
    if _one_in(nothing := random.Random(f"{seed}/{number}/nothing"), 50):
        call = dataclasses.replace(call, case=_emptied(nothing, call.case))
    if _one_in(rng, 12):
        return dataclasses.replace(call, wrong=_wrong(rng, case))
    if _one_in(rng, 5):
        return dataclasses.replace(call, planted=_planted(rng, case))
    return call


def _one_in(rng: random.Random, many: int) -> bool:
    return rng.randrange(many) == 0


def _value_dim(rng: random.Random, sizes: Sizes, dim: int) -> int:
    if sizes.alike:
        return sizes.dims[(sizes.dims.index(dim) + rng.randrange(2)) % len(sizes.dims)]
    return rng.choice(sizes.dims)


def _size(rng: random.Random, dtype: torch.dtype) -> float:
    """Up to 1e20 and down to 1e-20, where the dtype holds it."""
    span = 3 if dtype == torch.float16 else rng.choice([1, 3, 6, 12, 20])
    return float(f"1e{rng.randint(-span, span)}")


def _ridge(rng: random.Random, of_keys: float, largest: float = 3e38) -> float:
    """Mostly commensurate with the squares of keys."""
    power = rng.uniform(-20, 20) if _one_in(rng, 10) else rng.uniform(-3, 2)
    unit = 1.0 if abs(power) > 3 else of_keys**2
    return min(max(float(f"{unit * 10**power:.2g}"), 1e-37), largest)


def _scale(rng: random.Random, q: float, k: float) -> float | None:
    """Mostly such that logits are neither all alike nor beyond 1e6."""
    if q == k == 1.0 and rng.random() < 0.6:
        return None
    sign = -1 if _one_in(rng, 4) else 1
    power = rng.choice([-9, 4]) if _one_in(rng, 10) else rng.uniform(-2, 1)
    return sign * min(max(float(f"{10**power / (q * k):.2g}"), 1e-37), 1e37)


def _parts(rng: random.Random, many: int, total: int) -> tuple[int, ...]:
    """So many lengths, some 0, of at most ``total`` together."""
    edges = sorted(rng.choices([rng.randint(0, total) for _ in range(many + 1)], k=many + 1))
    edges = [0, *edges[1:-1], total if rng.random() < 0.7 else edges[-1]]
    return tuple(b - a for a, b in itertools.pairwise(edges))


def _case(rng: random.Random, name: str, sizes: Sizes, dtype: torch.dtype) -> Case:
    length, dim = rng.choice(sizes.lengths), rng.choice(sizes.dims)
    key_heads, group, batch = rng.choice([1, 1, 2]), rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 2, 3])
    if sizes.few and key_heads * group * batch > 2:
        key_heads, group, batch = rng.choice([(1, 1, 2), (1, 2, 1), (2, 1, 1)])
    length = _little_work(length, batch * key_heads * group, dim, sizes)
    varlen = rng.random() < 0.3
    layouts = ["bhsd", "transposed", "sliced"]
    if varlen:
        batch, layouts = 1, ["bhsd", "thd", "thd"]
    elif _one_in(rng, 4):
        # Autograd adds up what views share in the inputs' dtype: of 16 bits, that is all that could be seen.
        layouts = ["packed"] if dtype.itemsize == 2 else ["packed", "shared_keys", "shared_queries"]
        group = 1
    elif key_heads == group == 1 and _one_in(rng, 2):
        layouts = ["bsd", "bsd_transposed"]
    layout = rng.choice(layouts)
    alike = layout in ("packed", "shared_keys", "shared_queries")
    keys = None if alike or rng.random() < 0.5 else rng.choice(sizes.lengths)
    value_dim = None if alike or rng.random() < 0.6 else _value_dim(rng, sizes, dim)
    causal = rng.random() < 0.75
    odd = rng.choice([(), (), rng.choices("qkvg", k=3)])  # whose size is not 1
    q, k, v, g = (_size(rng, dtype) if name in odd else 1.0 for name in "qkvg")
    ridge = rng.choice(["number", *RIDGES])
    if layout in ("bsd", "bsd_transposed", "thd"):
        ridge = rng.choice(["number", "scalar", "per_head_and_token"])
    fields: dict[str, Any] = {}
    if varlen:
        many = rng.choice([1, 1, 2, 3] if sizes.few else [1, 1, 2, 3, 5])
        fields["packed"] = _parts(rng, many, length)
        if keys is not None:
            fields["packed_keys"] = _parts(rng, many, keys)
    else:
        room = length if keys is None else keys
        if _one_in(rng, 4):
            fields["seqlens"] = tuple(rng.randint(0, room) for _ in range(batch))
        if _one_in(rng, 4):
            fields["seqstarts"] = tuple(rng.randint(0, room) for _ in range(batch))
        if layout == "shared_queries" and causal:
            fields.pop("seqstarts", None)  # the NaN of one sequence's queries would be another's
    return Case(
        name,
        batch=batch,
        heads=key_heads * group,
        key_heads=None if group == 1 else key_heads,
        length=length,
        keys=keys,
        dim=dim,
        value_dim=value_dim,
        data=rng.choice(["iid", "iid", *DATA]),
        sizes=(q, k, v, g),
        ridge_lambda=_ridge(rng, k, 1e38),
        ridge=ridge,
        scale=_scale(rng, q, k),
        delta_eps=rng.choice([1e-12, 1e-12, 0.0, 1e-3, 1.0]),
        layout=layout,
        expanded_grad=_one_in(rng, 10),
        causal=causal,
        window=rng.choice([1, 2, 7, 20, 1000]) if causal and _one_in(rng, 3) else None,
        **fields,
    )


def _kind(n: int) -> tuple[bool, bool]:
    """Which kernel a stride takes: of all numbers, 1 and what 16 divides have kernels of their own."""
    return n == 1, n % 16 == 0


def _size_alike(rng: random.Random, n: int, of: Sequence[int]) -> int:
    """One that takes no other kernel."""
    return rng.choice([n, *(other for other in of if _kind(other) == _kind(n))])


def _little_work(length: int, heads: int, dim: int, sizes: Sizes) -> int:
    """``length``, or one that takes no other kernel and less work."""
    fits = lambda n: n * heads * dim**3 <= sizes.work
    if fits(length):
        return length
    of_kind = [n for n in sizes.lengths if _kind(n) == _kind(length)]
    return max(filter(fits, of_kind), default=min(of_kind))


def _starts(rng: random.Random, given: tuple[int, ...] | None, many: int, room: int) -> tuple[int, ...] | None:
    return None if given is None else tuple(rng.randint(0, room) for _ in range(many))


def _case_alike(rng: random.Random, case: Case, sizes: Sizes, dtype: torch.dtype) -> Case:
    """Another for which nothing is compiled that was not for ``case``: of other lengths, and of other numbers."""
    several = lambda n: n if n == 1 else rng.choice([2, 3])
    length = _size_alike(rng, case.length, sizes.lengths)
    keys = None if case.keys is None else _size_alike(rng, case.keys, sizes.lengths)
    batch, key_heads = several(case.batch), several(case.key_heads or case.heads)
    group = case.heads // (case.key_heads or case.heads)
    length = _little_work(length, batch * key_heads * group, case.dim, sizes)
    room = length if keys is None else keys
    many = 0 if case.packed is None else 1 if len(case.packed) == 1 else rng.choice([2, 3, 5])
    odd = rng.choice([(), (), rng.choices("qkvg", k=3)])
    q, k, v, g = (_size(rng, dtype) if name in odd else 1.0 for name in "qkvg")
    return dataclasses.replace(
        case,
        batch=batch,
        heads=key_heads * group,
        key_heads=None if group == 1 else key_heads,
        length=length,
        keys=keys,
        data=rng.choice(["iid", *DATA]),
        sizes=(q, k, v, g),
        ridge_lambda=_ridge(rng, k, 1e38),
        scale=_scale(rng, q, k),
        delta_eps=rng.choice([1e-12, 0.0, 1e-3, 1.0]),
        expanded_grad=_one_in(rng, 10),
        window=case.window and rng.choice([1, 2, 7, 20, 1000]),
        seqlens=_starts(rng, case.seqlens, batch, room),
        seqstarts=_starts(rng, case.seqstarts, batch, room),
        packed=case.packed and _parts(rng, many, length),
        packed_keys=case.packed_keys and _parts(rng, many, room),
    )


def _decoding_alike(rng: random.Random, case: Decoding, sizes: Sizes, dtype: torch.dtype) -> Decoding:
    batch = len(case.lengths) if len(case.lengths) == 1 else rng.choice([2, 3])
    group, key_heads = case.heads // case.key_heads, case.key_heads if case.key_heads == 1 else rng.choice([2, 3])
    return dataclasses.replace(
        case,
        lengths=tuple(rng.choice([0, 1, case.room, rng.randint(0, case.room)]) for _ in range(batch)),
        starts=_starts(rng, case.starts, batch, case.room),
        heads=key_heads * group,
        key_heads=key_heads,
        window=case.window and rng.choice([1, 2, 7, 20, 1000]),
        ridge_lambda=_ridge(rng, 1.0, 1e38),
        scale=_scale(rng, 1.0, 1.0),
        seed=rng.randrange(1000) * 10,
    )


def _emptied(rng: random.Random, case: Case | Decoding) -> Case | Decoding:
    """The same of no sequences, or of no queries."""
    fields: dict[str, Any] = {}
    if isinstance(case, Decoding):
        if _one_in(rng, 2):
            return dataclasses.replace(case, new=0)
        return dataclasses.replace(case, lengths=(), starts=None if case.starts is None else ())
    if case.packed is None and _one_in(rng, 2):
        for name in ("seqlens", "seqstarts"):
            fields[name] = None if getattr(case, name) is None else ()
        return dataclasses.replace(case, batch=0, **fields)
    if case.packed is not None:
        fields["packed"] = (0,) * len(case.packed)
    elif case.keys is None:
        for name in ("seqlens", "seqstarts"):
            fields[name] = None if getattr(case, name) is None else (0,) * case.batch
    return dataclasses.replace(case, length=0, data="iid", **fields)


def _decoding(rng: random.Random, name: str, sizes: Sizes) -> Decoding:
    batch, key_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 1, 2]), rng.choice([1, 2, 3])
    if sizes.few:
        batch, key_heads, group = rng.choice([(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1)])
    page = rng.choice([None, None, 16, 32, 48])
    room = rng.choice(sizes.rooms)
    room = room if page is None else page * rng.randint(1, sizes.pages)
    lengths = tuple(rng.choice([0, 1, room, rng.randint(0, room)]) for _ in range(batch))
    starts = tuple(rng.randint(0, room) for _ in range(batch)) if _one_in(rng, 3) else None
    new = rng.choice([1, 1, 1, 2, 3, 8, 16, 17, 20])
    dim = rng.choice(sizes.dims)
    value_dim = _value_dim(rng, sizes, dim)
    return Decoding(
        name,
        lengths=lengths,
        starts=starts,
        new=new,
        heads=key_heads * group,
        key_heads=key_heads,
        room=room,
        dim=dim,
        value_dim=value_dim,
        window=rng.choice([1, 2, 7, 20, 1000]) if _one_in(rng, 3) else None,
        page=page,
        layout=rng.choice(["bhsd", "bhsd", "bshd"]),
        ridge=rng.choice(["number", "per_head", "per_token", "full"]),
        ridge_lambda=_ridge(rng, 1.0, 1e38),
        scale=_scale(rng, 1.0, 1.0),
        seed=rng.randrange(1000) * 10,
    )


def _options(rng: random.Random, case: Case | Decoding, backend: str) -> dict[str, Any]:
    """Of the solver."""
    if isinstance(case, Decoding):
        return rng.choice([{}, {}, {"solver": "direct"}, {"solver": "cg"}])
    exact = {"atol": 0.0, "rtol": 0.0, "max_iters": 500}
    named = {f"cg_{name}": value for name, value in exact.items()}
    gram = not backend.startswith("triton") or case.packed is None
    choices: list[dict[str, Any]] = [
        {},
        named,
        {**named, "cg_use_preconditioner": True},
        {"cg_atol": 0.0, "cg_max_iters": rng.choice([1, 3, 10, 100])},
        {"tolerance": rng.choice([0.0, 1e-6, 1e-4, 1e-2])},
        {"solver": "pcg", "tolerance": rng.choice([0.0, 1e-3])},
        {"solver": flashlla.PCG(**exact)},
    ]
    if gram:
        choices += [{"solver": "pcg_gram"}, {"solver": flashlla.PCG(**exact, preconditioner="gram")}]
    if backend != "triton_pcg":
        choices += [{"solver": "cg"}, {"solver": flashlla.CG(**exact)}]
    if not backend.startswith("triton"):
        choices += [{"solver": "direct"}, {"solver": "direct"}]
    return rng.choice(choices)


def _wrong(rng: random.Random, case: Case | Decoding) -> tuple[str, Any]:
    table = WRONG if isinstance(case, Decoding) else {**WRONG, **WRONG_OF_ATTENTION}
    name = rng.choice([*table])
    return name, rng.choice(table[name])


def _planted(rng: random.Random, case: Case | Decoding) -> tuple[tuple[str, float, float], ...]:
    names = ["q", "k", "v"] + ["grad_o"] * (isinstance(case, Case) and not case.expanded_grad)
    value = rng.choice([float("nan"), float("inf"), float("-inf")])
    return tuple((rng.choice(names), round(rng.random(), 3), value) for _ in range(rng.choice([1, 1, 2])))
