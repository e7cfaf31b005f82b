#!/usr/bin/env python3
"""SIGKILL to a random process of a run at a random moment, again and again; then resume and compare.

    scripts/verify/kill_test.py --kills 30 [--processes 2] [--output /tmp/vdr-kills] [--seed 0] [-- vdr train flags]
    sudo scripts/verify/kill_test.py --kills 30 --two-hosts      # half of them over hosts of cluster_hosts.py

The run that is killed would go on for many more steps than the undisturbed one makes, so one that does not notice is
not saved by its own end. Every second kill waits for a checkpoint that is being written; every step is one of two on
its rollout, each over several micro-batches. For each one: what was killed, where and when, the exit code, how long
until no process of the run was left, and whether the resumed run ended with the weights and losses of a run that
nobody disturbed, bit for bit. Prints a Markdown table; exit code 1 when any promise was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from harness import parser_of, write_results

STEPS, FOR_EVER = "20", "5000"
SMALL = [
    "train", "--steps", STEPS, "--set", "bonus.schedule=constant", "--set", "train.checkpoint_every=2",
    "--set", "train.prompts_per_step=4",
    "--group-size", "4", "--members", "2", "--set", "train.micro_batch_size=3", "--set", "grpo.num_iterations=2",
    "--set", "observe.tensorboard=false", "--set", "observe.report=false",
]  # fmt: skip
BOUND = 60.0
"""Seconds after a kill within which nothing of the run may be left: the default of launch.fault_timeout."""
TOO_LATE = "nobody: it had gone further than the undisturbed run"


@dataclass(frozen=True)
class Result:
    number: int
    place: str
    target: str
    moment: str
    exit_code: int | None
    seconds: float
    orphans: int
    resumed_from: str
    same_weights: bool
    same_losses: bool

    @property
    def kept(self) -> bool:
        whole = self.same_weights and self.same_losses
        return whole and self.exit_code != 0 and not self.orphans and self.seconds <= BOUND

    def row(self) -> str:
        code = "killed" if self.exit_code is None else str(self.exit_code)
        where = [self.number, self.place, self.target, self.moment]
        ended = [code, f"{self.seconds:.1f} s", self.orphans, self.resumed_from]
        flags = ["yes" if flag else "NO" for flag in (self.same_weights, self.same_losses)]
        return "| " + " | ".join(map(str, [*where, *ended, *flags])) + " |"


HEADER = (
    "| # | on | killed | when | exit code | all gone after | orphans | resumed from | same weights | same losses |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


HOSTS = Path(__file__).with_name("cluster_hosts.py")
OVER_HOSTS = ["--hostfile", "/tmp/vdr-hosts/hostfile", "--master-addr", "10.77.0.1"]
OVER_HOSTS += ["--set", "launch.env.GLOO_SOCKET_IFNAME=eth0"]


class Cluster:
    """The start of a run: on processes of this machine, or over two hosts from the first of them."""

    def __init__(self, processes: int, flags: list[str], two_hosts: bool = False) -> None:
        entry = [sys.executable, str(HOSTS), "exec", "h1"] if two_hosts else []
        places = OVER_HOSTS if two_hosts else ["--num-processes", str(processes)]
        self.command = [*entry, sys.executable, "-m", "vdr_cli", *SMALL, *places, *flags]
        self.name = "two hosts" if two_hosts else "one host"

    def start(self, directory: Path, *more: str) -> subprocess.Popen[bytes]:
        log = directory.with_suffix(".log").open("ab")
        return subprocess.Popen(
            [*self.command, "--output", str(directory), *more], stdout=log, stderr=log, start_new_session=True
        )


def members(directory: Path, supervisor: int) -> dict[int, str]:
    """Every process of this run on this machine, namespaces included: process id to what it is."""
    found: dict[int, str] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            command = " ".join(process.cmdline())
            environment = process.environ()
            if process.pid == supervisor:
                found[process.pid] = "supervisor"
            elif environment.get("VDR_RUN_DIRECTORY") == str(directory) or f"VDR_RUN_DIRECTORY={directory}" in command:
                found[process.pid] = role(command, environment)
    return found


def role(command: str, environment: dict[str, str]) -> str:
    if "vdr_cli.launch.tether" in command:
        return "tether"
    if "vdr_cli.launch.runner" in command:
        return "runner"
    if "pdsh" in command.split(" ")[0] or command.startswith("ssh") or "/ssh" in command.split(" ")[0]:
        return "pdsh" if "pdsh" in command.split(" ")[0] else "ssh"
    if "RANK" in environment and "vdr_cli" in command:
        return f"rank {environment['RANK']}"
    launchers = ("deepspeed.launcher.launch", "vdr_cli.launch.node")
    return "launcher" if any(name in command for name in launchers) else "helper"


def wait_for_moment(directory: Path, process: subprocess.Popen[bytes], while_saving: bool, delay: float) -> str:
    """Sleep until the moment of the kill, and name it."""
    if not while_saving:
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        return f"{delay:.1f} s after the start"
    wanted = 1 + int(delay) % 4
    seen: set[str] = set()
    while process.poll() is None and len(seen) < wanted:
        seen |= {path.name for path in directory.glob("checkpoints/.partial_*")}
        time.sleep(0.002)
    time.sleep(delay % 0.15)
    writing = [path.name for path in directory.glob("checkpoints/.partial_*")]
    return f"checkpoint {wanted} {'being written' if writing else 'just written'}"


def kill_once(cluster: Cluster, number: int, directory: Path, reference: Path, seconds: float) -> Result:
    choose = random.Random(f"{SEED}-{number}")
    process = cluster.start(directory, "--steps", FOR_EVER)
    moment = wait_for_moment(directory, process, number % 2 == 1, choose.uniform(0.1, 0.7) * seconds)
    running = members(directory, process.pid)
    by_role = {what: pid for pid, what in sorted(running.items(), reverse=True) if what != "helper"}
    target = choose.choice(sorted(by_role))
    with contextlib.suppress(ProcessLookupError):
        os.kill(by_role[target], 9)
    killed_at = time.monotonic()
    while time.monotonic() - killed_at < BOUND + 10:
        process.poll()
        left = {pid for pid in members(directory, process.pid) if pid != process.pid or process.poll() is None}
        if not left:
            break
        time.sleep(0.1)
    gone_after = time.monotonic() - killed_at
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    code = None if target == "supervisor" else process.wait()
    if steps_done(directory) > int(STEPS) and not left:
        target = TOO_LATE
    return finish(cluster, number, directory, reference, (target, moment, code, gone_after, len(left)))


def finish(
    cluster: Cluster, number: int, directory: Path, reference: Path, ended: tuple[str, str, int | None, float, int]
) -> Result:
    """Resume the run to its end and compare it with the one that nobody disturbed."""
    complete = sorted(path.name for path in directory.glob("checkpoints/step_*"))
    code = cluster.start(directory, "--resume", "auto").wait()
    same_weights = code == 0 and weights(directory) == weights(reference)
    same_losses = code == 0 and losses(directory) == losses(reference)
    return Result(number, cluster.name, *ended, complete[-1] if complete else "the start", same_weights, same_losses)


def steps_done(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return json.loads(path.read_text().splitlines()[-1])["step"] if path.exists() and path.stat().st_size else 0


def weights(directory: Path) -> str:
    return hashlib.sha256((directory / "model" / "model.safetensors").read_bytes()).hexdigest()


def losses(directory: Path) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["reward"], row["grad_norm"], row["entropy"]) for row in rows]


def main() -> None:
    global SEED
    parser = parser_of(__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--first", type=int, default=1, help="number of the first kill, to go on from")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--two-hosts", action="store_true", help="half of the kills over two hosts; needs root")
    parser.add_argument("--output", type=Path, default=Path("/tmp/vdr-kills"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    SEED = arguments.seed
    arguments.output.mkdir(parents=True, exist_ok=True)
    flags = [word for word in arguments.flags if word != "--"]
    clusters = [Cluster(arguments.processes, flags)]
    if arguments.two_hosts:
        subprocess.run([sys.executable, str(HOSTS), "up"], check=True)
        clusters.append(Cluster(arguments.processes, flags, two_hosts=True))
    reference = arguments.output.absolute() / "reference"
    started = time.monotonic()
    if not (reference / "finished.json").exists() and clusters[0].start(reference).wait():
        sys.exit(f"kill_test: the undisturbed run failed; see {reference}.log")
    seconds = json.loads(timing.read_text()) if (timing := arguments.output / "seconds.json").exists() else 0.0
    seconds = seconds or time.monotonic() - started
    timing.write_text(json.dumps(seconds))
    print(f"undisturbed: {seconds:.0f} s\n\n{HEADER}", flush=True)
    results = []
    for number in range(arguments.first, arguments.first + arguments.kills):
        directory = reference.with_name(f"kill_{number:02d}")
        cluster = clusters[number // 2 % len(clusters)]
        shutil.rmtree(directory, ignore_errors=True)
        while (result := kill_once(cluster, number, directory, reference, seconds)).target == TOO_LATE:
            seconds *= 0.8  # the machine is faster now than when the undisturbed run was timed
            shutil.rmtree(directory)
        results.append(result)
        print(results[-1].row(), flush=True)
    kept = sum(result.kept for result in results)
    print(f"\n{kept} of {len(results)} kept every promise")
    two_hosts = sum(result.place == "two hosts" for result in results)
    times = sorted(result.seconds for result in results)
    write_results(arguments.json, {"kills": len(results), "kept": kept, "two_hosts": two_hosts, "gone_after": times})
    sys.exit(kept != len(results))


SEED = 0

if __name__ == "__main__":
    main()
