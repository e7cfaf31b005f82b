"""A bonus source's numbers from a step's record, in float64, from docs/exploration.md."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vdr_cli.audit import bonus as bonuses
from vdr_cli.audit import rewards, streams
from vdr_cli.audit.files import Record
from vdr_cli.audit.inputs import places_of
from vdr_cli.audit.lines import Judge, Line
from vdr_cli.config import Config
from vdr_cli.rewards.base import completion_text
from vdr_cli.rewards.loading import find_function, load_rewards

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]

PERMUTATION, NOISE = 2, 3
"""Numbers of the streams that order the bonus within groups, and that source noise draws from."""


def numbers(record: Record, cfg: Config, task_advantages: Array) -> tuple[Array, Flags, Array | None]:
    """(b, where it is valid, the number of each completion): (B, 1) or (B, T) twice, and (B,).

    What a model or the run's history decides is taken from the record. The last is None where nothing is recomputed.
    """
    if cfg.bonus_source == "disagreement":
        return _disagreement(record, cfg)
    compute = SOURCES.get(cfg.bonus_source)
    if compute is None:
        return _on_file(record)
    b = compute(record, cfg, task_advantages)
    if b.ndim == 1:
        return b[:, None], np.ones((len(record), 1), dtype=bool), b
    return b, record.policy, bonuses.reduced(b, record.policy, None)


def _on_file(record: Record) -> tuple[Array, Flags, Array | None]:
    return record.numbers("reduced")[:, None], np.ones((len(record), 1), dtype=bool), None


def _disagreement(record: Record, cfg: Config) -> tuple[Array, Flags, Array | None]:
    d = cfg.disagreement
    b, every, _ = _on_file(record)
    if d.mode == "end_of_sequence":
        return b, every, None
    measure = record.tokens("measure_tokens")
    reduced = bonuses.reduced(measure, record.policy, d.last_n)
    if d.credit == "token":
        return bonuses.credit(measure, record.policy, d.measure, d.discount, d.last_n), record.policy, reduced
    return b, every, reduced


def _mean_log_prob(record: Record) -> Array:
    return bonuses.reduced(record.tokens(record.state["log_probs"]), record.policy, None)


def _surprisal(record: Record, cfg: Config, task_advantages: Array) -> Array:
    own = cfg.bonus.surprisal
    found = own.alpha * -_mean_log_prob(record)
    if own.kappa is None:
        return found
    reward = record.numbers("task_reward")
    return np.minimum(found, np.where(np.isnan(reward), 0.0, np.abs(reward)) / own.kappa)


def _entropy(record: Record, cfg: Config, task_advantages: Array) -> Array:
    own = cfg.bonus.entropy
    found = own.alpha * record.tokens("entropies")
    if own.kappa is not None:
        found = np.minimum(found, np.abs(task_advantages)[:, None] / own.kappa)
    return found * record.policy


def _counts(record: Record, cfg: Config, task_advantages: Array) -> Array:
    if cfg.bonus.counts.kind == "ucb":
        return np.array([1.0 / math.sqrt(n) - cfg.bonus.counts.b0 for n in record.numbers("visits")])
    G, answers = cfg.rollout.group_size, prompts_with_answers(record, cfg)
    groups = [answers[start : start + G] for start in range(0, len(answers), G)]
    return np.array([-(group.count(answer) - 1) / G for group in groups for answer in group])


def _unlikeliness(record: Record, cfg: Config, task_advantages: Array) -> Array:
    G, beta = cfg.rollout.group_size, cfg.bonus.unlikeliness.beta
    mean, reward = _mean_log_prob(record), record.numbers("task_reward")
    found, right = np.zeros(len(record)), rewards.solved(reward, cfg.rewards.solved_at)
    for start in range(0, len(record), G):
        rows = list(range(start, start + G))
        for row in rows:
            if right[row]:
                found[row] = -beta * _rank(mean[rows], mean[row]) / G * reward[row]
    return found


def _rank(group: Array, own: float) -> float:
    """Mean place of a value in its group, from 0, among those that rounding could swap with it."""
    ordered = np.sort(group)
    apart = np.append(True, np.diff(ordered) > bonuses.EQUAL * (1.0 + np.abs(ordered[1:])))
    run = np.cumsum(apart)
    at = run[np.searchsorted(ordered, own)]
    return float(np.flatnonzero(run == at).mean())


def _noise(record: Record, cfg: Config, task_advantages: Array) -> Array:
    found = []
    for place in _places(record, cfg):
        first, second = streams.completion_uniforms(*place, 2, NOISE)
        found.append(math.sqrt(-2.0 * math.log1p(-first)) * math.cos(2.0 * math.pi * second))
    return np.array(found)


SOURCES: dict[str, Callable[[Record, Config, Array], Array]] = {
    "surprisal": _surprisal,
    "entropy": _entropy,
    "counts": _counts,
    "unlikeliness": _unlikeliness,
    "noise": _noise,
}


def left_out(judge: Judge, record: Record, cfg: Config) -> list[Line]:
    """A note on numbers of the source that are taken from the record as they are."""
    name = cfg.bonus_source
    if not _is_users(name):
        return []
    what = "bonus of tokens" if is_taken_whole(record, cfg) else f"{name} of completions"
    return [judge.skipped(what, "a function of the user's: its numbers are taken as they are")]


def _is_users(name: str) -> bool:
    return ":" in name


def is_taken_whole(record: Record, cfg: Config) -> bool:
    """True where a user's function gives a number per token, of which the record holds the bonus alone."""
    return _is_users(cfg.bonus_source) and any(isinstance(bonus, list) for bonus in record.columns["bonus"])


