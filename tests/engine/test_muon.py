"""Muon through the engine, against a float64 one written from Keller Jordan's definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdr_cli.config import Config
from vdr_cli.engine import checkpoint as checkpoints
from vdr_cli.engine import deepspeed_import
from vdr_cli.engine.build import build_engine
from vdr_cli.engine.ds_config import resolve_ds_config
from vdr_cli.engine.engine import Engine
from vdr_cli.errors import ConfigError
from vdr_cli.models.loading import load_causal_lm
from vdr_cli.models.policy import Policy

RATE, MUON_RATE, DECAY, BETAS, EPSILON = 1e-3, 2e-2, 0.1, (0.9, 0.99), 1e-8
TRAIN = {
    "optimizer": "muon",
    "learning_rate": RATE,
    "muon_learning_rate": MUON_RATE,
    "weight_decay": DECAY,
    "adam_betas": BETAS,
}
STEPS = 3


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five quintic steps with the slope-maximising coefficients; the wide way round."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Reference:
    """Muon for the layers' matrices, AdamW for the rest, one tensor at a time."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.square: dict[str, Tensor] = {}
        self.count = 0

    def step(self, weights: dict[str, Tensor], gradients: dict[str, Tensor], max_norm: float) -> float:
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        factor = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
        self.count += 1
        for name, weight in weights.items():
            gradient = gradients[name] * factor
            if ".layers." in name and weight.dim() == 2:
                mean = 0.95 * self.mean.get(name, torch.zeros_like(weight)) + 0.05 * gradient
                self.mean[name] = mean
                update = newton_schulz(0.95 * mean + 0.05 * gradient)
                update = update * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - MUON_RATE * DECAY).sub_(MUON_RATE * update)
                continue
            mean = BETAS[0] * self.mean.get(name, torch.zeros_like(weight)) + (1 - BETAS[0]) * gradient
            square = BETAS[1] * self.square.get(name, torch.zeros_like(weight)) + (1 - BETAS[1]) * gradient**2
            self.mean[name], self.square[name] = mean, square
            if weight.dim() > 1:
                weight.mul_(1 - RATE * DECAY)
            corrected = (square / (1 - BETAS[1] ** self.count)).sqrt() + EPSILON
            weight.sub_(RATE * mean / (1 - BETAS[0] ** self.count) / corrected)
        return norm


def weights_of(engine: Engine) -> dict[str, Tensor]:
    with engine.gathered_model() as model:
        return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("dtype", "bound", "max_norm"), [(torch.float32, 1e-3, 0.0), (torch.float32, 1e-3, 0.5), (torch.float16, 5e-2, 0.5)]
)
def test_three_steps_are_those_of_a_float64_muon(
    build: Any,
    completions: Any,
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    bound: float,
    max_norm: float,
) -> None:
    """Clipping shortens the gradient, not Muon's update: with max_norm 0.5 the steps are as long as without it.

    dtype: that of the orthogonalisation, float16 where the device has it.
    """
    original = deepspeed_import.module("runtime.zero.muon.original_muon")
    monkeypatch.setattr(original, "ns_compute_dtype", lambda method: dtype)
    engine = build(3, max_norm, train=TRAIN)
    start = weights_of(engine)
    weights, reference = {name: weight.clone() for name, weight in start.items()}, Reference()
    model = load_causal_lm(str(tiny_path), "float32").double()
    policy = Policy(model, share_prompts=False).train()
    for parameter in model.modules():
        if hasattr(parameter, "attention_dropout"):
            parameter.attention_dropout = 0.0  # type: ignore[assignment]
    for number in range(STEPS):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        model.zero_grad()
        tokens = (
            completions.prompt_ids,
            completions.prompt_mask,
            completions.completion_ids,
            completions.completion_mask,
        )
        scale = 0.01 if number == 1 else 1.0
        (-(policy(*tokens, 0.7)[0] * completions.completion_mask).sum() * scale).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            norm = reference.step(weights, gradients, max_norm)
        logps, _ = engine.forward(*tokens, 0.7)
        engine.backward(-(logps * completions.completion_mask).sum() * scale, last=True)
        result = engine.step(RATE)
        assert not result.refused and result.grad_norm == pytest.approx(norm, rel=1e-3)
    ours = weights_of(engine)
    for name, weight in weights.items():
        moved = (weight - start[name]).norm()
        assert (ours[name] - weight).norm() <= bound * moved, name
        if ".layers." in name and weight.dim() == 2:  # about sqrt(rows) a step, its sign no matter
            assert 0.3 < float(moved) / (MUON_RATE * math.sqrt(weight.shape[0]) * STEPS) < 1.5


def test_a_refused_step_leaves_the_means_of_all_matrices_as_they_were(
    build: Any, completions: Any, one_step: Any
) -> None:
    engine, sane = build(3, 1.0, train=TRAIN), build(3, 1.0, train=TRAIN)
    for each in (engine, sane):
        one_step(each, completions)
    before = weights_of(engine)
    _, result = one_step(engine, completions, math.nan)
    assert result.refused and result.grad_norm == math.inf
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(engine).items())
    for each in (engine, sane):
        one_step(each, completions)
    assert all(torch.equal(weight, weights_of(sane)[name]) for name, weight in weights_of(engine).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_continues_to_the_bit(
    build: Any, completions: Any, one_step: Any, tmp_path: Path, dtype: str
) -> None:
    def steps(engine: Engine, count: int) -> None:
        for _ in range(count):
            one_step(engine, completions)

    through, half = (build(3, 1.0, train=TRAIN, model={"dtype": dtype}) for _ in range(2))
    steps(through, 4)
    steps(half, 2)
    saved = checkpoints.save(half, tmp_path / "checkpoints", 2, {})
    resumed = build(3, 1.0, train=TRAIN, model={"dtype": dtype})
    checkpoints.load(resumed, checkpoints.open_checkpoint(saved))
    steps(resumed, 2)
    expected = weights_of(through)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(resumed).items())
    momenta = [
        state["momentum_buffer"]
        for state in resumed.ds_engine.optimizer.optimizer.state.values()
        if "momentum_buffer" in state
    ]
    assert momenta and all(momentum.dtype == torch.float32 for momentum in momenta)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"train": {"optimizer": "muon"}}, "optimizer muon needs muon_learning_rate"),
        ({"train": {"muon_learning_rate": 0.1}}, "muon_learning_rate has no meaning with optimizer adamw"),
        (
            {"train": TRAIN, "model": {"name": "x", "lora": {"rank": 4}}},
            "set train.optimizer to adamw, or remove model.lora",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(sections: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        Config(**sections)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("zero2", "train.optimizer muon needs ZeRO stage 3; give zero3"),
        ("zero3_offload", "zero_optimization.offload_optimizer cannot be combined with train.optimizer muon"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(name: str, line: str) -> None:
    config = Config(model={"name": "x"}, train=TRAIN, engine={"ds_config": name})
    with pytest.raises(ConfigError, match=line):
        resolve_ds_config(config, 1, 64, bf16=True, on_gpu=True)


def test_another_number_of_processes_is_refused(config: Any, device: torch.device) -> None:
    with pytest.raises(ConfigError, match="resume with as many as the checkpoint was written by"):
        build_engine(config(3, train=TRAIN), device, universal=True)
