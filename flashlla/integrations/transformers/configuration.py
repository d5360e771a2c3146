"""What a model of this package's own is made of."""

from __future__ import annotations

from typing import ClassVar, Literal

from transformers import PreTrainedConfig


class LLAConfig(PreTrainedConfig):
    """The configuration of :class:`LLAModel` and :class:`LLAForCausalLM`.

    All arguments go by keyword. Beside those told here there are those of every ``PreTrainedConfig``: ``pad_token_id``,
    ``bos_token_id``, ``eos_token_id`` ...

    Attributes:
        vocab_size: tokens that there are. Default 32000.
        hidden_size: of tokens. Default 512.
        intermediate_size: of the MLP. Default None: 8 / 3 of ``hidden_size``, the next multiple of 64.
        num_hidden_layers: default 8.
        num_attention_heads: query heads. Default 8.
        num_key_value_heads: key heads, which divide them. Default None: as many.
        head_dim, qkv_bias, qk_norm, rope_theta, window, ridge, ridge_init, ridge_min, tolerance: as for
            :class:`flashlla.nn.LocalLinearAttention`, with its defaults.
        rms_norm_eps: of the norms before attention, before the MLP and at the end. Default 1e-6.
        initializer_range: the standard deviation of weights at first. Default 0.02.
        tie_word_embeddings: one matrix for embeddings and logits. Default True.
        use_cache: keep keys and values in eval mode. Default True.

    Example:
        >>> from flashlla.integrations.transformers import LLAConfig
        >>> LLAConfig(hidden_size=256, num_attention_heads=4, ridge="token").model_type
        'lla'
    """

    model_type: ClassVar[str] = "lla"

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int | None = None
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = True
    rope_theta: float | None = 10000.0
    window: int | None = None
    ridge: Literal["head", "token"] | float = "head"
    ridge_init: float = 1.0
    ridge_min: float = 1e-2
    tolerance: float = 1e-2
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **others: object) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // (3 * 64)) * 64
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**others)
