"""Training starts from the model that evaluation and scoring read, and exports it: logits on a probe, under ZeRO-3."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vdr_cli.beds.registry import BEDS
from vdr_cli.models.loading import load_causal_lm

pytestmark = pytest.mark.integration
PROBE = torch.tensor([[3, 5, 7, 4, 9]])


def own_head(directory: Path) -> None:
    shutil.copytree(BEDS["starter"].model_path, directory)
    file = directory / "model.safetensors"
    weights = load_file(file)
    table = weights["model.embed_tokens.weight"]
    torch.manual_seed(0)
    weights["lm_head.weight"] = table + 0.3 * torch.randn_like(table)
    save_file(weights, file, {"format": "pt"})


def untied_and_sharded(directory: Path) -> None:
    own_head(directory)
    config = AutoConfig.from_pretrained(directory)
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_pretrained(directory, config=config).save_pretrained(directory, max_shard_size="100KB")
    (directory / "model.safetensors").unlink()


def padded_vocabulary(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(BEDS["starter"].model_path)
    model.resize_token_embeddings(64, mean_resizing=False)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(BEDS["starter"].model_path).save_pretrained(directory)


def adapter(directory: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(BEDS["starter"].model_path), config)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(directory)


@torch.no_grad()
def logits(path: Path) -> torch.Tensor:
    return load_causal_lm(str(path))(PROBE).logits.double()


@pytest.mark.parametrize(
    ("make", "ranks"), [(own_head, 2), (untied_and_sharded, 1), (padded_vocabulary, 1), (adapter, 2)]
)
def test_the_exported_model_is_the_one_that_is_read(make: Any, ranks: int, tmp_path: Path, forked: Any) -> None:
    source, run = tmp_path / "model", tmp_path / "run"
    make(source)
    settings = ["rollout.group_size=2", "train.prompts_per_step=2", "rollout.max_new_tokens=4", "observe.report=false"]
    settings += ["train.learning_rate=1e-12", "observe.tensorboard=false"]
    flags = [word for setting in settings for word in ("--set", setting)]
    flags += ["--model", str(source), "--data", "starter", "--reward", "countdown", "--steps", "1", "--mode", "none"]
    done = forked("train", "--output", str(run), *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(logits(run), logits(source), rtol=0, atol=1e-6)
    if make is not padded_vocabulary:
        assert not torch.allclose(logits(source), logits(BEDS["starter"].model_path), atol=1e-3)
