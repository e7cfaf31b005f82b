"""Validity of the measure: is the disagreement of dropout members about what the model does not know?

    for seed in 1 2 3 4 5 6 7 8; do python scripts/build/bed.py starter --seed $seed --output deep/$seed; done
    vdr train --bonus none --set observe.completions_every=1 --output run
    python scripts/bench/validity.py starter --deep deep/* --run run --json benchmarks/validity.json

Everything is judged within groups, because the bonus is centred there, and by ranks, which say nothing about sizes;
intervals (95 %) by bootstrap over prompts. Four questions:

deep       Does it rank completions as an ensemble of independently trained models does? Beside it: how far two halves
           of that ensemble agree, and members made by Gaussian noise on the weights, with the same mean disagreement.
wrong      Does it say more about being wrong than log-probability, entropy and length do? Partial rank correlations.
visits     Is it lower for answers that training has visited more often, and more so than log-probability explains?
trained    Does training make it fall more on prompts that were trained on than on held-out ones?

The last two need a run. The first two alone, for a model that was trained with the members' masks:

    python scripts/build/bed.py starter --dropout 0.1 --output dropped
    python scripts/bench/validity.py dropped --deep deep/* --json benchmarks/validity-dropped.json
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fidelity import Scores, scores
from harness import parser_of, write_results
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from vdr_cli.config.schema import DataConfig
from vdr_cli.data.prompts import Role, load_prompts
from vdr_cli.disagreement.information import at_last, from_logits
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.exploration.bonus import reduce
from vdr_cli.models.loading import eos_token_ids, load_causal_lm, load_tokenizer
from vdr_cli.rewards.loading import find_function
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Completions, Sampling, Stream, completion_key
from vdr_cli.stats.bootstrap import interval, resampled_ratios

Array = NDArray[np.float64]
MEMBERS = (2, 4, 8, 16, 32)
DROPOUTS = (0.03, 0.1, 0.3)
COLUMNS = [(measure, mode) for measure in ("bald", "rmi") for mode in ("end_of_sequence", "per_token")]
BISECTIONS = 12
SPLITS: tuple[Role, Role] = ("train", "eval")


class Sampled:
    """One model's own completions of some prompts, G per prompt, with what their answers are worth."""

    def __init__(self, name: str, split: Role, groups: int, size: int, length: int) -> None:
        tokenizer = load_tokenizer(name)
        self.model = load_causal_lm(name, torch.float32)
        every = load_prompts(DataConfig(), split, tokenizer)
        prompts = [every[index] for index in range(groups)]
        rollout = TransformersRollout(tokenizer.pad_token_id, eos_token_ids(self.model, tokenizer))
        keys = [completion_key(0, Stream.EVALUATION, index) for index in range(groups)]
        request = RolloutRequest([prompt.token_ids for prompt in prompts], size, Sampling(max_new_tokens=length), keys)
        self.size, self.batch = size, rollout.generate(self.model, request)
        self.texts = tokenizer.batch_decode(self.batch.completion_ids, skip_special_tokens=True)
        self.prompts = [str(prompt.value) for prompt in prompts for _ in range(size)]
        columns = {key: [prompt.columns[key] for prompt in prompts for _ in range(size)] for key in prompts[0].columns}
        reward = find_function("countdown")
        self.wrong = 1.0 - np.array(reward(prompts=self.prompts, completions=self.texts, **columns), np.float64)

    def groups(self) -> Iterator[list[int]]:
        """The rows of each group, a completion that was sampled twice counted once."""
        for at in range(0, len(self.texts), self.size):
            seen = {self.texts[row]: row for row in reversed(range(at, at + self.size))}
            yield sorted(seen.values())


# ---- ensembles ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def token_logits(model: nn.Module, batch: Completions) -> Tensor:
    """(B, T, V) logits of every completion token, read the plain way."""
    ids = torch.cat([batch.prompt_ids, batch.completion_ids], 1)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask], 1).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    read = model(input_ids=ids, attention_mask=mask, position_ids=positions)[0].float()
    return read[:, batch.prompt_ids.shape[1] - 1 : -1]  # type: ignore[no-any-return]


def ensemble_scores(models: Sequence[nn.Module], batch: Completions) -> Scores:
    """The measures of an ensemble of whole models."""
    logits = torch.stack([token_logits(model, batch) for model in models], 2)  # (B, T, M, V)
    shape = batch.completion_ids.shape
    flat = from_logits(logits.flatten(0, 1), batch.completion_ids.flatten(), {"bald", "rmi"})
    found = {}
    for name, values in flat.items():
        table = values.view(shape) * batch.completion_mask
        found[name, "end_of_sequence"] = at_last(table, batch.completion_mask)
        found[name, "per_token"] = reduce(table, batch.completion_mask)
    return found


