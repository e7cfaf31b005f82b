"""Inputs of a step: the order of prompts, their tokens, the completions' texts and ends, and the rewards."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vdr_cli.audit import rewards, streams
from vdr_cli.audit.files import Record
from vdr_cli.audit.lines import Judge, Line
from vdr_cli.audit.model import end_ids
from vdr_cli.audit.weights import Models
from vdr_cli.config import Config
from vdr_cli.errors import DataError
from vdr_cli.rewards.base import TrainerState, listed
from vdr_cli.rewards.loading import LoadedReward, load_rewards

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Places:
    """The places of a step's groups in the stream of prompts."""

    positions: list[int | None]
    """One a group; None: its row is at none of the places it can come from."""
    expected_rows: list[int]


def places_of(record: Record, cfg: Config) -> Places:
    """The positions from the step's state, and the rows that the seed puts there.

    Group i is the step's i-th position, or with grpo.resample_groups any later one that the step drew.
    """
    G, state = cfg.rollout.group_size, record.state
    found = [int(row) for row in record.columns["row"][::G]]
    ahead = bool(cfg.rollout.ahead) and record.step > 0
    first = state["drawn"] - cfg.train.prompts_per_step if ahead else state["drawn"]
    later = range(state["drawn"] if ahead else first + len(found), state["drawn"] + state["drawn_now"])
    own = range(first, first + len(found))
    rows = dict(zip([*own, *later], _rows(record, cfg, [*own, *later]), strict=True))
    free = list(later) if cfg.grpo.resample_groups else []
    positions: list[int | None] = []
    expected = []
    for index, row in enumerate(found):
        if rows[own[index]] == row:
            positions.append(own[index])
            expected.append(row)
            continue
        match = next((place for place in free if rows[place] == row), None)
        if match is not None:
            free.remove(match)
        positions.append(match)
        expected.append(rows[own[index]] if match is None else row)
    return Places(positions, expected)


def _rows(record: Record, cfg: Config, positions: list[int]) -> list[int]:
    return streams.prompt_rows(record.state["dataset_rows"], positions, cfg.train.seed, cfg.data.shuffle)


def audit(judge: Judge, record: Record, cfg: Config, models: Models) -> list[Line]:
    """Prompts, tokens, texts, ends."""
    G = cfg.rollout.group_size
    places = places_of(record, cfg)
    prompts = record.decoded("prompt")
    ids = [list(row) for row in record.columns["prompt_ids"]]
    lines = [judge.equal("order of prompts", record.columns["row"][::G], places.expected_rows)]
    if cfg.rollout.takes_turns:
        lines.append(judge.skipped("prompt tokens", "tools' schemas and the words of reset are not made again"))
    else:
        encoded = [_encoded(models.tokenizer, prompt, cfg) for prompt in prompts]
        lines.append(judge.equal("prompt tokens", ids, encoded))
    return [*lines, *audit_texts(judge, record, cfg, models)]


def audit_texts(judge: Judge, record: Record, cfg: Config, models: Models) -> list[Line]:
    """Texts and ends of completions, from their tokens."""
    if cfg.rollout.takes_turns:
        return _audit_turns(judge, record, models)
    prompts = record.decoded("prompt")
    texts = [_text(models.tokenizer, row, prompt) for row, prompt in zip(_ids(record), prompts, strict=True)]
    return [judge.equal("completion texts", record.decoded("text"), texts), *_ends(judge, record, cfg, models)]


def _audit_turns(judge: Judge, record: Record, models: Models) -> list[Line]:
    """The policy's words in the messages, from its tokens; an environment's words are not made again."""
    theirs = [[m["content"] for m in text if m["role"] == "assistant"] for text in record.decoded("text")]
    ours = []
    for ids, own in zip(_ids(record), record.policy, strict=True):
        begins = [t for t in range(len(ids)) if own[t] and (t == 0 or not own[t - 1])]
        ends = [t + 1 for t in range(len(ids)) if own[t] and (t + 1 == len(ids) or not own[t + 1])]
        turns = [ids[begin:end] for begin, end in zip(begins, ends, strict=True)]
        ours.append([models.tokenizer.decode(turn, skip_special_tokens=True) for turn in turns])
    return [
        judge.equal("turns", theirs, ours),
        judge.skipped("replies, lengths, truncated", "the environment's words and limits are not made again"),
    ]


def _ids(record: Record) -> list[list[int]]:
    return [list(row) for row in record.columns["completion_ids"]]


