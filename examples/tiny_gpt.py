"""Train a byte-level GPT on the sources of Python's standard library, with Local Linear Attention or with softmax.

    python examples/tiny_gpt.py --quick                            a small one: under a minute on a CPU
    python examples/tiny_gpt.py --compile --checkpoint gpt.pt      the full size, on a GPU
    python examples/tiny_gpt.py --attention softmax                the same with softmax attention

With --checkpoint, the same command goes on where an interrupted one last saved, as if it had not been interrupted.
Losses are in nats a byte. Needs tqdm (the `examples` extra).
"""

import argparse
import json
import math
import os
import sysconfig
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flashlla import ConvergenceCounter
from flashlla.nn import LLACache, LocalLinearAttention, param_groups

# Modules and packages that are kept for validation.
VALIDATION = {"asyncio", "logging", "statistics", "tarfile", "zipfile"}
# Tests are not installed everywhere, and what others installed is not the standard library.
LEFT_OUT = {"test", "site-packages", "dist-packages"}


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    heads: int
    length: int  # bytes a sequence
    batch: int  # sequences a step
    steps: int
    warmup: int  # steps in which the learning rate grows
    every: int  # steps from one validation, and checkpoint, to the next
    lr: float


FULL = Size(layers=6, width=512, heads=8, length=1024, batch=32, steps=2000, warmup=100, every=200, lr=1e-3)
QUICK = Size(layers=2, width=128, heads=2, length=128, batch=8, steps=150, warmup=20, every=50, lr=3e-3)


class SoftmaxAttention(nn.Module):
    """The layer to compare with: softmax attention, all else as in flashlla.nn.LocalLinearAttention."""

    def __init__(self, width: int, heads: int, layer_idx: int) -> None:
        super().__init__()
        self.heads, self.layer_idx = heads, layer_idx
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, past_key_values: LLACache | None = None) -> tuple[Tensor]:
        seen = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (B, N, H, D)
        q, k = (rotate(t, seen).to(v.dtype) for t in (self.q_norm(q.float()), self.k_norm(k.float())))
        if past_key_values is not None:
            k, v, *_ = past_key_values.update(k, v, self.layer_idx)  # (B, S, H, D)
        # The new queries are the last of S: one alone sees all, many without a past see causally.
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, ., D)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return (self.out(o.transpose(1, 2).flatten(2)),)


def rotate(x: Tensor, first: int) -> Tensor:
    """Rotary positions from ``first`` on, for x (B, N, H, D), in float32."""
    length, _, dim = x.shape[1:]
    wavelengths = 10000 ** (torch.arange(0, dim, 2, device=x.device) / dim)
    angles = torch.arange(first, first + length, device=x.device)[:, None, None] / wavelengths  # (N, 1, D / 2)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


class Block(nn.Module):
    def __init__(self, size: Size, attention: str, layer_idx: int) -> None:
        super().__init__()
        kind = LocalLinearAttention if attention == "lla" else SoftmaxAttention
        self.attention_norm, self.mlp_norm = nn.RMSNorm(size.width), nn.RMSNorm(size.width)
        self.attention = kind(size.width, size.heads, layer_idx=layer_idx)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width, bias=False),
            nn.GELU(),
            nn.Linear(4 * size.width, size.width, bias=False),
        )

    def forward(self, x: Tensor, cache: LLACache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), past_key_values=cache)[0]
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    def __init__(self, size: Size, attention: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, size.width)
        self.blocks = nn.ModuleList(Block(size, attention, i) for i in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, cache: LLACache | None = None) -> Tensor:
        """Logits (B, N, 256) of the byte after each of tokens (B, N), which follow those in the cache."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cache)
        return self.head(self.norm(x))


def read_text() -> tuple[Tensor, Tensor]:
    """Sources of the standard library, as bytes: what to train on, what to validate on, no file twice."""
    root = Path(sysconfig.get_path("stdlib"))
    train, validation, seen = bytearray(), bytearray(), set()
    for top in sorted(root.iterdir()):
        if top.name in LEFT_OUT:
            continue
        for path in [top] if top.suffix == ".py" else sorted(top.rglob("*.py")):
            source = path.read_bytes()
            if source not in seen:
                seen.add(source)
                (validation if top.stem in VALIDATION else train).extend(source)
    if not validation:
        raise SystemExit(f"no sources of Python's standard library are in {root}")
    return torch.frombuffer(train, dtype=torch.uint8), torch.frombuffer(validation, dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Bytes (B, length) from each of starts (B,) on, and the byte after each of them."""
    bytes_ = text[starts[:, None] + torch.arange(length + 1)].to(device).long()
    return bytes_[:, :-1], bytes_[:, 1:]


