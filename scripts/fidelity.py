"""How well cheaper ensembles rank completions as the full one does, on the starter or any model given.

    python scripts/fidelity.py starter RUN_OR_MODEL ... --table docs/fidelity.md

The reference is scope full with many members. Every variant is judged by Spearman's rank correlation with it inside
each group, averaged over groups: the order within a group is all that the bonus uses. The first row, full with
as few members and other masks, is the most that a variant can reach. Cost is in layers run per member, full = 1.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from vdr_cli.config.schema import DataConfig
from vdr_cli.data.prompts import load_prompts
from vdr_cli.disagreement.bonus import reduce
from vdr_cli.disagreement.information import at_last
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.members import measure
from vdr_cli.models import anatomy
from vdr_cli.models.loading import eos_token_ids, load_causal_lm, load_tokenizer
from vdr_cli.rollout.base import Completions, Sampling, completion_key
from vdr_cli.rollout.transformers_backend import TransformersRollout

REFERENCE_MEMBERS = 128
"""Of the reference: its own noise is then a quarter of an 8-member ensemble's."""


def sampled(name: str, groups: int, group_size: int, length: int) -> tuple[nn.Module, Completions]:
    """Completions of the model itself on the starter's held-out prompts."""
    tokenizer = load_tokenizer(name)
    model = load_causal_lm(name, torch.float32)
    prompts = load_prompts(DataConfig(), "eval", tokenizer)
    rollout = TransformersRollout(tokenizer.pad_token_id, eos_token_ids(model, tokenizer))
    chosen = [prompts[index].token_ids for index in range(groups)]
    keys = [completion_key(0, 0, index) for index in range(groups)]
    return model, rollout.generate(model, chosen, group_size, Sampling(max_new_tokens=length), keys)


SHARES = {"half": 0.5, "a quarter": 0.25}
"""Of the positions; their cost is that of all of them but for the LM head's part."""


def variants(layers: int, members: int) -> dict[str, tuple[EnsembleSpec, float]]:
    """Name to (ensemble, cost)."""
    full = EnsembleSpec(members, seed=1)
    found = {f"full, M {members}": (full, 1.0)}
    for count in (2, 4, 16):
        found[f"full, M {count}"] = (replace(full, members=count), count / members)
    for p in (0.03, 0.2):
        found[f"full, p {p}"] = (replace(full, dropout=p), 1.0)
    for k in sorted({1, max(1, layers // 4), max(1, layers // 2)}):
        found[f"last_k, k {k}"] = (replace(full, scope="last_k", last_k=k), k / layers)
    found["mask_sharing token"] = (replace(full, mask_sharing="token"), 1.0)
    found["site embedding"] = (replace(full, site="embedding"), 1.0)
    found["site attention"] = (replace(full, site="attention"), 1.0)
    return found


def scores(
    model: nn.Module, batch: Completions, group_size: int, spec: EnsembleSpec, name: str, share: float = 1.0
) -> dict[str, Tensor]:
    """(B,) of both modes. share: of the valid positions, drawn at random, that make the mean of per_token."""
    values = measure(model, batch, group_size, spec, 0, "all", {name}).get(name)
    return {
        "end_of_sequence": at_last(values, batch.completion_mask),
        "per_token": reduce(values, drawn(batch.completion_mask, share)),
    }


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


def table(name: str, arguments: argparse.Namespace) -> str:
    model, batch = sampled(name, arguments.groups, arguments.group_size, arguments.length)
    layers = len(anatomy.decoder_layers(model))
    columns = [(measure_name, mode) for measure_name in ("bald", "rmi") for mode in ("end_of_sequence", "per_token")]
    head = " | ".join(f"{measure_name} {mode}" for measure_name, mode in columns)
    lines = [f"| ensemble | cost | {head} |", "|---|---|" + "---|" * len(columns)]
    many = EnsembleSpec(REFERENCE_MEMBERS, seed=0)
    truth = {m: scores(model, batch, arguments.group_size, many, m) for m in ("bald", "rmi")}
    for label, (spec, cost) in variants(layers, arguments.members).items():
        found = {m: scores(model, batch, arguments.group_size, spec, m) for m in ("bald", "rmi")}
        numbers = [within_groups(found[m][mode], truth[m][mode], batch, arguments.group_size) for m, mode in columns]
        lines.append(f"| {label} | {cost:.2f} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")
    full = EnsembleSpec(arguments.members, seed=1)
    for label, share in SHARES.items():
        found = {m: scores(model, batch, arguments.group_size, full, m, share) for m in ("bald", "rmi")}
        numbers = [within_groups(found[m][mode], truth[m][mode], batch, arguments.group_size) for m, mode in columns]
        shown = ["" if mode != "per_token" else f"{n:.2f}" for n, (_, mode) in zip(numbers, columns, strict=True)]
        lines.append(f"| full, {label} of the positions | 1.00 | " + " | ".join(shown) + " |")
    means = ", ".join(f"{m} {mode} {float(truth[m][mode].mean()):.4f}" for m, mode in columns)
    title = "starter" if name == "starter" else "after training"
    return f"### {title}\n\n" + "\n".join(lines) + f"\n\nMean of the reference in nats: {means}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--table", type=Path, help="write the tables here as Markdown")
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=7)
    parser.add_argument("--members", type=int, default=8)
    arguments = parser.parse_args()
    text = "\n".join(table(name, arguments) for name in arguments.models)
    print(text)
    if arguments.table:
        arguments.table.write_text(text)


if __name__ == "__main__":
    main()
