"""From counts to study.json, study.md and study.html."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vdr_cli.config.load import config_hash, load_config
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.stats.paired import holm, mean_over_seeds
from vdr_cli.study.analysis import Difference, analysed, best_first, contrasts, curves, start_value, verdict_of
from vdr_cli.study.curves import learning_curve, read_runs, shown_metrics
from vdr_cli.study.page import html, rebuild, write_results
from vdr_cli.study.plan import Task
from vdr_cli.study.record import read_record, record_of

Make = Callable[..., Any]
FILES = ("study.json", "study.md", "study.html")


def test_arms_that_differ_are_told_from_arms_that_do_not(make_study: Make) -> None:
    study, directory = make_study(prompts=128)
    rows = analysed(record_of(study, directory))["starter"]["pass@64"]
    found = {arm: row.difference.verdict for arm, row in rows.items() if row.difference}
    assert found == {"disagreement": "equivalent", "pass_at_k": "better", "bald_per_token": "worse"}
    assert rows["grpo"].difference is None and rows["grpo"].n == 20
    page = html(record_of(study, directory), {"starter": {"pass@64": rows}}, [])
    places = [page.index(f">{arm}</text>") for arm in ("pass_at_k", "disagreement", "bald_per_token")]
    assert places == sorted(places), "the best comes first"


def test_differences_are_paired_and_corrected(make_study: Make) -> None:
    study, directory = make_study(prompts=1, endpoint="pass@1", beds={"one": {}, "two": {"rollout.top_k": 5}})
    record = record_of(study, directory)
    rows = analysed(record)
    own, control = (
        np.array([run.solved[0] / 256 for run in record.of("one", arm).values()]) for arm in ("pass_at_k", "grpo")
    )
    difference = rows["one"]["pass@1"]["pass_at_k"].difference
    assert difference.value == pytest.approx((own - control).mean())
    assert (difference.low, difference.high) == pytest.approx(mean_over_seeds(own - control).interval())
    assert list(difference.seeds.values()) == pytest.approx(own - control)
    everywhere = [rows[bed]["pass@1"][arm].difference for bed in study.beds for arm in study.rivals]
    assert [one.p_holm for one in everywhere] == pytest.approx(holm([one.p for one in everywhere]))
    assert rows["one"]["area"]["pass_at_k"].difference.p_holm is None  # it is not tested


def test_a_seed_that_one_arm_lacks_is_left_out_of_its_pair(make_study: Make) -> None:
    study, directory = make_study(seeds=4)
    shutil.rmtree(directory.run(Task("starter", "grpo", 2)))
    record = record_of(study, directory)
    rows = analysed(record)["starter"]["pass@64"]
    assert list(rows["pass_at_k"].difference.seeds) == [0, 1, 3] and rows["pass_at_k"].n == 4
    write_results(record, directory.path)
    assert "1 of 16 runs missing" in (directory.path / "study.md").read_text()


@pytest.mark.parametrize("gone", ["grpo", "pass_at_k"])
def test_an_arm_without_any_run_is_said_to_have_none(make_study: Make, gone: str) -> None:
    study, directory = make_study(seeds=3)
    shutil.rmtree(directory.path / "runs" / "starter" / gone)
    write_results(record_of(study, directory), directory.path)
    text = (directory.path / "study.md").read_text()
    if gone == "grpo":
        assert "grpo has no run." in text and "No pair of runs: disagreement, pass_at_k, bald_per_token." in text
    else:
        assert "No pair of runs: pass_at_k." in text and "3 of 12 runs missing" in text
    rebuild(directory.path)


def test_one_seed_claims_nothing(make_study: Make) -> None:
    study, directory = make_study(seeds=1)
    write_results(record_of(study, directory), directory.path)
    results = json.loads((directory.path / "study.json").read_text())["results"]["starter"]["pass@64"]
    difference = results["pass_at_k"]["difference"]
    assert difference["verdict"] == "no interval" and difference["low"] is None and difference["p_holm"] == 1.0
    assert "Too few seeds for an interval" in (directory.path / "study.html").read_text()


def test_the_verdict_looks_at_the_sense_of_the_endpoint(make_study: Make) -> None:
    study, directory = make_study()
    difference = analysed(record_of(study, directory))["starter"]["pass@64"]["pass_at_k"].difference
    assert verdict_of(difference, 0.01, lower_is_better=True) == "worse"
    assert verdict_of(difference, 0.2, lower_is_better=False) == "undecided"


def test_equal_differences_have_no_spread_and_no_test(make_study: Make) -> None:
    study, directory = make_study({"grpo": (0.0, 0.0), "bald": (0.0, 0.0)}, seeds=3)
    record = record_of(study, directory)
    starts = [replace(run, solved=[0] * len(run.solved)) for run in record.starts]
    runs = [replace(run, solved=[256 * (run.arm == "bald")] * len(run.solved)) for run in record.runs]
    write_results(replace(record, starts=starts, runs=runs), directory.path)
    difference = json.loads((directory.path / "study.json").read_text())["results"]["starter"]["pass@64"]["bald"]
    assert difference["difference"]["verdict"] == "no spread" and difference["difference"]["low"] is None
    text = (directory.path / "study.md").read_text()
    assert "The same difference for every seed, so it cannot be tested: bald (+1.000)." in text
    assert "No difference shown" not in text
    assert ">no spread</text>" in (directory.path / "study.html").read_text()


def test_the_best_comes_first_in_the_sense_of_the_endpoint(make_study: Make) -> None:
    study, directory = make_study(endpoint="first_success", seeds=4)
    record = record_of(study, directory)
    steps = {"grpo": 20.0, "disagreement": 20.0, "pass_at_k": 5.0, "bald_per_token": 9.0}
    runs = [
        replace(run, first_success=steps[run.arm or ""] + run.seed % 2 * (run.arm != "grpo")) for run in record.runs
    ]
    write_results(replace(record, runs=runs), directory.path)
    page, text = ((directory.path / name).read_text() for name in ("study.html", "study.md"))
    places = [page.index(f">{arm}</text>") for arm in ("pass_at_k", "bald_per_token", "disagreement")]
    assert places == sorted(places)
    better = next(line for line in text.splitlines() if line.startswith("- Better than grpo"))
    assert better.index("pass_at_k") < better.index("bald_per_token")


def test_an_arm_without_a_value_comes_last() -> None:
    def difference(value: float) -> Difference:
        return Difference(2, value, math.nan, math.nan, {}, math.nan, math.nan)

    arms = {"none": difference(math.nan), "low": difference(1.0), "high": difference(2.0)}
    assert [arm for arm, _ in best_first(arms, lower_is_better=False)] == ["high", "low", "none"]
    assert [arm for arm, _ in best_first(arms, lower_is_better=True)] == ["low", "high", "none"]


def test_the_results_come_again_bit_for_bit_from_the_record_and_the_metrics(make_study: Make, tmp_path: Path) -> None:
    tuning = {
        "seeds": [77],
        "trials": {arm: [{"grpo.beta": 0.1}, {}] for arm in ("grpo", "disagreement", "pass_at_k", "bald_per_token")},
    }
    study, directory = make_study(seeds=3, tuning=tuning)
    write_results(record_of(study, directory), directory.path)
    before = [(directory.path / name).read_bytes() for name in FILES]
    moved = tmp_path / "elsewhere" / "copy"
    for metrics in directory.path.glob("runs/*/*/*/metrics.jsonl"):
        target = moved / metrics.relative_to(directory.path)
        target.parent.mkdir(parents=True)
        shutil.copy(metrics, target)
    shutil.copy(directory.path / "study.json", moved)
    rebuild(moved)
    assert [(moved / name).read_bytes() for name in FILES] == before
    assert "grpo.beta: 0.1" in (moved / "study.md").read_text()


def test_a_run_is_hashed_by_the_settings_it_ran_with(make_study: Make) -> None:
    """Not by those that the code's present defaults would give it."""
    study, directory = make_study(prompts=4, seeds=2)
    path = directory.run(Task("starter", "grpo", 1)) / "config.yaml"
    before = {run.task: run.settings for run in record_of(study, directory).runs}
    path.write_text(path.read_text() + "grpo:\n  epsilon_high: 0.4321\n")  # as if the default had been another
    after = {run.task: run.settings for run in record_of(study, directory).runs}
    assert (
        after.pop(Task("starter", "grpo", 1))
        == config_hash(load_config(path))
        != before.pop(Task("starter", "grpo", 1))
    )
    assert after == before


