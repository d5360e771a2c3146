"""LLACache: what it holds, and that nothing of it depends on how tokens came in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import flashlla
from flashlla.nn import LLACache
from tests.support.helpers import normal

pytestmark = pytest.mark.quick

KINDS = pytest.mark.parametrize("max_len", [None, 100], ids=["grows", "fixed"])


def tokens(new: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """k and v of two sequences, (B, S, Hkv, D)."""
    k, v = normal(2, 2, new, 2, 4, seed=seed).unbind(0)
    return k, v


def held(cache: LLACache, layer_idx: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each sequence."""
    layer = cache._layers[layer_idx]
    starts = [0] * len(layer.lengths) if layer.seqstarts is None else layer.seqstarts.tolist()
    edges = list(zip(starts, layer.lengths.tolist()))
    return [(layer.k[i, first:end], layer.v[i, first:end]) for i, (first, end) in enumerate(edges)]


@KINDS
@pytest.mark.parametrize("pieces", [[100], [1] * 100, [63, 1, 1, 1, 34], [30, 70]], ids=str)
def test_tokens_are_kept_in_order(max_len: int | None, pieces: list[int], poisoned_memory: None):
    cache = LLACache(max_len)
    k, v = tokens(100)
    seen = 0
    for k_piece, v_piece in zip(k.split(pieces, 1), v.split(pieces, 1)):
        seen += k_piece.shape[1]
        keys = cache.update(k_piece, v_piece)
        assert keys.seqlens_k is not None
        assert keys.seqlens_k.tolist() == [seen, seen]
        assert torch.equal(keys.k[:, :seen], k[:, :seen])
        assert torch.equal(keys.v[:, :seen], v[:, :seen])
        assert cache.get_seq_length() == seen


@KINDS
def test_layers_are_apart(max_len: int | None):
    cache = LLACache(max_len)
    for layer_idx in (0, 3):
        cache.update(*tokens(5, seed=layer_idx), layer_idx=layer_idx)
    assert len(cache) == 2
    assert cache.get_seq_length(3) == 5
    assert cache.get_seq_length(1) == 0
    assert torch.equal(held(cache, 3)[0][0], tokens(5, seed=3)[0][0])


