"""Does the arithmetic of `vdr study` keep its promises? Simulated studies, whose truth is known.

    python scripts/verify/study_statistics.py --json benchmarks/study_statistics.json

Runs are drawn as binomial counts of solved completions: problems differ in hardness, seeds in level (part of it is
shared by the arms and removed by pairing), arms on some problems more than on others. The true difference of pass@k is
the mean over all problems and seeds that could have been drawn. Reported are

- how often the 95 % interval of a difference covers it, beside the percentile bootstraps of which a study could think;
- how often a study of 10 arms that all equal the control names any of them, by its own verdicts;
- how often a difference of one standard deviation is found, alone and among 10 arms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

if __package__:
    from scripts.bench.harness import parser_of, write_results
else:
    import sys

    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from scripts.bench.harness import parser_of, write_results
from vdr_cli.stats.bootstrap import interval, resampled_counts
from vdr_cli.stats.paired import mean_over_seeds, mean_over_seeds_and_prompts
from vdr_cli.study.analysis import analysed
from vdr_cli.study.endpoints import pass_at
from vdr_cli.study.load import Study, study_of
from vdr_cli.study.record import Record, RunRecord

Array = NDArray[np.float64]
SAMPLES, K = 128, 64
RESAMPLES = 500


@dataclass(frozen=True)
class World:
    """A population of studies. Numbers are standard deviations of log-odds."""

    effect: float = 0.0
    """Mean effect of the arm."""
    by_prompt: float = 0.0
    """The effect's spread over problems."""
    by_seed: float = 0.2
    """Spread of a run's level about its seed's."""
    rest: float = 0.4
    """Spread of a run on a problem."""
    hardness: float = 2.0
    skew: bool = False
    """Seeds that collapse now and then instead of normal ones."""


WORLDS = {
    "no effect": World(),
    "seeds alone differ": World(effect=-0.4, by_seed=0.4, rest=0.0),
    "the effect depends on the problem": World(effect=-0.4, by_prompt=0.8),
    "problems alone differ": World(effect=-0.4, by_prompt=0.8, by_seed=0.0, rest=0.1),
    "some seeds collapse": World(effect=-0.4, by_prompt=0.4, skew=True),
}


def odds_of(world: World, shape: tuple[int, int], generator: np.random.Generator) -> tuple[Array, Array]:
    """Log-odds of control and arm, (S, P) each."""
    S, P = shape
    draw = generator.standard_normal
    level = -3.5 + world.hardness * draw((1, P)) + 0.3 * draw((S, 1))
    effect = world.effect + world.by_prompt * draw((1, P))
    own = [world.by_seed * draw((S, 1)) + world.rest * draw((S, P)) for _ in range(2)]
    if world.skew:
        own = [one - 1.5 * (generator.random((S, 1)) < 0.1) for one in own]
    return level + own[0], level + own[1] + effect


def solve_rate(odds: Array) -> Array:
    """Expected pass@K of runs with these log-odds."""
    return 1.0 - (1.0 + np.exp(odds)) ** -float(K)


def truth(world: World, generator: np.random.Generator) -> float:
    """The difference over all seeds and problems, to about 0.0003."""
    parts = [odds_of(world, (50, 4000), generator) for _ in range(100)]
    return float(np.mean([solve_rate(arm).mean() - solve_rate(control).mean() for control, arm in parts]))


def differences(world: World, shape: tuple[int, int], generator: np.random.Generator) -> Array:
    """(S, P) estimated pass@K of the arm less the control's, from counts."""
    tables = [
        pass_at(SAMPLES, generator.binomial(SAMPLES, 1.0 / (1.0 + np.exp(-odds))), K)
        for odds in odds_of(world, shape, generator)
    ]
    return tables[1] - tables[0]


def students(table: Array, seed: int) -> tuple[float, float]:
    """The interval of a study: Student's, from the variance components of seeds and problems."""
    return mean_over_seeds_and_prompts(table).interval()


def students_of_seeds(table: Array, seed: int) -> tuple[float, float]:
    """Student's over seeds alone: the problems are taken for all there are."""
    return mean_over_seeds(table.mean(1)).interval()


def percentile_of_seeds(table: Array, seed: int) -> tuple[float, float]:
    """Percentile bootstrap over seeds."""
    (counts,) = resampled_counts(len(table), RESAMPLES, seed)
    return interval(counts @ table.mean(1) / len(table))


def percentile_of_both(table: Array, seed: int) -> tuple[float, float]:
    """Percentile bootstrap over seeds, then problems, each resampled once for the whole table."""
    (rows,), (columns,) = (resampled_counts(size, RESAMPLES, seed + at) for at, size in enumerate(table.shape))
    return interval(((rows @ table) * columns).sum(1) / table.size)


