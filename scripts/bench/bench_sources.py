"""A whole training step of `vdr train` with each source of the bonus, over plain GRPO.

    python scripts/bench/bench_sources.py [--rounds 5] [--threads 2] [--json PATH]

The model and shapes of bench_step.py: 66.6M parameters, 2 prompts x 8 completions of 64 tokens after 128. One process
trains one policy at a learning rate of nearly 0 on the same prompts: every step does the same work but for its source.
Steps take turns, each round in another order, so all sources see the same machine. The first round warms up.
Medians of seconds and of CPU seconds, and the median over rounds of each ratio to plain GRPO of the same round; `none
again` is plain GRPO a second time, and its distance from 1 is what this machine cannot tell apart. `added` is sharper:
CPU seconds inside the functions that a bonus adds (reading what the source needs, the source, its shape), over those of
a step of plain GRPO. Asked: at most 0.02 for sources that need no forward.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import parser_of, seconds_of, write_results

if TYPE_CHECKING:
    from vdr_cli.config import Config
    from vdr_cli.training.opening import Run
    from vdr_cli.training.resources import Resources

PLAIN, AGAIN = "none", "none again"
ADDED = ("read_for_bonus", "add_bonus")
"""The functions of train.py that a bonus adds to a step."""


def config_of(folder: Path, model: str, source: str, steps: int) -> Config:
    """Settings of bench_step.py's case qwen2 with this source."""
    import bench_step

    from vdr_cli.config import Config

    case = bench_step.CASES["qwen2"]
    train: dict[str, Any] = {"steps": steps, "prompts_per_step": case.prompts, "learning_rate": 1e-12}
    train["micro_batch_size"] = case.micro_batch
    return Config.model_validate(
        {
            "model": {"name": model},
            "data": {"name": str(folder / "prompts.jsonl")},
            "rollout": {"group_size": case.group, "max_new_tokens": case.new_tokens},
            "rewards": {"functions": [{"name": f"{folder / 'reward.py'}:digits"}]},
            "bonus": {"source": PLAIN if source == AGAIN else source},
            "train": {**train, "output": str(folder / "run"), "checkpoint_every": 0, "save_model": False},
            "observe": {
                "tensorboard": False, "report": False, "completions_every": 0, "audit_every": 0, "live": "off"
            },
        }
    )  # fmt: skip


def resources_of(run: Run, config: Config) -> Resources:
    """The run's parts with another source, and what that source needs beside them."""
    from vdr_cli.engine.reference import build_reference
    from vdr_cli.training.answers import answers_of
    from vdr_cli.training.end_states import EndStateKeeper
    from vdr_cli.training.opening import open_source
    from vdr_cli.training.watched_rollout import WatchedRollout

    res = run.resources
    rollout, keeper = res.rollout, None
    if not config.needs_ensemble and isinstance(rollout, WatchedRollout):
        rollout = rollout.rollout
    if config.bonus_source == "value_heads":
        keeper = EndStateKeeper()
        rollout = WatchedRollout(rollout, keeper)
    return replace(
        res,
        config=config,
        source=open_source(config),
        rollout=rollout,
        end_states=keeper,
        ensemble=res.ensemble if config.needs_ensemble else None,
        answers=answers_of(config, res.rewards),
        reference=build_reference(config, res.engine),
    )


@contextmanager
def cpu_seconds_within(module: Any, names: Sequence[str]) -> Iterator[list[float]]:
    """CPU seconds of this process inside the module's functions of these names, a number per call."""
    spent, functions = list[float](), {name: getattr(module, name) for name in names}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.process_time()
            found = function(*arguments)
            spent.append(time.process_time() - start)
            return found

        return call

    for name, function in functions.items():
        setattr(module, name, timed(function))
    yield spent
    for name, function in functions.items():
        setattr(module, name, function)


def one_step(res: Resources, state: Any, memory: Any) -> tuple[float, float, float]:
    """(seconds, CPU seconds, CPU seconds of the bonus's functions) of a step."""
    from vdr_cli import train

    state.memory, state.drawn = memory, 0  # the same prompts, and so the same completions

    def step() -> None:
        batch, advantages = train.collect(res, state)
        train.update(res, state, batch, advantages)

    with cpu_seconds_within(train, ADDED) as added:
        spent = seconds_of(step)
    state.end_step(1, tokens=0)
    return *spent, sum(added)


def measured(rounds: int) -> dict[str, dict[str, float]]:
    """Seconds and CPU seconds of a step with each source, and their ratios to plain GRPO."""
    import bench_step

    from vdr_cli.exploration.sources import SOURCES
    from vdr_cli.training.opening import open_run

    names = [PLAIN, *SOURCES, AGAIN]
    spent: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, prompts = bench_step.make_inputs("qwen2", folder)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        (folder / "reward.py").write_text(bench_step.REWARD)
        configs = {name: config_of(folder, model, name, (rounds + 1) * len(names)) for name in names}
        with open_run(configs["disagreement"], None) as run:
            parts = {name: resources_of(run, config) for name, config in configs.items()}
            memories = {name: s.memory(configs[name]) if (s := parts[name].source) else None for name in names}
            for turn in range(rounds + 1):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    took = one_step(parts[name], run.state, memories[name])
                    print(f"round {turn} {name:14} {took[0]:6.2f} s, CPU {took[1]:6.2f} s", flush=True)
                    if turn:
                        spent[name].append(took)
    return {name: summary(spent[name], spent[PLAIN]) for name in names}


def summary(own: list[tuple[float, float, float]], plain: list[tuple[float, float, float]]) -> dict[str, float]:
    """Medians over the rounds."""
    ratios = [(a[0] / b[0], a[1] / b[1], a[2] / b[1]) for a, b in zip(own, plain, strict=True)]
    columns = {"step": [a[0] for a in own], "step_cpu": [a[1] for a in own]}
    columns |= {name: [a[index] for a in ratios] for index, name in enumerate(("ratio", "ratio_cpu", "added"))}
    return {name: statistics.median(values) for name, values in columns.items()}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    found = measured(arguments.rounds)
    for name, each in found.items():
        wall, cpu = (f"{each[f'step{kind}']:8.2f} s {each[f'ratio{kind}']:8.3f}" for kind in ("", "_cpu"))
        print(f"{name:14} {wall}   CPU {cpu}   added {each['added']:.4f}")
    write_results(arguments.json, {"sources": found})


if __name__ == "__main__":
    main()
