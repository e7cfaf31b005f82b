from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from scipy.stats import t as student_t

from vdr_cli.config import DataConfig, DisagreementConfig, RewardsConfig, RolloutConfig
from vdr_cli.config.schema import RewardFunction
from vdr_cli.engine import collectives
from vdr_cli.errors import ConfigError, DataError
from vdr_cli.evaluation.evaluate import Evaluation, evaluate_model, run_eval
from vdr_cli.evaluation.request import EvalRequest
from vdr_cli.evaluation.result import EvalResult, paired_differences
from vdr_cli.models.loading import load_causal_lm, load_tokenizer
from vdr_cli.rewards.base import LoadedReward
from vdr_cli.rewards.loading import find_function
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.samples import Prompt, Sampling
from vdr_cli.stats.bootstrap import resampled_counts


@cache
def starter() -> tuple[Any, Any]:
    return load_causal_lm("starter"), load_tokenizer("starter")


def prompts(count: int) -> list[Prompt]:
    tokenizer = starter()[1]
    return [
        Prompt(row, text, tokenizer(text)["input_ids"], {"answer": row})
        for row, text in enumerate(f"{a} 2 3={a + 5}:" for a in range(1, count + 1))
    ]


def rewards(*functions: Any, **more: Any) -> list[LoadedReward]:
    return [LoadedReward(function.__name__, 1.0, function, **more) for function in functions]


def long(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text) >= 5) for text in completions]


def evaluate(
    count: int = 6, n: int = 4, functions: Sequence[Any] = (long,), classes: dict[str, Any] | None = None
) -> EvalResult:
    model, tokenizer = starter()
    rollout = TransformersRollout(tokenizer.pad_token_id, [tokenizer.eos_token_id], tokenizer)
    loaded, sampling = rewards(*functions, **(classes or {})), Sampling(max_new_tokens=12)
    evaluation = Evaluation(loaded, n, (1, n), seed=0, sampling=sampling, solved_at=1.0, timeout=300.0)
    return evaluate_model(model, tokenizer, rollout, prompts(count), evaluation)


def test_numbers_follow_from_the_samples() -> None:
    result = evaluate()
    expected = np.array([[float(len(text) >= 5) for text in row] for row in result.texts])
    metrics = result.metrics()
    assert metrics["pass@1"] == pytest.approx(expected.mean())
    assert metrics["pass@4"] == pytest.approx(expected.any(1).mean())
    assert metrics["reward"] == metrics["rewards/long/mean"] == pytest.approx(expected.mean())
    assert metrics["pass@1_low"] <= metrics["pass@1"] <= metrics["pass@1_high"]
    assert metrics["mean_length"] == pytest.approx(result.length.mean())
    assert result.record() | metrics == result.record()
    assert result.record()["prompts"] == 6


def test_entropy_is_that_of_the_models_own_distributions() -> None:
    model, tokenizer = starter()
    result = evaluate(count=2, n=2)
    sums = []
    for prompt, row in zip(result.prompts, result.texts, strict=True):
        for text in row:
            ids = prompt.token_ids + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt.token_ids) - 1 : -1].double()
            sums.append(torch.distributions.Categorical(logits=logits).entropy().sum().item())
    assert result.entropy_sum.ravel() == pytest.approx(sums, rel=1e-4)
    assert result.metrics()["entropy"] == pytest.approx(sum(sums) / result.length.sum(), rel=1e-4)


def test_as_many_processes_as_you_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdr_cli.evaluation.evaluate.CHUNK_COMPLETIONS", 4)
    classes = {"solution_class": firsts, "known_classes": lambda answer, **_: [number + 1 for number in answer]}
    alone = evaluate(count=5, classes=classes)
    shares: list[Any] = []

    def keep(value: Any) -> list[Any]:
        shares.append(value)
        raise StopIteration

    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    monkeypatch.setattr(collectives, "_raise_everywhere", lambda error: None)
    monkeypatch.setattr(collectives, "gather_objects", keep)
    for rank in range(3):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        with pytest.raises(StopIteration):
            evaluate(count=5, classes=classes)
    assert [len(rows) for rows, _ in shares] == [2, 2, 1]
    monkeypatch.setattr(collectives, "gather_objects", lambda value: shares)
    together = evaluate(count=5, classes=classes)
    assert together.texts == alone.texts
    assert together.classes == alone.classes
    assert together.known_classes.tolist() == alone.known_classes.tolist() == [1, 2, 3, 4, 5]
    assert together.metrics() == pytest.approx(alone.metrics())


