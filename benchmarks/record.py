"""Recorded runs: one JSON file each under benchmarks/results, with what it ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch

import flashlla

RESULTS = Path(__file__).parent / "results"


def circumstances(device: str = "cuda" if torch.cuda.is_available() else "cpu") -> dict[str, Any]:
    """Date, versions, and the name of the device."""
    packages: dict[str, str | None] = {"flashlla": flashlla.__version__}  # installed or not
    for package in ("torch", "triton", "numpy"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
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


def usual_name(result: dict[str, Any]) -> str:
    """Of the file of a run, from its device and date."""
    return re.sub(r"[^a-z0-9]+", "_", f"{result['device']} {result['date'].removesuffix(' UTC')}".lower()).strip("_")


def write(path: Path, result: dict[str, Any]) -> None:
    """``result`` as JSON, whole or not at all: what was there before stays until the new file is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)


def record(name: str, figures: Any, folder: Path = RESULTS) -> Path:
    """Write ``figures`` to ``folder``/``name``.json with the circumstances; return the path."""
    path = folder / f"{name}.json"
    write(path, {**circumstances(), "figures": figures})
    return path
