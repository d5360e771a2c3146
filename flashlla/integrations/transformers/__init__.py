"""Local Linear Attention in the models of Hugging Face's transformers, and a model of its own."""

from flashlla.integrations.transformers.attention import register
from flashlla.integrations.transformers.configuration import LLAConfig
from flashlla.integrations.transformers.modeling import LLAForCausalLM, LLAModel
from flashlla.integrations.transformers.ridge import set_ridge

__all__ = ["LLAConfig", "LLAForCausalLM", "LLAModel", "register", "set_ridge"]
