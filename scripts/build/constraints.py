"""constraints.txt: the exact versions in this environment of everything that vdr and its tests depend on.

python scripts/build/constraints.py        # after the test command is green with them
"""

from __future__ import annotations

import platform
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "constraints.txt"
OWN = "vdr-cli"

HEADER = """\
# The versions that the test command last ran with, on Python {version} without a GPU. scripts/environment.sh installs
# these, or the newest that pyproject.toml allows where they cannot be had. Made by scripts/build/constraints.py.
"""


def main() -> int:
    versions: dict[str, str] = {}
    missing: set[str] = set()
    todo = direct_requirements()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        try:
            found = distribution(name)
        except PackageNotFoundError:
            missing.add(name)
            continue
        known = name in versions
        versions[name] = found.version.partition("+")[0]  # 2.13.0+cpu is 2.13.0 built without CUDA
        if not known or requirement.extras:
            todo += [inner for text in found.requires or () if applies(inner := Requirement(text), requirement.extras)]
    TARGET.write_text(
        HEADER.format(version=".".join(platform.python_version_tuple()[:2]))
        + "".join(f"{name}=={versions[name]}\n" for name in sorted(versions)),
        encoding="utf-8",
    )
    if missing:
        print(f"not in this environment, so not in {TARGET.name}: {', '.join(sorted(missing))}", file=sys.stderr)
    return 0


def direct_requirements() -> list[Requirement]:
    """The requirements that pyproject.toml names for vdr and its extras `test` and `gym`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    named = [Requirement(text) for text in (*project["dependencies"], *optional["test"], *optional["gym"])]
    own = [requirement for requirement in named if requirement.name == OWN]
    extras = [Requirement(text) for requirement in own for extra in requirement.extras for text in optional[extra]]
    return [*(requirement for requirement in named if requirement.name != OWN), *extras]


def applies(requirement: Requirement, extras: set[str]) -> bool:
    """True if the requirement's marker holds here, with one of the extras or with none."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


if __name__ == "__main__":
    sys.exit(main())
