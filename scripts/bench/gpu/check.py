"""The parts of scripts/gpu_check.sh: each is a process with a time limit and leaves one JSON file.

    python scripts/bench/gpu/check.py [--out benchmarks/gpu] [--only A,B] [--minutes 9] [--dry-run] [--again]

A part whose file says that it succeeded is not run again, so a check that was cut is resumed by the same command.
--dry-run runs every part at toy size on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
LEAST_SECONDS = 15.0
"""A part is not started with less time left than this."""


@dataclass(frozen=True)
class Part:
    """One measurement: a script of this directory with its arguments, and its limit in seconds."""

    name: str
    script: str
    arguments: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()
    """Python modules without which the part is skipped."""


def step(name: str, *arguments: str, needs: tuple[str, ...] = ()) -> Part:
    return Part(name, "step.py", arguments, 120, needs)


STAGES: tuple[tuple[Part, ...], ...] = (
    (Part("machine", "machine.py", (), 40),),
    # Neither of these is timed, so they share the GPU.
    (
        Part("tests", "tests.py", (), 150, ("pytest", "hypothesis")),
        Part("starter-bfloat16", "starter.py", ("--dtype", "bfloat16"), 120),
        Part("starter-float32", "starter.py", ("--dtype", "float32"), 120),
    ),
    (step("step-plain", "--side", "vdr", "--mode", "none"),),
    (step("step-bonus", "--side", "vdr", "--mode", "end_of_sequence"),),
    (step("step-trl", "--side", "trl", needs=("trl", "datasets")),),
    (step("step-zero2", "--side", "vdr", "--mode", "none", "--ds-config", "zero2"),),
    (step("step-zero2-micro64", "--side", "vdr", "--mode", "none", "--ds-config", "zero2", "--micro-batch", "64"),),
    (Part("decode", "decode.py", (), 120),),
    (Part("disagreement", "disagreement.py", (), 120),),
    (Part("profile", "profile_step.py", (), 90),),
)


@dataclass
class Check:
    """The place of results, and the time left."""

    out: Path
    work: Path
    deadline: float
    dry_run: bool

    def result_path(self, part: Part) -> Path:
        return self.out / f"{part.name}.json"

    def is_done(self, part: Part) -> bool:
        """True if the part's file says that it succeeded."""
        try:
            return bool(json.loads(self.result_path(part).read_text())["ok"])
        except (OSError, ValueError, KeyError, TypeError):
            return False


