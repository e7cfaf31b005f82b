"""Profile of one training step at the shape of Qwen2.5-0.5B: the largest kernels and the share of time without one.

Collecting and updating are profiled apart; completions are short, because every kernel launch is recorded.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from common import device_of, dtype_of, model_directory, parser_of, write_result
from step import FULL, TOY, run_vdr, write_prompts
from torch.profiler import ProfilerActivity, profile

SHOWN = 15


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (begin, end) spans, in their unit."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def summary(recorded: Any, wall: float, on_gpu: bool) -> dict[str, Any]:
    """Seconds by kernel, the largest first, and the share of the wall time in which the device did nothing."""
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in recorded.events() if event.device_type == kind]
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        times[event.name] += event.time_range.elapsed_us() / 1e6
        calls[event.name] += 1
    busy = busy_seconds((event.time_range.start, event.time_range.end) for event in events) / 1e6
    largest = sorted(times, key=lambda name: -times[name])[:SHOWN]
    return {
        "wall_seconds": wall,
        "busy_seconds": busy,
        "idle_share": 1 - busy / wall,
        "launches": len(events),
        "kernels": [{"name": name[:120], "seconds": times[name], "calls": calls[name]} for name in largest],
    }


def profiled(call: Callable[..., Any], found: list[dict[str, Any]], on_gpu: bool) -> Callable[..., Any]:
    """The call, profiled from its second time on; the first warms up."""
    seen = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 1:
            return call(*args, **kwargs)
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            if on_gpu:
                torch.cuda.synchronize()
            wall = time.perf_counter() - began
        found.append(summary(recorded, wall, on_gpu))
        return result

    return wrapper


def main() -> None:
    args = parser_of(__doc__).parse_args()
    device = device_of(args.toy)
    case = TOY if args.toy else replace(FULL, prompts=2, new_tokens=32, steps=1)
    model = model_directory(case.shape, args.work, device, dtype_of(args.toy))
    prompts, output = args.work / "profile-prompts.jsonl", args.work / "profile-run"
    write_prompts(case, prompts)

    from vdr_cli import train as loop

    found: dict[str, list[dict[str, Any]]] = {"collect": [], "update": []}
    for name, into in found.items():
        setattr(loop, name, profiled(getattr(loop, name), into, device.type == "cuda"))
    run_vdr(case, model, prompts, output, "end_of_sequence", "float32" if args.toy else "bfloat16")
    phases = {name: into[0] for name, into in found.items()}
    headlines = []
    for name, numbers in phases.items():
        headlines.append(
            f"{name}: {numbers['wall_seconds']:.2f} s, device idle {numbers['idle_share']:.2f}, "
            f"{numbers['launches']} launches"
        )
        headlines += [f"  {k['seconds']:.3f} s {k['calls']:6} x {k['name'][:70]}" for k in numbers["kernels"][:5]]
    write_result(args.json, {"case": vars(case), "phases": phases, "headlines": headlines})


if __name__ == "__main__":
    main()
