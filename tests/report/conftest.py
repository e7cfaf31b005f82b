import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from vdr_cli.config import Config, ObserveConfig
from vdr_cli.data.completions import write_completions
from vdr_cli.training.metrics_writer import MetricsWriter

HOSTILE = [
    "<script>window.hacked=1</script>",
    "x" * 100_000,
    "שלום עולם \u202e olleh",
    "👩‍👩‍👧 emoji",
    "nul \x00 here",
    "\x1b[31mred\x1b[0m",
    "</script><img src=x onerror=window.hacked=1>",
    "line\nbreak \u2028 & &amp; {{ 7*7 }} {% raw %}",
]
PROMPT = "1 2 3=6: <b>bold</b>"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A finished run directory of the starter as `vdr train` leaves it, with completions as bad as they come."""

    def make(name: str = "wide", seed: int = 0, weight: float = 0.1) -> Path:
        generator = random.Random(seed)
        directory = tmp_path / name
        directory.mkdir()
        config = Config().model_dump(mode="json")
        config["train"] |= {"seed": seed, "output": str(directory)}
        config["bonus"]["weight"] = weight
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        with MetricsWriter(directory, ObserveConfig(tensorboard=False)) as writer:
            for step in range(1, 41):
                metrics = {"reward": 1 - math.exp(-step / 10) + generator.gauss(0, 0.03), "kl": math.nan}
                metrics |= {"disagreement/mean": 0.02 / step, "frac_reward_zero_std": generator.random()}
                if step % 10 == 0:
                    metrics |= {"eval/pass@1": 0.5, "eval/pass@1_low": 0.4, "eval/pass@1_high": 0.6, "eval/pass@8": 0.9}
                writer.log(step, metrics)
        for step in (10, 20):
            write_completions(directory / "completions", step, completions(generator))
        return directory

    return make


def completions(generator: random.Random) -> dict[str, list[object]]:
    rows: dict[str, list[object]] = {}
    for group in range(3):
        for member in range(len(HOSTILE)):
            ids = [generator.randint(3, 16) for _ in range(6)]
            row = {
                "row": group,
                "group": group,
                "prompt": PROMPT,
                "completion": HOSTILE[member] if group == 0 else "1+2*3",
                "prompt_ids": [3],
                "completion_ids": ids,
                "reward": float(group == 1 and member % 2),
                "bonus": generator.gauss(0, 0.1),
                "advantage": generator.gauss(0, 1),
                "bald": generator.random() * 0.05,
                "bald_tokens": [generator.random() * 0.1 for _ in ids] if group else None,
            }
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
    return rows
