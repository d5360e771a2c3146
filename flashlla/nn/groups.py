"""Parameters by what an optimiser is to do with them."""

from __future__ import annotations

from typing import Any

from torch import nn

from flashlla.hints import with_hints
from flashlla.nn.ridge import Ridge

# The ridges' learning rate in those of the model.
RIDGE_RATE = 10.0


@with_hints({"learning_rate": "lr=", "wd": "weight_decay="})
def param_groups(
    model: nn.Module, lr: float, weight_decay: float, ridge_lr: float | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimiser of torch: weights, what does not decay, and ridges.

    Weights of two dimensions or more decay. Biases, norms, embeddings and what is marked ``_no_weight_decay`` do not,
    nor do ridges (:class:`flashlla.nn.Ridge`), which also learn faster: a ridge moves by factors, and starts far from
    where it ends. Frozen parameters are left out, shared ones stand once, where a group would be empty there is none.

    Args:
        model: any module.
        lr: the learning rate.
        weight_decay: of the weights.
        ridge_lr: the ridges' learning rate. Default None: 10 * lr.

    Returns:
        Dictionaries with ``params``, ``lr``, ``weight_decay`` and ``name``: "weights", "no_decay", "ridges".

    Raises:
        ValueError: a rate or the decay is below 0; no parameter learns.

    Example:
        >>> import torch
        >>> from flashlla.nn import LocalLinearAttention, param_groups
        >>> groups = param_groups(LocalLinearAttention(64, num_heads=4), lr=1e-3, weight_decay=0.1)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> [(group["name"], len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [('weights', 4, 0.001, 0.1), ('no_decay', 2, 0.001, 0.0), ('ridges', 1, 0.01, 0.0)]
    """
    ridge_lr = RIDGE_RATE * lr if ridge_lr is None else ridge_lr
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("ridge_lr", ridge_lr)):
        if not value >= 0:
            raise ValueError(f"{name}: got {value}, wanted a number of at least 0")
    weights: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    ridges: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    # Ridges and embeddings first, so that what is shared with them counts as theirs.
    for module in sorted(model.modules(), key=lambda module: not isinstance(module, (Ridge, nn.Embedding))):
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            if isinstance(module, Ridge):
                ridges.append(parameter)
            elif isinstance(module, nn.Embedding) or parameter.dim() < 2 or hasattr(parameter, "_no_weight_decay"):
                no_decay.append(parameter)
            else:
                weights.append(parameter)
    groups = [
        {"name": "weights", "params": weights, "lr": lr, "weight_decay": weight_decay},
        {"name": "no_decay", "params": no_decay, "lr": lr, "weight_decay": 0.0},
        {"name": "ridges", "params": ridges, "lr": ridge_lr, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model: got one in which no parameter learns, wanted parameters with requires_grad")
    return groups
