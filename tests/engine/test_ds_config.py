"""From a DeepSpeed JSON to the complete configuration: what is resolved, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vdr_cli.config import Config
from vdr_cli.config.load import load_config
from vdr_cli.engine import build
from vdr_cli.engine.deepspeed_import import module
from vdr_cli.engine.ds_config import (
    SMALLEST_BUCKET,
    DsConfig,
    ds_config_path,
    micro_batches_per_rank,
    read_ds_config,
    resolve_ds_config,
    zero_stage,
)
from vdr_cli.errors import ConfigError

NAMED = ("zero1", "zero2", "zero3", "zero3_offload", "zero3_hpz", "zeropp", "superoffload")


def config(ds_config: str = "zero3", *overrides: str) -> Config:
    own = ["train.prompts_per_step=6", "rollout.group_size=4", "train.micro_batch_size=8", *overrides]
    return load_config(overrides=["model.name=other", f"engine.ds_config={ds_config}", *own])


def resolved(given: Config, on_gpu: bool = True, hidden_size: int = 64) -> DsConfig:
    return resolve_ds_config(given, world_size=2, hidden_size=hidden_size, bf16=True, on_gpu=on_gpu)


@pytest.mark.parametrize("name", NAMED)
def test_named_configurations_have_nothing_left_to_deepspeed(name: str) -> None:
    made = resolved(config(name))
    assert "auto" not in json.dumps(made)
    assert zero_stage(made) == (int(name[4]) if name[4].isdigit() else 3)
    assert made["train_micro_batch_size_per_gpu"] == 8 and made["train_batch_size"] == 16
    assert made["gradient_accumulation_steps"] == 1, "micro-batches are counted by the loop"
    assert made["gradient_clipping"] == 1.0 and made["bf16"] == {"enabled": True}
    assert ("offload_optimizer" in made["zero_optimization"]) == (name in ("zero3_offload", "superoffload"))


def test_buckets_follow_the_hidden_size() -> None:
    zero = resolved(config(), hidden_size=8192)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 8192**2
    assert zero["stage3_param_persistence_threshold"] == 81_920
    assert resolved(config(), hidden_size=64)["zero_optimization"]["reduce_bucket_size"] == SMALLEST_BUCKET


def test_nothing_is_offloaded_from_a_cpu() -> None:
    assert "offload_optimizer" not in resolved(config("zero3_offload"), on_gpu=False)["zero_optimization"]


def test_the_second_partition_of_weights_spans_a_host() -> None:
    made = resolve_ds_config(config("zero3_hpz"), 8, hidden_size=64, bf16=True, on_gpu=False, ranks_per_host=4)
    assert made["zero_optimization"]["zero_hpz_partition_size"] == 4


@pytest.mark.parametrize(
    ("name", "key"), [("zeropp", "zero_quantized_weights"), ("superoffload", "offload_optimizer.super_offload")]
)
def test_what_needs_a_gpu_says_so(name: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^engine.ds_config {name}: zero_optimization.{key} needs CUDA GPUs; give"):
        resolved(config(name), on_gpu=False)


@pytest.mark.parametrize(("world_size", "expected"), [(1, 3), (2, 2), (4, 1), (6, 1)])
def test_the_rank_with_most_groups_counts(world_size: int, expected: int) -> None:
    assert micro_batches_per_rank(config(), world_size) == expected


def test_a_path_is_read_where_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('\ufeff{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    assert ds_config_path(str(file)) == file
    assert read_ds_config(str(file)) == {"zero_optimization": {"stage": 2}}
    assert zero_stage({}) == 0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", r"mine.json:1: .*; correct the JSON"),
        ("[]", "a JSON object is needed, not list"),
        ('{"zero_optimisation": {}}', "unknown key zero_optimisation; did you mean zero_optimization?"),
        ('{"bf16": true}', "bf16 must be an object"),
        ('{"zero_optimization": {"offload_optimizer": "cpu"}}', "zero_optimization.offload_optimizer must be an"),
        ('{"zero_optimization": {"stage": "auto"}}', "mine.json: zero_optimization.stage must be 0, 1, 2 or 3"),
        ('{"optimizer": {"params": null}}', "mine.json: optimizer.params must be an object"),
        ('{"scheduler": {"params": []}}', "mine.json: scheduler.params must be an object"),
        ('{"activation_checkpointing": "auto"}', "mine.json: activation_checkpointing must be an object"),
        ('{"wall_clock_breakdown": "auto"}', "mine.json: wall_clock_breakdown must be true or false"),
        ('{"flops_profiler": {"enabled": "auto"}}', "mine.json: flops_profiler.enabled must be true or false"),
        ('{"steps_per_print": "auto"}', "mine.json: steps_per_print must be a number"),
    ],
)
def test_a_bad_file_is_named(text: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=line):
        read_ds_config(str(file))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"engine.ds_config zero9: no such file and not one of superoffload, zero1"):
        ds_config_path("zero9")


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"train_batch_size": 7}, "train_batch_size is 7 but train.prompts_per_step x rollout.group_size is 24"),
        ({"gradient_accumulation_steps": 5}, "gradient_accumulation_steps is 5 but .* is 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 but train.max_grad_norm is 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled disagrees with model.dtype"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"fp16": {"enabled": 1}}, "fp16 is not supported; remove it and set model.dtype to bfloat16 or float32"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16 is not supported; remove it"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.1}}}, "optimizer is set by train.learning_rate"),
        ({"optimizer": {"type": "Lion"}}, "optimizer.type is Lion but train.optimizer is adamw; remove it or make"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage is 7; give 0 to 3"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, 'zero_optimization.sub_group_size is "auto"'),
    ],
)
def test_conflicts_name_both_sides(given: dict[str, Any], line: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(given))
    with pytest.raises(ConfigError, match=line):
        resolved(config(str(file)))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "auto"])
def test_the_optimizer_that_runs_may_be_named(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "optimizer": {"type": name}}))
    assert "optimizer" not in resolved(config(str(file)))
    muon = config(str(file), "train.optimizer=muon", "train.muon_learning_rate=0.01")
    if name == "auto":
        assert "optimizer" not in resolved(muon)
    else:
        with pytest.raises(ConfigError, match=f"optimizer.type is {name} but train.optimizer is muon"):
            resolved(muon)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"communication_data_type": "float"}, "Invalid communication_data_type. .* Got: float; correct it"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype is not a setting; give .*"),
        ({"data_types": {"grad_accum_dtype": "xx"}}, "data_types.grad_accum_dtype is 'xx'; give bf16, fp16 or fp32"),
        ({"data_types": {"buffer_dtype": "int8"}}, "data_types.buffer_dtype is 'int8'; give bf16, fp16 or fp32"),
        (
            {"data_types": {"param_dtype": "bf16"}},
            "data_types.param_dtype is bf16 but model.dtype is float32; remove it or make them agree",
        ),
        (
            {"zero_optimization": {"stage": 0}, "data_types": {"grad_accum_dtype": "bf16"}},
            "without ZeRO, data_types.grad_accum_dtype is bf16 but model.dtype is float32; remove it or .*",
        ),
        ({"comms_logger": {"prof_ops": "all"}}, "prof_ops: Input should be a valid list; correct it"),
    ],
)
def test_what_deepspeed_refuses_is_not_the_models_fault(
    given: dict[str, Any], line: str, device: torch.device, tiny_path: Path, tmp_path: Path, monkeypatch
) -> None:
    """One line, before a weight is loaded."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, **given}))
    monkeypatch.setattr(build, "load_for_training", lambda *_: pytest.fail("weights are loaded"))
    with pytest.raises(ConfigError, match=f"^engine.ds_config .*mine.json: {line}$"):
        build.build_engine(config(str(file), f"model.name={tiny_path}", "model.dtype=float32"), device)