def loss_of(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    device = tokens.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def validate(model: GPT, text: Tensor, size: Size, device: str, batches: int = 8) -> float:
    """The loss on windows that lie evenly over the text."""
    model.eval()
    starts = torch.linspace(0, len(text) - size.length - 1, batches * size.batch).long()
    losses = [loss_of(model, *windows(text, part, size.length, device)) for part in starts.split(size.batch)]
    model.train()
    return torch.stack(losses).mean().item()


@torch.no_grad()
def generate(model: GPT, prompt: bytes, new: int, temperature: float = 0.8, use_cache: bool = True) -> bytes:
    """The prompt and ``new`` bytes after it. Temperature 0 takes the likeliest byte each time."""
    device = model.head.weight.device
    tokens = torch.tensor([list(prompt)], device=device)  # (1, N)
    cache, known = (LLACache() if use_cache else None), 0
    model.eval()
    for _ in range(new):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(tokens[:, known:], cache)[0, -1].float()  # (256,)
        known = tokens.shape[1] if use_cache else 0
        if temperature:
            choice = torch.multinomial((logits / temperature).softmax(-1), 1)
        else:
            choice = logits.argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, choice[None]], dim=1)
    model.train()
    return bytes(tokens[0].tolist())


def learning_rate(step: int, size: Size) -> float:
    """As a multiple of its largest value: linear warm-up, then half a cosine down to a tenth."""
    progress = min(1.0, max(0.0, (step - size.warmup) / max(1, size.steps - size.warmup)))
    return min(1.0, (step + 1) / size.warmup) * (0.55 + 0.45 * math.cos(math.pi * progress))


def save(path: Path, state: dict) -> None:
    """Whole or not at all: an interruption while it is written leaves the one before."""
    unfinished = path.with_name(path.name + ".part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", choices=["lla", "softmax"], default="lla")
    parser.add_argument("--quick", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--steps", type=int, help="another number of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--checkpoint", type=Path, help="save here at each validation; go on from what is there")
    parser.add_argument("--log", type=Path, help="where losses and seconds of every step go, as JSON")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    size = replace(size, steps=options.steps or size.steps)
    run = {"attention": options.attention, "seed": options.seed, **asdict(size)}

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.quick:
        torch.set_num_threads(1)  # on small tensors threads wait for one another
    torch.manual_seed(options.seed)
    model = GPT(size, options.attention).to(device)
    train_loss = torch.compile(loss_of) if options.compile else loss_of
    optimizer = torch.optim.AdamW(param_groups(model, lr=size.lr, weight_decay=0.1), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, size))
    order = torch.Generator().manual_seed(options.seed)  # of the training windows
    history: dict[str, list] = {"loss": [], "seconds": [], "validation": [], "unconverged": []}

    saved = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if options.checkpoint and options.checkpoint.exists():
        state = torch.load(options.checkpoint, map_location="cpu")
        if state["run"] != run:
            raise SystemExit(f"{options.checkpoint} is of another run: {state['run']}, this is {run}")
        for name, part in saved.items():
            part.load_state_dict(state[name])
        order.set_state(state["order"])
        torch.set_rng_state(state["rng"])
        torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
        history = state["history"]

    train_text, validation_text = read_text()
    done = len(history["loss"])
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{options.attention} on {device}: {parameters:,} parameters, {len(train_text):,} bytes to train on")
    bar = tqdm(range(done, size.steps), initial=done, total=size.steps, unit="step", disable=None)
    with bar, ConvergenceCounter() as counter:
        for step in bar:
            begin = time.perf_counter()
            starts = torch.randint(len(train_text) - size.length, (size.batch,), generator=order)
            loss = train_loss(model, *windows(train_text, starts, size.length, device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            history["loss"].append(loss.item())  # waits for the device
            history["seconds"].append(time.perf_counter() - begin)
            if not math.isfinite(history["loss"][-1]):
                raise SystemExit(f"the loss of step {step} is {history['loss'][-1]}")
            bar.set_postfix(loss=f"{history['loss'][-1]:.3f}")
            if (step + 1) % size.every == 0 or step + 1 == size.steps:
                unconverged, queries = counter.read()  # of training, since the last validation
                history["unconverged"].append([step + 1, unconverged, queries])
                history["validation"].append([step + 1, validate(model, validation_text, size, device)])
                counter.read()  # those of validation
                solved = f", {unconverged} of {queries} queries did not converge" * (queries > 0)
                bar.write(f"step {step + 1}: validation loss {history['validation'][-1][1]:.4f} nats a byte{solved}")
                if options.checkpoint:
                    state = {name: part.state_dict() for name, part in saved.items()}
                    state |= {"run": run, "history": history, "order": order.get_state()}
                    state |= {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state_all()}
                    save(options.checkpoint, state)
                if options.log:
                    options.log.write_text(json.dumps({"run": run, "device": device, **history}), encoding="utf-8")

    print(generate(model, b"class ", 400).decode(errors="replace"))


if __name__ == "__main__":
    main()
