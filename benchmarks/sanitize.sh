#!/bin/sh
# compute-sanitizer over a small step, forward and backward: bad memory accesses, then races in shared memory.
#   benchmarks/sanitize.sh [python]
# Needs a GPU and NVIDIA's compute-sanitizer. Exits with 1 where a tool finds something.
set -eu
python=${1:-python3}
cd "$(dirname "$0")/.."
export PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1
program='
import torch
from flashlla import lla_attention
for dtype in (torch.bfloat16, torch.float32):
    for length, dim in ((100, 64), (65, 40)):
        q, k, v, grad = torch.randn(4, 1, 2, length, dim, device="cuda").to(dtype).unbind(0)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        o = lla_attention(*leaves, ridge_lambda=1.0, backend="triton")
        torch.autograd.grad(o, leaves, grad)
torch.cuda.synchronize()
print("ran")
'
for tool in memcheck racecheck; do
    echo "== $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name kns=_kernel "$python" -c "$program"
done
