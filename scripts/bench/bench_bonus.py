"""A whole training step of `vdr train` with the default bonus beside one without.

    python scripts/bench/bench_bonus.py [--rounds 3] [--threads 2]

The model and shapes of bench_step.py: 66.6M parameters, 2 prompts x 8 completions of 64 tokens after 128, every other
setting at its default. Each run is a process of its own, the two take turns; medians, and their ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

STEPS = 4
"""Of a run; the first one warms up."""


def one_run(bonus: bool) -> dict[str, float]:
    """Medians of a step's phases."""
    import bench_step

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, prompts = bench_step.make_inputs("qwen2", folder)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        (folder / "reward.py").write_text(bench_step.REWARD)
        steps = bench_step.run_vdr(bench_step.CASES["qwen2"], folder, model, STEPS, bonus, "zero3")
    return {key: statistics.median(step[key] for step in steps[1:]) for key in steps[0]}


def measured(rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """The phases of a step, "with" and "without" bonus."""
    found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(rounds):
        for which, runs in found.items():
            command = [sys.executable, __file__, "--one", which, "--threads", str(threads)]
            finished = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(finished.stdout.splitlines()[-1]))
            print(f"step {which:8}", {name: round(value, 2) for name, value in runs[-1].items()}, flush=True)
    return {which: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for which, runs in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=["with", "without"], help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.one:
        import torch

        torch.set_num_threads(arguments.threads)
        print(json.dumps(one_run(arguments.one == "with")))
        return
    found = measured(arguments.rounds, arguments.threads)
    for key in found["with"]:
        print(f"{key:10} {found['without'][key]:8.2f} {found['with'][key]:8.2f}")
    ratios = {key: found["with"][key] / found["without"][key] for key in ("step", "step_cpu")}
    print(f"with over without: {ratios['step']:.3f} (CPU {ratios['step_cpu']:.3f}); asked: at most 1.25")


if __name__ == "__main__":
    main()
