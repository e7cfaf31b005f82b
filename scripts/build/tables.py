"""The tables of measured numbers in README.md and docs/, from the result files in benchmarks/.

python scripts/build/tables.py           # write them
python scripts/build/tables.py --check   # exit 1 when one is out of date

`<!-- table:NAME -->` and `<!-- /table -->` enclose a table. benchmarks/tables/NAME.md is its template in Jinja, which
reads the `results` of each file by name, dashes as underscores: `{{ step_qwen2.ratio.step|n(2) }}`. `evidence_BED` is
those of the study in docs/evidence/BED/record, with what `study` adds to them, `screening_BED` likewise of
docs/evidence/screening/BED; tables of several studies share the macros of evidence.jinja. Where a template says in
words what its numbers show, `{% set _ = claim(...) %}` fails as soon as they no longer do.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vdr_cli.stats.paired import mean_over_seeds_and_prompts
from vdr_cli.study.analysis import contrasts, start_value
from vdr_cli.study.endpoints import pass_at
from vdr_cli.study.record import Record, read_record

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
TEMPLATES = BENCHMARKS / "tables"
EVIDENCE = ROOT / "docs" / "evidence"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(EVIDENCE.glob("*.md")))
MORE = "plain_more"
"""The control with more completions per group."""
BLOCK = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n)(?P<table>.*?)(<!-- /table -->)", re.DOTALL)


class Numbers(Environment):
    """Jinja in which `ratio.update` is a key of a result, never a method of dict."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self.getitem(obj, attribute) if isinstance(obj, dict) else super().getattr(obj, attribute)


def number(value: float, digits: int) -> str:
    """Fixed digits, thousands separated, with a minus sign unless all digits are 0."""
    return f"{value:z,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(difference: Mapping[str, float], digits: int) -> str:
    """A difference with its 95 % interval."""
    value, low, high = (signed(difference[name], digits) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def signed(value: float, digits: int) -> str:
    """The same with a plus sign where it is positive."""
    return f"{'+' * (round(value, digits) > 0)}{number(value, digits)}"


def claim(holds: bool) -> None:
    """Nothing, or ValueError: the numbers do not show what the template says in words."""
    if not holds:
        raise ValueError("a claim of the template does not hold any more; the line is in the traceback")


def above(difference: Mapping[str, float]) -> bool:
    """Its 95 % interval lies above 0."""
    return difference["low"] > 0


def below(difference: Mapping[str, float]) -> bool:
    """Its 95 % interval lies below 0."""
    return difference["high"] < 0


@cache
def results() -> dict[str, Any]:
    """The results of each file, by the name that templates use."""
    files = {path.stem.replace("-", "_"): path for path in BENCHMARKS.glob("*.json")}
    found = {name: json.loads(path.read_text(encoding="utf-8"))["results"] for name, path in files.items()}
    studies = {f"evidence_{path.parent.name}": path for path in EVIDENCE.glob("*/record")}
    studies |= {f"screening_{path.parent.name}": path.parent for path in EVIDENCE.glob("screening/*/study.json")}
    return found | {name.replace("-", "_"): study(path) for name, path in studies.items()}


def study(directory: Path) -> dict[str, Any]:
    """The results of an archived study of one bed, its contrasts, every arm less `plain_more` where it has one, the
    values of the starting model, and for each arm what the tuning chose and what `course` says."""
    record = read_record(directory)
    (bed,) = record.study.beds
    ends = json.loads((directory / "study.json").read_text(encoding="utf-8"))["results"][bed]
    pairs = {f"{arm} - {other}": asdict(difference) for arm, other, difference in contrasts(record, bed)}
    sampled_more = [(arm, MORE) for arm in record.study.rivals if MORE in record.study.arms and arm != MORE]
    more = {arm: asdict(difference) for arm, _, difference in contrasts(record, bed, sampled_more)}
    start = {end: start_value(record, bed, end) for end in ends}
    told = course(directory, record.study.file.control)
    return {**ends, "contrasts": pairs, "less_more": more, "start": start, "taken": taken(record), **told}


def taken(record: Record) -> dict[str, str]:
    """The settings that the tuning chose for each arm, like "weight 0.3"; nothing where there was none."""
    tuning = record.study.file.tuning
    trials = {trial["arm"]: trial["trial"] for trial in record.tuning if trial["taken"]}
    chosen = {arm: tuning.trials[arm][trial] for arm, trial in trials.items()} if tuning else {}
    return {
        arm: ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in settings.items())
        for arm, settings in chosen.items()
    }


def course(directory: Path, control: str) -> dict[str, dict[str, float]]:
    """For each arm: seconds of a run's steps over those of the control with the same seed (the median), and the mean
    absolute bonus in the first and last ten steps."""
    runs = pq.read_table(directory / "metrics.parquet").to_pandas()
    seconds = runs.groupby(["arm", "seed"])["step_time"].sum().unstack("arm")
    found = {"time": seconds.div(seconds[control], axis=0).median().to_dict()}
    if "disagreement/bonus_abs" in runs:
        last = runs["step"] > runs["step"].max() - 10
        for name, rows in (("bonus_first", runs["step"] <= 10), ("bonus_last", last)):
            found[name] = runs[rows].groupby("arm")["disagreement/bonus_abs"].mean().to_dict()
    return found


def pooled(names: Sequence[str], arm: str, k: int) -> dict[str, float]:
    """pass@k of an arm minus the control's over the seeds of several studies, which ask the same problems."""
    rows = []
    for name in names:
        record = read_record(EVIDENCE / name / "record")
        (bed,) = record.study.beds
        ours, control = record.of(bed, arm), record.of(bed, record.study.file.control)
        ends = [(ours[seed].measured, control[seed].measured) for seed in ours.keys() & control.keys()]
        rows += [pass_at(run.samples, run.solved, k) - pass_at(other.samples, other.solved, k) for run, other in ends]
    mean = mean_over_seeds_and_prompts(np.stack(rows))
    low, high = mean.interval()
    return {"n": len(rows), "value": mean.value, "low": low, "high": high}


def table(name: str) -> str:
    """One table as Markdown. Raises jinja2.UndefinedError for a number that no file holds."""
    environment = Numbers(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {"n": number, "signed": signed, "interval": interval}
    environment.tests |= {"above": above, "below": below}
    environment.globals |= {"claim": claim, "pooled": pooled}
    return environment.get_template(f"{name}.md").render(results()).strip() + "\n"


def page(text: str) -> str:
    """The page with every table made again."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(found['name'])}{found[4]}", text)


def main(arguments: list[str]) -> int:
    stale = []
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if (made := page(text)) != text:
            stale.append(path.name)
            if arguments != ["--check"]:
                path.write_text(made, encoding="utf-8")
    if arguments == ["--check"] and stale:
        print(f"{', '.join(stale)} out of date: run python scripts/build/tables.py", file=sys.stderr)
    return int(arguments == ["--check"] and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