@torch.no_grad()
def noisy(model: nn.Module, sigma: float, members: int, seed: int) -> list[nn.Module]:
    """Members θ + σ rms(θ) ε, tensor by tensor."""
    generator, made = torch.Generator().manual_seed(seed), []
    for _ in range(members):
        member = copy.deepcopy(model)
        for parameter in member.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(sigma * parameter.square().mean().sqrt() * noise)
        made.append(member)
    return made


def matched_noise(sampled: Sampled, wanted: float, members: int) -> float:
    """σ at which noisy members have this mean bald per token, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        sigma = (low + high) / 2
        found = float(
            ensemble_scores(noisy(sampled.model, sigma, members, 0), sampled.batch)["bald", "per_token"].mean()
        )
        low, high = (sigma, high) if found < wanted else (low, sigma)
    return (low + high) / 2


# ---- rank statistics ---------------------------------------------------------------------------------------------


def ranks(values: Array, groups: Sequence[list[int]]) -> list[Array]:
    """Ranks within each group, centred and scaled to deviation 1; all 0 where nothing differs."""
    found = []
    for rows in groups:
        centred = rankdata(values[rows]) - (len(rows) + 1) / 2
        deviation = float(np.sqrt((centred**2).mean()))
        found.append(centred / deviation if deviation else centred)
    return found


def correlation(one: Sequence[Array], other: Sequence[Array]) -> dict[str, float]:
    """Mean over groups of the ranks' correlation, with its interval; a group in which one is constant is left out."""
    sums = np.array([[float((a * b).mean())] for a, b in zip(one, other, strict=True)])
    told = np.array([[float(bool(a.any() and b.any()))] for a, b in zip(one, other, strict=True)])
    return with_interval(sums, told)


def with_interval(sums: Array, counts: Array) -> dict[str, float]:
    low, high = interval(resampled_ratios(sums, counts)[:, 0], len(sums))
    return {"value": float(sums.sum() / counts.sum()), "low": low, "high": high}


def without(explained: Sequence[Array], by: Sequence[Sequence[Array]]) -> list[Array]:
    """The residuals of `explained` after ordinary least squares over all groups' ranks."""
    table = np.stack([np.concatenate(column) for column in by], 1)
    target = np.concatenate(explained)
    left = target - table @ np.linalg.lstsq(table, target, rcond=None)[0]
    return np.split(left, np.cumsum([len(part) for part in explained])[:-1])


def partial(one: Sequence[Array], other: Sequence[Array], given: Sequence[Sequence[Array]]) -> dict[str, float]:
    """Partial rank correlation, with its interval."""
    a, b = without(one, given), without(other, given)
    products = [[float((x * y).sum()), float((x * x).sum()), float((y * y).sum())] for x, y in zip(a, b, strict=True)]
    totals = np.array(products)
    scale = float(np.sqrt(totals[:, 1].sum() * totals[:, 2].sum()))
    found = with_interval(totals[:, :1], np.full((len(totals), 1), scale / len(totals)))
    return {**found, "value": float(totals[:, 0].sum() / scale)}


# ---- the four questions ------------------------------------------------------------------------------------------


def compared_with(truth: Scores, found: Scores, groups: Sequence[list[int]]) -> dict[str, Any]:
    """Each measure's rank correlation with the reference's."""
    return {
        f"{measure} {mode}": correlation(
            ranks(found[measure, mode].double().numpy(), groups), ranks(truth[measure, mode].double().numpy(), groups)
        )
        for measure, mode in COLUMNS
    }


def deep(sampled: Sampled, models: Sequence[nn.Module], members: int) -> list[dict[str, Any]]:
    """Every way to make members against the independently trained models."""
    groups, truth = list(sampled.groups()), ensemble_scores(models, sampled.batch)
    half = len(models) // 2
    halves = [ensemble_scores(part, sampled.batch) for part in (models[:half], models[half:])]
    rows = [
        {
            "ensemble": f"deep, {half} against the other {len(models) - half}",
            **compared_with(halves[0], halves[1], groups),
        }
    ]

    def dropout(spec: EnsembleSpec) -> Scores:
        return scores(sampled.model, sampled.batch, sampled.size, spec)

    default = EnsembleSpec(members, seed=1)
    specs = {
        f"dropout {p}, member, M {m}": replace(default, dropout=p, members=m) for p, m in product(DROPOUTS, MEMBERS)
    }
    specs[f"dropout 0.1, token, M {members}"] = replace(default, mask_sharing="token")
    rows += [{"ensemble": name, **compared_with(truth, dropout(spec), groups)} for name, spec in specs.items()]
    sigma = matched_noise(sampled, float(dropout(default)["bald", "per_token"].mean()), members)
    for count in (members, MEMBERS[-1]):
        found = ensemble_scores(noisy(sampled.model, sigma, count, 1), sampled.batch)
        rows.append({"ensemble": f"weight noise {sigma:.3f}, M {count}", **compared_with(truth, found, groups)})
    return rows


