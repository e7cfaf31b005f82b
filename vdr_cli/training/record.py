"""What a step leaves behind: metrics, completions, a line for the user, evaluations, checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdr_cli.data.completions import write_completions
from vdr_cli.engine import collectives
from vdr_cli.errors import DataError, MachineError
from vdr_cli.evaluation.evaluate import evaluate_model
from vdr_cli.exploration.bonus import has_spread
from vdr_cli.grpo.advantages import zero_variance
from vdr_cli.training import audit_record, speed
from vdr_cli.training.batch import Batch, Signal, Updates
from vdr_cli.training.live import Sample
from vdr_cli.training.run import Run
from vdr_cli.training.step_metrics import Pairs, completion_pairs, disagreement_pairs, ratios, reward_pairs

SHOWN_COMPLETIONS = 8


def end_step(run: Run, batch: Batch, signal: Signal, updates: Updates) -> None:
    """Count the steps of one rollout, write down what they were, evaluate and checkpoint when due. Collective."""
    cfg, before = run.config, run.step
    metrics = step_metrics(run, batch, signal, updates)
    audit_record.save(run, batch, signal, updates)
    run.advance(cfg.grpo.num_iterations, int(metrics["step_tokens"]))
    metrics["num_tokens"] = float(run.state.tokens)
    last = run.step >= cfg.train.steps
    if cfg.train.eval_every and (last or _is_due(cfg.train.eval_every, before, run.step)):
        metrics |= evaluate(run)
    if saves_completions(run, before):
        save_completions(run, batch, signal)
    write_metrics(run, metrics)
    if run.view is not None:
        run.view.update(run.step, metrics, shown_group(run, batch, signal))
    if warning := bonus_warning(run, metrics):
        run.note(warning)
    refuse_endless_refusals(run, batch, signal, updates)
    if not last and (run.best_is_new() or _is_due(cfg.train.checkpoint_every, before, run.step)):
        run.save_if_possible()


def saves_completions(run: Run, before: int) -> bool:
    """Whether the completions of the rollout at step `before` are saved."""
    cfg = run.config
    after, every = before + cfg.grpo.num_iterations, cfg.observe.completions_every
    return every > 0 and (after >= cfg.train.steps or _is_due(every, before, after))


def shows_tokens(run: Run) -> bool:
    """Whether somebody will look at this rollout token by token: it is saved, or the first of the run."""
    return run.step == 0 or saves_completions(run, run.step)


def write_metrics(run: Run, metrics: dict[str, float]) -> None:
    """A line of metrics.jsonl; a disk that is full is said, and takes the line later."""
    if run.writer is not None:
        try:
            run.writer.log(run.step, metrics)
        except MachineError as error:
            run.note(f"{error}; going on")


def step_metrics(run: Run, batch: Batch, signal: Signal, updates: Updates) -> dict[str, float]:
    """The step's numbers over all ranks. Collective."""
    G = run.config.rollout.group_size
    stalled = zero_variance(batch.task_reward, G)
    names = [reward.name for reward in run.rewards]
    pairs: Pairs = reward_pairs(batch.rewards, batch.task_reward, stalled, G, names)
    pairs |= completion_pairs(batch.completions.completion_mask, batch.completions.truncated)
    if signal.reduced is not None and signal.bonus is not None:
        added = signal.bonus if signal.bonus.dim() == 1 else signal.bonus[batch.completions.completion_mask]
        pairs |= disagreement_pairs(signal.reduced, added, has_spread(signal.reduced, G), G)
    pairs["advantage_abs"] = (float(signal.task_advantages.abs().sum()), float(len(batch)))
    pairs |= updates.pairs
    tokens = float(batch.completions.completion_mask.sum())
    lengths = batch.completions.completion_mask.sum(1)
    seconds = run.timer.take()
    prompts = float(batch.completions.prompt_mask[::G].sum())
    sums = {"loss": updates.loss, "step_tokens": tokens, "prompt_tokens": prompts}
    summed = sum_pairs(pairs | {name: (value, 0.0) for name, value in sums.items()})
    loss, step_tokens, prompt_tokens = (summed.pop(name)[0] for name in sums)
    metrics = ratios(summed) | largest(
        updates.maxima
        | {"completions/max_length": float(lengths.max()), "completions/min_length": -float(lengths.min())}
        | {f"time/{name}": value for name, value in seconds.items()}
    )
    metrics["completions/min_length"] *= -1.0
    metrics["step_time"] = metrics.pop("time/step")
    metrics |= speed_metrics(run, metrics, step_tokens, prompt_tokens)
    return metrics | {
        "loss": loss / run.config.grpo.num_iterations,
        "grad_norm": updates.grad_norm,
        "learning_rate": updates.learning_rate,
        "refused_steps": float(sum(updates.refused)),
        "step_tokens": step_tokens,
        "tokens_per_second": step_tokens / metrics["step_time"],
    }


