"""The embedded game in vdr and in TRL: time and tokens for the same episodes, and what both learn, in one run.

    python scripts/bench/bench_guess_trl.py --steps 15 --json benchmarks/guess-trl.json

Both train the same model with the same environment class, rows, learning rate and number of games (64 groups of 4 a
step). Each has a process and a thread of its own; they run at the same time. Timed are the training steps, without
imports and saving; of these the sampling by itself. Tokens are counted where they enter the model. On a machine that
others use, trust the ratio of processor seconds. At the end both models play the held-out games in `vdr eval`.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from bench_guess import evaluated
from harness import ROOT, in_own_process, parser_of, write_results
from torch import Tensor, nn

from vdr_cli.beds.registry import BEDS

ENDS = 5
"""Steps at the beginning and at the end whose rewards are averaged."""


class Meter:
    """Wall and processor seconds of calls by name, and the tokens that models read meanwhile."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.open: list[str] = []
        inner = nn.Embedding.forward

        def counted(module: nn.Embedding, ids: Tensor) -> Tensor:
            for name in self.open:
                self.tokens[name] = self.tokens.get(name, 0) + ids.numel()
            return inner(module, ids)

        nn.Embedding.forward = counted  # type: ignore[method-assign]

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Measure every call of this function."""
        inner: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(inner)
        def timed(*arguments: Any, **settings: Any) -> Any:
            begin, begin_cpu = time.perf_counter(), time.process_time()
            self.open.append(name)
            try:
                return inner(*arguments, **settings)
            finally:
                self.open.remove(name)
                self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - begin
                self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - begin_cpu

        setattr(owner, attribute, timed)

    def figures(self, episodes: int) -> dict[str, float]:
        """Seconds of everything and of sampling; tokens of an episode."""
        found = {}
        for name in ("step", "sampling"):
            found |= {f"{name}_wall_seconds": self.wall[name], f"{name}_cpu_seconds": self.cpu[name]}
            found[f"{name}_tokens"] = self.tokens[name] / episodes
        return found


def with_vdr(steps: int, seed: int, output: Path, meter: Meter) -> list[float]:
    """Train with vdr; the reward of each step."""
    import vdr_cli.train as loop
    from vdr_cli.config import Config
    from vdr_cli.rollout.transformers_backend import TransformersRollout

    meter.watch(TransformersRollout, "_sample", "sampling")
    meter.watch(loop, "collect", "step")
    meter.watch(loop, "update", "step")
    observed = {"tensorboard": False, "report": False}
    own = {"steps": steps, "seed": seed, "output": str(output), "checkpoint_every": 0}
    loop.train(Config.model_validate({"model": {"name": "guess"}, "train": own, "observe": observed}))
    return [json.loads(line)["reward"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def with_trl(steps: int, seed: int, output: Path, meter: Meter) -> list[float]:
    """Train with TRL; the reward of each step."""
    sys.path.insert(0, str(ROOT / "scripts" / "verify"))
    from guess_in_trl import trainer_of

    trainer = trainer_of(steps, output / "model", seed)
    meter.watch(trainer, "_generate", "sampling")
    meter.watch(trainer, "training_step", "step")
    trainer.train()
    trainer.save_model(str(output / "model"))
    return [line["reward"] for line in trainer.state.log_history if "reward" in line]


TRAINERS = {"vdr": with_vdr, "trl": with_trl}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=8, help="games of each held-out problem")
    parser.add_argument("--only", choices=TRAINERS, help="one of them, in this process; prints a line")
    parser.add_argument("--output", type=Path, help="directory of runs; default: a temporary one")
    arguments = parser.parse_args()
    recipe = BEDS["guess"].recipe()
    episodes = arguments.steps * recipe["train"]["prompts_per_step"] * recipe["rollout"]["group_size"]
    if arguments.only:
        torch.set_num_threads(1)
        meter = Meter()
        rewards = TRAINERS[arguments.only](arguments.steps, arguments.seed, arguments.output, meter)
        ends = {"reward_first": statistics.mean(rewards[:ENDS]), "reward_last": statistics.mean(rewards[-ENDS:])}
        print(json.dumps(meter.figures(episodes) | ends))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = arguments.output or Path(name)
        results: dict[str, Any] = {"steps": arguments.steps, "episodes": episodes}
        given = ["--steps", str(arguments.steps), "--seed", str(arguments.seed)]
        with ThreadPoolExecutor() as pool:
            started = {
                side: pool.submit(in_own_process, __file__, "--only", side, *given, "--output", str(folder / side))
                for side in TRAINERS
            }
        for side, run in started.items():
            results[side] = run.result()
            print(side, json.dumps(results[side]), flush=True)
        models = ["guess", str(folder / "vdr"), str(folder / "trl" / "model")]
        results["start"], *ends = evaluated(models, arguments.samples, folder)
        for side, end in zip(TRAINERS, ends, strict=True):
            results[side] |= end
        names = [
            f"{part}_{unit}" for part in ("step", "sampling") for unit in ("wall_seconds", "cpu_seconds", "tokens")
        ]
        results["ratio"] = {name: results["vdr"][name] / results["trl"][name] for name in names}
    print(json.dumps(results, indent=1))
    write_results(arguments.json, results)


if __name__ == "__main__":
    main()
