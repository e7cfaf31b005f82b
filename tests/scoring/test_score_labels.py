import csv
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from vdr_cli.cli.score import interval_cell
from vdr_cli.errors import DataError
from vdr_cli.report import score_page
from vdr_cli.scoring.ranking import Ranking, check_labels, rank_columns, save_ranking
from vdr_cli.scoring.request import Fields
from vdr_cli.scoring.sources import Row


def rows(count: int = 60) -> list[dict[str, Any]]:
    generator = random.Random(0)
    made = []
    for index in range(count):
        right = int(generator.random() < 0.4)
        made.append(
            {
                "prompt": f"p{index // 4}",
                "label": right,
                "meta": {"ok": right},
                "n_tokens": generator.randint(1, 4),
                "nll_mean": generator.random() + (1 - right),
                "ppl": 2.0,
                "bald_mean": generator.random() + 0.5 * (1 - right),
            }
        )
    made[3]["bald_mean"] = None
    return made


def save(path: Path, made: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(made), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(made[0]))
            writer.writeheader()
            writer.writerows(made)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_against_scikit_learn_in_every_format(tmp_path: Path, suffix: str) -> None:
    made = rows()
    ranking = {row["measure"]: row for row in rank_columns(save(tmp_path / f"o{suffix}", made), Fields()).rows}
    assert list(ranking) == ["n_tokens", "nll_mean", "bald_mean"]
    for name, row in ranking.items():
        kept = [one for one in made if one[name] is not None]
        errors, u = [1 - one["label"] for one in kept], [one[name] for one in kept]
        assert row["auroc"] == pytest.approx(roc_auc_score(errors, u))
        assert row["auprc"] == pytest.approx(average_precision_score(errors, u))
        assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
    assert ranking["nll_mean"]["ece"] is not None
    assert ranking["bald_mean"]["ece"] is None


def test_without_labels_there_is_nothing(tmp_path: Path) -> None:
    made = [{key: value for key, value in row.items() if key != "label"} for row in rows()]
    path = save(tmp_path / "o.jsonl", made)
    assert save_ranking(path, Fields()) == Ranking()
    assert [file.name for file in tmp_path.iterdir()] == ["o.jsonl"]


def test_a_quality_has_prr_alone_and_paths_reach_nested_labels(tmp_path: Path) -> None:
    made = [row | {"score": 10 - row["nll_mean"]} for row in rows()]
    path = save(tmp_path / "o.jsonl", made)
    by_quality = {row["measure"]: row for row in rank_columns(path, Fields(label="score")).rows}
    assert by_quality["nll_mean"]["prr"] == pytest.approx(1.0)
    assert "auroc" not in by_quality["nll_mean"]
    nested = rank_columns(path, Fields(label="meta.ok")).rows
    assert nested[0]["auroc"] == rank_columns(path, Fields()).rows[0]["auroc"]


def test_the_ranking_lies_beside_the_output(tmp_path: Path) -> None:
    path = save(tmp_path / "o.jsonl", rows())
    saved = json.loads(Path(path + ".ranking.json").read_text()) if save_ranking(path, Fields()).rows else []
    assert [row["measure"] for row in saved] == ["n_tokens", "nll_mean", "bald_mean"]


def test_an_output_without_labels_loses_the_ranking_of_the_one_before(tmp_path: Path) -> None:
    path = save(tmp_path / "o.jsonl", rows())
    assert save_ranking(path, Fields()).rows
    save(tmp_path / "o.jsonl", [{key: value for key, value in row.items() if key != "label"} for row in rows()])
    assert save_ranking(path, Fields()) == Ranking()
    assert [file.name for file in tmp_path.iterdir()] == ["o.jsonl"]


def test_a_first_row_without_a_label_does_not_hide_the_others(tmp_path: Path) -> None:
    first, *others = rows()
    del first["label"], first["bald_mean"]
    found = rank_columns(save(tmp_path / "o.jsonl", [first, *others]), Fields()).rows
    packed = rank_columns(
        save(tmp_path / "o.parquet", [others[0] | dict.fromkeys(others[0]) | first, *others]), Fields()
    )
    assert [row["measure"] for row in found] == ["n_tokens", "nll_mean", "bald_mean"]
    assert found == packed.rows