# ---- visits ------------------------------------------------------------------------------------------------------


def prompts_with_answers(record: Record, cfg: Config) -> list[tuple[tuple[int, ...], str]]:
    """(B,) each completion's prompt, as the model reads it, with what counts as its answer."""
    prompts = [tuple(ids) for ids in record.columns["prompt_ids"]]
    return list(zip(prompts, _answers(record, cfg), strict=True))


def _answers(record: Record, cfg: Config) -> list[str]:
    texts = record.decoded("text")
    function = _answer_function(cfg)
    if function is None:
        return [completion_text(text).strip() for text in texts]
    columns = record.decoded("columns")
    arguments: dict[str, Any] = {name: [row.get(name) for row in columns] for name in (columns[0] if columns else ())}
    arguments |= {"prompts": record.decoded("prompt"), "completions": texts}
    arguments["completion_ids"] = [list(ids) for ids in record.columns["completion_ids"]]
    parameters = inspect.signature(function).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    found = function(**{name: value for name, value in arguments.items() if takes_all or name in parameters})
    if cfg.bonus.answer is not None:
        return [str(answer) for answer in found]
    plain = [completion_text(text) for text in texts]
    return [str(text if answer is None else answer).strip() for answer, text in zip(found, plain, strict=True)]


def _answer_function(cfg: Config) -> Callable[..., Any] | None:
    if cfg.bonus.answer is not None:
        return find_function(cfg.bonus.answer, "bonus.answer")
    loaded = load_rewards(cfg.rewards.model_copy(update={"processes": 0}), cfg.data.name)
    return next((each.solution_class for each in loaded if each.solution_class is not None), None)


def audit_visits(judge: Judge, record: Record, cfg: Config, earlier: Sequence[Record]) -> list[Line]:
    """Counts of each answer; `earlier`: the records of the rollouts before this one."""
    if cfg.bonus_source != "counts" or not record.has("visits"):
        return []
    stride = cfg.grpo.updates_per_rollout
    if [each.step for each in earlier] != list(range(0, record.step, stride)):
        return [judge.skipped("visits", "rollouts before this step have no record (observe.audit_every)")]
    seen = Counter(key for each in (*earlier, record) for key in prompts_with_answers(each, cfg))
    ours = [seen[key] for key in prompts_with_answers(record, cfg)]
    return [judge.equal("visits", record.columns["visits"], ours)]


# ---- random numbers ----------------------------------------------------------------------------------------------


def permutation_keys(record: Record, cfg: Config) -> Array:
    """(B,) the numbers that order the completions of each group."""
    return np.array([streams.completion_uniforms(*place, 1, PERMUTATION)[0] for place in _places(record, cfg)])


def _places(record: Record, cfg: Config) -> list[tuple[int, int, int]]:
    """(seed, position of the prompt, number in the group) of each completion."""
    G, positions = cfg.rollout.group_size, places_of(record, cfg).positions
    return [(cfg.train.seed, -1 if at is None else at, number) for at in positions for number in range(G)]
