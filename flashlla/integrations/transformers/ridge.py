"""The ridge of a transformers model: a parameter of each attention layer, kept where the model is saved and loaded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from flashlla.hints import with_hints
from flashlla.integrations.transformers.registry import check_exchangeable, registered
from flashlla.nn import Ridge
from flashlla.notices import warn_once

NOTE = "lla_ridge"  # in a layer the module, in its config how it was made

Model = TypeVar("Model", bound=nn.Module)


@with_hints()
def set_ridge(
    model: Model, ridge: Literal["head", "token"] | float = "head", *, init: float = 1.0, minimum: float = 1e-2
) -> Model:
    """Give each attention layer of a transformers model a ridge of its own, learned or fixed.

    Each layer that runs with a name of :func:`register` gets a module, :class:`flashlla.nn.Ridge`, as ``lla_ridge``,
    instead of one that it may have. How it was made is noted in the config, so that ``save_pretrained`` keeps the
    parameters, and ``from_pretrained`` finds them again once :func:`register` has been called. They are float32 in a
    model of any dtype, and are to have no weight decay and a learning rate of their own: optimise
    :func:`flashlla.nn.param_groups`; what transformers' ``Trainer`` would make by itself gives them the decay.

    Args:
        model: with ``attn_implementation="lla"``.
        ridge: "head": a number for each query head. "token": one for each token and head, projected from the layer's
            ``hidden_states``. A number: that, not learned. Default "head".
        init: what a learned ridge is at first, in units of keys squared. Default 1.0.
        minimum: what it is always above. Default 1e-2.

    Returns:
        ``model``.

    Raises:
        ValueError, TypeError: no layer of the model runs with this attention, or one passes on no keyword arguments to
            it; ``ridge``, ``init`` or ``minimum`` is not as above.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flashlla.integrations.transformers import register, set_ridge
        >>> register()
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...     num_key_value_heads=2, attn_implementation="lla",
        ... )
        >>> model = set_ridge(LlamaForCausalLM(config), init=0.5)
        >>> model.model.layers[0].self_attn.lla_ridge()[:, 0].tolist()
        [0.5, 0.5, 0.5, 0.5]
        >>> model.config.lla_ridge
        {'ridge': 'head', 'init': 0.5, 'minimum': 0.01}
    """
    layers = [layer for layer in _attention_layers(model) if layer.config._attn_implementation in registered]
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without a layer that runs with this attention; try "
            f"model.set_attn_implementation('lla') first"
        )
    note = {"ridge": ridge, "init": init, "minimum": minimum}
    for layer in layers:
        _attach(layer, note)
        setattr(layer.config, NOTE, note)
    return model


def _attention_layers(model: nn.Module) -> Iterator[Any]:
    """Modules as transformers builds them around an attention function, which looks for these two."""
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module, "is_causal") and not isinstance(module, PreTrainedModel):
            yield module


def _attach(layer: Any, note: dict[str, Any]) -> None:
    parameters = inspect.signature(layer.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(
            f"model: got {type(layer).__name__}, whose forward takes no **kwargs, so that a ridge cannot be passed "
            f"through it to the attention function"
        )
    config, weight = layer.config, next(layer.parameters())
    made = Ridge(
        note["ridge"],
        getattr(layer, "num_heads", config.num_attention_heads),
        config.hidden_size,
        init=note["init"],
        minimum=note["minimum"],
        device=weight.device,
    )
    if NOTE not in layer._modules:
        layer.register_forward_pre_hook(_pass_the_ridge, with_kwargs=True)
    setattr(layer, NOTE, made)


def _pass_the_ridge(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Add ``ridge_lambda``, which layers hand on to the attention function as they do all that they do not know."""
    if layer.config._attn_implementation not in registered:
        return None
    hidden_states: Tensor | None = args[0] if args else kwargs.get("hidden_states")
    return args, {**kwargs, "ridge_lambda": layer.lla_ridge(hidden_states)}


def restore_when_loaded() -> None:
    """Have models whose config notes ridges built with them, and ridges that no checkpoint holds initialised.

    ``from_pretrained`` fills what a model's class has built, and drops the rest; what the config of any class asks for
    can be added only where all classes go through: the end of their ``__init__``. There a model is also refused that
    cannot have this attention.
    """
    post_init, initialize = PreTrainedModel.post_init, PreTrainedModel._initialize_weights
    if getattr(post_init, NOTE, False):
        return

    @functools.wraps(post_init)
    def post_init_with_ridges(self: PreTrainedModel) -> None:
        check_exchangeable(self)
        for layer in _attention_layers(self):
            note = getattr(layer.config, NOTE, None)
            if note is not None and NOTE not in layer._modules:
                _attach(layer, note)
                if layer.config._attn_implementation not in registered:
                    warn_once(
                        "transformers: ridges without attention",
                        f"this model has ridges of Local Linear Attention, and is built with attn_implementation="
                        f"{layer.config._attn_implementation!r}, which has no use for them; try "
                        f"attn_implementation='lla'",
                        UserWarning,
                    )
        post_init(self)

    @functools.wraps(initialize)
    def initialize_ridges_too(self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        if isinstance(module, Ridge) and not getattr(module, "_is_hf_initialized", False):
            module.reset_parameters()
        initialize(self, module, *args, **kwargs)

    setattr(post_init_with_ridges, NOTE, True)
    PreTrainedModel.post_init = post_init_with_ridges
    PreTrainedModel._initialize_weights = initialize_ridges_too
