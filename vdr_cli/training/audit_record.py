"""Records for `vdr audit`: of a step (audit/step_000000.parquet) or of an evaluation (audit/eval_000000.parquet).

One row per completion.

Columns and the step's own numbers are described in docs/audit.md.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from vdr_cli.config import Config
from vdr_cli.data.completions import numbered_files, write_table
from vdr_cli.engine import collectives
from vdr_cli.errors import MachineError
from vdr_cli.evaluation.result import EvalResult
from vdr_cli.samples import Completions
from vdr_cli.training.batch import Advantages, RewardedGroups, Updates
from vdr_cli.training.resources import Resources
from vdr_cli.training.run_log import RunLog
from vdr_cli.training.state import LoopState

STATE = b"vdr_audit"
"""Key of the step's own numbers in the file's metadata, as JSON."""

IDS, NUMBERS = pa.list_(pa.int32()), pa.list_(pa.float32())
TYPES = {
    "prompt_ids": IDS,
    "completion_ids": IDS,
    "rewards": NUMBERS,
    "sampler_logps": NUMBERS,
    "logps": NUMBERS,
    "entropies": NUMBERS,
    "ref_logps": NUMBERS,
    "advantages": NUMBERS,
    "measure_tokens": NUMBERS,
    "task_reward": pa.float32(),
    "task_advantage": pa.float32(),
    "reduced": pa.float32(),
    "visits": pa.int64(),
    "policy": pa.list_(pa.bool_()),
}


def is_due(config: Config, step: int) -> bool:
    """True when the rollout at this step leaves a record (observe.audit_every)."""
    every, before = config.observe.audit_every, step - config.grpo.updates_per_rollout
    if every is None:
        return step == 0
    return every > 0 and (step == 0 or step // every > before // every)


def save(
    res: Resources,
    state: LoopState,
    log: RunLog,
    batch: RewardedGroups,
    advantages: Advantages,
    updates: Updates,
) -> None:
    """Write the step's record when it is due, before the step is counted. Collective; rank 0 writes.

    A full disk is reported, and the training goes on without the record.
    """
    if not is_due(res.config, state.step):
        return
    parts = collectives.gather_objects(_columns(res, batch, advantages, updates))
    if not collectives.is_main():
        return
    columns = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    lost = sorted({name for names in columns.pop("lost") for name in names})
    numbers = _numbers(res, state) | {"lost_columns": lost, "ranks": [len(part["row"]) for part in parts]}
    numbers["log_probs"] = "sampler_logps" if advantages.inputs.old_logps is None else "logps"
    try:
        _write(res.directory / "audit" / f"step_{state.step:06d}.parquet", columns, numbers)
    except MachineError as error:
        log.note(f"{error}; training continues")


def save_evaluation(res: Resources, state: LoopState, log: RunLog, result: EvalResult) -> None:
    """Write what an evaluation sampled, when a record is due at its step. Every rank has it; rank 0 writes.

    A full disk is reported, and the training goes on without the record. Episodes of several turns leave none.
    """
    if res.config.rollout.takes_turns or not is_due(res.config, state.step) or not collectives.is_main():
        return
    columns = _evaluation_columns(result)
    numbers = {
        "step": state.step,
        "samples": result.solved.shape[1],
        "k": list(result.ks),
        "rewards": list(result.rewards),
        "lost_columns": sorted({name for names in columns.pop("lost") for name in names}),
        "dtype": _dtype(res),
    }
    try:
        _write(res.directory / "audit" / f"eval_{state.step:06d}.parquet", columns, numbers)
    except MachineError as error:
        log.note(f"{error}; training continues")


def _evaluation_columns(result: EvalResult) -> dict[str, list[Any]]:
    n = result.solved.shape[1]
    prompts = [prompt for prompt in result.prompts for _ in range(n)]
    saved = [_as_json(prompt.columns) for prompt in prompts]
    texts = [text for texts in result.texts for text in texts]
    return {
        "row": [prompt.row for prompt in prompts],
        "prompt": [json.dumps(prompt.value) for prompt in prompts],
        "columns": [text for text, _ in saved],
        "lost": [names for _, names in saved],
        "text": [json.dumps(_as_given(text, prompt.value)) for text, prompt in zip(texts, prompts, strict=True)],
        "prompt_ids": [prompt.token_ids for prompt in prompts],
        "completion_ids": [ids for group in result.completion_ids for ids in group],
        "truncated": result.truncated.ravel().tolist(),
        "rewards": np.stack(list(result.rewards.values()), axis=-1).reshape(len(prompts), -1).tolist(),
    }


def _as_given(text: str, prompt: Any) -> Any:
    """The completion as reward functions see it: a message where the prompt is a chat."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def remove_from(directory: Path, step: int) -> None:
    """Delete the records of this step and later ones, and of later evaluations: a resumed run writes them again."""
    for kind, first in (("step", step), ("eval", step + 1 if step else 0)):
        for number, path in numbered_files(directory / "audit", kind).items():
            if number >= first:
                path.unlink()


