"""The decode kernels on one GPU: accuracy, speed beside torch's SDPA and a copy, and under other settings.

    python -m benchmarks decode --only speed --name NAME

Times are microseconds of a call, medians over replays of a CUDA graph that holds many calls, each on a cache of its own
where one cache would stay in the second-level cache. Errors are relative, in the Frobenius norm, to float64 on the same
rounded inputs. "ideal" is the time that reading the cache once takes at the bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import launches, needs, record
from benchmarks.exact import output, relative
from benchmarks.timing import copy_bandwidth, microseconds
from flashlla.problem import Inputs, Mask, Problem
from flashlla.solvers import CG

if TYPE_CHECKING:
    from flashlla.backends.triton.configs import DecodeConfig

HEADS = 8
RIDGE = 0.1
CASES = [(batch, length, 128) for batch in (1, 32) for length in (512, 4096, 16384)] + [(1, 4096, 64), (32, 4096, 64)]
# Of the moments kernel: tile, warps, stages, pieces (None: what decode chooses).
MOMENTS = [
    (64, 8, 2, None), (64, 8, 3, None), (64, 8, 4, None), (32, 8, 3, None), (32, 8, 4, None), (128, 8, 2, None),
    (64, 16, 3, None),
]  # fmt: skip
PIECES = {1: (4, 8, 12, 16, 24, 32), 32: (1, 2, 4)}
# Warps of the solve kernel.
SOLVES = (2, 4, 8)
L2_BYTES = 256 * 2**20
MOST_CALLS = 48


class Case:
    """Queries and as many caches as it takes to find none of them in the second-level cache."""

    def __init__(self, batch: int, length: int, dim: int) -> None:
        self.batch, self.length, self.dim = batch, length, dim
        torch.manual_seed(0)
        normal = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.bytes = 2 * batch * HEADS * length * dim * 2
        self.q = normal(batch, HEADS, 1, dim)
        count = max(1, min(MOST_CALLS, -(-L2_BYTES // self.bytes)))
        self.caches = [(normal(batch, HEADS, length, dim), normal(batch, HEADS, length, dim)) for _ in range(count)]
        self.lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        self.ridge = torch.full((1, 1, 1), RIDGE, device="cuda").expand(batch, HEADS, 1)
        self.out = torch.empty_like(self.q)

    @property
    def label(self) -> str:
        return f"B {self.batch:<2} L {self.length:<5} D {self.dim:<3}"

    def ours(self, cache: tuple[Tensor, Tensor], config: DecodeConfig | None = None) -> Tensor:
        from flashlla.backends.triton.decode import decode

        problem = Problem(
            self.batch, HEADS, HEADS, 1, self.length, self.dim, self.dim, self.q.dtype, self.q.device, self.dim**-0.5,
            1e-12, CG(), solver_demanded=False, mask=Mask(padded=True, at_lengths=True),
        )  # fmt: skip
        return decode(problem, Inputs(self.q, *cache, self.ridge, self.lengths), self.out, config=config)

    def error(self) -> float:
        """Of up to two sequences."""
        few = min(2, self.batch)
        q, k, v = (t[:few].double() for t in (self.q, *self.caches[0]))
        return relative(self.ours(self.caches[0])[:few], output(q, k, v, RIDGE))

    def each(self, call: Callable[[tuple[Tensor, Tensor]], Any]) -> float:
        """Microseconds of ``call``, given one cache after the other."""
        return microseconds([partial(call, cache) for cache in self.caches])

    def launches(self, config: DecodeConfig | None = None) -> dict[str, list[Callable[[], None]]]:
        """The launches of each kernel, one for each cache."""
        with launches.recorded() as found:
            for cache in self.caches:
                self.ours(cache, config)
        calls: dict[str, list[Callable[[], None]]] = {}
        for launch in found:
            name = launch.kernel.__name__.removeprefix("decode_").removesuffix("_kernel").removesuffix("_hopper")
            calls.setdefault(name, []).append(partial(launches.repeat, launch))
        return calls


def sdpa(case: Case) -> tuple[float, str]:
    """The fastest of torch's backends."""
    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        with contextlib.suppress(RuntimeError), sdpa_kernel(backend):
            call = lambda cache: torch.nn.functional.scaled_dot_product_attention(case.q, *cache)
            times[backend.name.removesuffix("_ATTENTION").lower()] = case.each(call)
    fastest = min(times, key=times.__getitem__)
    return times[fastest], fastest


