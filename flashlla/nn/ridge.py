"""The ridge as a module: a number, or learned, for each head or for each token and head."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashlla.hints import with_hints
from flashlla.nn.checks import check_numbers, check_whole


class Ridge(nn.Module):
    """``ridge_lambda`` of an attention layer, learned: softplus(raw) + minimum, in float32.

    Its parameters stay in float32 when the model is cast to a narrower dtype (``model.to(torch.bfloat16)``,
    ``model.half()``), and it is computed in float32 under autocast. They carry ``_no_weight_decay = True``: decay would
    pull raw to 0, the ridge to log 2 + minimum. :func:`flashlla.nn.param_groups` knows them without it, as where FSDP2
    has made them anew, and gives them a learning rate of their own.

    FSDP2 shards parameters of one dtype together: where the model is in bfloat16, ``fully_shard(layer.ridge)`` goes
    before ``fully_shard(layer)``. The same keeps a ridge in float32 under ``MixedPrecisionPolicy``. Without it the
    policy's ``param_dtype`` rounds what a pass sees, raw to 8 bits, and a ridge moves by under 1 %; what is learned
    stays in float32.

    Args:
        kind: "head": one number a head. "token": one for each token and head, projected from ``hidden_states``, the
            same for all tokens at first. A number: that, nothing is learned.
        num_heads: query heads, H.
        hidden_size: the last dimension of ``hidden_states``; wanted for "token".
        init: the ridge at first, above ``minimum``. Default 1.0. Units: those of keys squared, as all ridges.
        minimum: the ridge is always above it; at least 0. Default 1e-2.
        device: of the parameters. Default None: torch's.
        dtype: of the parameters, widened to float32 if it is narrower. Default None: torch's, widened too.

    Raises:
        ValueError, TypeError: an argument does not fit.

    Source: a ridge of its own for every head is that of Zuo et al., "Local Linear Attention", ICLR 2026.

    Example:
        >>> import torch
        >>> from flashlla.nn import Ridge
        >>> Ridge("head", num_heads=4, init=0.5)().shape
        torch.Size([4, 1])
        >>> Ridge("token", num_heads=4, hidden_size=32)(torch.randn(2, 10, 32)).shape
        torch.Size([2, 4, 10])
        >>> Ridge(10.0, num_heads=4)()
        10.0
    """

    @with_hints({"ridge": "kind=", "ridge_init": "init=", "ridge_min": "minimum="})
    def __init__(
        self,
        kind: Literal["head", "token"] | float = "head",
        num_heads: int = 1,
        hidden_size: int | None = None,
        *,
        init: float = 1.0,
        minimum: float = 1e-2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in ("head", "token"):
            if isinstance(kind, bool) or not isinstance(kind, Real):
                raise ValueError(f"ridge: got {kind!r}, wanted 'head', 'token' or a number")
            if not 0 < kind <= sys.float_info.max:
                raise ValueError(f"ridge: got {kind}, wanted a finite number above 0")
        else:
            check_numbers(ridge_init=init, ridge_min=minimum)
            if not 0 <= minimum < init <= sys.float_info.max:
                raise ValueError(
                    f"ridge_init: got {init} with ridge_min {minimum}, wanted 0 <= ridge_min < ridge_init; "
                    f"try ridge_init={2 * minimum if minimum > 0 else 1.0}"
                )
        check_whole(num_heads=num_heads)
        if kind == "token":
            if hidden_size is None:
                raise ValueError(
                    "hidden_size: got None, wanted the last dimension of hidden_states: the ridge is 'token'"
                )
            check_whole(hidden_size=hidden_size)
        self.kind, self.num_heads, self.hidden_size = kind, num_heads, hidden_size
        self.init, self.minimum = init, minimum
        make: dict[str, Any] = {
            "device": device,
            "dtype": _widened(torch.get_default_dtype() if dtype is None else dtype),
        }
        for name, shape in (("raw", (num_heads,)), ("weight", (num_heads, hidden_size or 0))):
            learned = kind == "token" or (kind == "head" and name == "raw")
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **make)) if learned else None)
        self.raw: nn.Parameter | None
        self.weight: nn.Parameter | None
        self.reset_parameters()
        self._mark()

    def reset_parameters(self) -> None:
        """The ridge is ``init`` again, for all tokens."""
        if self.raw is not None:
            above = self.init - self.minimum
            nn.init.constant_(self.raw, above + math.log(-math.expm1(-above)))  # softplus of it is above
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def forward(self, hidden_states: Tensor | None = None) -> float | Tensor:
        """What ``ridge_lambda`` takes: a number, (H, 1) for "head", or (B, H, S) for "token".

        hidden_states: (B, S, hidden_size), any floating dtype; looked at for "token" alone.
        """
        if self.raw is None:
            return float(self.kind)
        raw = self.raw.to(_widened(self.raw.dtype))
        if self.weight is None:
            return self._above_minimum(raw.unsqueeze(-1))  # (H, 1)
        if hidden_states is None:
            raise TypeError("hidden_states: got None, wanted (B, S, hidden_size): the ridge is 'token'")
        device = "cpu" if hidden_states.is_meta else hidden_states.device.type  # autocast knows no meta
        with torch.autocast(device, enabled=False):
            raw = F.linear(hidden_states.to(raw.dtype), self.weight.to(raw.dtype), raw)  # (B, S, H)
        # One layout for all that follows: of two that differ, the compiler's backward pass expects another than comes.
        return self._above_minimum(raw.mT.contiguous())  # (B, H, S)

    def _above_minimum(self, raw: Tensor) -> Tensor:
        return F.softplus(raw) + self.minimum

    def _mark(self) -> None:
        for parameter in self.parameters(recurse=False):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    # What makes parameters anew loses the mark, and casts would lose digits.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Ridge:
        def apply(t: Tensor) -> Tensor:
            applied = fn(t)
            wide = _widened(applied.dtype)
            return applied if applied.dtype == wide else t.to(applied.device, wide)

        super()._apply(apply, recurse)
        self._mark()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def extra_repr(self) -> str:
        numbers = "" if self.raw is None else f", init={self.init}, minimum={self.minimum}"
        return f"{self.kind!r}, num_heads={self.num_heads}{numbers}"


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
