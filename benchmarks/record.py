"""Recorded runs: one JSON file each under benchmarks/results, with what it ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def circumstances() -> dict[str, Any]:
    """Date, device and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    packages = {}
    for package in ("torch", "triton", "numpy"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **packages,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def record(name: str, figures: Any, folder: Path = RESULTS) -> Path:
    """Write ``figures`` to ``folder``/``name``.json with the circumstances; return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**circumstances(), "figures": figures}, indent=1) + "\n")
    return path
