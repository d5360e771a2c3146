"""The shortest use of flashlla: one causal call, forward and backward, on a GPU if there is one and else on the CPU."""

import torch

import flashlla


def main() -> None:
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    batch, length, dim = 4, 256, 64
    q, k, v = (torch.randn(batch, length, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

    o, info = flashlla.lla_attention(q, k, v, ridge_lambda=1.0, return_info=True)
    o.float().square().mean().backward()

    print(f"Local Linear Attention on {device}, backend {info.backend!r}")
    print(f"q, k, v      {tuple(q.shape)} {dtype}")
    print(f"output       {tuple(o.shape)} {o.dtype}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        assert t.grad is not None
        print(f"gradient {name}   {tuple(t.grad.shape)}, norm {t.grad.float().norm().item():.3g}")
    mean, most = info.iterations.float().mean().item(), info.iterations.max().item()
    converged = "all converged" if info.converged.all() else "some stopped early"
    print(f"iterations   {mean:.1f} a query, {most} at most; {converged}")


if __name__ == "__main__":
    main()
