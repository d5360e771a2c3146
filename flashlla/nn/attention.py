"""LocalLinearAttention: the layer that models are made of."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from flashlla import hints
from flashlla.api import lla_attention, lla_attention_varlen, lla_decode
from flashlla.nn.across import Across
from flashlla.nn.cache import Keys, LLACache
from flashlla.nn.checks import check_numbers, check_whole
from flashlla.nn.padding import Padding, Past, read_mask
from flashlla.nn.protocols import open_cache
from flashlla.nn.ridge import Ridge
from flashlla.nn.rotary import Rotation
from flashlla.nn.solving import solving
from flashlla.solvers import Solver

if TYPE_CHECKING:
    from flashlla.distributed.groups import Group

_TOLERANCE = 1e-2  # the layer's default
# What models elsewhere hand to every layer: values that ask for nothing but what the layer does; None: all of them.
_HARMLESS: dict[str, tuple[Any, ...] | None] = {
    "output_attentions": (None, False),
    "is_causal": (None, True),
    "dropout": (None, 0.0),
    "cache_position": None,
    "logits_to_keep": None,
    "num_items_in_batch": None,
    "output_hidden_states": None,
    "output_router_logits": None,
    "return_dict": None,
}
# What to do instead of others.
_INSTEAD = {
    "output_attentions": "without it: weights are not kept",
    "is_causal": "without it: the layer is causal",
    "dropout": "without it: there is no dropout",
    "position_embeddings": "position_ids=, and rope_theta of the layer, which turns queries and keys itself",
    **dict.fromkeys(("past_key_value", "cache", "layer_past", "kv_cache"), "past_key_values="),
    **dict.fromkeys(("attn_mask", "mask"), "attention_mask=, (B, keys), True or 1 for tokens"),
    "key_padding_mask": "attention_mask=~key_padding_mask, which is True or 1 for tokens",
    **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k", "seq_idx"), "cu_seqlens="),
    **dict.fromkeys(("max_length_q", "max_length_k", "max_seqlen_q", "max_seqlen_k"), "max_seqlen="),
    **dict.fromkeys(("window_size", "sliding_window"), "window= where the layer is made"),
}


class _Packing(NamedTuple):
    """Sequences one behind the other."""

    cu_seqlens: Tensor
    max_seqlen: int | None


class LocalLinearAttention(nn.Module):
    """Local Linear Attention with its projections: a layer in place of softmax attention's.

    Queries, keys and values are projected, queries and keys normalised for each head (RMSNorm over ``head_dim``, with
    a weight), turned by their positions (rotary, half-split, in float32), and attended causally; the heads' outputs are
    projected back.

    With ``qk_norm`` the coordinates of keys have unit variance at first. So a ridge of 1.0 halves slopes along
    directions in which the keys near a query vary by 1, and 10 is close to softmax attention.

    A prompt at once, in pieces, token by token, padded or packed: the same outputs, to 1e-5 in float32 with ridges of
    0.1 and more, to 1e-4 at 0.01 (head_dim 64), which is what float32 tells in such systems.

    Args:
        hidden_size: of tokens, in and out.
        num_heads: query heads, H.
        num_kv_heads: key heads, a number that divides ``num_heads``. Default None: ``num_heads``.
        head_dim: of each head, D. Default None: hidden_size / num_heads.
        qkv_bias: biases in the projections of queries, keys and values. Default False.
        qk_norm: normalise queries and keys. Default True.
        rope_theta: the base of rotary positions. Default 10000.0; None: no positions.
        window: a token sees only the latest so many, its own included. Default None: all.
        ridge: "head", learned for each head (the default); "token", learned for each token and head; or a number. See
            :class:`flashlla.nn.Ridge`, which is ``layer.ridge``.
        ridge_init: a learned ridge at first. Default 1.0. Units: those of keys squared.
        ridge_min: what a learned ridge stays above. Default 1e-2.
        tolerance: relative residual to which training solves, from 0 to below 1; outputs are off by about as much or
            less. Default 1e-2. In eval mode, and with a cache, solves go to what the dtype resolves, so that all ways
            to the same token agree.
        solver: as for :func:`flashlla.lla_attention`. Default None: the backend's best. One with a tolerance of its own
            trains with that; ``tolerance`` then stays at its default.
        backend: as for :func:`flashlla.lla_attention`.
        context_parallel: a ProcessGroup, or a DeviceMesh of one dimension, over which sequences lie: hidden states are
            this rank's tokens, as :func:`flashlla.distributed.shard_sequence` gives them, ``cu_seqlens`` those of the
            whole row. Without masks and caches. Default None: sequences are whole.
        layer_idx: the number of this layer in the model, for caches. Default None: used without a cache.
        device, dtype: of the parameters; a learned ridge is in float32 at least. Default None: torch's.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: Zuo et al., "Local Linear Attention", ICLR 2026; normalised queries and keys, Henry et al., 2020; rotary
    positions, Su et al., 2021.

    Example:
        >>> import torch
        >>> from flashlla.nn import LocalLinearAttention
        >>> layer = LocalLinearAttention(64, num_heads=4, num_kv_heads=2)
        >>> o, _, _ = layer(torch.randn(2, 100, 64))
        >>> o.shape
        torch.Size([2, 100, 64])
        >>> o.sum().backward()
        >>> layer.ridge.raw.grad.shape
        torch.Size([4])
    """

    @hints.with_hints(hints.LAYER)
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        qk_norm: bool = True,
        rope_theta: float | None = 10000.0,
        window: int | None = None,
        ridge: Literal["head", "token"] | float = "head",
        ridge_init: float = 1.0,
        ridge_min: float = 1e-2,
        tolerance: float = 1e-2,
        solver: str | Solver | None = None,
        backend: str | None = None,
        context_parallel: Group | None = None,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._across = None if context_parallel is None else Across(context_parallel)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_whole(hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: got {num_kv_heads}, wanted a number that divides num_heads {num_heads}")
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"hidden_size: got {hidden_size}, wanted a multiple of num_heads {num_heads}; or try head_dim="
                )
            head_dim = hidden_size // num_heads
        check_whole(head_dim=head_dim)
        if window is not None:
            check_whole(window=window)
        if rope_theta is not None:
            check_numbers(rope_theta=rope_theta)
            if not 0 < rope_theta <= sys.float_info.max:
                raise ValueError(f"rope_theta: got {rope_theta}, wanted a number above 0, or None for no positions")
            if head_dim % 2:
                raise ValueError(f"head_dim: got {head_dim}, wanted an even number where rope_theta is not None")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim, self.rope_theta, self.window = head_dim, rope_theta, window
        self.solver, self.backend, self.layer_idx = solver, backend, layer_idx
        self.tolerance = tolerance

        make: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias, **make)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias, **make)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias, **make)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False, **make)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6, **make) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6, **make) if qk_norm else nn.Identity()
        self.ridge = Ridge(ridge, num_heads, hidden_size, init=ridge_init, minimum=ridge_min, **make)

    def reset_parameters(self) -> None:
        """As at first; what a layer made on the ``meta`` device wants after ``to_empty``."""
        for module in self.children():
            if not isinstance(module, nn.Identity):
                module.reset_parameters()  # type: ignore[operator]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        max_seqlen: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None, Any]:
        """Attend.

        Args:
            hidden_states: (B, S, hidden_size).
            attention_mask: (B, keys), True or 1 for tokens, one column for each new token, in front of them one for
                each in the cache; an :class:`LLACache` remembers those and takes masks of the new tokens alone, or
                none. Padding may be on the left and on the right. It is not seen, whatever it holds (NaN, too), and
                its output is 0. Default None: no padding.
            past_key_values: the tokens before: an :class:`LLACache`, a cache of Hugging Face (dynamic or static), or of
                fla. The new ones are appended. Default None: there are none.
            use_cache: make an :class:`LLACache` where ``past_key_values`` is None, for all layers. Default False.
            cu_seqlens: (sequences + 1,) int32, for packed sequences, B = 1: where each begins, and where the last one
                ends. Without a mask or a cache.
            position_ids: (B, S), (1, S) or (S,), for rotary positions. Default None: tokens are counted from 0, from
                the first that is no padding, on from the cache; anew in each packed sequence.
            max_seqlen: as for :func:`flashlla.lla_attention_varlen`. Default None.
            others: what models elsewhere hand to every layer, where it says nothing (``output_attentions=False``).

        Returns:
            ``(o, None, past_key_values)``: the output, (B, S, hidden_size), nothing in place of weights, and the cache.

        Raises:
            TypeError, ValueError: an argument does not fit, or asks for what there is not. On the CPU, and elsewhere
                where FLASHLLA_CHECK is 1: a mask with padding between tokens, as after a prompt padded on the right in
                caches of other libraries; unchecked, it is seen as if it were tokens.
        """
        _refuse(others)
        _check_hidden_states(hidden_states, self.hidden_size)
        batch, new, _ = hidden_states.shape
        if self._across is not None:
            self._across.refuse(attention_mask=attention_mask, past_key_values=past_key_values, use_cache=use_cache)
        packing = None if cu_seqlens is None else _Packing(cu_seqlens, max_seqlen)
        if packing is not None:
            _check_packing(packing.cu_seqlens, batch, attention_mask=attention_mask, past_key_values=past_key_values)
        elif max_seqlen is not None:
            raise ValueError(f"max_seqlen: got {max_seqlen} without cu_seqlens, wanted None, or both")
        elif use_cache and past_key_values is None:
            past_key_values = LLACache()
        cache = None if past_key_values is None else open_cache(past_key_values, self.layer_idx, self.window)
        past = Past() if cache is None else cache.past()
        past.check_batch(batch)

        padding = None if attention_mask is None else read_mask(attention_mask, hidden_states, past)
        if padding is not None:
            # NaN there would reach the weights' gradients, and so would NaN that comes back to it.
            hidden_states = hidden_states.masked_fill(~padding.tokens.unsqueeze(-1), 0)
        if position_ids is None:
            slots = torch.arange(new, dtype=torch.int32, device=hidden_states.device)
            if self._across is not None:
                slots = self._across.positions(new, hidden_states.device)
            position_ids = _positions(slots, past, padding, packing)
        else:
            _check_position_ids(position_ids, batch, new)
        q, k, v = self._project(hidden_states, position_ids)
        ridge = self.ridge(hidden_states)

        new_keys = Keys(k, v, seqlens_k=None, seqstarts_k=None if padding is None else padding.seqstarts)
        if packing is not None:
            o = self._attend_packed(q, k, v, ridge, packing)
        elif cache is None:
            o = self._attend(q, new_keys, ridge, self._settings)
        else:
            keys = cache.append(k, v, past, padding)
            if past.empty:  # the new keys are all there are, and many are decoded more slowly
                o = self._attend(q, new_keys, ridge, self._solving.exact)
            else:
                o = self._attend_cached(q, keys, ridge)
        o = self.o_proj(o.flatten(2))
        if padding is not None:
            o = o.masked_fill(~padding.tokens.unsqueeze(-1), 0)
        return o, None, past_key_values

    def _project(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, (B, S, H, D), k and v, (B, S, Hkv, D)."""
        of_heads = lambda t: t.unflatten(-1, (-1, self.head_dim))  # where heads lie on several devices, this one's
        q, k, v = (of_heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _normalised(self.q_norm, q), _normalised(self.k_norm, k)
        if self.rope_theta is not None:
            turn = Rotation.at(positions, self.head_dim, self.rope_theta, v.dtype)
            q, k = turn(q), turn(k)
        return q.to(v.dtype), k.to(v.dtype), v

    @property
    def tolerance(self) -> float:
        """Relative residual to which training solves; may be set."""
        return self._tolerance

    @tolerance.setter
    def tolerance(self, tolerance: float) -> None:
        self._solving = solving(self.solver, tolerance, _TOLERANCE, self.head_dim)
        self._tolerance = tolerance

    @property
    def _settings(self) -> dict[str, Any]:
        return self._solving.training if self.training else self._solving.exact

    def _attend(self, q: Tensor, keys: Keys, ridge: float | Tensor, settings: dict[str, Any]) -> Tensor:
        """Aligned at the last key; q and what is returned: (B, S, H, D)."""
        o: Tensor = (lla_attention if self._across is None else self._across.attention)(
            q,
            keys.k,
            keys.v,
            ridge_lambda=ridge,
            window=self.window,
            backend=self.backend,
            layout="bshd",
            seqstarts_k=keys.seqstarts_k,
            **settings,
        )
        return o

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, ridge: float | Tensor, packing: _Packing) -> Tensor:
        o: Tensor = (lla_attention_varlen if self._across is None else self._across.varlen)(
            *(t.transpose(1, 2) for t in (q, k, v)),  # (1, H, T, D)
            cu_seqlens=packing.cu_seqlens,
            max_seqlen=packing.max_seqlen,
            ridge_lambda=ridge,
            window=self.window,
            backend=self.backend,
            **self._settings,
        )
        return o.transpose(1, 2)

    def _attend_cached(self, q: Tensor, keys: Keys, ridge: float | Tensor) -> Tensor:
        seqlens = keys.seqlens_k
        if seqlens is None:
            history = any(isinstance(t, Tensor) and t.requires_grad for t in (q, keys.k, keys.v, ridge))
            if history and torch.is_grad_enabled():
                return self._attend(q, keys, ridge, self._solving.exact)
            seqlens = torch.full(q.shape[:1], keys.k.shape[1], dtype=torch.int32, device=q.device)
        o: Tensor = lla_decode(
            q,
            keys.k,
            keys.v,
            seqlens,
            ridge_lambda=ridge,
            window=self.window,
            solver=self._solving.decoding,
            backend=self.backend,
            layout="bshd",
            seqstarts_k=keys.seqstarts_k,
        )
        if o.requires_grad and not torch.compiler.is_compiling():
            o.register_hook(_refuse_gradient)
        return o

    def extra_repr(self) -> str:
        told = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "window": self.window,
            "layer_idx": self.layer_idx,
        }
        return ", ".join([str(self.hidden_size), *(f"{name}={value}" for name, value in told.items())])