def speed(rate: float) -> Iterator[dict[str, Any]]:
    for shape in CASES:
        case = Case(*shape)
        error = case.error()
        ours, (torchs, backend) = case.each(case.ours), sdpa(case)
        parts = {name: microseconds(calls) for name, calls in case.launches().items()}
        ideal = case.bytes / rate * 1e6
        line = {
            "batch": case.batch, "length": case.length, "dim": case.dim, "heads": HEADS, "caches": len(case.caches),
            "us": ours, "kernels_us": parts, "sdpa_us": torchs, "sdpa_backend": backend, "ideal_us": ideal,
            "error": error,
        }  # fmt: skip
        print(
            f"{case.label}  {ours:8.1f} us  ideal {ideal:7.1f} ({ours / ideal:5.2f}x)  sdpa {torchs:7.1f} {backend:<9}"
            f" ({ours / torchs:4.2f}x)  error {error:.1e}  " + " ".join(f"{n} {t:.1f}" for n, t in parts.items()),
            flush=True,
        )
        yield line
        del case


def variants(rate: float) -> Iterator[dict[str, Any]]:
    """One kernel timed under each of a few settings, the others as they are."""
    from flashlla.backends.triton.configs import decode_config

    lines = []

    def show(case: Case, kernel: str, config: DecodeConfig) -> None:
        line: dict[str, Any] = {"batch": case.batch, "length": case.length, "dim": case.dim, "kernel": kernel}
        line |= config._asdict()
        try:
            if kernel == "all":
                line["us"] = case.each(lambda cache: case.ours(cache, config))
                parts = {name: microseconds(calls) for name, calls in case.launches(config).items()}
                line["kernels_us"] = parts
            else:
                line["us"] = microseconds(case.launches(config)[kernel])
            outcome = f"{line['us']:8.1f} us " + " ".join(f"{n} {t:.1f}" for n, t in line.get("kernels_us", {}).items())
        except Exception as error:  # what does not compile or fit is no choice
            line["failed"] = outcome = f"{type(error).__name__}: {str(error)[:80]}"
        lines.append(line)
        settings = " ".join(f"{n} {x}" for n, x in config._asdict().items())
        print(f"{case.label}  {kernel:<8} {outcome}  [{settings}]", flush=True)

    for batch, length, dim in ((32, 4096, 128), (1, 4096, 128)):
        case = Case(batch, length, dim)
        usual = decode_config(dim, dim, True, True)
        for tile, warps, stages, pieces in MOMENTS:
            show(case, "moments", usual._replace(tile=tile, warps=warps, stages=stages, pieces=pieces))
        for pieces in PIECES[batch]:
            show(case, "all", usual._replace(pieces=pieces))
        for warps in SOLVES:
            show(case, "solve", usual._replace(solve_warps=warps))
        del case
        yield from lines
        lines.clear()


KINDS = {"speed": speed, "variants": variants}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="default: both")
    record.add_arguments(parser)


def main(options: argparse.Namespace) -> int:
    needs.cuda()
    needs.triton()
    kept = record.Record(options, "cuda")
    rate = kept.figures["copy_bytes_per_s"] = copy_bandwidth()
    print(kept.figures)
    for kind in options.only:
        lines = kept.figures[kind] = []
        for line in KINDS[kind](rate):
            lines.append(line)
            kept.write()
    kept.end()
    return 0
