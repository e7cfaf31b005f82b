"""A maintainer's tools: pinned versions that satisfy pyproject.toml, and the files that tools read."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vdr_cli import __version__

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
def test_constraints_hold_a_version_that_pyproject_allows(text: str) -> None:
    requirement = Requirement(text)
    if requirement.name != PROJECT["name"]:
        assert pinned()[canonicalize_name(requirement.name)] in requirement.specifier, "scripts/build/constraints.py"


@pytest.mark.parametrize(
    "path",
    [".pre-commit-config.yaml", "CITATION.cff", *sorted(p.relative_to(ROOT) for p in ROOT.glob(".github/**/*.yml"))],
    ids=str,
)
def test_tools_can_read_their_files(path: str) -> None:
    assert yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_versions_agree() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    assert (ROOT / "vdr_cli" / "py.typed").is_file()


def test_ci_runs_the_readmes_test_command() -> None:
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    command = steps[-1]["run"]
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / ".ci/run").read_text().endswith(f"exec {command}\n")


def test_no_test_asserts_seconds() -> None:
    """A busy machine would fail it: an order, a flag or an exit code says the same."""
    timed = re.compile(r"assert .*(monotonic|perf_counter|time)\(\) - \w+ *<")
    found = [path.name for path in ROOT.glob("tests/**/*.py") if timed.search(path.read_text(encoding="utf-8"))]
    assert found == []