def _refuse_gradient(_: Tensor) -> NoReturn:
    raise NotImplementedError(
        "past_key_values: a loss was made of tokens behind a cache that keeps no history, as an LLACache; wanted no "
        "cache in training, or, for a prefix of the tokens, a DynamicCache of Hugging Face or a cache of fla; in "
        "evaluation try torch.no_grad()"
    )


def _normalised(norm: nn.Module, t: Tensor) -> Tensor:
    # Under autocast t is narrower than the weight.
    return norm(t.to(norm.weight.dtype)) if isinstance(norm, nn.RMSNorm) else t


def _positions(slots: Tensor, past: Past, padding: Padding | None, packing: _Packing | None) -> Tensor:
    """Of the new tokens, which lie at ``slots``, (S,), of what is new: (S,) or (B, S)."""
    if packing is not None:
        edges = packing.cu_seqlens.to(torch.int32)
        return slots - edges[(torch.searchsorted(edges, slots, right=True) - 1).clamp(min=0)]
    if isinstance(past.length, Tensor):
        slots = slots + (past.length[:, None] if past.length.dim() else past.length)
    else:
        slots = slots + past.length
    seqstarts = past.seqstarts if padding is None else padding.seqstarts
    return slots if seqstarts is None else (slots - seqstarts[:, None]).clamp(min=0)


