"""A planted fault as a row of the tables faults_*.py, and the tests that are tried first for each file."""

from __future__ import annotations

from typing import NamedTuple

UNITS = {
    "train.py": "tests/test_train.py",
    "engine/optimizer.py": "tests/engine/test_optimizer_settings.py",
    "engine/engine.py": "tests/engine/test_engine.py",
    "engine/ds_config.py": "tests/engine/test_optimizer_settings.py",
    "engine/checkpoint.py": "tests/engine/test_checkpoint.py",
    "engine/reference.py": "tests/engine/test_engine.py",
    "disagreement/masks.py": "tests/disagreement/test_masks.py",
    "disagreement/hooks.py": "tests/disagreement/test_masks.py tests/disagreement/test_reading.py",
    "disagreement/information.py": "tests/disagreement/test_information.py",
    "disagreement/reading.py": "tests/disagreement/test_reading.py",
    "models/loading.py": "tests/models/test_loading.py",
    "models/logprobs.py": "tests/models/test_logprobs.py",
    "models/policy.py": "tests/models/test_policy.py",
    "models/adapters.py": "tests/models/test_adapters.py",
    "rollout/base.py": "tests/rollout/test_sampling.py",
    "rollout/sampling.py": "tests/rollout/test_sampling.py",
    "rollout/transformers_backend.py": "tests/rollout/test_transformers_rollout.py",
    "training/batch.py": "tests/training/test_batch.py",
    "training/completion_table.py": "tests/training/test_step_metrics.py",
    "training/opening.py": "tests/training/test_resources.py",
    "training/reading.py": "tests/training/test_reading.py",
    "training/step_metrics.py": "tests/training/test_step_metrics.py",
    "training/resources.py": "tests/training/test_resources.py",
    "training/state.py": "tests/training/test_state.py",
    "training/metric_pairs.py": "tests/training/test_metric_pairs.py",
    "rewards/calling.py": "tests/rewards/test_reward_calling.py",
    "rewards/loading.py": "tests/rewards/test_reward_loading.py",
    "data/prompts.py": "tests/data/test_prompts.py tests/data/test_limits.py",
    "data/order.py": "tests/data/test_order.py",
    "stats/passk.py": "tests/stats/test_passk_bootstrap.py",
    "stats/bootstrap.py": "tests/stats/test_passk_bootstrap.py",
    "stats/ranking.py": "tests/stats/test_ranking.py",
    "scoring/columns.py": "tests/scoring/test_columns.py",
    "grpo/advantages.py": "tests/grpo/test_advantages.py",
    "grpo/estimators.py": "tests/grpo/test_estimators.py",
    "grpo/losses.py": "tests/grpo/test_losses.py tests/grpo/test_loss_parts.py",
}
"""Test files of the code in large directories; for others the whole directory is run."""


class Fault(NamedTuple):
    """`old`, which stands in `file` exactly once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    unit: str
    """Test directories or files that are tried first; "": none."""
    runs: str = ""
    """Runs of the audit matrix that are tried next, names with commas; "": none."""


def in_files(folder: str, *rows: tuple[str, ...]) -> list[Fault]:
    """Rows of (name, file in vdr_cli, old, new, runs); folder: the tests of files that UNITS does not name."""
    return [Fault(row[0], f"vdr_cli/{row[1]}", row[2], row[3], UNITS.get(row[1], folder), *row[4:]) for row in rows]
