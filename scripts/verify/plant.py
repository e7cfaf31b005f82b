"""Plants one fault at a time in a copy of the tree and shows which test finds it.

python scripts/verify/plant.py                      all of faults.py
python scripts/verify/plant.py --only 'betas,warm'  faults whose name has one of these words
python scripts/verify/plant.py --part 1/2           half of them, to run two at once
python scripts/verify/plant.py --new                those without a result
python scripts/verify/plant.py --check              only that every fault's text stands once in its file

The fault's own test directory is tried first, then those runs of the audit matrix that should see it
(tests/integration/options/test_audit_runs.py). Results go into docs/planted_faults.json and .md. Exit code 1 when a
fault survives.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
MATRIX = "tests/integration/options/test_audit_runs.py"
IMPORTED = (
    "pytest",
    "hypothesis",
    "torch",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.ops.op_builder.all_ops",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.auto.tokenization_auto",
    "transformers.integrations.deepspeed",
    "datasets",
    "peft",
    "pyarrow.parquet",
    "rich.console",
    "typer",
)
"""Large libraries that most tests wait for, and nothing of vdr."""
end = os._exit  # the tests may leave another one in its place
LIMIT = 900
"""Seconds for one command; a fault that makes tests hang is found, too."""


@dataclass(frozen=True)
class Outcome:
    fault: str
    file: str
    killed_by: str
    """The first test that failed; "": none did."""
    tier: str
    """unit, audit, or survived."""
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words, with commas")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th fault from the K-th, to run N at once")
    parser.add_argument("--new", action="store_true", help="only faults without a result")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if wrong := misplaced(FAULTS):
        sys.exit("\n".join(wrong))
    if given.check:
        print(f"{len(FAULTS)} faults, each in one place")
        return 0
    words, (part, parts) = [word for word in given.only.split(",") if word], map(int, given.part.split("/"))
    known = {outcome.fault for outcome in kept()} if given.new else set()
    named = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    chosen = [fault for fault in named if fault.name not in known][part - 1 :: parts]
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    for name in IMPORTED:
        importlib.import_module(name)
    folder = Path(tempfile.mkdtemp())
    try:
        tree = copied(folder / "tree")
        for fault in chosen:
            outcome = outcome_of(fault, tree)
            print(row_of(outcome), flush=True)
            write_page(kept(outcome))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(summary(kept()))
    return int(any(outcome.tier == "survived" for outcome in kept()))


def misplaced(faults: Sequence[Fault]) -> list[str]:
    """A line for each fault whose text does not stand exactly once: a fault is one change in one place."""
    files = {fault.file: ROOT / fault.file for fault in faults}
    texts = {name: path.read_text(encoding="utf-8") if path.is_file() else "" for name, path in files.items()}
    counts = [(fault, texts[fault.file].count(fault.old)) for fault in faults]
    return [f"{fault.name}: its text stands {count} times in {fault.file}" for fault, count in counts if count != 1]


def copied(tree: Path) -> Path:
    """The files that git knows or would add, as they are now."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


@contextmanager
def planted(fault: Fault, tree: Path) -> Iterator[None]:
    """The fault is in the tree inside the block."""
    path = tree / fault.file
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def outcome_of(fault: Fault, tree: Path) -> Outcome:
    started = time.monotonic()
    killed, tier = "", "survived"
    with planted(fault, tree):
        if fault.unit:
            killed, tier = first_failure(tree, fault.unit.split()), "unit"
        if not killed and fault.runs:
            killed, tier = first_failure(tree, [MATRIX], VDR_AUDIT_RUNS=fault.runs), "audit"
    return Outcome(fault.name, fault.file, killed, tier if killed else "survived", time.monotonic() - started)


def first_failure(tree: Path, tests: list[str], **more: str) -> str:
    """The first test that fails; "" when all pass.

    pytest runs in a fork of this process, which has imported the large libraries and nothing of vdr.
    """
    said = tree.parent / "said"
    child = os.fork()
    if child == 0:
        run_pytest(tree, tests, said, more)
    deadline = time.monotonic() + LIMIT
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"{tests[0]} (did not end)"
        time.sleep(0.1)
    code = os.waitstatus_to_exitcode(ended[1])
    if code in (0, 5):
        return ""
    lines = [line for line in said.read_text().splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split()[1] if lines else f"{tests[0]} (exit code {code})"


def run_pytest(tree: Path, tests: list[str], said: Path, more: dict[str, str]) -> NoReturn:
    """In the fork: the tests of the tree, to the first failure; does not return."""
    os.setsid()
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(tree)
    os.environ.update({"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", **more})
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(tree))
    code = 1
    try:
        import pytest

        options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not gpu and not browser"]
        code = int(pytest.main([*options, *tests]))
    finally:
        sys.stdout.flush()
        end(code)


def row_of(outcome: Outcome) -> str:
    test = f"`{outcome.killed_by}`" if outcome.killed_by else ""
    return f"| {outcome.fault} | `{outcome.file}` | {outcome.tier} | {test} |"


def summary(outcomes: list[Outcome]) -> str:
    counts = {tier: sum(outcome.tier == tier for outcome in outcomes) for tier in ("unit", "audit", "survived")}
    return (
        f"{len(outcomes)} faults: {counts['unit']} found by the tests of their own directory, {counts['audit']} by the "
        f"audit of a run, {counts['survived']} by none."
    )


def kept(outcome: Outcome | None = None) -> list[Outcome]:
    """Put this outcome into docs/planted_faults.json; returns all of it, in the order of faults.py."""
    path = ROOT / "docs" / "planted_faults.json"
    with path.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known = {entry["fault"]: Outcome(**entry) for entry in json.loads(file.read() or "[]")}
        if outcome is not None:
            known[outcome.fault] = outcome
        ordered = [known[fault.name] for fault in FAULTS if fault.name in known]
        file.truncate(0)
        file.write(json.dumps([asdict(each) for each in ordered], indent=1) + "\n")
    return ordered


def write_page(outcomes: list[Outcome]) -> None:
    """docs/planted_faults.md"""
    head = (
        "# Planted faults\n\nMade by `python scripts/verify/plant.py`. Each fault is one change in one place of the "
        "code, planted alone.\nThe tests of its own directory are tried first, then the audit of short runs.\n\n"
    )
    table = "| fault | file | found by | first test that fails |\n|---|---|---|---|\n"
    page = head + summary(outcomes) + "\n\n" + table + "\n".join(map(row_of, outcomes)) + "\n"
    (ROOT / "docs" / "planted_faults.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
