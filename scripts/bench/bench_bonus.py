"""A whole training step of `vdr train` with the default bonus beside one without.

    python scripts/bench/bench_bonus.py [--rounds 3] [--threads 2] [--json PATH]

The model and shapes of bench_step.py: 66.6M parameters, 2 prompts x 8 completions of 64 tokens after 128, every other
setting at its default. Each run is a process of its own, the two take turns; medians, and their ratio.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from harness import in_own_process, medians, parser_of, write_results

STEPS = 4
"""Steps of a run; the first one warms up."""


def one_run(bonus: bool) -> dict[str, float]:
    """Medians of a step's phases."""
    import bench_step

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, prompts = bench_step.make_inputs("qwen2", folder)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        (folder / "reward.py").write_text(bench_step.REWARD)
        steps = bench_step.run_vdr(bench_step.CASES["qwen2"], folder, model, STEPS, bonus, "zero3")
    return medians(steps[1:])


def measured(rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Seconds of a step's phases "with" and "without" bonus, and the "ratio" of the two."""
    found: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(rounds):
        for which, runs in found.items():
            runs.append(in_own_process(__file__, "--one", which, "--threads", str(threads)))
            print(f"step {which:8}", {name: round(value, 2) for name, value in runs[-1].items()}, flush=True)
    phases = {which: medians(runs) for which, runs in found.items()}
    ratio = {key: phases["with"][key] / phases["without"][key] for key in ("step", "step_cpu")}
    return {**phases, "ratio": ratio}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--one", choices=["with", "without"], help="run only this one, here, and print JSON")
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
    ratio = found["ratio"]
    print(f"with over without: {ratio['step']:.3f} (CPU {ratio['step_cpu']:.3f}); asked: at most 1.25")
    write_results(arguments.json, found)


if __name__ == "__main__":
    main()
