"""A byte-level GPT with softmax attention or with flashlla.nn.LocalLinearAttention, and what its attention gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashlla.nn import LocalLinearAttention

THETA = 10000.0


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    length: int  # bytes a sequence
    batch: int  # sequences a step


@dataclass(frozen=True)
class Attention:
    """What a model attends with."""

    kind: str = "lla"  # or "softmax"
    qk_norm: bool = True
    window: int | None = None
    every: int = 1  # LLA in the last of so many layers, softmax in the others
    ridge: str | float = "head"
    ridge_init: float = 1.0
    tolerance: float = 1e-2

    def layer(self, size: Size, index: int) -> nn.Module:
        if self.kind == "softmax" or (index + 1) % self.every:
            return SoftmaxAttention(size.width, size.heads, qk_norm=self.qk_norm, window=self.window)
        return LocalLinearAttention(
            size.width,
            size.heads,
            qk_norm=self.qk_norm,
            rope_theta=THETA,
            window=self.window,
            ridge=self.ridge,  # type: ignore[arg-type]
            ridge_init=self.ridge_init,
            tolerance=self.tolerance,
        )


def heads_of(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, S, D) as attention gets them: of each head, normalised, turned by their positions."""
    q, k, v = (
        project(x).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    q, k = (rotate(norm(t.float())).to(v.dtype) for norm, t in ((layer.q_norm, q), (layer.k_norm, k)))
    return q, k, v


def rotate(x: Tensor) -> Tensor:
    """Rotary positions for x (..., S, D), in float32."""
    length, dim = x.shape[-2:]
    wavelengths = THETA ** (torch.arange(0, dim, 2, device=x.device) / dim)
    angles = torch.arange(length, device=x.device)[:, None] / wavelengths  # (S, D / 2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class SoftmaxAttention(nn.Module):
    """All but the attention as in LocalLinearAttention, down to the first weights of a seed."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool, window: int | None) -> None:
        super().__init__()
        self.head_dim, self.window = width // heads, window
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        q, k, v = heads_of(self, x)
        if self.window is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            ago = torch.arange(x.shape[1], device=x.device)
            ago = ago[:, None] - ago  # (S, S)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=(ago >= 0) & (ago < self.window))
        return (self.o_proj(o.transpose(1, 2).flatten(2)),)


class Block(nn.Module):
    def __init__(self, size: Size, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(size.width, eps=1e-6), nn.RMSNorm(size.width, eps=1e-6)
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * size.width, size.width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))[0]
        x = x + self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, size: Size, attention: Attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, size.width)
        self.blocks = nn.ModuleList(Block(size, attention.layer(size, i)) for i in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, apply: Any = lambda block, x: block(x)) -> Tensor:
        """Logits (B, S, 256) of the byte after each of tokens (B, S); ``apply`` runs a block, compiled or not."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = apply(block, x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def attention(self, layer: int) -> nn.Module:
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return block.attention

    @property
    def lla_layers(self) -> list[LocalLinearAttention]:
        return [module for module in self.modules() if isinstance(module, LocalLinearAttention)]


def loss_of(model: GPT, tokens: Tensor, targets: Tensor, **how: Any) -> Tensor:
    """The mean, in nats a byte; in bfloat16 on a GPU."""
    device = tokens.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(tokens, **how)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def keys_of(model: GPT, tokens: Tensor, layers: list[int]) -> dict[str, Any]:
    """What attention in ``layers`` gets of one sequence (1, S): q, k, v (layers, H, S, D), ridge (layers, H, 1)."""
    found: list[tuple[Tensor, ...]] = []
    hooks = []
    for layer in layers:
        hook = lambda module, inputs: found.append((*heads_of(module, inputs[0]), _ridge(module, inputs[0])))
        hooks.append(model.attention(layer).register_forward_pre_hook(hook))
    loss_of(model, tokens, tokens)
    for handle in hooks:
        handle.remove()
    q, k, v, ridge = (torch.cat(parts).float().cpu() for parts in zip(*found))
    scale = q.shape[-1] ** -0.5
    return {"q": q.half(), "k": k.half(), "v": v.half(), "ridge": ridge, "layers": layers, "scale": scale}


def _ridge(attention: Any, x: Tensor) -> Tensor:
    """(1, H, 1), or (1, H, S) where each token has its own; infinite where attention is softmax attention."""
    heads = attention.q_proj.out_features // attention.head_dim
    ridge = attention.ridge(x) if hasattr(attention, "ridge") else float("inf")
    ridge = torch.as_tensor(ridge, dtype=torch.float32, device=x.device)
    return ridge.expand(heads, 1)[None] if ridge.dim() < 3 else ridge
