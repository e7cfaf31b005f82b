import json
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vdr_cli.beds.registry import BEDS
from vdr_cli.data.completions import write_completions
from vdr_cli.errors import ConfigError, DataError, MachineError
from vdr_cli.report import data as report_data
from vdr_cli.report import run_page, score_page
from vdr_cli.report.data import load_run, over_seeds, pieces, run_groups
from vdr_cli.report.page import write_pictures, write_report
from vdr_cli.scoring.request import Fields

MakeRun = Callable[..., Path]


class Tags(HTMLParser):
    """Every tag with its attributes, and the text of the data script."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data


def tags_of(path: Path) -> Tags:
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    return tags


def test_a_page_of_its_own_without_any_request(make_run: MakeRun) -> None:
    page = write_report(make_run())
    assert page.name == "report.html"
    tags = tags_of(page)
    assert not [
        tag for tag, attributes in tags.tags if tag in ("link", "img", "iframe", "object") or "src" in attributes
    ]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", page.read_text())
    policy = next(a["content"] for _, a in tags.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy)


def test_hostile_completions_are_data(make_run: MakeRun) -> None:
    page = write_report(make_run())
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2
    assert "hacked=1</script>" not in text
    assert not re.search(r"[\x00\x1b\u202e]", text)
    groups = json.loads(tags_of(page).data)["groups"]
    texts = [one["text"] for one in groups[0]["completions"]]
    assert texts[0] == "<script>window.hacked=1</script>"
    assert len(texts[1]) == 100_000
    assert texts[2].startswith("שלום")
    assert "<U+202E>" in texts[2]
    assert texts[4] == "nul ␀ here"
    assert texts[5] == "␛[31mred␛[0m"


def test_tokens_with_their_disagreement(make_run: MakeRun) -> None:
    data = json.loads(tags_of(write_report(make_run())).data)
    one = data["groups"][1]["completions"][0]
    assert len(one["tokens"]) == len(one["heat"]) == 6
    assert len(data["levels"]) == 4
    assert one["numbers"].keys() == {"reward", "bonus", "advantage", "bald"}


def test_groups_that_the_run_measured_come_first_where_not_all_fit(make_run: MakeRun) -> None:
    page = write_report(make_run())
    assert "4 groups were measured token by token. <code>vdr report RUN --members 8</code>" in page.read_text()
    groups = [[0, 1], [2, 3], [4, 5]]
    columns = {"bald_tokens": [None, None, None, None, [0.1], [0.2]]}
    assert [report_data._chosen(columns, groups, wanted) for wanted in (1, 2, 3)] == [[2], [1, 2], [0, 1, 2]]
    assert report_data._chosen({}, groups, 2) == [0, 2]


def test_scores_without_members_are_coloured_by_entropy(tmp_path: Path) -> None:
    from vdr_cli.scoring.request import ScoreRequest
    from vdr_cli.scoring.score import run_score

    given, scored = tmp_path / "in.jsonl", tmp_path / "scores.jsonl"
    given.write_text('{"prompt": "1 2 3=6:", "completion": "1+2+3"}\n')
    run_score(ScoreRequest((str(given),), "starter", str(scored), disagreement=None, tokens=True))
    page = write_report(scored)
    data = json.loads(tags_of(page).data)
    assert data["heat"] == "entropy"
    assert len(data["groups"][0]["completions"][0]["heat"]) == 5
    assert "the model is unsure" in page.read_text()


def test_charts_are_those_that_were_measured(make_run: MakeRun) -> None:
    text = write_report(make_run()).read_text()
    captions = re.findall("<figcaption>(.*?) <span", text)
    assert captions == [
        "Reward",
        "Held-out pass@1",
        "Held-out pass@8",
        "Disagreement",
        "Groups whose rewards are all equal",
        "Reward against disagreement",
    ]


def test_seeds_become_a_band_and_other_settings_a_curve(make_run: MakeRun) -> None:
    runs = [load_run(make_run(f"s{seed}", seed)) for seed in range(3)] + [load_run(make_run("none", 0, weight=0.0))]
    band, curve = over_seeds(runs, "reward")
    assert band.name == "s0 (3 seeds)"
    values = [run.metrics["reward"][1][7] for run in runs[:3]]
    assert band.low is not None
    assert band.high is not None
    assert (band.low[7], band.y[7], band.high[7]) == (min(values), pytest.approx(sum(values) / 3), max(values))
    assert (curve.name, curve.low) == ("none", None)
    del runs[0].metrics["kl"], runs[1].metrics["kl"], runs[2].metrics["kl"]
    empty, other = over_seeds(runs, "kl")  # keeps its place, so that the other keeps its colour
    assert (empty.name, list(empty.x), other.name) == ("s0", [], "none")
    (own,) = over_seeds(runs[:1], "eval/pass@1")
    assert own.low == [0.4] * 4


def test_a_run_given_twice_counts_once_and_seeds_are_those_that_differ(make_run: MakeRun) -> None:
    a, again, other = load_run(make_run("a", 0)), load_run(make_run("again", 0)), load_run(make_run("b", 1))
    assert [one.name for one in over_seeds([a, a], "reward")] == ["a"]
    assert [one.name for one in over_seeds([a, again], "reward")] == ["a (2 runs)"]
    assert [one.name for one in over_seeds([a, again, other], "reward")] == ["a (2 seeds)"]


def test_numbers_near_the_largest_are_drawn(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        for step, value in ((41, 1e308), (42, -1e308)):
            file.write(json.dumps({"step": step, "reward": value}) + "\n")
    write_completions(run / "completions", 30, {"prompt": ["p"], "completion": ["c"], "reward": [sys.float_info.max]})
    page = write_report(run)
    assert "1e+300" in page.read_text() and "nan" not in page.read_text()
    assert json.loads(tags_of(page).data)["groups"][-1]["completions"][0]["numbers"]["reward"] == sys.float_info.max
    assert write_pictures(run, tmp_path / "figures")


def test_a_damaged_file_that_is_not_shown_is_named(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "GROUPS_SHOWN", 2)
    run = make_run()
    for step in (15, 30):
        write_completions(run / "completions", step, {"prompt": ["p"], "completion": ["c"]})
    (run / "completions" / "step_000015.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"step_000015.parquet: not a Parquet file of completions"):
        run_groups(load_run(run), None)


def test_pictures_go_home(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert {path.parent for path in write_pictures(make_run(), "~/figs")} == {tmp_path / "home" / "figs"}
    assert not (tmp_path / "~").exists()


def test_a_page_stays_small(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(make_run())
    monkeypatch.setattr(report_data, "CHARACTERS_SHOWN", 1000)
    groups, saved = run_groups(run, None)
    assert len(groups) < saved == 6 or len(groups) <= 2
    monkeypatch.setattr(report_data, "CHARACTERS_SHOWN", 10**9)
    monkeypatch.setattr(report_data, "GROUPS_SHOWN", 2)
    groups, saved = run_groups(run, None)
    assert (len(groups), saved) == (2, 6)


def test_bytes_that_make_one_character_stay_together() -> None:
    class Bytes:
        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode("utf-8", "replace")

    decode = pieces(Bytes())
    assert decode([*b"a", *"é".encode(), *b"b"]) == ["a", "é", "", "b"]
    assert decode([0xFF, 0x61]) == ["\ufffda", ""] or decode([0xFF, 0x61])[0].startswith("\ufffd")


def test_scores_with_labels(tmp_path: Path) -> None:
    from vdr_cli.scoring.request import ScoreRequest
    from vdr_cli.scoring.score import run_score

    rows = [{"prompt": f"1 2 {index}=6:", "completion": f"1+2+{index}", "label": index % 2} for index in range(6)]
    given = tmp_path / "in.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = tmp_path / "scores.parquet"
    run_score(ScoreRequest((str(given),), "starter", str(scored), tokens=True))
    page = write_report(scored)
    assert page.name == "scores.parquet.html"
    text = page.read_text()
    assert "Risk against coverage" in text
    assert "bald_mean</th>" in text
    assert 'aria-label="AUROC with 95 % intervals: ' in text
    assert "auroc_with_95_intervals.png" in {path.name for path in write_pictures(scored, tmp_path / "figures")}
    data = json.loads(tags_of(page).data)
    assert "".join(data["groups"][0]["completions"][0]["tokens"]) == "1+2+0"


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_scores_in_other_formats(tmp_path: Path, suffix: str) -> None:
    from vdr_cli.scoring.request import ScoreRequest
    from vdr_cli.scoring.score import run_score

    given = tmp_path / "in.csv"
    rows = "".join(f"1 2 3=6:,1+2+{index},{index == 3}\n" for index in range(4))
    given.write_text(f"prompt,completion,label\n{rows}")
    scored = tmp_path / f"scores.{suffix}"
    run_score(ScoreRequest((str(given),), "starter", str(scored), tokens=True))
    page = write_report(scored)
    assert "Risk against coverage" in page.read_text()
    one = json.loads(tags_of(page).data)["groups"][0]["completions"][0]
    assert "".join(one["tokens"]) == "1+2+0"
    assert len(one["heat"]) == 5
    assert one["numbers"]["bald_mean"] > 0


def test_a_users_columns_do_not_pass_for_token_columns(tmp_path: Path) -> None:
    file = tmp_path / "scores.csv"
    file.write_text("prompt,completion,token_type,token_ids,prompt_ids,nll_mean\np,c,word,7,x,0.5\n")
    columns = report_data.scored_rows(file)
    assert (columns["token_type"], columns["token_ids"], columns["prompt_ids"]) == (["word"], [None], [None])
    assert json.loads(tags_of(write_report(file)).data)["groups"][0]["completions"][0]["text"] == "c"


ASKED = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"q": "1:", "answer": "2"}, Fields(prompt="q", completion="answer")),
        ({"prompt": "0:", "q": "1:", "answer": "2"}, Fields(prompt="q", completion="answer")),
        ({"messages": [ASKED], "q": "1:", "answer": "2"}, Fields(prompt="q", completion="answer")),
        ({"arguments": {"gen_args_0": {"arg_0": "1:"}}, "resps": [["2"]]}, Fields()),
        ({"arguments": [["1:", {}]], "resps": [["3", "2"]]}, Fields(completion="resps.0.1")),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_what_was_scored_is_shown_wherever_it_lay(tmp_path: Path, row: Any, named: Fields, suffix: str) -> None:
    from vdr_cli.scoring.request import ScoreRequest
    from vdr_cli.scoring.score import run_score

    given, scored = tmp_path / "in.jsonl", tmp_path / f"scores.{suffix}"
    given.write_text(json.dumps(row) + "\n")
    run_score(ScoreRequest((str(given),), "starter", str(scored), disagreement=None, fields=named))
    (group,) = json.loads(tags_of(write_report(scored)).data)["groups"]
    assert (group["prompt"], [one["text"] for one in group["completions"]]) == ("1:", ["2"])


def test_rows_without_text_are_shown_by_their_ids_or_left_out(tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    rows: list[dict[str, Any]] = [{"messages": [ASKED]}, {"prompt_ids": [3]}, {"prompt_ids": [3]}, {"prompt_ids": [4]}]
    file.write_text("".join(json.dumps(row | {"nll_mean": 1.0}) + "\n" for row in rows))
    groups, count = report_data.scored_groups(report_data.scored_rows(file), None)
    assert (count, [(group.prompt, len(group.completions)) for group in groups]) == (2, [("", 2), ("", 1)])


def test_a_nested_quality_has_its_curve() -> None:
    chart = score_page._risk_chart({"doc": [{"score": 3.0}, {"score": 1.0}], "nll_mean": [0.1, 0.9]}, "doc.score")
    assert chart.y_label == "mean of -doc.score"
    assert list(chart.series[0].y) == [-3.0, -2.0]


def test_pictures(make_run: MakeRun, tmp_path: Path) -> None:
    paths = write_pictures(make_run(), tmp_path / "figures")
    assert {path.name for path in paths} >= {"reward.png", "held_out_pass_1.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_errors_in_one_line(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics.jsonl"):
        write_report(tmp_path)
    broken = make_run("broken")
    (broken / "config.yaml").write_text("a: [1")
    with pytest.raises(DataError, match=r"config.yaml: not valid YAML"):
        write_report(broken)
    (broken / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="no model to measure with"):
        write_report(broken, members=2)
    other = tmp_path / "rows.jsonl"
    other.write_text('{"prompt": "a"}\n')
    with pytest.raises(DataError, match="not a file that vdr score wrote"):
        write_report(other)
    with pytest.raises(MachineError, match="cannot be written"):
        write_report(make_run(), tmp_path / "no" / "report.html")


def test_tokens_are_measured_when_asked(make_run: MakeRun) -> None:
    import pyarrow.parquet as pq

    run = make_run()
    with pytest.raises(ConfigError, match=r"--members 2: .*wide has no model to measure with"):
        write_report(run, members=2)  # the run was killed, or did not save it: the start model is another one
    shutil.copytree(BEDS["starter"].model_path, run / "model")
    for file in (run / "completions").iterdir():
        pq.write_table(pq.read_table(file).drop_columns(["bald_tokens"]), file)
    bare = json.loads(tags_of(write_report(run)).data)
    assert bare["groups"][0]["completions"][0]["heat"] is None
    measured = json.loads(tags_of(write_report(run, members=2)).data)
    heat = measured["groups"][0]["completions"][0]["heat"]
    assert len(heat) == 6
    assert all(0 < value < 0.7 for value in heat)


def test_the_measured_model_is_the_runs_own(make_run: MakeRun) -> None:
    run = load_run(make_run())
    assert run_page._final_model(run) is None and run_page._start_model(run) == "starter"
    (run.path / "model").mkdir()
    (run.path / "model" / "adapter_config.json").write_text("{}")
    assert run_page._final_model(run) == str(run.path / "model")
    (run.path / "model" / "config.json").write_text("{}")
    assert run_page._final_model(run) == str(run.path)


def test_early_warnings_of_a_run_are_on_its_page(make_run: Callable[..., Path]) -> None:
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        for step, value in ((41, 0.4), (42, 0.4)):
            file.write(json.dumps({"step": step, "eval/pass@8": value, "eval/pass@8_high": value}) + "\n")
    assert "Warning at step 42 of wide: held-out pass@8 has fallen from 0.900" in write_report(run).read_text()


def test_an_episode_is_shown_turn_by_turn_with_roles_and_colours_on_the_policys_tokens(make_run: MakeRun) -> None:
    run = make_run()
    words = [
        {"role": "assistant", "content": "<tool_call>1</tool_call>"},
        {"role": "tool", "content": "</script><b>found</b>"},
        {"role": "assistant", "content": "2"},
    ]
    rows = {
        "group": [0, 0],
        "prompt": ["p", "p"],
        "completion": [words, words],
        "completion_ids": [[3, 4, 5, 6], [3, 4, 5, 6]],
        "policy_mask": [[True, False, False, True], [True, False, True, False]],
        "reward": [1.0, 0.0],
        "bald_tokens": [[0.25, 0.0, 0.0, 0.5], [0.25, 0.0, 0.5, 0.0]],
    }
    write_completions(run / "completions", 30, rows)
    groups, _ = run_groups(load_run(run), lambda ids: [f"t{token}" for token in ids])
    shown = next(one for group in groups for one in group.completions if one.turns)
    assert shown.turns is not None
    assert [(turn.role, turn.tokens, turn.heat) for turn in shown.turns] == [
        ("assistant", ["t3"], [0.25]),
        ("tool", None, None),
        ("assistant", ["t6"], [0.5]),
    ]
    assert shown.heat == [0.25, 0.5] and shown.tokens is None
    page = write_report(run).read_text(encoding="utf-8")
    assert "<b>found" not in page and "\\u003cb\\u003efound" in page and page.count("<script") == 2


def test_scored_conversations_are_shown_by_their_turns(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "b"},
    ]
    row = {"messages": messages, "nll_mean": 1.0, "token_ids": [3, 4, 5], "token_bald": [0.1, None, 0.3]}
    file = tmp_path / "scores.jsonl"
    file.write_text(json.dumps(row) + "\n")
    columns = report_data.scored_rows(file)
    (group,), _ = report_data.scored_groups(columns, lambda ids: [str(token) for token in ids])
    assert group.prompt == "[user] q"
    assert [(turn.role, turn.heat) for turn in group.completions[0].turns or ()] == [
        ("assistant", [0.1]),
        ("user", None),
        ("assistant", [0.3]),
    ]
