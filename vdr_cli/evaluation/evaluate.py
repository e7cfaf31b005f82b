"""`vdr eval` and train's held-out evaluation: sample, reward, pass@k with intervals, entropy, length.

Prompts are cut into chunks of a fixed size, which the ranks share and gather. A completion depends on (seed, prompt
row, its index) alone, and its chunk is computed as a whole, so the numbers are the same, to the last bit on machines
of one kind, however many processes there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vdr_cli.disagreement.check import check_members
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.engine import collectives
from vdr_cli.environments.contract import Contract, load_contract
from vdr_cli.environments.episodes import Counts, Environments, OneTurn
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.evaluation.request import EvalRequest, sampling_plan
from vdr_cli.evaluation.result import TURN_MEASURES, EvalResult
from vdr_cli.launch.joining import join_processes
from vdr_cli.models.policy import completion_logps
from vdr_cli.rewards.base import LoadedReward, check_columns, completion_text, is_solved
from vdr_cli.rewards.calling import compute_rewards
from vdr_cli.rewards.classes import classifier, known_classes, solution_classes
from vdr_cli.rollout.base import Rollout, RolloutRequest
from vdr_cli.samples import Completions, Prompt, Sampling, Stream, completion_key, to_device
from vdr_cli.stats.diversity import distinct, rouge_l, self_bleu

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from vdr_cli.data.prompts import Limits, PromptSet

MEMBERS_STEP = 0  # the members of every evaluation are those of a run's first step
EntropySums = Callable[[Completions | None], NDArray[np.float64]]
"""(B,) sums of token entropies in nats; None: this rank has no completions and only takes part."""

LISTS = ("texts", "classes", "completion_ids")
"""Parts of a chunk's share that hold one entry per completion, in a flat list."""

CHUNK_COMPLETIONS = 256  # sampled together on one rank: fills a device, and leaves something for the other ranks
ENTROPY_TOKENS = 16_384  # prompt and completion tokens of one forward


@dataclass(frozen=True)
class Evaluation:
    """The settings that all compared models share. Prompts are not among them: each model tokenizes its own."""

    rewards: Sequence[LoadedReward]
    samples: int
    """Completions of each prompt, n."""
    ks: Sequence[int]
    seed: int
    sampling: Sampling
    solved_at: float
    timeout: float
    """Seconds for each call of a reward function."""
    ensemble: EnsembleSpec | None = None
    """Measures the disagreement about every completion; None: it is not measured."""


def run_eval(request: EvalRequest) -> list[EvalResult]:
    """Evaluate every model of the request on the same prompts with the same random numbers."""
    from vdr_cli.models.paths import resolve_model_path
    from vdr_cli.rewards.loading import load_rewards

    samples, ks, sampling = sampling_plan(request)
    device = join_processes(request.device)
    for name in request.models:
        resolve_model_path(name)
    contract = load_contract(request.rollout.environment, request.rollout.tools)
    rewards = load_rewards(request.rewards, request.data.name, contract.reward if contract else None)
    evaluation = Evaluation(
        rewards,
        samples,
        ks,
        request.seed,
        sampling,
        request.rewards.solved_at,
        request.rewards.timeout,
        _members(request),
    )
    return [_evaluate_named(name, request, evaluation, contract, device) for name in request.models]


