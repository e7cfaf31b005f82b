"""TRL's log_metric and log_extra: recorded wherever a function runs, averaged and saved as TRL does, or refused."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.rewards.test_reward_stream import G, completions, stream
from vdr_cli.config import RewardsConfig
from vdr_cli.errors import DataError
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.loading import load_rewards
from vdr_cli.rewards.logs import OWN_FAMILIES, OWN_METRICS, CallLog, Logs, joined, summed

SOURCE = """
def logs(completions, log_metric, log_extra, **_):
    log_metric("calls", 1.0)
    log_metric("mine/length", len(completions))
    log_extra("text", completions)
    return [0.0] * len(completions)

def caught(completions, log_metric, **_):
    try:
        import signal
        signal.alarm(9)
        signal.alarm(0)
        log_metric("main", 1.0)
    except ValueError:
        log_metric("main", -1.0)
    return [0.0] * len(completions)
"""
TEXTS = ["4:0", "4:1", "7:10", "7:11", "9:20", "9:21"]
ORDER = [[1], [2, 0]]


def logs_of(*functions: Any) -> Logs:
    """The logs of a batch of three groups that are finished in two parts."""
    found = stream(*functions)
    for groups in ORDER:
        found.finished(groups, completions(groups))
    found.result()
    return found.logs


def failure(function: Any) -> str:
    with pytest.raises(DataError) as caught:
        logs_of(function)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def plain(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
    log_metric("mean", len(completions))
    log_extra("text", completions)
    return [0.0] * len(completions)


def looked_up(completions: list[str], **kwargs: Any) -> list[float]:
    return plain(completions, kwargs["log_metric"], kwargs["log_extra"])


async def awaited(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
    return plain(completions, log_metric, log_extra)


@pytest.mark.parametrize("function", [plain, looked_up, awaited, functools.partial(plain)])
def test_a_function_that_logs_metrics_is_called_once_with_the_whole_batch(function: Any) -> None:
    found = logs_of(function)
    assert found.metrics == {"mean": (3 * G, 1.0)}
    assert found.cells == [{"text": text} for text in TEXTS]


def test_columns_alone_come_in_parts_and_only_from_calls_that_log_them() -> None:
    calls = []

    def some(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        calls.append(len(completions))
        if completions[0] == "7:10":
            log_extra("seven", completions[:1])
            log_extra("seven", [None])  # appended, as in TRL
        return [0.0] * len(completions)

    found = logs_of(some)
    assert calls == [2, 4] and found.metrics == {}
    assert found.cells == [{}, {}, {"seven": "7:10"}, {"seven": None}, {}, {}]


def test_every_value_counts_once_whichever_function_logged_it() -> None:
    def each(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        for value in (np.float32(1.0), torch.tensor(2.0), True):
            log_metric("mean", value)
        return [0.0] * len(completions)

    assert logs_of(plain, each).metrics == {"mean": (10.0, 4.0)}


@pytest.mark.parametrize("name", ["logs", "caught"])
def test_functions_in_processes_log_too(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(SOURCE)
    for processes in (0, 1):
        cfg = RewardsConfig.model_validate(
            {"functions": [{"name": f"{tmp_path}/mine.py:{name}"}], "processes": processes}
        )
        found = stream(timeout=60.0, loaded=load_rewards(cfg, "any"))
        for groups in ORDER:
            found.finished(groups, completions(groups))
        found.result()
        if name == "caught":  # the call that was made again counts alone
            assert found.logs.metrics == {"main": (1.0, 1.0)}
        else:
            assert found.logs.metrics == {"calls": (1.0, 1.0), "mine/length": (6.0, 1.0)}
            assert [cells["text"] for cells in found.logs.cells] == TEXTS


@pytest.mark.parametrize("name", ["reward", "step", "kl", "eval/pass@1", "rewards/mine/mean", "time/mine"])
def test_names_of_the_runs_own_metrics_are_refused(name: str) -> None:
    def logs(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        log_metric(name, 1.0)
        return [0.0] * len(completions)

    assert f"ValueError: log_metric: {name} is the run's own metric" in failure(logs)


def test_every_metric_of_the_docs_is_the_runs_own() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in page[: page.index("## Early")].splitlines() if line.startswith("| `")]
    spans = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split(":")[0])]
    names = [name for name in spans if not name.startswith(("...", "_"))]
    assert len(names) > 40
    for name in names:
        with pytest.raises(ValueError, match="the run's own metric"):
            CallLog().log_metric(name.replace("<", "").replace(">", ""), 1.0)
    assert {name for name in names if "/" not in name} == OWN_METRICS
    assert {name.partition("/")[0] for name in names if "/" in name} == OWN_FAMILIES


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("log_metric", "mine", "0.5"), "TypeError: log_metric: mine must be a number, not '0.5'"),
        (("log_metric", "mine", [1.0]), "TypeError"),
        (("log_metric", "", 1.0), "ValueError: log_metric: '' is not a name"),
        (("log_extra", "mine", "text"), "TypeError: log_extra: mine must be a list with one value per completion"),
        (("log_extra", "mine", 3), "TypeError"),
        (("log_extra", "mine", [1]), "logged 1 values of the column mine for"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(given: Any, words: str) -> None:
    def logs(completions: list[str], log_metric: Any, log_extra: Any, **_: Any) -> list[float]:
        {"log_metric": log_metric, "log_extra": log_extra}[given[0]](*given[1:])
        return [0.0] * len(completions)

    assert words in failure(logs) and "reward logs" in failure(logs)


def test_two_functions_may_not_log_one_column() -> None:
    with pytest.raises(DataError, match="reward plain and reward awaited both log the column text; rename it"):
        logs_of(plain, awaited)


def test_a_nan_is_recorded_and_cells_are_numbers_or_text() -> None:
    log = CallLog()
    log.log_metric("mine", math.nan)
    log.log_extra("cells", [np.float32(0.5), torch.tensor(3), None, True, 2**70, {"a": 1}, [1, 2]])
    assert math.isnan(log.metrics["mine"][0])
    assert log.columns["cells"] == [0.5, 3, None, True, str(2**70), "{'a': 1}", "[1, 2]"]


def test_rows_go_with_their_completions_and_metrics_stay() -> None:
    first, second = Logs([{"a": 1}, {"a": 2}], {"m": (1.0, 1.0)}), Logs([{"b": 3}], {"m": (2.0, 1.0), "n": (5.0, 2.0)})
    assert joined([first, second]).select([2, 0]) == Logs([{"b": 3}, {"a": 1}], {"m": (3.0, 2.0), "n": (5.0, 2.0)})
    assert summed([]) == {}


def test_a_function_that_only_passes_its_columns_on_logs_no_metric() -> None:
    assert not LoadedReward("f", 1.0, lambda completions, **columns: [len(columns)]).logs_metrics
    assert LoadedReward("f", 1.0, plain).logs_metrics
