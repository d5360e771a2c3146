"""``make matrix``, or ``python -m tests.matrix``: the tests under other versions of what the package stands on.

Each row has a virtual environment of its own in ``.matrix/``, made once, several gigabytes where torch comes with
CUDA's libraries. What came of each is kept in benchmarks/results/matrix.json, and written to the table of
docs/reliability.md; rows that are not run now (``--only``, or a Python that is not here) stay as they were.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".matrix"
KEPT = record.RESULTS / "matrix.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- written by tests/matrix.py -->\n", "<!-- end -->\n"
NEWEST = ("torch", "triton", "numpy", "scipy", "transformers")
TESTING = ("hypothesis", "pytest", "pytest-xdist", "pyyaml")
SHOWN = ("torch", "triton", "transformers", "numpy", "scipy")
# By name, arguments of Python. What needs other packages than these skips itself.
SUITES = {
    "all": ["-m", "pytest", "-q", "-m", "not gpu", "-n", "2", "tests"],
    "quick": ["-m", "pytest", "-q", "-m", "quick and not slow and not gpu", "-n", "2", "tests"],
    "some": [
        *("-m", "pytest", "-q", "-m", "quick and not slow and not gpu", "-n", "2"),
        *(
            f"tests/test_{name}.py"
            for name in ("api", "autograd", "compile", "nn_attention", "races", "validation", "vmap")
        ),
    ],
    "compile": [
        *("-m", "benchmarks", "compile", "--plain", "--architectures", "80", "90", "100"),
        *("--dims", "64", "128", "--dtypes", "bfloat16"),
    ],
}


@dataclass(frozen=True)
class Row:
    """A Python, what is installed beside it, and what is run."""

    name: str
    python: str
    packages: tuple[str, ...]
    suites: tuple[str, ...] = ("quick",)


ROWS = (
    Row(
        "oldest",
        "3.10",
        ("torch==2.11.0", "numpy==1.26.*", "scipy==1.12.*", "transformers==5.17.0"),
        ("quick", "compile"),
    ),
    Row("oldest on 3.12", "3.12", ("torch==2.11.0", "transformers==5.17.0", *NEWEST[2:4]), ("all", "compile")),
    Row("tested", "3.11", ("torch==2.13.0", "triton==3.7.1", *NEWEST[2:]), ("all", "compile")),
    Row("newest on 3.12", "3.12", NEWEST, ("all", "compile")),
    Row("newest on 3.13", "3.13", NEWEST),
    Row("newest on 3.14", "3.14", NEWEST),
    Row("Triton 3.8", "3.11", ("torch==2.13.0", "triton==3.8.0", *NEWEST[2:]), ("compile",)),
)


def python_of(version: str, given: dict[str, str]) -> str | None:
    """Where there is such a Python."""
    found = given.get(version) or shutil.which(f"python{version}")
    if found and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0:
        return found
    versions = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    return str(versions[-1]) if versions else None


def environment_of(row: Row, python: str) -> Path:
    """The Python of its virtual environment."""
    folder = PLACE / row.name.replace(" ", "_")
    ready = folder / "ready"
    wanted = "\n".join(row.packages)
    if not ready.exists() or ready.read_text() != wanted:
        subprocess.run([python, "-m", "venv", folder], check=True)
        install = ["-m", "pip", "install", "-q", "--only-binary=:all:", *row.packages, *TESTING]
        subprocess.run([folder / "bin" / "python", *install], check=True)
        ready.write_text(wanted)
    return folder / "bin" / "python"


def versions(python: Path) -> dict[str, str | None]:
    script = (
        "import importlib.metadata as m, json, platform\n"
        "found = {'python': platform.python_version()}\n"
        f"for name in {SHOWN!r}:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: found[name] = None\n"
        "print(json.dumps(found))"
    )
    told: dict[str, str | None] = json.loads(subprocess.run([python, "-c", script], capture_output=True).stdout)
    return told


def outcome(suite: str, status: int, said: str) -> dict[str, Any]:
    """What a run came to: of pytest the counts of its last line."""
    counts = {}
    if suite != "compile":
        lines = [line for line in said.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
        counts = {
            what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1] if lines else "")
        }
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    return {"status": status, **counts, **({"failures": failed} if failed else {})}


def run(row: Row, python: Path, suites: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = versions(python)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(PLACE / "inductor" / row.name.replace(" ", "_"))
    for suite in suites:
        begun = time.monotonic()
        log = PLACE / f"{row.name.replace(' ', '_')}.{suite}.log"
        with log.open("w") as into:
            status = subprocess.run([python, *SUITES[suite]], cwd=ROOT, env=environment, stdout=into, stderr=into)
        found[suite] = {
            **outcome(suite, status.returncode, log.read_text()),
            "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
            "seconds": round(time.monotonic() - begun),
        }
        print(f"{row.name}, {suite}: {found[suite]}", flush=True)
    return found


def joined(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """What was found, and what was before under the same versions."""
    same = all(before.get(name) == found[name] for name in ("python", *SHOWN))
    return {**before, **found} if same else found


def table(kept: dict[str, Any]) -> str:
    lines = [
        "| | Python | torch | Triton | transformers | NumPy | what was run | came to | when |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in kept.items():
        for suite in SUITES:
            if suite in row:
                of = [row[package] or "none" for package in ("python", "torch", "triton", "transformers", "numpy")]
                lines.append(f"| {name} | {' | '.join(of)} | {suite} | {came_to(row[suite])} | {row[suite]['date']} |")
    return "\n".join(lines) + "\n"


def came_to(suite: dict[str, Any]) -> str:
    counts = [f"{suite[what]} {what}" for what in ("passed", "failed", "error", "errors", "skipped") if what in suite]
    return ", ".join(counts) or ("as wanted" if suite["status"] == 0 else "stopped, or failed")


def written(page: str, kept: dict[str, Any]) -> str:
    """``page`` with the table in its place."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(kept)}\n{END}{after}"


def read() -> dict[str, Any]:
    rows: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="NAME", help="of the rows")
    parser.add_argument("--suites", nargs="+", choices=SUITES, help="default: those of each row")
    parser.add_argument("--python", nargs="+", default=[], metavar="3.X=PATH", help="where Pythons are")
    options = parser.parse_args(arguments)
    given = dict(one.split("=", 1) for one in options.python)
    PLACE.mkdir(exist_ok=True)
    failed = False
    for row in ROWS:
        if options.only and row.name not in options.only:
            continue
        if (python := python_of(row.python, given)) is None:
            print(f"{row.name}: there is no Python {row.python} here; say where by --python {row.python}=PATH")
            continue
        suites = options.suites or row.suites
        found = run(row, environment_of(row, python), suites)
        failed |= any(found[suite]["status"] for suite in suites)
        rows = read()  # others may have been run meanwhile
        rows[row.name] = joined(rows.get(row.name, {}), found)
        kept = {row.name: rows[row.name] for row in ROWS if row.name in rows}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), kept), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