def _evaluate_named(
    name: str, request: EvalRequest, evaluation: Evaluation, contract: Contract | None, device: torch.device
) -> EvalResult:
    """Load one model and evaluate it. Its environments are closed whatever happens."""
    from vdr_cli.data.prompts import Limits
    from vdr_cli.models import loading
    from vdr_cli.models.anatomy import check_head
    from vdr_cli.models.independence import check_independence
    from vdr_cli.rollout.check import check_sampling
    from vdr_cli.rollout.transformers_backend import TransformersRollout

    named = name, request.model.revision, request.model.trust_remote_code
    tokenizer = loading.load_tokenizer(*named)
    limits = Limits.of(
        loading.load_model_config(*named), evaluation.sampling.max_new_tokens, request.rollout.length_setting
    )
    prompts = _prompts_of(tokenizer, limits, request, evaluation, contract)
    model = loading.load_causal_lm(name, loading.resolve_dtype(request.model.dtype), *named[1:], device)
    check_head(model)
    check_independence(model)
    check_sampling(model, request.rollout.cuda_graphs)
    if evaluation.ensemble is not None:
        check_members(model, evaluation.ensemble)
    eos_ids = loading.eos_token_ids(model, tokenizer)
    cfg = request.rollout
    rollout = TransformersRollout(tokenizer.pad_token_id, eos_ids, tokenizer, cfg.batch_tokens, cfg.cuda_graphs)
    with ExitStack() as stack:
        environments = None
        if contract is not None:
            environments = Environments(contract, tokenizer, cfg, prompts.has_messages, limits)
            stack.callback(environments.close)
            environments.end_with(eos_ids)
        result = evaluate_model(
            model,
            tokenizer,
            rollout,
            [prompts[index] for index in range(min(len(prompts), request.prompts or len(prompts)))],
            evaluation,
            name=name,
            entropy_sums=None if request.entropy else _no_entropy_sums,
            environments=environments,
        )
    return replace(result, per_prompt=_text_measures(result, request))


def _prompts_of(
    tokenizer: Any, limits: Limits, request: EvalRequest, evaluation: Evaluation, contract: Contract | None
) -> PromptSet:
    """The held-out prompts as this model reads them. ConfigError for columns or templates that something lacks."""
    from vdr_cli.data.prompts import load_prompts
    from vdr_cli.rewards.model import check_templates

    prompts = load_prompts(request.data, "eval", tokenizer, limits, contract.schemas if contract else [])
    check_columns(evaluation.rewards, prompts.columns)
    check_templates(evaluation.rewards, prompts.has_messages)
    if request.reference is not None and request.reference not in prompts.columns:
        raise ConfigError(f"--reference {request.reference}: the data have {', '.join(prompts.columns) or 'none'}")
    return prompts


def _no_entropy_sums(completions: Completions | None) -> NDArray[np.float64]:
    """(B,) NaN in the place of each completion's entropy."""
    return np.full(0 if completions is None else len(completions), np.nan)


def _members(request: EvalRequest) -> EnsembleSpec | None:
    asked = request.disagreement
    return None if asked is None else EnsembleSpec(**asked.member_settings, seed=request.seed)


