"""The whole job on the embedded model: numbers against float64 definitions, invariances, faults."""

import csv
import json
import math
import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.special import logsumexp

from vdr_cli.config import DisagreementConfig
from vdr_cli.data.prompts import encode
from vdr_cli.disagreement.hooks import ensemble
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.models.loading import load_causal_lm, load_tokenizer
from vdr_cli.scoring import sources
from vdr_cli.scoring.request import BASE_COLUMNS, ENSEMBLE_COLUMNS, Fields, ScoreRequest
from vdr_cli.scoring.score import Progress, run_score

M = 4
ENSEMBLE = DisagreementConfig(members=M)
ROWS: list[dict[str, Any]] = [
    {"id": index, "prompt": prompt, "completion": completion}
    for index, (prompt, completion) in enumerate(
        [("1 2 3=6:", "1+2+3"), ("1 2 3=6:", "1*2*3"), ("9 8 2=74:", "9*8+2"), ("4 4 4=12:", "4"), ("1 2 3=6:", "9+9")]
    )
]


@cache
def model_in(name: str, dtype: torch.dtype, *_: Any) -> Any:
    return load_causal_lm(name, dtype)


@pytest.fixture(autouse=True)
def small_windows_and_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "WINDOW_ROWS", 2)
    monkeypatch.setattr("vdr_cli.scoring.score.load_causal_lm", model_in)


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def score(
    tmp_path: Path, rows: list[dict[str, Any]] = ROWS, out: str = "out.jsonl", **more: Any
) -> list[dict[str, Any]]:
    given = save(tmp_path / "in.jsonl", rows)
    request = ScoreRequest((given,), "starter", str(tmp_path / out), **({"disagreement": ENSEMBLE} | more))
    run_score(request)
    return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()]


def reference(prompt: list[int], completion: list[int]) -> dict[str, float]:
    """Every column from its definition: one row, no padding, no batching, float64."""
    model = model_in("starter", torch.float64)
    ids = torch.tensor([prompt + completion])
    first, last = len(prompt) - 1, len(prompt) + len(completion) - 1
    y = np.array(completion)
    at = np.arange(len(y))

    def log_probabilities() -> Any:
        with torch.no_grad():
            return torch.log_softmax(model(input_ids=ids).logits[0, first:last].double(), -1).numpy()  # (T, V)

    plain = log_probabilities()
    members = []
    for member in range(M):
        with ensemble(model, EnsembleSpec(**ENSEMBLE.member_settings), 0, range(member, member + 1)):
            members.append(log_probabilities())
    logs = np.stack(members)  # (M, T, V)
    p = np.exp(logs)
    nll = -plain[at, y]
    entropies = -(np.exp(plain) * plain).sum(-1)

    def bald_of(chosen: Any) -> Any:
        mean = p[chosen].mean(0)
        return -(mean * np.log(mean)).sum(-1) + (p[chosen] * logs[chosen]).sum(-1).mean(0)

    everyone = list(range(M))
    bald = bald_of(everyone)
    without = np.stack([bald_of([i for i in everyone if i != j]) for j in everyone])  # (M, T)
    mean = p.mean(0)
    total = -(mean * np.log(mean)).sum(-1)
    own = logs[:, at, y]  # (M, T)
    pairs = [(p[i] * (logs[i] - logs[j])).sum(-1) for i in everyone for j in everyone if i != j]
    votes = logs.argmax(-1)
    sequence = own.sum(1)
    weights = np.exp(sequence - logsumexp(sequence))
    return {
        "n_tokens": len(y),
        "nll_sum": nll.sum(),
        "nll_mean": nll.mean(),
        "ppl": math.exp(nll.mean()),
        "entropy_mean": entropies.mean(),
        "entropy_max": entropies.max(),
        "total_mean": total.mean(),
        "aleatoric_mean": (total - bald).mean(),
        "bald_mean": bald.mean(),
        "bald_sum": bald.sum(),
        "bald_max": bald.max(),
        "bald_eos": bald[-1],
        "bald_mean_jk": np.maximum(M * bald - (M - 1) * without.mean(0), 0).mean(),
        "bald_se": np.sqrt((M - 1) / M * ((without - without.mean(0)) ** 2).sum(0)).mean(),
        "epkl_mean": np.mean(pairs),
        "rmi_mean": (np.log(np.exp(own).mean(0)) - own.mean(0)).mean(),
        "logp_var_mean": own.var(0, ddof=1).mean(),
        "rmi_seq": (logsumexp(sequence) - math.log(M) - sequence.mean()) / len(y),
        "ig_seq": math.log(M) + (weights * np.log(weights)).sum(),
        "vote_disagree": np.mean([1 - np.bincount(votes[:, t]).max() / M for t in at]),
    }


