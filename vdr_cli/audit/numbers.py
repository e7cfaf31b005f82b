"""Numbers of a step that need a model: the draw of tokens, the members' measures, log-probabilities, the update."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdr_cli.audit import losses, members, model, optimizer, sampling, streams, update
from vdr_cli.audit.files import Record
from vdr_cli.audit.inputs import places_of
from vdr_cli.audit.lines import BOUNDS, Judge, Line
from vdr_cli.audit.weights import Models, copied
from vdr_cli.config import Config, ModelConfig

Array = NDArray[np.float64]
Flags = NDArray[np.bool_]


def no_weights(step: int) -> str:
    return f"no checkpoint after step {step}: train.checkpoint_every, keep_last"


# ---- sampling ----------------------------------------------------------------------------------------------------


def audit_sampling(judge: Judge, record: Record, cfg: Config, models: Models) -> list[Line]:
    """The sampler's log-probabilities, and each token from the completion's own uniforms."""
    if cfg.rollout.backend != "transformers":
        return [judge.skipped("tokens drawn", "vLLM's random numbers are its own")]
    stride = cfg.grpo.updates_per_rollout
    step = max(record.step - stride, 0) if cfg.rollout.ahead else record.step
    policy = models.at(step)
    if policy is None:
        return [judge.skipped("tokens drawn", no_weights(step))]
    try:
        logps, distance = drawn(record, cfg, policy, places_of(record, cfg).positions)
    except members.CannotReadError as why:
        return [judge.skipped("tokens drawn", str(why))]
    on_file = np.where(record.policy, record.tokens("sampler_logps"), 0.0)
    return [
        judge.compare("sampler log-probabilities", on_file, logps, "logp"),
        judge.compare("tokens drawn: distance from u", np.zeros_like(distance), distance, "draw"),
    ]


@torch.no_grad()
def drawn(
    record: Record, cfg: Config, policy: torch.nn.Module, positions: Sequence[int | None], stream: int = 1
) -> tuple[Array, Array]:
    """(B, T) log-probabilities of the filtered distribution, and distances of the uniforms from their tokens.

    positions: each prompt's in its stream of random numbers; None: not found, so that no uniform fits.
    """
    G = len(record) // len(positions)
    prompts, completions = record.columns["prompt_ids"], record.columns["completion_ids"]
    logps, distance = np.zeros(record.mask.shape), np.zeros(record.mask.shape)
    acting = cfg.rollout.members and stream == 1  # evaluations sample from the policy
    for rows, logits in _sampled_logits(record, cfg, policy, positions, acting):
        for row, each in zip(rows, logits, strict=True):
            position, ids = positions[row // G], completions[row]
            place = -1 if position is None else position
            uniforms = streams.completion_uniforms(cfg.train.seed, place, row % G, len(ids), stream)
            for t, token in enumerate(ids):
                if not record.policy[row, t]:
                    continue
                scores = sampling.filtered(each[t], [*prompts[row], *ids[:t]], cfg.rollout)
                found = sampling.draw(scores, token, float(uniforms[t]))
                logps[row, t], distance[row, t] = found.logp, found.distance
    return logps, distance


def _sampled_logits(
    record: Record, cfg: Config, policy: torch.nn.Module, positions: Sequence[int | None], acting: bool
) -> Iterator[tuple[list[int], Array]]:
    """Rows of one shape with the logits (n, T, V) that they were sampled from: the policy's, or their member's."""
    prompts, completions = record.columns["prompt_ids"], record.columns["completion_ids"]
    if not acting:
        for rows in model.alike(prompts, completions):
            yield rows, model.logits_of(policy, prompts, completions, rows).numpy()
        return
    seed, G = cfg.train.seed, cfg.rollout.group_size
    for member in range(cfg.disagreement.members):
        own = [
            row
            for row in range(len(record))
            if (place := positions[row // G]) is not None
            and streams.acting_member(seed, place, cfg.disagreement.members) == member
        ]
        with members.one_member(policy, cfg, members.masks_of(cfg, record.step, member, [], [])):
            for rows in model.alike(prompts, completions, own):
                yield rows, model.logits_of(policy, prompts, completions, rows).numpy()


# ---- members -----------------------------------------------------------------------------------------------------


def audit_members(judge: Judge, record: Record, cfg: Config, models: Models) -> list[Line]:
    """The members' measure, of every token and of completions at their end."""
    d = cfg.disagreement
    if cfg.bonus_source != "disagreement":
        return []
    policy = models.at(record.step)
    if policy is None:
        return [judge.skipped(d.measure, no_weights(record.step))]
    try:
        found = members.measures(policy, cfg, record.step, *_ids(record))[d.measure]
    except members.CannotReadError as why:
        return [judge.skipped(d.measure, str(why))]
    lines = []
    if d.mode == "end_of_sequence":
        last = [np.flatnonzero(row)[-1] if row.any() else 0 for row in record.policy]
        at_end = found[np.arange(len(record)), last]
        lines.append(judge.compare(f"{d.measure} at the end", record.numbers("reduced"), at_end, "measure"))
    shown = [row for row, values in enumerate(record.columns["measure_tokens"]) if values is not None]
    if shown:
        kept = _counted(record, cfg) if d.mode == "per_token" else record.policy
        theirs = np.zeros(record.mask.shape)
        for row in shown:
            values = record.columns["measure_tokens"][row]
            theirs[row, : len(values)] = values
        compared = [values[shown] * kept[shown] for values in (theirs, found)]
        lines.append(judge.compare(f"{d.measure} of tokens", compared[0], compared[1], "measure"))
    return lines


