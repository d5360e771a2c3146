"""What callers may not pass, and how they are told what came and what is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import flashlla
from flashlla import Solution, lla_attention, lla_attention_varlen, lla_decode
from tests.support.helpers import cu, qkv

pytestmark = pytest.mark.quick

EDGES = (0, 9, 9, 10, 27)  # packed sequences of 9, 0, 1 and 17 tokens
TOTAL = 30


@dataclass
class Thawed(flashlla.Solver):
    """A solver that is not hashable."""

    def solve(self, systems, b):
        raise AssertionError("refused before any work")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": torch.randn(3, 9, 4)}, ValueError, ["k:", "(3, 9, 4)", "(2, 9, 4)"]),
        ({"k": torch.randn(2, 9, 5)}, ValueError, ["k:", "(2, 9, 5)", "head dim"]),
        ({"v": torch.randn(2, 8, 4)}, ValueError, ["v:", "(2, 8, 4)", "(2, 9, 4)"]),
        ({"v": torch.randn(2, 9, 0)}, ValueError, ["v:", "value dim"]),
        ({"k": torch.randn(2, 1, 9, 4)}, ValueError, ["k:", "3 dimensions, as q (2, 9, 4)"]),
        ({n: torch.randn(2, h, 9, 4) for n, h in zip("qkv", (4, 3, 3))}, ValueError, ["k:", "3 heads", "divides"]),
        (
            {n: torch.randn(2, s, 4, 4) for n, s in zip("qkv", (9, 7, 7))},
            ValueError,
            ["k:", "7 heads", "(B, S, H, D)", "layout='bshd'"],
        ),
        (
            {"layout": "bshd"} | {n: torch.randn(2, 4, s, 4) for n, s in zip("qkv", (9, 7, 7))},
            ValueError,
            ["k:", "7 heads", "(B, H, S, D)", "layout='bhsd'"],
        ),
        ({"causal": 1}, TypeError, ["causal", "int", "bool(causal)"]),
        ({"window": 0}, ValueError, ["window", "0", "at least 1", "None for all keys"]),
        ({"window": (16, 0)}, TypeError, ["window", "tuple", "; the causal (left, 0) of FlashAttention is"]),
        ({"window": 2.0}, TypeError, ["window", "float", "int(window)"]),
        ({"window": torch.tensor(2)}, TypeError, ["window", "Tensor", "int(window)"]),
        ({"window": 4, "causal": False}, ValueError, ["window", "causal=True"]),
        ({"seqlens_k": [3, 4]}, TypeError, ["seqlens_k", "list", "torch.tensor"]),
        ({"seqlens_k": torch.ones(2)}, TypeError, ["seqlens_k", "float32", ".int()"]),
        ({"seqlens_k": torch.ones(2, 9).bool()}, TypeError, ["seqlens_k", "a mask", ".sum(-1).to(torch.int32)"]),
        ({"seqlens_k": torch.tensor([9, 10])}, ValueError, ["seqlens_k", "10 at sequence 1", "0 to 9"]),
        ({"seqlens_k": torch.tensor([-1, 9])}, ValueError, ["seqlens_k", "-1 at sequence 0", "0 to 9"]),
        ({"seqlens_k": torch.ones(3, dtype=torch.int32)}, ValueError, ["seqlens_k", "(3,)", "(2,)"]),
        ({"seqlens_k": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, ["seqlens_k", "meta", "cpu"]),
        ({"seqlens_k": torch.tensor([2**32 + 3, 3])}, ValueError, ["seqlens_k", "at sequence 0", "0 to 9"]),
        ({"seqlens_k": torch.tensor([3, 3 - 2**32])}, ValueError, ["seqlens_k", "at sequence 1", "0 to 9"]),
        ({"seqstarts_k": [3, 4]}, TypeError, ["seqstarts_k", "list", "torch.tensor"]),
        ({"seqstarts_k": 3}, TypeError, ["seqstarts_k", "int", "torch.full((2,), seqstarts_k"]),
        ({"seqstarts_k": torch.ones(2, 9).bool()}, TypeError, ["seqstarts_k", "a mask", "(~seqstarts_k).sum(-1)"]),
        ({"seqstarts_k": torch.tensor([9, 10])}, ValueError, ["seqstarts_k", "10 at sequence 1", "0 to 9"]),
        ({"seqstarts_k": torch.ones(3, dtype=torch.int32)}, ValueError, ["seqstarts_k", "(3,)", "(2,)"]),
        ({"qk_scale": 1e39}, ValueError, ["qk_scale", "1e+39", "float32", "at most 3.4e+38"]),
        ({"qk_scale": -(10**40)}, ValueError, ["qk_scale", "float32", "at most 3.4e+38"]),
        ({"layout": "sbhd"}, ValueError, ["layout", "'sbhd'", "'bshd'"]),
        ({"q": torch.randn(9, 4)}, ValueError, ["q:", "(9, 4)", "(B, S, D)"]),
        ({"q": [[1.0]]}, TypeError, ["q:", "list"]),
        ({"v": torch.randn(2, 9, 4).half()}, TypeError, ["v:", "float16", "float32"]),
        ({"k": torch.randn(2, 9, 4, device="meta")}, ValueError, ["k:", "meta", "cpu"]),
        ({n: torch.ones(2, 9, 4, dtype=torch.int64) for n in "qkv"}, TypeError, ["q:", "int64", "float32"]),
        ({n: torch.randn(2, 9, 0) for n in "qkv"}, ValueError, ["q:", "head dim"]),
        ({"ridge_lambda": 0.0}, ValueError, ["ridge_lambda", "0.0", "above 0"]),
        ({"ridge_lambda": -1}, ValueError, ["ridge_lambda", "-1"]),
        ({"ridge_lambda": float("nan")}, ValueError, ["ridge_lambda", "nan"]),
        ({"ridge_lambda": 1e300}, ValueError, ["ridge_lambda", "1e+300", "float32"]),
        ({"ridge_lambda": 1e-50}, ValueError, ["ridge_lambda", "1e-50", "float32"]),
        ({"ridge_lambda": 10**400}, ValueError, ["ridge_lambda: got 1000", "a finite number"]),
        ({"qk_scale": 10**400}, ValueError, ["qk_scale: got 1000", "a finite number"]),
        ({"delta_eps": 10**400}, ValueError, ["delta_eps: got 1000", "a finite number"]),
        ({"delta_eps": 1e39}, ValueError, ["delta_eps", "1e+39", "float32", "at most 3.4e+38"]),
        ({"cg_rtol": 10**400}, ValueError, ["cg_rtol: got 1000", "a finite number"]),
        ({"cg_max_iters": 10**400}, ValueError, ["cg_max_iters: got 1000", "from 1 to 2147483647"]),
        ({"cg_max_iters": float("inf")}, ValueError, ["cg_max_iters", "inf", "from 1 to 2147483647"]),
        ({"cg_max_iters": float("nan")}, ValueError, ["cg_max_iters", "nan", "from 1 to 2147483647"]),
        ({"cg_max_iters": 2**31}, ValueError, ["cg_max_iters", "2147483648", "from 1 to 2147483647"]),
        ({"ridge_lambda": True}, TypeError, ["ridge_lambda", "bool"]),
        ({"ridge_lambda": np.ones(9)}, TypeError, ["ridge_lambda", "ndarray", "torch.as_tensor"]),
        ({"cg_use_preconditioner": "jacobi"}, TypeError, ["cg_use_preconditioner", "jacobi", "PCG"]),
        ({"k": torch.randn(2, 9, 4).to_sparse()}, TypeError, ["k:", "sparse"]),
        (
            {"q": torch.nested.nested_tensor([torch.ones(3, 2, 4), torch.ones(5, 2, 4)], layout=torch.jagged)},
            TypeError,
            ["q:", "nested", "lla_attention_varlen(q.values(), k.values(), v.values(), cu_seqlens=q.offsets())"],
        ),
        ({"ridge_lambda": "big"}, TypeError, ["ridge_lambda", "str, wanted a number or a tensor"]),
        ({"ridge_lambda": None}, TypeError, ["ridge_lambda", "leave it out for the default 10.0"]),
        ({"ridge_lambda": torch.ones(2)}, ValueError, ["(2,)", "one a sequence? try ridge_lambda[:, None]"]),
        (
            {"ridge_lambda": torch.ones(3)} | {n: torch.randn(2, 3, 9, 4) for n in "qkv"},
            ValueError,
            ["ridge_lambda", "(3,)", "(B, H, S)", "ridge_lambda[:, None] for heads", "[None, :] for tokens"],
        ),
        (  # at every length: that of the sequences may be that of the heads in the next batch
            {"ridge_lambda": torch.ones(9)} | {n: torch.randn(2, 3, 9, 4) for n in "qkv"},
            ValueError,
            ["ridge_lambda", "(9,)", "(2, 3, 9)", "[None, :] for tokens"],
        ),
        (
            {"ridge_lambda": torch.ones(3, 1, 1)} | {n: torch.randn(2, 3, 9, 4) for n in "qkv"},
            ValueError,
            ["ridge_lambda", "(3, 1, 1)", "(2, 3, 9)", "try ridge_lambda.squeeze(-1)"],
        ),
        (
            {"ridge_lambda": torch.ones(1, 3, 1, 1)} | {n: torch.randn(2, 3, 9, 4) for n in "qkv"},
            ValueError,
            ["ridge_lambda", "(1, 3, 1, 1)", "(2, 3, 9)", "try ridge_lambda.squeeze(-1)"],
        ),
        ({"ridge_lambda": torch.ones(3)}, ValueError, ["ridge_lambda", "(3,)", "(B, S)", "(2, 9)"]),
        ({"ridge_lambda": torch.ones(2, 9, 1)}, ValueError, ["ridge_lambda", "(2, 9, 1)"]),
        ({"ridge_lambda": torch.ones(9, dtype=torch.int32)}, TypeError, ["ridge_lambda", "int32"]),
        ({"ridge_lambda": torch.ones(9, device="meta")}, ValueError, ["ridge_lambda", "meta"]),
        ({"ridge_lambda": -torch.ones(9)}, ValueError, ["ridge_lambda", "-1.0", "query 0"]),
        ({"qk_scale": float("nan")}, ValueError, ["qk_scale", "nan"]),
        ({"qk_scale": torch.tensor(0.5)}, TypeError, ["qk_scale", "Tensor", "float(qk_scale)"]),
        ({"delta_eps": float("inf")}, ValueError, ["delta_eps", "inf"]),
        ({"delta_eps": -1e-3}, ValueError, ["delta_eps", "-0.001", "at least 0"]),
        ({"cg_max_iters": True}, TypeError, ["cg_max_iters", "bool"]),
        ({"return_info": "no"}, TypeError, ["return_info", "str", "True or False"]),
        ({"is_causal": True}, TypeError, ["lla_attention()", "'is_causal'", "try causal="]),
        ({"ridge_lamda": 1.0}, TypeError, ["'ridge_lamda'", "try ridge_lambda="]),
        ({"return_inf": True}, TypeError, ["'return_inf'", "try return_info="]),
        ({"cu_seqlens": None}, TypeError, ["'cu_seqlens'", "try flashlla.lla_attention_varlen"]),
        ({"key_padding_mask": 1}, TypeError, ["'key_padding_mask'", "try seqstarts_k=", "seqlens_k="]),
        (
            {"temperature": 1.0, "attention_mask": None},
            TypeError,
            ["'attention_mask'", "try causal=", "no other masks"],
        ),
        ({"attn_bias": None}, TypeError, ["'attn_bias'", "nothing is added to the logits"]),
        ({"softcap": 50.0}, TypeError, ["'softcap'", "no cap"]),
        ({"scaling": 1.0}, TypeError, ["'scaling'", "try qk_scale="]),
        ({"cache_leftpad": None}, TypeError, ["'cache_leftpad'", "try seqstarts_k="]),
        ({"cache_seqlens": None}, TypeError, ["'cache_seqlens'", "try seqlens_k="]),
        ({"dropout_p": 0.1}, TypeError, ["'dropout_p'", "no dropout"]),
        ({"window_size": (8, 0)}, TypeError, ["'window_size'", "try window=left + 1"]),
        ({"cu_seq_lens_q": None}, TypeError, ["'cu_seq_lens_q'", "lla_attention_varlen with cu_seqlens_q="]),
        ({"return_lse": True}, TypeError, ["'return_lse'", "return_info=True"]),
        ({"s_aux": None}, TypeError, ["'s_aux'", "no sinks"]),
        ({"qk_scale": torch.nn.Parameter(torch.ones(()))}, TypeError, ["qk_scale", "Parameter", "to learn it, q * r"]),
        ({"temperature": 1.0}, TypeError, ["'temperature'", "try one of q, k, v, ridge_lambda, qk_scale"]),
        ({"cg_rtol": -1.0}, ValueError, ["cg_rtol", "-1.0"]),
        ({"cg_max_iters": 0}, ValueError, ["cg_max_iters", "0"]),
        ({"solver": "cgg"}, ValueError, ["solver", "'cgg'", "did you mean 'cg'"]),
        ({"solver": 3}, TypeError, ["solver", "int"]),
        ({"solver": flashlla.CG}, TypeError, ["solver", "class CG", "CG()"]),
        ({"solver": Thawed()}, TypeError, ["solver", "Thawed", "frozen=True"]),
        ({"cg_max_iters": 2.5}, ValueError, ["cg_max_iters", "2.5"]),
        ({"cg_rtol": "x"}, TypeError, ["cg_rtol", "str"]),
        ({"backend": 3}, TypeError, ["backend", "int"]),
        ({"solver": "direct", "cg_rtol": 1e-3}, ValueError, ["cg_rtol", "0.001", "solver='direct'"]),
        ({"solver": flashlla.CG(), "cg_max_iters": 5}, ValueError, ["cg_max_iters", "5"]),
        ({"tolerance": 0.01, "cg_rtol": 1e-4}, ValueError, ["cg_rtol", "0.0001", "tolerance=0.01", "square"]),
        ({"tolerance": 0.01, "solver": "direct"}, ValueError, ["tolerance", "0.01", "exact", "try it without", "'cg'"]),
        ({"tolerance": 0.01, "solver": flashlla.Direct()}, ValueError, ["tolerance", "Direct()", "exact"]),
        ({"tolerance": 0.01, "solver": flashlla.CG()}, ValueError, ["tolerance", "CG(", "its own", "CG(tolerance=..."]),
        ({"tolerance": 0.01, "solver": "cg", "cg_max_iters": 9}, ValueError, ["cg_max_iters", "9", "solver='cg'"]),
        ({"tolerance": 1.0}, ValueError, ["tolerance", "1.0", "from 0 to below 1"]),
        ({"tolerance": -0.1}, ValueError, ["tolerance", "-0.1"]),
        ({"tolerance": float("nan")}, ValueError, ["tolerance", "nan"]),
        ({"tolerance": "1e-2"}, TypeError, ["tolerance", "str", "a number or None"]),
        ({"tolerance": True}, TypeError, ["tolerance", "bool"]),
        ({"backend": "chunkd"}, ValueError, ["backend", "'chunkd'", "did you mean 'chunked'"]),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_lla_attention(change, error, words):
    q, k, v = qkv(2, 9, 4)
    arguments = {"q": q, "k": k, "v": v, **change}
    with pytest.raises(error) as caught:
        lla_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_scale_to_learn_is_that_of_queries_keys_and_ridge() -> None:
    """What the error advises."""
    q, k, v = qkv(1, 9, 4, dtype=torch.float64)
    scale = torch.tensor(0.3, dtype=torch.float64)
    r = scale.sqrt()
    o = lla_attention(q * r, k * r, v, ridge_lambda=0.5 * r**2, qk_scale=1.0, solver="direct")
    torch.testing.assert_close(o, lla_attention(q, k, v, ridge_lambda=0.5, qk_scale=0.3, solver="direct"))


class Wrong(flashlla.Solver):
    """Returns ``what`` instead of a solution."""

    def __init__(self, what):
        self.what = what

    def solve(self, systems, b):
        return self.what(systems, b)


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        (lambda systems, b: b, TypeError, "Wrong.solve returned Tensor"),
        (
            lambda systems, b: Solution.check(systems, b, b, iterations=0, tolerance=1)._replace(x=b[..., :1]),
            ValueError,
            "shape",
        ),
    ],
)
def test_a_solver_that_returns_no_solution_is_named(what, error, words):
    with pytest.raises(error, match=words):
        lla_attention(*qkv(1, 5, 4), solver=Wrong(what))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cu_seqlens": None}, ValueError, ["cu_seqlens: got None", "or cu_seqlens_q and"]),
        ({"cu_seqlens": None, "cu_seqlens_q": cu(*EDGES)}, ValueError, ["cu_seqlens_k", "None"]),
        ({"cu_seqlens_q": cu(*EDGES)}, ValueError, ["cu_seqlens_q", "together with cu_seqlens"]),
        ({"cu_seqlens_k": cu(*EDGES)}, ValueError, ["cu_seqlens_k", "together with cu_seqlens"]),
        ({"cu_seqlens": [0, 9]}, TypeError, ["cu_seqlens", "list", "torch.tensor"]),
        ({"cu_seqlens": cu(*EDGES, dtype=torch.float32)}, TypeError, ["cu_seqlens", "float32", ".int()"]),
        ({"cu_seqlens": cu(*EDGES)[None]}, ValueError, ["cu_seqlens", "(1, 5)", "(sequences + 1,)", "cumsum"]),
        ({"cu_seqlens": cu()}, ValueError, ["cu_seqlens", "(0,)", "(sequences + 1,)"]),
        ({"cu_seqlens": cu(*EDGES, device="meta")}, ValueError, ["cu_seqlens", "meta", "cpu"]),
        (
            {"cu_seqlens": cu(1, 9)},
            ValueError,
            ["cu_seqlens", "1 first", "wanted 0", "pad(lengths.cumsum(0), (1, 0)).int()"],
        ),
        ({"cu_seqlens": cu(0, 9, 8)}, ValueError, ["cu_seqlens", "9 and then 8", "never fall"]),
        ({"cu_seqlens": cu(0, 9, 31)}, ValueError, ["cu_seqlens:", "31 last", "at most 30"]),
        ({"cu_seqlens": cu(0, 9, 31, dtype=torch.int64)}, ValueError, ["cu_seqlens:", "31 last", "at most 30"]),
        ({"cu_seqlens": torch.tensor([0, 2**32 + 9])}, ValueError, ["cu_seqlens:", "last", "at most 30"]),
        ({"cu_seqlens": cu(0, 40, 30), "max_seqlen": 9}, ValueError, ["cu_seqlens:", "40 and then 30"]),
        ({"max_seqlen": 16}, ValueError, ["max_seqlen", "16", "17", "sequence 3"]),
        ({"max_seqlen": -1}, ValueError, ["max_seqlen", "-1", "at least 0"]),
        ({"max_seqlen": 17.0}, TypeError, ["max_seqlen", "float", "int("]),
        ({"max_seqlen_k": torch.tensor(17)}, TypeError, ["max_seqlen_k", "Tensor", "int("]),
        (
            {"cu_seqlens": None, "cu_seqlens_q": cu(*EDGES), "cu_seqlens_k": cu(0, 9)},
            ValueError,
            ["cu_seqlens_k", "(2,)", "(5,)", "cu_seqlens_q"],
        ),
        (
            {"cu_seqlens": None, "cu_seqlens_q": cu(*EDGES), "cu_seqlens_k": cu(0, 9, 9, 10, 31)},
            ValueError,
            ["cu_seqlens_k", "31 last"],
        ),
        ({"q": torch.zeros(2, 2, TOTAL, 8)}, ValueError, ["q:", "(2, 2, 30, 8)", "(1, H, T, D)"]),
        ({"q": torch.zeros(TOTAL, 8)}, ValueError, ["q:", "(30, 8)", "(T, H, D)", "unsqueeze(1)"]),
        ({"k": torch.zeros(1, 2, TOTAL, 8)}, ValueError, ["k:", "3 dimensions"]),
        ({"k": torch.zeros(TOTAL, 3, 8), "v": torch.zeros(TOTAL, 3, 8)}, ValueError, ["k:", "3 heads", "divides"]),
        (
            {n: torch.zeros(1, t, 2, 8) for n, t in zip("qkv", (TOTAL, 25, 25))},
            ValueError,
            ["k:", "25 heads", "(T, H, D) or (1, H, T, D)", "of (1, T, H, D) try q[0]"],
        ),
        (
            {n: torch.zeros(1, TOTAL, 2, 8) for n in "qkv"},
            ValueError,
            ["cu_seqlens:", "27 last", "at most 2, the tokens that q has as (T, H, D) or (1, H, T, D)", "try q[0]"],
        ),
        ({n: torch.zeros(2, TOTAL, 8) for n in "qkv"}, ValueError, ["27 last", "of (H, T, D) q.transpose(0, 1)"]),
        ({"k": torch.zeros(TOTAL, 2, 7)}, ValueError, ["k:", "(30, 2, 7)", "head dim"]),
        ({"v": torch.zeros(TOTAL - 1, 2, 8)}, ValueError, ["v:", "(29, 2, 8)", "(30, 2, 8)"]),
        (
            {"ridge_lambda": torch.ones(TOTAL, 2)},
            ValueError,
            ["ridge_lambda", "(30, 2)", "(H, T)", "(2, 30)", "try ridge_lambda.T"],
        ),
        ({"window": 0}, ValueError, ["window", "0"]),
        ({"causal": None}, TypeError, ["causal", "NoneType"]),
        ({"tolerance": 0.01, "cg_rtol": 1e-4}, ValueError, ["cg_rtol", "0.0001", "tolerance=0.01", "square"]),
        ({"tolerance": 0.01, "solver": "direct"}, ValueError, ["tolerance", "0.01", "exact", "try it without", "'cg'"]),
        ({"tolerance": 0.01, "solver": flashlla.Direct()}, ValueError, ["tolerance", "Direct()", "exact"]),
        ({"tolerance": 0.01, "solver": flashlla.CG()}, ValueError, ["tolerance", "CG(", "its own", "CG(tolerance=..."]),
        ({"tolerance": 0.01, "solver": "cg", "cg_max_iters": 9}, ValueError, ["cg_max_iters", "9", "solver='cg'"]),
        ({"tolerance": 1.0}, ValueError, ["tolerance", "1.0", "from 0 to below 1"]),
        ({"tolerance": -0.1}, ValueError, ["tolerance", "-0.1"]),
        ({"tolerance": float("nan")}, ValueError, ["tolerance", "nan"]),
        ({"tolerance": "1e-2"}, TypeError, ["tolerance", "str", "a number or None"]),
        ({"tolerance": True}, TypeError, ["tolerance", "bool"]),
        ({"backend": "chunkd"}, ValueError, ["backend", "did you mean 'chunked'"]),
        ({"seqlens_k": torch.tensor([3])}, TypeError, ["seqlens_k"]),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_lla_attention_varlen(change: dict[str, Any], error: type, words: list[str]) -> None:
    q, k, v = (torch.zeros(TOTAL, 2, 8) for _ in range(3))
    arguments = {"q": q, "k": k, "v": v, "cu_seqlens": cu(*EDGES), **change}
    with pytest.raises(error) as caught:
        lla_attention_varlen(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"seqstarts_k": torch.tensor([-1, 20])}, ValueError, ["seqstarts_k", "-1 at sequence 0"]),
        ({"q": torch.zeros(2, 2, 8)}, ValueError, ["q:", "(2, 2, 8)", "unsqueeze(2) for one new", "unsqueeze(1)"]),
        ({"q": torch.zeros(2, 2, 8), "layout": "bshd"}, ValueError, ["q:", "(B, N, H, D)", "unsqueeze(1) for one new"]),
        (
            {"q": torch.zeros(2, 1, 4, 8), "k_cache": torch.zeros(2, 20, 2, 8), "v_cache": torch.zeros(2, 20, 2, 8)},
            ValueError,
            ["k_cache:", "20 heads", "(B, S, H, D)", "layout='bshd'"],
        ),
        ({"k_cache": torch.zeros(2, 20, 8)}, ValueError, ["k_cache:", "(2, 20, 8)", "4 dimensions"]),
        ({"k_cache": torch.zeros(3, 2, 20, 8)}, ValueError, ["k_cache:", "(3, 2, 20, 8)", "batch size", "block_table"]),
        ({"v_cache": torch.zeros(2, 2, 19, 8)}, ValueError, ["v_cache:", "(2, 2, 19, 8)", "as k_cache"]),
        ({"k_cache": torch.zeros(2, 2, 20, 8).half()}, TypeError, ["k_cache:", "float16", "k_cache.to(q.dtype)"]),
        ({"seqlens_k": None}, TypeError, ["seqlens_k", "None", "the new ones counted"]),
        ({"seqlens_k": 3}, TypeError, ["seqlens_k", "int", "torch.full((2,), seqlens_k, dtype=torch.int32"]),
        ({"seqlens_k": [3, 4]}, TypeError, ["seqlens_k", "list", "torch.tensor"]),
        ({"seqlens_k": torch.ones(2)}, TypeError, ["seqlens_k", "float32", ".int()"]),
        ({"seqlens_k": torch.ones(3, dtype=torch.int32)}, ValueError, ["seqlens_k", "(3,)", "(2,)"]),
        ({"seqlens_k": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, ["seqlens_k", "meta"]),
        ({"seqlens_k": torch.tensor([20, 21])}, ValueError, ["seqlens_k", "21 at sequence 1", "0 to 20"]),
        ({"seqlens_k": torch.tensor([-1, 20])}, ValueError, ["seqlens_k", "-1 at sequence 0"]),
        ({"ridge_lambda": torch.ones(2, 2)}, ValueError, ["ridge_lambda", "(2, 2)", "(2, 2, 1)"]),
        ({"ridge_lambda": torch.zeros(2, 1)}, ValueError, ["ridge_lambda", "0.0", "above 0"]),
        ({"ridge_lambda": torch.ones(2)}, ValueError, ["ridge_lambda", "(2,)", "[:, None] for heads"]),
        ({"ridge_lambda": torch.ones(2, 1, 1, 1)}, ValueError, ["ridge_lambda", "(2, 1, 1, 1)", "squeeze(-1)"]),
        ({"window": 0}, ValueError, ["window", "0"]),
        ({"layout": "thd"}, ValueError, ["layout", "'thd'"]),
        ({"solver": "drect"}, ValueError, ["solver", "did you mean 'direct'"]),
        ({"is_causal": True}, TypeError, ["lla_decode()", "'is_causal'", "try without it"]),
        ({"cache_batch_idx": None}, TypeError, ["lla_decode()", "k_cache[cache_batch_idx]"]),
        ({"seqlens_k": None, "cache_seqlens": None}, TypeError, ["lla_decode()", "'cache_seqlens'", "try seqlens_k="]),
        ({"blok_table": None}, TypeError, ["lla_decode()", "'blok_table'", "try block_table="]),
        ({"tolerance": 0.01}, TypeError, ["lla_decode()", "'tolerance'", "exact", "solver=flashlla.CG(tolerance=...)"]),
        ({"backend": "chunkd"}, ValueError, ["backend", "did you mean 'chunked'"]),
        ({"out": [1.0]}, TypeError, ["out", "list"]),
        ({"out": torch.zeros(2, 2, 8)}, ValueError, ["out", "(2, 2, 8)", "(2, 2, 1, 8)"]),
        ({"out": torch.zeros(2, 1, 2, 8)}, ValueError, ["out", "(2, 1, 2, 8)", "(2, 2, 1, 8)"]),
        ({"out": torch.zeros(2, 2, 1, 8).half()}, TypeError, ["out", "float16", "float32"]),
        ({"out": torch.zeros(2, 2, 1, 8, device="meta")}, ValueError, ["out", "meta", "cpu"]),
        ({"cg_rtol": 1.0}, TypeError, ["cg_rtol"]),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_lla_decode(change: dict[str, Any], error: type, words: list[str]) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(2, 2, 1, 8),
        "k_cache": torch.zeros(2, 2, 20, 8),
        "v_cache": torch.zeros(2, 2, 20, 8),
        "seqlens_k": torch.tensor([20, 3]),
        **change,
    }
    tensors = [given.pop(name) for name in ("q", "k_cache", "v_cache", "seqlens_k")]
    with pytest.raises(error) as caught:
        lla_decode(*tensors, **given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"block_table": [[0]]}, TypeError, ["block_table", "list"]),
        ({"block_table": torch.zeros(2, 2)}, TypeError, ["block_table", "float32"]),
        ({"block_table": torch.zeros(3, 2).int()}, ValueError, ["block_table", "(3, 2)", "B = 2"]),
        ({"block_table": torch.zeros(2).int()}, ValueError, ["block_table", "(2,)", "(B, pages)"]),
        ({"block_table": torch.tensor([[0, 1], [2, 5]])}, ValueError, ["block_table", "page 5", "sequence 1", "4"]),
        ({"block_table": torch.tensor([[0, 1], [-1, 2]])}, ValueError, ["block_table", "page -1", "fill"]),
        ({"seqlens_k": torch.tensor([20, 33])}, ValueError, ["seqlens_k", "33 at sequence 1", "0 to 32"]),
        ({"size": 24}, ValueError, ["k_cache", "24 keys", "multiple of 16"]),
        ({"pages": 0}, ValueError, ["k_cache", "no pages"]),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else None,
)
def test_pages(change: dict[str, Any], error: type, words: list[str]) -> None:
    tables = {"block_table": torch.tensor([[0, 1], [2, 3]]), "seqlens_k": torch.tensor([20, 3])}
    given: dict[str, Any] = {"size": 16, "pages": 5, **tables, **change}
    cache = torch.zeros(given["pages"], 2, given["size"], 8)
    with pytest.raises(error) as caught:
        lla_decode(torch.zeros(2, 2, 1, 8), cache, cache, given["seqlens_k"], block_table=given["block_table"])
    for word in words:
        assert word in str(caught.value)


def test_what_equals_an_argument_of_an_earlier_call_is_not_taken_for_it() -> None:
    """Settings are checked once for all calls that say the same: 1 is not True, nor a list a tuple."""
    q = torch.zeros(1, 2, 4)
    for good, bad in (
        ({"causal": True}, {"causal": 1}),
        ({"cg_max_iters": 1}, {"cg_max_iters": True}),
        ({"cg_use_preconditioner": False}, {"cg_use_preconditioner": 0}),
        ({"window": 1}, {"window": 1.0}),
        ({"window": 2}, {"window": [2]}),
        ({"qk_scale": 1.0}, {"qk_scale": torch.tensor(1.0)}),
    ):
        flashlla.lla_attention(q, q, q, **good)
        for _ in range(2):
            with pytest.raises(TypeError, match=next(iter(bad))):
                flashlla.lla_attention(q, q, q, **bad)