def test_none_rewards_leave_a_completion_out() -> None:
    def sometimes(completions: list[str], **_: Any) -> list[float | None]:
        return [None if index % 2 else 1.0 for index in range(len(completions))]

    result = evaluate(count=2, n=2, functions=(sometimes,))
    assert np.isnan(result.task_reward).sum() == 2
    assert result.metrics()["reward"] == 1.0
    assert result.metrics()["pass@1"] == 0.5


def test_weights_and_several_functions() -> None:
    def half(completions: list[str], **_: Any) -> list[float]:
        return [0.5] * len(completions)

    model, tokenizer = starter()
    rollout = TransformersRollout(tokenizer.pad_token_id, [tokenizer.eos_token_id], tokenizer)
    weighted = [LoadedReward("half", 2.0, half), LoadedReward("long", -1.0, long)]
    evaluation = Evaluation(weighted, 2, (1,), 0, Sampling(12), solved_at=1.0, timeout=300.0)
    result = evaluate_model(model, tokenizer, rollout, prompts(3), evaluation)
    assert result.task_reward == pytest.approx(1.0 - result.rewards["long"])
    assert (result.solved == (result.rewards["long"] == 0)).all()


def test_paired_differences() -> None:
    first, second = evaluate(), evaluate(functions=(lambda completions, **_: [1.0] * len(completions),))
    (row,) = paired_differences([first, second])
    assert row["pass@1"] == pytest.approx(1.0 - first.metrics()["pass@1"])
    assert row["pass@1_low"] <= row["pass@1"] <= row["pass@1_high"]
    (same,) = paired_differences([first, first])
    assert same["pass@1"] == same["pass@1_low"] == same["pass@1_high"] == 0.0