def test_the_page_shows_the_settings_that_the_arms_share(make_study: Make) -> None:
    beds = {
        "starter": {},
        "narrow": {"rollout": {"top_k": 5}, "rewards.functions": [{"name": "a|b:c"}, {"name": "length"}]},
    }
    arms, texts = {"grpo": (0.0, 0.0), "bald": (0.0, 0.0)}, []
    for gate in ("all", "not_failed"):
        study, directory = make_study(arms, 4, seeds=2, folder=gate, beds=beds, base={"bonus.gate": gate})
        write_results(record_of(study, directory), directory.path)
        texts.append([(directory.path / name).read_text().replace(f"# {gate}", "#") for name in FILES[1:]])
    for before, after in zip(*texts, strict=True):
        assert before != after
    for text, row in zip(texts[1], ("| base | {} |", '<th scope="row">base</th><td class="text">{}</td>'), strict=True):
        assert row.format("bonus.gate: not_failed") in text
    assert r"| bed narrow | rollout.top_k: 5, rewards.functions: [{name: a\|b:c}, {name: length}] |" in texts[1][0]
    assert "| bed starter | as the base |" in texts[1][0]
    study, directory = make_study(arms, 4, seeds=2)
    write_results(record_of(study, directory), directory.path)
    assert "| base | the defaults |" in (directory.path / "study.md").read_text()


