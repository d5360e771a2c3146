"""Whether a call is right: against the oracle, by the error budget, and what else is promised."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashlla
from flashlla import notices
from flashlla.problem import FEW_NEW, accumulator, largest_key, resolution
from tests.fuzz.calls import Call
from tests.support.budget import Excess, allowance, budget_of, row_norm
from tests.support.cases import LAYOUTS, Case
from tests.support.decoding import Decoding, expected, paged, spread
from tests.support.helpers import differentiable
from tests.support.poison import poisoned

# Where rounding by the accumulator's precision, times the condition of the systems, comes to this, the error is no
# longer proportional to it, and a budget says nothing; likewise where it allows this much of the output.
_LOOSE = 0.05
# What the sums of float32 hold (docs/reliability.md): sizes of queries and keys, and logits.
_LARGEST, _SMALLEST, _LARGEST_LOGIT = 1e15, 1e-15, 1e6


class Fault(AssertionError):
    """A call that went wrong: the kind, and what was seen."""

    def __init__(self, kind: str, seen: str) -> None:
        super().__init__(f"{kind}: {seen}")
        self.kind = kind


class Outcome(NamedTuple):
    """What a call gave. Rows are those of o in the caller's layout."""

    o: Tensor
    gradients: dict[str, Tensor]
    converged: Tensor
    warned: bool


class Due(NamedTuple):
    """Where NaN is due, True: of o's rows as the caller has them, and of each leaf's numbers."""

    o: Tensor
    leaves: dict[str, Tensor]


def check(call: Call, device: str = "cpu") -> str:
    """Raise a :class:`Fault`, or say how far the call could be judged: "right" in all; "refused", as documented;
    "unconverged", as it says itself; "loose", by numbers that its dtype does not carry."""
    if call.wrong is not None:
        return _check_refusal(call, device)
    if isinstance(call.case, Decoding):
        return _check_decoding(call, call.case, device)
    return _check_attention(call, call.case, device)


def _ran(run: Any, call: Call) -> Any:
    """What ``run`` gives; None where the call is refused as documented."""
    notices.forget()
    try:
        return run()
    except flashlla.UnsupportedError:
        return None
    except torch.linalg.LinAlgError as error:
        if "ridge_lambda" in str(error):
            return None
        raise Fault("raised", repr(error)) from error
    except Exception as error:
        raise Fault("raised", repr(error)) from error


def _check_refusal(call: Call, device: str) -> str:
    """An argument that is wrong is refused by its name."""
    assert call.wrong is not None
    name, value = call.wrong
    leaves = call.case.make(call.dtype, device) if isinstance(call.case, Case) else {}
    try:
        if isinstance(call.case, Case):
            _attend(call, call.case, leaves, {name: value})
        else:
            _decode(call, call.case, device, {name: value})
    except (ValueError, TypeError, flashlla.UnsupportedError) as error:
        if re.search(rf"\b{name}\b", str(error)):
            return "refused"
        raise Fault("refused without its name", repr(error)) from error
    except Exception as error:
        raise Fault("raised", repr(error)) from error
    raise Fault("taken", f"{name}={value!r} was not refused")


# lla_attention and lla_attention_varlen