def _check_hidden_states(hidden_states: Tensor, hidden_size: int) -> None:
    if not isinstance(hidden_states, Tensor):
        raise TypeError(f"hidden_states: got {type(hidden_states).__name__}, wanted a tensor (B, S, {hidden_size})")
    if hidden_states.dim() != 3 or hidden_states.shape[-1] != hidden_size:
        hint = "; try hidden_states.unsqueeze(0) for one sequence" * (hidden_states.dim() == 2)
        raise ValueError(
            f"hidden_states: got shape {tuple(hidden_states.shape)}, wanted (B, S, hidden_size), hidden_size = "
            f"{hidden_size}{hint}"
        )


def _check_position_ids(position_ids: Tensor, batch: int, new: int) -> None:
    if not isinstance(position_ids, Tensor):
        raise TypeError(f"position_ids: got {type(position_ids).__name__}, wanted a tensor of (B, S) whole numbers")
    rows = position_ids.shape[0] if position_ids.dim() == 2 else 1
    if position_ids.dim() not in (1, 2) or position_ids.shape[-1] != new or rows not in (1, batch):
        raise ValueError(
            f"position_ids: got shape {tuple(position_ids.shape)}, wanted {(batch, new)}, {(1, new)} or {(new,)}: one "
            f"for each new token"
        )


