"""10,000 episodes of the embedded game: memory, episodes per second and tokens that the model reads.

    python scripts/bench/bench_episodes.py --json benchmarks/episodes.json [--episodes 10000]

Samples with the game's starting model and its environment, as a training step does: groups of 4 games, 64 groups at
a time. Prints a line per thousand episodes. Tokens are counted where they enter the model: a group must read its
prompt once, and every token of its games but the last of each, which nothing follows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from harness import parser_of, write_results
from torch import Tensor, nn

from vdr_cli.beds.registry import BEDS
from vdr_cli.config import Config, DataConfig
from vdr_cli.data.prompts import Limits, PromptSet, load_prompts
from vdr_cli.environments.contract import load_contract
from vdr_cli.environments.episodes import Environments
from vdr_cli.models.loading import eos_token_ids, load_causal_lm, load_tokenizer
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Sampling

GROUPS, EVERY = 64, 1000
WARM = 2
"""Lines before memory counts: allocators have taken what they need."""


class Game:
    """The model, its environment and its prompts."""

    def __init__(self) -> None:
        path, self.cfg = str(BEDS["guess"].model_path), Config.model_validate({"model": {"name": "guess"}}).rollout
        contract = load_contract(self.cfg.environment, [])
        assert contract is not None
        tokenizer = load_tokenizer(path)
        self.model = load_causal_lm(path, torch.float32).eval()
        self.environments = Environments(contract, tokenizer, self.cfg, True, Limits())
        eos_ids = eos_token_ids(self.model, tokenizer)
        self.environments.end_with(eos_ids)
        self.rollout = TransformersRollout(tokenizer.pad_token_id, eos_ids, tokenizer)
        data = DataConfig(name="guess")
        self.prompts: PromptSet = load_prompts(data, "train", tokenizer, Limits(), contract.schemas)
        self.read = 0
        self.model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, _: nn.Module, given: tuple[Tensor, ...], __: Tensor) -> None:
        self.read += given[0].numel()

    def play(self, batch: int) -> tuple[int, int, int, int]:
        """(episodes, won, policy's turns, least tokens to read) of a batch."""
        n = self.cfg.group_size
        rows = [(batch * GROUPS + index) % len(self.prompts) for index in range(GROUPS)]
        episodes = self.environments.begin([self.prompts[row] for row in rows], n)
        ids = [prompt.token_ids for prompt in episodes.prompts]
        sampling = Sampling(self.cfg.completion_tokens, turn_tokens=self.cfg.max_new_tokens)
        keys = [batch * GROUPS + index for index in range(GROUPS)]
        request = RolloutRequest(ids, n, sampling, keys, conversation=episodes.conversation)
        completions = self.rollout.generate(self.model, request)
        won = sum(environment.is_found for environment in episodes.environments or [])
        turns = sum(each.turns for each in episodes.counts)
        episodes.close()
        least = sum(map(len, ids)) + int(completions.completion_mask.sum()) - len(completions)
        return len(completions), won, turns, least


def lines(game: Game, episodes: int) -> Iterator[dict[str, Any]]:
    """A line for each EVERY episodes; memory is the resident set."""
    played = won = turns = least = batch = 0
    begin, begin_cpu, due = time.perf_counter(), time.process_time(), EVERY
    while played < episodes:
        counts = game.play(batch)
        batch += 1
        played, won, turns, least = (old + new for old, new in zip((played, won, turns, least), counts, strict=True))
        if played >= min(due, episodes):
            due += EVERY
            wall, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
            yield {
                "episodes": played,
                "rss_mib": psutil.Process().memory_info().rss / 2**20,
                "won": won / played,
                "turns": turns / played,
                "per_second": played / wall,
                "per_cpu_second": played / cpu,
                "tokens_read": game.read / played,
                "tokens_read_over_least": game.read / least,
            }


def growth(found: list[dict[str, Any]]) -> float:
    """MiB per thousand episodes: slope of the least squares line through the resident sets after WARM lines."""
    rest = found[WARM:]
    slope = statistics.linear_regression([line["episodes"] for line in rest], [line["rss_mib"] for line in rest]).slope
    return 1000 * slope


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--episodes", type=int, default=10_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    game, found = Game(), []
    for line in lines(game, arguments.episodes):
        found.append(line)
        print("  ".join(f"{name} {value:,.3f}" for name, value in line.items()), flush=True)
    game.environments.close()
    last = found[-1]
    grown = growth(found) if len(found) > WARM + 1 else None
    print(f"memory grows by {grown} MiB per 1,000 episodes")
    rss = {"first": found[min(WARM, len(found) - 1)]["rss_mib"], "last": last["rss_mib"], "per_thousand": grown}
    write_results(arguments.json, {**{key: last[key] for key in last if key != "rss_mib"}, "rss_mib": rss})


if __name__ == "__main__":
    main()