def test_every_column_against_float64(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("starter")
    for row in score(tmp_path):
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        expected = reference(encode(tokenizer, row["prompt"]), completion)
        assert expected.keys() == {*BASE_COLUMNS, *ENSEMBLE_COLUMNS}
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=2e-5, abs=2e-7), (name, row["completion"])


def test_order_kept_and_columns_after_those_of_the_input(tmp_path: Path) -> None:
    rows = score(tmp_path)
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4]
    assert tuple(rows[0]) == ("id", "prompt", "completion", *BASE_COLUMNS, *ENSEMBLE_COLUMNS)


@pytest.mark.parametrize("batch_tokens", [1, 30, 10_000])
def test_numbers_do_not_depend_on_batches_or_order(tmp_path: Path, batch_tokens: int) -> None:
    plain = {row["id"]: row for row in score(tmp_path)}
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for row in score(tmp_path, shuffled, batch_tokens=batch_tokens):
        for name in (*BASE_COLUMNS, *ENSEMBLE_COLUMNS):
            assert row[name] == pytest.approx(plain[row["id"]][name], rel=1e-5, abs=1e-6), name


def test_two_processes_write_the_parts_that_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = score(tmp_path)
    monkeypatch.setattr("vdr_cli.engine.collectives.world_size", lambda: 2)
    monkeypatch.setattr("vdr_cli.engine.collectives._raise_everywhere", _raise_own)
    monkeypatch.setattr("vdr_cli.engine.collectives.broadcast_object", lambda value: value or {"rows": 0} | COUNTS)
    monkeypatch.setattr("vdr_cli.engine.collectives.rank", lambda: 1)
    (tmp_path / "two.jsonl.parts").mkdir()
    request = ScoreRequest((str(tmp_path / "in.jsonl"),), "starter", str(tmp_path / "two.jsonl"), ENSEMBLE, resume=True)
    run_score(request)
    assert [path.name for path in (tmp_path / "two.jsonl.parts").glob("*.jsonl")] == ["part-00000001.jsonl"]
    share = [json.loads(line) for line in (tmp_path / "two.jsonl.parts" / "part-00000001.jsonl").open()]
    assert share == alone[2:4]


COUNTS = {"skipped": 0, "cut": 0, "empty": 0, "skipped_rows": [], "ids_differ": 0, "replaced": []}


def _raise_own(error: Exception | None) -> None:
    if error is not None:
        raise error


def test_without_ensemble_nll_and_entropy_are_the_same_and_alone(tmp_path: Path) -> None:
    full = score(tmp_path)
    for row, reference_row in zip(score(tmp_path, disagreement=None), full, strict=True):
        assert tuple(row) == ("id", "prompt", "completion", *BASE_COLUMNS)
        assert row == {
            name: pytest.approx(reference_row[name]) if name in BASE_COLUMNS else reference_row[name] for name in row
        }


def test_token_arrays_agree_with_the_sums(tmp_path: Path) -> None:
    for row in score(tmp_path, tokens=True, append_eos=True):
        assert len(row["token_ids"]) == len(row["token_bald"]) == row["n_tokens"] == len(row["completion"]) + 1
        assert -sum(row["token_logp"]) == pytest.approx(row["nll_sum"], rel=1e-6)
        assert max(row["token_bald"]) == pytest.approx(row["bald_max"])
        assert row["token_bald"][-1] == pytest.approx(row["bald_eos"])
        assert sum(row["token_rmi"]) / row["n_tokens"] == pytest.approx(row["rmi_mean"], rel=1e-5)


def test_the_three_formats_hold_the_same(tmp_path: Path) -> None:
    rows = score(tmp_path, tokens=True)
    given = str(tmp_path / "in.jsonl")
    for out in ("o.parquet", "o.csv"):
        run_score(ScoreRequest((given,), "starter", str(tmp_path / out), ENSEMBLE, tokens=True))
    table = pq.read_table(tmp_path / "o.parquet").to_pylist()
    with (tmp_path / "o.csv").open(newline="") as file:
        cells = list(csv.DictReader(file))
    for row, packed, texts in zip(rows, table, cells, strict=True):
        assert packed.keys() == row.keys() == texts.keys()
        assert packed["bald_mean"] == row["bald_mean"] == float(texts["bald_mean"])
        assert packed["token_bald"] == pytest.approx(row["token_bald"])
        assert json.loads(texts["token_ids"]) == row["token_ids"] == packed["token_ids"]


def test_metadata_is_in_the_file(tmp_path: Path) -> None:
    given = save(tmp_path / "in.jsonl", ROWS)
    run_score(ScoreRequest((given,), "starter", str(tmp_path / "o.parquet"), ENSEMBLE, seed=7))
    metadata = json.loads(pq.read_schema(tmp_path / "o.parquet").metadata[b"vdr"])
    assert metadata["request"]["ensemble"]["members"] == M
    assert metadata["request"]["seed"] == 7
    assert metadata["request"]["dtype"] == "float32"
    assert metadata["summary"]["rows"] == len(ROWS)