def _check_packing(cu_seqlens: Tensor, batch: int, **others: Any) -> None:
    """Packed sequences go without the ``others``."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(
            f"cu_seqlens: got {type(cu_seqlens).__name__}, wanted a tensor of (sequences + 1,) int32; try "
            f"torch.tensor(cu_seqlens, dtype=torch.int32, device=hidden_states.device)"
        )
    if cu_seqlens.dim() != 1:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, wanted (sequences + 1,)")
    for name, value in others.items():
        if value is not None:
            raise ValueError(
                f"{name}: got one together with cu_seqlens, wanted None: packed sequences have no padding and go into "
                f"no cache; try padded ones for that"
            )
    if batch != 1:
        raise ValueError(
            f"hidden_states: got {batch} rows together with cu_seqlens, wanted 1, with the sequences one behind the "
            f"other; try hidden_states.flatten(0, 1).unsqueeze(0)"
        )


def _refuse(others: dict[str, Any]) -> None:
    """Arguments that ask for what the layer does not do."""
    for name, value in others.items():
        if name in _HARMLESS:
            harmless = _HARMLESS[name]
            if harmless is None or any(value is known or value == known for known in harmless):
                continue
            raise ValueError(f"{name}: got {value!r}, wanted {harmless[-1]}; try {_INSTEAD[name]}")
        hints.refuse_unknown(
            "LocalLinearAttention.forward",
            [name],
            lambda: hints.keywords_of(LocalLinearAttention.forward),
            _INSTEAD,
        )