def speed_metrics(run: Run, metrics: dict[str, float], completions: float, prompts: float) -> dict[str, float]:
    """Tokens a second and share of the step of each phase; on a GPU the share of its arithmetic (MFU) as well.

    completions, prompts: tokens over all ranks, a group's prompt once.
    """
    seconds = {name.removeprefix("time/"): value for name, value in metrics.items() if name.startswith("time/")}
    passes = {name: float(run.config.grpo.num_iterations) if name == "update" else 1.0 for name in speed.WORKING}
    found = speed.speeds(seconds, metrics["step_time"], {name: n * completions for name, n in passes.items()})
    peak = run.engine.peak_flops()
    if peak is None:
        return found
    through = {name: n * (completions + prompts) for name, n in passes.items()}
    return found | speed.utilisation(
        run.engine.num_matrix_parameters, not run.engine.has_frozen, through, seconds, peak * collectives.world_size()
    )


def sum_pairs(pairs: Pairs) -> Pairs:
    """Both halves of every pair over all ranks, in one collective; every rank has the same names."""
    names = sorted(pairs)
    flat = collectives.all_reduce_sum([number for name in names for number in pairs[name]])
    return {name: (flat[2 * index], flat[2 * index + 1]) for index, name in enumerate(names)}


def largest(values: dict[str, float]) -> dict[str, float]:
    names = sorted(values)
    return dict(zip(names, collectives.all_reduce_max([values[name] for name in names]), strict=True))


def evaluate_at_start(run: Run) -> None:
    """The held-out numbers before the first step, so that every run shows what it improved. Collective."""
    if run.step == 0 and run.config.train.eval_every:
        metrics = evaluate(run)
        write_metrics(run, metrics)
        run.note(f"step 0: {_eval_line(metrics)}")


def evaluate(run: Run) -> dict[str, float]:
    """eval/pass@1, eval/pass@k, eval/reward ... of the policy on held-out prompts; {} when not asked. Collective."""
    cfg = run.config
    if run.held_out is None:
        return {}
    count = min(cfg.train.eval_prompts, len(run.held_out))
    ks = sorted({1, cfg.train.eval_samples})
    if run.drawing is not None:  # servers that sample for the next step must not get newer weights now
        collectives.together(run.drawing.wait)
    with run.timer.phase("evaluation"), run.engine.twin() as model:
        result = evaluate_model(
            model,
            run.tokenizer,
            run.rollout,
            [run.held_out[index] for index in range(count)],
            run.rewards,
            cfg.train.eval_samples,
            ks,
            cfg.train.seed,
            run.sampling,
            solved_at=cfg.rewards.solved_at,
            timeout=cfg.rewards.timeout,
        )
    metrics = {f"eval/{name}": value for name, value in result.metrics().items()}
    if run.state.best is None or metrics["eval/pass@1"] > run.state.best:
        run.state.best, run.state.best_step = metrics["eval/pass@1"], run.step
    return metrics


