"""`vdr eval` and train's held-out evaluation: sample, reward, pass@k with intervals, entropy, length.

Prompts are cut into chunks of a fixed size, which the ranks share and gather. A completion depends on (seed, prompt
row, its index) alone, and its chunk is computed as a whole, so the numbers are the same, to the last bit on machines
of one kind, however many processes there are.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vdr_cli.config.schema import DataConfig, DisagreementConfig, ModelConfig, RewardsConfig, RolloutConfig
from vdr_cli.disagreement.check import check_members
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.engine import collectives
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.launch.joining import join_processes
from vdr_cli.models.policy import completion_logps
from vdr_cli.rewards.base import LoadedReward, check_columns, completion_text
from vdr_cli.rewards.calling import completion_texts, compute_rewards
from vdr_cli.rollout.base import Rollout, RolloutRequest
from vdr_cli.samples import Completions, Prompt, Sampling, Stream, completion_key, to_device
from vdr_cli.stats.bootstrap import interval, resampled_ratios
from vdr_cli.stats.diversity import distinct, rouge_l, self_bleu
from vdr_cli.stats.passk import pass_at_k

logger = logging.getLogger(__name__)

MEMBERS_STEP = 0  # the members of every evaluation are those of a run's first step
EntropySums = Callable[[Completions | None], NDArray[np.float64]]
"""(B,) sums of token entropies in nats; None: this rank has no completions and only takes part."""

CHUNK_COMPLETIONS = 256  # sampled together on one rank: fills a device, and leaves something for the other ranks
ENTROPY_TOKENS = 16_384  # prompt and completion tokens of one forward


@dataclass(frozen=True)
class EvalRequest:
    """A request to `vdr eval`. The prompts are the held-out ones of `data` (eval_name, eval_split)."""

    models: tuple[str, ...]
    data: DataConfig = field(default_factory=DataConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    """dtype, revision and trust_remote_code of every model; `name` is not read."""
    samples: int = 8
    ks: tuple[int, ...] | None = None
    """pass@k for these k; None: 1 and `samples`."""
    greedy: bool = False
    prompts: int | None = None
    """The first this many prompts; None: all."""
    seed: int = 0
    diversity: bool = False
    """Also distinct-1, distinct-2 and self-BLEU of each prompt's completions."""
    reference: str | None = None
    """Column that holds a reference text: also ROUGE-L against it."""
    disagreement: DisagreementConfig | None = None
    """Also the ensemble's mean bald of the completions; None: not measured."""
    device: str = "auto"


