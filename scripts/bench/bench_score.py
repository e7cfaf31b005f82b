"""Rows per second, peak memory and kill -9 survival of `vdr score` on the starter.

    python scripts/bench/bench_score.py --rows 1000000 --tokens 16 --members 0 --kills 5 [--json PATH]

Makes a file of random expressions, scores it in a process of its own, kills that process at random moments, resumes,
and checks that the output has every row once, in order.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from harness import parser_of, write_results

from vdr_cli.beds.registry import BEDS
from vdr_cli.scoring.sources import WINDOW_ROWS


def main() -> None:
    arguments = parse()
    if arguments.folder is not None:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        given, output = Path(folder) / "rows.jsonl", Path(folder) / "scores.jsonl"
        make_rows(given, arguments.rows, arguments.tokens)
        command = [sys.executable, "-m", "vdr_cli", "score", str(given), "--model", "starter", "-o", str(output)]
        command += ["--members", str(arguments.members), "--resume"]
        generator = random.Random(0)
        parts = Path(folder) / "scores.jsonl.parts"
        for kill in range(arguments.kills):
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_for_progress(process, parts)
            time.sleep(generator.uniform(0, arguments.kill_within))
            process.kill()
            process.wait()
            print(f"kill -9 number {kill + 1}: {windows(parts)} windows done", flush=True)
        before = windows(parts) * WINDOW_ROWS
        seconds, memory = watched(command)
        print(f"last stretch: {(arguments.rows - before) / seconds:,.0f} rows/s with start-up")
        for share, megabytes in memory:
            print(f"  at {share:.0%} of its time: {megabytes:,.0f} MiB")
        check(output, arguments.rows)
        results = {"rows": arguments.rows, "members": arguments.members, "kills": arguments.kills}
        results["rows_per_second"] = (arguments.rows - before) / seconds
        results["memory_mib"] = {"least": min(used for _, used in memory), "most": max(used for _, used in memory)}
        write_results(arguments.json, results)


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--members", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--kill-within", type=float, default=10.0, help="Seconds after the first new window.")
    parser.add_argument("--folder", default=None, help="Where the files go; default: the system's temporary folder.")
    return parser.parse_args()


def make_rows(path: Path, rows: int, tokens: int) -> None:
    generator = random.Random(0)
    prompts = [row["prompt"] for row in BEDS["starter"].rows("train")]
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            completion = "".join(generator.choices("0123456789+-*", k=tokens))
            file.write(json.dumps({"id": index, "prompt": generator.choice(prompts), "completion": completion}) + "\n")


def windows(parts: Path) -> int:
    return len(list(parts.glob("part-*.jsonl")))


def wait_for_progress(process: subprocess.Popen[bytes], parts: Path) -> None:
    before = windows(parts)
    while windows(parts) == before:
        if process.poll() is not None:
            raise SystemExit(f"vdr score ended by itself with {process.returncode}")
        time.sleep(0.05)


def watched(command: list[str]) -> tuple[float, list[tuple[float, float]]]:
    """Seconds, and resident memory in MiB at tenths of them."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    inside = psutil.Process(process.pid)
    samples: list[float] = []
    while process.poll() is None:
        try:
            samples.append(inside.memory_info().rss / 2**20 or samples[-1])  # 0 once it has ended
        except psutil.NoSuchProcess:
            break
        time.sleep(0.5)
    if process.wait() != 0:
        raise SystemExit(f"vdr score ended with {process.returncode}")
    tenths = [int(share / 10 * (len(samples) - 1)) for share in range(1, 11)]
    return time.monotonic() - started, [((at + 1) / len(samples), samples[at]) for at in tenths]


def check(output: Path, rows: int) -> None:
    with output.open(encoding="utf-8") as file:
        count = -1
        for count, line in enumerate(file):
            row = json.loads(line)
            if row["id"] != count or row["nll_sum"] is None:
                raise SystemExit(f"row {count} of the output is {row['id']}")
    if count + 1 != rows:
        raise SystemExit(f"{count + 1} rows of {rows}")
    print(f"{rows:,} rows, each once, in order")


if __name__ == "__main__":
    main()
