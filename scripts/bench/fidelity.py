"""Fidelity of cheaper ensembles: do they rank completions as the full one does? On the starter or any model given.

    python scripts/bench/fidelity.py starter "after training=RUN_OR_MODEL" ... --json benchmarks/fidelity.json

The reference is scope full with many members and other masks. Every variant is judged by Spearman's rank correlation
with it inside each group, averaged over groups and several draws of its masks: the order within a group is all that the
bonus uses. The first row, full with as few members, is what a cheaper variant is measured against. Cost is in layers
that run, full with that many members = 1; what lies below the members' layers runs once for all of them.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from fidelity_sites import SITES, measure_at
from harness import parser_of, write_results
from scipy.stats import spearmanr
from torch import Tensor, nn

from vdr_cli.config.schema import DataConfig
from vdr_cli.data.prompts import load_prompts
from vdr_cli.disagreement.information import at_last
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.exploration.bonus import reduce
from vdr_cli.models import anatomy
from vdr_cli.models.loading import eos_token_ids, load_causal_lm, load_tokenizer
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Completions, Sampling, Stream, completion_key

REFERENCE_MEMBERS = 128
"""Members of the reference: its own noise is then a quarter of an 8-member ensemble's."""

DRAWS = 3
"""Ensembles that a variant is averaged over: eight masks rank completions better or worse by chance."""


def sampled(name: str, groups: int, group_size: int, length: int) -> tuple[nn.Module, Completions]:
    """Completions of the model itself on the starter's held-out prompts."""
    tokenizer = load_tokenizer(name)
    model = load_causal_lm(name, torch.float32)
    prompts = load_prompts(DataConfig(), "eval", tokenizer)
    rollout = TransformersRollout(tokenizer.pad_token_id, eos_token_ids(model, tokenizer))
    chosen = [prompts[index].token_ids for index in range(groups)]
    keys = [completion_key(0, Stream.EVALUATION, index) for index in range(groups)]
    return model, rollout.generate(model, RolloutRequest(chosen, group_size, Sampling(max_new_tokens=length), keys))


SHARES = {"half": 0.5, "a quarter": 0.25}
"""Shares of the positions; their cost is that of all of them but for the LM head's part."""


def variants(layers: int, members: int) -> dict[str, tuple[EnsembleSpec, float]]:
    """Name to (ensemble, cost)."""
    full = EnsembleSpec(members, seed=1)
    found = {f"full, M {members}": (full, 1.0)}
    for count in (2, 4, 16):
        found[f"full, M {count}"] = (replace(full, members=count), count / members)
    for p in (0.03, 0.2):
        found[f"full, p {p}"] = (replace(full, dropout=p), 1.0)
    for k in sorted({1, max(1, layers // 4), max(1, layers // 2)}):
        cost = (members * k + layers - k) / (members * layers)
        found[f"last_k, k {k}"] = (replace(full, scope="last_k", last_k=k), cost)
    found["mask_sharing token"] = (replace(full, mask_sharing="token"), 1.0)
    return found


Scores = dict[tuple[str, str], Tensor]
"""(measure, mode) to (B,)."""


def scores(
    model: nn.Module,
    batch: Completions,
    group_size: int,
    spec: EnsembleSpec,
    share: float = 1.0,
    site: str | None = None,
) -> Scores:
    """share: of the valid positions, drawn at random, that make the mean of per_token. site: another place of masks."""
    measures = {"bald", "rmi"}
    if site is None:
        statistics = EnsembleReader(spec).measure(model, MeasureRequest(batch, group_size, 0, measures=measures))
    else:
        statistics = measure_at(site, model, batch, spec, measures)
    found = {}
    for name in ("bald", "rmi"):
        values = statistics.get(name)
        found[name, "end_of_sequence"] = at_last(values, batch.completion_mask)
        found[name, "per_token"] = reduce(values, drawn(batch.completion_mask, share))
    return found


def drawn(mask: Tensor, share: float) -> Tensor:
    """(B, T) bool: this share of each row's valid positions."""
    keys = torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)).masked_fill(~mask, 2.0)
    kept = (share * mask.sum(1, keepdim=True)).ceil()
    return mask & (keys.argsort(1).argsort(1) < kept)


def within_groups(one: Tensor, other: Tensor, batch: Completions, group_size: int) -> float:
    """Mean over groups of Spearman's correlation over the group's distinct completions."""
    found = []
    for at in range(0, len(one), group_size):
        _, first = batch.completion_ids[at : at + group_size].unique(dim=0, return_inverse=True)
        rows = [at + int((first == value).nonzero()[0]) for value in first.unique()]
        if len(rows) > 2:
            found.append(spearmanr(one[rows], other[rows]).statistic)
    return float(torch.tensor(found).nanmean())


def judged(title: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model: its layers, the reference's means in nats, and each variant's cost and correlations."""
    size = arguments.group_size
    model, batch = sampled(name, arguments.groups, size, arguments.length)
    layers = len(anatomy.decoder_layers(model))
    truth = scores(model, batch, size, EnsembleSpec(REFERENCE_MEMBERS, seed=0))

    def row(label: str, spec: EnsembleSpec, cost: float, share: float = 1.0, site: str | None = None) -> dict[str, Any]:
        draws = [scores(model, batch, size, replace(spec, seed=1 + draw), share, site) for draw in range(DRAWS)]
        cells: dict[str, Any] = {"ensemble": label, "cost": cost}
        for column, reference in truth.items():
            found = [within_groups(draw[column], reference, batch, size) for draw in draws]
            cells[" ".join(column)] = sum(found) / DRAWS if share == 1.0 or column[1] == "per_token" else None
        print(title, cells, flush=True)
        return cells

    rows = [row(label, spec, cost) for label, (spec, cost) in variants(layers, arguments.members).items()]
    full = EnsembleSpec(arguments.members)
    rows += [row(f"site {site}", full, 1.0, site=site) for site in SITES]
    rows += [row(f"full, {label} of the positions", full, 1.0, share) for label, share in SHARES.items()]
    means = {" ".join(column): float(values.mean()) for column, values in truth.items()}
    return {"title": title, "layers": layers, "reference_nats": means, "rows": rows}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("models", nargs="+", metavar="[TITLE=]MODEL")
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=7)
    parser.add_argument("--members", type=int, default=8)
    arguments = parser.parse_args()
    titled = [model.rpartition("=") for model in arguments.models]
    models = [judged(title or name, name, arguments) for title, _, name in titled]
    write_results(arguments.json, {"models": models})


if __name__ == "__main__":
    main()
