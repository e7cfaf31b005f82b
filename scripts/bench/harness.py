"""Shared by the benchmarks and checks: clocks, cases in processes of their own, and results as JSON.

A result file in benchmarks/ says how its numbers came about: {command, provenance, date, commit, machine, versions,
results}. scripts/build/tables.py makes the tables of README and docs from them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "deepspeed", "trl", "vllm")
DIGITS = 4
"""Significant digits kept in a result file: the machine's moods move the third."""


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The docstring as help, and --json."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here: benchmarks/NAME.json")
    return parser


def write_results(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write a result file with what is needed to judge and repeat it. None: nothing is written."""
    if path is None:
        return
    record = {
        "command": command_line(),
        "provenance": "measured",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "results": rounded(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def command_line() -> str:
    """The command typed, without --json, and with the script's path inside the repository."""
    words, skip = [], False
    for word in sys.argv[1:]:
        if not skip and not word.startswith("--json="):
            skip = word == "--json"
            words += [] if skip else [word]
        else:
            skip = False
    script = Path(sys.argv[0]).resolve()
    return shlex.join(["python", str(script.relative_to(ROOT) if script.is_relative_to(ROOT) else script), *words])


def commit() -> str | None:
    """The short hash, with a + when tracked files differ from it; None outside a git checkout."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None


def machine() -> dict[str, Any]:
    """Processor, cores, memory in GB, and GPUs when torch sees some."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    found = {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gb": round(memory, 1), "system": platform.system()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """Python's, and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def rounded(value: Any) -> Any:
    """The same tree with floats at DIGITS significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def seconds_of(call: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """(wall, processor) seconds of a call; the second counts all threads, and is steadier on a shared machine."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    call()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - begin_cpu


def in_own_process(script: str, *arguments: str) -> dict[str, float]:
    """Run the script with these arguments; the JSON of its last line. SystemExit with its last words if it fails."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {shlex.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of every key over runs that have the same ones."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}
