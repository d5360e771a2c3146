"""What was measured, with what it was measured on; kept in files where the options ask for it."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import flashlla

RESULTS = Path(__file__).parent / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("where it goes", "without any of these: printed, and no file is written")
    where.add_argument("--name", help="keep it as NAME.json in benchmarks/results, or in --out")
    where.add_argument("--out", type=Path, metavar="DIR", help="keep it in DIR; default name: device and date")
    where.add_argument("--json", type=Path, metavar="PATH", help="keep it as PATH, and other files beside it")


class Record:
    """``figures``, to which a command adds what it finds, and the files that hold them."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        self.figures: dict[str, Any] = {**circumstances(device), "command": options.command}
        self.path: Path | None = options.json
        if self.path is None and (options.name or options.out):
            self.path = (options.out or RESULTS) / f"{options.name or usual_name(self.figures)}.json"
        self.files: list[Path] = []

    def write(self) -> None:
        """The figures as JSON."""
        self.write_text(".json", json.dumps(self.figures, indent=1) + "\n")

    def write_text(self, suffix: str, text: str) -> None:
        """Whole or not at all: what was there before stays until the new file is complete."""
        if self.path is None:
            return
        path = self.path if suffix == ".json" else self.path.with_suffix(suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text)
        partial.replace(path)
        self.name([path])

    def name(self, files: Sequence[Path]) -> None:
        """Note ``files`` as written."""
        self.files += [file for file in files if file not in self.files]

    def end(self) -> None:
        """Say what was written."""
        for file in self.files:
            print(f"wrote {file}")
        if not self.files:
            print("wrote no file (--name NAME keeps the figures in benchmarks/results, --out DIR elsewhere)")


def circumstances(device: str) -> dict[str, Any]:
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


def usual_name(figures: dict[str, Any]) -> str:
    """Of the files, from device and date."""
    return re.sub(r"[^a-z0-9]+", "_", f"{figures['device']} {figures['date'].removesuffix(' UTC')}".lower()).strip("_")
