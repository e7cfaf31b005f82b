"""`vdr train` from the outside: what a run leaves, and that it can be repeated, resumed and split over ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def norm(tensors: list[torch.Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors) ** 0.5)


def start_weights() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    from vdr_cli.beds.registry import BEDS

    return {
        name: tensor.float() for name, tensor in load_file(BEDS["starter"].model_path / "model.safetensors").items()
    }


def test_one_and_two_processes_give_the_same_update(train, read, tmp_path: Path) -> None:
    for processes in (1, 2):
        ended = train(tmp_path / str(processes), processes=processes, settings={"train.steps": 1})
        assert ended.returncode == 0, ended.stderr
    start, one, two = start_weights(), read.weights(tmp_path / "1"), read.weights(tmp_path / "2")
    update = norm([one[name] - start[name] for name in start])
    assert update > 0
    assert norm([one[name] - two[name] for name in start]) / update < 1e-5
    (single,), (double,) = read.metrics(tmp_path / "1"), read.metrics(tmp_path / "2")
    assert single.keys() == double.keys()
    for name, value in single.items():
        assert double[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for processes, first_groups in ((1, {0}), (2, {0, 2})):  # of each rank: two groups, three groups
        (table,) = read.completions(tmp_path / str(processes))
        shown = [row for row in table.to_pylist() if row["bald_tokens"] is not None]
        assert {row["group"] for row in shown} == first_groups
        for row in shown:
            assert len(row["bald_tokens"]) == len(row["completion_ids"])
            assert row["bald_tokens"][-1] == pytest.approx(row["bald"], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("ranks", "settings"), [(1, {}), (2, {"grpo.num_iterations": 2, "train.micro_batch_size": 3})]
)  # fmt: skip
def test_resume_is_bit_for_bit(train, read, tmp_path: Path, ranks: int, settings) -> None:
    """Also with several optimizer steps on one rollout, each accumulated over several micro-batches."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    every = {"train.checkpoint_every": 2, **settings}
    assert train(whole, ranks=ranks, settings={**every, "train.steps": 4}).returncode == 0
    assert train(parts, ranks=ranks, settings={**every, "train.steps": 2}).returncode == 0
    ended = train(parts, "--resume", "auto", ranks=ranks, settings={**every, "train.steps": 4})
    assert ended.returncode == 0, ended.stderr
    assert read.metrics(whole) == read.metrics(parts)
    assert all(a.equals(b) for a, b in zip(read.completions(whole), read.completions(parts), strict=True))
    theirs = read.weights(parts)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in read.weights(whole).items())


def test_written_config_repeats_the_run(train, forked, read, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first, settings={"disagreement.mode": "per_token", "train.eval_every": 1}).returncode == 0
    ended = forked("train", str(first / "config.yaml"), "--output", str(second))
    assert ended.returncode == 0, ended.stderr
    assert read.metrics(first) == read.metrics(second)
    assert (first / "config.yaml").read_text() == (second / "config.yaml").read_text()


def test_a_run_leaves_what_the_design_names(train, read, tmp_path: Path) -> None:
    settings = {"observe.tensorboard": True, "train.eval_every": 2, "train.eval_prompts": 4, "train.eval_k": [2, 8]}
    ended = train(tmp_path / "run", settings=settings)
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "completions/step_000002.parquet", "model/config.json"):
        assert (run / name).is_file(), name
    assert list(run.glob("events.out.tfevents.*")) and (run / "checkpoints" / "step_000002").is_dir()
    last = read.metrics(run)[-1]
    for name in ("reward", "reward_std", "frac_reward_zero_std", "rewards/countdown/mean", "entropy", "num_tokens",
                 "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean", "grad_norm",
                 "learning_rate", "disagreement/mean", "eval/pass@1", "eval/pass@2", "eval/pass@8"):  # fmt: skip
        assert name in last, name
    assert last["ratio/max"] == 1.0  # on-policy: the ratio is exactly 1
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    exported = read.weights(run)
    assert all(torch.equal(parameter, exported[name]) for name, parameter in loaded.named_parameters())


