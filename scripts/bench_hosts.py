#!/usr/bin/env python3
"""Throughput of the same run on one host and on two (scripts/cluster_hosts.py), and the bytes that went between them.

    sudo scripts/bench_hosts.py [--steps 20] [--output /tmp/vdr-bench-hosts] [-- vdr train flags]

One process on one host, two processes on one host, one process on each of two hosts; ZeRO-3 with every parameter
sharded. Tokens a second are the median over the steps after the first WARM_UP; the bytes are those that the second
host's network interface received in a step, beside the formula of `vdr plan`. Hosts are network namespaces here, so
they share the cores of this machine: two hosts against two processes is what the network and its stack cost.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HOSTS = Path(__file__).with_name("cluster_hosts.py")
ON_H1 = [sys.executable, str(HOSTS), "exec", "h1"]
RECEIVED_BY_H2 = Path("/sys/class/net/vdrh2/statistics/tx_bytes")  # this end of the cable sends what h2 receives
WARM_UP = 3
PROMPTS, GROUP, MICRO_BATCH = 16, 8, 32
TRAIN = [
    "train", "--mode", "end_of_sequence", "--set", f"train.prompts_per_step={PROMPTS}", "--group-size", str(GROUP),
    "--set", f"train.micro_batch_size={MICRO_BATCH}", "--set", "observe.tensorboard=false",
    "--set", "observe.report=false", "--set", "observe.completions_every=0", "--set", "train.save_model=false",
]  # fmt: skip
SHARDED = {
    "zero_optimization": {
        "stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
    }
}  # fmt: skip
PLACES = {
    "one host, one process": [],
    "one host, two processes": ["--num-processes", "2"],
    "two hosts, a process each": [
        "--hostfile", "/tmp/vdr-hosts/hostfile", "--master-addr", "10.77.0.1",
        "--set", "launch.env.GLOO_SOCKET_IFNAME=eth0",
    ],
}  # fmt: skip


def measure(command: list[str], directory: Path) -> tuple[list[dict[str, float]], list[int]]:
    """The lines of metrics.jsonl, and what h2 had received when each was there."""
    shutil.rmtree(directory, ignore_errors=True)
    metrics, received = directory / "metrics.jsonl", []
    with directory.with_suffix(".log").open("w") as log:
        process = subprocess.Popen([*ON_H1, *command, "--output", str(directory)], stdout=log, stderr=log)
        while process.poll() is None:
            done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            received += [int(RECEIVED_BY_H2.read_text())] * (done - len(received))
            time.sleep(0.01)
    if process.returncode:
        sys.exit(f"bench_hosts: a run failed; see {log.name}")
    return [json.loads(line) for line in metrics.read_text().splitlines()], received


def by_formula() -> float:
    """Bytes that one of two GPUs receives in a step."""
    from vdr_cli import plan
    from vdr_cli.starter.paths import model_path

    shape = plan.shape_of(json.loads((Path(model_path()) / "config.json").read_text()))
    work = plan.Work(gpus=2, element_bytes=4, prompts_per_step=PROMPTS, group_size=GROUP, micro_batch_size=MICRO_BATCH)
    return sum(plan.traffic(shape, work).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("/tmp/vdr-bench-hosts"))
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, str(HOSTS), "up"], check=True)
    (arguments.output / "sharded.json").write_text(json.dumps(SHARDED))
    shared = ["--steps", str(arguments.steps), "--ds-config", str(arguments.output / "sharded.json")]
    shared += [word for word in arguments.flags if word != "--"]
    print("| where | tokens/s | s a step | update, s | MB received by h2 a step |\n|---|---|---|---|---|", flush=True)
    for number, (name, place) in enumerate(PLACES.items()):
        command = [sys.executable, "-m", "vdr_cli", *TRAIN, *shared, *place]
        lines, received = measure(command, arguments.output / str(number))
        middle = {
            key: statistics.median(line[key] for line in lines[WARM_UP:])
            for key in ("tokens_per_second", "step_time", "time/update")
        }
        steps = len(received) - 1 - WARM_UP
        moved = (received[-1] - received[WARM_UP]) / steps / 1e6 if steps > 0 else 0.0
        numbers = [f"{value:.3g}" for value in middle.values()]
        print(f"| {name} | {' | '.join(numbers)} | {moved:.2f} |", flush=True)
    print(f"\nby the formula of vdr plan a process of two receives {by_formula() / 1e6:.2f} MB a step")


if __name__ == "__main__":
    main()
