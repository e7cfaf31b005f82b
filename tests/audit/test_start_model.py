"""The model and the prompts that a run started from, by the audit's own reading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from vdr_cli.audit.inputs import _encoded
from vdr_cli.audit.model import load_start, load_tokenizer
from vdr_cli.beds.registry import BEDS
from vdr_cli.config import ModelConfig
from vdr_cli.data.prompts import encode
from vdr_cli.models.loading import load_causal_lm


def test_a_saved_adapter_is_merged(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(BEDS["starter"].model_path)
    settings = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(base, settings).save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    found, expected = load_start(config, "float32", 0).state_dict(), load_causal_lm(str(tmp_path)).state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.double(), rtol=1e-5, atol=1e-6)
    assert load_tokenizer(config).vocab_size == load_tokenizer(ModelConfig(name="starter")).vocab_size


@pytest.mark.parametrize("prompt", ["a b", "<s> a", "<s> <s> a", "a </s>", "<s>"])
@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_prompts_are_encoded_as_in_training(prompt: str, template: str) -> None:
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="?")
    settings = SimpleNamespace(data=SimpleNamespace(max_prompt_tokens=None))
    assert _encoded(tokenizer, prompt, settings) == encode(tokenizer, prompt)  # type: ignore[arg-type]
