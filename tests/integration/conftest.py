"""Real runs: of the command as typed where its launcher matters, and elsewhere in forks (tests/conftest.py)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ZERO3_ALL_SHARDED = {
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0,
    }
}
"""At the default threshold every parameter of a tiny model stays whole and nothing is tested."""

SMALL = {
    "rollout.group_size": 4,
    "train.prompts_per_step": 5,
    "train.micro_batch_size": 8,
    "train.steps": 2,
    "observe.tensorboard": False,
    "observe.completions_every": 1,
    "observe.report": False,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "integration" in Path(item.path).parts:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DeepSpeed configuration in which every parameter is really partitioned."""
    path = tmp_path_factory.mktemp("ds") / "zero3_all.json"
    path.write_text(json.dumps(ZERO3_ALL_SHARDED))
    return str(path)


@pytest.fixture
def train(sharded: str, vdr, forked) -> Callable[..., subprocess.CompletedProcess[str]]:
    """train(output, *flags, settings={...}): a small run of the starter; asserts nothing.

    ranks=N: so many, without a launcher. processes=N: started by the command itself, under DeepSpeed's launcher.
    more: environment variables.
    """

    def run(
        output: Path,
        *flags: str,
        processes: int = 1,
        ranks: int = 1,
        settings: dict[str, Any] | None = None,
        **more: str,
    ) -> subprocess.CompletedProcess[str]:
        values = {**SMALL, "engine.ds_config": sharded, **(settings or {})}
        overrides = [word for key, value in values.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        arguments = ("train", "--output", str(output), *overrides, *flags)
        if processes > 1:
            return vdr(*arguments, "--num-processes", str(processes), **more)
        return forked(*arguments, ranks=ranks, **more)

    return run


class Reading:
    """The files of a run that are compared."""

    @staticmethod
    def metrics(run: Path) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without what the clock says."""
        clocked = ("time/", "step_time", "tokens_per_second")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if not name.startswith(clocked)} for line in lines]

    @staticmethod
    def weights(run: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        return load_file(run / "model" / "model.safetensors")

    @staticmethod
    def completions(run: Path) -> list[Any]:
        import pyarrow.parquet as pq

        return [pq.read_table(path) for path in sorted((run / "completions").glob("step_*.parquet"))]


@pytest.fixture
def read() -> Reading:
    return Reading()
