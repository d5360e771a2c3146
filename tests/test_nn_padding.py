"""What masks say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flashlla.nn.padding import Past, read_mask

pytestmark = pytest.mark.quick


def mask(*rows: str) -> Tensor:
    return torch.tensor([[int(sign) for sign in row] for row in rows])


def lengths(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


# Rows, new tokens, the past, and: first slots, slots kept.
SAYINGS = {
    "no past": (("1111", "0011", "1100", "0110", "0000"), 4, Past(), [0, 2, 0, 1, 4], [4, 4, 2, 3, 4]),
    "with columns for the past": (("0011", "1110"), 2, Past(2), [2, 0], [2, 1]),
    "the past by a tensor": (("0011", "1110"), 2, Past(torch.tensor(2)), [2, 0], [2, 1]),
    "of new tokens alone": (
        ("11", "10", "00", "01", "00"),
        2,
        Past(lengths(5, 3, 4, 4, 4), lengths(1, 0, 2, 4, 4), remembers=True),
        [1, 0, 2, 5, 6],
        [2, 1, 0, 2, 2],
    ),
    "of new tokens, the first mask": (("11", "10"), 2, Past(lengths(5, 3), None, remembers=True), [0, 0], [2, 1]),
    "of all, remembered": (("0111", "0001"), 1, Past(lengths(3, 3), lengths(1, 3), remembers=True), [1, 3], [1, 1]),
}


@pytest.mark.parametrize("kind", SAYINGS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8])
def test_what_a_mask_says(kind: str, dtype: torch.dtype):
    rows, new, past, seqstarts, kept = SAYINGS[kind]
    padding = read_mask(mask(*rows).to(dtype), torch.zeros(len(rows), new), past)
    assert torch.equal(padding.tokens, mask(*rows)[:, -new:].bool())
    assert padding.seqstarts.tolist() == seqstarts
    assert padding.kept.tolist() == kept
    assert padding.seqstarts.dtype == padding.kept.dtype == torch.int32


HOLES = {
    "inside": (("111", "101"), 3, Past(), "hole in row 1, .1, 0, 1."),
    "a prompt padded on the right": (("1101",), 1, Past(3), "hole in row 0.*padding on the left, or an LLACache"),
    "before new tokens": (("01",), 2, Past(lengths(3), lengths(0), remembers=True), "hole in row 0"),
    "ragged, with a past": (
        ("1111", "1101"),
        1,
        Past(lengths(3, 2), None, True),
        r"4 columns with .*\[3, 2\].* in the cache, wanted one",
    ),
}


@pytest.mark.parametrize("kind", HOLES)
def test_holes_are_refused(kind: str):
    rows, new, past, words = HOLES[kind]
    with pytest.raises(ValueError, match=f"attention_mask: got .*{words}"):
        read_mask(mask(*rows), torch.zeros(len(rows), new), past)


MISFITS = {
    "4-D": (torch.ones(2, 1, 3, 3).bool(), ValueError, r"shape \(2, 1, 3, 3\), wanted \(B, keys\), B = 2.*try window"),
    "1-D": (torch.ones(3).bool(), ValueError, r"shape \(3,\), wanted \(B, keys\), B = 2"),
    "another batch": (torch.ones(3, 3).bool(), ValueError, r"shape \(3, 3\), wanted \(B, keys\), B = 2"),
    "additive": (torch.zeros(2, 3), TypeError, r"dtype torch.float32, wanted bool.*attention_mask == 0"),
    "a list": ([[1, 1, 1]] * 2, TypeError, r"got list, wanted a tensor"),
    "elsewhere": (torch.ones(2, 3, device="meta").bool(), ValueError, "got device meta, wanted cpu"),
    "too few": (torch.ones(2, 2).bool(), ValueError, r"got 2 columns, wanted one for each of the 3 new tokens"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_misfits_are_refused(kind: str):
    given, error, words = MISFITS[kind]
    with pytest.raises(error, match=words):
        read_mask(given, torch.zeros(2, 3), Past())


def test_a_mask_of_new_tokens_alone_needs_a_cache_that_remembers():
    with pytest.raises(ValueError, match="got 1 columns"):
        read_mask(mask("1", "1"), torch.zeros(2, 1), Past(5))