def test_intervals_and_differences_of_everything_against_a_plain_resampling() -> None:
    def characters(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    first, second = evaluate(count=5), evaluate(count=5, functions=(characters,))
    counts = np.concatenate(list(resampled_counts(5, 2000, 0)))
    rows = [np.repeat(np.arange(5), times) for times in counts]  # the prompts of each resample

    def plain(result: EvalResult, name: str, drawn: Any) -> float:
        if name == "entropy":
            return float(result.entropy_sum[drawn].sum() / result.length[drawn].sum())
        whole = {"reward": result.task_reward, "mean_length": result.length, "truncated_share": result.truncated}
        return float(result.task_reward[drawn].std() if name == "reward_std" else whole[name][drawn].mean())

    (row,) = paired_differences([first, second])
    tail = float(norm.cdf(-np.sqrt(5 / 4) * student_t.ppf(0.975, 4)))  # of few clusters
    for name in ("reward", "reward_std", "mean_length", "truncated_share", "entropy"):
        assert first.metrics()[name] == pytest.approx(plain(first, name, slice(None)))
        draws = np.array([[plain(result, name, drawn) for result in (first, second)] for drawn in rows])
        ends = np.quantile(draws[:, 0], [tail, 1 - tail])
        assert [first.metrics()[f"{name}_{end}"] for end in ("low", "high")] == pytest.approx(ends, abs=1e-9)
        ends = np.quantile(draws[:, 1] - draws[:, 0], [tail, 1 - tail])
        assert [row[f"{name}_{end}"] for end in ("low", "high")] == pytest.approx(ends, abs=1e-9)


def test_a_reward_that_raises_is_named_and_stops() -> None:
    def broken(completions: list[str], **_: Any) -> list[float]:
        raise RuntimeError("no")

    with pytest.raises(DataError, match="broken"):
        evaluate(functions=(broken,))


def test_the_whole_job_sampled_and_greedy() -> None:
    request = EvalRequest(("starter",), rollout=RolloutConfig(max_new_tokens=8), prompts=4, samples=2)
    (sampled,) = run_eval(request)
    assert sampled.record()["model"] == "starter"
    assert sampled.solved.shape == (4, 2)
    assert {"pass@1", "pass@2", "rewards/countdown/mean"} <= sampled.record().keys()
    greedy = EvalRequest(("starter",), rollout=RolloutConfig(max_new_tokens=8), prompts=4, samples=2, greedy=True)
    assert run_eval(greedy)[0].solved.shape == (4, 1)


BROKEN_GAME = """
class Game:
    left_open = 0

    def reset(self, **columns):
        Game.left_open += 1

    def respond(self, messages):
        raise ValueError("no moves")

    def close(self):
        Game.left_open -= 1
"""


def test_environments_are_closed_when_an_evaluation_fails(tmp_path: Path) -> None:
    (tmp_path / "broken_game.py").write_text(BROKEN_GAME)
    name = f"{tmp_path / 'broken_game.py'}:Game"
    rollout = RolloutConfig(max_new_tokens=8, environment=name, max_turns=2)
    with pytest.raises(DataError, match="respond raised on dataset row"):
        run_eval(EvalRequest(("starter",), rollout=rollout, prompts=2, samples=2))
    assert find_function(name).left_open == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"ks": (1, 9), "samples": 8}, "each k must lie between 1 and --samples 8"),
        ({"ks": (0,)}, "each k"),
        ({"samples": 0}, "at least one completion"),
        ({"prompts": 0}, "at least one prompt"),
        ({"models": ("./nowhere",)}, "no such directory"),
        ({"rewards": RewardsConfig(functions=[RewardFunction(name="nonsense")])}, "nonsense"),
        ({"data": DataConfig(eval_split="dev")}, "dev"),
    ],
)
def test_usage_errors(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_eval(EvalRequest(**({"models": ("starter",), "rollout": RolloutConfig(max_new_tokens=8)} | more)))


def test_no_prompts() -> None:
    with pytest.raises(DataError, match="no prompts"):
        evaluate(count=0)


def test_diversity_reference_and_disagreement_are_measured_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    request = EvalRequest(
        ("starter",),
        rollout=RolloutConfig(max_new_tokens=8),
        prompts=3,
        samples=3,
        diversity=True,
        reference="target",
        disagreement=DisagreementConfig(members=2),
    )
    (result,) = run_eval(request)
    record = result.record()
    assert {"distinct-1", "distinct-2", "self_bleu", "rouge_l", "rouge_l_low", "disagreement"} <= record.keys()
    assert 0 < record["disagreement"] < np.log(2)
    columns = result.samples()
    assert {len(values) for values in columns.values()} == {9}
    assert np.mean(columns["disagreement"]) == pytest.approx(record["disagreement"])
    with pytest.raises(ConfigError, match="--reference nothing"):
        run_eval(EvalRequest(("starter",), rollout=RolloutConfig(max_new_tokens=8), reference="nothing"))


def firsts(completions: list[str], **_: Any) -> list[str | None]:
    return [text[0] if text else None for text in completions]


def right(completions: list[str], **_: Any) -> list[float]:
    return [1.0] * len(completions)


def test_solutions_of_one_class_are_counted_once() -> None:
    classes = {"solution_class": firsts, "known_classes": lambda answer, **_: [None, 8, 0]}
    result = evaluate(count=3, n=16, functions=(right,), classes=classes)
    found = [len({text[:1] for text in texts}) for texts in result.texts]
    assert found != [len(set(texts)) for texts in result.texts]
    assert result.metrics()["distinct_solved"] == pytest.approx(np.mean(found))
    assert result.metrics()["distinct_solved_share"] == found[1] / 8  # what is not known, or has none, counts nowhere
    assert result.record()["distinct_by"] == "solution class of right"
    assert result.samples()["solution_class"] == [text[:1] for texts in result.texts for text in texts]


def test_only_solved_completions_are_of_a_class() -> None:
    result = evaluate(count=2, n=8, functions=(long,), classes={"solution_class": firsts})
    pairs = [zip(*row, strict=True) for row in zip(result.texts, result.solved, strict=True)]
    assert result.solutions() == [{text[0] for text, solved in row if solved} for row in pairs]
    assert "distinct_solved_share" not in result.metrics()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (lambda completions, **_: ["a"], "right's solution_class must return a list of 16 entries"),
        (lambda completions, **_: "a" * len(completions), "returned str"),
        (lambda completions, **_: 1 / 0, "right's solution_class raised .*division by zero"),
    ],
)
def test_a_bad_solution_class_is_named(classes: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(count=4, n=4, functions=(right,), classes={"solution_class": classes})


def test_known_classes_are_numbers() -> None:
    classes = {"solution_class": firsts, "known_classes": lambda answer, **_: ["many"] * len(answer)}
    with pytest.raises(DataError, match="known_classes of reward right must return whole numbers"):
        evaluate(count=1, functions=(right,), classes=classes)


def test_distinct_solutions_are_counted_once() -> None:
    result = evaluate(count=1, n=4, functions=(lambda completions, **_: [1.0] * len(completions),))
    assert result.metrics()["distinct_solved"] == len(set(result.texts[0]))
