#!/usr/bin/env python3
"""Hosts that vanish and networks that are cut, in a run over two hosts made by scripts/verify/cluster_hosts.py.

    sudo scripts/verify/fault_test.py [--output /tmp/vdr-faults] [--timeout 10]

Each fault in each of rollout, reward, backward and checkpoint: the ranks stop in the phase (fault_phases.py),
the fault is made, and they go on into it. Shown are where the fault was noticed, the exit code, how long until no
process of the run was left on any host, and whether the run that went on, or was resumed, ended with the weights of
one that nobody disturbed. A cut of 10 s is to be survived (launch.fault_timeout is 30 s there). Prints a Markdown
table; exit code 1 when any promise was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
sys.path.insert(0, str(Path(__file__).parent))
import kill_test
from harness import parser_of, write_results

HOSTS = Path(__file__).with_name("cluster_hosts.py")
REWARD = Path(__file__).with_name("fault_phases.py")
PHASES = {"rollout": 3, "reward": 3, "backward": 11, "checkpoint": 2}
"""Each phase, and the how manieth of the run is hit: in the third rollout of four, in the second micro-batch of the
second optimizer step on the second rollout, in the second checkpoint."""
SHORT_CUT = 10.0
GRACE = 15.0
"""Seconds on top of the timeout: pdsh, ssh and the launchers of two hosts have to notice one after the other."""
COLUMNS = ("fault", "during", "noticed in", "said", "exit code", "gone after", "left", "resumed", "same weights")
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


@dataclass(frozen=True)
class Fault:
    name: str
    action: tuple[str, str]
    mended_after: float | None = None


FAULTS = (
    Fault("host lost", ("lose", "h2")),
    Fault("network cut for good", ("cut", "h2")),
    Fault("network cut for 10 s", ("cut", "h2"), SHORT_CUT),
)


def hosts(*words: str) -> None:
    subprocess.run([sys.executable, str(HOSTS), *words], check=True)


class OnHosts:
    """Starts vdr on h1 over both hosts."""

    def __init__(self, flags: list[str]) -> None:
        places = ["--hostfile", "/tmp/vdr-hosts/hostfile", "--master-addr", "10.77.0.1"]
        env = ["--set", "launch.env.GLOO_SOCKET_IFNAME=eth0", "--set", "launch.check_hosts=false"]
        self.command = [sys.executable, str(HOSTS), "exec", "h1", sys.executable, "-m", "vdr_cli", *kill_test.SMALL]
        self.command += ["--steps", "8", "--reward", f"{REWARD}:countdown"]
        self.command += [*places, *env, *flags]

    def start(self, directory: Path, *more: str) -> subprocess.Popen[bytes]:
        log = directory.with_suffix(".log").open("ab")
        command = [*self.command, "--output", str(directory), *more]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def one(
    cluster: OnHosts, fault: Fault, phase: str, directory: Path, reference: Path, timeout: float
) -> tuple[dict[str, Any], bool]:
    """Start, wait for the phase, break, measure, resume, compare: a row of COLUMNS and whether all was kept."""
    survived = fault.mended_after is not None
    timeout = max(timeout, 3 * SHORT_CUT) if survived else timeout
    meeting = directory.with_suffix(".phase")
    for folder in (directory, meeting):
        shutil.rmtree(folder, ignore_errors=True)
    directory.with_suffix(".log").unlink(missing_ok=True)
    meeting.mkdir()
    hosts("up")
    env = {"FAULT_PHASE": f"{phase}-{PHASES[phase]}", "FAULT_FOLDER": str(meeting)}
    held = [word for name, value in env.items() for word in ("--set", f"launch.env.{name}={value}")]
    process = cluster.start(directory, *held, "--set", f"launch.fault_timeout={timeout}")
    while process.poll() is None and len(list(meeting.iterdir())) < 2:
        time.sleep(0.02)
    broken_at = time.monotonic()
    hosts(*fault.action)
    (meeting / "broken").touch()
    if fault.mended_after is not None:
        time.sleep(fault.mended_after)
        hosts("join", "h2")
    left = wait_until_gone(directory, process, 120.0 if survived else timeout + GRACE + 30)
    code, seconds = process.wait(), time.monotonic() - broken_at
    noticed, said = first_word(directory)
    hosts("up")
    resumed = "-" if code == 0 else str(cluster.start(directory, "--resume", "auto").wait())
    same = resumed in ("-", "0") and kill_test.weights(directory) == kill_test.weights(reference)
    kept = same and not left and ((code == 0) == survived) and (survived or seconds <= timeout + GRACE)
    gone = None if code == 0 else round(seconds, 1)
    cells = [fault.name, phase, noticed, said, code, gone, len(left), resumed, same]
    return dict(zip(COLUMNS, cells, strict=True)), kept


def first_word(directory: Path) -> tuple[str, str]:
    """The phase and reason in the first line that a watchdog left."""
    log = directory.with_suffix(".log").read_text(errors="replace")
    found = re.search(r"vdr: host \S+ rank \d+, during ([a-z_]+): (.*)", log)
    return (found[1], found[2][:80]) if found else ("-", "-")


def wait_until_gone(directory: Path, process: subprocess.Popen[bytes], most: float) -> list[int]:
    """Until no process of the run is left anywhere; those that stayed are killed and returned."""
    deadline = time.monotonic() + most
    while time.monotonic() < deadline:
        process.poll()
        left = [pid for pid in kill_test.members(directory, process.pid) if pid != process.pid]
        if not left and process.poll() is not None:
            return []
        time.sleep(0.2)
    for pid in [*left, process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    return left or [process.pid]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--output", type=Path, default=Path("/tmp/vdr-faults"))
    parser.add_argument("--timeout", type=float, default=10.0, help="launch.fault_timeout of the runs, seconds")
    parser.add_argument("--phase", choices=list(PHASES), action="append", help="only this one; repeatable")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    hosts("up")
    cluster = OnHosts([word for word in arguments.flags if word != "--"])
    reference = arguments.output.absolute() / "reference"
    shutil.rmtree(reference, ignore_errors=True)
    if cluster.start(reference).wait():
        sys.exit(f"fault_test: the undisturbed run failed; see {reference}.log")
    print(HEADER, flush=True)
    kept, rows = [], []
    for fault in FAULTS:
        for phase in arguments.phase or PHASES:
            directory = reference.with_name(f"{fault.name.replace(' ', '_')}_{phase}")
            row, good = one(cluster, fault, phase, directory, reference, arguments.timeout)
            kept.append(good)
            rows.append(row)
            print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
    print(f"\n{sum(kept)} of {len(kept)} kept every promise")
    write_results(arguments.json, {"rows": rows})
    sys.exit(not all(kept))


if __name__ == "__main__":
    main()
