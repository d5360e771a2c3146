"""What stands beside the package: its citation, its workflow and templates, its hooks, its one address."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import flashlla

pytestmark = pytest.mark.quick

ROOT = Path(__file__).resolve().parents[1]
WRITTEN_IN_YAML = [ROOT / "CITATION.cff", *ROOT.glob("*.y*ml"), *ROOT.glob(".*.yaml"), *ROOT.glob(".github/**/*.yml")]
ADDRESS = "https://github.com/flashlla/flashlla"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def made_by(target: str) -> str:
    """What the Makefile does for a target."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n|#.*\n)+)", makefile, re.MULTILINE)
    assert found, f"the Makefile has no {target}"
    return found[1]


@pytest.mark.parametrize("path", WRITTEN_IN_YAML, ids=lambda p: p.name)
def test_yaml_parses(path: Path) -> None:
    assert read(path)


def test_the_citation_is_of_this_version_and_this_paper() -> None:
    citation, readme = read(ROOT / "CITATION.cff"), (ROOT / "README.md").read_text(encoding="utf-8")
    assert citation["version"] == flashlla.__version__
    paper = citation["preferred-citation"]
    assert paper["title"] in readme
    assert paper["url"] in readme
    assert " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]) in readme


def test_the_workflow_runs_what_every_change_must_pass() -> None:
    (job,) = read(ROOT / ".github" / "workflows" / "cpu.yml")["jobs"].values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make check", "make test"]
    assert all(made_by(command.removeprefix("make ")) for command in commands)


def test_hooks_are_those_of_make_check() -> None:
    (repo,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    for hook in repo["hooks"]:
        assert f"$(BIN)/{hook['name']}" in made_by("check")
        assert hook["entry"].startswith(f".venv/bin/{hook['name']}")


def test_the_project_has_one_address() -> None:
    files = [ROOT / "README.md", ROOT / "pyproject.toml", ROOT / "mkdocs.yml", ROOT / "CITATION.cff"]
    for file in files:
        assert set(re.findall(r"https://github\.com/[\w-]+/[\w-]+", file.read_text(encoding="utf-8"))) == {ADDRESS}