def _attend(
    call: Call, case: Case, leaves: Mapping[str, Tensor], more: Mapping[str, Any], brief: bool = False
) -> Outcome:
    """The call, its gradients, and that it changed nothing that it was given. brief: without a report, which takes the
    short way (flashlla/again.py), and tells of no convergence."""
    mine = differentiable(leaves)
    keywords = {**case.keywords(mine), **call.options, "backend": call.backend}
    views = case.arrange(mine)
    layout = LAYOUTS[case.layout]
    if call.flipped:
        dims = {0: [1], 1: [0]}.get(layout.lacking, [0, 1])  # type: ignore[arg-type]
        flip = lambda t: t.flip(dims)
        views = tuple(map(flip, views))  # type: ignore[assignment]
        ridge = keywords["ridge_lambda"]
        if isinstance(ridge, Tensor):
            rows = case.shapes()[0][:3]
            keywords["ridge_lambda"] = ridge.expand(layout.ridge_rows(rows)).flip(
                [0] if layout.lacking is not None else dims
            )
        for name in ("seqlens_k", "seqstarts_k"):
            if name in keywords:
                keywords[name] = keywords[name].flip(0)
    keywords = {name: _laid(t, call.lengths) if _whole(t) else t for name, t in keywords.items()}
    turn = lambda t: t.transpose(1, 2) if call.bshd else t
    if call.bshd:
        keywords["layout"] = "bshd"
    with warnings.catch_warnings(record=True) as caught, poisoned():
        warnings.simplefilter("always")
        found = case.op(*map(turn, views), **{**keywords, **more}, return_info=not brief)
        o, info = (found, None) if brief else found
        o = turn(o)
        converged = torch.ones_like(o[..., 0], dtype=torch.bool) if info is None else turn(info.converged)
        if call.flipped:
            o, converged = flip(o), flip(converged)
        o.backward(mine["grad_o"])
    if info is not None and info.backend != call.backend:
        raise Fault("another backend", f"ran on {info.backend}")
    if o.dtype != call.dtype:
        raise Fault("dtype", f"o has {o.dtype}")
    for name, t in leaves.items():
        if not _same(mine[name].detach(), t):
            raise Fault("changed an input", name)
    gradients = {name: t.grad for name, t in mine.items() if name != "grad_o"}
    for name, gradient in gradients.items():
        if gradient is None or gradient.dtype != leaves[name].dtype:
            raise Fault("dtype", f"the gradient of {name} is {gradient if gradient is None else gradient.dtype}")
    warned = any(issubclass(w.category, flashlla.ConvergenceWarning) for w in caught)
    return Outcome(o.detach(), gradients, converged, warned)  # type: ignore[arg-type]


def _whole(t: object) -> bool:
    return isinstance(t, Tensor) and not t.is_floating_point()


def _laid(t: Tensor, how: str) -> Tensor:
    """Integers in memory as ``how`` says, with others between them."""
    if how == "int32":
        return t
    if how == "int64":
        return t.long()
    return torch.stack([t, torch.full_like(t, 12345)], -1)[..., 0]


def _same(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
        and torch.equal(a.isnan(), b.isnan())
    )


def _check_attention(call: Call, case: Case, device: str) -> str:
    leaves = _plant(call, case, case.make(call.dtype, device))
    run = functools.partial(_attend, call, case, leaves, {})
    found = _ran(run, call)
    if found is None:
        return "refused"
    again = _ran(functools.partial(run, brief=call.brief), call) if call.twice else found
    for name, t in {"o": found.o, **found.gradients}.items():
        if not _same(t, again.o if name == "o" else again.gradients[name]):
            raise Fault("not the same again", name)
    due, clean = _due(call, case, leaves)
    if not found.o.numel() or not case.visible().any():
        return _check_nothing(found, due)
    return _judged(lambda draws: _judge(call, case, found, due, clean, draws))


def _judged(judge: Callable[[int], str]) -> str:
    """What ``judge`` says by a budget of so many draws: of none, which is quick and allows the least; of three; and of
    more, on what is wrong by little: three are good for a table of cases, not for millions of rows."""
    for draws in (0, 3):
        with contextlib.suppress(Fault):
            return judge(draws)
    return judge(32)


def _check_nothing(found: Outcome, due: Due) -> str:
    """Where no query sees a key."""
    for name, t in {"o": found.o, **found.gradients}.items():
        if t.count_nonzero():
            raise Fault("no zeros", f"{name}, where no query sees a key")
    return "right"


def _judge(call: Call, case: Case, found: Outcome, due: Due, clean: dict[str, Tensor], draws: int) -> str:
    numbers = _Numbers.of(call, case, clean)
    if not numbers.carried:
        return "loose"
    direct = call.options.get("solver") == "direct" or call.backend == "naive"
    try:
        allowed = budget_of(
            case,
            clean,
            call.dtype,
            iterative=not direct,
            truncates=call.backend.startswith("triton") and found.o.device.type == "cpu",
            tolerance=0.0 if direct else numbers.tolerance(call.options),
            units=numbers.units,
            tops=numbers.tops if call.backend.startswith("triton") else None,
            draws=draws,
            fused=call.backend.startswith("triton"),
        )
    except torch.linalg.LinAlgError:  # the oracle's own: not even float64 carries these
        return "loose"
    size = row_norm(allowed.reference.o).norm()
    if not allowed.o.norm() <= _LOOSE * size or _beyond(allowed.reference.o, call.dtype):
        return "loose"
    unconverged = ~found.converged.cpu() & ~due.o
    got = torch.where(_rows(unconverged, found.o), allowed.reference.o, found.o.cpu().double())
    _compare("o", got, allowed.reference.o, allowed.o, _rows(due.o, got), strict=True)
    if unconverged.any() or found.warned:
        return "unconverged"
    for name, gradient in found.gradients.items():
        exact, room = allowed.reference.gradients[name], allowed.gradients[name]
        if _beyond(exact, gradient.dtype):
            return "loose"
        if not room.norm() <= 0.5 * row_norm(exact).norm() + 1e-3 * numbers.units.get(name, 1.0):
            return "loose"
        _compare(name, gradient, exact, room, due.leaves[name], strict=call.backend in ("naive", "chunked"))
    return "right"