def test_bad_rows_stop_with_their_place_or_are_counted(tmp_path: Path) -> None:
    rows = [*ROWS[:3], {"id": 9, "prompt": "1"}, *ROWS[3:]]
    with pytest.raises(DataError, match=r"in.jsonl line 4: completion is missing .* --on-error skip"):
        score(tmp_path, rows)
    assert not (tmp_path / "out.jsonl").exists()
    result = run_score(
        ScoreRequest((str(tmp_path / "in.jsonl"),), "starter", str(tmp_path / "s.jsonl"), ENSEMBLE, on_error="skip")
    )
    assert (result.rows, result.skipped) == (5, 1)
    assert "line 4" in result.skipped_rows[0]
    assert [json.loads(line)["id"] for line in (tmp_path / "s.jsonl").open()] == [0, 1, 2, 3, 4]


def test_an_error_in_the_first_window_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"in.jsonl line 1: completion is missing"):
        score(tmp_path, [{"id": 9, "prompt": "1"}, *ROWS])
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_empty_completions_have_null_measures_and_keep_their_row(tmp_path: Path) -> None:
    rows = score(tmp_path, [ROWS[0], {"id": 1, "prompt": "1", "completion": ""}])
    assert rows[1]["n_tokens"] == 0
    assert all(rows[1][name] is None for name in (*BASE_COLUMNS, *ENSEMBLE_COLUMNS) if name != "n_tokens")


def test_a_stopped_scoring_goes_on_where_it_was(tmp_path: Path) -> None:
    expected = score(tmp_path)
    request = ScoreRequest((str(tmp_path / "in.jsonl"),), "starter", str(tmp_path / "r.jsonl"), ENSEMBLE)

    def stop(progress: Progress) -> None:
        if progress.rows >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_score(request, stop)
    assert not (tmp_path / "r.jsonl").exists()
    with pytest.raises(ConfigError, match="--resume"):
        run_score(request)
    with pytest.raises(ConfigError, match="cannot resume, seed changed"):
        run_score(ScoreRequest(request.inputs, "starter", request.output, ENSEMBLE, seed=1, resume=True))
    seen: list[int] = []
    resumed = ScoreRequest(request.inputs, "starter", request.output, ENSEMBLE, resume=True)
    run_score(resumed, lambda progress: seen.append(progress.rows))
    assert seen == [1]
    assert [json.loads(line) for line in (tmp_path / "r.jsonl").open()] == expected
    assert not (tmp_path / "r.jsonl.parts").exists()
    seen.clear()
    again = run_score(resumed, lambda progress: seen.append(progress.rows))
    assert (again.rows, again.is_reused, seen) == (5, True, [])
    assert not run_score(replace(resumed, output=str(tmp_path / "new.jsonl"))).is_reused


def test_a_file_of_the_same_size_with_other_content_is_another_input(tmp_path: Path) -> None:
    score(tmp_path, disagreement=None)
    request = ScoreRequest((str(tmp_path / "in.jsonl"),), "starter", str(tmp_path / "out.jsonl"), None, resume=True)
    seen: list[int] = []
    run_score(request, lambda progress: seen.append(progress.rows))
    assert seen == [], "the output is there"
    save(tmp_path / "in.jsonl", [*ROWS[1:], ROWS[0]])
    run_score(request, lambda progress: seen.append(progress.rows))
    assert seen == [2, 4, 5]
    assert json.loads((tmp_path / "out.jsonl").open().readline())["id"] == 1


