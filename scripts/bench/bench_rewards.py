"""Sampling with a reward function that computes in Python: on a thread of the process, or in a process of its own.

    python scripts/bench/bench_rewards.py [--prompts 8] [--group 8] [--seconds 0.25] [--repeats 3] [--json PATH]

The model of bench_rollout.py; a completion ends at one token in sixteen. The function takes --seconds of a
processor for each group. Printed: median seconds until completions and rewards are there.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_rollout import PAD, build_model
from harness import parser_of, write_results
from transformers import PreTrainedModel

from vdr_cli.config import RewardsConfig
from vdr_cli.rewards.base import LoadedReward, TrainerState
from vdr_cli.rewards.loading import load_rewards
from vdr_cli.rewards.stream import RewardStream
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Completions, Prompt, Sampling

VOCABULARY, PROMPT, NEW = 32_000, 128, 64

BUSY = """
import time

def busy(completions, seconds, **_):
    end = time.thread_time() + sum(seconds)
    while time.thread_time() < end:
        sum(range(1000))
    return [0.0] * len(completions)
"""


def loaded(file: Path, processes: int) -> list[LoadedReward]:
    file.write_text(BUSY)
    settings = {"functions": [{"name": f"{file}:busy"}], "processes": processes}
    return load_rewards(RewardsConfig.model_validate(settings), "any")


def until_rewarded(model: PreTrainedModel, prompts: list[Prompt], group: int, rewards: list[LoadedReward]) -> float:
    """Seconds of sampling these prompts with their rewards."""

    def texts(_: list[Prompt], completions: Completions) -> list[str]:
        return [""] * len(completions)

    begin = time.perf_counter()
    stream = RewardStream(rewards, prompts, group, 300.0, TrainerState(), texts)
    rollout = TransformersRollout(PAD, range(1, VOCABULARY // 16))
    ids = [prompt.token_ids for prompt in prompts]
    rollout.generate(
        model, RolloutRequest(ids, group, Sampling(max_new_tokens=NEW), list(range(len(ids))), stream.finished)
    )
    stream.result()
    return time.perf_counter() - begin


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of sampling; the others are free for rewards")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model(12, 512, VOCABULARY)
    tokens = torch.randint(1, VOCABULARY, (args.prompts, PROMPT)).tolist()
    each = args.seconds / args.group
    prompts = [Prompt(row, "", ids, {"seconds": each}) for row, ids in enumerate(tokens)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "busy.py"
        kinds = {"no reward": [], "on a thread": loaded(file, 0), "one process": loaded(file, 1)}
        kinds["two processes"] = loaded(file, 2)
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(args.repeats + 1):
            for kind, rewards in kinds.items():
                found[kind].append(until_rewarded(model, prompts, args.group, rewards))
    print(f"{args.prompts} groups of {args.group}, {args.prompts * args.seconds:g} s of rewards in all")
    seconds = {kind: statistics.median(times[1:]) for kind, times in found.items()}
    for kind, median in seconds.items():
        print(f"{kind:<13} {median:.2f} s")
    write_results(args.json, {"seconds": seconds})


if __name__ == "__main__":
    main()
