"""What every experiment shares: runs kept in a file as they end, a bar, means over seeds."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.record import circumstances

RESULTS = Path(__file__).parent / "results"
T = TypeVar("T")
Run = dict[str, Any]


class Runs:
    """Runs by name, in a JSON file written whole after each; those already there are not made again."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.all: dict[str, Run] = json.loads(path.read_text())["runs"] if path.exists() else {}

    def add(self, name: str, run: Run) -> None:
        command = shlex.join(["python", "-m", _module(), *sys.argv[1:]])
        self.all[name] = {**run, "of": {**circumstances(self.device), "command": command}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        runs = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in sorted(self.all.items()))
        partial.write_text(f'{{"runs": {{\n{runs}\n}}}}\n')
        partial.replace(self.path)


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def progress(items: Iterable[T], **settings: Any) -> Iterator[T]:
    """A bar, where there is a terminal and tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(items)
    bar: Iterator[T] = tqdm(items, disable=None, leave=False, **settings)
    return bar


def spread(values: list[float]) -> str:
    """Mean and standard deviation, 0.889 ± 0.004 (3); of one value itself alone: a trial."""
    if len(values) == 1:
        return f"{values[0]:.4f} (1)"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f} ({len(values)})"