@pytest.mark.parametrize(
    ("mode", "gate", "moves"),
    [
        ("none", "all", False),
        ("end_of_sequence", "all", True),
        ("per_token", "all", True),
        ("per_token", "not_failed", False),
    ],
)
def test_equal_rewards_move_the_policy_only_with_a_bonus_that_is_let_through(
    train, read, tmp_path: Path, mode, gate, moves
) -> None:
    (tmp_path / "flat.py").write_text("def flat(completions, **_):\n    return [0.5] * len(completions)\n")
    settings = {
        "disagreement.mode": mode,
        "bonus.gate": gate,
        "rewards.functions": [{"name": f"{tmp_path}/flat.py:flat"}],
        "train.steps": 1,
    }
    ended = train(tmp_path / "run", settings=settings)
    assert ended.returncode == 0, ended.stderr
    start, after = start_weights(), read.weights(tmp_path / "run")
    assert any(not torch.equal(after[name], start[name]) for name in start) == moves


@pytest.mark.parametrize(
    "launcher",
    [["deepspeed", "--num_gpus", "2", "--module"], ["torchrun", "--nproc-per-node", "2", "-m"]],
    ids=["deepspeed", "torchrun"],
)
def test_launchers_that_a_user_types(sharded: str, tmp_path: Path, launcher: list[str]) -> None:
    command = [str(Path(sys.executable).with_name(launcher[0])), *launcher[1:], "vdr_cli", "train"]
    flags = ["--output", str(tmp_path / "run"), "--steps", "1", "--ds-config", sharded]
    small = ["--set", "train.prompts_per_step=2", "--set", "rollout.group_size=4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run([*command, *flags, *small], capture_output=True, text=True, timeout=300, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "run" / "finished.json").is_file()


def test_another_number_of_processes_carries_weights_and_moments_exactly(train, read, tmp_path: Path) -> None:
    """2 to 1 to 3: each goes on from the one before in a directory of its own, and saves what it loaded."""
    last, settings = tmp_path / "2", {"train.steps": 1, "train.weight_decay": 0.1}
    assert train(last, ranks=2, settings=settings).returncode == 0
    expected = optimizer_state(last)
    assert len(expected) > 3 and all(tensor.any() for name, tensor in expected.items() if name.name == "exp_avg_sq.pt")
    for ranks in (1, 3):
        before, last = last, tmp_path / str(ranks)
        checkpoint = str(before / "checkpoints" / "step_000001")
        ended = train(last, "--resume", checkpoint, ranks=ranks, settings=settings)
        assert ended.returncode == 0, ended.stderr
        assert all(torch.equal(tensor, expected[name]) for name, tensor in optimizer_state(last).items())
    assert all(torch.equal(t, read.weights(last)[name]) for name, t in read.weights(tmp_path / "2").items())
    ended = train(last, "--resume", "auto", ranks=3, settings={**settings, "train.steps": 2})
    assert ended.returncode == 0, ended.stderr
    assert [line["step"] for line in read.metrics(last)] == [2]


def optimizer_state(run: Path) -> dict[Path, torch.Tensor]:
    """Master weights and moments of the newest checkpoint by name, whole, whatever the number of its processes."""
    from vdr_cli.engine.checkpoint import UNIVERSAL_TAG, _convert

    checkpoint = max((run / "checkpoints").iterdir())
    _convert(checkpoint)
    folder = checkpoint / UNIVERSAL_TAG / "zero"
    state = {path.relative_to(folder): torch.load(path) for path in folder.glob("*/*.pt")}
    tensors = {name: value["param"] if isinstance(value, dict) else value for name, value in state.items()}
    return {name: tensor for name, tensor in tensors.items() if name.name in ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt")}