def start(check: Check, part: Part) -> subprocess.Popen[bytes] | None:
    """The part's process, in a process group of its own; None if it cannot run, with the reason on file."""
    missing = [name for name in part.needs if not has_module(name)]
    left = check.deadline - time.monotonic()
    if missing or left < LEAST_SECONDS:
        reason = f"needs {', '.join(missing)}" if missing else "no time left; run the check again"
        write_failure(check, part, 0.0, reason)
        return None
    command = [sys.executable, str(HERE / part.script), *part.arguments]
    command += ["--json", str(check.result_path(part)), "--work", str(check.work)]
    command += ["--toy"] if check.dry_run else []
    with (check.out / f"{part.name}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def has_module(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True).returncode == 0


def run_stage(check: Check, stage: Sequence[Part]) -> None:
    """Run the parts of a stage beside each other; stop each at its limit."""
    began = time.monotonic()
    running = {part: process for part in stage if (process := start(check, part)) is not None}
    while running:
        time.sleep(0.1)
        now = time.monotonic()
        for part, process in list(running.items()):
            limit = began + part.limit  # on a GPU: a dry run has all of the time, on whatever CPU there is
            late = now > (check.deadline if check.dry_run else min(limit, check.deadline))
            if process.poll() is None and not late:
                continue
            end_group(process)
            del running[part]
            conclude(check, part, process.returncode, now - began, late)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever the part has left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def conclude(check: Check, part: Part, code: int, seconds: float, late: bool) -> None:
    """Add the part's status to its file, or write one that holds the reason of its failure."""
    path = check.result_path(part)
    if code != 0 or late or not path.is_file():
        log = (check.out / f"{part.name}.log").read_text(errors="replace")[-3000:]
        reason = f"stopped at its limit after {seconds:.0f} s" if late else f"exit code {code}"
        partial = json.loads(path.read_text()) if path.is_file() else {}
        write_failure(check, part, seconds, reason, log, partial)
        return
    result = json.loads(path.read_text())
    result |= {"part": part.name, "ok": result.get("ok", True), "part_seconds": round(seconds, 1)}
    path.write_text(json.dumps(result, indent=1) + "\n")


def write_failure(
    check: Check, part: Part, seconds: float, reason: str, log: str = "", partial: dict[str, Any] | None = None
) -> None:
    result = (partial or {}) | {"part": part.name, "ok": False, "reason": reason, "part_seconds": round(seconds, 1)}
    if log:
        result["log"] = log
    check.result_path(part).write_text(json.dumps(result, indent=1) + "\n")


def report(check: Check, parts: Sequence[Part]) -> str:
    """One table: status, seconds and headline numbers of each part."""
    lines = [f"{'part':20}{'status':9}{'s':>6}  numbers"]
    for part in parts:
        path = check.result_path(part)
        if not path.is_file():
            lines.append(f"{part.name:20}{'not run':9}")
            continue
        result = json.loads(path.read_text())
        status = "ok" if result["ok"] else "FAILED"
        first, *rest = headlines(result) or [result.get("reason", "")]
        lines.append(f"{part.name:20}{status:9}{result['part_seconds']:6.0f}  {first}")
        lines += [f"{'':37}{line}" for line in rest]
    return "\n".join(lines)


def headlines(result: dict[str, Any]) -> list[str]:
    lines = [str(line) for line in result.get("headlines", [])]
    return lines if result["ok"] or not lines else [*lines, result.get("reason", "")]


def chosen_parts(only: str | None) -> Iterator[tuple[Part, ...]]:
    names = {part.name for stage in STAGES for part in stage}
    wanted = names if only is None else set(only.split(","))
    if unknown := wanted - names:
        raise SystemExit(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    for stage in STAGES:
        if kept := tuple(part for part in stage if part.name in wanted):
            yield kept


def summarise(check: Check, parts: Sequence[Part], path: Path) -> None:
    """All results in one file of the form that benchmarks/ holds, without logs."""
    found = {part.name: json.loads(check.result_path(part).read_text()) for part in parts if check.is_done(part)}
    hidden = {"log", "headlines", "part", "ok", "steps", "failed"}
    results = {
        name.replace("-", "_"): {key: value for key, value in result.items() if key not in hidden}
        for name, result in found.items()
    }
    card = found.get("machine", {}).get("card", "unknown")
    record = {
        "command": "bash scripts/gpu_check.sh",
        "provenance": f"measured on one {card}, all parts in one run",
        "machine": {"description": f"one {card}, {os.cpu_count()} CPU cores"}
        | found.get("machine", {}).get("versions", {}),
        "results": results,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu")
    parser.add_argument("--only", help="parts, separated by commas (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--again", action="store_true", help="also run parts that succeeded before")
    parser.add_argument("--summary", type=Path, help="also write all results to this file")
    args = parser.parse_args()
    stages = list(chosen_parts(args.only))
    args.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="vdr_gpu_check_"))
    check = Check(args.out.resolve(), work, time.monotonic() + 60 * args.minutes, args.dry_run)
    try:
        for stage in stages:
            left = [part for part in stage if args.again or not check.is_done(part)]
            for part in left:
                check.result_path(part).unlink(missing_ok=True)
            run_stage(check, left)
            print("\n".join(report(check, left).splitlines()[1:]), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    parts = [part for stage in stages for part in stage]
    print("\n" + report(check, parts))
    if args.summary:
        summarise(check, parts, args.summary)
    raise SystemExit(0 if all(check.is_done(part) for part in parts) else 1)


if __name__ == "__main__":
    main()
