"""Every source of the bonus in real runs: ranks, micro-batches, ZeRO-3 with adapters, resumes, another world size."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import environment
from tests.integration.options.conftest import SHARDED, WORKER, Left, entries
from vdr_cli.audit.audit import audit_run
from vdr_cli.beds.countdown import solution_class
from vdr_cli.exploration.sources import SOURCES

pytestmark = pytest.mark.timeout(1800)

MINE = """
def repeats(completions, entropies, masks, rewards):
    return [[float(e) + float(r) for e in row[m]] for row, m, r in zip(entropies, masks, rewards)]
"""
NAMES = [*SOURCES, "mine"]
LORA = {"model.lora": {"rank": 4}, "train.learning_rate": 3e-3}


def settings(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    source = f"{folder}/mine.py:repeats" if name == "mine" else name
    plain = {"bonus.shape": "plain"} if name == "mine" else {}
    base = {"disagreement.mode": "end_of_sequence", "disagreement.members": 2, "train.prompts_per_step": 3}
    every = {"train.checkpoint_every": 1, "train.keep_last": 9, "train.steps": 3, "train.save_model": False}
    return {**base, **every, "bonus.source": source, **plain, **more}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "sharded.json").write_text(json.dumps({"zero_optimization": SHARDED}))
    (folder / "mine.py").write_text(MINE)
    alone = [(f"{name}_one", settings(folder, name, **LORA, **{"observe.audit_every": 1})) for name in NAMES]
    moved = [(f"{name}_one@2", settings(folder, name, **LORA)) for name in NAMES]
    split = {**LORA, "train.micro_batch_size": 3}
    pairs = [(f"{name}_two{at}", settings(folder, name, **split)) for name in NAMES for at in ("", "@2")]
    jobs = [
        {"ranks": 1, "runs": entries(folder, alone)},
        {"ranks": 2, "runs": entries(folder, [*pairs, *moved])},
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(WORKER), str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    logs = "\n".join(path.read_text()[-3000:] for path in folder.glob("log_*"))
    assert done.returncode == 0, done.stderr[-2000:] + logs
    said = [line.split(" ", 2)[1:] for path in folder.glob("log_*") for line in path.read_text().splitlines()
            if line.startswith("ended ")]  # fmt: skip
    return Left(folder, dict(said))


def numbers(left: Left, run: str, name: str, step: int) -> list[float]:
    """The source's number of each completion."""
    column = {"disagreement": "bald", "mine": "repeats"}.get(name, name)
    return left.table(run, step)[column]


def test_every_run_ends_well(trained: Left) -> None:
    assert set(trained.ended.values()) == {"0"}


@pytest.mark.parametrize("name", NAMES)
def test_ranks_and_micro_batches_do_not_matter(trained: Left, name: str) -> None:
    for step in (1, 2):
        one, two = (trained.table(f"{name}_{ranks}", step) for ranks in ("one", "two"))
        assert one["completion_ids"] == two["completion_ids"]
        found = numbers(trained, f"{name}_two", name, step)
        assert found == pytest.approx(numbers(trained, f"{name}_one", name, step), rel=2e-3, abs=2e-5)
        assert two["bonus"] == pytest.approx(one["bonus"], rel=5e-3, abs=1e-3)
        assert max(map(abs, one["bonus"])) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_same_run_to_the_bit(trained: Left, name: str) -> None:
    assert trained.metrics(f"{name}_two_resumed") == trained.metrics(f"{name}_two")[2:]
    assert trained.table(f"{name}_two_resumed", 3) == trained.table(f"{name}_two", 3)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_with_another_number_of_ranks(trained: Left, name: str) -> None:
    found, expected = (trained.table(f"{name}_{how}", 3) for how in ("one_resumed", "one"))
    assert found["completion_ids"] == expected["completion_ids"]
    moved, stayed = (numbers(trained, f"{name}_{how}", name, 3) for how in ("one_resumed", "one"))
    assert moved == pytest.approx(stayed, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_audit_recomputes_the_bonus_or_says_that_it_cannot(trained: Left, name: str) -> None:
    lines = audit_run(trained.of(f"{name}_one"), [1], ("members", "advantages", "metrics"))
    assert [line for line in lines if line.within is False] == []
    compared = {line.quantity for line in lines if line.within}
    assert {"bonus", "advantages"} <= compared
    left_out = [line for line in lines if line.within is None and "function of the user's" in line.note]
    assert bool(left_out) == (name == "mine")
    if name == "counts":
        assert "visits" in compared
    if name in ("novelty", "value_heads"):
        assert f"{name} of completions" in compared


@pytest.mark.parametrize("how", ["one", "two"])
def test_counts_are_those_of_a_dict_over_the_runs_own_completions(trained: Left, how: str) -> None:
    seen = Counter[tuple[str, str]]()
    for step in (1, 2, 3):
        table = trained.table(f"counts_{how}", step)
        classes = solution_class(table["completion"])
        answers = [text.strip() if one is None else one for one, text in zip(classes, table["completion"], strict=True)]
        keys = list(zip(table["prompt"], answers, strict=True))
        seen.update(keys)
        assert table["counts"] == pytest.approx([1 / math.sqrt(seen[key]) - 0.5 for key in keys])
