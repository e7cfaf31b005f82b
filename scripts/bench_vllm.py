"""Training steps that sample in the trainer, on a vLLM server, and on the server one step ahead.

    python scripts/bench_vllm.py [--python .venv-vllm/bin/python] [--case qwen2|starter] [--steps 10] [--threads 2]
                                 [--kinds transformers vllm ahead]

The models and shapes of scripts/bench_step.py; `vdr train` starts the server beside itself, on the same processors.
Printed: medians over all steps but the first, and ratios to sampling in the trainer. scripts/vllm_cpu_env.sh makes the
server's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_step

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="interpreter of the server's environment")
    parser.add_argument("--case", choices=["qwen2", "starter"], default="qwen2")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    case, found = bench_step.CASES[args.case], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, prompts = bench_step.make_inputs(args.case, folder)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        (folder / "reward.py").write_text(bench_step.REWARD)
        for kind in args.kinds:
            rollout = KINDS[kind]
            config = settings(case, folder, model, args.steps)
            config["rollout"] |= rollout
            if rollout["backend"] == "vllm":
                config["rollout"]["vllm"] = {"python": args.python}
            metrics = one_run(config, folder, kind, args.threads)
            found[kind] = {key: statistics.median(step.get(key, 0.0) for step in metrics[1:]) for key in SHOWN}
            print(f"{kind:13}", {key: round(value, 3) for key, value in found[kind].items()}, flush=True)
    if "transformers" in found:
        own = found["transformers"]["step_time"]
        print("over transformers'", {kind: round(each["step_time"] / own, 2) for kind, each in found.items()})


if __name__ == "__main__":
    main()
