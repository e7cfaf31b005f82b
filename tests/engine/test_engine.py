"""The engine and its twin, for real, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdr_cli.config import DisagreementConfig
from vdr_cli.disagreement.masks import EnsembleSpec
from vdr_cli.disagreement.reader import EnsembleReader, MeasureRequest
from vdr_cli.engine.engine import Engine
from vdr_cli.engine.export import export_model
from vdr_cli.engine.reference import Adapterless, FrozenCopy, build_reference
from vdr_cli.errors import ConfigError
from vdr_cli.models.loading import load_causal_lm
from vdr_cli.models.policy import completion_logps
from vdr_cli.samples import Completions

LORA = {"model": {"lora": {"rank": 4, "alpha": 8}}}
Build = Callable[..., Engine]


def policy_logps(engine: Engine, batch: Completions) -> Tensor:
    """Through the engine, in train mode, as the loss sees them."""
    tokens = batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask
    return engine.forward(*tokens, 0.7)[0].detach()


def twin_logps(engine: Engine, batch: Completions) -> Tensor:
    with engine.gathered_model() as model:
        return logps_of(model, batch)


@torch.no_grad()
def logps_of(model: Any, batch: Completions) -> Tensor:
    tokens = batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.completion_mask
    return completion_logps(model, *tokens, 0.7)[0]


def parameters_of(engine: Engine) -> dict[str, Tensor]:
    with engine.gathered_model() as model:
        return {name: parameter.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("sections", [{}, LORA], ids=["full", "lora"])
def test_twin_is_the_policy_after_a_step(build: Build, completions, one_step, stage: int, sections) -> None:
    engine = build(stage, **sections)
    before, result = one_step(engine, completions)
    assert not result.refused and result.grad_norm > 0
    after = policy_logps(engine, completions)
    assert not torch.allclose(before, after)
    assert torch.equal(twin_logps(engine, completions), after)


def test_twin_gives_its_weights_back_also_after_an_exception(build: Build) -> None:
    engine = build(3)
    with pytest.raises(RuntimeError, match="inside"), engine.gathered_model() as model:
        assert not any(parameter.is_meta for parameter in model.parameters())
        raise RuntimeError("inside")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.numel() == 0 for parameter in engine.causal_lm.parameters())  # partitioned again


@pytest.mark.parametrize("stage", [1, 3])
def test_dropout_never_leaks(build: Build, completions, one_step, stage: int) -> None:
    """The configuration has dropout 0.3: the same log-probabilities in training, around an ensemble, in the twin."""
    engine = build(stage)
    before = policy_logps(engine, completions)
    spec = EnsembleSpec(**DisagreementConfig(members=4).member_settings)
    with engine.gathered_model() as model:
        sampled = logps_of(model, completions)
        disagreement = EnsembleReader(spec).measure(model, MeasureRequest(completions, 2, 0))
        again = logps_of(model, completions)
    assert disagreement.get("bald").max() > 1e-3
    in_the_loss, _ = one_step(engine, completions, learning_rate=0.0)
    for logps in (sampled, again, in_the_loss, policy_logps(engine, completions)):
        assert torch.equal(logps, before)


@pytest.mark.parametrize(("poison", "clip"), [(math.nan, 0.0), (math.inf, 1.0)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_is_refused_and_forgotten(
    build: Build, completions, one_step, stage: int, poison: float, clip: float
) -> None:
    """The next step is the one that would have come without it."""
    engine, sane = build(stage, clip), build(stage, clip)
    start = parameters_of(engine)
    _, result = one_step(engine, completions, poison)
    assert result.refused and result.grad_norm == math.inf
    assert all(torch.equal(tensor, start[name]) for name, tensor in parameters_of(engine).items())
    for each in (engine, sane):
        _, result = one_step(each, completions)
        assert not result.refused and math.isfinite(result.grad_norm)
    expected = parameters_of(sane)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in parameters_of(engine).items())


def test_an_infinite_loss_with_a_finite_gradient_is_refused(build: Build, completions) -> None:
    engine = build(2)
    logps, _ = engine.forward(
        completions.prompt_ids, completions.prompt_mask, completions.completion_ids, completions.completion_mask, 0.7
    )
    engine.backward(logps.sum() + math.inf, last=False)
    logps, _ = engine.forward(
        completions.prompt_ids, completions.prompt_mask, completions.completion_ids, completions.completion_mask, 0.7
    )
    engine.backward(logps.sum(), last=True)
    assert engine.step(1e-2).refused


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_refuses_too_and_its_twin_is_the_policy(build: Build, completions, one_step, stage: int) -> None:
    engine = build(stage, model={"dtype": "bfloat16"})
    assert torch.equal(twin_logps(engine, completions), policy_logps(engine, completions))
    start = parameters_of(engine)
    _, result = one_step(engine, completions, math.nan)
    assert result.refused
    assert all(torch.equal(tensor, start[name]) for name, tensor in parameters_of(engine).items())
    assert not one_step(engine, completions)[1].refused


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_norm_that_is_reported_is_the_gradients_before_clipping(build: Build, completions, stage: int) -> None:
    norms = []
    for clip in (0.0, 1e-3):
        engine = build(stage, clip)
        plain = load_causal_lm(engine.causal_lm.config._name_or_path)
        tokens = vars(completions)
        four = [tokens[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
        completion_logps(plain, *four, 0.7)[0].sum().backward()
        expected = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        engine.backward(engine.forward(*four, 0.7)[0].sum(), last=True)
        norms.append(engine.step(1e-3).grad_norm / float(expected))
    assert norms == pytest.approx([1.0, 1.0], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_matrices_decay_and_norms_and_biases_do_not(build: Build, completions, one_step, stage: int) -> None:
    engine = build(stage, train={"weight_decay": 0.5})
    start = parameters_of(engine)
    for group in engine.ds_engine.optimizer.param_groups:
        group["weight_decay"] = 0.5  # as DeepSpeed does when it loads a universal checkpoint
    one_step(engine, completions, poison=0.0, learning_rate=0.1)
    after = parameters_of(engine)
    assert {len(tensor.shape) for tensor in start.values()} == {1, 2}
    for name, tensor in start.items():
        expected = tensor * (1 - 0.1 * 0.5) if tensor.dim() > 1 else tensor
        torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-7, msg=name)


# ---- LoRA ----------------------------------------------------------------------------------------------------


def test_only_adapters_are_trained(build: Build, completions, one_step) -> None:
    engine = build(3, **LORA)
    start = parameters_of(engine)
    trained = sum(p.ds_numel for p in engine.causal_lm.parameters() if p.requires_grad)
    assert trained == sum(tensor.numel() for name, tensor in start.items() if "lora_" in name)
    for _ in range(2):  # B is 0 at first, so A has no gradient until B moved
        one_step(engine, completions)
    for name, tensor in parameters_of(engine).items():
        assert torch.equal(tensor, start[name]) == ("lora_" not in name), name


def test_adapter_gradients_are_those_of_a_plain_model(build: Build, device, config, completions) -> None:
    from deepspeed.utils import safe_get_full_grad

    from vdr_cli.engine.build import build_engine
    from vdr_cli.models.adapters import with_adapters

    made = config(3, **LORA)
    engine = build_engine(made, device)
    plain = with_adapters(load_causal_lm(made.model.name), made.model.lora, made.train.seed)
    tokens = completions.prompt_ids, completions.prompt_mask, completions.completion_ids, completions.completion_mask
    completion_logps(plain, *tokens, 0.7)[0].sum().backward()
    engine.backward(engine.forward(*tokens, 0.7)[0].sum(), last=True)
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert expected and any(float(gradient.norm()) > 0 for gradient in expected.values())
    for name, parameter in engine.causal_lm.named_parameters():
        if parameter.requires_grad:
            gradient = safe_get_full_grad(parameter)
            assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("sections", [{}, LORA], ids=["full", "lora"])
def test_export_has_the_logits_of_the_policy(build: Build, completions, one_step, tmp_path: Path, sections) -> None:
    class NoTokenizer:
        def save_pretrained(self, folder: Path) -> None: ...

    engine = build(3, **sections)
    one_step(engine, completions)
    adapter = tmp_path / "adapter" if sections else None
    export_model(engine, NoTokenizer(), tmp_path / "model", adapter)
    for folder in filter(None, (tmp_path / "model", adapter)):
        exported = logps_of(load_causal_lm(str(folder)), completions)
        torch.testing.assert_close(exported, twin_logps(engine, completions), rtol=1e-5, atol=1e-5)


def test_unknown_adapter_targets_are_named(build: Build) -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.targets no_such_module"):
        build(3, model={"lora": {"targets": ["no_such_module"]}})


def test_missing_peft_is_named_with_the_command_that_installs_it(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"model\.lora needs PEFT: pip install peft"):
        build(3, **LORA)


# ---- reference -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("sections", "kind"), [({}, FrozenCopy), (LORA, Adapterless)], ids=["copy", "adapterless"])
def test_reference_is_the_starting_model_exactly(
    build: Build, config, tiny_path: Path, completions, one_step, stage: int, sections, kind: type
) -> None:
    engine = build(stage, **sections)
    reference = build_reference(config(stage, grpo={"beta": 0.1}, **sections), engine)
    assert isinstance(reference, kind)
    for _ in range(2):
        one_step(engine, completions)
    base = logps_of(load_causal_lm(str(tiny_path)), completions)
    with engine.gathered_model() as model:
        with reference.whole(model) as whole:
            assert torch.equal(logps_of(whole, completions), base)
        assert not torch.allclose(logps_of(model, completions), base)


@pytest.mark.parametrize("stage", [2, 3])
def test_synchronised_reference_is_written_and_read(
    build: Build, config, completions, one_step, tmp_path: Path, stage: int
) -> None:
    engine = build(stage)
    settings = config(stage, grpo={"beta": 0.1})
    reference, other = FrozenCopy(settings, engine), FrozenCopy(settings, engine)
    reference.save(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    one_step(engine, completions)
    reference.synchronise()
    synchronised = twin_logps(engine, completions)
    one_step(engine, completions)
    reference.save(tmp_path)
    other.load(tmp_path)
    for each in (reference, other):
        with each.whole(engine.causal_lm) as whole:
            assert torch.equal(logps_of(whole, completions), synchronised)
    assert not torch.allclose(twin_logps(engine, completions), synchronised)


def test_no_reference_is_loaded_with_beta_zero(build: Build, config) -> None:
    assert build_reference(config(3), build(3)) is None


PORT_TAKEN = """
import os, socket
from vdr_cli.engine.processes import start_distributed
with socket.create_server(("", 0)) as taken:
    os.environ.update(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(taken.getsockname()[1])
    start_distributed()
"""


def test_a_port_in_use_is_named() -> None:
    import subprocess
    import sys

    ended = subprocess.run([sys.executable, "-c", PORT_TAKEN], capture_output=True, text=True, check=False)
    last = ended.stderr.strip().splitlines()[-1]
    assert "MachineError: rank 0 cannot listen on 127.0.0.1:" in last and "--master-port" in last


def test_a_rank_with_other_settings_is_refused(config, monkeypatch: pytest.MonkeyPatch) -> None:
    from vdr_cli.training import opening

    same = config()
    other = same.model_copy(update={"grpo": same.grpo.model_copy(update={"beta": 0.1})})
    said: list[Any] = []
    monkeypatch.setattr(opening.collectives, "gather_objects", lambda own: said.append(own) or said)
    for each in (same, same):
        opening.refuse_other_settings(each)
    with pytest.raises(ConfigError, match=r"differ from those on .*, where rank 0 is"):
        opening.refuse_other_settings(other)
