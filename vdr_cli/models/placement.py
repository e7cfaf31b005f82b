"""The home of a reward model's weights. No torch: `vdr plan` decides it as a run does."""

from __future__ import annotations

from typing import Literal

Placement = Literal["device", "host", "sharded"]

SMALL = 0.05
"""Share of a device's memory up to which a reward model stays there, whole, while the policy updates."""


def placement(num_bytes: int, memory: int, is_sharded: bool, on_cpu: bool) -> Placement:
    """The home of a reward model's weights between two steps.

    device: whole, on every rank. sharded: each rank holds its share and all gather them to judge. host: in the host's
    memory, copied to the device to judge. num_bytes: of the weights. memory: bytes of the rank's device. is_sharded:
    the policy is sharded over several ranks (ZeRO-3), and full copies of it are made.
    """
    if num_bytes <= SMALL * memory:
        return "device"
    if is_sharded:
        return "sharded"
    return "device" if on_cpu else "host"
