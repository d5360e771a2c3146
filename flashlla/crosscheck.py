"""An independent second opinion: some queries' ridge systems, built with NumPy in float64 and solved by SciPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashlla import dispatch
from flashlla.autograd import decode, forward, which
from flashlla.backends.base import plain_cache
from flashlla.calls import prepared
from flashlla.problem import describe

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashlla.options import AnyOptions

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found: arrays with one entry a checked query, NaN where its inputs are not finite.
    Prints as a short table.

    ``row``: (rows, 3) integers, (batch, head, query). ``condition``: condition number of A. ``error``: error of the
    backend's output, \\|o - o_ref\\| / \\|o_ref\\|. ``residual``: \\|A z - d\\| / \\|d\\| of the backend's probe z, NaN
    for :func:`flashlla.lla_decode`, which shows none. ``backend``: the name of the backend that ran.
    """

    row: NDArray[np.int64]
    condition: Floats
    error: Floats
    residual: Floats
    backend: str

    def __str__(self) -> str:
        columns = (("condition number", self.condition), ("output error", self.error), ("residual", self.residual))
        lines = [
            f"flashlla: backend {self.backend!r} against scipy.linalg in float64, {len(self.row)} queries",
            f"{'':<18}{'median':>10}{'worst':>10}  worst at (batch, head, query)",
        ]
        for name, values in columns:
            if len(values) and not (name == "residual" and np.isnan(values).all()):
                worst = int(np.nanargmax(values)) if not np.isnan(values).all() else 0
                where = tuple(int(i) for i in self.row[worst])
                lines.append(f"{name:<18}{np.median(values):>10.1e}{values[worst]:>10.1e}  {where}")
        return "\n".join(lines)


def verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    op: Callable[..., Any] | None = None,
    rows: int = 64,
    seed: int = 0,
    **options: Unpack[AnyOptions],
) -> Verification:
    """Check a backend's output against SciPy on some queries.

    For each chosen query the ridge system A z = k_mean - q (docs/math.md, 2.1) is built with NumPy in float64 from the
    inputs as they are, and solved with scipy.linalg.cho_solve; the output follows by (2.3).

    Args:
        q, k, v: as for ``op``; the caches of :func:`flashlla.lla_decode`.
        op: :func:`flashlla.lla_attention_varlen` or :func:`flashlla.lla_decode`. Default None:
            :func:`flashlla.lla_attention`.
        rows: how many queries to check, drawn at random. Default 64; all, where there are fewer.
        seed: of the random draw. Default 0.
        options: its other arguments by keyword, but ``return_info`` and ``out``.

    Returns:
        A :class:`Verification`; ``print`` it.

    Raises:
        ValueError: ``rows`` is under 1, or as ``op``.
        TypeError: as ``op``.
        numpy.linalg.LinAlgError: a system is not positive definite even in float64.

    Source: docs/math.md, section 2.

    Example:
        >>> import torch, flashlla
        >>> q, k, v = torch.randn(3, 1, 50, 8).unbind(0)
        >>> report = flashlla.verify(q, k, v, ridge_lambda=0.1, rows=10)
        >>> bool(report.error.max() < 1e-4)
        True
    """
    if not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows: got {rows}, wanted a whole number of at least 1")
    arguments = prepared(op, verify, q, k, v, **options).arguments
    problem, inputs = describe(arguments), arguments.inputs
    with torch.no_grad():
        if arguments.settings.at_lengths:
            name = dispatch.choose(problem, arguments.settings.backend).name
            o = decode(arguments)
            z = torch.full_like(inputs.q, float("nan"))
            problem, inputs = plain_cache(problem, inputs)
        else:
            outputs = forward(arguments)
            o, z = outputs.o, outputs.residuals.probe
            name = dispatch.backend_numbered(int(which(arguments))).name
    spans = problem.key_spans(inputs)
    start, stop = (t.cpu().expand(problem.batch, 1, problem.q_len)[:, 0] for t in spans)  # (B, Sq)
    picked = _pick(tuple(inputs.q.shape[:3]), rows, seed)
    q, k, v, ridge = inputs.q, inputs.k, inputs.v, inputs.ridge_lambda
    found = [
        _check_row(
            _numpy(k[b, h // problem.group, start[b, i] : stop[b, i]]),
            _numpy(v[b, h // problem.group, start[b, i] : stop[b, i]]),
            _numpy(q[b, h, i]),
            _numpy(ridge[b, h, i]),
            _numpy(o[b, h, i]),
            _numpy(z[b, h, i]),
            problem.scale,
            problem.delta_eps,
        )
        for b, h, i in picked.tolist()
    ]
    condition, error, residual = np.array(found, dtype=np.float64).reshape(-1, 3).T
    return Verification(picked, condition, error, residual, name)


def _pick(shape: tuple[int, ...], rows: int, seed: int) -> NDArray[np.int64]:
    """``rows`` different (batch, head, query), in order."""
    total = int(np.prod(shape))
    flat = np.sort(np.random.default_rng(seed).choice(total, size=min(rows, total), replace=False))
    return np.stack(np.unravel_index(flat, shape), axis=-1)


def _check_row(
    k: Floats, v: Floats, q: Floats, ridge: Floats, o: Floats, z: Floats, scale: float, delta_eps: float
) -> tuple[float, float, float]:
    """Condition number, output error and residual of one query; k: (N, D), v: (N, Dv), q and z: (D,), o: (Dv,)."""
    from scipy.linalg import cho_factor, cho_solve

    if not len(k):
        return 1.0, float(np.abs(o).max()), 0.0
    if not all(np.isfinite(t).all() for t in (k, v, q, ridge)):
        return float("nan"), float("nan"), float("nan")
    logits = scale * (k @ q)
    w = np.exp(logits - logits.max())
    omega = w.sum()
    p = w / omega
    k_mean = p @ k
    centred = k - k_mean
    a = (centred * p[:, None]).T @ centred + ridge * np.eye(len(q))
    d = k_mean - q
    exact = cho_solve(cho_factor(a), d)
    reference = (p * (1 - centred @ exact)) @ v
    reference = reference / (1 + delta_eps * (1 + d @ exact) / omega)
    relative = lambda error, size: float(np.linalg.norm(error) / size) if np.any(error) else 0.0
    return (
        float(np.linalg.cond(a)),
        relative(o - reference, np.linalg.norm(reference)),
        relative(a @ z - d, np.linalg.norm(d)),
    )


def _numpy(t: Tensor) -> Floats:
    return t.detach().double().cpu().numpy()