@dataclass(frozen=True)
class EvalResult:
    """One model on N prompts with n completions each."""

    model: str
    ks: tuple[int, ...]
    seed: int
    prompts: list[Prompt]
    texts: list[list[str]]  # (N, n)
    task_reward: NDArray[np.float64]  # (N, n), NaN where every function returned None
    rewards: dict[str, NDArray[np.float64]]  # name: (N, n)
    solved: NDArray[np.bool_]  # (N, n)
    length: NDArray[np.int64]  # (N, n) tokens
    truncated: NDArray[np.bool_]  # (N, n)
    entropy_sum: NDArray[np.float64]  # (N, n) nats, summed over tokens
    disagreement: NDArray[np.float64] | None = None  # (N, n) mean bald of the tokens, nats
    per_prompt: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Further measures that were asked for: name to (N,), NaN where a prompt has none."""

    def pass_at(self, k: int) -> NDArray[np.float64]:
        """(N,) unbiased pass@k of each prompt."""
        return pass_at_k(self.solved.shape[1], self.solved.sum(1), k)

    def metrics(self) -> dict[str, float]:
        """The numbers of a table row; intervals are 95 %, by bootstrap over prompts."""
        draws = self.draws()
        numbers: dict[str, float] = {}
        for name, value in self.values().items():
            numbers[name] = value
            numbers[f"{name}_low"], numbers[f"{name}_high"] = interval(draws[name], len(self.prompts))
        return numbers

    def values(self) -> dict[str, float]:
        """Every measure over all prompts."""
        parts = self._parts()
        ratios = {name: np.atleast_1d(_ratio(sums.sum(), counts.sum())) for name, (sums, counts) in parts.items()}
        return {name: float(value[0]) for name, value in self._finished(ratios).items()}

    def draws(self) -> dict[str, NDArray[np.float64]]:
        """Every measure over resampled prompts, (R,); evaluations of as many prompts resample the same ones."""
        parts = self._parts()
        sums = np.stack([sums for sums, _ in parts.values()], axis=1)  # (N, K)
        counts = np.stack([counts for _, counts in parts.values()], axis=1)
        ratios = resampled_ratios(sums, counts, self.seed)  # (R, K)
        return self._finished({name: ratios[:, index] for index, name in enumerate(parts)})

    def _parts(self) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Each measure as (N,) sums and (N,) counts of what is summed: its value is the ratio of their totals."""
        centred = self.task_reward - self._mean_reward
        parts = {f"pass@{k}": _summed(self.pass_at(k)[:, None]) for k in self.ks}
        parts |= {"reward": _summed(self.task_reward), "reward_std": _summed(centred**2)}
        parts |= {f"rewards/{name}/mean": _summed(values) for name, values in self.rewards.items()}
        parts["mean_length"] = _summed(self.length)
        parts["truncated_share"] = _summed(self.truncated)
        parts["entropy"] = self.entropy_sum.sum(1), self.length.sum(1).astype(np.float64)  # a token
        parts["distinct_solved"] = _summed(np.array([[len(found)] for found in self.solutions()]))
        if self.disagreement is not None:
            parts["disagreement"] = _summed(self.disagreement)
        return parts | {name: _summed(values[:, None]) for name, values in self.per_prompt.items()}

    def _finished(self, ratios: dict[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
        """The mean square deviation from one number gives way to the standard deviation."""
        variance = ratios["reward_std"] - (ratios["reward"] - self._mean_reward) ** 2
        return ratios | {"reward_std": np.sqrt(np.maximum(variance, 0.0))}

    @property
    def _mean_reward(self) -> float:
        return float(_ratio(np.nansum(self.task_reward), np.isfinite(self.task_reward).sum()))

    def solutions(self) -> list[set[str]]:
        """The different solved completions of each prompt."""
        return [
            {text for text, solved in zip(texts, row, strict=True) if solved}
            for texts, row in zip(self.texts, self.solved, strict=True)
        ]

    def samples(self) -> dict[str, list[Any]]:
        """A row per completion, as columns."""
        n = self.solved.shape[1]
        columns: dict[str, list[Any]] = {
            "model": [self.model] * self.solved.size,
            "row": [prompt.row for prompt in self.prompts for _ in range(n)],
            "prompt": [prompt.value for prompt in self.prompts for _ in range(n)],
            "completion": [text for texts in self.texts for text in texts],
            "reward": self.task_reward.ravel().tolist(),
            "solved": self.solved.ravel().tolist(),
            "length": self.length.ravel().tolist(),
            "truncated": self.truncated.ravel().tolist(),
            "entropy": (self.entropy_sum / np.maximum(self.length, 1)).ravel().tolist(),
        }
        columns |= {f"rewards/{name}": values.ravel().tolist() for name, values in self.rewards.items()}
        if self.disagreement is not None:
            columns["disagreement"] = self.disagreement.ravel().tolist()
        return columns

    def record(self) -> dict[str, Any]:
        """This model's entry in the `--json` file."""
        return {"model": self.model, "prompts": len(self.prompts), "samples": self.solved.shape[1], **self.metrics()}


def run_eval(request: EvalRequest) -> list[EvalResult]:
    """Evaluate every model of the request on the same prompts with the same random numbers."""
    from vdr_cli.data.prompts import Limits, load_prompts
    from vdr_cli.models import loading
    from vdr_cli.models.independence import check_independence
    from vdr_cli.models.paths import resolve_model_path
    from vdr_cli.rewards.loading import load_rewards
    from vdr_cli.rollout.transformers_backend import TransformersRollout

    samples, ks, sampling = _sampling(request)
    device = join_processes(request.device)
    for name in request.models:
        resolve_model_path(name)
    ensemble = _members(request)
    rewards = load_rewards(request.rewards, request.data.name)
    results = []
    for name in request.models:
        named = name, request.model.revision, request.model.trust_remote_code
        tokenizer = loading.load_tokenizer(*named)
        limits = Limits.of(loading.load_model_config(*named), sampling.max_new_tokens)
        prompt_set = load_prompts(request.data, "eval", tokenizer, limits)
        check_columns(rewards, prompt_set.columns)
        if request.reference is not None and request.reference not in prompt_set.columns:
            raise ConfigError(
                f"--reference {request.reference}: the data have {', '.join(prompt_set.columns) or 'none'}"
            )
        count = min(len(prompt_set), request.prompts or len(prompt_set))
        model = loading.load_causal_lm(name, loading.resolve_dtype(request.model.dtype), *named[1:], device)
        check_independence(model)
        if ensemble is not None:
            check_members(model, ensemble)
        eos_ids = loading.eos_token_ids(model, tokenizer)
        rollout = TransformersRollout(
            tokenizer.pad_token_id, eos_ids, tokenizer, request.rollout.batch_tokens, request.rollout.cuda_graphs
        )
        result = evaluate_model(
            model,
            tokenizer,
            rollout,
            [prompt_set[index] for index in range(count)],
            rewards,
            samples,
            ks,
            request.seed,
            sampling,
            solved_at=request.rewards.solved_at,
            timeout=request.rewards.timeout,
            name=name,
            ensemble=ensemble,
        )
        results.append(replace(result, per_prompt=_text_measures(result, request)))
    return results


def _members(request: EvalRequest) -> EnsembleSpec | None:
    asked = request.disagreement
    return None if asked is None else EnsembleSpec(**asked.member_settings, seed=request.seed)


def evaluate_model(
    model: nn.Module,
    tokenizer: Any,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    rewards: Sequence[LoadedReward],
    n: int,
    ks: Sequence[int],
    seed: int,
    sampling: Sampling,
    solved_at: float = 1.0,
    timeout: float = 300.0,
    name: str = "",
    ensemble: EnsembleSpec | None = None,
    entropy_sums: EntropySums | None = None,
) -> EvalResult:
    """Measure n completions of every prompt. A collective over all processes, with the same result on each.

    entropy_sums: reads entropies where that is a collective itself, as often on every rank; None: the model, here.
    Raises DataError without prompts, or when a reward function fails.
    """
    if not prompts:
        raise DataError("there are no prompts to evaluate on: give a split with at least one row")
    step = max(CHUNK_COMPLETIONS // n, 1)
    chunks = [range(start, min(start + step, len(prompts))) for start in range(0, len(prompts), step)]
    mine = chunks[collectives.rank() :: collectives.world_size()]
    shares: list[dict[str, Any]] = []
    sampled: list[Completions] = []
    with collectives.agreed():
        rollout.refresh(model, [prompt.token_ids for prompt in prompts], sampling)
        for places in mine:
            chunk = [prompts[index] for index in places]
            completions, share = _sample_chunk(
                model, tokenizer, rollout, chunk, rewards, n, seed, sampling, timeout, ensemble
            )
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
    return _result(gathered, prompts, rewards, tuple(ks), seed, solved_at, name)


def paired_differences(results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Every later model minus every earlier one, with 95 % intervals over prompts: both on the same resampled ones."""
    values, draws = [result.values() for result in results], [result.draws() for result in results]
    rows = []
    for first, second in itertools.combinations(range(len(results)), 2):
        row: dict[str, Any] = {"model": results[second].model, "minus": results[first].model}
        for name in (name for name in values[first] if name in values[second]):
            row[name] = values[second][name] - values[first][name]
            row[f"{name}_low"], row[f"{name}_high"] = interval(
                draws[second][name] - draws[first][name], len(results[first].prompts)
            )
        rows.append(row)
    return rows


def _sampling(request: EvalRequest) -> tuple[int, tuple[int, ...], Sampling]:
    """Completions a prompt, the list of k, and how to sample; ConfigError for what cannot be."""
    setting = request.rollout
    samples = 1 if request.greedy else request.samples
    if request.greedy:
        ks: tuple[int, ...] = (1,)
    else:
        ks = tuple(sorted(set(request.ks or (1, samples))))
        if samples < 1:
            raise ConfigError(f"--samples {samples}: draw at least one completion a prompt")
        if ks[0] < 1 or ks[-1] > samples:
            raise ConfigError(f"--k {','.join(map(str, ks))}: each k lies between 1 and --samples {samples}")
    if request.prompts is not None and request.prompts < 1:
        raise ConfigError(f"--prompts {request.prompts}: evaluate on at least one prompt")
    return (
        samples,
        ks,
        Sampling(
            max_new_tokens=setting.max_new_tokens,
            temperature=0.0 if request.greedy else setting.temperature,
            top_k=setting.top_k,
            top_p=setting.top_p,
            min_p=setting.min_p,
            repetition_penalty=setting.repetition_penalty,
            stop=tuple(setting.stop),
        ),
    )


def _sample_chunk(
    model: nn.Module,
    tokenizer: Any,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    rewards: Sequence[LoadedReward],
    n: int,
    seed: int,
    sampling: Sampling,
    timeout: float,
    ensemble: EnsembleSpec | None,
) -> tuple[Completions, dict[str, Any]]:
    """Completions of some prompts, and what they are worth as arrays (prompts, n, ...)."""
    keys = [completion_key(seed, Stream.EVALUATION, prompt.row) for prompt in prompts]
    completions = rollout.generate(model, RolloutRequest([prompt.token_ids for prompt in prompts], n, sampling, keys))
    repeated = [prompt for prompt in prompts for _ in range(n)]
    texts = completion_texts(tokenizer, repeated, completions)
    lengths = completions.completion_mask.sum(1)
    ids = [row[:count].tolist() for row, count in zip(completions.completion_ids, lengths.tolist(), strict=True)]
    scores = compute_rewards(list(rewards), repeated, texts, ids, timeout)  # (B, F)
    shape = (len(prompts), n)
    measured = {} if ensemble is None else {"disagreement": _mean_bald(model, completions, n, ensemble).reshape(shape)}
    return completions, measured | {
        "texts": [completion_text(text) for text in texts],
        "scores": scores.double().cpu().numpy().reshape(*shape, -1),
        "length": lengths.cpu().numpy().reshape(shape),
        "truncated": completions.truncated.cpu().numpy().reshape(shape),
    }


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
            model, part.prompt_ids, part.prompt_mask, part.completion_ids, part.completion_mask, temperature
        )  # (B, T)
        sums[rows.numpy()] = (entropy.double() * part.completion_mask).sum(1).cpu().numpy()
    return sums


def _mean_bald(model: nn.Module, completions: Completions, n: int, ensemble: EnsembleSpec) -> NDArray[np.float64]:
    """(B,) mean bald of each completion's tokens."""
    on_device = to_device(completions, next(model.parameters()).device)
    measured = EnsembleReader(ensemble).measure(model, MeasureRequest(on_device, n, MEMBERS_STEP))
    bald = measured.get("bald").double()  # (B, T)
    mask = on_device.completion_mask
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
        references = [str(prompt.columns[request.reference]) for prompt in result.prompts]
        pairs = zip(result.texts, references, strict=True)
        measures["rouge_l"] = np.array([float(np.mean(rouge_l(texts, reference))) for texts, reference in pairs])
    return measures


def _joined(shares: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if not shares:
        return None
    arrays = {key: np.concatenate([share[key] for share in shares]) for key in shares[0] if key != "texts"}
    return {**arrays, "texts": [text for share in shares for text in share["texts"]]}


def _result(
    gathered: Sequence[tuple[list[int], dict[str, Any] | None]],
    prompts: Sequence[Prompt],
    rewards: Sequence[LoadedReward],
    ks: tuple[int, ...],
    seed: int,
    solved_at: float,
    name: str,
) -> EvalResult:
    """The shares of all ranks, back in the order of the prompts."""
    filled = [(rows, share) for rows, share in gathered if share is not None]
    order = np.argsort(np.concatenate([rows for rows, _ in filled]))
    whole = {key: np.concatenate([share[key] for _, share in filled])[order] for key in filled[0][1] if key != "texts"}
    n = whole["length"].shape[1]
    flat = [text for _, share in filled for text in share["texts"]]
    texts = [flat[row * n : row * n + n] for row in order]
    scores = whole["scores"]  # (N, n, F)
    for reward, values in zip(rewards, np.moveaxis(scores, -1, 0), strict=True):
        if np.isnan(values).all():
            logger.warning("reward %s returned None for every completion: it measures nothing", reward.name)
    weights = np.array([reward.weight for reward in rewards])
    task_reward = np.where(np.isnan(scores).all(2), np.nan, np.nansum(scores * weights, axis=2))
    return EvalResult(
        model=name,
        ks=ks,
        seed=seed,
        prompts=list(prompts),
        texts=texts,
        task_reward=task_reward,
        rewards={reward.name: scores[..., index] for index, reward in enumerate(rewards)},
        solved=task_reward >= solved_at,
        length=whole["length"],
        truncated=whole["truncated"],
        entropy_sum=whole["entropy_sum"],
        disagreement=whole.get("disagreement"),
    )


def _summed(values: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N,) sums and (N,) counts of the numbers among (N, n) values."""
    return np.nansum(values.astype(np.float64), axis=1), (~np.isnan(values.astype(np.float64))).sum(1).astype(float)


def _ratio(total: Any, count: Any) -> Any:
    return np.divide(total, count) if count else np.nan
