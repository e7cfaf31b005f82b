#!/usr/bin/env python3
"""Throughput of one run on one host and on two (scripts/verify/cluster_hosts.py), and the bytes between them.

    sudo scripts/bench/bench_hosts.py [--steps 20] [--output /tmp/vdr-bench-hosts] [--json PATH] [-- flags]

One process on one host, two processes on one host, one process on each of two hosts; ZeRO-3 with every parameter
sharded. Tokens per second are the median over the steps after the first WARM_UP. Bytes are what the network interface
of the second host received in a step, by phase (wire_by_phase.py), beside the formula of `vdr plan` for gloo. Hosts are
network namespaces, so they share the cores of this machine: two hosts against two processes is what the network and its
stack cost. Exit code 1 when formula and measurement differ by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from harness import medians, parser_of, write_results

HOSTS = Path(__file__).resolve().parents[1] / "verify" / "cluster_hosts.py"
ON_H1 = [sys.executable, str(HOSTS), "exec", "h1"]
WIRE = Path(__file__).with_name("wire_by_phase.py")
WARM_UP = 3
TOLERANCE = 0.10
SHOWN = ("tokens_per_second", "step_time", "time/update")
PROMPTS, GROUP, MICRO_BATCH = 16, 8, 32
TRAIN = [
    "train", "--mode", "end_of_sequence", "--set", f"train.prompts_per_step={PROMPTS}", "--group-size", str(GROUP),
    "--set", f"train.micro_batch_size={MICRO_BATCH}", "--set", "observe.tensorboard=false",
    "--set", "observe.report=false", "--set", "observe.completions_every=0", "--set", "train.save_model=false",
    "--reward", f"{WIRE}:countdown",
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


def measure(command: list[str], directory: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    shutil.rmtree(directory, ignore_errors=True)
    with directory.with_suffix(".log").open("w") as log:
        ended = subprocess.run([*ON_H1, *command, "--output", str(directory)], stdout=log, stderr=log, check=False)
    if ended.returncode:
        sys.exit(f"bench_hosts: a run failed; see {log.name}")
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def received(wire: Path) -> dict[str, float]:
    """Bytes that the second host received in a step, the median over steps, by phase."""
    steps = [json.loads(line) for line in wire.read_text().splitlines()][WARM_UP:]
    in_update = statistics.median(step.get("update", 0) for step in steps)
    whole = statistics.median(sum(step.values()) for step in steps)
    return {"rollout and disagreement": whole - in_update, "update": in_update}


def by_formula() -> dict[str, float]:
    """Bytes that one of two processes receives in a step."""
    from vdr_cli.beds.registry import BEDS
    from vdr_cli.planning import resources as plan
    from vdr_cli.planning.shape import shape_of
    from vdr_cli.planning.work import Work

    shape = shape_of(json.loads((Path(BEDS["starter"].model_path) / "config.json").read_text()))
    work = Work(
        gpus=2, element_bytes=4, prompts_per_step=PROMPTS, group_size=GROUP, micro_batch_size=MICRO_BATCH, gloo=True
    )
    return plan.traffic(shape, work)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("/tmp/vdr-bench-hosts"))
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, str(HOSTS), "up"], check=True)
    (arguments.output / "sharded.json").write_text(json.dumps(SHARDED))
    shared = ["--steps", str(arguments.steps), "--ds-config", str(arguments.output / "sharded.json")]
    shared += [word for word in arguments.flags if word != "--"]
    wire = arguments.output / "wire.jsonl"
    places: dict[str, dict[str, float]] = {}
    print("| where | tokens/s | s per step | update, s |\n|---|---|---|---|", flush=True)
    for number, (name, place) in enumerate(PLACES.items()):
        command = [sys.executable, "-m", "vdr_cli", *TRAIN, *shared, *place]
        wire.unlink(missing_ok=True)
        lines = measure([*command, "--set", f"launch.env.WIRE={wire}"], arguments.output / str(number))
        middle = medians([{key: line[key] for key in SHOWN} for line in lines[WARM_UP:]])
        places[name] = middle
        print(f"| {name} | {' | '.join(f'{value:.3g}' for value in middle.values())} |", flush=True)
    print("\n| MB to the second host a step | measured | formula | formula / measured |\n|---|---|---|---|")
    found, expected = received(wire), by_formula()
    for phase, size in found.items():
        print(f"| {phase} | {size / 1e6:.2f} | {expected[phase] / 1e6:.2f} | {expected[phase] / size:.3f} |")
    megabytes = {phase: {"measured": size / 1e6, "formula": expected[phase] / 1e6} for phase, size in found.items()}
    write_results(arguments.json, {"places": places, "megabytes": megabytes})
    sys.exit(any(abs(expected[phase] / size - 1) > TOLERANCE for phase, size in found.items()))


if __name__ == "__main__":
    main()
