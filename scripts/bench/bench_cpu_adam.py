"""One AdamW step over parameters in the host's memory, as with zero3_offload: PyTorch's ways and DeepSpeed's CPU Adam.

Processor seconds per step, all threads together, and the largest difference of the weights from PyTorch's plain loop.
The ways take turns, so that the machine's moods fall on all of them. DeepSpeed compiles its operator at first use (a
C++ compiler and ninja are needed); `compile` is what that took, 0 where it was cached.
    python scripts/bench/bench_cpu_adam.py [--parameters 20_000_000] [--steps 5] [--json benchmarks/cpu_adam.json]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from harness import parser_of, seconds_of, write_results

from vdr_cli.engine import deepspeed_import

RATE = 1e-3
WAYS: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "torch": lambda weights: torch.optim.AdamW(weights, lr=RATE, foreach=False),
    "torch_foreach": lambda weights: torch.optim.AdamW(weights, lr=RATE, foreach=True),
    "torch_fused": lambda weights: torch.optim.AdamW(weights, lr=RATE, fused=True),
    "deepspeed_cpu_adam": lambda weights: deepspeed_import.module("ops.adam").DeepSpeedCPUAdam(
        weights, lr=RATE, weight_decay=1e-2, adamw_mode=True
    ),
}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--parameters", type=int, default=20_000_000)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(options.parameters, generator=generator) for _ in range(2))
    weights = {name: torch.nn.Parameter(start.clone()) for name in WAYS}
    results: dict[str, Any] = {"parameters": options.parameters, "threads": torch.get_num_threads()}
    optimizers = {}
    for name, build in WAYS.items():
        results[name] = {"compile": seconds_of(lambda: optimizers.update({name: build([weights[name]])}))[0]}  # noqa: B023
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.steps):
        for name, optimizer in optimizers.items():
            weights[name].grad = gradient
            times[name].append(seconds_of(optimizer.step)[1])
    for name in WAYS:
        results[name] |= {
            "cpu_seconds": statistics.median(times[name][1:]),
            "difference": float((weights[name] - weights["torch"]).abs().max().detach()),
        }
        print(name, results[name], flush=True)
    write_results(options.json, results)


if __name__ == "__main__":
    main()