@KINDS
def test_padding_on_the_right_is_written_over(max_len: int | None):
    """Each sequence goes on behind its own last token."""
    cache = LLACache(max_len)
    (k, v), (k_next, v_next) = tokens(4), tokens(2, seed=1)
    cache.update(k, v, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    keys = cache.update(k_next, v_next)
    assert keys.seqlens_k is not None
    assert keys.seqlens_k.tolist() == [6, 4]
    assert torch.equal(held(cache)[0][0], torch.cat((k[0], k_next[0])))
    assert torch.equal(held(cache)[1][1], torch.cat((v[1, :2], v_next[1])))


@KINDS
@pytest.mark.parametrize(
    "pieces",
    [
        [(6, "new")],
        [(2, "new"), (2, "new"), (2, None)],
        [(2, "all"), (2, "all"), (2, "all")],
        [(4, "new"), (1, None), (1, "new")],
        [(1, "all"), (3, "new"), (1, None), (1, "all")],
    ],
    ids=str,
)
def test_padding_on_the_left_is_remembered(max_len: int | None, pieces: list[tuple[int, str | None]]):
    """Also over pieces that hold nothing else; a mask of all keys says the same as one of the new ones, or as none."""
    cache, first = LLACache(max_len), 0
    k, v = tokens(6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    for size, told in pieces:
        new = slice(first, first + size)
        told_mask = {"new": mask[:, new], "all": mask[:, : new.stop], None: None}[told]
        keys = cache.update(k[:, new], v[:, new], attention_mask=told_mask)
        first = new.stop
    assert keys.seqstarts_k is not None
    assert keys.seqstarts_k.tolist() == [0, 3]
    assert keys.seqlens_k is not None
    assert keys.seqlens_k.tolist() == [6, 6]
    assert torch.equal(held(cache)[1][0], k[1, 3:])


@KINDS
def test_a_sequence_that_has_ended_stays(max_len: int | None):
    """No token of it in a mask, and it is what it was."""
    cache = LLACache(max_len)
    cache.update(*tokens(4))
    cache.update(*tokens(3, seed=1), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    (first, _), (second, _) = held(cache)
    assert torch.equal(first, torch.cat((tokens(4)[0][0], tokens(3, seed=1)[0][0])))
    assert torch.equal(second, tokens(4)[0][1])


@KINDS
def test_keys_go_into_decode(max_len: int | None):
    q, k, v = normal(3, 2, 20, 2, 8, dtype=torch.float32).unbind(0)
    cache = LLACache(max_len)
    cache.update(k[:, :17], v[:, :17])
    keys = cache.update(k[:, 17:], v[:, 17:])
    o = flashlla.lla_decode(q[:, 17:], keys.k, keys.v, keys.seqlens_k, ridge_lambda=1.0, layout="bshd")
    expected = flashlla.lla_attention(q, k, v, ridge_lambda=1.0, tolerance=0.0, layout="bshd")[:, 17:]
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("length", [3, -2, 9, 0, -9])
def test_crop(max_len: int | None, length: int):
    cache = LLACache(max_len)
    k, v = tokens(5)
    cache.update(k, v, attention_mask=torch.tensor([[1] * 5, [0, 1, 1, 1, 1]]))
    cache.crop(length)
    left = max(5 + length, 0) if length < 0 else min(length, 5)
    assert cache.get_seq_length() == left
    assert torch.equal(held(cache)[0][0], k[0, :left])
    assert torch.equal(held(cache)[1][0], k[1, 1:left])
    k_next, v_next = tokens(2, seed=1)
    cache.update(k_next, v_next)
    assert torch.equal(held(cache)[0][1], torch.cat((v[0, :left], v_next[0])))


@KINDS
def test_reorder(max_len: int | None):
    cache = LLACache(max_len)
    k, v = tokens(5)
    cache.update(k, v, attention_mask=torch.tensor([[1] * 5, [0, 1, 1, 1, 1]]))
    memory = cache._layers[0].k.data_ptr()
    cache.reorder(torch.tensor([1, 1]))
    assert [len(one) for one, _ in held(cache)] == [4, 4]
    assert torch.equal(held(cache)[0][0], k[1, 1:])
    if max_len is None:
        cache.reorder(torch.tensor([0, 1, 0]))
        assert len(held(cache)) == 3
    else:
        assert cache._layers[0].k.data_ptr() == memory
        with pytest.raises(ValueError, match=r"beam_idx: got shape \(3,\), wanted \(2,\)"):
            cache.reorder(torch.tensor([0, 1, 0]))


@KINDS
def test_reset(max_len: int | None):
    cache = LLACache(max_len)
    cache.update(*tokens(5), attention_mask=torch.tensor([[1] * 5, [0, 1, 1, 1, 1]]))
    memory = cache._layers[0].k.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0
    cache.update(*tokens(3, seed=1))
    assert torch.equal(held(cache)[1][0], tokens(3, seed=1)[0][1])
    if max_len is not None:
        assert cache._layers[0].k.data_ptr() == memory


def test_room_grows_by_doubling():
    cache, moves, memory = LLACache(), 0, None
    for _ in range(1000):
        cache.update(*tokens(1))
        moves += memory != cache._layers[0].k.data_ptr()
        memory = cache._layers[0].k.data_ptr()
    assert moves <= 6  # 64, 128, ..., 1024; the allocator may put one where the last was
    assert cache._layers[0].k.shape[1] == 1024


def test_a_fixed_one_holds_no_more():
    cache = LLACache(max_len=4)
    cache.update(*tokens(3))
    with pytest.raises(ValueError, match=r"max_len: got 4, wanted at least 5 slots.*LLACache\(max_len=5\)"):
        cache.update(*tokens(2))
    cache.update(*tokens(1))
    assert cache.get_seq_length() == 4
    with pytest.raises(ValueError, match=r"max_len: got 4, wanted at least 5 slots"):
        LLACache(max_len=4).update(*tokens(5))


def test_no_history_is_kept():
    k, v = (t.requires_grad_() for t in tokens(3))
    cache = LLACache()
    assert not any(t.requires_grad for t in cache.update(k, v) if t is not None)


def test_a_copy_goes_its_own_way():
    cache = LLACache(max_len=8)
    cache.update(*tokens(3))
    branch = copy.deepcopy(cache)
    branch.update(*tokens(2, seed=1))
    assert (cache.get_seq_length(), branch.get_seq_length()) == (3, 5)
    assert torch.equal(held(branch)[0][0][:3], held(cache)[0][0])


@pytest.mark.parametrize(
    ("max_len", "error", "words"),
    [(0, ValueError, "got 0, wanted at least 1"), (True, TypeError, "got bool"), (4.0, TypeError, "got float")],
)
def test_max_len_is_checked(max_len, error, words):
    with pytest.raises(error, match=f"max_len: {words}"):
        LLACache(max_len)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda cache: cache.crop("a"), TypeError, "length: got str, wanted a whole number"),
        (lambda cache: cache.reorder([0, 1]), TypeError, r"beam_idx: got list, .*; try torch.tensor\(beam_idx\)"),
        (lambda cache: cache.reorder(torch.ones(2)), ValueError, r"beam_idx: got torch.float32 of shape \(2,\)"),
    ],
)
def test_what_it_is_told_is_checked(call, error, words):
    cache = LLACache()
    cache.update(*tokens(3))
    with pytest.raises(error, match=words):
        call(cache)


def test_another_batch_is_refused():
    cache = LLACache()
    cache.update(*tokens(3))
    k, v = tokens(1)
    with pytest.raises(ValueError, match=r"k: got .* of shape \(1, 1, 2, 4\), wanted .* \(2, 1, 2, 4\).*new LLACache"):
        cache.update(k[:1], v[:1])
    with pytest.raises(ValueError, match="got a cache of 2 sequences with a batch of 3"):
        cache.update(*(torch.cat((t, t[:1])) for t in (k, v)), attention_mask=torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"k: got torch.float32 .*, wanted torch.float64 .*autocast for all calls"):
        cache.update(k.float(), v.float())


def test_what_it_shows():
    cache = LLACache(max_len=8)
    cache.update(*tokens(3))
    assert repr(cache) == "LLACache(max_len=8, layers=1)"
    assert repr(LLACache()) == "LLACache(grows, layers=0)"