def save_completions(run: Run, batch: Batch, signal: Signal) -> None:
    """completions/step_<n>.parquet with every rank's rows, in the order of the stream. Collective."""
    parts = collectives.gather_objects(completion_columns(run, batch, signal))
    if run.writer is None:
        return
    columns = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    columns["group"] = [row // run.config.rollout.group_size for row in range(len(columns["prompt"]))]
    try:
        write_completions(run.directory / "completions", run.step, columns)
    except MachineError as error:  # a full disk must not end the training that the checkpoints protect
        run.note(str(error))


def completion_columns(run: Run, batch: Batch, signal: Signal) -> dict[str, list[Any]]:
    """This rank's completions as columns; numbers per completion, and lists per token where they are per token."""
    completions = batch.completions
    lengths = completions.completion_mask.sum(1).tolist()
    prompt_ids = [ids[mask].tolist() for ids, mask in zip(completions.prompt_ids, completions.prompt_mask, strict=True)]
    columns: dict[str, list[Any]] = {
        "row": [prompt.row for prompt in batch.prompts],
        "prompt": [prompt.value for prompt in batch.prompts],
        "completion": list(batch.texts),
        "prompt_ids": prompt_ids,
        "completion_ids": _cut(completions.completion_ids, lengths),
        "truncated": completions.truncated.tolist(),
        "reward": batch.task_reward.tolist(),
        "advantage": _per_completion(signal.advantages, completions.completion_mask).tolist(),
    }
    for index, reward in enumerate(run.rewards):
        columns[f"rewards/{reward.name}"] = batch.rewards[:, index].tolist()
    if signal.reduced is not None and signal.bonus is not None:
        columns["bonus"] = _per_completion(signal.bonus, completions.completion_mask).tolist()
        columns[run.config.disagreement.measure] = signal.reduced.tolist()
    if signal.token_measure is not None:
        measured = _cut(signal.token_measure, lengths[: len(signal.token_measure)])
        columns[f"{run.config.disagreement.measure}_tokens"] = measured + [None] * (len(lengths) - len(measured))
    return columns


def shown_group(run: Run, batch: Batch, signal: Signal) -> list[Sample] | None:
    """The step's first group, for the live view; None where a group measured token by token is shown meanwhile."""
    if signal.reduced is not None and signal.token_measure is None and run.config.observe.completions_every:
        return None
    samples = []
    for row in range(min(run.config.rollout.group_size, SHOWN_COMPLETIONS)):
        ids = batch.completions.completion_ids[row, batch.completions.completion_mask[row]].tolist()
        tokens = [run.tokenizer.decode([token]) for token in ids]
        measured = signal.token_measure
        heat = measured[row, : len(ids)].tolist() if measured is not None else [0.0] * len(ids)
        if measured is None and signal.reduced is not None and ids:
            heat[-1] = float(signal.reduced[row])  # end_of_sequence: of the position that predicts the last token
        prompt = batch.prompts[row].value
        samples.append(
            Sample(
                prompt if isinstance(prompt, str) else prompt[-1]["content"],
                tokens,
                heat,
                float(batch.task_reward[row]),
            )
        )
    return samples


def bonus_warning(run: Run, metrics: dict[str, float]) -> str | None:
    """Why the bonus does not do what it is for, if it does not; said once."""
    if run.ensemble is None:
        return None
    spread = metrics.get("disagreement/groups_with_spread", 0.0) > 0
    sizes = [metrics.get(name) for name in ("disagreement/bonus_abs", "advantage_abs")]
    if sizes[0] is None or sizes[1] is None:  # a step whose numbers are not finite: its refusal is what there is to say
        return None
    return run.watch.look(run.config.disagreement, spread, sizes[0], sizes[1])


def refuse_endless_refusals(run: Run, batch: Batch, signal: Signal, updates: Updates) -> None:
    """After max_refused_steps in a row: save this rank's batch and stop. The numbers are the same on every rank."""
    run.state.refused, longest = refused_in_a_row(run.state.refused, updates.refused)
    if any(updates.refused):
        run.note(f"step {run.step}: the gradient was not finite; the update was refused on all ranks")
    if longest >= run.config.train.max_refused_steps:
        path = run.directory / f"refused_batch_rank{collectives.rank()}.pt"
        torch.save({"batch": batch, "signal": signal}, path)
        raise DataError(
            f"{longest} steps in a row had a loss or gradient that is not finite; the last batch is in "
            f"{path}: look at its rewards and log-probabilities, lower train.learning_rate"
        )


def refused_in_a_row(before: int, refused: list[bool]) -> tuple[int, int]:
    """Refusals in a row at the end of these steps, and the most in a row on the way; before: those at their start."""
    counts = [before]
    for each in refused:
        counts.append(counts[-1] + 1 if each else 0)
    return counts[-1], max(counts[1:])


def _is_due(every: int, before: int, now: int) -> bool:
    """True when a multiple of `every` lies in (before, now]."""
    return every > 0 and now // every > before // every


def _per_completion(values: Tensor, mask: Tensor) -> Tensor:
    """(B,) as they are, (B, T) as the mean over valid tokens."""
    return values if values.dim() == 1 else (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _cut(rows: Tensor, lengths: list[int]) -> list[list[Any]]:
    return [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]


def _eval_line(metrics: dict[str, float]) -> str:
    shown = [f"{name} {value:.3f}" for name, value in metrics.items() if not name.endswith(("_low", "_high"))]
    return ", ".join(shown)
