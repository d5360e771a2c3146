"""What the documentation says, runs: Python blocks, docstrings' examples, the scripts in examples/, links."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import flashlla
from flashlla import dispatch, distributed, solvers
from flashlla.integrations import fla, transformers
from tests.support.helpers import interpreted

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC = (flashlla, flashlla.nn, distributed, fla, transformers, flashlla.ops.naive, solvers)
FIGURES = {"softmax attention": "0.549", "ridge regression": "0.206", "Local Linear Attention": "0.168"}


def within(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def users_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seeded, one thread (the problems are tiny), warnings are errors, and no kernel runs in an interpreter."""
    monkeypatch.setattr(dispatch, "_backends", [b for b in dispatch._backends if not interpreted(b)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", flashlla.ConvergenceWarning)
        warnings.simplefilter("error", flashlla.FallbackWarning)
        yield
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Every ```python block of a page, with the line it starts on."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start()) + 1, m[1]) for m in found]


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=within)
def test_python_blocks_run(page: Path, users_machine: None):
    namespace: dict[str, object] = {"__name__": "__main__"}
    for line, block in python_blocks(page):
        # Blank lines in front make a traceback's line numbers those of the page.
        exec(compile("\n" * line + block, str(page), "exec", dont_inherit=True), namespace)


def test_the_page_of_several_devices_on_two_processes(tmp_path: Path):
    """By the command that it names; what it puts together is what one process gives."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    blocks = [block for _, block in python_blocks(ROOT / "docs" / "distributed.md")]
    (made,) = (i for i, block in enumerate(blocks) if "whole = " in block)
    blocks[made] += """
from flashlla import lla_attention
wanted = lla_attention(q, k, v, ridge_lambda=1.0)
assert dist.get_world_size() == 2 and (whole - wanted).norm() < 1e-4 * wanted.norm()
"""
    script = tmp_path / "script.py"
    # At once: where an interpreter ends, threads of torch that still want it may abort the process.
    script.write_text("".join([*blocks, "os._exit(0)\n"]), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FLASHLLA_BACKEND")}
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr


def public_examples() -> list[doctest.DocTest]:
    """The examples in the docstrings of all that a user can import from the public modules."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = {}
    for module in PUBLIC:
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                for test in finder.find(thing, f"{thing.__module__}.{name}", globs={}):
                    examples[test.name] = test
    return sorted(examples.values())


@pytest.mark.quick
@pytest.mark.parametrize("example", [e for e in public_examples() if e.examples], ids=lambda e: e.name)
def test_docstring_examples_run(example: doctest.DocTest, users_machine: None):
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)
    assert result.failed == 0, "".join(report)


@pytest.mark.quick
@pytest.mark.parametrize("name", [n for n in flashlla.__all__ if callable(getattr(flashlla, n))])
def test_public_names_are_documented(name: str):
    assert getattr(flashlla, name).__doc__, f"flashlla.{name} has no docstring"
    assert re.search(rf"\b{name}\b", "".join(p.read_text(encoding="utf-8") for p in PAGES)), f"no page shows {name}"


def run(script: str, *arguments: str) -> str:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # A user's environment: no interpreter for kernels, no preferred backend.
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FLASHLLA_BACKEND")}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(ROOT / "examples" / script), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_minimal_usage_runs():
    out = run("minimal_usage.py")
    assert "output       (4, 256, 64)" in out
    assert all(f"gradient {name}   (4, 256, 64)" in out for name in "qkv")


def test_the_forecast_gives_the_figures_of_the_readme(tmp_path: Path, figure: Callable[[str], None]):
    pytest.importorskip("matplotlib")
    pytest.importorskip("statsmodels")
    plot = tmp_path / "sunspots.png"
    out = run("forecast_sunspots.py", "--output", str(plot))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, error in FIGURES.items():
        (row,) = (line for line in out.splitlines() if line.startswith(name))
        # The operator's two limits must give the figures of the methods computed without it.
        assert re.findall(r"0\.\d{3}", row) == [error] * (1 if name == "Local Linear Attention" else 2)
        assert f"{name.replace('Local Linear Attention', 'LLA')} {error}" in " ".join(readme.split())
        figure(f"sunspots, mean squared error: {row}")
    assert 20_000 < plot.stat().st_size < 150_000
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_forecast_from_windows_of_one_norm(tmp_path: Path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("statsmodels")
    out = run("forecast_sunspots.py", "--unit-norm", "--output", str(tmp_path / "sunspots.png"))
    softmax, lla = re.findall(r"0\.\d{3}", out.split("At the scale")[1])
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"at the scale that turns out best for each {softmax}, and LLA {lla}" in readme


def test_the_reference_holds_every_public_name():
    reference = "".join(p.read_text(encoding="utf-8") for p in PAGES if p.parent.name == "api")
    told = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    paths = {getattr(m, n): f"{m.__name__}.{n}" for m in reversed(PUBLIC) for n in m.__all__}
    public = {path for thing, path in paths.items() if callable(thing)}
    assert public <= told


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=within)
def test_links_lead_somewhere(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{within(page)} links to {link}"
        assert not heading or heading in headings(target), f"{within(page)} links to {link}"


@pytest.mark.quick
def test_equations_that_code_cites_exist():
    """Code cites (2.1), docs/math.md tags 2.1; and the sections it names are there."""
    page = (ROOT / "docs" / "math.md").read_text(encoding="utf-8")
    tags = set(re.findall(r"\\tag\{([0-9]\.[0-9]+)\}", page))
    sections = set(re.findall(r"^## ([0-9])\. ", page, re.MULTILINE))
    for source in (ROOT / "flashlla").rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        cited = set(re.findall(r"\(([1-6]\.[0-9]{1,2})\)", text))
        assert cited <= tags, f"{source.name} cites {sorted(cited - tags)}"
        for place in re.findall(r"docs/math\.md[`,]*,? sections? ([0-9])", text):
            assert place in sections, f"{source.name} cites section {place}"


@pytest.mark.quick
@pytest.mark.parametrize("page", PAGES, ids=within)
def test_tests_that_pages_name_exist(page: Path):
    """As `test_a.py`, `test_a.py::test_b`, and `test_b` of a file before it."""
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")}
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)?(?:::)?(test_\w+)?`", page.read_text(encoding="utf-8")):
        assert not file or file in sources, f"{within(page)} names {file}"
        text = sources[file] if file else "".join(sources.values())
        assert not name or f"def {name}(" in text, f"{within(page)} names {file}::{name}"


def test_a_folder_of_the_packages_name_does_not_hide_it(tmp_path):
    """As a clone does where Python runs beside it."""
    (tmp_path / "flashlla").mkdir()
    command = [sys.executable, "-c", "import flashlla; print(flashlla.__version__)"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.strip() == flashlla.__version__
