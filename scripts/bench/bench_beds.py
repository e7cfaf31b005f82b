"""The beds' models at the start: pass@k, groups without a success, routes to every right answer.

    python scripts/bench/bench_beds.py --json benchmarks/beds.json

Every right completion of a held-out problem is enumerated, so a model's chance p of solving it in one sample at
temperature 1 is the sum of their probabilities, and pass@k is the mean of 1 - (1 - p)^k: nothing is sampled. Only
right completions in another spelling (spaces, leading zeros) are left out. Intervals: 95 %, by bootstrap over problems.

A solution class is rare when the model's chance of it is below 1 in 1,024 samples. How long a model took to build is
what scripts/build/bed.py writes with --json: benchmarks/build-NAME.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from harness import ROOT, parser_of, write_results
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from vdr_cli.beds.registry import Bed, with_answers
from vdr_cli.rewards.loading import find_function
from vdr_cli.stats.bootstrap import interval, resampled_ratios

sys.path.insert(0, str(ROOT / "scripts" / "build"))
from bed import answer_rates
from demonstrations import PRETRAINING

KS = (1, 8, 64, 256)
GROUP = 16
RARE = 1 / 1024


def class_rates(
    bed: Bed, rows: Sequence[dict[str, Any]], rates: Sequence[NDArray[np.float64]]
) -> list[dict[str, float]]:
    """Each row's solution classes with the model's chance of each."""
    classify = sys.modules[find_function(bed.reward).__module__].solution_class
    found = []
    for row, chances in zip(rows, rates, strict=True):
        chance_of: dict[str, float] = {}
        for name, chance in zip(classify(list(bed.answers(row))), chances, strict=True):
            chance_of[name] = chance_of.get(name, 0.0) + float(chance)
        found.append(chance_of)
    return found


def with_interval(values: NDArray[np.float64]) -> dict[str, float]:
    """The mean over problems and its interval."""
    draws = resampled_ratios(values[:, None], np.ones((len(values), 1)), seed=0)[:, 0]
    low, high = interval(draws, len(values))
    return {"mean": float(values.mean()), "low": low, "high": high}


def measured(bed: Bed) -> dict[str, Any]:
    """One bed's numbers, on all held-out problems."""
    model = AutoModelForCausalLM.from_pretrained(bed.model_path, dtype=torch.float32).eval()
    rows = bed.rows("test")
    rates = answer_rates(model, bed, PRETRAINING[bed.name].characters, rows)
    solved = np.array([chances.sum() for chances in rates])
    chances = class_rates(bed, rows, rates)
    counts = np.array([len(found) for found in chances])
    everything = np.array([chance for found in chances for chance in found.values()])
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(file.stat().st_size for file in bed.model_path.iterdir()),
        "problems": {split: len(bed.rows(split)) for split in ("train", "test")},
        "pass": {str(k): with_interval(1 - (1 - solved) ** k) for k in KS},
        "groups_without_success": with_interval((1 - solved) ** GROUP),
        "classes": {"mean": float(counts.mean()), "least": int(counts.min()), "most": int(counts.max())},
        "rare_classes": float((everything < RARE).mean()),
        "problems_with_a_rare_class": float(np.mean([min(found.values()) < RARE for found in chances])),
    }


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    torch.set_num_threads(1)
    results = {}
    for bed in with_answers():
        results[bed.name] = measured(bed)
        print(json.dumps({bed.name: results[bed.name]}, indent=1), flush=True)
    write_results(arguments.json, results)


if __name__ == "__main__":
    main()
