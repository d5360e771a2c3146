"""``python -m flashlla info``, ``python -m flashlla verify`` and ``python -m flashlla warmup``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

import flashlla
from flashlla import dispatch, warming
from flashlla.problem import SUPPORTED_DTYPES

_DTYPES = {str(d).removeprefix("torch."): d for d in SUPPORTED_DTYPES}


def info() -> int:
    """Print versions, devices, and each backend with why it can or cannot run here."""
    print(f"flashlla      {flashlla.__version__}")
    print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "numpy", "scipy", "transformers", "tqdm"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<13} {version}")
    print(f"cpu           {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        print(f"cuda:{i:<8} {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    if not torch.cuda.is_available():
        print("cuda          no device")
    try:
        preferred = flashlla.get_backend()
    except ValueError as error:
        preferred = str(error)
    print(f"backend       {preferred}; {'tried' if preferred == dispatch.AUTO else 'auto tries them'} in this order:")
    backends = dispatch.all_backends()
    width = max(len(b.name) for b in backends)
    for backend in backends:
        reason = backend.unavailable()
        verdict = "can run" if reason is None else f"cannot run: {reason}"
        print(f"  {backend.name:<{width}}  {backend.summary}; {verdict}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check a backend against SciPy on random inputs; 1 where an output is off by more than ``--tolerance``."""
    _check_device(options.device)
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.batch, options.heads, options.length, options.dim)
    q, k, v = (torch.randn(shape, generator=generator).to(options.device, _DTYPES[options.dtype]) for _ in range(3))
    report = flashlla.verify(
        q,
        k,
        v,
        rows=options.rows,
        seed=options.seed,
        ridge_lambda=options.ridge_lambda,
        solver=options.solver,
        backend=options.backend,
    )
    print(report)
    if options.per_row:
        print(f"{'batch':>6}{'head':>6}{'query':>7}{'condition':>12}{'error':>10}{'residual':>10}")
        for row, condition, error, residual in zip(report.row, report.condition, report.error, report.residual):
            print(f"{row[0]:>6}{row[1]:>6}{row[2]:>7}{condition:>12.1e}{error:>10.1e}{residual:>10.1e}")
    worst = report.error.max(initial=0.0)
    found = f"worst error {worst:.1e} (limit {options.tolerance:.0e})"
    if worst <= options.tolerance:
        print(f"ok: {found}")
        return 0
    print(
        f"failed: {found}; try --solver direct, a larger --ridge-lambda or --dtype float64 before raising --tolerance"
    )
    return 1


def warmup(options: argparse.Namespace) -> int:
    """Fill Triton's cache, for each head dim and dtype; without a GPU there is nothing to fill it with."""
    for head_dim in options.head_dim:
        for dtype in options.dtype:
            made = flashlla.warmup(
                head_dim,
                _DTYPES[dtype],
                what=options.what,
                shapes=options.shapes or warming.SHAPES,
                kv_heads=options.kv_heads,
                causal=not options.full,
                window=options.window,
            )
            if made.reason is not None:
                return 0
    return 0


def _check_device(name: str) -> None:
    """Refuse what holds no numbers here; torch says so by one kind of error or another."""
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, RuntimeError) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--device: got {name!r}, which torch cannot use here ({said}); try --device cpu") from error


def _shape(text: str) -> tuple[int, int, int]:
    try:
        batch, heads, tokens = map(int, text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted batch x heads x tokens, as 4x8x1024") from error
    return batch, heads, tokens


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashlla", description=flashlla.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and which backends can run here")
    check = commands.add_parser("verify", help="check a backend against scipy.linalg on random inputs")
    shown = "(default: %(default)s)"
    check.add_argument("--batch", type=int, default=1, help=f"sequences {shown}")
    check.add_argument("--heads", type=int, default=2, help=f"heads of each {shown}")
    check.add_argument("--length", type=int, default=512, help=f"queries and keys of each {shown}")
    check.add_argument("--dim", type=int, default=64, help=f"head dim {shown}")
    check.add_argument("--dtype", choices=_DTYPES, default="float32", help=f"of the inputs {shown}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check.add_argument("--device", default=device, help=f"as torch names it {shown}")
    check.add_argument("--ridge-lambda", type=float, default=10.0, help=f"above 0 {shown}")
    check.add_argument("--solver", help="cg, pcg, pcg_gram or direct (default: the backend's own conjugate gradients)")
    check.add_argument("--backend", help="a backend's name, or auto (default: FLASHLLA_BACKEND, else auto)")
    check.add_argument("--rows", type=int, default=64, help=f"queries to check {shown}")
    check.add_argument("--seed", type=int, default=0, help=f"of the inputs and the choice of queries {shown}")
    tolerance = f"largest relative output error that passes {shown}"
    check.add_argument("--tolerance", type=float, default=1e-2, help=tolerance)
    check.add_argument("--per-row", action="store_true", help="print every checked query")
    warm = commands.add_parser("warmup", help="compile the fused kernels of calls to come; Triton keeps them on disk")
    warm.add_argument("--head-dim", type=int, nargs="+", default=[64], help="default: 64")
    warm.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bfloat16"], help="default: bfloat16")
    warm.add_argument("--what", nargs="+", choices=warming.WHAT, default=warming.WHAT, help="default: all of them")
    usual = " ".join("x".join(map(str, shape)) for shape in warming.SHAPES)
    warm.add_argument("--shapes", nargs="+", type=_shape, metavar="BxHxS", help=f"of calls (default: {usual})")
    warm.add_argument("--kv-heads", type=int, help="heads of keys (default: as many as of queries)")
    warm.add_argument("--window", type=int, help="keys that a query sees (default: all)")
    warm.add_argument("--full", action="store_true", help="not causal")
    options = parser.parse_args(arguments)
    try:
        return {"info": lambda _: info(), "verify": verify, "warmup": warmup}[options.command](options)
    except (ValueError, TypeError, RuntimeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
