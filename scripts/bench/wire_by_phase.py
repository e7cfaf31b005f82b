"""The embedded task's reward for scripts/bench/bench_hosts.py: a reward function, so that it is loaded in every rank.

In rank 1 each phase's name is noted together with what the network interface has received so far: a line of JSON a
step in the file WIRE, bytes by phase. `step` is what lies between two phases: the weights' gather before the rollout.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from vdr_cli.beds.countdown import countdown

RECEIVED = Path("/sys/class/net/eth0/statistics/rx_bytes")


def follow(wire: Path) -> None:
    """Count by phase from now on; a step ends where the next one begins."""
    from vdr_cli.launch import watchdog

    original = watchdog.phase
    bytes_of: Counter[str] = Counter()
    phase, before = "start", int(RECEIVED.read_text())

    def noted(name: str) -> None:
        nonlocal phase, before
        now = int(RECEIVED.read_text())
        bytes_of[phase] += now - before
        if name == "step":
            with wire.open("a") as file:
                file.write(json.dumps(bytes_of) + "\n")
            bytes_of.clear()
        phase, before = name, now
        original(name)

    watchdog.phase = noted


if "WIRE" in os.environ and os.environ.get("RANK") == "1" and RECEIVED.exists():
    follow(Path(os.environ["WIRE"]))

__all__ = ["countdown"]