def test_types_that_need_the_norm_of_the_gradient(tmp_path: Path) -> None:
    """DeepSpeed raises for them only when the weights are loaded."""
    file = tmp_path / "mine.json"
    known = module("runtime.config").DtypeEnum
    zero = {"stage": 1, "compute_grad_norm": False}
    file.write_text(json.dumps({"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}))
    line = r"^engine.ds_config mine: zero_optimization.compute_grad_norm is false, which .* data_types.grad_accum_dtype"
    with pytest.raises(ConfigError, match=line):
        build._check_data_types("mine", resolved(config(str(file))), known)
    file.write_text(json.dumps({"zero_optimization": zero}))
    build._check_data_types("mine", resolved(config(str(file))), known)


def test_bfloat16_needs_zero(tmp_path: Path) -> None:
    """DeepSpeed's optimizer without ZeRO would begin with an Adam step on zero gradients (unfused_optimizer.py)."""
    file = tmp_path / "mine.json"
    file.write_text("{}")
    made = resolve_ds_config(config(str(file)), world_size=2, hidden_size=64, bf16=False, on_gpu=True)
    assert zero_stage(made) == 0
    with pytest.raises(ConfigError, match=r"mine.json: without ZeRO, .* or set model.dtype to float32"):
        resolved(config(str(file)))


def test_agreeing_and_automatic_values_pass(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    agreeing = {"train_batch_size": 24, "gradient_accumulation_steps": "auto", "optimizer": {"params": {"lr": "auto"}}}
    file.write_text(json.dumps({**agreeing, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 1}}))
    assert resolved(config(str(file)))["train_batch_size"] == 16, "DeepSpeed's own number: of one pass"