def _counted(record: Record, cfg: Config) -> Flags:
    from vdr_cli.audit.bonus import counted

    return counted(record.policy, cfg.disagreement.last_n)


def _ids(record: Record) -> tuple[list[list[int]], list[list[int]]]:
    return record.columns["prompt_ids"], record.columns["completion_ids"]


# ---- policy and reference ----------------------------------------------------------------------------------------


def trained_tokens(record: Record, cfg: Config) -> Flags:
    """(B, T) tokens that give gradient."""
    return record.policy & ~record.truncated[:, None] if cfg.grpo.mask_truncated else record.policy


def audit_policy(judge: Judge, record: Record, cfg: Config, models: Models) -> list[Line]:
    """Log-probabilities of policy and reference at the sampling temperature; the tokens of highest entropy."""
    policy = models.at(record.step)
    lines = []
    if policy is None:
        lines.append(judge.skipped("log-probabilities", no_weights(record.step)))
    else:
        logps, entropy = model.token_numbers(policy, *_ids(record), cfg.rollout.temperature)
        logps, entropy = logps * record.policy, entropy * record.policy
        lines.append(judge.compare("log-probabilities", record.tokens("logps"), logps, "logp"))
        lines.append(judge.compare("entropies", record.tokens("entropies"), entropy, "logp"))
        if cfg.grpo.top_entropy_quantile < 1.0:
            lines.append(_selection(judge, record, cfg, entropy))
    if cfg.grpo.beta:
        with models.reference(record.step) as reference:
            if reference is None:
                lines.append(judge.skipped("reference log-probabilities", no_weights(record.step)))
            else:
                theirs, _ = model.token_numbers(reference, *_ids(record), cfg.rollout.temperature)
                theirs = theirs * record.policy
                on_file = record.tokens("ref_logps")
                lines.append(judge.compare("reference log-probabilities", on_file, theirs, "logp"))
    return lines


def _selection(judge: Judge, record: Record, cfg: Config, entropy: Array) -> Line:
    """Selected tokens; those within rounding of the threshold may be either."""
    trained = trained_tokens(record, cfg)
    threshold = losses.selection_threshold(entropy[trained].tolist(), cfg.grpo.top_entropy_quantile)
    near = np.abs(entropy - threshold) < 1e-4
    compared = trained & ~near
    on_file = record.tokens("selected")[compared]
    return judge.compare("tokens of highest entropy", on_file, (entropy >= threshold)[compared], "exact")


# ---- update ------------------------------------------------------------------------------------------------------