def _numbers(res: Resources, state: LoopState) -> dict[str, Any]:
    """Counters at the step's beginning, and the RMS at its beginning and end."""
    return {
        "step": state.step,
        "steps": res.config.train.steps,
        "drawn": state.drawn,
        "drawn_now": state.drawn_in_step,
        "tokens": state.tokens,
        "prompt_tokens": state.prompt_tokens,
        "dataset_rows": len(res.prompts),
        "rms": state.finished_rms,
        "rms_after": state.rms.state_dict(),
        "entropy": state.entropy.state_dict(),
        "members": None if res.ensemble is None else asdict(res.ensemble.spec),
        "rewards": [reward.name for reward in res.rewards],
        "dtype": _dtype(res),
    }


def _dtype(res: Resources) -> str:
    return str(next(res.engine.causal_lm.parameters()).dtype).removeprefix("torch.")


def _columns(res: Resources, batch: RewardedGroups, advantages: Advantages, updates: Updates) -> dict[str, list[Any]]:
    """This rank's rows; numbers of tokens as lists without padding, None where a step has none of them."""
    completions, count = batch.completions, len(batch)
    lengths = completions.completion_mask.sum(1).tolist()

    def tokens(values: Tensor | None) -> list[Any]:
        if values is None:
            return [None] * count
        rows = [row[:length].tolist() for row, length in zip(values, lengths, strict=False)]
        return rows + [None] * (count - len(rows))

    saved = [_as_json(prompt.columns) for prompt in batch.prompts]
    bonus, inputs = advantages.bonus, advantages.inputs
    added = None if bonus is None else bonus.added
    return {
        "row": [prompt.row for prompt in batch.prompts],
        "prompt": [json.dumps(prompt.value) for prompt in batch.prompts],
        "columns": [text for text, _ in saved],
        "lost": [names for _, names in saved],
        "text": [json.dumps(text) for text in batch.texts],
        "prompt_ids": completions.prompt_token_ids(),
        "completion_ids": completions.completion_token_ids(),
        "policy": tokens(_mixed(completions)),
        "truncated": completions.truncated.tolist(),
        "sampler_logps": tokens(completions.sampler_logps),
        "rewards": batch.rewards.tolist(),
        "task_reward": batch.task_reward.tolist(),
        "task_advantage": advantages.task_advantages.tolist(),
        "advantages": tokens(inputs.advantages),
        "reduced": [None] * count if bonus is None else bonus.per_completion.tolist(),
        "measure_tokens": tokens(res.shown_measure()),
        "bonus": tokens(added) if added is None or added.dim() == 2 else added.tolist(),
        "visits": [None] * count if advantages.visits is None else advantages.visits.tolist(),
        "ref_logps": tokens(inputs.ref_logps),
        "selected": tokens(inputs.selected),
        "logps": _before_the_update(inputs.old_logps, updates.own_parts(updates.first_logps), lengths),
        "entropies": _before_the_update(advantages.old_entropies, updates.own_parts(updates.first_entropies), lengths),
    }


def _mixed(completions: Completions) -> Tensor | None:
    """(B, T) the policy's tokens; None where no other token is valid."""
    mixed = bool((completions.completion_mask & ~completions.policy_mask).any())
    return completions.policy_mask if mixed else None


def _before_the_update(read: Tensor | None, parts: list[Tensor], lengths: list[int]) -> list[list[float]]:
    """Rows cut to their own lengths: of what was read beforehand (B, T), else of the first pass's micro-batches.

    A rank's empty micro-batches at the end are left out.
    """
    rows = [row for part in (parts if read is None else [read]) for row in part.float().cpu()]
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=False)]


def _as_json(columns: dict[str, Any]) -> tuple[str, list[str]]:
    """A row's columns as JSON, and the names of those that JSON does not give back as they are."""
    kept, lost = {}, []
    for name, value in columns.items():
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if same:
            kept[name] = value
        else:
            lost.append(name)
    return json.dumps(kept), lost


def _write(path: Path, columns: dict[str, list[Any]], state: dict[str, Any]) -> None:
    """The file, whole or not at all. MachineError when the disk refuses."""
    table = pa.table({name: pa.array(values, TYPES.get(name)) for name, values in columns.items()})
    write_table(path, table.replace_schema_metadata({STATE: json.dumps(state)}))
