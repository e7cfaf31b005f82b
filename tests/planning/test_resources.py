"""The formulas against what was measured, and against what must hold."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from vdr_cli.cli.plan import find_shape
from vdr_cli.errors import ConfigError
from vdr_cli.planning.resources import (
    copy_of_weights,
    home_of,
    model_states,
    peak_memory,
    phase_memory,
    server_share,
    traffic,
    wants_layers,
    weights_of,
)
from vdr_cli.planning.shape import SIZES, Shape, shape_of
from vdr_cli.planning.work import Work

SMALL = Shape(
    hidden=128, layers=4, intermediate=384, heads=4, kv_heads=2, head_dim=32, vocabulary=2048, attention_bias=True
)
TWO = Work(gpus=2, element_bytes=4, prompts_per_step=4, group_size=4, prompt_tokens=8, new_tokens=8, micro_batch_size=4)


def config_of(shape: Shape) -> dict[str, object]:
    return {
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }


def small_model(shape: Shape = SMALL) -> torch.nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**config_of(shape), attn_implementation="sdpa"))


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_exactly(tied: bool) -> None:
    shape = dataclasses.replace(SMALL, tied=tied)
    assert shape.parameters == sum(parameter.numel() for parameter in small_model(shape).parameters())
    assert shape_of(config_of(shape)) == shape


@pytest.mark.parametrize(("name", "billions"), [("0.5B", 0.494), ("7B", 7.616), ("32B", 32.764), ("70B", 70.554)])
def test_sizes_are_the_published_ones(name: str, billions: float) -> None:
    assert SIZES[name].parameters / 1e9 == pytest.approx(billions, abs=5e-4)


def test_experts_and_ties_under_every_name() -> None:
    config = config_of(SMALL)
    assert shape_of(config | {"n_routed_experts": 8, "moe_intermediate_size": 32}).experts == 8
    assert shape_of(config | {"num_experts": None, "num_local_experts": 4}).experts == 4
    del config["tie_word_embeddings"]  # as in the files of GPT-2 and Gemma
    assert shape_of(config).tied


SIZE_IN_WORDS = '{"hidden_size": "big", "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}'


@pytest.mark.parametrize("text", ["{", "[1]", SIZE_IN_WORDS])
def test_a_config_of_anything_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as refused:
        find_shape(str(tmp_path))
    assert str(refused.value).startswith(f"--model {tmp_path}: ") and "\n" not in str(refused.value)


def test_a_config_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        shape_of({"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9})


def test_traffic_is_what_a_run_of_two_processes_moved() -> None:
    """Payload bytes of the collectives by scripts/verify/plan_check.py; DeepSpeed 0.19.8, both thresholds 0."""
    moved = traffic(SMALL, TWO)
    assert moved["rollout and disagreement"] * 2 == pytest.approx(5_251_584, rel=0.001)
    assert moved["update"] * 2 == pytest.approx(21_006_336 + 10_503_168, rel=0.001)
    two_passes = traffic(SMALL, dataclasses.replace(TWO, new_tokens=80))
    assert two_passes["update"] * 2 == pytest.approx(35_721_216 + 10_503_168, rel=0.001)
    checkpointed = dataclasses.replace(TWO, checkpointing=True, micro_batch_size=8)
    assert traffic(SMALL, checkpointed)["update"] * 2 == pytest.approx(10_503_168 + 5_251_584, rel=0.001)


def test_model_states_are_what_a_rank_held() -> None:
    """The same run; at float32 DeepSpeed keeps master weights beside the weights all the same."""
    states = model_states(SMALL, TWO)
    assert states["weights"] == pytest.approx(2_625_792, rel=0.001)
    assert states["gradients"] == pytest.approx(2_625_792, rel=0.001)
    assert states["master weights, moments"] == pytest.approx(2_625_792 + 5_251_588, rel=0.001)


def test_more_gpus_need_less_memory_each_and_stages_in_order() -> None:
    seven = SIZES["7B"]
    by_gpus = [peak_memory(seven, Work(gpus=gpus, prompts_per_step=512)) for gpus in (8, 64, 512)]
    assert by_gpus == sorted(by_gpus, reverse=True)
    muon = model_states(seven, Work(gpus=8, muon=True))["master weights, moments"]
    adamw = model_states(seven, Work(gpus=8))["master weights, moments"]
    assert adamw - muon == 4 * seven.layers * seven.layer_matrices / 8
    by_stage = [sum(model_states(seven, Work(gpus=8, stage=stage)).values()) for stage in (0, 1, 2, 3)]
    assert by_stage == sorted(by_stage, reverse=True)
    assert by_stage[0] == pytest.approx(16 * seven.parameters)
    assert by_stage[3] == pytest.approx(16 * seven.parameters / 8)


def test_one_gpu_moves_nothing() -> None:
    assert set(traffic(SIZES["0.5B"], Work(gpus=1)).values()) == {0.0}


def test_without_reduce_scatter_gradients_travel_twice() -> None:
    plain, gloo = traffic(SMALL, TWO), traffic(SMALL, dataclasses.replace(TWO, gloo=True))
    scattered = SMALL.parameters * 4 / 2
    assert gloo["update"] - plain["update"] == pytest.approx(TWO.micro_batches * scattered, rel=1e-3)


def test_layer_by_layer_no_full_copy_is_counted() -> None:
    layered = dataclasses.replace(TWO, by_layers=True, members=8)
    whole = dataclasses.replace(layered, by_layers=False)
    rest = SMALL.parameters - SMALL.layers * SMALL.layer_parameters
    assert copy_of_weights(SMALL, whole) == 4 * SMALL.parameters
    assert copy_of_weights(SMALL, layered) == 4 * (rest + SMALL.layer_parameters)
    assert phase_memory(SMALL, layered)["rollout"] == copy_of_weights(SMALL, layered)  # vLLM holds the cache
    assert copy_of_weights(SMALL, dataclasses.replace(layered, stage=2)) == 0


def test_layer_by_layer_a_step_gathers_the_model_a_few_times() -> None:
    """Once for vLLM, once to check what arrived, once for the members, whatever their number."""
    layers = 4 * SMALL.layers * SMALL.layer_parameters
    for members in (2, 32):
        moved = traffic(SMALL, dataclasses.replace(TWO, by_layers=True, members=members))
        assert moved["weights to vLLM"] == layers * 2 / 2
        assert moved["reference and disagreement"] == 4 * SMALL.parameters / 2
    seventy = traffic(SIZES["70B"], Work(gpus=64, prompts_per_step=64, members=8, by_layers=True))
    assert seventy["weights to vLLM"] + seventy["reference and disagreement"] < 5 * 2 * SIZES["70B"].parameters


def test_a_reference_is_a_second_copy() -> None:
    two_copies = phase_memory(SMALL, dataclasses.replace(TWO, reference=True))["reference"]
    assert two_copies > 2 * copy_of_weights(SMALL, TWO)


def test_auto_is_what_the_engine_would_choose() -> None:
    work = Work(gpus=64, prompts_per_step=64)
    seventy = SIZES["70B"]
    assert wants_layers("auto", seventy, work, 80 * 2**30)
    assert not wants_layers("auto", seventy, work, 512 * 2**30)
    assert not wants_layers("auto", seventy, work, None)
    assert not wants_layers("whole", seventy, work, 80 * 2**30)
    assert wants_layers("layer", seventy, work, None)
    assert not wants_layers("layer", seventy, dataclasses.replace(work, stage=2), None)


def test_a_server_that_sleeps_has_what_the_states_and_one_copy_leave() -> None:
    shape, gpu = SIZES["0.5B"], 80e9
    work = Work(1, prompts_per_step=8, group_size=8, prompt_tokens=512, new_tokens=512, micro_batch_size=8)
    states = sum(model_states(shape, work).values())
    asleep, awake = (server_share(shape, work, gpu, sleeps) for sleeps in (True, False))
    assert asleep == pytest.approx(1 - (states + 2 * shape.parameters) / gpu - 0.05)
    assert 0 <= awake < asleep and server_share(shape, work, 1e9, False) == 0


def test_the_command_says_which_copy_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    from vdr_cli.cli import app

    asked = ["plan", "--model", "70B", "--gpus", "64", "--gpu-memory", "80"]
    assert app.run([*asked, "--set", "engine.gather=layer", "--set", "rollout.backend=vllm"]) == 0
    assert "one decoder layer at a time (engine.gather)" in capsys.readouterr().out
    assert app.run([*asked, "--set", "engine.gather=whole"]) == 0
    told = capsys.readouterr().out
    assert "model.lora" not in told
    assert app.run([*asked, "--set", "model.lora.rank=8"]) == 0
    assert "model.lora: counted as if all parameters were trained" in capsys.readouterr().out
    assert "a full copy of the weights (engine.gather)" in told and "does not fit" in told
    assert app.run(["plan", "--model", "0.5B", "--gpu-memory", "80", "--set", "rollout.vllm.python=python"]) == 0
    assert "a vLLM server on the same GPU, never asleep (rollout.vllm.sleep): 0." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "home", "kept"),
    [
        ({"gpus": 8, "gpu_bytes": 80e9}, "device", 1.0),
        ({"gpus": 8, "gpu_bytes": 10e9}, "sharded", 1 / 8),
        ({"gpus": 8, "gpu_bytes": 10e9, "stage": 2}, "host", 0.0),
        ({"gpus": 8, "gpu_bytes": 10e9, "by_layers": True}, "host", 0.0),
        ({"gpus": 1}, "host", 0.0),
    ],
)
def test_a_reward_model_is_counted_where_a_run_keeps_it(settings: dict[str, Any], home: str, kept: float) -> None:
    judge, plain = SIZES["0.5B"], Work(**{"prompts_per_step": 8, **settings})
    work = dataclasses.replace(plain, reward_models=(judge,))
    size, whole = weights_of(judge), {"device": 0.0}.get(home, 1.0)
    assert size == 2 * judge.parameters and home_of(judge, work) == home
    assert model_states(SIZES["7B"], work)["reward models"] == kept * size
    judging = phase_memory(SIZES["7B"], work)["rewards"] - copy_of_weights(SIZES["7B"], work)
    assert judging == whole * size + 2 * 16_384 * (8 * judge.hidden + 3 * judge.intermediate)
    moved = traffic(SIZES["7B"], work)
    assert moved.pop("rewards", 0.0) == (size * 7 / 8 if home == "sharded" else 0.0)
    assert moved == traffic(SIZES["7B"], plain)


def test_members_that_divide_rows_need_less_of_each() -> None:
    work = Work(8, prompts_per_step=8, members=8, new_tokens=16_384)
    need = [
        phase_memory(SIZES["0.5B"], dataclasses.replace(work, sequence=n))["disagreement, at least"] for n in (1, 2, 4)
    ]
    assert need[0] > need[1] > need[2]


def test_the_command_says_where_reward_models_lie(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from vdr_cli.cli import app

    asked = ["plan", "--model", "7B", "--gpus", "8", "--gpu-memory", "80", "--set"]
    assert app.run([*asked, "rewards.functions=[{name: model:7B}, {name: exact_match}]"]) == 0
    assert "reward model 7B: 13.2 GiB, a share on every GPU between two steps" in capsys.readouterr().out
    assert app.run([*asked, f"rewards.functions=[{{name: 'model:{tmp_path}'}}]"]) == 2
    assert f"rewards.functions model:{tmp_path}: no config.json there" in capsys.readouterr().err
