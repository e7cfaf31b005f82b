"""`vdr eval` and `vdr score`: from flags to requests, from results to tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from vdr_cli.cli import app, comparison
from vdr_cli.cli import score as score_command
from vdr_cli.cli.eval import launch_overrides
from vdr_cli.cli.score import ProgressLines
from vdr_cli.config import recipe
from vdr_cli.config.load import dump_run_record, load_config
from vdr_cli.evaluation import evaluate, result
from vdr_cli.scoring import score
from vdr_cli.scoring.request import ScoreResult


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "bed_recipe", lambda model: {"rollout": {"max_new_tokens": 16}})


@dataclass(frozen=True)
class Result:
    model: str

    def record(self) -> dict:
        return {
            "model": self.model,
            "prompts": 4,
            "samples": 8,
            "pass@1": 0.25,
            "pass@1_low": 0.125,
            "pass@1_high": 0.5,
        }


@pytest.fixture
def asked(monkeypatch) -> list:
    requests: list = []

    def run_eval(request):
        requests.append(request)
        return [Result(name) for name in request.models]

    monkeypatch.setattr(evaluate, "run_eval", run_eval)
    monkeypatch.setattr(result, "paired_differences", lambda results: [])
    return requests


@pytest.fixture
def scored(monkeypatch) -> list:
    requests: list = []

    def run_score(request, progress=None):
        requests.append(request)
        return ScoreResult(
            request.output, 3, 1, 0, 0, 0.5, ("1 row skipped: [b]x[/b]",), (), ({"measure": "bald_mean", "auroc": 0.7},)
        )

    monkeypatch.setattr(score, "run_score", run_score)
    return requests


def run_directory(name: str, *overrides: str) -> str:
    (Path(name) / "model").mkdir(parents=True)
    (Path(name) / "model" / "config.json").write_text("{}")
    (Path(name) / "config.yaml").write_text(dump_run_record(load_config(overrides=overrides)))
    return name


def test_eval_defaults_are_the_starters(asked, capsys):
    assert app.run(["eval", "starter"]) == 0
    (request,) = asked
    assert (request.models, request.data.eval_name, request.data.eval_split) == (("starter",), "starter", "test")
    assert (request.rollout.max_new_tokens, request.samples, request.ks, request.greedy) == (16, 8, None, False)
    assert "0.250 [0.125, 0.500]" in capsys.readouterr().out


def test_eval_flags_reach_the_request(asked):
    Path("d.jsonl").write_text('{"prompt": "a"}\n')
    arguments = [
        "--data",
        "d.jsonl",
        "--split",
        "train",
        "--reward",
        "length",
        "--samples",
        "4",
        "--k",
        "1",
        "--k",
        "2",
    ]
    arguments += ["--prompts", "5", "--max-new-tokens", "9", "--temperature", "0.5", "--seed", "3"]
    assert app.run(["eval", "starter", *arguments, "--set", "rollout.top_k=7", "--json", "o.json"]) == 0
    (request,) = asked
    assert (request.data.eval_name, request.data.eval_split) == ("d.jsonl", "train")
    assert (request.data.name, request.rewards.functions[0].name) == ("d.jsonl", "length")
    assert (request.samples, request.ks, request.prompts, request.seed) == (4, (1, 2), 5, 3)
    assert (request.rollout.max_new_tokens, request.rollout.temperature, request.rollout.top_k) == (9, 0.5, 7)
    assert json.loads(Path("o.json").read_text())["models"][0]["pass@1"] == 0.25
    assert app.run(["eval", "starter", "-n", "1", "--k", "1", "--greedy"]) == 0
    assert (asked[-1].samples, asked[-1].greedy) == (1, True)
    assert app.run(["eval", "starter", "--samples", "64", "--k", "1,8", "--k", "64"]) == 0
    assert asked[-1].ks == (1, 8, 64)
    assert app.run(["eval", "starter", "--k", "1,many"]) == 2


def test_eval_takes_the_settings_of_the_run(asked):
    run = run_directory("r", "data.eval_split=train", "rollout.max_new_tokens=33", "rewards.solved_at=0.5")
    assert app.run(["eval", "starter", run]) == 0
    (request,) = asked
    assert request.models == ("starter", "r") and request.data.eval_split == "train"
    assert request.rollout.max_new_tokens == 33 and request.rewards.solved_at == 0.5


def test_eval_leaves_the_subset_and_options_of_the_runs_own_data_out_on_other_data(asked, capsys):
    run = run_directory("r", "data.name=openai/gsm8k", "data.subset=main", "rewards.functions=[{name: length}]")
    Path("d.jsonl").write_text('{"prompt": "a"}\n')
    assert app.run(["eval", run]) == 0 and asked[-1].data.subset == "main"
    assert app.run(["eval", run, "--data", "d.jsonl"]) == 0 and asked[-1].data.subset is None
    assert app.run(["eval", run, "--data", "d.jsonl", "--set", "data.subset=main"]) == 2
    assert "error: data.subset main: d.jsonl has no subsets; leave data.subset out" in capsys.readouterr().err


def test_eval_shows_differences_and_names_as_text(capsys):
    records = [{"model": "[red]a", "prompts": 1, "samples": 1, "reward": 12.5, "entropy": None}]
    comparison.show(records, [{"model": "b", "minus": "[red]a", "reward": -0.5, "reward_low": -1.0, "reward_high": 0}])
    shown = capsys.readouterr().out
    assert "[red]a" in shown and "b - [red]a" in shown and "-0.500 [-1.000, 0.000]" in shown


def test_score_flags_reach_the_request(scored, capsys):
    arguments = ["--members", "4", "--dropout", "0.2", "--scope", "last_k", "--last-k", "2", "--mask-sharing", "token"]
    arguments += ["--seed", "5", "--prompt-column", "q", "--completion-column", "a", "--label-column", "ok"]
    arguments += ["--group-column", "g", "--tokens", "--max-tokens", "9", "--append-eos", "--batch-tokens", "64"]
    arguments += ["--on-error", "skip", "--resume", "--dtype", "float32", "--revision", "main", "--trust-remote-code"]
    assert app.run(["score", "a.jsonl", "b.jsonl", "--model", "starter", "-o", "o.csv", *arguments]) == 0
    (request,) = scored
    ensemble = request.disagreement
    assert (ensemble.members, ensemble.dropout, ensemble.scope, ensemble.last_k) == (4, 0.2, "last_k", 2)
    assert ensemble.mask_sharing == "token" and request.inputs == ("a.jsonl", "b.jsonl") and request.output == "o.csv"
    fields = request.fields
    assert (fields.prompt, fields.completion, fields.label, fields.group) == ("q", "a", "ok", "g")
    assert (request.seed, request.tokens, request.max_tokens, request.append_eos) == (5, True, 9, True)
    assert (request.batch_tokens, request.on_error, request.resume, request.dtype) == (64, "skip", True, "float32")
    assert (request.revision, request.trust_remote_code) == ("main", True)
    shown = capsys.readouterr().out
    assert "3 rows scored" in shown and "[b]x[/b]" in shown and "0.700" in shown


def test_a_log_file_gets_a_line_now_and_then(capsys):
    lines = ProgressLines()
    for seconds, fraction in ((5.0, 0.5), (20.0, 0.6), (35.0, 0.75), (40.0, 0.9)):  # resumed: half was there
        lines(score.Progress(1, fraction, seconds))
    assert capsys.readouterr().err == "scoring: 75%, 0:00:30 left\n"


def test_equal_labels_are_said_in_words_and_a_ranking_fits_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    score_command.show(ScoreResult("o", 1, 0, 0, 0, 1.0, ranking=({"measure": "bald_mean", "auroc": float("nan")},)))
    assert "nothing to rank" in capsys.readouterr().out
    names = {"auroc": 0.875, "auprc": 0.875, "prr": -0.875}
    numbers = {f"{name}{end}": value for name, value in names.items() for end in ("", "_low", "_high")}
    score_command.show(ScoreResult("o", 1, 0, 0, 0, 1.0, ranking=({"measure": "vote_disagree", **numbers},)))
    shown = capsys.readouterr().out
    assert shown.count("0.875 [0.88, 0.88]") == 2
    assert "-0.875 [-0.88, -0.88]" in shown


def test_score_defaults(scored):
    assert app.run(["score", "a.jsonl", "--model", "starter", "--members", "0"]) == 0
    assert scored[-1].disagreement is None and scored[-1].output == "a.scored.jsonl"
    assert app.run(["score", "a.ndjson", "--model", "starter"]) == 0
    assert scored[-1].output == "a.scored.jsonl"
    Path("run").mkdir()
    assert app.run(["score", "run", "--model", "starter"]) == 0
    assert scored[-1].output == "run/scores.parquet" and scored[-1].disagreement.members == 8


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "./none"], "error: MODEL ./none: no such directory"),
        (["eval", "starter", "empty"], "error: MODEL empty: neither config.json nor"),
        (["eval", "starter", "--greedy", "--temperature", "1"], "cannot be combined"),
        (["eval", "starter", "--greedy", "-n", "16"], "--greedy draws one completion per prompt: leave out --samples"),
        (["eval", "starter", "--greedy", "--k", "1,8"], "--greedy draws one completion per prompt: leave out"),
        (["eval", "starter", "--set", "rollout.group_size=64"], "vdr eval does not read rollout.group_size; give --s"),
        (["eval", "starter", "--set", "rollout.backend=vllm"], "vdr eval does not read rollout.backend; it samples"),
        (["eval", "starter", "--set", "model.lora.rank=4"], "vdr eval does not read model.lora; an adapter is named"),
        (["eval", "starter", "--set", "model.name=x"], "vdr eval does not read model.name; name the models"),
        (["eval", "starter", "--set", "train.steps=3"], "vdr eval does not read train"),
        (["eval", "starter", "--set", "data.split=test"], "vdr eval does not read data.split; give --split"),
        (
            ["eval", "starter", "--data", "starter", "--set", "data.eval_name=x.jsonl"],
            "vdr eval does not read data.eval_name; --data names the prompts already",
        ),
        (["eval", "starter", "--set", "data.shuffle=true"], "vdr eval does not read data.shuffle; it takes prompts"),
        (["eval", "starter", "--json", "none/o.json"], "no directory"),
        (["eval", "starter", "--temperature", "-1"], "--temperature: rollout.temperature must be above 0"),
        (["score", "-", "--model", "starter"], "-o is needed"),
        (
            ["score", "a.jsonl", "--model", "starter", "--members", "1"],
            "--members: disagreement.members must be at least 2",
        ),
        (["score", "a.jsonl", "--model", "starter", "--scope", "top"], "--scope: disagreement.scope must be 'full' or"),
        (["score", "a.jsonl", "--model", "starter", "--last-k", "2"], "last_k is set but scope is full"),
        (
            ["score", "a.jsonl", "--model", "starter", "--members", "0", "--dropout", "0.2"],
            "--members 0 measures no disagreement: leave out --dropout",
        ),
        (["score", "a.jsonl", "--model", "starter", "--on-error", "cry"], "--on-error cry: give one of stop, skip"),
        (["score", "a.jsonl", "--model", "./none"], "error: --model ./none: no such directory"),
        (["score", "a.jsonl", "--model", "empty"], "error: --model empty: neither config.json nor"),
        (["score", "a.jsonl", "--model", "starter", "-o", "none/o.csv"], "-o none/o.csv: no directory"),
    ],
)
def test_refused_before_torch(arguments, expected, asked, scored, capsys):
    Path("empty").mkdir()
    assert app.run(arguments) == 2
    streams = capsys.readouterr()
    assert expected in streams.err and streams.err.count("\n") == 1 and asked == [] and scored == []


@pytest.mark.parametrize(("flag", "package"), [("--diversity", "sacrebleu"), ("--reference=x", "rouge-score")])
def test_a_package_is_missed_before_anything_is_sampled(flag, package, asked, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert app.run(["eval", "starter", flag]) == 2
    assert f"needs {package}: pip install {package}" in capsys.readouterr().err and not asked


def test_a_run_that_was_resumed_and_has_not_ended_has_an_older_model(asked, scored, capsys):
    run_directory("run")
    for command in (["eval", "run"], ["score", "a.jsonl", "--model", "run"]):
        assert app.run(command) == 0
        assert "warning: run was resumed and has not ended; its model/ is the older one" in capsys.readouterr().err
        Path("run/finished.json").write_text("{}")
        assert app.run(command) == 0
        assert "warning" not in capsys.readouterr().err
        Path("run/finished.json").unlink()


def test_launch_settings_as_a_section_reach_the_launcher():
    assert launch_overrides(["launch={num_processes: 2}", "launch.port=1", "rollout.top_p=0.5"]) == [
        "launch={num_processes: 2}",
        "launch.port=1",
    ]


def test_an_output_that_is_complete_claims_no_speed(capsys):
    score_command.show(ScoreResult("o.jsonl", 3, 0, 0, 0, 0.1, (), (), (), is_reused=True))
    assert "3 rows were scored already: o.jsonl" in capsys.readouterr().out