def test_groups_widen_the_interval(tmp_path: Path) -> None:
    noise = random.Random(1)
    copies = [row | {"bald_mean": noise.random()} for row in rows(40) for _ in range(10)]
    offsets = [noise.gauss(0, 0.3) for _ in range(10)]
    for index, row in enumerate(copies):
        row |= {"row": index, "bald_mean": row["bald_mean"] + offsets[index // 40]}
        row["label"] = int(noise.random() < 0.5 - offsets[index // 40])
    path = save(tmp_path / "o.jsonl", copies)
    wide = rank_columns(path, Fields()).rows[2]
    narrow = rank_columns(path, Fields(group="row")).rows[2]
    assert wide["auroc_high"] - wide["auroc_low"] > 1.5 * (narrow["auroc_high"] - narrow["auroc_low"])
    assert np.isclose(wide["auroc"], narrow["auroc"])


def test_one_group_says_nothing_of_its_spread(tmp_path: Path) -> None:
    path = save(tmp_path / "o.jsonl", [row | {"prompt": "p"} for row in rows()])
    (row, *_) = save_ranking(path, Fields()).rows
    assert np.isfinite(row["auroc"])
    assert np.isnan([row["auroc_low"], row["auroc_high"]]).all()
    assert interval_cell(row, "auroc") == f"{row['auroc']:.3f}"
    saved = json.loads(Path(path + ".ranking.json").read_text())[0]
    assert score_page._interval(saved, "auroc") == f"{row['auroc']:.3f}"


def test_true_and_false_are_labels(tmp_path: Path) -> None:
    made = [row | {"label": bool(row["label"])} for row in rows()]
    found = [
        rank_columns(save(tmp_path / f"o{suffix}", made), Fields()).rows[1] for suffix in (".csv", ".jsonl", ".parquet")
    ]
    assert found[0] == found[1] == found[2]
    assert "auroc" in found[0]


def test_labels_are_looked_at_before_the_work() -> None:
    first = [Row("f.jsonl", 3, {"prompt": "a", "label": "yes"})]
    with pytest.raises(DataError, match=r"f.jsonl line 3: label is 'yes', not a number"):
        check_labels(first, Fields(label="label"))
    check_labels(first, Fields())
    with pytest.raises(DataError, match=r"no right in it \(there are: prompt, label\)"):
        check_labels(first, Fields(label="right"))
    check_labels([Row("f.jsonl", 1, None, "bad"), Row("f.jsonl", 2, {"prompt": "a"})], Fields())


def test_labels_that_are_no_numbers(tmp_path: Path) -> None:
    path = save(tmp_path / "o.jsonl", [row | {"label": "yes"} for row in rows()])
    with pytest.raises(DataError, match=r"row 0: label is 'yes', not a number"):
        rank_columns(path, Fields(label="label"))
    unnamed = rank_columns(path, Fields())
    assert unnamed.rows == () and unnamed.notes[0].startswith("not ranked: ") and "label is 'yes'" in unnamed.notes[0]
    silent = save(tmp_path / "s.jsonl", [row | {"reward": None} for row in rows()])
    (note,) = rank_columns(silent, Fields(implied_label="reward")).notes
    assert "no row has a number in reward" in note
    huge = save(tmp_path / "h.jsonl", [row | {"label": 10**400} for row in rows()])
    with pytest.raises(DataError, match=r"row 0: label is 1000.*, not a number"):
        rank_columns(huge, Fields(label="label"))
    with pytest.raises(DataError, match="no row has a number in nothing"):
        rank_columns(path, Fields(label="nothing"))


def logged(count: int = 40, name: str = "strict-match", flip: bool = False) -> list[dict[str, Any]]:
    """Rows of an lm-eval log as `vdr score` writes them: no column prompt, two rows for each of its documents."""
    made = []
    for index, row in enumerate(rows(count)):
        arguments = {"gen_args_0": {"arg_0": row["prompt"], "arg_1": {}}}
        kept = {key: row[key] for key in ("label", "nll_mean", "bald_mean")}
        kept["label"] = 1 - kept["label"] if flip else kept["label"]
        made.append({"doc_id": index, "arguments": arguments, "resps": [["a"]], "filter": name, **kept})
    return made


def as_text(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in row.items()}
        for row in made
    ]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_the_groups_of_a_log_are_those_of_its_prompts(tmp_path: Path, suffix: str) -> None:
    made = logged() if suffix == ".jsonl" else as_text(logged())
    found = rank_columns(save(tmp_path / f"o{suffix}", made), Fields())
    plain = rank_columns(save(tmp_path / "p.jsonl", rows(40)), Fields())
    assert found.rows == plain.rows[1:]
    assert found.notes == ("intervals: resampled over 10 groups (rows with the same prompt)",)


def test_of_several_filters_one_is_ranked_and_named(tmp_path: Path) -> None:
    both = save(tmp_path / "o.jsonl", logged() + logged(name="flexible-extract", flip=True))
    first = rank_columns(both, Fields())
    assert first.rows == rank_columns(save(tmp_path / "one.jsonl", logged()), Fields()).rows
    assert "2 filters (strict-match, flexible-extract)" in first.notes[0] and "of strict-match alone" in first.notes[0]
    other = rank_columns(both, Fields(filter="flexible-extract"))
    assert other.rows[0]["auroc"] == pytest.approx(1 - first.rows[0]["auroc"])
    given = [Row("f", 1, row) for row in logged(4)]
    with pytest.raises(DataError, match="--filter none: the first rows have strict-match"):
        check_labels(given, Fields(filter="none"))


def test_documents_that_come_twice_are_counted(tmp_path: Path) -> None:
    found = rank_columns(save(tmp_path / "o.jsonl", logged() + logged()), Fields())
    assert found.notes[0].startswith("40 rows repeat a document of the log")


def test_a_row_without_a_group_is_refused(tmp_path: Path) -> None:
    made = [{key: value for key, value in row.items() if key != "prompt"} for row in rows()]
    path = save(tmp_path / "o.jsonl", made)
    with pytest.raises(DataError, match=r"row 0 belongs to no group .*--group-column"):
        rank_columns(path, Fields(label="label"))
    assert "row 0 belongs to no group" in rank_columns(path, Fields()).notes[0]
    assert rank_columns(path, Fields(group="n_tokens")).notes == (
        "intervals: resampled over 4 groups (rows with the same n_tokens)",
    )