def known(sampled: Sampled, groups: Sequence[list[int]]) -> list[list[Array]]:
    """Ranks of what needs no ensemble: mean log-probability, mean entropy, length."""
    mask = sampled.batch.completion_mask
    logps = token_logits(sampled.model, sampled.batch).log_softmax(-1)
    entropies = -(logps.exp() * logps).sum(-1)
    own = logps.gather(-1, sampled.batch.completion_ids[..., None]).squeeze(-1)
    numbers = [reduce(own, mask), reduce(entropies, mask), mask.sum(1)]
    return [ranks(values.double().numpy(), groups) for values in numbers]


def wrongness(sampled: Sampled, found: Scores) -> dict[str, Any]:
    """Correlation with being wrong, alone and given log-probability, entropy and length."""
    groups = list(sampled.groups())
    given = known(sampled, groups)
    wrong = ranks(sampled.wrong, groups)
    rows: dict[str, Any] = {"log-probability": {"alone": correlation(given[0], wrong)}}
    for measure, mode in COLUMNS:
        one = ranks(found[measure, mode].double().numpy(), groups)
        rows[f"{measure} {mode}"] = {"alone": correlation(one, wrong), "partial": partial(one, wrong, given)}
    return rows


def visits(sampled: Sampled, found: Scores, run: Path) -> dict[str, Any]:
    """Correlation with how often training has seen the answer to this prompt, alone and given those three numbers."""
    import pyarrow.parquet as pq

    counts: Counter[tuple[str, str]] = Counter()
    for path in sorted((run / "completions").glob("step_*.parquet")):
        table = pq.read_table(path, columns=["prompt", "completion"])
        counts.update(zip(table["prompt"].to_pylist(), table["completion"].to_pylist(), strict=True))
    visited = np.array([counts[p, text] for p, text in zip(sampled.prompts, sampled.texts, strict=True)], np.float64)
    groups = [rows for rows in sampled.groups() if visited[rows].any()]
    against, given = ranks(visited, groups), known(sampled, groups)
    rows: dict[str, Any] = {"prompts": len(groups), "log-probability": {"alone": correlation(given[0], against)}}
    for measure, mode in COLUMNS:
        one = ranks(found[measure, mode].double().numpy(), groups)
        rows[f"{measure} {mode}"] = {"alone": correlation(one, against), "partial": partial(one, against, given)}
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("model")
    parser.add_argument("--deep", nargs="+", required=True, metavar="MODEL", help="independently trained models")
    parser.add_argument("--run", type=Path, help="a run of the model with observe.completions_every: 1")
    parser.add_argument("--groups", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=7)
    parser.add_argument("--members", type=int, default=8)
    arguments: argparse.Namespace = parser.parse_args()
    models = [load_causal_lm(name, torch.float32) for name in arguments.deep]
    spec = EnsembleSpec(arguments.members, seed=1)

    def sampled(name: str, split: Role) -> Sampled:
        return Sampled(name, split, arguments.groups, arguments.group_size, arguments.length)

    def measured(one: Sampled) -> Scores:
        return scores(one.model, one.batch, one.size, spec)

    start = sampled(arguments.model, "eval")
    results: dict[str, Any] = {"models": len(models), "deep": deep(start, models, arguments.members)}
    results["wrong"] = {"dropout": wrongness(start, measured(start)),
                        "deep": wrongness(start, ensemble_scores(models, start.batch))}  # fmt: skip
    if arguments.run:
        after = {split: sampled(str(arguments.run), split) for split in SPLITS}
        results["visits"] = visits(after["train"], measured(after["train"]), arguments.run)
        before = {"train": sampled(arguments.model, "train"), "eval": start}
        results["trained"] = {
            split: {
                when: {" ".join(column): float(values.mean()) for column, values in measured(one[split]).items()}
                for when, one in (("before", before), ("after", after))
            }
            for split in SPLITS
        }
    for name, value in results.items():
        print(name, value, flush=True)
    write_results(arguments.json, results)


if __name__ == "__main__":
    main()