def audit_update(
    judge: Judge, record: Record, cfg: Config, models: Models, metrics: dict[str, float]
) -> tuple[list[Line], dict[str, float]]:
    """The optimizer steps made again: (lines, the means and maxima that metrics.jsonl has of them)."""
    if cfg.train.optimizer != "adamw":
        return [judge.skipped("loss, gradient, update", "only AdamW's updates are recomputed, not Muon's")], {}
    saved = models.saved(record.step)
    if saved is None:
        return [judge.skipped("loss, gradient, update", no_weights(record.step))], {}
    if cfg.grpo.router_aux_loss_coef:
        return [judge.skipped("loss, gradient, update", "the load-balancing loss depends on the micro-batches")], {}
    if metrics.get("refused_steps", 0.0):
        return [judge.skipped("loss, gradient, update", "the step was refused: its gradient was not finite")], {}
    if cfg.grpo.updates_per_rollout > 1 and record.step > 0 and not saved.first:
        return [judge.skipped("loss, gradient, update", "the optimizer's moments are not on file")], {}
    weights = copied(saved.weights)
    moments = copied(saved.first), copied(saved.second)
    adam = optimizer.AdamW(cfg.train.adam_betas, cfg.train.adam_epsilon, cfg.train.weight_decay, saved.count, *moments)
    outcome = update.make(models.policy, weights, adam, _given(record, cfg), cfg, record.step, models.dtype)
    lines = [
        judge.compare("loss", metrics.get("loss", math.nan), outcome.loss / cfg.grpo.updates_per_rollout, "loss"),
        judge.compare("grad_norm", metrics.get("grad_norm", math.nan), outcome.norm, "norm"),
    ]
    after = models.saved(record.step + cfg.grpo.updates_per_rollout)
    if after is None:
        lines.append(judge.skipped("update of the weights", no_weights(record.step + cfg.grpo.updates_per_rollout)))
    else:
        lines.append(_relative(judge, "mean of the gradient (Adam)", after.first, adam.first))
        lines.append(_relative(judge, "mean of its square (Adam)", after.second, adam.second))
        theirs, ours = (_minus(each, saved.weights) for each in (after.weights, weights))
        rounding = cfg.grpo.updates_per_rollout * optimizer.spacing_of(after.weights.values())
        lines.append(_relative(judge, "update of the weights", theirs, ours, rounding=rounding))
    return lines, outcome.means() | outcome.minima | outcome.maxima | outcome.mean_denominators() | {
        "refused_steps": 0.0
    }


def _given(record: Record, cfg: Config) -> update.Given:
    """The update's inputs, from the record."""
    return update.Given(
        *_ids(record),
        record.tokens("advantages"),
        trained_tokens(record, cfg),
        record.tokens("sampler_logps"),
        record.tokens("logps"),
        losses.entropy_coefficient(record.state, cfg.grpo),
        record.tokens("ref_logps") if cfg.grpo.beta else None,
        record.tokens("selected") > 0 if cfg.grpo.top_entropy_quantile < 1.0 else None,
    )


def _minus(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: a[name].detach().double() - b[name].detach().double() for name in b}


def audit_export(judge: Judge, cfg: Config, models: Models) -> list[Line]:
    """model/ against the last checkpoint, adapters merged."""
    folder = models.run.path / "model"
    policy = models.at(judge.step)
    if not (folder / "config.json").is_file():
        return []
    if not models.run.has_ended:
        return [judge.skipped("weights in model/", "the run has not ended since it was resumed; they are older")]
    if policy is None:
        return [judge.skipped("weights in model/", no_weights(judge.step))]
    plain = copy.deepcopy(policy).merge_and_unload() if cfg.model.lora is not None else policy
    exported = model.load_start(ModelConfig(name=str(folder)), "float32", 0)
    theirs, ours = (dict(each.named_parameters()) for each in (exported, plain))
    if theirs.keys() != ours.keys():
        odd = sorted(theirs.keys() ^ ours.keys())
        return [Line(judge.step, "weights in model/", within=False, note=f"parameters differ: {odd[0]}")]
    return [_relative(judge, "weights in model/", theirs, ours, "weights")]


def _relative(
    judge: Judge,
    quantity: str,
    on_file: dict[str, Tensor],
    ours: dict[str, Tensor],
    kind: str = "change",
    rounding: float = 0.0,
) -> Line:
    """Norms of all parameters together; the difference is the norm of the difference, over ours.

    rounding: norm of the difference that the precision of the numbers on file explains, allowed beside the bound.
    """
    theirs, own = (optimizer.norm_of(values.values()) for values in (on_file, ours))
    difference = optimizer.norm_of(_minus(on_file, ours).values())
    bound = BOUNDS[judge.dtype][kind].relative
    allowed = f"{bound:g}·|x|" + (f" + {rounding:.3g}" if rounding else "")
    within = difference <= bound * own + rounding
    note = "norm over all weights"
    return Line(judge.step, quantity, theirs, own, difference / max(own, 1e-300), allowed, within, note=note)