def _text(tokenizer: Any, ids: list[int], prompt: Any) -> Any:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _encoded(tokenizer: Any, prompt: Any, cfg: Config) -> list[int]:
    """A prompt's tokens: a string as the tokenizer has it, without the EOS that it adds, and without the BOS that it
    adds before the string's own; a chat by its template."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        bos, eos = (tokenizer.bos_token_id, tokenizer.bos_token), (tokenizer.eos_token_id, tokenizer.eos_token)
        if _adds(ids[::-1], prompt.endswith, *eos, free=0):
            ids = ids[:-1]
        if _adds(ids, prompt.startswith, *bos, free=1):
            ids = ids[1:]
    else:
        begun = prompt[-1]["role"] == "assistant"
        how = {"add_generation_prompt": not begun, "continue_final_message": begun}
        ids = list(tokenizer.apply_chat_template(prompt, tokenize=True, return_dict=True, **how)["input_ids"])
    return ids[-cfg.data.max_prompt_tokens :] if cfg.data.max_prompt_tokens else ids


def _adds(ids: list[int], borders: Callable[[str], bool], token: int | None, text: str | None, free: int) -> bool:
    """True if the row begins with more of this token than the prompt's text has, `free` of them aside.

    borders: whether the prompt begins, or ends, with a text. ids: from that side.
    """
    if token is None:
        return False
    number = next((n for n, each in enumerate(ids) if each != token), len(ids))
    written = next(n for n in range(len(ids) + 1) if not borders(str(text) * (n + 1)))
    return number > max(written, free)


def _ends(judge: Judge, record: Record, cfg: Config, models: Models) -> list[Line]:
    """Every completion ends at its first end token or stop string, or is cut at max_new_tokens."""
    ends = end_ids(models.policy, models.tokenizer)
    longest = cfg.rollout.max_new_tokens
    lengths, truncated = [], []
    for ids in _ids(record):
        length = next((n for n in range(1, len(ids) + 1) if _ended(ids[:n], ends, cfg, models.tokenizer)), None)
        lengths.append(min(length or longest, longest))
        truncated.append(length is None)
    return [
        judge.equal("completion lengths", [int(length) for length in record.lengths], lengths),
        judge.equal("truncated", [bool(flag) for flag in record.truncated], truncated),
    ]


def _ended(ids: list[int], ends: set[int], cfg: Config, tokenizer: Any) -> bool:
    if ids[-1] in ends:
        return True
    if not cfg.rollout.stop:
        return False
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return any(string in text for string in cfg.rollout.stop)


# ---- rewards -----------------------------------------------------------------------------------------------------


def audit_rewards(judge: Judge, record: Record, cfg: Config) -> list[Line]:
    """Every function's rewards from the texts, and their sum with the overlong penalty."""
    lines = audit_functions(judge, record, cfg, TrainerState(record.step, cfg.train.steps))
    task = task_rewards(record, cfg, weights_of(cfg, record.rewards.shape[1]))
    return [*lines, judge.compare("task reward", record.numbers("task_reward"), task, "reward")]


def audit_functions(judge: Judge, record: Record, cfg: Config, trainer: TrainerState) -> list[Line]:
    """Every function's rewards from the texts. trainer: where the run is, as functions are told."""
    if record.state.get("lost_columns"):
        lost = ", ".join(record.state["lost_columns"])
        return [judge.skipped("rewards", f"columns {lost} could not be saved as JSON")]
    lines = []
    if cfg.rollout.environment is not None:
        return [judge.skipped("rewards", "the environments that they may ask are gone")]
    for index, reward in enumerate(load_rewards(cfg.rewards.model_copy(update={"processes": 0}), cfg.data.name)):
        found = _called(reward, record, trainer)
        lines.append(judge.compare(f"rewards/{reward.name}", record.rewards[:, index], found, "reward"))
    return lines


def task_rewards(record: Record, cfg: Config, weights: Array) -> Array:
    """(B,) the weighted sum of the rewards on file, less the overlong penalty."""
    penalty = rewards.overlong_penalty(
        record.policy.sum(1).astype(np.float64), cfg.rollout.completion_tokens, cfg.grpo.overlong_cache
    )
    return rewards.combined(record.rewards, weights) + penalty


def weights_of(cfg: Config, columns: int) -> Array:
    """(F,) of the run's reward functions. columns: F."""
    own = [1.0] * (columns - len(cfg.rewards.functions))  # the data's reward, or the environments'
    return np.array([entry.weight for entry in cfg.rewards.functions] + own)


def _called(reward: LoadedReward, record: Record, trainer: TrainerState) -> Array:
    """(B,) what the function says of all completions of the step, NaN for None."""
    columns = record.decoded("columns")
    arguments: dict[str, Any] = {name: [row.get(name) for row in columns] for name in (columns[0] if columns else ())}
    arguments |= {
        "prompts": record.decoded("prompt"),
        "completions": record.decoded("text"),
        "completion_ids": _ids(record),
        "trainer_state": trainer,
    }
    try:
        value = reward.function(**reward.accepted(arguments))
        if inspect.iscoroutine(value):
            value = asyncio.run(_awaited(value))
        answer = listed(value, len(record))
        return np.array([math.nan if entry is None else float(entry) for entry in answer])
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        raise DataError(f"reward {reward.name} raised in the audit ({type(error).__name__}: {line})") from error


async def _awaited(coroutine: Any) -> Any:
    return await coroutine
