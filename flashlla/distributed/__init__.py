"""Sequences, heads and caches over several devices, by the process groups of torch.distributed: the public names."""

from flashlla.distributed.attention import lla_attention_cp, lla_attention_varlen_cp
from flashlla.distributed.decode import lla_decode_cp
from flashlla.distributed.gradients import sum_gradients
from flashlla.distributed.sharding import shard_positions, shard_sequence, unshard_sequence
from flashlla.distributed.tensor_parallel import RidgeParallel, tensor_parallel_plan

__all__ = [
    "RidgeParallel",
    "lla_attention_cp",
    "lla_attention_varlen_cp",
    "lla_decode_cp",
    "shard_positions",
    "shard_sequence",
    "sum_gradients",
    "tensor_parallel_plan",
    "unshard_sequence",
]
