"""``python -m flashlla info`` and ``python -m flashlla verify``."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

import flashlla
from flashlla import dispatch
from flashlla.problem import SUPPORTED_DTYPES

_DTYPES = {str(d).removeprefix("torch."): d for d in SUPPORTED_DTYPES}


def info() -> int:
    """Print versions, devices, and each backend with why it can or cannot run here."""
    print(f"flashlla  {flashlla.__version__}")
    print(f"python    {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "triton", "numpy", "scipy"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<9} {version}")
    print(f"cpu       {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        print(f"cuda:{i}    {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    if not torch.cuda.is_available():
        print("cuda      no device")
    try:
        preferred = flashlla.get_backend()
    except ValueError as error:
        preferred = str(error)
    print(f"backend   {preferred} (in the order that auto tries them:)")
    backends = dispatch.all_backends()
    width = max(len(b.name) for b in backends)
    for backend in backends:
        reason = backend.unavailable()
        verdict = "can run" if reason is None else f"cannot run: {reason}"
        print(f"  {backend.name:<{width}}  {verdict}; {backend.summary}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Check a backend against SciPy on random inputs; 1 where an output is off by more than ``--tolerance``."""
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
    if report.error.max(initial=0.0) <= options.tolerance:
        return 0
    print(f"an output is off by more than {options.tolerance}; raise --tolerance if that is what you expect")
    return 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashlla", description=flashlla.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and which backends can run here")
    check = commands.add_parser("verify", help="check a backend against scipy.linalg on random inputs")
    check.add_argument("--batch", type=int, default=1)
    check.add_argument("--heads", type=int, default=2)
    check.add_argument("--length", type=int, default=512)
    check.add_argument("--dim", type=int, default=64)
    check.add_argument("--dtype", choices=_DTYPES, default="float32")
    check.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    check.add_argument("--ridge-lambda", type=float, default=10.0)
    check.add_argument("--solver", default=None, help="cg, pcg or direct")
    check.add_argument("--backend", default=None, help="a backend's name, or auto")
    check.add_argument("--rows", type=int, default=64, help="queries to check")
    check.add_argument("--seed", type=int, default=0)
    check.add_argument("--tolerance", type=float, default=1e-2, help="largest relative output error that passes")
    check.add_argument("--per-row", action="store_true", help="print every checked query")
    options = parser.parse_args(arguments)
    try:
        return info() if options.command == "info" else verify(options)
    except (ValueError, TypeError, RuntimeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
