"""Environments with the lowest and the newest versions that pyproject.toml allows: does vdr work in them?

    python scripts/verify/versions.py [--only lowest,newest-3.12] [--tests tests/grpo] [--json benchmarks/versions.json]

Each environment is made in --directory and kept, a run of five steps of the starter must end, and the tests given are
run in it. An environment whose Python is not on this machine (--pythons) is skipped and named. Needs the packages from
pip, 2 to 6 GB of disk per environment, and for all unit tests half an hour each on two cores.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("bench", "build")]

from constraints import direct_requirements  # noqa: E402
from harness import ROOT, parser_of, write_results  # noqa: E402
from packaging.requirements import Requirement  # noqa: E402

SHOWN = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "peft", "typer", "pydantic", "numpy")
TOOLS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "scipy", "jsonschema", "scikit-learn", "packaging")
"""Packages that tests import beside vdr's own requirements, at any version."""
LEFT_OUT = ("trl", "playwright", "ruff", "mypy", "import-linter", "types-PyYAML", "types-psutil")
"""Tools of the test command that need other versions than the lowest, or that no unit test imports."""
UNIT = "not integration and not cluster and not network and not gpu"


@dataclass(frozen=True)
class Case:
    name: str
    python: str
    lowest: bool


CASES = (
    Case("lowest", "3.11", lowest=True),
    Case("newest", "3.11", lowest=False),
    Case("newest-3.12", "3.12", lowest=False),
    Case("newest-3.13", "3.13", lowest=False),
)


def requirements(lowest: bool) -> list[str]:
    """The words for pip: every direct requirement at its lower bound, or as it stands."""
    wanted = [found for found in direct_requirements() if found.name not in (*LEFT_OUT, *TOOLS)]
    return [*(pinned(found) if lowest else str(found) for found in wanted), *TOOLS]


def pinned(requirement: Requirement) -> str:
    """`torch>=2.6` to `torch==2.6`."""
    bounds = [bound.version for bound in requirement.specifier if bound.operator in (">=", "==")]
    return f"{requirement.name}=={bounds[0]}" if bounds else requirement.name


def interpreter(version: str, folders: list[Path]) -> str | None:
    """A Python of this version: on the PATH, or the newest of it in folders of installations."""
    for folder in folders:
        for found in sorted(folder.glob(f"{version}*/bin/python3"), reverse=True):
            return str(found)
    for name in (f"python{version}", "python3"):
        asked = subprocess.run([name, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True)
        if asked.returncode == 0 and asked.stdout.decode().strip() == version:
            return name
    return None


def examine(case: Case, python: str, directory: Path, tests: list[str], workers: str) -> dict[str, Any]:
    """Make the environment, run the starter and the tests in it."""
    home = directory / case.name
    own = home / "bin" / "python"
    if not (home / "made").exists():
        subprocess.run([python, "-m", "venv", "--clear", home], check=True)
        pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements(case.lowest)], check=True)
        subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
        (home / "made").touch()
    found: dict[str, Any] = {"versions": versions_in(own), "starter": starter(own, directory / f"{case.name}-run")}
    if tests:
        found |= run_tests(own, tests, workers, directory / f"{case.name}.log")
    return found


def versions_in(python: Path) -> dict[str, str]:
    code = (
        "import json, platform\nfrom importlib.metadata import version\n"
        f"print(json.dumps({{'python': platform.python_version()}} | {{n: version(n) for n in {SHOWN!r}}}))"
    )
    return dict(json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout))


def starter(python: Path, output: Path) -> dict[str, Any]:
    """Five steps: the exit code, the last reward, and the last line where it failed."""
    subprocess.run(["rm", "-rf", output], check=True)
    command = [python, "-m", "vdr_cli", "train", "--steps", "5", "--output", output, "--set", "observe.live=off"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if ended.returncode:
        return {"code": ended.returncode, "said": (ended.stderr.strip().splitlines() or [""])[-1][:300]}
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return {"code": 0, "reward": json.loads(lines[-1])["reward"]}


def run_tests(python: Path, tests: list[str], workers: str, log: Path) -> dict[str, Any]:
    """Counts, and the names of what failed."""
    command = [python, "-m", "pytest", "-q", "-m", UNIT, "-n", workers, "-p", "no:cacheprovider", *tests]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), check=False)
    log.write_text(ended.stdout + ended.stderr)
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|skipped|error)", ended.stdout)}
    failures = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+)", ended.stdout, re.MULTILINE)))
    return {"passed": 0, "failed": 0, "skipped": 0} | counts | {"failures": failures}


def environment() -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "PYTHONPATH")} | own


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--only", help="names of environments, separated by commas")
    parser.add_argument("--directory", type=Path, default=Path("versions"))
    parser.add_argument("--pythons", type=Path, nargs="*", default=[Path.home() / ".pyenv" / "versions"])
    parser.add_argument("--tests", nargs="*", default=["tests"])
    parser.add_argument("-n", "--workers", default="auto")
    args = parser.parse_args()
    chosen = [case for case in CASES if args.only is None or case.name in args.only.split(",")]
    rows: dict[str, Any] = {}
    for case in chosen:
        python = interpreter(case.python, args.pythons)
        if python is None:
            print(f"{case.name}: no Python {case.python} on this machine, skipped")
            continue
        rows[case.name] = examine(case, python, args.directory.resolve(), args.tests, args.workers)
        print(json.dumps({case.name: rows[case.name]}, indent=1), flush=True)
        write_results(args.json, {"tests": args.tests, "environments": rows})
    bad = [name for name, row in rows.items() if row["starter"]["code"] or row.get("failed") or row.get("error")]
    print(f"not clean: {', '.join(bad)}" if bad else "every environment is clean")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
