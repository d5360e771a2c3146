"""What `torch.utils.flop_counter.FlopCounterMode` counts of the operators; docs/performance.md says how.

That module imports Triton, which takes longer than this package: the formulas are registered when somebody else imports
it. No later, as at a first call: a counter copies the registry when it is made, and torch.library knows no formulas.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashlla.autograd import BACKWARD, DECODE, DECODE_INFO, DECODE_OUT, FORWARD
from flashlla.library import Operator
from flashlla.problem import Arguments, Inputs, Problem, describe
from flashlla.solvers import Direct

COUNTER = "torch.utils.flop_counter"
# Iterations a query where no report tells: of backward passes, of decoding, of tensors that are not there.
ASSUMED_ITERATIONS = 4
# Products of a query and a key with D and with Dv columns: of a forward pass, of a backward pass, of an iteration.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS, ITERATION_PRODUCTS = (5, 1), (12, 4), 3


def visible_pairs(problem: Problem, inputs: Inputs) -> int:
    """Pairs of a query and a key that it sees, all heads; of tensors that hold no numbers as if all were in use."""
    lengths = (inputs.seqlens_k, inputs.seqstarts_k, inputs.cu_seqlens_q)
    if all(t is None for t in lengths) or not _holds_numbers(inputs.q):
        sequences = max(1, problem.sequences)
        q_len, k_len = problem.q_len // sequences, problem.k_len // sequences
        pairs = sequences * _pairs(q_len, k_len, problem.mask.causal, problem.mask.window)
        return problem.batch * problem.q_heads * pairs
    spans = problem.key_spans(inputs)
    seen = (spans.stop - spans.start).clamp(min=0)  # (Sq,), or (B, 1, Sq)
    return int(seen.sum()) * problem.q_heads * (problem.batch if seen.dim() == 1 else 1)


def _pairs(q_len: int, k_len: int, causal: bool, window: int | None) -> int:
    """Of one head and sequence; sizes may be symbols."""
    if not causal:
        return q_len * k_len

    def up_to(n: int) -> int:
        """Pairs of n queries with their own key and those before it."""
        ramp = n if window is None else torch.sym_min(n, window)
        return ramp * (ramp + 1) // 2 + (n - ramp) * ramp

    return up_to(k_len) - up_to(torch.sym_max(0, k_len - q_len))


def _holds_numbers(t: Tensor) -> bool:
    """Whether it can be read: it is no fake, and no graph is being captured."""
    fake = t.device.type == "meta" or torch._subclasses.fake_tensor.is_fake(t)
    return not fake and not (t.is_cuda and torch.cuda.is_current_stream_capturing())


def _mean_iterations(iterations: Tensor) -> float:
    if not _holds_numbers(iterations):
        return ASSUMED_ITERATIONS
    return float(iterations.double().mean()) if iterations.numel() else 0.0


def count(problem: Problem, pairs: int, products: tuple[int, int], iterations: float) -> int:
    """Operations of a pass: 2 D or 2 Dv a pair and product, or, of direct solves, the matrices and their factors."""
    d, v = problem.head_dim, problem.v_dim
    of_keys, of_values = products
    once = 2 * pairs * (of_keys * d + of_values * v)
    if isinstance(problem.solver, Direct) and (problem.solver_demanded or problem.few_new):
        queries = problem.batch * problem.q_heads * problem.q_len
        return once + 2 * pairs * d * d + queries * (d**3 // 3 + 2 * d * d)
    return once + int(2 * pairs * d * ITERATION_PRODUCTS * iterations)


def _forward(*row: Any, out_val: Any = None, **_: Any) -> int:
    arguments = FORWARD.takes.record(row)
    problem, found = describe(arguments), FORWARD.gives.record(out_val)
    iterations = _mean_iterations(found.report.iterations)
    return count(problem, visible_pairs(problem, arguments.inputs), FORWARD_PRODUCTS, iterations)


def _backward(*row: Any, out_val: Any = None, **_: Any) -> int:
    adjoint = BACKWARD.takes.record(row)
    problem = describe(Arguments(adjoint.inputs, adjoint.settings))
    return count(problem, visible_pairs(problem, adjoint.inputs), BACKWARD_PRODUCTS, ASSUMED_ITERATIONS)


def _decoding(operator: Operator[Any, Any]) -> Any:
    def formula(*row: Any, out_val: Any = None, **_: Any) -> int:
        arguments = operator.takes.record(row)
        problem = describe(Arguments(arguments.inputs, arguments.settings))
        return count(problem, visible_pairs(problem, arguments.inputs), FORWARD_PRODUCTS, ASSUMED_ITERATIONS)

    return formula


def _register(counter: ModuleType) -> None:
    register_for = lambda operator: counter.register_flop_formula(operator.op.overloadpacket, get_raw=True)
    register_for(FORWARD)(_forward)
    register_for(BACKWARD)(_backward)
    for operator in (DECODE, DECODE_INFO, DECODE_OUT):
        register_for(operator)(_decoding(operator))


class _OnImport(importlib.abc.MetaPathFinder):
    """Registers the formulas when the counter's module is imported; finds no module itself."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register(module)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Let the counter know the operators, now or when it is imported."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _OnImport())