def test_no_time_is_in_the_record(make_study: Make) -> None:
    study, directory = make_study(seeds=2)
    write_results(record_of(study, directory), directory.path)
    before = (directory.path / "study.json").read_text()
    for metrics in directory.path.glob("runs/*/*/*/metrics.jsonl"):
        metrics.write_text(metrics.read_text().replace('"step_time": 0.5', '"step_time": 0.75'))
    write_results(record_of(study, directory), directory.path)
    assert (directory.path / "study.json").read_text() == before
    assert "0:00:30" in (directory.path / "study.md").read_text()  # 40 steps


def test_what_cannot_be_read_is_one_line(make_study: Make, tmp_path: Path) -> None:
    study, directory = make_study(seeds=2)
    with pytest.raises(ConfigError, match=r"no study\.json in it"):
        read_record(tmp_path)
    write_results(record_of(study, directory), directory.path)
    metrics = directory.run(Task("starter", "grpo", 1)) / "metrics.jsonl"
    metrics.unlink()
    with pytest.raises(DataError, match=f"{metrics}: missing"):
        rebuild(directory.path)
    (directory.path / "study.json").write_text("{}")
    with pytest.raises(DataError, match="not the results of a study"):
        rebuild(directory.path)
    (directory.path / "study.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        rebuild(directory.path)


def test_runs_measured_on_other_prompts_are_refused(make_study: Make) -> None:
    study, directory = make_study(seeds=2)
    path = directory.evaluation(Task("starter", "grpo", 1))
    counts = json.loads(path.read_text())
    path.write_text(json.dumps({**counts, "rows": counts["rows"][::-1]}))
    with pytest.raises(DataError, match="measured on other prompts"):
        record_of(study, directory)


def test_curves_of_pass_at_k_and_of_learning(make_study: Make) -> None:
    study, directory = make_study(seeds=5)
    record = record_of(study, directory)
    found = curves(record, "starter")
    assert list(found) == [*study.arms, ""]
    run = record.of("starter", "grpo")
    assert found["grpo"].mean[0] == pytest.approx(np.mean([np.mean(one.solved) / 256 for one in run.values()]))
    control = found["grpo"]
    assert control.k == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert all(a <= b <= c for a, b, c in zip(control.low, control.mean, control.high, strict=True))
    runs = read_runs(record, directory.path)
    names = [metric for metric, _, _ in shown_metrics(runs)]
    assert names == ["eval/pass@1", "eval/pass@8", "reward", "entropy"]
    own = [one for one in runs if one.run.arm == "grpo"]
    series = learning_curve("grpo", own, "reward")
    assert list(series.x) == list(range(1, 41))
    assert series.y[0] == pytest.approx(np.mean([one.values["reward"][1] for one in own]))
    assert series.low is not None and series.low[0] < series.y[0]
    assert own[0].seconds == 20.0


def test_the_interval_of_a_share_stays_between_0_and_1(make_study: Make) -> None:
    study, directory = make_study(seeds=3, prompts=4)
    record = record_of(study, directory)
    runs = [replace(run, solved=[3 * (run.seed == 0)] * 4) for run in record.runs]
    row = analysed(replace(record, runs=runs))["starter"]["pass@1"]["grpo"]
    assert row.low == 0.0 < row.mean < row.high < 1.0


def test_classes_of_the_start_count_only_among_as_many_completions(make_study: Make) -> None:
    study, directory = make_study(seeds=2)
    record = record_of(study, directory)
    start = record.start("starter")
    assert start is not None and start.samples == 1024 and study.file.evaluation.samples == 256
    assert start_value(record, "starter", "pass@4") is not None and start_value(record, "starter", "classes") is None
    (found,) = record.starts
    equal = replace(record, starts=[replace(found, samples=256)])
    assert start_value(equal, "starter", "classes") == pytest.approx(np.mean(start.classes))


def test_any_two_arms_can_be_compared(make_study: Make) -> None:
    study, directory = make_study(seeds=3)
    record = record_of(study, directory)
    ((first, second, difference),) = contrasts(record, "starter", [("pass_at_k", "grpo")])
    assert (first, second) == ("pass_at_k", "grpo") and contrasts(record, "starter") == []
    row = analysed(record)["starter"][study.file.endpoint]["pass_at_k"]
    assert row.difference is not None and difference.value == row.difference.value


def test_names_are_text_on_the_page(make_study: Make) -> None:
    study, directory = make_study(seeds=2, folder="<b>bold<b>")
    write_results(record_of(study, directory), directory.path)
    page = (directory.path / "study.html").read_text()
    assert "<b>bold" not in page and "&lt;b&gt;bold" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
