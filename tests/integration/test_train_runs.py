"""`vdr train` from the outside: what a run leaves, and that it can be repeated, resumed and split over ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def norm(tensors: list[torch.Tensor]) -> float:
    return float(sum(tensor.double().square().sum() for tensor in tensors) ** 0.5)


def start_weights() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    from vdr_cli.starter.paths import model_path

    return {name: tensor.float() for name, tensor in load_file(model_path() / "model.safetensors").items()}


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


@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_bit_for_bit(train, read, tmp_path: Path, processes: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    every = {"train.checkpoint_every": 3}
    assert train(whole, processes=processes, settings={**every, "train.steps": 6}).returncode == 0
    assert train(parts, processes=processes, settings={**every, "train.steps": 3}).returncode == 0
    ended = train(parts, "--resume", "auto", processes=processes, settings={**every, "train.steps": 6})
    assert ended.returncode == 0, ended.stderr
    assert read.metrics(whole) == read.metrics(parts)
    assert all(a.equals(b) for a, b in zip(read.completions(whole), read.completions(parts), strict=True))
    theirs = read.weights(parts)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in read.weights(whole).items())


def test_written_config_repeats_the_run(train, read, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(first, settings={"disagreement.mode": "per_token", "train.eval_every": 1}).returncode == 0
    ended = read.vdr("train", str(first / "config.yaml"), "--output", str(second))
    assert ended.returncode == 0, ended.stderr
    assert read.metrics(first) == read.metrics(second)
    assert (first / "config.yaml").read_text() == (second / "config.yaml").read_text()


def test_a_run_leaves_what_the_design_names(train, read, tmp_path: Path) -> None:
    settings = {"observe.tensorboard": True, "train.eval_every": 2, "train.eval_prompts": 4}
    ended = train(tmp_path / "run", settings=settings)
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "completions/step_000002.parquet", "model/config.json"):
        assert (run / name).is_file(), name
    assert list(run.glob("events.out.tfevents.*")) and (run / "checkpoints" / "step_000002").is_dir()
    last = read.metrics(run)[-1]
    for name in ("reward", "reward_std", "frac_reward_zero_std", "rewards/countdown/mean", "entropy", "num_tokens",
                 "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean", "grad_norm",
                 "learning_rate", "disagreement/mean", "eval/pass@1", "eval/pass@8"):  # fmt: skip
        assert name in last, name
    assert last["ratio/max"] == 1.0  # on-policy: the ratio is exactly 1
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(run / "model")
    exported = read.weights(run)
    assert all(torch.equal(parameter, exported[name]) for name, parameter in loaded.named_parameters())


@pytest.mark.parametrize(
    ("mode", "moves"), [("none", False), ("end_of_sequence", True), ("per_token", True)]
)  # fmt: skip
def test_equal_rewards_move_the_policy_only_with_the_bonus(train, read, tmp_path: Path, mode, moves) -> None:
    (tmp_path / "flat.py").write_text("def flat(completions, **_):\n    return [0.5] * len(completions)\n")
    settings = {
        "disagreement.mode": mode,
        "rewards.functions": [{"name": f"{tmp_path}/flat.py:flat"}],
        "train.steps": 1,
    }
    ended = train(tmp_path / "run", settings=settings)
    assert ended.returncode == 0, ended.stderr
    start, after = start_weights(), read.weights(tmp_path / "run")
    assert any(not torch.equal(after[name], start[name]) for name in start) == moves


def test_user_typed_deepspeed_command(read, sharded: str, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--module", "vdr_cli", "train"]
    flags = ["--output", str(tmp_path / "run"), "--steps", "1", "--ds-config", sharded]
    small = ["--set", "train.prompts_per_step=2", "--set", "rollout.group_size=4"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run([*command, *flags, *small], capture_output=True, text=True, timeout=300, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "run" / "finished.json").is_file()


def test_another_number_of_processes_carries_the_weights_exactly(train, read, tmp_path: Path) -> None:
    run, first = tmp_path / "run", {"train.steps": 1}
    assert train(run, processes=2, settings=first).returncode == 0
    before = read.weights(run)
    ended = train(run, "--resume", "auto", settings=first)  # nothing left to do but load and export
    assert ended.returncode == 0, ended.stderr
    assert all(torch.equal(tensor, before[name]) for name, tensor in read.weights(run).items())
    ended = train(run, "--resume", "auto", processes=3, settings={"train.steps": 2})
    assert ended.returncode == 0, ended.stderr
    assert [line["step"] for line in read.metrics(run)] == [1, 2]
