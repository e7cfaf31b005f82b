"""One call of the reward function in argv[1], with a limit of half a second."""

import sys

from vdr_cli.config import Config
from vdr_cli.rewards import calling
from vdr_cli.rewards.loading import load_rewards
from vdr_cli.samples import Prompt

calling.SEARCH_SECONDS = 0.5
config = Config.model_validate({"rewards": {"functions": [{"name": sys.argv[1]}]}})
rewards = load_rewards(config.rewards, "rows.jsonl")
prompt = Prompt(row=0, value="p", token_ids=[1], columns={})
calling.compute_rewards(rewards, [prompt], ["a" * 60], [[1]], timeout=0.5)
