"""One process forks the ranks, which work through many runs (worker.py); the tests read what they left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

WORKER = Path(__file__).with_name("worker.py")
BASE = {
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 7,
    "train.learning_rate": 2e-4,
    "train.prompts_per_step": 5,
    "train.micro_batch_size": 8,
    "train.steps": 1,
    "train.checkpoint_every": 0,
    "train.keep_last": 9,
    "disagreement.mode": "none",
    "observe.tensorboard": False,
    "observe.completions_every": 1,
    "observe.audit_every": 0,
    "observe.report": False,
    "observe.live": "off",
}
SHARDED = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
}

Run = tuple[str, dict[str, Any]] | tuple[str, dict[str, Any], str]
"""The run directory's name, what differs from BASE, and in some a planted fault. The same name again: resumed.
NAME@STEP: a run in the directory NAME_resumed, from that checkpoint of the run NAME. A run whose train.checkpoint_every
is 0 leaves none."""


def name_of(place: str) -> str:
    """The directory of a run's name, or of NAME@STEP."""
    source, resumes, _ = place.partition("@")
    return f"{source}_resumed" if resumes else source


def entries(folder: Path, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs as worker.py reads them."""
    found: list[dict[str, Any]] = []
    for place, settings, *plant in runs:
        source, _, step = place.partition("@")
        name = name_of(place)
        full = {**BASE, "engine.ds_config": f"{folder}/sharded.json", **settings, "train.output": f"{folder}/{name}"}
        again = "auto" if name in [entry["name"] for entry in found] else None
        resume = f"{folder}/{source}/checkpoints/step_{int(step):06d}" if step else again
        found.append({"name": name, "settings": full, "resume": resume, "plant": plant[0] if plant else None})
    return found


class Left:
    """The results of the runs. named: the runs that the test names with @pytest.mark.runs; None: it may read all."""

    def __init__(self, folder: Path, ended: dict[str, str], named: set[str] | None = None) -> None:
        self.folder, self.ended, self.named = folder, ended, named

    def of(self, run: str) -> Path:
        """The run's directory."""
        assert self.named is None or run in self.named, f"name it: @pytest.mark.runs({run!r})"
        return self.folder / run

    def metrics(self, run: str) -> list[dict[str, Any]]:
        clocked = ("time/", "step_time", "tokens_per_second", "memory")
        lines = [json.loads(line) for line in (self.of(run) / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if not name.startswith(clocked)} for line in lines]

    def weights(self, run: str) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(self.of(run) / "model" / "model.safetensors")

    def update(self, run: str) -> Tensor:
        """Every weight's change, in one vector."""
        start, after = self.start_weights(), self.weights(run)
        return torch.cat([(after[name].double() - start[name].double()).flatten() for name in start])

    def gradient(self, run: str) -> Tensor:
        """The first step's gradient, over all ranks and before clipping, in one vector."""
        gradient = self.probes(run, ranks=1)[0]["gradient"]
        return torch.cat([gradient[name].double().flatten() for name in sorted(gradient)])

    def probes(self, run: str, ranks: int = 2) -> list[dict[str, Any]]:
        return [torch.load(self.of(run) / f"probe_rank{rank}.pt") for rank in range(ranks)]

    def table(self, run: str, step: int = 1) -> dict[str, list[Any]]:
        import pyarrow.parquet as pq

        return pq.read_table(self.of(run) / "completions" / f"step_{step:06d}.parquet").to_pydict()

    def state(self, run: str, step: int = 1) -> dict[str, Any]:
        return json.loads((self.of(run) / "checkpoints" / f"step_{step:06d}" / "state.json").read_text())

    @staticmethod
    def start_weights() -> dict[str, Tensor]:
        from safetensors.torch import load_file

        from vdr_cli.beds.registry import BEDS

        return {
            name: tensor.float() for name, tensor in load_file(BEDS["starter"].model_path / "model.safetensors").items()
        }

    @staticmethod
    def distance(a: Tensor, b: Tensor) -> float:
        """|a - b| / |b|"""
        return float((a - b).norm() / b.norm())


def assert_resumed(left: Left, run: str, step: int) -> None:
    """From this step's checkpoint on, the run is the same to the bit: its metrics, its weights."""
    after = [line for line in left.metrics(run) if line["step"] > step]
    assert after and left.metrics(f"{run}_resumed") == after
    whole, parts = left.weights(run), left.weights(f"{run}_resumed")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def named_runs(item: pytest.Item) -> set[str]:
    """The runs that a test names, its parameters filled in: `runs("{loss}_two")`."""
    parameters = getattr(item, "callspec", None)
    values = parameters.params if parameters is not None else {}
    return {name.format(**values) for mark in item.iter_markers("runs") for name in mark.args}


@pytest.fixture(scope="module")
def chosen(request: pytest.FixtureRequest) -> Callable[[Sequence[Run]], list[Run]]:
    """chosen(runs): those that the selected tests of this file name; all where none of these names any."""
    items = [item for item in request.session.items if item.path == request.path]
    wanted = set().union(*map(named_runs, items))
    wanted |= {name.removesuffix("_resumed") for name in wanted}
    return lambda runs: [run for run in runs if name_of(run[0]) in wanted or not wanted]


@pytest.fixture
def left(trained: Left, request: pytest.FixtureRequest) -> Left:
    """The results of the runs that this test names (a file's fixture `trained` has trained them)."""
    return Left(trained.folder, trained.ended, named_runs(request.node) or None)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the ranks have: with two a product's last bit may be another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def work_through() -> Callable[..., Left]:
    """work_through(folder, runs, alone): the runs on two ranks, then those alone on one; all in order."""

    def run(folder: Path, runs: Sequence[Run], alone: Sequence[Run] = ()) -> Left:
        (folder / "sharded.json").write_text(json.dumps({"zero_optimization": SHARDED}))
        jobs = [{"ranks": ranks, "runs": entries(folder, some)} for ranks, some in ((2, runs), (1, alone)) if some]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([sys.executable, str(WORKER), str(folder)], env=env, start_new_session=True)
        try:
            code = process.wait(timeout=1700)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        logs = {path.name: path.read_text() for path in folder.glob("log_*")}
        assert code == 0, "\n".join(log[-4000:] for log in logs.values())
        lines = [line.split(" ", 2) for name, log in logs.items() if name.endswith("_0") for line in log.splitlines()]
        return Left(folder, {line[1]: line[2] for line in lines if line[0] == "ended"})

    return run