METHODS: dict[str, Callable[[Array, int], tuple[float, float]]] = {
    "study": students,
    "student over seeds": students_of_seeds,
    "percentile over seeds": percentile_of_seeds,
    "percentile over seeds and problems": percentile_of_both,
}


def coverage(world: World, shape: tuple[int, int], studies: int, seed: int) -> dict[str, float]:
    """Method to the share of intervals that cover the true difference."""
    generator = np.random.default_rng(seed)
    true = truth(world, generator)
    covered = dict.fromkeys(METHODS, 0)
    for study in range(studies):
        table = differences(world, shape, generator)
        for name, method in METHODS.items():
            low, high = method(table, 2 * study)
            covered[name] += low <= true <= high
    return {name: count / studies for name, count in covered.items()}


def simulated(arms: int, effect: float, shape: tuple[int, int], generator: np.random.Generator) -> Record:
    """A study whose first rival has the effect, in log-odds, and whose others are the control again."""
    S, P = shape
    study = study_file(arms, S)
    level = -3.5 + 2.0 * generator.standard_normal((1, P)) + 0.3 * generator.standard_normal((S, 1))
    runs = []
    for index, arm in enumerate(study.arms):
        odds = level + 0.2 * generator.standard_normal((S, 1)) + 0.4 * generator.standard_normal((S, P))
        solved = generator.binomial(SAMPLES, 1.0 / (1.0 + np.exp(-odds - (effect if index == 1 else 0.0))))
        runs += [
            RunRecord("starter", SAMPLES, row.tolist(), [0] * P, [0.0] * P, arm=arm, seed=seed)
            for seed, row in enumerate(solved)
        ]
    return Record("simulated", study, {"starter": list(range(P))}, [], runs)


def study_file(arms: int, seeds: int) -> Study:
    names = ["control", *(f"arm{number}" for number in range(1, arms + 1))]
    tree: dict[str, Any] = {
        "output": "simulated",
        "arms": {name: {} for name in names},
        "control": "control",
        "seeds": seeds,
        "budget": {"steps": 1},
        "endpoint": f"pass@{K}",
        "secondary": [],
        "evaluation": {"samples": SAMPLES},
    }
    return study_of(tree, "simulated")


def named(record: Record) -> list[str]:
    """The arms that a study calls better or worse."""
    rows = analysed(record)["starter"][record.study.file.endpoint]
    return [
        arm for arm, row in rows.items() if row.difference and row.difference.verdict.startswith(("better", "worse"))
    ]


def false_positives(arms: int, shape: tuple[int, int], studies: int, seed: int) -> float:
    """Share of studies in which nothing differs that name an arm."""
    generator = np.random.default_rng(seed)
    return sum(bool(named(simulated(arms, 0.0, shape, generator))) for _ in range(studies)) / studies


def power(arms: int, shape: tuple[int, int], studies: int, seed: int) -> float:
    """Share of studies that find an arm whose difference is one standard deviation of a seed's difference."""
    generator = np.random.default_rng(seed)
    effect = one_deviation(shape, generator)
    return sum("arm1" in named(simulated(arms, effect, shape, generator)) for _ in range(studies)) / studies


def one_deviation(shape: tuple[int, int], generator: np.random.Generator) -> float:
    """The effect in log-odds whose mean difference is as large as the standard deviation of a seed's difference."""
    spread = np.mean([differences(World(), shape, generator).mean(1).std(ddof=1) for _ in range(200)])
    low, high = 0.0, 3.0
    for _ in range(12):
        middle = (low + high) / 2
        found = np.mean([differences(World(effect=middle), shape, generator).mean() for _ in range(200)])
        low, high = (middle, high) if found < spread else (low, middle)
    return (low + high) / 2


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--studies", type=int, default=2000, help="simulated studies for each number")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=128)
    arguments = parser.parse_args()
    shape = arguments.seeds, arguments.prompts
    results: dict[str, Any] = {"seeds": shape[0], "prompts": shape[1], "studies": arguments.studies, "coverage": {}}
    for index, (name, world) in enumerate(WORLDS.items()):
        results["coverage"][name] = coverage(world, shape, arguments.studies, index)
        print(name, results["coverage"][name], flush=True)
    results["false positives with 10 arms"] = false_positives(10, shape, arguments.studies, 100)
    results["power for one standard deviation"] = {
        "one arm": power(1, shape, arguments.studies, 200),
        "ten arms": power(10, shape, arguments.studies, 201),
    }
    print({name: results[name] for name in list(results)[-2:]})
    write_results(arguments.json, results)


if __name__ == "__main__":
    main()
