"""Weights on a vLLM server: when they are pushed, under which names, and the proof that it has them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tests.rollout.conftest import KEYS, PROMPTS, NoTokenizer, change, connect, tiny
from vdr_cli.errors import ConfigError, MachineError
from vdr_cli.rollout.base import RolloutRequest
from vdr_cli.rollout.transformers_backend import TransformersRollout
from vdr_cli.rollout.vllm_backend import JUDGED
from vdr_cli.rollout.vllm_client import VllmClient
from vdr_cli.rollout.weights import WEIGHTS, checksum, write_model
from vdr_cli.samples import Sampling


def test_weights_are_pushed_when_they_changed_and_only_then(fake_vllm: Any, tmp_path: Path) -> None:
    model, rollout, sampling = tiny(), connect(fake_vllm, tmp_path), Sampling(max_new_tokens=6)
    rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert fake_vllm.reloads == 1
    change(model)
    out = rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert fake_vllm.reloads == 2
    own = TransformersRollout(0, [1]).generate(model, RolloutRequest(PROMPTS, 2, sampling, [key >> 1 for key in KEYS]))
    assert torch.equal(out.completion_ids, own.completion_ids)


def test_a_push_waits_for_what_is_sampled_under_the_old_weights(
    fake_vllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rollout, sampling = tiny(), connect(fake_vllm, tmp_path), Sampling(max_new_tokens=6)
    whole = rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    fake_vllm.lock.acquire()
    wait = rollout.start(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    before, done = list(rollout.sampling), []
    reload = VllmClient.reload
    monkeypatch.setattr(VllmClient, "reload", lambda *a: (done.append(all(each.done() for each in before)), reload(*a)))
    change(model)
    threading.Timer(0.3, fake_vllm.lock.release).start()
    rollout.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert done == [True]
    assert torch.equal(wait().completion_ids, whole.completion_ids)


def test_other_ranks_wait_for_rank_0s_push(fake_vllm: Any, tmp_path: Path) -> None:
    model, sampling = tiny(), Sampling(max_new_tokens=6)
    other = connect(fake_vllm, tmp_path, main=False, start_timeout=0.2)
    with pytest.raises(MachineError, match="rank 0 did not report"):
        other.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    first = connect(fake_vllm, tmp_path).generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert torch.equal(
        first.completion_ids, other.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS)).completion_ids
    )
    change(model)
    with pytest.raises(MachineError, match="rank 0 did not report"):
        other.generate(model, RolloutRequest(PROMPTS, 2, sampling, KEYS))
    assert fake_vllm.reloads == 1


def test_a_push_that_fails_on_rank_0_ends_the_other_ranks_wait(fake_vllm: Any, tmp_path: Path) -> None:
    model, request = tiny(), RolloutRequest(PROMPTS, 2, Sampling(6), KEYS)
    fake_vllm.raw_logps = True
    with pytest.raises(ConfigError, match="processed_logprobs"):
        connect(fake_vllm, tmp_path).generate(model, request)
    other = connect(fake_vllm, tmp_path, main=False, start_timeout=60.0)
    with pytest.raises(MachineError, match=r"rank 0 could not push the weights: .*processed_logprobs"):
        other.generate(model, request)


def test_the_checksum_sees_one_changed_bit_anywhere() -> None:
    model = tiny().to(torch.bfloat16)
    before = checksum(model)
    assert checksum(tiny().to(torch.bfloat16)) == before
    for parameter in model.parameters():
        with torch.no_grad():
            bits = parameter.view(torch.int16).flatten()
            bits[-1] ^= 1
            assert checksum(model) != before
            bits[-1] ^= 1
    assert checksum(model) == before


def plant_stale(fake: Any) -> None:
    fake.stale = True


def plant_old_head(fake: Any) -> None:
    fake.keeps_head = True


@pytest.mark.parametrize("plant", [plant_stale, plant_old_head])
@pytest.mark.parametrize("amount", [0.05, 1e-3])
def test_wrong_weights_after_a_push_stop_the_run(
    plant: Callable[[Any], None], amount: float, fake_vllm: Any, tmp_path: Path
) -> None:
    model, rollout = tiny(tied=plant is plant_old_head), connect(fake_vllm, tmp_path)
    rollout.generate(model, RolloutRequest(PROMPTS, 2, Sampling(6), KEYS))
    plant(fake_vllm)
    change(model, amount)
    with pytest.raises(ConfigError, match="differ from the trainer's by"):
        rollout.generate(model, RolloutRequest(PROMPTS, 2, Sampling(6), KEYS))


def test_raw_logps_are_noticed_at_any_training_temperature(fake_vllm: Any, tmp_path: Path) -> None:
    fake_vllm.raw_logps = True
    with pytest.raises(ConfigError, match="processed_logprobs"):
        connect(fake_vllm, tmp_path).generate(tiny(), RolloutRequest(PROMPTS, 2, Sampling(6, temperature=1.0), KEYS))


def test_a_push_may_differ_more_than_the_first_that_happened_to_differ_little(fake_vllm: Any, tmp_path: Path) -> None:
    """In bfloat16 a few tokens' mean difference varies tenfold with the tokens."""
    rollout = connect(fake_vllm, tmp_path)
    for difference in (0.002, 0.006, 0.017):
        rollout._check_probes(difference, 0)
    with pytest.raises(ConfigError, match=r"at most 0\.0680"):
        rollout._check_probes(0.08, 0)
    for _ in range(JUDGED):
        rollout._check_probes(0.017, 0)
    rollout._check_probes(0.06, 0)
    with pytest.raises(ConfigError, match=r"at most 0\.0680"):  # later ones may be stale weights, and raise no bound
        rollout._check_probes(0.08, 0)


def test_a_tied_model_is_served_untied(tmp_path: Path) -> None:
    model = tiny(tied=True)
    write_model(model, NoTokenizer(), tmp_path)  # type: ignore[arg-type]
    served = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert not served.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    assert served.lm_head.weight.data_ptr() != served.model.embed_tokens.weight.data_ptr()
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(served(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gemma2", "qwen2"])
def test_a_server_reads_the_names_of_a_checkpoint(kind: str, tmp_path: Path) -> None:
    """transformers holds experts as one tensor, under other names; and vLLM has no LM head for Gemma 2."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    experts = {"num_experts": 2, "num_local_experts": 2, "moe_intermediate_size": 8, "num_experts_per_tok": 1}
    config = AutoConfig.for_model(kind, **sizes, **(experts if kind in ("mixtral", "qwen3_moe") else {}))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "saved")
    write_model(model, NoTokenizer(), tmp_path / "served")  # type: ignore[arg-type]
    saved, served = load_file(tmp_path / "saved" / WEIGHTS), load_file(tmp_path / "served" / WEIGHTS)
    assert served.keys() - {"lm_head.weight"} == saved.keys() - {"lm_head.weight"}
    assert all(torch.equal(served[name], saved[name]) for name in saved)
    assert ("lm_head.weight" in served) == (kind != "gemma2")
    tied = json.loads((tmp_path / "served" / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (kind == "gemma2")
