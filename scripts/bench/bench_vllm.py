"""Training steps that sample in the trainer, on a vLLM server, and on the server one step ahead.

    python scripts/bench/bench_vllm.py [--python .venv-vllm/bin/python] [--case qwen2|starter]
                                 [--kinds transformers vllm ahead] [--repeats 2] [--steps 5] [--json PATH]

The models and shapes of bench_step.py; `vdr train` starts the server beside itself, on the same processors.
Kinds take turns. Printed: medians over all steps but a run's first, and ratios to sampling in the trainer.
scripts/build/vllm_cpu_env.sh makes the server's environment.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import bench_step
from harness import medians, parser_of, write_results

KINDS: dict[str, dict[str, Any]] = {
    "transformers": {"backend": "transformers"},
    "vllm": {"backend": "vllm"},
    "ahead": {"backend": "vllm", "ahead": 1},
}
SHOWN = ("step_time", "time/rollout", "time/update", "sampling/importance_sampling_ratio/mean")


def settings(case: bench_step.Case, folder: Path, model: str, steps: int) -> dict[str, Any]:
    return {
        "model": {"name": model},
        "data": {"name": str(folder / "prompts.jsonl")},
        "rollout": {"group_size": case.group, "max_new_tokens": case.new_tokens},
        "rewards": {"functions": [{"name": f"{folder / 'reward.py'}:digits"}]},
        "disagreement": {"mode": "none"},
        "grpo": {"importance_cap": 2.0},
        "train": {
            "steps": steps,
            "prompts_per_step": case.prompts,
            "micro_batch_size": case.micro_batch,
            "checkpoint_every": 0,
            "save_model": False,
        },
        "observe": {"tensorboard": False, "report": False, "completions_every": 0, "live": "off"},
    }


def one_run(config: dict[str, Any], folder: Path, name: str, threads: int) -> list[dict[str, float]]:
    """The metrics of each step of a `vdr train`."""
    file, output = folder / f"{name}.json", folder / name
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "vdr_cli", "train", str(file), "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def ratios(found: dict[str, list[dict[str, float]]], kind: str) -> list[float]:
    """The step over that of sampling in the trainer, repetition by repetition; empty where that was not run."""
    own = [run["step_time"] for run in found.get("transformers", [])]
    return [run["step_time"] / each for run, each in zip(found[kind], own, strict=False)]


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """A row a kind: medians over the repetitions, and the step over the trainer's own, repetition by repetition."""
    lines = [f"{'':13}{'step':>9}{'rollout':>9}{'update':>9}{'ratio':>8}   over sampling in the trainer"]
    for kind, runs in found.items():
        step, rollout, update = (statistics.median(run[key] for run in runs) for key in SHOWN[:3])
        against = ratios(found, kind)
        each = ", ".join(f"{ratio:.2f}" for ratio in against)
        shares = f"{statistics.median(against):8.2f}   ({each})" if against else ""
        lines.append(f"{kind:13}{step:7.2f} s{rollout:7.2f} s{update:7.2f} s{shares}")
    return "\n".join(lines)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="interpreter of the server's environment")
    parser.add_argument("--case", choices=["qwen2", "starter"], default="qwen2")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    case, found = bench_step.CASES[args.case], defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, prompts = bench_step.make_inputs(args.case, folder)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        (folder / "reward.py").write_text(bench_step.REWARD)
        for repeat, kind in itertools.product(range(args.repeats), args.kinds):
            config = settings(case, folder, model, args.steps)
            config["rollout"] |= KINDS[kind]
            if KINDS[kind]["backend"] == "vllm":
                config["rollout"]["vllm"] = {"python": args.python}
            metrics = one_run(config, folder, f"{kind}{repeat}", args.threads)
            found[kind].append(medians([{key: step.get(key, 0.0) for key in SHOWN} for step in metrics[1:]]))
            print(f"{kind:13}", {key: round(value, 3) for key, value in found[kind][-1].items()}, flush=True)
    print(f"\n{case.title}, {args.threads} threads, medians of {args.steps - 1} steps x {args.repeats} repetitions")
    print(table(found))
    write_results(args.json, {kind: {**medians(runs), "ratios": ratios(found, kind)} for kind, runs in found.items()})


if __name__ == "__main__":
    main()