def evaluate_model(
    model: nn.Module,
    tokenizer: Any,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    evaluation: Evaluation,
    name: str = "",
    entropy_sums: EntropySums | None = None,
    environments: Environments | None = None,
) -> EvalResult:
    """Measure completions of every prompt. A collective over all processes, with the same result on each.

    entropy_sums: reads entropies where that is a collective itself, as often on every rank; None: the model, here.
    environments: the other side of completions that take several turns.
    Raises DataError without prompts, or when a reward function fails.
    """
    if not prompts:
        raise DataError("there are no prompts to evaluate on: give a split with at least one row")
    n, sampling = evaluation.samples, evaluation.sampling
    step = max(CHUNK_COMPLETIONS // n, 1)
    chunks = [range(start, min(start + step, len(prompts))) for start in range(0, len(prompts), step)]
    mine = chunks[collectives.rank() :: collectives.world_size()]
    shares: list[dict[str, Any]] = []
    sampled: list[Completions] = []
    with collectives.agreed():
        rollout.refresh(model, [prompt.token_ids for prompt in prompts], sampling)
        for places in mine:
            chunk = [prompts[index] for index in places]
            completions, share = _sample_chunk(model, tokenizer, rollout, chunk, evaluation, environments)
            sampled.append(completions)
            shares.append(share)
    read = entropy_sums or partial(_entropy_sums, model, temperature=sampling.temperature or 1.0)
    for completions, share in zip(sampled, shares, strict=True):
        share["entropy_sum"] = read(completions).reshape(-1, n)
    if entropy_sums is not None:
        for _ in range(-(-len(chunks) // collectives.world_size()) - len(mine)):
            entropy_sums(None)  # ranks with more chunks read another one
    rows = [index for chunk in mine for index in chunk]
    gathered = collectives.gather_objects((rows, _joined(shares)))
    return _result(gathered, prompts, evaluation, name)


def _sample_chunk(
    model: nn.Module,
    tokenizer: Any,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    evaluation: Evaluation,
    environments: Environments | None,
) -> tuple[Completions, dict[str, Any]]:
    """Completions of some prompts, and what they are worth as arrays (prompts, n, ...)."""
    n, rewards, timeout, ensemble = evaluation.samples, evaluation.rewards, evaluation.timeout, evaluation.ensemble
    keys = [completion_key(evaluation.seed, Stream.EVALUATION, prompt.row) for prompt in prompts]
    episodes = OneTurn(tokenizer, list(prompts), n) if environments is None else environments.begin(prompts, n)
    prompts = episodes.prompts
    ids_of_prompts = [prompt.token_ids for prompt in prompts]
    request = RolloutRequest(ids_of_prompts, n, evaluation.sampling, keys, conversation=episodes.conversation)
    completions = rollout.generate(model, request)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    texts = episodes.texts(range(len(repeated)), completions)
    ids = completions.completion_token_ids()
    given = repeated, texts, ids, timeout
    scores = compute_rewards(list(rewards), *given, environments=episodes.environments)  # (B, F)
    episodes.close()
    shape = (len(prompts), n)
    measured = {} if ensemble is None else {"disagreement": _mean_bald(model, completions, n, ensemble).reshape(shape)}
    if (known := known_classes(rewards, prompts, timeout)) is not None:
        measured["known_classes"] = known
    if environments is not None:
        names = TURN_MEASURES if environments.contract.tools else ("turns",)
        measured |= _of_turns(episodes.counts or [], names, shape)
    return completions, measured | {
        "texts": [_as_text(text) for text in texts],
        "classes": solution_classes(rewards, repeated, texts, ids, timeout),
        "completion_ids": ids,
        "scores": scores.double().cpu().numpy().reshape(*shape, -1),
        "length": completions.policy_mask.sum(1).cpu().numpy().reshape(shape),
        "truncated": completions.truncated.cpu().numpy().reshape(shape),
    }


def _as_text(completion: Any) -> str:
    """A completion as one text; the turns of an episode with their roles."""
    if isinstance(completion, str) or len(completion) == 1:
        return completion_text(completion)
    return "\n".join(f"[{message['role']}] {message['content']}" for message in completion)


def _of_turns(counts: list[Counts], names: Iterable[str], shape: tuple[int, int]) -> dict[str, Any]:
    """These numbers of each episode, (prompts, n) by name."""
    found = {name: [getattr(each, name) for each in counts] for name in names}
    return {name: np.array(values, dtype=np.float64).reshape(shape) for name, values in found.items()}


@torch.no_grad()
def _entropy_sums(model: nn.Module, completions: Completions, temperature: float = 1.0) -> NDArray[np.float64]:
    """(B,) sum of the token entropies at this temperature, in batches of similar length."""
    device = next(model.parameters()).device
    lengths = completions.completion_mask.sum(1)
    sums = np.zeros(len(completions))
    order = torch.argsort(lengths, stable=True)
    width = completions.prompt_ids.shape[1] + completions.completion_ids.shape[1]
    for rows in order.split(max(ENTROPY_TOKENS // width, 1)):
        part = to_device(completions.rows(rows).trimmed(), device)
        _, entropy = completion_logps(
            model,
            part.prompt_ids,
            part.prompt_mask,
            part.completion_ids,
            part.completion_mask,
            temperature,
            policy_mask=part.policy_mask,
        )  # (B, T)
        sums[rows.numpy()] = (entropy.double() * part.policy_mask).sum(1).cpu().numpy()
    return sums


def _mean_bald(model: nn.Module, completions: Completions, n: int, ensemble: EnsembleSpec) -> NDArray[np.float64]:
    """(B,) mean bald of each completion's tokens."""
    on_device = to_device(completions, next(model.parameters()).device)
    measured = EnsembleReader(ensemble).measure(model, MeasureRequest(on_device, n, MEMBERS_STEP))
    bald = measured.get("bald").double()  # (B, T)
    mask = on_device.policy_mask
    means: NDArray[np.float64] = ((bald * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy()
    return means


def _text_measures(result: EvalResult, request: EvalRequest) -> dict[str, NDArray[np.float64]]:
    """(N,) each: diversity of a prompt's completions, closeness to its reference."""
    measures: dict[str, NDArray[np.float64]] = {}
    if request.diversity:
        for n in (1, 2):
            measures[f"distinct-{n}"] = np.array([distinct(texts, n) for texts in result.texts])
        measures["self_bleu"] = np.array([self_bleu(texts) for texts in result.texts])
    if request.reference is not None:
        references = [prompt.columns[request.reference] for prompt in result.prompts]
        pairs = zip(result.texts, references, strict=True)
        measures["rouge_l"] = np.array(
            [np.nan if text is None else float(np.mean(rouge_l(texts, str(text)))) for texts, text in pairs]
        )
    return measures


def _joined(shares: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not shares:
        return None
    arrays = {key: np.concatenate([share[key] for share in shares]) for key in shares[0] if key not in LISTS}
    return arrays | {key: [entry for share in shares for entry in share[key]] for key in LISTS}


def _result(
    gathered: Sequence[tuple[list[int], dict[str, Any] | None]],
    prompts: Sequence[Prompt],
    evaluation: Evaluation,
    name: str,
) -> EvalResult:
    """The shares of all ranks, back in the order of the prompts."""
    filled = [(rows, share) for rows, share in gathered if share is not None]
    order = np.argsort(np.concatenate([rows for rows, _ in filled]))
    arrays = [key for key in filled[0][1] if key not in LISTS]
    whole = {key: np.concatenate([share[key] for _, share in filled])[order] for key in arrays}
    n = whole["length"].shape[1]
    flat = {key: [entry for _, share in filled for entry in share[key]] for key in LISTS}
    texts, classes, ids = ([flat[key][row * n : row * n + n] for row in order] for key in LISTS)
    rewards, by = evaluation.rewards, classifier(evaluation.rewards)
    scores = whole["scores"]  # (N, n, F)
    for reward, values in zip(rewards, np.moveaxis(scores, -1, 0), strict=True):
        if np.isnan(values).all():
            logger.warning("reward %s returned None for every completion: it measures nothing", reward.name)
    weights = np.array([reward.weight for reward in rewards])
    task_reward = np.where(np.isnan(scores).all(2), np.nan, np.nansum(scores * weights, axis=2))
    return EvalResult(
        model=name,
        ks=tuple(evaluation.ks),
        seed=evaluation.seed,
        prompts=list(prompts),
        texts=texts,
        classes=classes,
        completion_ids=ids,
        distinct_by="text" if by is None else f"solution class of {by.name}",
        known_classes=whole.get("known_classes"),
        task_reward=task_reward,
        rewards={reward.name: scores[..., index] for index, reward in enumerate(rewards)},
        solved=is_solved(task_reward, evaluation.solved_at),
        length=whole["length"],
        truncated=whole["truncated"],
        entropy_sum=whole["entropy_sum"],
        disagreement=whole.get("disagreement"),
        turns={name: whole[name] for name in TURN_MEASURES if name in whole},
    )
