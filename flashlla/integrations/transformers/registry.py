"""The names by which transformers knows this attention, and the models that cannot have it."""

from __future__ import annotations

from typing import Any

registered: set[str] = set()


def check_exchangeable(model: Any) -> None:
    """Refuse a model of transformers that takes the name, and its mask, and attends by a code of its own."""
    name, kind = model.config._attn_implementation, type(model)
    if name in registered and kind.__module__.startswith("transformers.") and not kind._can_set_attn_implementation():
        raise ValueError(
            f"attn_implementation: got {name!r} for {kind.__name__}, whose attention cannot be exchanged; wanted a "
            f"model whose attention can, as Llama"
        )
