"""Keys and values of earlier tokens: the package's own cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from flashlla.checks import check_whole
from flashlla.hints import with_hints
from flashlla.nn.padding import Padding, Past, read_mask
from flashlla.values import looked_at

# A growing cache begins with room for so many keys.
_FIRST_ROOM = 64


class Keys(NamedTuple):
    """The keys and values of a call, as :func:`flashlla.lla_decode` takes them with ``layout="bshd"``.

    ``k``: (B, L, Hkv, D), ``v``: (B, L, Hkv, Dv), with new tokens the last of those in use. ``seqlens_k``: (B,) int32,
    the keys in use; None: all L. ``seqstarts_k``: (B,) int32, the first key that is visible; None: 0.
    """

    k: Tensor
    v: Tensor
    seqlens_k: Tensor | None
    seqstarts_k: Tensor | None


@dataclass
class _Layer:
    k: Tensor  # (B, room, Hkv, D)
    v: Tensor  # (B, room, Hkv, Dv)
    lengths: Tensor  # (B,) int32: slots in use
    seqstarts: Tensor | None = None  # (B,) int32: the slot of each first key; None while no mask was given
    most: int = 0  # at least the largest of lengths; of growing caches alone: it changes, and would compile anew


class LLACache:
    """Keys and values of earlier tokens, for every layer of a model: what makes generation cheap.

    Pass the same object to all layers (``past_key_values=``) and to all calls; each call appends its tokens. For
    inference: keys are kept without a history, and after the first call outputs have no gradient.

    Two kinds. Without ``max_len`` it grows, by doubling. With it, it has a fixed size from the first call on, lies
    still in memory and keeps its lengths on the device alone: good for ``torch.compile`` and CUDA graphs. Make the
    first call outside of them, as it allocates; ``reset()`` keeps the memory.

    Transformers' ``generate`` takes it for models of :class:`LocalLinearAttention`, but for assisted generation.

    Sequences of a batch may begin and end in different slots. Those padded on the left stay behind their padding, as
    the ``attention_mask`` of the first calls said; padding on the right is overwritten by the tokens that follow. So
    later calls need no mask; one they give has a column for each new token, or also one for each slot of the past.

    Args:
        max_len: slots for tokens, padding on the left counted. Default None: it grows. A call with more tokens is
            refused; one that finds too few slots left, on the CPU, and elsewhere where FLASHLLA_CHECK is 1. Unchecked
            the device stops where it would write beyond.

    Raises:
        TypeError, ValueError: ``max_len`` is no whole number of at least 1; a batch has another size or dtype than the
            one before (reset it, or make a new one), or more tokens than there is room for.

    Example:
        >>> import torch
        >>> from flashlla.nn import LLACache, LocalLinearAttention
        >>> layer = LocalLinearAttention(32, num_heads=4, layer_idx=0).eval()
        >>> x, cache = torch.randn(2, 10, 32), LLACache()
        >>> with torch.no_grad():
        ...     prompt, _, _ = layer(x[:, :9], past_key_values=cache)
        ...     last, _, _ = layer(x[:, 9:], past_key_values=cache)
        >>> cache.get_seq_length()
        10
        >>> torch.allclose(last, layer(x)[0][:, 9:], atol=1e-5)
        True
    """

    @with_hints(
        {"max_cache_len": "max_len=", "max_seq_len": "max_len=", "config": "without it: layers come as they are"}
    )
    def __init__(self, max_len: int | None = None) -> None:
        if max_len is not None:
            max_len = check_whole(max_len, "max_len", "a whole number or None")
            if max_len < 1:
                raise ValueError(f"max_len: got {max_len}, wanted at least 1, or None for a cache that grows")
        self.max_len = max_len
        self._layers: dict[int, _Layer] = {}

    def __len__(self) -> int:
        """Layers that have written to it."""
        return len(self._layers)

    def __repr__(self) -> str:
        size = "grows" if self.max_len is None else f"max_len={self.max_len}"
        return f"{type(self).__name__}({size}, layers={len(self)})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots in use by the longest sequence. Waits for the device."""
        layer = self._layers.get(layer_idx)
        return 0 if layer is None else int(layer.lengths.max())

    def past(self, layer_idx: int = 0) -> Past:
        """What layer ``layer_idx`` holds: ``length``, 0 or (B,) int32, and ``seqstarts``, None or (B,) int32."""
        layer = self._layers.get(layer_idx)
        return Past(0, remembers=True) if layer is None else Past(layer.lengths, layer.seqstarts, remembers=True)

    def update(self, k: Tensor, v: Tensor, layer_idx: int = 0, attention_mask: Tensor | None = None) -> Keys:
        """Append new tokens: k, (B, S, Hkv, D), and v, (B, S, Hkv, Dv); all keys and lengths for ``lla_decode``.

        attention_mask: as for :class:`LocalLinearAttention`. Returns a :class:`Keys`.

        Example:
            >>> import torch, flashlla
            >>> q, k, v = torch.randn(3, 2, 5, 4, 16).unbind(0)  # (B, S, H, D)
            >>> keys = flashlla.nn.LLACache().update(k, v)
            >>> o = flashlla.lla_decode(q, keys.k, keys.v, keys.seqlens_k, layout="bshd")
            >>> o.shape
            torch.Size([2, 5, 4, 16])
        """
        padding = None
        if attention_mask is not None:
            past = self.past(layer_idx)
            past.check_batch(k.shape[0])
            padding = read_mask(attention_mask, k, past)
        return self.append(k, v, layer_idx, padding)

    def append(self, k: Tensor, v: Tensor, layer_idx: int, padding: Padding | None) -> Keys:
        """:meth:`update`, with a mask that has been read."""
        k, v = k.detach(), v.detach()
        batch, new = k.shape[:2]
        layer = self._layer_with_room(k, v, layer_idx)
        slots = layer.lengths[:, None] + torch.arange(new, device=k.device, dtype=torch.int32)  # (B, S)
        rows = torch.arange(batch, device=k.device)[:, None].expand(batch, new)
        for room, t in ((layer.k, k), (layer.v, v)):
            room.index_put_((rows, slots.long()), t)
        if padding is not None:
            if layer.seqstarts is None:
                layer.seqstarts = self._still(torch.zeros_like(layer.lengths))
            layer.seqstarts.copy_(padding.seqstarts)
        seqlens_k = layer.lengths + new
        seqstarts_k = None if layer.seqstarts is None else layer.seqstarts.clone()
        layer.lengths.add_(new if padding is None else padding.kept)
        if self.max_len is not None:
            return Keys(layer.k, layer.v, seqlens_k, seqstarts_k)
        layer.most += new
        return Keys(layer.k[:, : layer.most], layer.v[:, : layer.most], seqlens_k, seqstarts_k)

    def _layer_with_room(self, k: Tensor, v: Tensor, layer_idx: int) -> _Layer:
        """The layer, with room for the new k and v, of (B, S, ...)."""
        batch, new = k.shape[:2]
        layer = self._layers.get(layer_idx)
        if layer is None:
            room = max(_FIRST_ROOM, new) if self.max_len is None else self.max_len
            lengths = torch.zeros(batch, dtype=torch.int32, device=k.device)
            layer = _Layer(self._still(_empty(k, room)), self._still(_empty(v, room)), self._still(lengths))
            self._layers[layer_idx] = layer
        for name, old, t in (("k", layer.k, k), ("v", layer.v, v)):
            if t.shape[0] != old.shape[0] or t.shape[2:] != old.shape[2:] or t.dtype != old.dtype:
                raise ValueError(
                    f"{name}: got {t.dtype} of shape {tuple(t.shape)}, wanted {old.dtype} of shape "
                    f"{(old.shape[0], new, *old.shape[2:])}, as the cache has; for another batch try a new LLACache, "
                    f"and autocast for all calls or for none"
                )
        if self.max_len is not None:
            used = 0
            if looked_at(k.device) and not torch.compiler.is_compiling():
                used = self.get_seq_length(layer_idx)
            if used + new > self.max_len:
                raise ValueError(
                    f"max_len: got {self.max_len}, wanted at least {used + new} slots: there are {used} tokens in the "
                    f"cache and {new} more; try LLACache(max_len={used + new}), or LLACache(), which grows"
                )
        elif layer.most + new > layer.k.shape[1]:
            room = max(2 * layer.k.shape[1], layer.most + new)
            layer.k, layer.v = (_empty(t, room, in_use=layer.most) for t in (layer.k, layer.v))
        return layer

    def _still(self, t: Tensor) -> Tensor:
        """``t``, which lies still if the cache does: else CUDA graphs of torch.compile would not write to it."""
        if self.max_len is not None and t.is_cuda and not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(t)
        return t

    def reset(self) -> None:
        """Forget all tokens. A cache of a fixed size keeps its memory, and the size of the batch."""
        if self.max_len is None:
            self._layers.clear()
        for layer in self._layers.values():
            layer.lengths.zero_()
            if layer.seqstarts is not None:
                layer.seqstarts.zero_()

    def crop(self, length: int) -> None:
        """Keep the first ``length`` slots, as after rejected drafts; below 0: all but the last ``-length``."""
        length = check_whole(length, "length")
        for layer in self._layers.values():
            if length < 0:
                layer.lengths.add_(length).clamp_(min=0)
            else:
                layer.lengths.clamp_(max=length)
            if layer.seqstarts is not None:
                layer.seqstarts.copy_(torch.minimum(layer.seqstarts, layer.lengths))
            layer.most = max(layer.most + length, 0) if length < 0 else min(layer.most, length)

    def reorder(self, beam_idx: Tensor) -> None:
        """Sequence i goes on from what sequence ``beam_idx[i]`` has; as many as there are, or, where it grows, others.

        beam_idx: (B,) integers.
        """
        if not isinstance(beam_idx, Tensor):
            raise TypeError(
                f"beam_idx: got {type(beam_idx).__name__}, wanted a tensor of (B,) integers; try torch.tensor(beam_idx)"
            )
        if beam_idx.dim() != 1 or beam_idx.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"beam_idx: got {beam_idx.dtype} of shape {tuple(beam_idx.shape)}, wanted (B,) integers, torch.int64"
            )
        for layer in self._layers.values():
            index = beam_idx.to(layer.k.device)
            if index.shape != layer.lengths.shape and self.max_len is not None:
                raise ValueError(
                    f"beam_idx: got shape {tuple(index.shape)}, wanted {tuple(layer.lengths.shape)}, the batch that a "
                    f"cache of a fixed size has; try LLACache(), which grows"
                )
            picked = {name: t.index_select(0, index) for name, t in vars(layer).items() if isinstance(t, Tensor)}
            for name, t in picked.items():
                if self.max_len is None:
                    setattr(layer, name, t)
                else:
                    getattr(layer, name).copy_(t)

    # What transformers' `generate` asks.
    reorder_cache = reorder
    is_compileable = False
    is_linear = (False,)  # it keeps tokens, and no state that stands for them
    is_croppable = False  # by its own rule, in which crop(0) keeps all

    def activate_past_recording(self) -> NoReturn:
        """Refuses assisted generation, which asks for this and crops."""
        raise ValueError(
            "past_key_values: got an LLACache in assisted generation, wanted a DynamicCache of transformers; try to "
            "leave it out: generate makes one"
        )

    def get_query_offset(self, layer_idx: int = 0) -> NoReturn:
        """Refuses models whose layers are transformers', which ask for this when they make their mask."""
        raise TypeError(
            "past_key_values: got an LLACache, which serves layers of flashlla.nn, wanted a cache of transformers for "
            "layers of transformers; try DynamicCache(), StaticCache(...), or to leave it out: generate makes one"
        )


def _empty(t: Tensor, room: int, in_use: int = 0) -> Tensor:
    """Room for so many keys as in ``t``, (B, ..., H, D), with the first ``in_use`` of them."""
    grown = t.new_empty(t.shape[0], room, *t.shape[2:])
    grown[:, :in_use] = t[:, :in_use]
    return grown
