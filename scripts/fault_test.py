#!/usr/bin/env python3
"""Hosts that vanish and networks that are cut, in a run over the hosts of scripts/cluster_hosts.py.

    sudo scripts/fault_test.py [--output /tmp/vdr-faults] [--repeats 2] [--timeout 20]

For each fault: in which phase of the step it was noticed, the exit code, how long until no process of the
run was left on any host, and whether the run that went on (or was resumed) ended with the weights of one
that nobody disturbed. A cut of 10 s is to be survived. Prints a Markdown table; exit code 1 when any
promise was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import kill_test

HOSTS = Path(__file__).with_name("cluster_hosts.py")
CASES = {
    "host lost": (["lose", "h2"], None),
    "network cut for good": (["cut", "h2"], None),
    "network cut for 10 s": (["cut", "h2"], 10.0),
}
GRACE = 15.0
"""Seconds on top of the timeout: pdsh, ssh and the launchers of two hosts have to notice one after the other."""


def hosts(*words: str) -> None:
    subprocess.run([sys.executable, str(HOSTS), *words], check=True)


class OnHosts:
    """Starts vdr on h1 over both hosts."""

    def __init__(self, timeout: float, flags: list[str]) -> None:
        places = ["--hostfile", "/tmp/vdr-hosts/hostfile", "--master-addr", "10.77.0.1"]
        env = ["--set", "launch.env.GLOO_SOCKET_IFNAME=eth0", "--set", f"launch.fault_timeout={timeout}"]
        self.command = [sys.executable, str(HOSTS), "exec", "h1", sys.executable, "-m", "vdr_cli"]
        self.command += [*kill_test.SMALL, *places, *env, *flags]

    def start(self, directory: Path, *more: str) -> subprocess.Popen[bytes]:
        log = directory.with_suffix(".log").open("ab")
        return subprocess.Popen(
            [*self.command, "--output", str(directory), *more], stdout=log, stderr=log, start_new_session=True
        )


def one(cluster: OnHosts, case: str, number: int, directory: Path, reference: Path, timeout: float) -> tuple[str, bool]:
    """Start, wait for a random step, break, measure, resume, compare: a table row and whether all was kept."""
    choose = random.Random(f"{case}-{number}")
    shutil.rmtree(directory, ignore_errors=True)
    hosts("up")
    process = cluster.start(directory)
    steps = choose.randint(1, 8)
    while process.poll() is None and len(lines(directory)) < steps:
        time.sleep(0.02)
    time.sleep(choose.uniform(0, 1.5))
    broken_at = time.monotonic()
    action, mend_after = CASES[case]
    hosts(*action)
    if mend_after:
        time.sleep(mend_after)
        hosts("join", "h2")
        code, left = process.wait(), []
    else:
        left = wait_until_gone(directory, process, timeout + GRACE + 30)
        code = process.wait()
    seconds = time.monotonic() - broken_at
    said = directory.with_suffix(".log").read_text(errors="replace")
    phase = re.search(r"vdr: host \S+ rank \d+, during ([a-z_]+): (.*)", said)
    hosts("up")
    resumed = "-" if code == 0 else str(cluster.start(directory, "--resume", "auto").wait())
    same = kill_test.weights(directory) == kill_test.weights(reference)
    survived = mend_after is not None
    kept = same and not left and ((code == 0) == survived) and (survived or seconds <= timeout + GRACE)
    where = phase[1] if phase else "-"
    what = phase[2][:90] if phase else "went on" if code == 0 else "-"
    cells = [case, steps, where, code, f"{seconds:.1f} s", len(left), what, resumed, "yes" if same else "NO"]
    return "| " + " | ".join(map(str, cells)) + " |", kept


def wait_until_gone(directory: Path, process: subprocess.Popen[bytes], most: float) -> list[int]:
    """Until no process of the run is left anywhere; those that stayed are killed and returned."""
    deadline = time.monotonic() + most
    while time.monotonic() < deadline:
        process.poll()
        left = [pid for pid in kill_test.members(directory, process.pid) if pid != process.pid]
        if not left and process.poll() is not None:
            return []
        time.sleep(0.2)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    return left


def lines(directory: Path) -> list[str]:
    metrics = directory / "metrics.jsonl"
    return metrics.read_text().splitlines() if metrics.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("/tmp/vdr-faults"))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=20.0, help="launch.fault_timeout of the runs, seconds")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    hosts("up")
    cluster = OnHosts(arguments.timeout, [word for word in arguments.flags if word != "--"])
    reference = arguments.output.absolute() / "reference"
    if not (reference / "finished.json").exists() and cluster.start(reference).wait():
        sys.exit(f"fault_test: the undisturbed run failed; see {reference}.log")
    print("| fault | after step | noticed in | exit code | all gone after | orphans | said | resumed | same weights |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    kept = []
    for case in CASES:
        for number in range(arguments.repeats):
            directory = reference.with_name(f"{case.replace(' ', '_')}_{number}")
            row, good = one(cluster, case, number, directory, reference, arguments.timeout)
            kept.append(good)
            print(row, flush=True)
    print(f"\n{sum(kept)} of {len(kept)} kept every promise")
    sys.exit(not all(kept))


if __name__ == "__main__":
    main()
