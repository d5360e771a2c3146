"""What models are built with: the layer, its ridge, its cache, and groups of parameters for an optimiser."""

from flashlla.nn.attention import LocalLinearAttention
from flashlla.nn.cache import Keys, LLACache
from flashlla.nn.groups import param_groups
from flashlla.nn.ridge import Ridge

__all__ = ["Keys", "LLACache", "LocalLinearAttention", "Ridge", "param_groups"]
