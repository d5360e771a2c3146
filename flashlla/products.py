"""Products of float32 matrices that keep float32's digits, whatever torch lets a device round their operands to.

``torch.set_float32_matmul_precision("high")``, which training scripts set for the sake of their models, lets a device
round operands to TF32, "medium" to bfloat16 too: noise of 5e-4 or 4e-3 of a ridge system, where its ridge may be less.
The setting is the process's, other threads' too, so it is read and never changed. Where it rounds, operands are taken
apart into numbers that rounding leaves as they are, and the products of these are added up.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Of a float32's significand.
_BITS = 24
_ALLOWED = {"highest": "ieee", "high": "tf32", "medium": "bf16"}


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b."""
    multiply = torch.bmm if a.dim() == b.dim() == 3 else torch.matmul  # the same, but that bmm starts sooner
    bits = _bits(a)
    if bits == _BITS:
        return multiply(a, b, out=out)
    first, *others = _terms(a, b, bits)
    total = multiply(*first, out=out)
    for x, y in others:
        total += multiply(x, y)
    return total


def add_product(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
    """``total``, (G, M, N), with alpha a @ b added to it, in place."""
    bits = _bits(a)
    for x, y in [(a, b)] if bits == _BITS else _terms(a, b, bits):
        total.baddbmm_(x, y, alpha=alpha)
    return total


def allowed(device: torch.device) -> str:
    """The name of what torch now lets ``device`` round operands to: "ieee" (nothing), "tf32", "bf16"."""
    try:
        everywhere = _ALLOWED[torch.get_float32_matmul_precision()]
    except RuntimeError:  # so torch answers once the settings of each device, which are younger, have been used
        everywhere = None
    if everywhere == "ieee":
        return everywhere
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    own = getattr(getattr(backend, "matmul", None), "fp32_precision", everywhere)
    return "ieee" if own == "none" else str(own)


@functools.cache
def bits_kept(device: torch.device, allowed: str) -> int:
    """How many bits of an operand count on ``device`` where it may round to ``allowed``: found by trying, since many
    have no units that would. Waits for the device, once for each setting."""
    # As bmm and of an ordinary size, which libraries do as they do all: 1 + 2^-i has i + 1 bits.
    numbers = 1 + torch.arange(64, device=device, dtype=torch.float32).neg().exp2().expand(2, 64, 64)
    kept = torch.bmm(numbers, torch.eye(64, device=device, dtype=torch.float32).expand(2, 64, 64)) == numbers
    return int(kept[0, 0, :_BITS].sum())


def _bits(a: Tensor) -> int:
    """How many bits of the operand ``a`` count now; ``_BITS`` also stands for all of a wider one."""
    if a.dtype != torch.float32 or (rounded_to := allowed(a.device)) == "ieee":
        return _BITS
    return bits_kept(a.device, rounded_to)


def _terms(a: Tensor, b: Tensor, bits: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of matrices whose products add up to a @ b, the smallest first."""
    a_parts, b_parts = _parts(a, bits), _parts(b, bits)
    # Part i is 2^(-i bits) of the whole: what two of them are worth together is told by the sum of their places, and
    # beyond the last place by less than a rounding.
    return [(a_parts[i], b_parts[place - i]) for place in reversed(range(len(a_parts))) for i in range(place + 1)]


def _parts(x: Tensor, bits: int) -> list[Tensor]:
    """Numbers of ``bits`` bits that add up to ``x``, the largest first; two of TF32 may lack its last bit."""
    parts, unit = [], 1 << (_BITS - bits)
    for _ in range(-(-_BITS // (bits + 1)) - 1):  # each has a sign, which is worth a bit
        upper = (x.view(torch.int32) + unit // 2).bitwise_and_(-unit).view(torch.float32)  # rounded to nearest
        parts.append(upper)
        x = x - upper
    return [*parts, x]
