"""A layer whose sequences lie on several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flashlla.distributed.groups import Group


class Across:
    """What the layer calls instead; shards are those of ``shard_sequence``, head and tail."""

    def __init__(self, group: Group) -> None:
        from flashlla import distributed  # by those alone who have a group
        from flashlla.distributed.groups import ranks_of

        self._ranks = ranks_of(group, "context_parallel")
        self._functions = distributed

    def __deepcopy__(self, _: Any) -> Across:
        return self  # there is one group, however often the layer is copied

    def refuse(self, **others: Any) -> None:
        """Arguments that go with whole sequences only."""
        for name, value in others.items():
            if value is not None and value is not False:
                raise ValueError(
                    f"{name}: got one together with context_parallel, wanted none: sequences that lie on several ranks "
                    f"have no padding and no cache; try packing, cu_seqlens="
                )

    def positions(self, new: int, device: torch.device) -> Tensor:
        """Where in the sequence this rank's ``new`` tokens stand: (S,)."""
        return self._functions.shard_positions(new * self._ranks.size, group=self._ranks.group, device=device).int()

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return self._functions.lla_attention_cp(q, k, v, group=self._ranks.group, **options)

    def varlen(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        return self._functions.lla_attention_varlen_cp(q, k, v, group=self._ranks.group, **options)
