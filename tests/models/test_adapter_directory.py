"""A saved LoRA adapter as a model: its base model with the adapter in the weights, as PEFT merges it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from vdr_cli.beds.registry import BEDS
from vdr_cli.errors import ConfigError
from vdr_cli.models.loading import load_causal_lm, load_tokenizer
from vdr_cli.models.paths import resolve_model_path

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def base_of(kind: str, directory: Path) -> Path:
    torch.manual_seed(0)
    if kind == "gpt2":  # whose linear maps are stored transposed
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2)).save_pretrained(directory)
    else:
        config = Qwen2Config(**SMALL, intermediate_size=24, num_key_value_heads=1)
        Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


def adapter_of(base: Path, directory: Path, **settings: object) -> Path:
    """A saved adapter, neither factor zero."""
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_weights_are_those_that_peft_merges(kind: str, settings: dict[str, object], tmp_path: Path) -> None:
    base = base_of(kind, tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter", **settings)
    found = load_causal_lm(str(adapter)).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    assert found.keys() == merged.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    start = load_causal_lm(str(base)).state_dict()
    assert any(not torch.equal(found[name], start[name]) for name in found)


def test_the_tokenizer_is_the_base_models_unless_the_adapter_brings_one(tmp_path: Path) -> None:
    adapter = adapter_of(BEDS["starter"].model_path, tmp_path / "adapter")
    assert resolve_model_path(str(adapter)) == str(BEDS["starter"].model_path)
    assert load_tokenizer(str(adapter)).vocab_size == load_tokenizer("starter").vocab_size


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "./not/there"}, "the adapter's base model: model ./not/there: no such directory"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"use_dora": True}, "vdr cannot add this adapter \\(use_dora\\) to its base model; merge it"),
        ({"init_lora_weights": "pissa_niter_4"}, "cannot add this adapter \\(init_lora_weights pissa_niter_4\\)"),
        ({"alora_invocation_tokens": [3]}, "cannot add this adapter \\(alora_invocation_tokens\\)"),
        ({"peft_type": "IA3"}, "vdr cannot add this adapter \\(IA3\\) to its base model; merge it"),
    ],
)
def test_what_cannot_be_added_is_refused_in_one_line(change: dict[str, object], message: str, tmp_path: Path) -> None:
    adapter = adapter_of(base_of("qwen2", tmp_path / "base"), tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message) as refused:
        load_causal_lm(str(adapter))
    assert "\n" not in str(refused.value)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    adapter = adapter_of(base_of("qwen2", tmp_path / "base"), tmp_path / "adapter")
    shutil.rmtree(tmp_path / "base")
    base_of("gpt2", tmp_path / "base")
    with pytest.raises(ConfigError, match="has no place in the base model GPT2LMHeadModel"):
        load_causal_lm(str(adapter))
