"""Items of a window to batches: rows with the same prompt together, similar lengths together, within a token budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from vdr_cli.samples import Completions, pad_prompts
from vdr_cli.scoring.tokens import Item

Group = list[Item]
Batch = tuple[int, list[Item]]  # group size, rows group by group


def batches(items: Sequence[Item], batch_tokens: int) -> Iterator[Batch]:
    """Every item with tokens exactly once. A prompt is read once for its group, so groups stay whole where they fit."""
    by_size: dict[int, list[Group]] = defaultdict(list)
    for group in _groups(items, batch_tokens):
        by_size[len(group)].append(group)
    for size, groups in sorted(by_size.items()):
        groups.sort(key=lambda group: (_width(group), len(group[0].prompt_ids), group[0].at))
        batch: list[Item] = []
        prompt = completion = 0
        for group in groups:
            wider_prompt = max(prompt, len(group[0].prompt_ids))
            wider_completion = max(completion, len(group[0].completion_ids))
            if batch and (len(batch) + size) * (wider_prompt + wider_completion) > batch_tokens:
                yield size, batch
                batch = []
                wider_prompt, wider_completion = len(group[0].prompt_ids), len(group[0].completion_ids)
            batch.extend(group)
            prompt, completion = wider_prompt, wider_completion
        yield size, batch


def collate(items: Sequence[Item], pad_id: int) -> Completions:
    """Left-padded prompts, right-padded completions."""
    prompt_ids, prompt_mask = pad_prompts([item.prompt_ids for item in items], pad_id)
    lengths = torch.tensor([len(item.completion_ids) for item in items])
    width = int(lengths.max())
    mask = torch.arange(width) < lengths[:, None]  # (B, T)
    completion_ids = torch.full((len(items), width), pad_id, dtype=torch.int64)
    completion_ids[mask] = torch.tensor([token for item in items for token in item.completion_ids])
    policy = mask.clone()  # (B, T)
    for row, item in enumerate(items):
        if item.policy is not None:
            policy[row, : len(item.policy)] = torch.tensor(item.policy)
    return Completions(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=completion_ids,
        completion_mask=mask,
        sampler_logps=torch.zeros(mask.shape),
        truncated=torch.tensor([item.is_cut for item in items]),
        policy_mask=policy,
    )


def _groups(items: Sequence[Item], batch_tokens: int) -> Iterator[Group]:
    """Items by prompt, longest completions first; a group beyond the budget is split."""
    by_prompt: dict[tuple[int, ...], Group] = defaultdict(list)
    for item in items:
        if item.measured:
            by_prompt[tuple(item.prompt_ids)].append(item)
    for group in by_prompt.values():
        group.sort(key=lambda item: (-len(item.completion_ids), item.at))
        step = max(batch_tokens // _width(group), 1)
        for start in range(0, len(group), step):
            yield group[start : start + step]


def _width(group: Group) -> int:
    """Columns of a group; its longest completion comes first."""
    return len(group[0].prompt_ids) + len(group[0].completion_ids)