def test_a_file_with_another_tokenizers_ids_is_scored_on_its_text_wherever_it_stands(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("starter")
    own = [{**row, "completion_ids": tokenizer(row["completion"])["input_ids"]} for row in ROWS]
    foreign = [{**row, "completion_ids": [9, 9, 9]} for row in ROWS[:3]]
    given = tuple(save(tmp_path / name, rows) for name, rows in (("a.jsonl", own), ("b.jsonl", foreign)))
    result = run_score(ScoreRequest(given, "starter", str(tmp_path / "o.jsonl"), None))
    assert "3 rows have token ids that do not decode to their text: the text was tokenised instead" in result.notes
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").open()]
    assert [row["nll_sum"] for row in rows[5:]] == pytest.approx([row["nll_sum"] for row in rows[:3]])


def test_an_adapter_trained_again_in_place_is_scored_again(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(load_causal_lm("starter"), config)
        adapted.peft_config["default"].base_model_name_or_path = "starter"
        adapted.save_pretrained(str(folder))
        if seed == 0:
            request = ScoreRequest((save(tmp_path / "in.jsonl", ROWS),), str(folder), str(tmp_path / "o.jsonl"), None)
            run_score(request)
            before = (tmp_path / "o.jsonl").read_text()
            model_in.cache_clear()
    assert not run_score(replace(request, resume=True)).is_reused
    assert (tmp_path / "o.jsonl").read_text() != before
    assert run_score(replace(request, resume=True)).is_reused


def test_scored_again_its_columns_are_replaced_and_that_is_said(tmp_path: Path) -> None:
    save(tmp_path / "in.jsonl", ROWS)
    for given, out in (("in", "once"), ("once", "twice")):
        result = run_score(
            ScoreRequest((str(tmp_path / f"{given}.jsonl"),), "starter", str(tmp_path / f"{out}.jsonl"), None)
        )
    assert "columns of the input gave way to ours of the same name: n_tokens, nll_sum" in result.notes[0]
    assert (tmp_path / "once.jsonl").read_text() == (tmp_path / "twice.jsonl").read_text()


@pytest.mark.parametrize("out", ["o.jsonl", "o.csv", "o.parquet"])
def test_nested_labels_and_groups_reach_the_ranking_in_every_format(tmp_path: Path, out: str) -> None:
    labelled = [{**row, "doc": {"ok": index % 2, "source": index}} for index, row in enumerate(ROWS)]
    given = save(tmp_path / "in.jsonl", labelled)
    fields = Fields(label="doc.ok", group="doc.source")
    result = run_score(ScoreRequest((given,), "starter", str(tmp_path / out), None, fields=fields))
    assert all(0 <= row["auroc"] <= 1 for row in result.ranking)
    with pytest.raises(DataError, match=r"no origin in it .* --group-column"):
        run_score(ScoreRequest((given,), "starter", str(tmp_path / "p.jsonl"), None, fields=Fields(group="origin")))


def test_a_runs_completions_are_scored_by_their_token_ids(tmp_path: Path) -> None:
    from vdr_cli.data.completions import write_completions

    tokenizer = load_tokenizer("starter")
    ids = [*tokenizer("1+2+3", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    row = {"prompt": ["1 2 3=6:"], "completion": ["1+2+3"], "prompt_ids": [encode(tokenizer, "1 2 3=6:")]}
    write_completions(tmp_path / "run" / "completions", 3, row | {"completion_ids": [ids], "reward": [1.0]})
    run_score(ScoreRequest((str(tmp_path / "run"),), "starter", str(tmp_path / "o.parquet"), ENSEMBLE))
    (scored,) = pq.read_table(tmp_path / "o.parquet").to_pylist()
    assert scored["n_tokens"] == 6
    assert scored["reward"] == 1.0
    assert scored["step"] == 3


def test_parquet_keeps_types_and_refuses_what_would_be_lost(tmp_path: Path) -> None:
    nested = [{**row, "doc": {"a": index}, "tags": ["x"]} for index, row in enumerate(ROWS)]
    given = save(tmp_path / "in.jsonl", nested)
    run_score(ScoreRequest((given,), "starter", str(tmp_path / "o.parquet"), None))
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.schema.field("tags").type == pa.list_(pa.string())
    assert json.loads(table["doc"][2].as_py()) == {"a": 2}
    given = save(tmp_path / "in.jsonl", [*ROWS, {**ROWS[0], "new": 1}])
    with pytest.raises(DataError, match="column 'new' is not in the first rows"):
        run_score(ScoreRequest((given,), "starter", str(tmp_path / "p.parquet"), None))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output": "in.jsonl"}, "this is an input file"),
        ({"output": "out.txt"}, "unknown format '.txt'"),
        ({"output": "no/out.jsonl"}, "is not there"),
        ({"model": "./nowhere"}, "no such directory"),
    ],
)
def test_usage_errors_come_before_any_work(tmp_path: Path, more: dict[str, str], message: str) -> None:
    given = save(tmp_path / "in.jsonl", ROWS)
    output = str(tmp_path / more.get("output", "o.jsonl"))
    with pytest.raises(ConfigError, match=message):
        run_score(ScoreRequest((given,), more.get("model", "starter"), output))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_columns_by_other_names(tmp_path: Path) -> None:
    rows = [{"q": row["prompt"], "a": row["completion"]} for row in ROWS]
    named = score(tmp_path, rows, fields=Fields(prompt="q", completion="a"))
    assert [row["bald_mean"] for row in named] == pytest.approx([row["bald_mean"] for row in score(tmp_path)])


def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path) -> None:
    given = save(tmp_path / "in.jsonl", ROWS)
    for out in ("o.PARQUET", "o.CSV"):
        run_score(ScoreRequest((given,), "starter", str(tmp_path / out), None))
    assert pq.read_table(tmp_path / "o.PARQUET").num_rows == len(ROWS)
    with (tmp_path / "o.CSV").open(newline="") as file:
        assert [row["id"] for row in csv.DictReader(file)] == ["0", "1", "2", "3", "4"]
