"""The embedded model: what the package promises of it, measured exactly."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vdr_cli.config import Config
from vdr_cli.starter import countdown, paths


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(paths.model_path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(paths.model_path())


def solve_rates(model, tokenizer, split):
    """(N,) probability that one sample at temperature 1 is one of the problem's answers: their sum."""
    rates = []
    for row in countdown.rows(split):
        problem = countdown.Problem(tuple(sorted(row["numbers"])), row["target"])
        answers = countdown.solutions()[problem]
        prompt = tokenizer(row["prompt"]).input_ids
        ids = torch.tensor([prompt + tokenizer(answer).input_ids + [tokenizer.eos_token_id] for answer in answers])
        with torch.no_grad():
            logps = model(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)  # (answers, 6, V)
        picked = logps.gather(-1, ids[:, len(prompt) :].unsqueeze(-1)).squeeze(-1)
        rates.append(picked.sum(1).exp().sum())
    return torch.stack(rates)


def test_size(model):
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_000_000
    assert sum(file.stat().st_size for file in paths.model_path().iterdir()) <= 4 * 2**20
    assert model.config.model_type == "qwen2"


def test_held_out_problems_are_solved_now_and_then(model, tokenizer):
    rates = solve_rates(model, tokenizer, "test")
    assert 0.15 <= rates.mean() <= 0.40
    assert (1 - (1 - rates) ** 8).mean() >= 0.75


def test_tokenizer_is_one_token_a_character(model, tokenizer):
    text = "3 5 7=22:"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    every = "".join(dict.fromkeys("".join(row["prompt"] for row in countdown.rows("train")) + "+-*"))
    assert tokenizer.decode(tokenizer(every).input_ids) == every


def test_every_answer_fits(tokenizer):
    longest = max(len(tokenizer(answer).input_ids) for found in countdown.solutions().values() for answer in found)
    assert longest + 1 <= paths.recipe()["rollout"]["max_new_tokens"]


def test_recipe_is_a_valid_configuration():
    config = Config.model_validate(paths.recipe())
    assert config.train.output is None
    assert config.model.name == config.data.name == "starter"


def test_paths_do_not_load_torch():
    code = "import sys, vdr_cli.starter.paths as p; p.recipe(); p.rows('test'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