def _beyond(exact: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` may not hold what is exact."""
    return bool((exact.abs() > torch.finfo(dtype).max / 2).any())


def _compare(name: str, got: Tensor, exact: Tensor, allowed: Tensor, due: Tensor, strict: bool) -> None:
    """NaN where it is ``due`` (``strict``: in all of it), elsewhere within what is allowed."""
    got = got.detach().cpu()
    if strict and not got[due].isnan().all():
        raise Fault("no NaN", f"{name}, at {due.nonzero().tolist()[:5]}")
    excess = Excess.of(torch.where(due, exact, got.double()), exact, allowed)
    if not excess.ratio <= 1:
        raise Fault("over budget", f"{name}, {excess}, wanted size {row_norm(exact)[excess.row]:.2e}")


def _rows(which: Tensor, t: Tensor) -> Tensor:
    """``which`` of the rows of ``t``, for each number."""
    return which.unsqueeze(-1).expand(t.shape)


class _Numbers(NamedTuple):
    """What a call's numbers are like."""

    carried: bool  # whether its dtype carries what is computed with them
    shortest: float  # of the queries' distances to a typical key: the right-hand sides
    dim: int
    dtype: torch.dtype
    units: dict[str, float]  # sizes of what cancels in the results
    tops: dict[str, float]  # what they would be if weights were as large as what the fused kernels scale them by

    @classmethod
    def of(cls, call: Call, case: Case, clean: Mapping[str, Tensor]) -> _Numbers:
        layout = LAYOUTS[case.layout]
        q, k, v = (layout.wide(t).double().cpu().nan_to_num() for t in case.arrange(clean))
        g = float(clean["grad_o"].double().abs().max()) if clean["grad_o"].numel() else 0.0
        ridge = float(torch.as_tensor(clean.get("ridge_lambda", case.ridge_lambda)).double().min())
        biggest = lambda t: float(t.abs().max())
        q_size, k_size, v_size = biggest(q), biggest(k), biggest(v)
        scale = abs(case.dim**-0.5 if case.scale is None else case.scale)
        longest = lambda t: float(t.norm(dim=-1).max()) if t.numel() else 0.0
        spread = longest(k - k[..., :1, :]) ** 2
        logit = scale * longest(q) * longest(k)
        eps = torch.finfo(accumulator(call.dtype)).eps
        worth = g * v_size
        units = {
            "o": v_size,
            "v": g,
            "q": worth * (scale * k_size + ridge**-0.5),
            "k": worth * (scale * q_size + ridge**-0.5),
            "ridge_lambda": worth / ridge,
        }
        units["qkv"] = max(units["q"], units["k"], units["v"])
        # dq_kernel scales dl to (1 + sqrt(d.z)) room(V) |do|, and d.z <= |d|^2 / lambda.
        room = 2.0 ** max(3, math.ceil(1 + math.log2(max(1, v.shape[-1])) / 2)) * v_size
        do = layout.wide(clean["grad_o"]).double().cpu().nan_to_num()
        dl = (1 + (longest(q) + longest(k)) * ridge**-0.5) * room * longest(do)
        tops = {"q": dl * scale * spread**0.5}
        tops["qkv"] = tops["q"]
        sizes = (q_size, k_size)
        carried = eps * (1 + spread / ridge) < _LOOSE and logit < _LARGEST_LOGIT
        if call.dtype != torch.float64:
            carried &= all(_SMALLEST < n < _LARGEST for n in sizes) and 1e-25 < worth < 1e25 and 1e-20 < g < 1e20
            narrow = torch.finfo(call.dtype).max
            carried &= all(1e-30 < unit < min(1e30, narrow) for unit in units.values())
        return cls(carried, 0.1 * max(*sizes, 1e-30), case.dim, call.dtype, units, tops)

    def tolerance(self, options: Mapping[str, Any]) -> float:
        """The relative residual that a solver may leave: its own, or the absolute one that stands under it; all of it
        in the worst direction, of which a random one has 1 / sqrt(D)."""
        solver = options.get("solver")
        if isinstance(solver, flashlla.CG):
            atol, rtol = solver.atol, solver.rtol
        else:
            atol, rtol = options.get("cg_atol", 1e-12), options.get("cg_rtol", 1e-12)
            if options.get("tolerance") is not None:
                rtol = options["tolerance"] ** 2
        least = max(rtol**0.5, (atol * rtol) ** 0.5 / self.shortest, resolution(self.dtype))
        return min(1.0, self.dim**0.5 * least)


def _plant(call: Call, case: Case, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    layout = LAYOUTS[case.layout]
    for name, place, value in call.planted:
        views = dict(zip("qkv", case.arrange(leaves)), grad_o=leaves["grad_o"])
        t = layout.wide(views[name])
        if t.numel():
            t[_at(place, t)] = value
    return leaves


def _at(place: float, t: Tensor) -> tuple[int, ...]:
    """The index that is so far along ``t``."""
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(int(place * (t.numel() - 1))), t.shape))


def _due(call: Call, case: Case, leaves: Mapping[str, Tensor]) -> tuple[Due, dict[str, Tensor]]:
    """Where NaN is due, and the leaves without what it comes from."""
    layout = LAYOUTS[case.layout]
    largest = largest_key(accumulator(call.dtype), case.dim)
    q, k, v = (layout.wide(t).cpu() for t in case.arrange(leaves))
    grad_o = layout.wide(leaves["grad_o"]).cpu()
    group = q.shape[1] // k.shape[1]
    wide = lambda t: t.repeat_interleave(group, 1)
    bad_q = ~q.isfinite().all(-1)  # (B, Hq, Sq)
    bad_k = wide(~(k.isfinite() & (k.abs() <= largest)).all(-1) | ~v.isfinite().all(-1))  # (B, Hq, Sk)
    bad_g = ~grad_o.isfinite().all(-1)
    visible = case.visible().expand(*q.shape[:-1], k.shape[2])
    sees = visible.any(-1)
    of_o = (bad_q & sees) | (visible & bad_k.unsqueeze(-2)).any(-1)
    of_q = of_o | (bad_g & sees)
    of_k = (visible & of_q.unsqueeze(-1)).any(-2).unflatten(1, (-1, group)).any(2)  # (B, Hkv, Sk)
    # Through the views to the leaves, as gradients go.
    names = [name for name in leaves if name != "grad_o"]
    exact = {
        name: torch.zeros_like(t.cpu(), dtype=torch.float64).requires_grad_(name != "grad_o")
        for name, t in leaves.items()
    }
    targets: list[Tensor] = [layout.wide(t) for t in case.arrange(exact)]
    marks = [mark.double().unsqueeze(-1).expand(t.shape) for mark, t in zip((of_q, of_k, of_k), targets)]
    if "ridge_lambda" in exact:
        targets.append(layout.wide_ridge(exact["ridge_lambda"], q.shape[:-1]))
        marks.append(of_q.double())
    found = torch.autograd.grad(targets, [exact[name] for name in names], marks)
    numbers = {name: t > 0 for name, t in zip(names, found)}
    clean = {}
    for name, t in leaves.items():
        t = t.detach().cpu().clone()
        clean[name] = torch.where(t.isfinite() & (t.abs() <= (largest if name == "k" else torch.inf)), t, 0.0)
    return Due(layout.narrow(of_o.unsqueeze(-1)).squeeze(-1), numbers), clean


# lla_decode


def _arguments(call: Call, case: Decoding, device: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """q, k_cache and v_cache as they are passed, numbers planted, and the keywords."""
    q, k, v, keywords = case.make(call.dtype)
    tensors = {"q": q, "k": k, "v": v}
    for name, place, value in call.planted:
        t = tensors[name]
        if t.numel():
            t[_at(place, t)] = value
    if case.page is not None:
        tensors["k"], tensors["v"], keywords["block_table"] = paged(tensors["k"], tensors["v"], case.page)
    if case.layout == "bshd":
        tensors = {name: t.transpose(1, 2).contiguous() for name, t in tensors.items()}
    to = lambda t: t.to(device) if isinstance(t, Tensor) else t
    laid = lambda t: _laid(t, call.lengths) if _whole(t) else t
    return {name: to(t) for name, t in tensors.items()}, {name: laid(to(t)) for name, t in keywords.items()}


def _decode(call: Call, case: Decoding, device: str, more: Mapping[str, Any]) -> Outcome:
    tensors, keywords = _arguments(call, case, device)
    before = {name: t.clone() for name, t in tensors.items()}
    keywords = {**keywords, **case.options(), **call.options, "backend": call.backend, **more}
    turn = lambda t: t.transpose(1, 2) if case.layout == "bshd" else t
    with warnings.catch_warnings(record=True) as caught, poisoned():
        warnings.simplefilter("always")
        o, info = flashlla.lla_decode(*tensors.values(), **keywords, return_info=True)
        if call.out:
            into = torch.full((*o.shape[:-1], 2 * o.shape[-1]), 7.0, dtype=o.dtype, device=device)
            flashlla.lla_decode(*tensors.values(), **keywords, out=into[..., ::2])
            if not _same(into[..., ::2], o):
                raise Fault("out", "holds something else than what is returned without it")
            if not (into[..., 1::2] == 7).all():
                raise Fault("out", "was written beside")
    if info.backend != call.backend:
        raise Fault("another backend", f"ran on {info.backend}")
    if o.dtype != call.dtype:
        raise Fault("dtype", f"o has {o.dtype}")
    for name, t in before.items():
        if not _same(tensors[name], t):
            raise Fault("changed an input", name)
    warned = any(issubclass(w.category, flashlla.ConvergenceWarning) for w in caught)
    return Outcome(turn(o).cpu(), {}, turn(info.converged).cpu(), warned)


def _check_decoding(call: Call, case: Decoding, device: str) -> str:
    run = functools.partial(_decode, call, case, device, {})
    found = _ran(run, call)
    if found is None:
        return "refused"
    if call.twice and not _same(found.o, _ran(run, call).o):
        raise Fault("not the same again", "o")
    if not found.o.numel():
        return "right"
    return _judged(lambda draws: _judge_decoding(call, case, found, device, draws))


def _judge_decoding(call: Call, case: Decoding, found: Outcome, device: str, draws: int) -> str:
    fused = call.backend.startswith("triton")
    of_few = fused and case.new <= FEW_NEW
    try:
        wanted = expected(case, call.dtype)
        spreads = spread(case, draws, call.dtype if fused and not of_few else None)
    except torch.linalg.LinAlgError:  # the reference's own
        return "loose"
    solver = call.options.get("solver")
    direct = call.backend == "naive" or of_few or solver == "direct" or (solver is None and call.backend == "chunked")
    allowed = allowance(
        wanted,
        spreads,
        call.dtype,
        iterative=not direct,
        truncates=fused and device == "cpu",
        tolerance=case.dim**0.5 * max(flashlla.CG.rtol**0.5, resolution(call.dtype)),
    )
    _, k, _, keywords = case.make(torch.float64)
    ridge = float(torch.as_tensor(keywords["ridge_lambda"]).min())
    keys = k.nan_to_num()
    condition = 1 + float((keys - keys[..., :1, :]).norm(dim=-1).max()) ** 2 / ridge if keys.numel() else 1.0
    loose = torch.finfo(accumulator(call.dtype)).eps * condition > _LOOSE
    loose |= _beyond(wanted, call.dtype)
    if loose or not allowed.norm() <= _LOOSE * row_norm(wanted).norm() + 1e-12:
        return "loose"
    due = _due_of_decoding(call, case)
    unconverged = ~found.converged & ~due
    got = torch.where(_rows(unconverged, found.o), wanted, found.o.double())
    _compare("o", got, wanted, allowed, _rows(due, got), strict=True)
    return "unconverged" if unconverged.any() else "right"


def _due_of_decoding(call: Call, case: Decoding) -> Tensor:
    """(B, Hq, N), where NaN is due."""
    q, k, v, _ = case.make(call.dtype)
    tensors = {"q": q, "k": k, "v": v}
    for name, place, value in call.planted:
        if tensors[name].numel():
            tensors[name][_at(place, tensors[name])] = value
    group = case.heads // case.key_heads
    bad_k = (~k.isfinite().all(-1) | ~v.isfinite().all(-1)).repeat_interleave(group, 1)  # (B, Hq, L)
    j, i = torch.arange(case.room), torch.arange(case.new).unsqueeze(-1)
    visible = torch.stack(
        [
            (j >= start)
            & (j < length)
            & (j <= length - case.new + i)
            & (j > length - case.new + i - (case.window or case.room))
            for start, length in case.spans
        ]
    ).unsqueeze(1)  # (B, 1, N, L)
    return (~q.isfinite().all(-1) & visible.any(-1)) | (visible & bad_k.unsqueeze(-2)).any(-1)
